// region_attention forward without tensor cores, for any number of queries: a block reads one part of a region's
// tokens, all heads of a group side by side, so that whole rows are read in order. A second kernel joins a region's
// parts.
#pragma once

#include "region_attention_args.h"

namespace granvit::cuda {

// Scores of a step's tokens become softmax weights, relative to the largest score so far. One thread a query and head.
template <int kQueries>
__device__ __forceinline__ void step_softmax(const AttentionShared<kQueries>& shared, int heads, int count) {
  for (int i = threadIdx.x; i < kQueries * heads; i += blockDim.x) {
    float* weight = shared.weight + i * kTokens;
    const float2 before = shared.state[i];
    float maximum = before.x;
    for (int t = 0; t < count; ++t) maximum = fmaxf(maximum, weight[t]);
    const float base = maximum == -INFINITY ? 0 : maximum;
    const float factor = expf(before.x - base);
    float sum = before.y * factor;
    for (int t = 0; t < count; ++t) {
      weight[t] = expf(weight[t] - base);
      sum += weight[t];
    }
    shared.factor[i] = factor;
    shared.state[i] = make_float2(maximum, sum);
  }
}

template <typename T, int kVec, int kQueries>
__global__ void __launch_bounds__(kAttentionThreads, 1) region_attention_kernel(RegionAttentionArgs<T> a) {
  const AttentionShared<kQueries> shared(a.shape, kVec);
  const int lanes = a.shape.lanes, rows = a.shape.rows;
  const int row = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int64_t r = blockIdx.x / a.max_parts;
  const int part = blockIdx.x % a.max_parts;
  const int first_head = blockIdx.y * a.shape.heads;
  const int heads = min(a.shape.heads, a.heads - first_head);
  const int64_t first_query = blockIdx.z * int64_t{kQueries};
  const int queries = static_cast<int>(min(static_cast<int64_t>(kQueries), a.queries - first_query));
  const Region region = a.regions[r];
  const ImageGrid image = a.images[region.image];
  const Footprint footprint = make_footprint(region, image);
  const Parts parts = make_parts(footprint.cells(), a.max_parts);
  if (part >= parts.count) return;
  const int64_t begin = part * parts.size, end = min(begin + parts.size, footprint.cells());
  const int head = lane / a.shape.head_lanes;
  const bool owner = row < rows && head < heads;
  const int64_t channel = static_cast<int64_t>(first_head) * a.dim + lane * kVec;
  const T* keys = a.key.image(image, region.image) + channel;
  const T* values = a.value.image(image, region.image) + channel;

  float query[kQueries][kVec], sum[kQueries][kVec];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    set_zero(query[q]);
    set_zero(sum[q]);
    if (owner && q < queries)
      load(a.query + r * a.query_region_stride + (first_query + q) * a.query_stride + channel, query[q]);
  }
  for (int i = threadIdx.x; i < kQueries * a.shape.heads; i += blockDim.x) shared.state[i] = make_float2(-INFINITY, 0);

  for (int64_t first = begin; first < end; first += kTokens) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kTokens), end - first));
    __syncthreads();
    for (int t = threadIdx.x; t < count; t += blockDim.x) {
      const int y = static_cast<int>((first + t) / footprint.width),
                x = static_cast<int>((first + t) % footprint.width);
      shared.token[t] = static_cast<int64_t>(footprint.row + y) * image.width + footprint.column + x;
      shared.bias[t] = footprint.log_coverage(y, x);
    }
    __syncthreads();
    for (int t = row; owner && t < count; t += rows) {
      float key[kVec];
      load(keys + shared.token[t] * a.key.row_stride, key);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        shared.partial[(q * kTokens + t) * lanes + lane] = dot(query[q], key);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kQueries * heads * count; i += blockDim.x) {
      const int t = i % count, h = i / count % heads, q = i / count / heads;
      const float* partial = shared.partial + (q * kTokens + t) * lanes + h * a.shape.head_lanes;
      shared.weight[(q * a.shape.heads + h) * kTokens + t] =
          a.scale * sum_lanes(partial, a.shape.head_lanes) + shared.bias[t];
    }
    __syncthreads();
    step_softmax<kQueries>(shared, a.shape.heads, count);
    __syncthreads();
    if (!owner) continue;
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      const float factor = shared.factor[q * a.shape.heads + head];
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum[q][c] *= factor;
    }
    for (int t = row; t < count; t += rows) {
      float value[kVec];
      load(values + shared.token[t] * a.value.row_stride, value);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) add(sum[q], shared.weight[(q * a.shape.heads + head) * kTokens + t], value);
    }
  }

  __syncthreads();
  add_rows<kQueries>(shared.partial, sum, rows, lanes, row, lane, owner);
  if (!owner || row != 0) return;
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    if (q >= queries) continue;
    const float2 state = shared.state[q * a.shape.heads + head];
    const int64_t query_row = r * a.queries + first_query + q;
    const bool first_lane = lane % a.shape.head_lanes == 0;
    if (parts.count == 1) {
      const float factor = begin < end ? 1 / state.y : 0;
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum[q][c] *= factor;
      store(a.output + query_row * a.heads * a.dim + channel, sum[q]);
      if (first_lane)
        a.lse[(r * a.heads + first_head + head) * a.queries + first_query + q] =
            static_cast<double>(state.x) + log(static_cast<double>(state.y));
    } else {
      const int64_t part_row = (r * a.max_parts + part) * a.queries + first_query + q;
      float* to = a.part_output + part_row * a.heads * a.dim + channel;
      store_floats(to, sum[q]);
      if (first_lane) a.part_softmax[part_row * a.heads + first_head + head] = state;
    }
  }
}

// One block a region and query.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads) join_parts_kernel(RegionAttentionArgs<T> a) {
  const int64_t r = blockIdx.x / a.queries, q = blockIdx.x % a.queries;
  const Region region = a.regions[r];
  const int parts = make_parts(make_footprint(region, a.images[region.image]).cells(), a.max_parts).count;
  if (parts == 1) return;
  const int channels = a.heads * a.dim;
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    const int head = c / a.dim;
    const auto part_row = [&](int part) { return (r * a.max_parts + part) * a.queries + q; };
    float maximum = -INFINITY;
    for (int part = 0; part < parts; ++part)
      maximum = fmaxf(maximum, a.part_softmax[part_row(part) * a.heads + head].x);
    const float base = maximum == -INFINITY ? 0 : maximum;
    float sum = 0, total = 0;
    for (int part = 0; part < parts; ++part) {
      const float2 state = a.part_softmax[part_row(part) * a.heads + head];
      const float factor = expf(state.x - base);
      total += factor * state.y;
      sum += factor * a.part_output[part_row(part) * channels + c];
    }
    a.output[(r * a.queries + q) * channels + c] = narrow<T>(sum / total);
    if (c % a.dim == 0)
      a.lse[(r * a.heads + head) * a.queries + q] = static_cast<double>(maximum) + log(static_cast<double>(total));
  }
}

}  // namespace granvit::cuda
