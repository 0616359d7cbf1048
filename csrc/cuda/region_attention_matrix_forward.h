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
  if (unit.head >= a.heads) return;
  const Region region = a.regions[unit.r];
  const ImageGrid image = a.images[region.image];
  const Footprint footprint = make_footprint(region, image);
  const Parts parts = make_parts(footprint.cells(), a.max_parts);
  if (unit.part >= parts.count) return;
  const int64_t begin = unit.part * parts.size, end = min(begin + parts.size, footprint.cells());
  const int queries = static_cast<int>(min(static_cast<int64_t>(kSide), a.queries - unit.first_query));
  const int first = unit.slice * rows.shape.tiles;  // 8 channels each
  const int64_t channel = static_cast<int64_t>(unit.head) * rows.dim();

  T* query_tile = reinterpret_cast<T*>(shared_memory()) + warp * kForwardTiles * rows.tile_elements();
  T* cells = query_tile + rows.tile_elements();  // keys and values of even tiles, then of odd ones
  const T* keys = a.key.image(image, region.image) + channel;
  const T* values = a.value.image(image, region.image) + channel;
  CellWalk walk(make_cover(footprint), image.width, begin, end);
  const auto fetch = [&](int odd) {
    T* to = cells + odd * 2 * rows.tile_elements();
    if (walk.any())
      copy_cells(rows, walk, to, to + rows.tile_elements(), keys, a.key.row_stride, values, a.value.row_stride);
    commit_copies();
  };
  copy_queries(rows, query_tile, a.query + unit.r * a.query_region_stride + unit.first_query * a.query_stride + channel,
               a.query_stride, queries);
  fetch(0);

  const float scale = a.scale * static_cast<float>(kLog2E);
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
    float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float bias = __shfl_sync(kAll, own_bias, i / 2 * 8 + 2 * member + i % 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& score = weight[i / 2][half * 2 + i % 2];
        score = fmaf(score, scale, bias);
        highest[half] = fmaxf(highest[half], score);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = quad_max(highest[half]);
      const float base = highest[half] == -INFINITY ? 0 : highest[half];
      const float shrink = exp2f(maximum[half] - base);
      maximum[half] = highest[half];
      sum[half] *= shrink;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = weight[i / 2][half * 2 + i % 2];
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

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = quad_sum(sum[half]);
    const int q = group + 8 * half;
    if (member != 0 || q >= queries || unit.slice != 0) continue;
    if (parts.count == 1)
      a.lse[(unit.r * a.heads + unit.head) * a.queries + unit.first_query + q] =
          (static_cast<double>(maximum[half]) + log2(static_cast<double>(sum[half]))) * kLn2;
    else
      a.part_softmax[part_row(a, unit, q) * a.heads + unit.head] =
          make_float2(static_cast<float>(maximum[half] * kLn2), sum[half]);
  }
  if (parts.count > 1) return store_part(a, rows, unit, total, queries);
  const bool empty = begin >= end;
  rows.store(total, make_float2(empty ? 0 : 1 / sum[0], empty ? 0 : 1 / sum[1]), query_tile, first, [&](int q) {
    return q < queries ? a.output + (unit.r * a.queries + unit.first_query + q) * a.heads * a.dim + channel : nullptr;
  });
}

}  // namespace granvit::cuda
