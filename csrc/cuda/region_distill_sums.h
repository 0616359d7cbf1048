// Sums of region_distill in an order that is always the same, and the small kernels that make the loss of what the
// blocks of cells left.
#pragma once

#include "region_distill_args.h"

namespace granvit::cuda {

__device__ __forceinline__ double warp_sum(double x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

constexpr int kSumThreads = 256;

// The sum over a block's threads, in every thread.
__device__ __forceinline__ double block_sum(double x) {
  auto* sums = reinterpret_cast<double*>(shared_memory());
  x = warp_sum(x);
  __syncthreads();  // the last call's sums have been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kSumThreads / 32; ++w) sum += sums[w];
  return sum;
}

struct SumArgs {
  Regions regions;
  Images images;
  Outputs outputs;
  Shares shares;
  const int64_t* work_start;  // a grid per region
  const double* partial;
  int parts;
  double terms;
  double* means;  // (R,)
  float* value;   // (R,) where the regions' means are wanted, else one
};

// Each region's mean; one block a region.
static __global__ void __launch_bounds__(kSumThreads) region_distill_means_kernel(SumArgs a, bool wanted) {
  const int64_t r = blockIdx.x;
  const auto out = a.outputs[r];
  const int64_t blocks = blocks_along(out.height) * blocks_along(out.width);
  const int64_t first = (a.work_start == nullptr ? r * blocks : a.work_start[r]) * a.parts;
  // A grid that the tokens cannot hold has no tokens, and nothing was written for its regions.
  const bool valid = a.images[a.regions.image(r)].width > 0;
  double sum = 0;
  for (int64_t i = threadIdx.x; valid && i < blocks * a.parts; i += kSumThreads) sum += a.partial[first + i];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const double mean = sum / (static_cast<double>(out.height) * out.width * a.terms);
  a.means[r] = mean;
  if (wanted) a.value[r] = static_cast<float>(mean);
}

// Their mean, by shares; one block.
static __global__ void __launch_bounds__(kSumThreads) region_distill_mean_kernel(SumArgs a) {
  double total = 0, sum = 0;
  for (int64_t r = threadIdx.x; r < a.regions.count; r += kSumThreads) {
    const auto out = a.outputs[r];
    const double share = a.shares.values != nullptr ? a.shares[r] : static_cast<double>(out.height) * out.width;
    total += share;
    if (share != 0) sum += share * a.means[r];
  }
  total = block_sum(total);
  sum = block_sum(sum);
  if (threadIdx.x == 0) *a.value = total > 0 ? static_cast<float>(sum / total) : 0;
}

}  // namespace granvit::cuda
