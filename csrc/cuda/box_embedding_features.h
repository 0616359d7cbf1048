// Fourier features of boxes.
#pragma once

#include "elementary.h"
#include "launch.h"
#include "vec.h"

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

struct Angles {
  Reals boxes;        // (R, 4)
  Reals frequencies;  // (4, M)
  int first_box;
  int num_boxes;  // after that
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
  for (int i = threadIdx.x; i < 4 * rows; i += kFeatureThreads)
    edges[i] = a.boxes.at(a.first_box + first + i / 4, i % 4);
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

}  // namespace granvit::cuda
