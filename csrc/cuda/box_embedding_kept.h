// Which rows of a sequence no box is written to. Copies of the other rows would be for nothing.
#pragma once

#include "launch.h"

namespace granvit::cuda {

constexpr int kKeptThreads = 256;

// Every row's own number; the next launch takes out those that boxes go to.
__global__ void __launch_bounds__(kKeptThreads) box_embedding_number_rows_kernel(int64_t* kept, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kKeptThreads + threadIdx.x;
  if (row < rows) kept[row] = row;
}

__global__ void __launch_bounds__(kKeptThreads)
    box_embedding_take_out_kernel(int64_t* kept, int64_t rows, const int64_t* index, int64_t index_stride, int count) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kKeptThreads + threadIdx.x;
  if (r >= count) return;
  const int64_t row = index[r * index_stride];
  if (row >= 0 && row < rows) kept[row] = -1;
}

}  // namespace granvit::cuda
