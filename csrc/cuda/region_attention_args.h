// What the kernels of region_attention share: how blocks and regions are divided, and their arguments.
#pragma once

#include <algorithm>

#include "footprint.h"
#include "plan.h"
#include "vec.h"

namespace granvit::cuda {

constexpr int kTokens = 16;             // tokens between two steps of the online softmax
constexpr int kAttentionThreads = 256;  // at most
constexpr int kMaxParts = 16;           // of a region
constexpr int kRegionChunk = 64;        // regions that a block of the tokens' gradients looks at at a time

// Thread = row * lanes + lane; a lane is a vector of channels of one head, rows share the tokens of a step.
struct AttentionShape {
  int heads;  // of a group
  int lanes;
  int head_lanes;
  int rows;
  int groups;
  int threads;
};

inline AttentionShape attention_shape(int64_t heads, int64_t head_lanes) {
  constexpr int64_t kLanesWanted = 192;
  const int64_t fitting = std::clamp<int64_t>(kLanesWanted / head_lanes, 1, heads);
  const int64_t groups = (heads + fitting - 1) / fitting;
  const int64_t group = (heads + groups - 1) / groups;
  const auto lanes = static_cast<int>(group * head_lanes);
  const int rows = std::clamp<int>(kLanesWanted / lanes, 1, kTokens / 2);
  return {static_cast<int>(group),      lanes, static_cast<int>(head_lanes), rows, static_cast<int>(groups),
          (lanes * rows + 31) / 32 * 32};
}

// How the kernels with matrix units divide a head; see region_attention_matrix.h.
struct MatrixShape {
  int slices;  // of a head's channels; a warp accumulates one
  int tiles;   // of 8 channels in a slice
  int pitch;   // elements from one row to the next in shared memory
  int warps;   // of a block
  int run;     // slices or heads that a warp of the kernels by region takes one after the other
  int query_blocks;
};

// What a region covers, with the log2 of the coverage of its outermost rows and columns; 32 bytes.
struct alignas(16) Cover {
  int row;
  int column;
  int height;
  int width;
  float top;
  float bottom;
  float left;
  float right;

  // Of the cell at (row + y, column + x): the sum of both.
  __device__ __forceinline__ float of_row(int y) const { return (y == 0 ? top : 0) + (y == height - 1 ? bottom : 0); }
  __device__ __forceinline__ float of_column(int x) const { return (x == 0 ? left : 0) + (x == width - 1 ? right : 0); }
};

template <typename T>
struct RegionAttentionArgs {
  Regions regions;
  Images images;
  TokenView<const T> key;
  TokenView<const T> value;
  const T* query;  // rows of heads * dim contiguous elements
  int64_t query_region_stride;
  int64_t query_stride;
  T* output;             // (R, Q, heads, dim); backward: read
  double* lse;           // (R, heads, Q); backward: read
  float* part_output;    // (R, max_parts, Q, heads, dim), not normalised; backward: of grad_query, not scaled
  float2* part_softmax;  // (R, max_parts, Q, heads): maximum and sum
  int64_t queries;
  int heads;
  int dim;
  float scale;
  int max_parts;
  AttentionShape shape;
  MatrixShape matrix;
  // Backward only. What is not wanted is null.
  const T* grad;  // (R, Q, heads, dim)
  T* grad_query;  // (R, Q, heads, dim)
  TokenView<T> grad_key;
  TokenView<T> grad_value;
  float4* statistics;  // (R, heads, Q), from the queries' gradient for the tokens': see Statistics
  Cover* covers;       // (R,), likewise
  const int64_t* order;
  const int64_t* region_start;
  const int64_t* tile_start;  // of packed tokens

  bool for_tokens() const { return grad_key.data != nullptr; }
};

// Of a query and head, for the backward: lse as a float and what that leaves, because its rounding alone would sit in
// every weight; and grad . output, which the softmax's gradient subtracts. A float4, so that it can be copied as 16
// bytes: x, y, z in this order.
__device__ __forceinline__ float4 make_statistics(double lse, float delta) {
  const auto high = static_cast<float>(lse);
  return make_float4(high, static_cast<float>(lse - static_cast<double>(high)), delta, 0);
}

// How a region's cells are cut into parts of whole steps.
struct Parts {
  int64_t size;
  int count;
};
__device__ __forceinline__ Parts make_parts(int64_t cells, int max_parts) {
  const int64_t steps = (cells + kTokens - 1) / kTokens;
  if (max_parts == 1) return {steps * kTokens, 1};
  const int64_t size = (steps + max_parts - 1) / max_parts * kTokens;
  return {size, cells > 0 ? static_cast<int>((cells + size - 1) / size) : 1};
}

// Dynamic shared memory: what depends on the shape follows in this order.
template <int kQueries>
struct AttentionShared {
  float* partial;  // [kQueries][kTokens][lanes]; at the end [kQueries][rows][lanes][kVec]
  float* weight;   // [kQueries][heads][kTokens]
  float* factor;   // [kQueries][heads], of what was summed before this step
  float2* state;   // [kQueries][heads]: maximum and sum
  int64_t* token;  // [kTokens]
  float* bias;     // [kTokens]

  static __host__ __device__ int partial_size(const AttentionShape& s, int vec) {
    const int size = kQueries * s.lanes * (s.rows * vec > kTokens ? s.rows * vec : kTokens);
    return (size + 3) / 4 * 4;
  }
  static size_t bytes(const AttentionShape& s, int vec) {
    const int rows = kQueries * s.heads;
    return sizeof(int64_t) * kTokens + sizeof(float2) * rows +
           sizeof(float) * (partial_size(s, vec) + rows * kTokens + rows + kTokens);
  }
  __device__ __forceinline__ AttentionShared(const AttentionShape& s, int vec) {
    const int rows = kQueries * s.heads;
    token = reinterpret_cast<int64_t*>(shared_memory());
    state = reinterpret_cast<float2*>(token + kTokens);
    partial = reinterpret_cast<float*>(state + rows);
    weight = partial + partial_size(s, vec);
    factor = weight + rows * kTokens;
    bias = factor + rows;
  }
};

// A product of vectors whose sum has one order wherever it is made.
template <int kVec>
__device__ __forceinline__ float dot(const float (&a)[kVec], const float (&b)[kVec]) {
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kVec; ++c) sum = fmaf(a[c], b[c], sum);
  return sum;
}

// Likewise for what the lanes of a head have.
__device__ __forceinline__ float sum_lanes(const float* partial, int lanes) {
  float sum = 0;
  for (int l = 0; l < lanes; ++l) sum += partial[l];
  return sum;
}

// The rows' sums meet in the first row, in order. Every thread of the block takes part; `partial` is not in use.
template <int kQueries, int kVec>
__device__ __forceinline__ void add_rows(float* partial, float (&sum)[kQueries][kVec], int rows, int lanes, int row,
                                         int lane, bool owner) {
  const auto at = [&](int q, int of_row) { return partial + ((q * rows + of_row) * lanes + lane) * kVec; };
#pragma unroll
  for (int q = 0; q < kQueries; ++q)
    if (owner)
#pragma unroll
      for (int c = 0; c < kVec; ++c) at(q, row)[c] = sum[q][c];
  __syncthreads();
  if (!owner || row != 0) return;
#pragma unroll
  for (int q = 0; q < kQueries; ++q)
    for (int other = 1; other < rows; ++other)
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum[q][c] += at(q, other)[c];
}

// The tile of tokens that a block owns.
struct OwnedTile {
  ImageGrid image;  // without tokens where there is no such tile
  int64_t b;
  int y;
  int x;
  int end_y;
  int end_x;

  // Whether it holds cells of a footprint.
  __device__ __forceinline__ bool touches(int row, int column, int height, int width) const {
    return row < end_y && row + height > y && column < end_x && column + width > x;
  }
};

// Where the grids are on the device, there are more blocks than tiles.
__device__ __forceinline__ OwnedTile find_tile(const Images& images, const int64_t* tile_start, Tile shape,
                                               unsigned index) {
  unsigned b, t;  // as few bits as blocks have: long divisions take long
  if (tile_start == nullptr) {
    const auto tiles = static_cast<unsigned>(shape.count(images.height, images.width));
    b = index / tiles;
    t = index % tiles;
  } else {
    if (index >= tile_start[images.count]) return {};
    b = static_cast<unsigned>(find_segment(tile_start, images.count, index));
    t = static_cast<unsigned>(index - tile_start[b]);
  }
  const ImageGrid image = images[b];
  if (image.width == 0) return {};
  const unsigned across = (static_cast<unsigned>(image.width) + shape.width - 1) / shape.width;
  const int y = static_cast<int>(t / across) * shape.height, x = static_cast<int>(t % across) * shape.width;
  return {image, b, y, x, min(y + shape.height, image.height), min(x + shape.width, image.width)};
}

// How many threads before this one `keep`, and how many of the block do. Every thread takes part; afterwards what was
// in shared memory before has been read, and `warp_counts` (one a warp) can be used for the next call after a barrier.
struct Rank {
  int before;
  int count;
};
__device__ __forceinline__ Rank rank_threads(bool keep, int* warp_counts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const unsigned ballot = __ballot_sync(0xffffffffu, keep);
  if (lane == 0) warp_counts[warp] = __popc(ballot);
  __syncthreads();
  Rank rank{__popc(ballot & ((1u << lane) - 1)), 0};
  for (int w = 0; w < warps; ++w) {
    if (w < warp) rank.before += warp_counts[w];
    rank.count += warp_counts[w];
  }
  return rank;
}

}  // namespace granvit::cuda
