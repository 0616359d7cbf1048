// The output grids of regions as kernels see them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace granvit::cuda {

// The output grids of all regions.
struct Outputs {
  const int64_t* sizes;       // (R, 2), or null where all are height x width
  const int64_t* cell_start;  // from the plan, where `sizes` is not null
  int height;
  int width;

  struct Grid {
    int height;
    int width;
    int64_t first_cell;
  };
  __device__ __forceinline__ Grid operator[](int64_t r) const {
    if (sizes == nullptr) return {height, width, r * height * width};
    return {static_cast<int>(sizes[2 * r]), static_cast<int>(sizes[2 * r + 1]), cell_start[r]};
  }
};

}  // namespace granvit::cuda
