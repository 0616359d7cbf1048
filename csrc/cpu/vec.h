// A vector of 64 bytes in the accumulation type, on GCC/Clang vector extensions: one zmm, two ymm or four xmm/NEON
// registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "isa.h"

#define GRANVIT_INLINE inline __attribute__((always_inline))

namespace granvit::cpu {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace GRANVIT_ISA {

// What sums over a storage type are kept in.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

typedef float f32x16 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  using type = f32x16;
};
template <>
struct VecOf<double> {
  using type = f64x8;
};
template <typename A>
using Vec = typename VecOf<A>::type;
template <typename A>
constexpr int kLanes = 64 / sizeof(A);

template <typename A>
GRANVIT_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};  // unlike 0 + x this is x for -0 too, which spares an addition
}

// bfloat16: the upper half of a float32, rounded to nearest even; NaN stays NaN.
GRANVIT_INLINE f32x16 widen_bf16(u16x16 bits) {
  const u32x16 wide = __builtin_convertvector(bits, u32x16) << 16;
  f32x16 x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}
GRANVIT_INLINE u16x16 narrow_bf16(f32x16 x) {
  u32x16 bits;
  std::memcpy(&bits, &x, sizeof bits);
  const u32x16 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const i32x16 ordered = (x == x);
  const u32x16 result = (ordered ? rounded : (bits | 0x400000u)) >> 16;
  return __builtin_convertvector(result, u16x16);
}

// float16 through the processor's own conversion where there is one; otherwise lane by lane in integer arithmetic.
GRANVIT_INLINE float widen_f16_scalar(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  const uint32_t mantissa = h & 0x3ffu;
  uint32_t bits;
  float x;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // subnormal: exact in float32
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign;
  }
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
GRANVIT_INLINE uint16_t narrow_f16_scalar(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to beyond 65504
  if (bits < 0x38800000u) {                                               // subnormal: let float addition round
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);  // rebias the exponent (-112 << 23) and round to nearest even
  return static_cast<uint16_t>(sign | (bits >> 13));
}

GRANVIT_INLINE f32x16 load(const float* p) {
  f32x16 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
GRANVIT_INLINE f64x8 load(const double* p) {
  f64x8 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
GRANVIT_INLINE f32x16 load(const bf16* p) {
  u16x16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen_bf16(bits);
}
GRANVIT_INLINE f32x16 load(const f16* p) {
  f32x16 x;
#if defined(__AVX512F__)
  const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  std::memcpy(&x, &wide, sizeof x);
#elif defined(__F16C__)
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  std::memcpy(&x, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&x) + sizeof low, &high, sizeof high);
#else
  for (int i = 0; i < 16; ++i) x[i] = widen_f16_scalar(p[i].bits);
#endif
  return x;
}

GRANVIT_INLINE void store(float* p, f32x16 x) { std::memcpy(p, &x, sizeof x); }
GRANVIT_INLINE void store(double* p, f64x8 x) { std::memcpy(p, &x, sizeof x); }
GRANVIT_INLINE void store(bf16* p, f32x16 x) {
  const u16x16 bits = narrow_bf16(x);
  std::memcpy(p, &bits, sizeof bits);
}
GRANVIT_INLINE void store(f16* p, f32x16 x) {
#if defined(__AVX512F__)
  __m512 wide;
  std::memcpy(&wide, &x, sizeof wide);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  __m256 low, high;
  std::memcpy(&low, &x, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 16; ++i) p[i].bits = narrow_f16_scalar(x[i]);
#endif
}

// The first n lanes; the others read as zero and are not written.
template <typename T>
GRANVIT_INLINE Vec<acc_t<T>> load_first(const T* p, int n) {
  T padded[kLanes<acc_t<T>>] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}
template <typename T>
GRANVIT_INLINE void store_first(T* p, Vec<acc_t<T>> x, int n) {
  T padded[kLanes<acc_t<T>>];
  store(padded, x);
  for (int i = 0; i < n; ++i) p[i] = padded[i];
}

// Runs `full(c)` for every whole vector of [0, n) and `rest(c, lanes)` for what remains.
template <typename A, typename Full, typename Rest>
GRANVIT_INLINE void for_each_vec(int64_t n, Full&& full, Rest&& rest) {
  int64_t c = 0;
  for (; c + kLanes<A> <= n; c += kLanes<A>) full(c);
  if (c < n) rest(c, static_cast<int>(n - c));
}

// Sum of all lanes, by halves: the same order on every instruction set.
template <typename A>
GRANVIT_INLINE A sum_lanes(Vec<A> x) {
  A lane[kLanes<A>];
  std::memcpy(lane, &x, sizeof x);
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

}  // namespace GRANVIT_ISA

// Calls body(T{}) with the storage type of `dtype`.
template <typename Body>
GRANVIT_INLINE void with_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kBFloat16:
      return body(bf16{});
    case DType::kFloat16:
      return body(f16{});
  }
}

}  // namespace granvit::cpu
