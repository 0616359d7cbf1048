// How warps of the kernels by region divide the work and walk the cells of a region; see region_attention_matrix.h.
#pragma once

#include "region_attention_matrix.h"

namespace granvit::cuda {

// By a whole warp: four lanes take a logarithm each, in double as everything about coverage.
__device__ __forceinline__ Cover make_cover(const Footprint& f) {
  const int edge = threadIdx.x % 4;  // top, bottom, left, right
  const int line = edge == 0 ? f.row : edge == 1 ? f.row + f.height - 1 : edge == 2 ? f.column : f.column + f.width - 1;
  const double cover = edge < 2 ? cell_coverage(f.y0, f.y1, line) : cell_coverage(f.x0, f.x1, line);
  // A single row is the first and the last one.
  const bool counted = !f.whole && !(edge == 1 && f.height == 1) && !(edge == 3 && f.width == 1);
  const float own = counted ? static_cast<float>(log2(cover)) : 0.0f;
  return {f.row,
          f.column,
          f.height,
          f.width,
          __shfl_sync(kAll, own, 0),
          __shfl_sync(kAll, own, 1),
          __shfl_sync(kAll, own, 2),
          __shfl_sync(kAll, own, 3)};
}

// What a warp of the kernels by region does: a part of a region, a run of heads (or slices of one), and a block of
// queries. Slices and heads lie side by side in memory, and so do the warps that read them.
struct RegionUnit {
  int r;
  int first_query;
  int part;
  int first;  // of heads * slices
  int last;

  template <typename T>
  static int64_t blocks(const RegionAttentionArgs<T>& a) {
    const MatrixShape& shape = a.matrix;
    const int runs = (a.heads * shape.slices + shape.run - 1) / shape.run;
    return a.regions.count * shape.query_blocks * a.max_parts * ((runs + shape.warps - 1) / shape.warps);
  }

  template <typename T>
  __device__ __forceinline__ explicit RegionUnit(const RegionAttentionArgs<T>& a) {
    const unsigned warps = blockDim.x / 32, across = a.heads * a.matrix.slices, run = a.matrix.run;
    const unsigned blocks = ((across + run - 1) / run + warps - 1) / warps;
    const unsigned parts = a.max_parts, query_blocks = a.matrix.query_blocks, rest = blockIdx.x / blocks;
    const unsigned begin = (blockIdx.x % blocks * warps + threadIdx.x / 32) * run;
    first = static_cast<int>(min(begin, across));
    last = static_cast<int>(min(begin + run, across));
    part = static_cast<int>(rest % parts);
    first_query = static_cast<int>(rest / parts % query_blocks) * kSide;
    r = static_cast<int>(rest / parts / query_blocks);
  }
};

// Where the unit's first query stands among those of all regions, and among all parts' queries.
template <typename T>
__device__ __forceinline__ int64_t query_row(const RegionAttentionArgs<T>& a, const RegionUnit& unit) {
  return unit.r * a.queries + unit.first_query;
}
template <typename T>
__device__ __forceinline__ int64_t part_row(const RegionAttentionArgs<T>& a, const RegionUnit& unit) {
  return (static_cast<int64_t>(unit.r) * a.max_parts + unit.part) * a.queries + unit.first_query;
}
// And among the numbers of a head's queries, (R, heads, Q).
template <typename T>
__device__ __forceinline__ int64_t of_head(const RegionAttentionArgs<T>& a, const RegionUnit& unit, int head) {
  return (static_cast<int64_t>(unit.r) * a.heads + head) * a.queries + unit.first_query;
}

// The cells of a part of a region, a tile at a time; each lane has the tile's cell lane % 16.
struct CellWalk {
  Cover cover;
  int first_token;  // of the region, in its image
  int left;         // cells from the next tile's first one to the end
  int image_width;
  int y = 0;
  int x = 0;
  int step_y = 0;
  int step_x = 0;

  __device__ __forceinline__ CellWalk(const Cover& cover, int image_width, int begin, int end)
      : cover(cover), first_token(cover.row * image_width + cover.column), left(end - begin), image_width(image_width) {
    if (left <= 0) return;
    const unsigned cell = begin + threadIdx.x % kSide, width = cover.width;
    y = static_cast<int>(cell / width);
    x = static_cast<int>(cell % width);
    step_y = static_cast<int>(kSide / width);
    step_x = static_cast<int>(kSide % width);
  }

  __device__ __forceinline__ bool any() const { return left > 0; }
  __device__ __forceinline__ bool valid() const { return static_cast<int>(threadIdx.x % kSide) < left; }
  // In its image; cells that are not valid have the region's first token.
  __device__ __forceinline__ int token() const { return first_token + (valid() ? y * image_width + x : 0); }
  __device__ __forceinline__ float log2_coverage() const {
    return valid() ? cover.of_row(y) + cover.of_column(x) : -INFINITY;
  }
  __device__ __forceinline__ void advance() {
    left -= kSide;
    y += step_y;
    x += step_x;
    if (x >= cover.width) {
      x -= cover.width;
      ++y;
    }
  }
};

// A tile of cells that has arrived. The bias is log2 of coverage of the lane's cell, lane % 16.
template <typename T>
struct CellTile {
  const T* keys;
  const T* values;
  float bias;
};

constexpr int kCellStages = 3;               // tiles of cells that are in shared memory or on their way there
constexpr int kCellTiles = 2 * kCellStages;  // tiles of rows for them: keys and values

// Brings a walk's tiles of cells to shared memory, one after the other.
template <typename T, int kDim>
struct CellPipeline {
  const HeadRows<T, kDim>& rows;
  CellWalk walk;
  T* cells;  // kCellTiles
  HeadTokens<T> keys;
  HeadTokens<T> values;
  float bias[kCellStages];  // of this tile and those under way
  int stage = 0;            // where the tile that arrives next is

  __device__ __forceinline__ CellPipeline(const HeadRows<T, kDim>& rows, const CellWalk& start, T* cells,
                                          const HeadTokens<T>& keys, const HeadTokens<T>& values)
      : rows(rows), walk(start), cells(cells), keys(keys), values(values) {}

  // Fetches the walk's next tile, zeros where there is no cell. A group of copies, if of none.
  __device__ __forceinline__ float fetch(int to_stage) {
    const float of_tile = walk.log2_coverage();
    if (walk.any()) {
      const int own = walk.token(), left = walk.left;
      T* to_keys = cells + to_stage * 2 * rows.tile_elements();
      T* to_values = to_keys + rows.tile_elements();
      rows.for_each_piece([&](int at, int row, int channel) {
        const int token = __shfl_sync(kAll, own, row);
        if (at < 0) return;
        copy_async(to_keys + at, keys.at(token, channel), row < left);
        copy_async(to_values + at, values.at(token, channel), row < left);
      });
      walk.advance();
    }
    commit_copies();
    return of_tile;
  }

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i + 1 < kCellStages; ++i) bias[i] = fetch(i);
  }

  // Waits for a tile. The one before it is not in use any more.
  __device__ __forceinline__ CellTile<T> next() {
    bias[kCellStages - 1] = fetch(stage == 0 ? kCellStages - 1 : stage - 1);
    wait_for_copies<kCellStages - 1>();
    __syncwarp();
    const T* tile = cells + stage * 2 * rows.tile_elements();
    const CellTile<T> arrived{tile, tile + rows.tile_elements(), bias[0]};
#pragma unroll
    for (int i = 0; i + 1 < kCellStages; ++i) bias[i] = bias[i + 1];
    stage = stage + 1 == kCellStages ? 0 : stage + 1;
    return arrived;
  }
};

// Numbers of a tile's cells, as lanes have them, for the columns of this lane's products.
__device__ __forceinline__ void spread_columns(float (&to)[4], float own) {
  const int member = threadIdx.x % 4;
#pragma unroll
  for (int c = 0; c < 4; ++c) to[c] = __shfl_sync(kAll, own, c / 2 * 8 + 2 * member + c % 2);
}

// Writes the totals of one of several parts of a region, unrounded; see RegionAttentionArgs.
template <typename T, int kDim>
__device__ __forceinline__ void store_part(const RegionAttentionArgs<T>& a, const HeadRows<T, kDim>& rows,
                                           const RegionUnit& unit, int head, int first,
                                           const float (&total)[kHeadTiles<T, kDim>][4], int queries) {
  const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4, count = rows.tiles(first);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int q = group + 8 * half;
    if (q >= queries) continue;
    float* to = a.part_output + ((part_row(a, unit) + q) * a.heads + head) * a.dim + first * kChannels + 2 * member;
#pragma unroll
    for (int i = 0; i < kHeadTiles<T, kDim>; ++i)
      if (i < count)
        *reinterpret_cast<float2*>(to + i * kChannels) = make_float2(total[i][half * 2], total[i][half * 2 + 1]);
  }
}

}  // namespace granvit::cuda
