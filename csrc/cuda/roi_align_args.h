// What the kernels of roi_align share: how blocks divide the work, and their arguments.
#pragma once

#include <algorithm>

#include "outputs.h"
#include "plan.h"
#include "sampling.h"
#include "vec.h"

namespace granvit::cuda {

constexpr int kLanes = 192;       // vectors of channels that a block takes at most, and about its number of threads
constexpr int kMaxRows = 32;      // rows of a block, however few its channels
constexpr int kMaxThreads = 384;  // of lanes * rows, rounded up to warps

// Thread = row * lanes + lane; a lane is a vector of channels. Surplus threads only help to prepare tables.
struct BlockShape {
  int lanes;
  int rows;
  int channel_blocks;
  int threads;
};

inline BlockShape block_shape(int64_t vectors) {
  const auto blocks = static_cast<int>((vectors + kLanes - 1) / kLanes);
  const int lanes = blocks > 0 ? static_cast<int>((vectors + blocks - 1) / blocks) : 1;
  const int rows = std::min(kMaxRows, (kLanes + lanes - 1) / lanes);
  return {lanes, rows, blocks, (lanes * rows + 31) / 32 * 32};
}

// The forward's work items: groups of `rows` output rows.
struct CountRowGroups {
  const int64_t* sizes;
  int rows;
  __device__ __forceinline__ RegionCounts operator()(int64_t r) const {
    const int64_t h = sizes[2 * r], w = sizes[2 * r + 1];
    return {h * w, (h + rows - 1) / rows};
  }
};

template <typename T, typename Tokens>
struct RoiAlignArgs {
  Regions regions;
  Images images;
  Outputs outputs;
  TokenView<Tokens> tokens;  // forward: read; backward: the gradient that is written
  T* cells;                  // contiguous (num_cells, channels); forward: written; backward: read
  int64_t channels;
  int sampling_ratio;
  BlockShape shape;
  const int64_t* work_start;    // forward with a grid per region
  const int64_t* order;         // backward
  const int64_t* region_start;  // backward
  const int64_t* tile_start;    // backward of packed tokens
};

}  // namespace granvit::cuda
