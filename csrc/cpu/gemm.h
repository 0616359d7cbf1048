// Matrix products of a few rows of activations with large weights, in register tiles.
//
// `multiply_rows` (C = A W^T, weights row by row as a linear layer holds them) runs lanes along the summed dimension and
// reads every weight once, in place. `multiply_columns` (C = A B) runs lanes along B's columns, from panels.
//
// Activations are held in units: what one lane takes in a step. A unit is one float or double; where the processor
// multiplies pairs of bfloat16 it is two of them, neighbours along the summed dimension.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "vec.h"

namespace granvit::cpu::GRANVIT_ISA {

// Tile sizes: as many accumulators as the registers hold beside the operands.
#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotColumns = 4, kTileRows = 12, kTileVecs = 2;
#elif defined(__AVX2__)
constexpr int kDotRows = 3, kDotColumns = 2, kTileRows = 6, kTileVecs = 1;
#else
constexpr int kDotRows = 3, kDotColumns = 1, kTileRows = 3, kTileVecs = 1;
#endif

// Units of an operand whose tensors have storage type T.
template <typename T>
struct Units {
  using Unit = acc_t<T>;
  using UnitVec = Vec<Unit>;
  static constexpr int kDepth = 1;  // elements in a unit

  static GRANVIT_INLINE UnitVec load_units(const Unit* p) { return load(p); }
  static GRANVIT_INLINE UnitVec splat_unit(Unit x) { return splat(x); }
  // kLanes units from elements that lie next to each other; the elements from `count` on are zero.
  static GRANVIT_INLINE UnitVec load_elements(const T* p) { return load(p); }
  static GRANVIT_INLINE UnitVec load_first_elements(const T* p, int count) { return load_first(p, count); }
  // One unit a column from neighbouring rows.
  static GRANVIT_INLINE UnitVec stack(Vec<Unit> x, Vec<Unit>) { return x; }
  static GRANVIT_INLINE void store_units(Unit* p, UnitVec x) { store(p, x); }
  // Elements [c, c + kLanes) of a row of units.
  static GRANVIT_INLINE Vec<Unit> load_row(const Unit* row, int64_t c) { return load(row + c); }
  static GRANVIT_INLINE void store_row(Unit* row, int64_t c, Vec<Unit> x) { store(row + c, x); }
  static GRANVIT_INLINE Vec<Unit> multiply_add(Vec<Unit> sum, UnitVec a, UnitVec b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct bf16x2 {
  uint32_t bits;
};

template <>
struct Units<bf16> {
  using Unit = bf16x2;
  using UnitVec = u32x16;
  static constexpr int kDepth = 2;

  static GRANVIT_INLINE UnitVec load_units(const Unit* p) {
    UnitVec x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static GRANVIT_INLINE UnitVec splat_unit(Unit x) { return UnitVec{} + x.bits; }
  static GRANVIT_INLINE UnitVec load_elements(const bf16* p) {
    UnitVec x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static GRANVIT_INLINE UnitVec load_first_elements(const bf16* p, int count) {
    UnitVec x{};
    std::memcpy(&x, p, static_cast<size_t>(count) * sizeof *p);
    return x;
  }
  static GRANVIT_INLINE UnitVec stack(f32x16 x, f32x16 next) {
    return __builtin_convertvector(narrow_bf16(x), u32x16) | (__builtin_convertvector(narrow_bf16(next), u32x16) << 16);
  }
  static GRANVIT_INLINE void store_units(Unit* p, UnitVec x) { std::memcpy(p, &x, sizeof x); }
  static GRANVIT_INLINE f32x16 load_row(const Unit* row, int64_t c) {
    return load(reinterpret_cast<const bf16*>(row) + c);
  }
  static GRANVIT_INLINE void store_row(Unit* row, int64_t c, f32x16 x) { store(reinterpret_cast<bf16*>(row) + c, x); }
  static GRANVIT_INLINE f32x16 multiply_add(f32x16 sum, UnitVec a, UnitVec b) {
    __m512 s;
    __m512bh x, y;
    std::memcpy(&s, &sum, sizeof s);
    std::memcpy(&x, &a, sizeof x);
    std::memcpy(&y, &b, sizeof y);
    s = _mm512_dpbf16_ps(s, x, y);
    std::memcpy(&sum, &s, sizeof sum);
    return sum;
  }
};
#endif

template <typename T>
using Unit = typename Units<T>::Unit;

template <typename T>
constexpr int kPanel = kTileVecs * kLanes<acc_t<T>>;  // columns of a panel

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

template <typename T>
GRANVIT_INLINE Vec<acc_t<T>> load_some(const T* p, int lanes) {
  return lanes == kLanes<acc_t<T>> ? load(p) : load_first(p, lanes);
}
template <typename T>
GRANVIT_INLINE void store_some(T* p, Vec<acc_t<T>> x, int lanes) {
  lanes == kLanes<acc_t<T>> ? store(p, x) : store_first(p, x, lanes);
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

// Calls body(std::integral_constant<int, n>) for n in [1, kMax].
template <int kMax, typename Body>
GRANVIT_INLINE void with_count(int n, Body&& body) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_count<kMax - 1>(n, body);
  }
  body(std::integral_constant<int, kMax>{});
}

#if defined(__clang__)
template <typename A, int kHalf, int kUpper, int... kLane>
GRANVIT_INLINE Vec<A> gather_halves(Vec<A> x, Vec<A> y, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, y, (kLane / kHalf * 2 * kHalf + kUpper * kHalf + kLane % kHalf)...);
}
#else
template <typename A, int kHalf, int kUpper, int... kLane>
GRANVIT_INLINE Vec<A> gather_halves(Vec<A> x, Vec<A> y, std::integer_sequence<int, kLane...>) {
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef Index IndexVec __attribute__((vector_size(64)));
  return __builtin_shuffle(x, y, IndexVec{(kLane / kHalf * 2 * kHalf + kUpper * kHalf + kLane % kHalf)...});
}
#endif

// Sums of the lanes of kCount vectors, in their order, in the first kCount lanes.
template <typename A, int kCount, int kHalf = kLanes<A> / 2>
GRANVIT_INLINE Vec<A> sum_lanes_of_each(const Vec<A>* x) {
  constexpr auto kLane = std::make_integer_sequence<int, kLanes<A>>{};
  Vec<A> sum[(kCount + 1) / 2];
#pragma GCC unroll 16
  for (int i = 0; i < (kCount + 1) / 2; ++i) {
    const Vec<A> first = x[2 * i], second = x[std::min(2 * i + 1, kCount - 1)];
    sum[i] = gather_halves<A, kHalf, 0>(first, second, kLane) + gather_halves<A, kHalf, 1>(first, second, kLane);
  }
  if constexpr (kHalf == 1) {
    return sum[0];
  } else {
    return sum_lanes_of_each<A, (kCount + 1) / 2, kHalf / 2>(sum);
  }
}

// sums[i * kDotColumns + j] = row i of a . row j of weights, over `depth` elements.
template <typename T, int kRows>
GRANVIT_INLINE void dot_tile(const Unit<T>* a, int64_t a_stride, const T* const* weights, int64_t depth,
                             acc_t<T>* sums) {
  using U = Units<T>;
  using A = acc_t<T>;
  constexpr int64_t kStep = kLanes<A> * U::kDepth;
  Vec<A> sum[kRows * kDotColumns] = {};
  const auto step = [&](int64_t k, auto&& load_weights) {
    typename U::UnitVec w[kDotColumns];
#pragma GCC unroll 16
    for (int j = 0; j < kDotColumns; ++j) w[j] = load_weights(weights[j] + k);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto x = U::load_units(a + i * a_stride + k / U::kDepth);
#pragma GCC unroll 16
      for (int j = 0; j < kDotColumns; ++j) {
        Vec<A>& to = sum[i * kDotColumns + j];
        to = U::multiply_add(to, x, w[j]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) step(k, [](const T* p) { return U::load_elements(p); });
  if (k < depth)
    step(k, [&](const T* p) { return U::load_first_elements(p, static_cast<int>(depth - k)); });
  constexpr int kAtOnce = kLanes<A>;
  constexpr int kCount = kRows * kDotColumns;
  A total[(kCount + kAtOnce - 1) / kAtOnce * kAtOnce];
  store(total, sum_lanes_of_each<A, std::min(kCount, kAtOnce)>(sum));
  if constexpr (kCount > kAtOnce) store(total + kAtOnce, sum_lanes_of_each<A, kCount - kAtOnce>(sum + kAtOnce));
  for (int i = 0; i < kCount; ++i) sums[i] = total[i];
}

// C = A W^T; calls finish(row, column, columns, values) for every row of every block of C.
template <typename T, typename Finish>
void multiply_rows(const Rows<T>& a, int64_t rows, int64_t depth, const T* weights, int64_t weights_stride,
                   int64_t columns, const Finish& finish) {
  using A = acc_t<T>;
  constexpr int64_t kRowBlock = 48, kColumnBlock = 64;
  const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock;
  const int64_t column_blocks = (columns + kColumnBlock - 1) / kColumnBlock;
  parallel_tasks(row_blocks * column_blocks, [&](int64_t task, Scratch& scratch) {
    const int64_t row = task / column_blocks * kRowBlock, column = task % column_blocks * kColumnBlock;
    const int64_t row_count = std::min(kRowBlock, rows - row), column_count = std::min(kColumnBlock, columns - column);
    A* block = scratch.take<A>(kRowBlock * kColumnBlock);
    for (int64_t j = 0; j < column_count; j += kDotColumns) {
      const T* weight[kDotColumns];
      const int used = static_cast<int>(std::min<int64_t>(kDotColumns, column_count - j));
      for (int q = 0; q < kDotColumns; ++q) weight[q] = weights + (column + j + std::min(q, used - 1)) * weights_stride;
      for (int64_t i = 0; i < row_count; i += kDotRows) {
        with_count<kDotRows>(static_cast<int>(std::min<int64_t>(kDotRows, row_count - i)), [&](auto count) {
          A sums[count * kDotColumns];
          dot_tile<T, count>(a.row(row + i), a.stride, weight, depth, sums);
          for (int p = 0; p < count; ++p)
            for (int q = 0; q < used; ++q) block[(i + p) * kColumnBlock + j + q] = sums[p * kDotColumns + q];
        });
      }
    }
    for (int64_t i = 0; i < row_count; ++i) finish(row + i, column, column_count, block + i * kColumnBlock);
  });
}

// The left factor of `multiply_columns`: unit (row, k) is data[row * row_stride + k * step].
template <typename T>
struct LeftFactor {
  const Unit<T>* data;
  int64_t row_stride;
  int64_t step;
};

// tile (kRows, kPanel) = a times a panel (steps, kPanel).
template <typename T, int kRows>
GRANVIT_INLINE void panel_tile(const Unit<T>* a, int64_t row_stride, int64_t step, const Unit<T>* panel, int64_t steps,
                               acc_t<T>* tile) {
  using U = Units<T>;
  using A = acc_t<T>;
  Vec<A> sum[kRows][kTileVecs] = {};
  for (int64_t k = 0; k < steps; ++k) {
    typename U::UnitVec b[kTileVecs];
#pragma GCC unroll 16
    for (int v = 0; v < kTileVecs; ++v) b[v] = U::load_units(panel + k * kPanel<T> + v * kLanes<A>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto x = U::splat_unit(a[i * row_stride + k * step]);
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v) sum[i][v] = U::multiply_add(sum[i][v], x, b[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < kTileVecs; ++v) store(tile + i * kPanel<T> + v * kLanes<A>, sum[i][v]);
}

// C = A B; B comes as panels of kPanel columns from panel_of(index, scratch), each a (steps, kPanel) array of units.
// A task is one panel and `row_block` rows. Calls finish(row, column, columns, values) for every row of every tile of C;
// values has kPanel entries.
template <typename T, typename PanelOf, typename Finish>
void multiply_columns(const LeftFactor<T>& a, int64_t rows, int64_t steps, int64_t columns, int64_t row_block,
                      const PanelOf& panel_of, const Finish& finish) {
  const int64_t panels = (columns + kPanel<T> - 1) / kPanel<T>;
  const int64_t row_blocks = (rows + row_block - 1) / row_block;
  parallel_tasks(row_blocks * panels, [&](int64_t task, Scratch& scratch) {
    const int64_t column = task % panels * kPanel<T>, column_count = std::min<int64_t>(kPanel<T>, columns - column);
    const Unit<T>* panel = panel_of(task % panels, scratch);
    const int64_t begin = task / panels * row_block, end = std::min(rows, begin + row_block);
    acc_t<T>* tile = scratch.take<acc_t<T>>(kTileRows * kPanel<T>);
    for (int64_t i = begin; i < end; i += kTileRows) {
      const int count = static_cast<int>(std::min<int64_t>(kTileRows, end - i));
      with_count<kTileRows>(count, [&](auto constant) {
        panel_tile<T, constant>(a.data + i * a.row_stride, a.row_stride, a.step, panel, steps, tile);
      });
      for (int p = 0; p < count; ++p) finish(i + p, column, column_count, tile + p * kPanel<T>);
    }
  });
}

// Number of steps in a sum over `elements`.
template <typename T>
GRANVIT_INLINE int64_t unit_steps(int64_t elements) {
  return (elements + Units<T>::kDepth - 1) / Units<T>::kDepth;
}

// Fills a panel whose summed dimension runs over `rows` rows; get(row, column, lanes) gives a vector with zeros from
// `lanes` on.
template <typename T, typename Get>
GRANVIT_INLINE void fill_panel(int64_t rows, int64_t column, int64_t columns, const Get& get, Unit<T>* panel) {
  using A = acc_t<T>;
  for (int64_t k = 0; k < unit_steps<T>(rows); ++k) {
    for (int v = 0; v < kTileVecs; ++v) {
      const int64_t c = column + v * kLanes<A>;
      const int lanes = static_cast<int>(std::clamp<int64_t>(columns - v * kLanes<A>, 0, kLanes<A>));
      const int64_t r = k * Units<T>::kDepth;
      const Vec<A> x = get(r, c, lanes);
      const Vec<A> next = Units<T>::kDepth > 1 && r + 1 < rows ? get(r + 1, c, lanes) : Vec<A>{};
      Units<T>::store_units(panel + k * kPanel<T> + v * kLanes<A>, Units<T>::stack(x, next));
    }
  }
}

// The transpose of `rows` as a left factor: sums run over the rows. Pairs need a copy in which neighbouring rows meet.
template <typename T>
LeftFactor<T> transposed(const Rows<T>& a, int64_t rows, int64_t elements, Scratch& scratch) {
  using U = Units<T>;
  if constexpr (U::kDepth == 1) {
    return {a.data, 1, a.stride};
  } else {
    const int64_t stride = (elements + kLanes<acc_t<T>> - 1) / kLanes<acc_t<T>> * kLanes<acc_t<T>>;
    Unit<T>* data = scratch.take<Unit<T>>(unit_steps<T>(rows) * stride);
    parallel_tasks(unit_steps<T>(rows), [&](int64_t k, Scratch&) {
      for (int64_t c = 0; c < elements; c += kLanes<acc_t<T>>) {
        const auto x = U::load_row(a.row(2 * k), c);
        const auto next = 2 * k + 1 < rows ? U::load_row(a.row(2 * k + 1), c) : decltype(x){};
        U::store_units(data + k * stride + c, U::stack(x, next));
      }
    });
    return {data, 1, stride};
  }
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

// All panels of a right factor with `rows` rows, made once because many tasks read each.
template <typename T, typename Get>
const Unit<T>* make_panels(int64_t rows, int64_t columns, Scratch& scratch, const Get& get) {
  const int64_t panels = (columns + kPanel<T> - 1) / kPanel<T>, size = unit_steps<T>(rows) * kPanel<T>;
  Unit<T>* data = scratch.take<Unit<T>>(panels * size);
  parallel_tasks(panels, [&](int64_t panel, Scratch&) {
    const int64_t column = panel * kPanel<T>;
    fill_panel<T>(rows, column, std::min<int64_t>(kPanel<T>, columns - column), get, data + panel * size);
  });
  return data;
}

// A weight's gradient (rows, columns): left^T right, sums over the boxes.
template <typename T, typename Get>
void weight_gradient(const Rows<T>& left, int64_t rows, int64_t num_boxes, int64_t columns, Scratch& scratch,
                     const Get& get_right, T* grad) {
  using A = acc_t<T>;
  const LeftFactor<T> factor = transposed<T>(left, num_boxes, rows, scratch);
  const int64_t steps = unit_steps<T>(num_boxes);
  const Unit<T>* panels = make_panels<T>(num_boxes, columns, scratch, get_right);
  constexpr int64_t kRowBlock = 8 * kTileRows;
  multiply_columns<T>(
      factor, rows, steps, columns, kRowBlock,
      [&](int64_t panel, Scratch&) { return panels + panel * steps * kPanel<T>; },
      [&](int64_t row, int64_t column, int64_t count, const A* values) {
        for (int64_t c = 0; c < count; c += kLanes<A>)
          store_some(grad + row * columns + column + c, load(values + c),
                     static_cast<int>(std::min<int64_t>(kLanes<A>, count - c)));
      });
}

// rows (R, depth) times weights (depth, columns).
template <typename T, typename Finish>
void input_gradient(const Rows<T>& rows, int64_t num_boxes, int64_t depth, const T* weights, int64_t weights_stride,
                    int64_t columns, const Finish& finish) {
  multiply_columns<T>(
      {rows.data, rows.stride, 1}, num_boxes, unit_steps<T>(depth), columns, std::max<int64_t>(num_boxes, 1),
      [&](int64_t panel, Scratch& scratch) {
        Unit<T>* data = scratch.take<Unit<T>>(unit_steps<T>(depth) * kPanel<T>);
        const int64_t column = panel * kPanel<T>;
        fill_panel<T>(
            depth, column, std::min<int64_t>(kPanel<T>, columns - column),
            [&](int64_t k, int64_t c, int lanes) { return load_some(weights + k * weights_stride + c, lanes); }, data);
        return static_cast<const Unit<T>*>(data);
      },
      finish);
}

}  // namespace granvit::cpu::GRANVIT_ISA
