// region_attention forward with matrix units: a warp reads one part of a region's tokens for one head and up to 16
// queries, the next two tiles of 16 tokens under way while it works on one. join_parts_kernel joins a region's parts.
#pragma once

#include "region_attention_cells.h"

namespace granvit::cuda {

// A warp's tiles in shared memory: queries, and those of cells.
constexpr int kForwardTiles = 1 + kCellTiles;

template <typename T, int kDim>
__global__ void __launch_bounds__(kMatrixWarps * 32, 3) region_attention_matrix_kernel(RegionAttentionArgs<T> a) {
  const HeadRows<T, kDim> rows(a);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  const RegionUnit unit(a);
  if (unit.first == unit.last) return;
  const Region region = a.regions[unit.r];
  const ImageGrid image = a.images[region.image];
  const Footprint footprint = make_footprint(region, image);
  const Parts parts = make_parts(footprint.cells(), a.max_parts);
  if (unit.part >= parts.count) return;
  const int begin = static_cast<int>(unit.part * parts.size);
  const int end = static_cast<int>(min(begin + parts.size, footprint.cells()));
  const int queries = min(kSide, static_cast<int>(a.queries) - unit.first_query);
  const T* from_queries = a.query + unit.r * a.query_region_stride + unit.first_query * a.query_stride;
  const CellWalk start(make_cover(footprint), image.width, begin, end);
  const float scale = a.scale * static_cast<float>(kLog2E);
  T* query_tile = reinterpret_cast<T*>(shared_memory()) + warp * kForwardTiles * rows.tile_elements();
  T* cells = query_tile + rows.tile_elements();

  for (int i = unit.first; i < unit.last; ++i) {
    const int head = i / rows.slices(), first = i % rows.slices() * rows.shape.tiles;
    const int64_t channel = static_cast<int64_t>(head) * rows.dim();
    const HeadTokens<T> keys(a.key, image, region.image, channel), values(a.value, image, region.image, channel);
    CellPipeline<T, kDim> pipeline(rows, start, cells, keys, values);
    copy_queries(rows, query_tile, from_queries + channel, a.query_stride, queries);
    pipeline.begin();

    float total[kHeadTiles<T, kDim>][4];
    set_zero(total);
    // Of rows group and group + 8. The sum is this lane's alone until the end.
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int left = end - begin; left > 0; left -= kSide) {
      const CellTile<T> tile = pipeline.next();
      float weight[2][4];
      rows.multiply(weight, query_tile, tile.keys);
      float bias[4];
      spread_columns(bias, tile.bias);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half * 8 >= queries) continue;  // nobody reads these rows
        float highest = maximum[half];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& score = weight[c / 2][half * 2 + c % 2];
          score = fmaf(score, scale, bias[c]);
          highest = fmaxf(highest, score);
        }
        highest = quad_max(highest);
        const float base = highest == -INFINITY ? 0 : highest;
        const float shrink = exp2_of(maximum[half] - base);
        maximum[half] = highest;
        sum[half] *= shrink;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& score = weight[c / 2][half * 2 + c % 2];
          score = exp2_of(score - base);
          sum[half] += score;
        }
        if (__all_sync(kAll, shrink == 1)) continue;  // most tiles hold no new maximum
#pragma unroll
        for (auto& of_tile : total) {
          of_tile[half * 2] *= shrink;
          of_tile[half * 2 + 1] *= shrink;
        }
      }
      uint32_t packed[4];
      pack<T>(packed, weight);
      rows.accumulate(total, packed, tile.values, first);
      __syncwarp();  // before another tile takes this one's place
    }
    wait_for_copies<0>();
    __syncwarp();

    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
    const int q = group + 8 * member;  // of the two rows, the one that this lane answers for
    if (member < 2 && q < queries && first == 0) {
      const float own_maximum = member == 0 ? maximum[0] : maximum[1], own_sum = member == 0 ? sum[0] : sum[1];
      if (parts.count == 1)
        a.lse[of_head(a, unit, head) + q] =
            (static_cast<double>(own_maximum) + log2(static_cast<double>(own_sum))) * kLn2;
      else
        a.part_softmax[(part_row(a, unit) + q) * a.heads + head] =
            make_float2(static_cast<float>(own_maximum * kLn2), own_sum);
    }
    if (parts.count > 1) {
      store_part(a, rows, unit, head, first, total, queries);
    } else {
      const bool empty = begin >= end;
      T* to = a.output + query_row(a, unit) * a.heads * a.dim + channel;
      rows.store(total, make_float2(empty ? 0 : 1 / sum[0], empty ? 0 : 1 / sum[1]), query_tile, first,
                 [&](int row) { return row < queries ? to + static_cast<int64_t>(row) * a.heads * a.dim : nullptr; });
    }
    __syncwarp();  // before the next head's queries take this one's place
  }
}

}  // namespace granvit::cuda
