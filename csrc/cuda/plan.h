// The plan of a launch, made on the device in one launch of its own and without waiting: regions grouped by image,
// where tokens and tiles of packed images start, and where each region's cells and work items do.
#pragma once

#include "launch.h"
#include "regions.h"

namespace granvit::cuda {

// A tile of tokens of one image that one block owns.
struct Tile {
  int height;
  int width;

  __host__ __device__ __forceinline__ int64_t count(int64_t h, int64_t w) const {
    return ((h + height - 1) / height) * ((w + width - 1) / width);
  }
};

// All int64; tables that an op does not need are null.
struct Plan {
  int64_t* order;         // (R,) regions sorted by image, in their own order within an image
  int64_t* region_start;  // (B + 1,) positions in `order`
  int64_t* token_start;   // (B + 1,)
  int64_t* tile_start;    // (B + 1,)
  int64_t* cell_start;    // (R + 1,) output cells of the regions before
  int64_t* work_start;    // (R + 1,) work items of the regions before
};

struct RegionCounts {
  int64_t cells;
  int64_t work;
};

// For ops without cells and work items.
struct NoCounts {
  __device__ __forceinline__ RegionCounts operator()(int64_t) const { return {0, 0}; }
};

constexpr int kPlanThreads = 256;

// Sum of `value` over the threads before this one, and over all of them. Every thread of the block takes part.
__device__ __forceinline__ int64_t exclusive_sum(int64_t value, int64_t* total) {
  auto* warp_sums = reinterpret_cast<int64_t*>(shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t sum = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t below = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += below;
  }
  __syncthreads();  // the last call's sums have been read
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  *total = 0;
  for (int w = 0; w < kPlanThreads / 32; ++w) {
    if (w < warp) before += warp_sums[w];
    *total += warp_sums[w];
  }
  return before + sum - value;
}

// Block b <= B writes what belongs to image b (b = B: the totals); the blocks after it take kPlanThreads regions each.
// A block sums everything before its own part by itself, which makes one launch enough.
template <typename CountRegion>
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(Regions regions, Images images, Tile tile, CountRegion count_region, Plan plan) {
  const int thread = threadIdx.x;
  int64_t total;
  if (blockIdx.x > images.count) {
    const int64_t first = (blockIdx.x - images.count - 1) * int64_t{kPlanThreads};
    RegionCounts before{0, 0};
    for (int64_t r = thread; r < first; r += kPlanThreads) {
      const RegionCounts counts = count_region(r);
      before.cells += counts.cells;
      before.work += counts.work;
    }
    const int64_t r = first + thread;
    const RegionCounts own = r < regions.count ? count_region(r) : RegionCounts{0, 0};
    int64_t cells_before, work_before;
    exclusive_sum(before.cells, &cells_before);
    exclusive_sum(before.work, &work_before);
    const int64_t cells = exclusive_sum(own.cells, &total), work = exclusive_sum(own.work, &total);
    if (r <= regions.count) {
      plan.cell_start[r] = cells_before + cells;
      plan.work_start[r] = work_before + work;
    }
    return;
  }
  const int64_t b = blockIdx.x;
  if (plan.order != nullptr) {
    int64_t before = 0;
    for (int64_t r = thread; r < regions.count; r += kPlanThreads) before += regions.image(r) < b;
    exclusive_sum(before, &total);
    int64_t position = total;
    if (thread == 0) plan.region_start[b] = position;
    for (int64_t first = 0; b < images.count && first < regions.count; first += kPlanThreads) {
      const int64_t r = first + thread;
      const bool mine = r < regions.count && regions.image(r) == b;
      const int64_t rank = exclusive_sum(mine, &total);
      if (mine) plan.order[position + rank] = r;
      position += total;
    }
  }
  if (plan.token_start != nullptr) {
    int64_t tokens = 0, tiles = 0;
    for (int64_t i = thread; i < b; i += kPlanThreads) {
      const ImageGrid grid = images.extent(i);
      tokens += static_cast<int64_t>(grid.height) * grid.width;
      tiles += tile.count(grid.height, grid.width);
    }
    exclusive_sum(tokens, &total);
    if (thread == 0) plan.token_start[b] = total;
    exclusive_sum(tiles, &total);
    if (thread == 0) plan.tile_start[b] = total;
  }
}

template <typename CountRegion>
void launch_plan(const Regions& regions, const Images& images, Tile tile, const CountRegion& count_region,
                 const Plan& plan, cudaStream_t stream) {
  const int64_t region_blocks = plan.cell_start != nullptr ? regions.count / kPlanThreads + 1 : 0;
  const auto blocks = static_cast<unsigned>(images.count + 1 + region_blocks);
  launch("plan", plan_kernel<CountRegion>, dim3(blocks), dim3(kPlanThreads), kPlanThreads / 32 * sizeof(int64_t),
         stream, regions, images, tile, count_region, plan);
}

}  // namespace granvit::cuda
