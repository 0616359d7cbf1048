// region_attention forward with matrix units: a warp reads one part of a region's tokens for one head and up to 16
// queries, the next tile of 16 tokens under way while it works on this one. join_parts_kernel joins a region's parts.
#pragma once

#include "region_attention_matrix.h"

namespace granvit::cuda {

// A warp's tiles in shared memory: queries, and two of keys and of values.
constexpr int kForwardTiles = 5;

template <typename T, int kDim>
__global__ void __launch_bounds__(kMatrixWarps * 32, 4) region_attention_matrix_kernel(RegionAttentionArgs<T> a) {
  const HeadRows<T, kDim> rows(a);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  const RegionUnit unit(a);
  if (unit.first == unit.last) return;
  const Region region = a.regions[unit.r];
  const ImageGrid image = a.images[region.image];
  const Footprint footprint = make_footprint(region, image);
  const Parts parts = make_parts(footprint.cells(), a.max_parts);
  if (unit.part >= parts.count) return;
  const int64_t begin = unit.part * parts.size, end = min(begin + parts.size, footprint.cells());
  const int queries = static_cast<int>(min(static_cast<int64_t>(kSide), a.queries - unit.first_query));
  const T* from_queries = a.query + unit.r * a.query_region_stride + unit.first_query * a.query_stride;
  const CellWalk start(make_cover(footprint), image.width, begin, end);
  const float scale = a.scale * static_cast<float>(kLog2E);
  T* query_tile = reinterpret_cast<T*>(shared_memory()) + warp * kForwardTiles * rows.tile_elements();
  T* cells = query_tile + rows.tile_elements();  // keys and values of even tiles, then of odd ones

  for (int i = unit.first; i < unit.last; ++i) {
    const int head = i / rows.slices(), first = i % rows.slices() * rows.shape.tiles;
    const int64_t channel = static_cast<int64_t>(head) * rows.dim();
    const T* keys = a.key.image(image, region.image) + channel;
    const T* values = a.value.image(image, region.image) + channel;
    CellWalk walk = start;
    const auto fetch = [&](int odd) {
      T* to = cells + odd * 2 * rows.tile_elements();
      if (walk.any())
        copy_cells(rows, walk, to, to + rows.tile_elements(), keys, a.key.row_stride, values, a.value.row_stride);
      commit_copies();
    };
    copy_queries(rows, query_tile, from_queries + channel, a.query_stride, queries);
    fetch(0);

    float total[kHeadTiles<T, kDim>][4];
    set_zero(total);
    // Of rows group and group + 8. The sum is this lane's alone until the end.
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int odd = 0; walk.any(); odd ^= 1) {
      const float own_bias = walk.log2_coverage();
      walk.advance();
      fetch(odd ^ 1);
      wait_for_copies<1>();
      __syncwarp();
      const T* tile = cells + odd * 2 * rows.tile_elements();
      float weight[2][4];
      rows.multiply(weight, query_tile, tile);
      float bias[4];  // of this lane's columns
#pragma unroll
      for (int c = 0; c < 4; ++c) bias[c] = __shfl_sync(kAll, own_bias, c / 2 * 8 + 2 * member + c % 2);
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
        const float shrink = exp2f(maximum[half] - base);
        maximum[half] = highest;
        sum[half] *= shrink;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& score = weight[c / 2][half * 2 + c % 2];
          score = exp2f(score - base);
          sum[half] += score;
        }
#pragma unroll
        for (auto& of_tile : total) {
          of_tile[half * 2] *= shrink;
          of_tile[half * 2 + 1] *= shrink;
        }
      }
      uint32_t packed[4];
      pack<T>(packed, weight);
      rows.accumulate(total, packed, tile + rows.tile_elements(), first);
      __syncwarp();  // before the next but one tile takes this one's place
    }
    wait_for_copies<0>();
    __syncwarp();

    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
    const int q = group + 8 * member;  // of the two rows, the one that this lane answers for
    if (member < 2 && q < queries && first == 0) {
      const float own_maximum = member == 0 ? maximum[0] : maximum[1], own_sum = member == 0 ? sum[0] : sum[1];
      if (parts.count == 1)
        a.lse[(unit.r * a.heads + head) * a.queries + unit.first_query + q] =
            (static_cast<double>(own_maximum) + log2(static_cast<double>(own_sum))) * kLn2;
      else
        a.part_softmax[part_row(a, unit, q) * a.heads + head] =
            make_float2(static_cast<float>(own_maximum * kLn2), own_sum);
    }
    if (parts.count > 1) {
      store_part(a, rows, unit, head, first, total, queries);
    } else {
      const bool empty = begin >= end;
      T* to = a.output + (unit.r * a.queries + unit.first_query) * a.heads * a.dim + channel;
      rows.store(total, make_float2(empty ? 0 : 1 / sum[0], empty ? 0 : 1 / sum[1]), query_tile, first,
                 [&](int row) { return row < queries ? to + static_cast<int64_t>(row) * a.heads * a.dim : nullptr; });
    }
    __syncwarp();  // before the next head's queries take this one's place
  }
}

}  // namespace granvit::cuda
