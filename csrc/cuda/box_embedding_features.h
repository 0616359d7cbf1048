// The parts of box_embedding that are no products: features from boxes and frequencies and the way back, the boxes'
// rows of a gradient, and sums over many rows, always in the same order.
#pragma once

#include "box_embedding_layers.h"

namespace granvit::cuda {

enum class RealType { kFloat, kDouble, kBFloat16, kHalf };

// A small matrix of any floating type and strides.
struct Reals {
  const void* data;
  RealType type;
  int64_t row_stride;
  int64_t column_stride;

  __device__ __forceinline__ double at(int64_t row, int64_t column) const {
    const int64_t i = row * row_stride + column * column_stride;
    switch (type) {
      case RealType::kFloat:
        return static_cast<const float*>(data)[i];
      case RealType::kDouble:
        return static_cast<const double*>(data)[i];
      case RealType::kBFloat16:
        return widen(static_cast<const __nv_bfloat16*>(data)[i]);
      default:
        return widen(static_cast<const __half*>(data)[i]);
    }
  }
};

// Contiguous numbers of any floating type, for results.
struct RealResults {
  void* data;
  RealType type;

  __device__ __forceinline__ void write(int64_t i, float x) const {
    switch (type) {
      case RealType::kFloat:
        static_cast<float*>(data)[i] = x;
        break;
      case RealType::kDouble:
        static_cast<double*>(data)[i] = x;
        break;
      case RealType::kBFloat16:
        static_cast<__nv_bfloat16*>(data)[i] = narrow<__nv_bfloat16>(x);
        break;
      default:
        static_cast<__half*>(data)[i] = narrow<__half>(x);
    }
  }
};

struct Angles {
  Reals boxes;        // (R, 4)
  Reals frequencies;  // (4, M)
  int num_boxes;
  int num_frequencies;
};

constexpr int kFeatureThreads = 128;  // frequencies of a block
constexpr int kFeatureRows = 32;      // boxes of a block

// Sines, then cosines of every frequency: features (R, 2 M).
template <typename T>
__global__ void __launch_bounds__(kFeatureThreads) box_embedding_features_kernel(Angles a, T* features) {
  auto* const edges = reinterpret_cast<double*>(shared_memory());  // [kFeatureRows][4]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFeatureRows;
  const auto rows = static_cast<int>(min(a.num_boxes - first, int64_t{kFeatureRows}));
  for (int i = threadIdx.x; i < 4 * rows; i += kFeatureThreads) edges[i] = a.boxes.at(first + i / 4, i % 4);
  __syncthreads();
  const int m = blockIdx.y * kFeatureThreads + threadIdx.x;
  if (m >= a.num_frequencies) return;
  double frequency[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) frequency[i] = a.frequencies.at(i, m);
  T* to = features + first * 2 * a.num_frequencies + m;
  for (int r = 0; r < rows; ++r) {
    // Turns in double: products of float32 numbers are exact in it.
    double turns = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) turns += edges[4 * r + i] * frequency[i];
    const SineCosine value = sine_cosine(turns);
    to[0] = narrow<T>(value.sine);
    to[a.num_frequencies] = narrow<T>(value.cosine);
    to += 2 * static_cast<int64_t>(a.num_frequencies);
  }
}

constexpr int kAngleWarps = 8;
constexpr int kAngleLanes = 8;                   // frequencies of a lane
constexpr int kAngleColumns = 32 * kAngleLanes;  // of a block
constexpr int kAngleThreads = 32 * kAngleWarps;
constexpr size_t kAngleSharedBytes = 4 * kAngleColumns * (sizeof(double) + kAngleWarps * sizeof(float));

// From the gradient of the features (R, 2 M) to shares of those of boxes and frequencies. A block takes
// `rows_at_once` boxes and kAngleColumns frequencies; a warp takes one box after the other, a lane every 32nd
// frequency.
template <typename T>
__global__ void __launch_bounds__(kAngleThreads)
    box_embedding_angles_kernel(Angles a, const T* grad_features, int rows_at_once, float* partial_boxes,
                                float* partial_frequencies) {
  constexpr double kTurn = 6.283185307179586476925;
  auto* const frequencies = reinterpret_cast<double*>(shared_memory());          // [4][kAngleColumns]
  auto* const sums = reinterpret_cast<float*>(frequencies + 4 * kAngleColumns);  // [kAngleWarps][4][kAngleColumns]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_column = blockIdx.y * kAngleColumns;
  for (int i = threadIdx.x; i < 4 * kAngleColumns; i += kAngleThreads) {
    const int m = first_column + i % kAngleColumns;
    frequencies[i] = m < a.num_frequencies ? a.frequencies.at(i / kAngleColumns, m) : 0.0;
  }
  __syncthreads();
  float for_frequencies[4][kAngleLanes];
#pragma unroll
  for (int i = 0; i < 4; ++i) set_zero(for_frequencies[i]);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_at_once;
  const int64_t end = min(first + rows_at_once, int64_t{a.num_boxes});
  for (int64_t r = first + warp; r < end; r += kAngleWarps) {
    double edge[4], for_box[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) edge[i] = a.boxes.at(r, i);
    const T* const from = grad_features + r * 2 * a.num_frequencies + first_column;
#pragma unroll
    for (int j = 0; j < kAngleLanes; ++j) {
      const int m = lane + 32 * j;
      if (first_column + m >= a.num_frequencies) break;
      double turns = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) turns += edge[i] * frequencies[i * kAngleColumns + m];
      const SineCosine value = sine_cosine(turns);
      const float grad_sine = widen(from[m]), grad_cosine = widen(from[a.num_frequencies + m]);
      const float grad_turns = static_cast<float>(kTurn) * (grad_sine * value.cosine - grad_cosine * value.sine);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        for_box[i] += grad_turns * frequencies[i * kAngleColumns + m];
        for_frequencies[i][j] += grad_turns * static_cast<float>(edge[i]);
      }
    }
    if (partial_boxes != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) for_box[i] += __shfl_xor_sync(0xffffffffu, for_box[i], offset);
      }
      if (lane == 0) {
        float* const to = partial_boxes + (static_cast<int64_t>(blockIdx.y) * a.num_boxes + r) * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = static_cast<float>(for_box[i]);
      }
    }
  }
  if (partial_frequencies == nullptr) return;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < kAngleLanes; ++j) sums[(warp * 4 + i) * kAngleColumns + lane + 32 * j] = for_frequencies[i][j];
  __syncthreads();
  for (int n = threadIdx.x; n < 4 * kAngleColumns; n += kAngleThreads) {
    const int i = n / kAngleColumns, m = first_column + n % kAngleColumns;
    if (m >= a.num_frequencies) continue;
    float sum = 0;
    for (int w = 0; w < kAngleWarps; ++w) sum += sums[w * 4 * kAngleColumns + n];
    partial_frequencies[(static_cast<int64_t>(blockIdx.x) * 4 + i) * a.num_frequencies + m] = sum;
  }
}

constexpr int kRowsColumns = 128;  // of a block
constexpr int kRowsRows = 128;
constexpr int kRowsThreads = 128;

// The boxes' rows of a gradient: side by side in `copy`, zeros for rows that the gradient does not have; and for each
// block of rows the sums of their columns. Either may be missing.
template <typename T>
struct GradRows {
  EpilogueRows<const T> grad;
  int64_t grad_rows;
  const int64_t* index;  // null: a box's own number
  int64_t index_stride;
  EpilogueRows<T> copy;
  float* partial_sums;  // (row blocks, columns)
  int num_boxes;
  int columns;
};

template <typename T>
__global__ void __launch_bounds__(kRowsThreads) box_embedding_rows_kernel(GradRows<T> a) {
  auto* const sums = reinterpret_cast<float*>(shared_memory());  // [kRowsAtOnce][kRowsColumns]
  constexpr int kGroups = kRowsColumns / kProductVec, kRowsAtOnce = kRowsThreads / kGroups;
  const int own = threadIdx.x % kGroups * kProductVec, first_column = blockIdx.y * kRowsColumns;
  const int column = first_column + own, count = min(a.columns - column, kProductVec);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsRows;
  const int64_t end = count > 0 ? min(first + kRowsRows, int64_t{a.num_boxes}) : first;
  float total[kProductVec];
  set_zero(total);
#pragma unroll 4
  for (int64_t r = first + threadIdx.x / kGroups; r < end; r += kRowsAtOnce) {
    const int64_t source = a.index == nullptr ? r : a.index[r * a.index_stride];
    float x[kProductVec];
    set_zero(x);
    if (source >= 0 && source < a.grad_rows) a.grad.read(source, column, count, x);
    if (a.copy.data != nullptr) a.copy.write(r, column, count, x);
    add(total, 1.0f, x);
  }
  if (a.partial_sums == nullptr) return;
  store_floats(sums + threadIdx.x / kGroups * kRowsColumns + own, total);
  __syncthreads();
  const int c = first_column + static_cast<int>(threadIdx.x);
  if (c >= a.columns) return;
  float sum = 0;
  for (int r = 0; r < kRowsAtOnce; ++r) sum += sums[r * kRowsColumns + threadIdx.x];
  a.partial_sums[static_cast<int64_t>(blockIdx.x) * a.columns + c] = sum;
}

constexpr int kAddUpColumns = 32;
constexpr int kAddUpLanes = 8;

// out[c] = sum of partial[i][c] over i < count.
__global__ void __launch_bounds__(kAddUpColumns* kAddUpLanes)
    box_embedding_add_up_kernel(const float* partial, int count, int64_t size, RealResults out) {
  auto* const sums = reinterpret_cast<float*>(shared_memory());  // [kAddUpLanes][kAddUpColumns]
  const int lane = threadIdx.x / kAddUpColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kAddUpColumns + threadIdx.x % kAddUpColumns;
  float sum = 0;
#pragma unroll 4
  for (int i = lane; i < count; i += kAddUpLanes) sum += c < size ? partial[i * size + c] : 0.0f;
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane != 0 || c >= size) return;
  sum = 0;
  for (int i = 0; i < kAddUpLanes; ++i) sum += sums[i * kAddUpColumns + threadIdx.x];
  out.write(c, sum);
}

}  // namespace granvit::cuda
