// How matrix products hold their operands.
//
// A unit is what one lane takes in a step of a sum: one float or double, or where the processor multiplies pairs of
// bfloat16 two of them, neighbours along the summed dimension. Activations lie in scratch memory as rows of units.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "vec.h"

namespace granvit::cpu::GRANVIT_ISA {

template <typename T>
GRANVIT_INLINE Vec<acc_t<T>> load_some(const T* p, int lanes) {
  return lanes == kLanes<acc_t<T>> ? load(p) : load_first(p, lanes);
}
template <typename T>
GRANVIT_INLINE void store_some(T* p, Vec<acc_t<T>> x, int lanes) {
  lanes == kLanes<acc_t<T>> ? store(p, x) : store_first(p, x, lanes);
}

#if defined(__AVX512BF16__)
// The processor's own rounding, which takes subnormal numbers for zero like its products of pairs do.
GRANVIT_INLINE u16x16 round_to_bf16(f32x16 x) {
  __m512 bits;
  std::memcpy(&bits, &x, sizeof bits);
  const __m256bh rounded = _mm512_cvtneps_pbh(bits);
  u16x16 y;
  std::memcpy(&y, &rounded, sizeof y);
  return y;
}
GRANVIT_INLINE void store_some(bf16* p, f32x16 x, int lanes) {
  const u16x16 y = round_to_bf16(x);
  std::memcpy(p, &y, lanes == 16 ? sizeof y : static_cast<size_t>(lanes) * sizeof *p);
}
#endif

// What the tiles of a product compute with: one register, where Vec may be several.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <typename E>
struct RegisterOf {
  typedef E type __attribute__((vector_size(kRegisterBytes)));
};
template <typename E>
using Register = typename RegisterOf<E>::type;
template <typename E>
constexpr int kRegisterLanes = kRegisterBytes / sizeof(E);

template <typename R, typename E>
GRANVIT_INLINE R load_bits(const E* p) {
  R x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

GRANVIT_INLINE Register<float> load_register(const float* p) { return load_bits<Register<float>>(p); }
GRANVIT_INLINE Register<double> load_register(const double* p) { return load_bits<Register<double>>(p); }
GRANVIT_INLINE Register<float> load_register(const bf16* p) {
  typedef uint16_t Halves __attribute__((vector_size(kRegisterBytes / 2)));
  const Register<uint32_t> wide = __builtin_convertvector(load_bits<Halves>(p), Register<uint32_t>) << 16;
  return load_bits<Register<float>>(&wide);
}
GRANVIT_INLINE Register<float> load_register(const f16* p) {
#if defined(__AVX512F__)
  return load(p);
#elif defined(__F16C__)
  const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return load_bits<Register<float>>(&wide);
#else
  Register<float> x;
  for (int i = 0; i < kRegisterLanes<float>; ++i) x[i] = widen_f16_scalar(p[i].bits);
  return x;
#endif
}

// Units of an operand whose tensors have storage type T. Loads and sums are in registers, the rest in whole Vecs.
template <typename T>
struct Units {
  using Unit = acc_t<T>;
  using Operand = Register<Unit>;
  static constexpr int kDepth = 1;  // elements in a unit

  static GRANVIT_INLINE Operand load_units(const Unit* p) { return load_register(p); }
  static GRANVIT_INLINE Operand splat_unit(Unit x) { return x - Operand{}; }
  // Units from elements that lie next to each other; the elements from `count` on are zero.
  static GRANVIT_INLINE Operand load_elements(const T* p) { return load_register(p); }
  static GRANVIT_INLINE Operand load_first_elements(const T* p, int count) {
    T padded[kRegisterLanes<Unit>] = {};
    for (int i = 0; i < count; ++i) padded[i] = p[i];
    return load_register(padded);
  }
  static GRANVIT_INLINE Register<Unit> multiply_add(Register<Unit> sum, Operand a, Operand b) { return sum + a * b; }

  // One unit a column from neighbouring rows, given as values or in memory; the columns from `lanes` on are zero.
  static GRANVIT_INLINE Vec<Unit> stack(Vec<Unit> x, Vec<Unit>) { return x; }
  static GRANVIT_INLINE Vec<Unit> stack(const T* row, const T*, int lanes) { return load_some(row, lanes); }
  static GRANVIT_INLINE void store_units(Unit* p, Vec<Unit> x) { store(p, x); }
  // Elements [c, c + kLanes) of a row of units.
  static GRANVIT_INLINE Vec<Unit> load_row(const Unit* row, int64_t c) { return load(row + c); }
  static GRANVIT_INLINE void store_row(Unit* row, int64_t c, Vec<Unit> x) { store(row + c, x); }
};

#if defined(__AVX512BF16__)
struct bf16x2 {
  uint32_t bits;
};

template <>
struct Units<bf16> {
  using Unit = bf16x2;
  using Operand = u32x16;
  static constexpr int kDepth = 2;

  static GRANVIT_INLINE Operand load_units(const Unit* p) { return load_bits<Operand>(p); }
  static GRANVIT_INLINE Operand splat_unit(Unit x) { return x.bits - Operand{}; }
  static GRANVIT_INLINE Operand load_elements(const bf16* p) { return load_bits<Operand>(p); }
  static GRANVIT_INLINE Operand load_first_elements(const bf16* p, int count) {
    Operand x{};
    std::memcpy(&x, p, static_cast<size_t>(count) * sizeof *p);
    return x;
  }
  static GRANVIT_INLINE f32x16 multiply_add(f32x16 sum, Operand a, Operand b) {
    const __m512 s = _mm512_dpbf16_ps(load_bits<__m512>(&sum), load_bits<__m512bh>(&a), load_bits<__m512bh>(&b));
    return load_bits<f32x16>(&s);
  }

  static GRANVIT_INLINE u32x16 stack(f32x16 x, f32x16 next) {
    return interleave(round_to_bf16(x), round_to_bf16(next));
  }
  static GRANVIT_INLINE u32x16 stack(const bf16* row, const bf16* next, int lanes) {
    u16x16 x{}, y{};
    const size_t bytes = static_cast<size_t>(lanes) * sizeof *row;
    if (lanes == 16) {
      std::memcpy(&x, row, sizeof x);
      if (next != nullptr) std::memcpy(&y, next, sizeof y);
    } else {
      std::memcpy(&x, row, bytes);
      if (next != nullptr) std::memcpy(&y, next, bytes);
    }
    return interleave(x, y);
  }
  static GRANVIT_INLINE u32x16 interleave(u16x16 x, u16x16 next) {
    return __builtin_convertvector(x, u32x16) | (__builtin_convertvector(next, u32x16) << 16);
  }
  static GRANVIT_INLINE void store_units(Unit* p, u32x16 x) { std::memcpy(p, &x, sizeof x); }
  static GRANVIT_INLINE f32x16 load_row(const Unit* row, int64_t c) {
    return load(reinterpret_cast<const bf16*>(row) + c);
  }
  static GRANVIT_INLINE void store_row(Unit* row, int64_t c, f32x16 x) {
    store_some(reinterpret_cast<bf16*>(row) + c, x, 16);
  }
};
#endif

template <typename T>
using Unit = typename Units<T>::Unit;

// Number of steps in a sum over `elements`.
template <typename T>
GRANVIT_INLINE int64_t unit_steps(int64_t elements) {
  return (elements + Units<T>::kDepth - 1) / Units<T>::kDepth;
}

// Units that a row of `elements` takes, rounded up to whole vectors.
template <typename T>
GRANVIT_INLINE int64_t row_units(int64_t elements) {
  constexpr int64_t kVec = kLanes<acc_t<T>> * Units<T>::kDepth;
  return (elements + kVec - 1) / kVec * kLanes<acc_t<T>>;
}

// Rows of activations in scratch. `stride` counts units; what pads a row is zero.
template <typename T>
struct Rows {
  Unit<T>* data;
  int64_t stride;

  Unit<T>* row(int64_t r) const { return data + r * stride; }
};

template <typename T>
Rows<T> take_rows(Scratch& scratch, int64_t rows, int64_t elements) {
  // One vector more, so that neighbouring rows do not compete for the same cache sets.
  const int64_t stride = row_units<T>(elements) + kLanes<acc_t<T>>;
  return {scratch.take<Unit<T>>(rows * stride), stride};
}

// Zero beyond the last element, where the vectors of a row end.
template <typename T>
void clear_padding(const Rows<T>& rows, int64_t count, int64_t elements) {
  const int64_t units = row_units<T>(elements), begin = units - std::min<int64_t>(units, kLanes<acc_t<T>>);
  for (int64_t r = 0; r < count; ++r) std::memset(rows.row(r) + begin, 0, (units - begin) * sizeof(Unit<T>));
}

// Calls body(c, lanes) for the vectors of a row of `elements`, padding included (lanes = 0 there).
template <typename T, typename Body>
GRANVIT_INLINE void for_each_row_vec(int64_t elements, Body&& body) {
  constexpr int kVec = kLanes<acc_t<T>>;
  for (int64_t c = 0; c < row_units<T>(elements) * Units<T>::kDepth; c += kVec)
    body(c, static_cast<int>(std::clamp<int64_t>(elements - c, 0, kVec)));
}

// to[c] = sum over the rows, by blocks of rows so that rounding does not grow with their number.
template <typename T>
void sum_rows(const Rows<T>& rows, int64_t count, int64_t elements, T* to) {
  using A = acc_t<T>;
  constexpr int64_t kColumns = 256, kBlock = 32;
  parallel_tasks((elements + kColumns - 1) / kColumns, [&](int64_t task, Scratch&) {
    for (int64_t c = task * kColumns; c < std::min(elements, (task + 1) * kColumns); c += kLanes<A>) {
      Vec<A> total{};
      for (int64_t begin = 0; begin < count; begin += kBlock) {
        Vec<A> sum{};
        for (int64_t r = begin; r < std::min(count, begin + kBlock); ++r) sum += Units<T>::load_row(rows.row(r), c);
        total += sum;
      }
      store_some(to + c, total, static_cast<int>(std::min<int64_t>(kLanes<A>, elements - c)));
    }
  });
}

}  // namespace granvit::cpu::GRANVIT_ISA
