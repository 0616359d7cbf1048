// From the gradient of the features to those of boxes and frequencies, and sums of what many blocks left, always in the
// same order.
#pragma once

#include "box_embedding_features.h"

namespace granvit::cuda {

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
    for (int i = 0; i < 4; ++i) edge[i] = a.boxes.at(a.first_box + r, i);
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
