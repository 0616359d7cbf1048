// Images and regions as kernels see them. What the host cannot check without waiting for the device is made harmless
// here: no box, index or grid leads outside the tensors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../geometry.h"

namespace granvit::cuda {

// The range of relative coordinates that granvit.ops documents; boxes are clamped to it.
constexpr double kBoxLow = -1;
constexpr double kBoxHigh = 2;

__device__ __forceinline__ double clamp_edge(double x) {
  const double high = x < kBoxHigh ? x : kBoxHigh;
  return x > kBoxLow ? high : kBoxLow;  // and so for NaN
}

struct Region {
  double x0, y0, x1, y1;  // relative to the image, ordered
  int64_t image;
};

struct Regions {
  const void* boxes;  // (R, 4) float, or double where `wide`
  bool wide;
  int64_t row_stride;
  int64_t column_stride;
  const int64_t* image_index;
  int64_t index_stride;
  int64_t count;
  int64_t num_images;

  __device__ __forceinline__ int64_t image(int64_t r) const {
    const int64_t b = image_index[r * index_stride];
    const int64_t low = b > 0 ? b : 0;
    return low < num_images ? low : num_images - 1;
  }

  __device__ __forceinline__ double edge(int64_t r, int i) const {
    const int64_t offset = r * row_stride + i * column_stride;
    return clamp_edge(wide ? static_cast<const double*>(boxes)[offset] : static_cast<const float*>(boxes)[offset]);
  }

  __device__ __forceinline__ Region operator[](int64_t r) const {
    const double x0 = edge(r, 0), y0 = edge(r, 1), x1 = edge(r, 2), y1 = edge(r, 3);
    return {x0, y0, x1 > x0 ? x1 : x0, y1 > y0 ? y1 : y0, image(r)};
  }
};

struct ImageGrid {
  int height;
  int width;
  int64_t first_token;
};

struct Images {
  const int64_t* sizes;        // (B, 2) for packed tokens, or null where all grids are height x width
  const int64_t* token_start;  // (B + 1,) from the plan, where `sizes` is not null
  int height;
  int width;
  int64_t count;
  int64_t num_tokens;

  // Height and width of image b; (0, 0) for a grid that the tokens cannot hold.
  __device__ __forceinline__ ImageGrid extent(int64_t b) const {
    if (sizes == nullptr) return {height, width, 0};
    const int64_t h = sizes[2 * b], w = sizes[2 * b + 1];
    constexpr int64_t kLargest = 0x7fffffff;
    const bool fits = h >= 1 && w >= 1 && h <= kLargest && w <= kLargest && h <= num_tokens / w;
    return {fits ? static_cast<int>(h) : 0, fits ? static_cast<int>(w) : 0, 0};
  }

  __device__ __forceinline__ ImageGrid operator[](int64_t b) const {
    ImageGrid grid = extent(b);
    const int64_t tokens = static_cast<int64_t>(grid.height) * grid.width;
    grid.first_token = sizes == nullptr ? b * tokens : token_start[b];
    if (grid.first_token + tokens > num_tokens) return {0, 0, 0};
    return grid;
  }
};

// Tokens in memory. Strides count elements.
template <typename T>
struct TokenView {
  T* data;
  int64_t row_stride;
  int64_t image_stride;
  bool packed;

  // Token 0 of image b.
  __device__ __forceinline__ T* image(const ImageGrid& grid, int64_t b) const {
    return data + (packed ? grid.first_token * row_stride : b * image_stride);
  }
};

// The last i in [0, count) with start[i] <= value, for a non-decreasing `start` with start[0] <= value.
__device__ __forceinline__ int64_t find_segment(const int64_t* start, int64_t count, int64_t value) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (start[middle] <= value)
      low = middle;
    else
      high = middle;
  }
  return low;
}

}  // namespace granvit::cuda
