// Matrix products of rows of activations with large weights, in register tiles. How the work is cut depends on shapes
// alone, and every sum is done by one task in one order.
//
// `multiply_by_dots` runs lanes along the summed dimension and reads every weight once, in place. `multiply_panels`
// runs lanes along the columns of the right factor, which is first copied to panels that stay in the first-level cache.
#pragma once

#include <algorithm>
#include <utility>

#include "units.h"

namespace granvit::cpu::GRANVIT_ISA {

// Tile sizes: as many accumulators as the registers hold beside the operands. A panel has kPanelVecs vectors of
// columns.
#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotColumns = 4, kTileRows = 12, kPanelVecs = 2;
#elif defined(__AVX2__)
constexpr int kDotRows = 3, kDotColumns = 3, kTileRows = 6, kPanelVecs = 1;
#else
constexpr int kDotRows = 2, kDotColumns = 4, kTileRows = 2, kPanelVecs = 1;
#endif

// From this many rows on, copying the weights to panels costs less than it saves. Measured on one core of a Zen 5 with
// 1536 x 1536 float32 weights, GFLOP/s of dots and of panels: 12 rows 170, 105; 48 rows 175, 155; 128 rows 155, 195.
// bfloat16 crosses at the same place.
constexpr int64_t kPanelRows = 64;

template <typename T>
constexpr int kPanel = kPanelVecs * kLanes<acc_t<T>>;  // columns of a panel

// Calls body(std::integral_constant<int, n>) for n in [1, kMax].
template <int kMax, typename Body>
GRANVIT_INLINE void with_count(int n, Body&& body) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_count<kMax - 1>(n, body);
  }
  body(std::integral_constant<int, kMax>{});
}

// The lanes kIndex of x and y side by side.
#if defined(__clang__)
template <int... kIndex, typename V>
GRANVIT_INLINE V shuffle(V x, V y) {
  return __builtin_shufflevector(x, y, kIndex...);
}
#else
template <int... kIndex, typename V>
GRANVIT_INLINE V shuffle(V x, V y) {
  using Index = std::conditional_t<sizeof(x[0]) == 8, int64_t, int32_t>;
  typedef Index IndexVec __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(x, y, IndexVec{kIndex...});
}
#endif

// The lower (or upper) halves of all groups of 2 * kHalf lanes, x's before y's.
template <int kHalf, int kUpper, typename V, int... kLane>
GRANVIT_INLINE V gather_halves(V x, V y, std::integer_sequence<int, kLane...>) {
  return shuffle<(kLane / kHalf * 2 * kHalf + kUpper * kHalf + kLane % kHalf)...>(x, y);
}

// The lower (or upper) halves of all groups of 2 * kHalf lanes, x's and y's by turns.
template <int kHalf, int kUpper, typename V, int... kLane>
GRANVIT_INLINE V alternate_halves(V x, V y, std::integer_sequence<int, kLane...>) {
  constexpr int kLanesOfV = sizeof...(kLane);
  return shuffle<((kLane & kHalf) != 0 ? kLanesOfV + kLane - (1 - kUpper) * kHalf : kLane + kUpper * kHalf)...>(x, y);
}

// Transposes a square of lanes.
template <int kLanesOfV, int kHalf = kLanesOfV / 2, typename V>
GRANVIT_INLINE void transpose(V* x) {
  constexpr auto kLane = std::make_integer_sequence<int, kLanesOfV>{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanesOfV; ++i) {
    if ((i & kHalf) != 0) continue;
    const V upper = x[i], lower = x[i + kHalf];
    x[i] = alternate_halves<kHalf, 0>(upper, lower, kLane);
    x[i + kHalf] = alternate_halves<kHalf, 1>(upper, lower, kLane);
  }
  if constexpr (kHalf > 1) transpose<kLanesOfV, kHalf / 2>(x);
}

// Sums of the lanes of kCount registers (at most as many as they have lanes), in their order, in the first kCount
// lanes.
template <int kCount, int kHalf, typename V>
GRANVIT_INLINE V sum_lanes_of_each(const V* x) {
  constexpr auto kLane = std::make_integer_sequence<int, sizeof(V) / sizeof(x[0][0])>{};
  V sum[(kCount + 1) / 2];
#pragma GCC unroll 16
  for (int i = 0; i < (kCount + 1) / 2; ++i) {
    const V first = x[2 * i], second = x[std::min(2 * i + 1, kCount - 1)];
    sum[i] = gather_halves<kHalf, 0>(first, second, kLane) + gather_halves<kHalf, 1>(first, second, kLane);
  }
  if constexpr (kHalf == 1) {
    return sum[0];
  } else {
    return sum_lanes_of_each<(kCount + 1) / 2, kHalf / 2>(sum);
  }
}

// to[i] = sum of the lanes of x[i]; whole registers are written.
template <typename A, int kCount>
GRANVIT_INLINE void store_lane_sums(const Register<A>* x, A* to) {
  constexpr int kAtOnce = std::min(kCount, kRegisterLanes<A>);
  const Register<A> sums = sum_lanes_of_each<kAtOnce, kRegisterLanes<A> / 2>(x);
  std::memcpy(to, &sums, sizeof sums);
  if constexpr (kCount > kAtOnce) store_lane_sums<A, kCount - kAtOnce>(x + kAtOnce, to + kAtOnce);
}

// sums[i * kDotColumns + j] = row i of a . row j of weights, over `depth` elements.
template <typename T, int kRows>
GRANVIT_INLINE void dot_tile(const Unit<T>* a, int64_t a_stride, const T* const* weights, int64_t depth,
                             acc_t<T>* sums) {
  using U = Units<T>;
  using A = acc_t<T>;
  constexpr int64_t kStep = kRegisterLanes<A> * U::kDepth;
  constexpr int kCount = kRows * kDotColumns;
  Register<A> sum[kCount] = {};
  const auto step = [&](int64_t k, auto&& load_weights) __attribute__((always_inline)) {
    typename U::Operand w[kDotColumns];
#pragma GCC unroll 16
    for (int j = 0; j < kDotColumns; ++j) w[j] = load_weights(weights[j] + k);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto x = U::load_units(a + i * a_stride + k / U::kDepth);
#pragma GCC unroll 16
      for (int j = 0; j < kDotColumns; ++j) {
        Register<A>& to = sum[i * kDotColumns + j];
        to = U::multiply_add(to, x, w[j]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) step(k, [](const T* p) { return U::load_elements(p); });
  if (k < depth) step(k, [&](const T* p) { return U::load_first_elements(p, static_cast<int>(depth - k)); });
  A total[kCount + kRegisterLanes<A>];
  store_lane_sums<A, kCount>(sum, total);
  for (int i = 0; i < kCount; ++i) sums[i] = total[i];
}

// C = A W^T; calls finish(row, column, columns, values) for every row of every block of C.
template <typename T, typename Finish>
void multiply_by_dots(const Rows<T>& a, int64_t rows, int64_t depth, const T* weights, int64_t weights_stride,
                      int64_t columns, const Finish& finish) {
  using A = acc_t<T>;
  constexpr int64_t kRowBlock = 48, kColumnBlock = 16 * kDotColumns;
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

// The left factor of `multiply_panels`: unit (row, k) is data[row * row_stride + k * step].
template <typename T>
struct LeftFactor {
  const Unit<T>* data;
  int64_t row_stride;
  int64_t step;
};

// Steps of a product that are done at once: a panel of them stays in the first-level cache.
constexpr int64_t kStepBlock = 256;

// tile (kRows, kPanel) = a times a panel (steps, kPanel), added to what it holds unless `fresh`. prefetch(k) runs
// beside step k.
template <typename T, int kRows, typename Prefetch>
GRANVIT_INLINE void panel_tile(const Unit<T>* a, int64_t row_stride, int64_t step, const Unit<T>* panel, int64_t steps,
                               bool fresh, const Prefetch& prefetch, acc_t<T>* tile) {
  using U = Units<T>;
  using A = acc_t<T>;
  constexpr int kLane = kRegisterLanes<A>, kWide = kPanel<T> / kLane;
  Register<A> sum[kRows][kWide] = {};
  for (int64_t k = 0; k < steps; ++k) {
    prefetch(k);
    typename U::Operand b[kWide];
#pragma GCC unroll 16
    for (int v = 0; v < kWide; ++v) b[v] = U::load_units(panel + k * kPanel<T> + v * kLane);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto x = U::splat_unit(a[i * row_stride + k * step]);
#pragma GCC unroll 16
      for (int v = 0; v < kWide; ++v) sum[i][v] = U::multiply_add(sum[i][v], x, b[v]);
    }
  }
  // A block's sum is added to the others at the end: one chain of additions over all steps would round several times
  // as much as the blocked sums of other libraries do.
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < kWide; ++v) {
      acc_t<T>* to = tile + i * kPanel<T> + v * kLane;
      if (!fresh) sum[i][v] += load_register(to);
      std::memcpy(to, &sum[i][v], sizeof sum[i][v]);
    }
}

// What a task of `multiply_panels` covers.
struct TaskShape {
  int64_t rows;
  int64_t panels;
};

// C = A B; B comes as panels of kPanel columns: panel_of(column, columns, k, steps, buffer) gives a (steps, kPanel)
// array of units from step k on, for which it may use the buffer; prefetch(column, k) fetches what it will read for
// step k. Calls finish(row, column, columns, values) for every row of every panel of C; values has kPanel entries.
template <typename T, typename PanelOf, typename Prefetch, typename Finish>
void multiply_panels(const LeftFactor<T>& a, int64_t rows, int64_t steps, int64_t columns, TaskShape shape,
                     const PanelOf& panel_of, const Prefetch& prefetch, const Finish& finish) {
  const int64_t strip = shape.panels * kPanel<T>, strips = (columns + strip - 1) / strip;
  const int64_t row_blocks = (rows + shape.rows - 1) / shape.rows;
  parallel_tasks(row_blocks * strips, [&](int64_t task, Scratch& scratch) {
    const int64_t begin = task / strips * shape.rows, count = std::min(rows - begin, shape.rows);
    const int64_t first = task % strips * strip, last = std::min(columns, first + strip);
    acc_t<T>* block = scratch.take<acc_t<T>>(count * kPanel<T>);
    Unit<T>* buffer = scratch.take<Unit<T>>(kStepBlock * kPanel<T>);
    for (int64_t column = first; column < last; column += kPanel<T>) {
      const int64_t used = std::min<int64_t>(kPanel<T>, last - column);
      int64_t k = 0;
      do {
        const int64_t depth = std::min(kStepBlock, steps - k);
        const Unit<T>* panel = panel_of(column, used, k, depth, buffer);
        for (int64_t i = 0; i < count; i += kTileRows) {
          const int tile_rows = static_cast<int>(std::min<int64_t>(kTileRows, count - i));
          const Unit<T>* left = a.data + (begin + i) * a.row_stride + k * a.step;
          acc_t<T>* tile = block + i * kPanel<T>;
          with_count<kTileRows>(tile_rows, [&](auto constant) {
            panel_tile<T, constant>(
                left, a.row_stride, a.step, panel, depth, k == 0,
                [&](int64_t step) __attribute__((always_inline)) { prefetch(column, k + kStepBlock + step); }, tile);
          });
          if (k + kStepBlock >= steps)
            for (int p = 0; p < tile_rows; ++p) finish(begin + i + p, column, used, tile + p * kPanel<T>);
        }
        k += kStepBlock;
      } while (k < steps);
    }
  });
}

constexpr int64_t kFewSteps = 48;

// Fills a panel; get(k, column, lanes) gives a vector of units of which `lanes` count.
template <typename T, typename Get>
GRANVIT_INLINE void fill_panel(int64_t column, int64_t columns, int64_t k, int64_t steps, const Get& get,
                               Unit<T>* panel) {
  constexpr int kVec = kLanes<acc_t<T>>;
  for (int64_t i = 0; i < steps; ++i)
    for (int v = 0; v < kPanelVecs; ++v)
      Units<T>::store_units(
          panel + i * kPanel<T> + v * kVec,
          get(k + i, column + v * kVec, static_cast<int>(std::clamp<int64_t>(columns - v * kVec, 0, kVec))));
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

// A weight's gradient (rows, columns): left^T right, sums over `count` rows of both. get(row, column, lanes) gives
// values of the right factor.
template <typename T, typename Get>
void weight_gradient(const Rows<T>& left, int64_t rows, int64_t count, int64_t columns, Scratch& scratch,
                     const Get& get, T* grad) {
  using A = acc_t<T>;
  using U = Units<T>;
  const LeftFactor<T> factor = transposed<T>(left, count, rows, scratch);
  const int64_t steps = unit_steps<T>(count), panels = (columns + kPanel<T> - 1) / kPanel<T>;
  // All panels of the right factor, made once because many tasks read each.
  Unit<T>* right = scratch.take<Unit<T>>(panels * steps * kPanel<T>);
  parallel_tasks(panels, [&](int64_t panel, Scratch&) {
    fill_panel<T>(
        panel * kPanel<T>, std::min<int64_t>(kPanel<T>, columns - panel * kPanel<T>), 0, steps,
        [&](int64_t k, int64_t c, int lanes) {
          const int64_t r = k * U::kDepth;
          return U::stack(get(r, c, lanes), U::kDepth > 1 && r + 1 < count ? get(r + 1, c, lanes) : Vec<A>{});
        },
        right + panel * steps * kPanel<T>);
  });
  // A few steps make writing the gradient most of the work: then row by row, so that memory is written in order. Many
  // make reading the panels most of it.
  const TaskShape shape = steps < kFewSteps ? TaskShape{kTileRows, panels} : TaskShape{8 * kTileRows, 1};
  multiply_panels<T>(
      factor, rows, steps, columns, shape,
      [&](int64_t column, int64_t, int64_t k, int64_t, Unit<T>*) { return right + column * steps + k * kPanel<T>; },
      [](int64_t, int64_t) {},
      [&](int64_t row, int64_t column, int64_t used, const A* values) {
        for (int64_t c = 0; c < used; c += kLanes<A>)
          store_some(grad + row * columns + column + c, load(values + c),
                     static_cast<int>(std::min<int64_t>(kLanes<A>, used - c)));
      });
}

// rows (count, depth) times weights (depth, columns).
template <typename T, typename Finish>
void input_gradient(const Rows<T>& rows, int64_t count, int64_t depth, const T* weights, int64_t weights_stride,
                    int64_t columns, const Finish& finish) {
  using U = Units<T>;
  multiply_panels<T>(
      {rows.data, rows.stride, 1}, count, unit_steps<T>(depth), columns, {std::max<int64_t>(count, 1), 1},
      [&](int64_t column, int64_t used, int64_t k, int64_t steps, Unit<T>* buffer) {
        fill_panel<T>(
            column, used, k, steps,
            [&](int64_t step, int64_t c, int lanes) {
              const int64_t r = step * U::kDepth;
              const T* row = weights + r * weights_stride + c;
              return U::stack(row, r + 1 < depth ? row + weights_stride : nullptr, lanes);
            },
            buffer);
        return static_cast<const Unit<T>*>(buffer);
      },
      [&](int64_t column, int64_t step) __attribute__((always_inline)) {
        // Columns of a matrix are out of reach of the processor's own prefetching. Past the end this is harmless.
        const char* row = reinterpret_cast<const char*>(weights + step * U::kDepth * weights_stride + column);
#pragma GCC unroll 8
        for (int d = 0; d < U::kDepth; ++d)
#pragma GCC unroll 8
          for (size_t byte = 0; byte < kPanel<T> * sizeof(T); byte += 64)
            __builtin_prefetch(row + d * weights_stride * sizeof(T) + byte, 0, 2);
      },
      finish);
}

// Fills a panel with the transpose of `columns` rows of weights.
template <typename T>
GRANVIT_INLINE void fill_panel_transposed(const T* weights, int64_t weights_stride, int64_t columns, int64_t elements,
                                          int64_t steps, Unit<T>* panel) {
  using U = Units<T>;
  constexpr int kLane = kRegisterLanes<acc_t<T>>;
  for (int c = 0; c < kPanel<T>; c += kLane) {
    for (int64_t k = 0; k < steps; k += kLane) {
      typename U::Operand x[kLane];
      const int count = static_cast<int>(std::min<int64_t>(kLane * U::kDepth, elements - k * U::kDepth));
      for (int i = 0; i < kLane; ++i) {
        // Beyond the last column any will do.
        const T* row = weights + std::min<int64_t>(c + i, columns - 1) * weights_stride + k * U::kDepth;
        x[i] = count == kLane * U::kDepth ? U::load_elements(row) : U::load_first_elements(row, count);
      }
      transpose<kLane>(x);
      for (int i = 0; i < std::min<int64_t>(kLane, steps - k); ++i)
        std::memcpy(panel + (k + i) * kPanel<T> + c, &x[i], sizeof x[i]);
    }
  }
}

// C = A W^T, with the weights row by row as a linear layer holds them.
template <typename T, typename Finish>
void multiply_rows(const Rows<T>& a, int64_t rows, int64_t depth, const T* weights, int64_t weights_stride,
                   int64_t columns, const Finish& finish) {
  if (rows < kPanelRows) return multiply_by_dots<T>(a, rows, depth, weights, weights_stride, columns, finish);
  using U = Units<T>;
  multiply_panels<T>(
      {a.data, a.stride, 1}, rows, unit_steps<T>(depth), columns, {rows, 1},
      [&](int64_t column, int64_t used, int64_t k, int64_t steps, Unit<T>* buffer) {
        fill_panel_transposed<T>(weights + column * weights_stride + k * U::kDepth, weights_stride, used,
                                 depth - k * U::kDepth, steps, buffer);
        return static_cast<const Unit<T>*>(buffer);
      },
      [&](int64_t column, int64_t step) __attribute__((always_inline)) {
        // A block of steps spans kLines cache lines of every row: some of them beside each step.
        constexpr int64_t kLines = kStepBlock * U::kDepth * sizeof(T) / 64;
        constexpr int64_t kEach = kPanel<T> * kLines / kStepBlock;
        const int64_t first = step % kStepBlock * kEach;
        const char* row = reinterpret_cast<const char*>(weights + (column + first / kLines) * weights_stride +
                                                        step / kStepBlock * kStepBlock * U::kDepth);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kEach; ++i) __builtin_prefetch(row + (first % kLines + i) * 64, 0, 2);
      },
      finish);
}

}  // namespace granvit::cpu::GRANVIT_ISA
