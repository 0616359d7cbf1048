// region_attention backward without tensor cores. The gradient of the queries goes by region, as the forward does, and
// leaves what the tokens' gradients need of a query. The gradients of the tokens go by tile of tokens: a block owns the
// tile and some heads, and visits the regions that cover cells of it, in order. Every token is written once.
#pragma once

#include "region_attention_args.h"

namespace granvit::cuda {

constexpr int kOwnedTokens = 4;  // of a row, that a thread of the tokens' gradients owns

template <typename T, int kVec, int kQueries>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    region_attention_query_gradient_kernel(RegionAttentionArgs<T> a) {
  // Of its [2 * kQueries] rows, those of the scores come first, then those of grad . value. `state` holds lse in two
  // floats, `factor` what is subtracted from grad . value.
  const AttentionShared<2 * kQueries> shared(a.shape, kVec);
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

  float query[kQueries][kVec], grad[kQueries][kVec], sum[kQueries][kVec];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    float output[kVec];
    set_zero(query[q]);
    set_zero(grad[q]);
    set_zero(sum[q]);
    set_zero(output);
    if (owner && q < queries) {
      const int64_t own = (r * a.queries + first_query + q) * a.heads * a.dim + channel;
      load(a.query + r * a.query_region_stride + (first_query + q) * a.query_stride + channel, query[q]);
      load(a.grad + own, grad[q]);
      load(a.output + own, output);
    }
    // In the order in which grad . value is added up: where one cell has all the weight, their difference is zero.
    if (owner && row == 0) shared.partial[q * kTokens * lanes + lane] = dot(grad[q], output);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kQueries * heads; i += blockDim.x) {
    const int h = i % heads, q = i / heads;
    const float delta = sum_lanes(shared.partial + q * kTokens * lanes + h * a.shape.head_lanes, a.shape.head_lanes);
    const int64_t of_query = (r * a.heads + first_head + h) * a.queries + first_query + q;
    const float4 statistics = make_statistics(q < queries ? a.lse[of_query] : 0, delta);
    shared.state[q * a.shape.heads + h] = make_float2(statistics.x, statistics.y);
    shared.factor[q * a.shape.heads + h] = delta;
    if (a.statistics != nullptr && part == 0 && q < queries) a.statistics[of_query] = statistics;
  }
  if (a.grad_query == nullptr) return;

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
      float key[kVec], value[kVec];
      load(keys + shared.token[t] * a.key.row_stride, key);
      load(values + shared.token[t] * a.value.row_stride, value);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        shared.partial[(q * kTokens + t) * lanes + lane] = dot(query[q], key);
        shared.partial[((kQueries + q) * kTokens + t) * lanes + lane] = dot(grad[q], value);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kQueries * heads * count; i += blockDim.x) {
      const int t = i % count, h = i / count % heads, q = i / count / heads;
      const float* partial = shared.partial + (q * kTokens + t) * lanes + h * a.shape.head_lanes;
      const int of_head = q * a.shape.heads + h;
      const float score = a.scale * sum_lanes(partial, a.shape.head_lanes) + shared.bias[t];
      const float slope = sum_lanes(partial + kQueries * kTokens * lanes, a.shape.head_lanes) - shared.factor[of_head];
      const float2 lse = shared.state[of_head];
      shared.weight[of_head * kTokens + t] = expf(score - lse.x - lse.y) * slope;
    }
    __syncthreads();
    for (int t = row; owner && t < count; t += rows) {
      float key[kVec];
      load(keys + shared.token[t] * a.key.row_stride, key);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) add(sum[q], shared.weight[(q * a.shape.heads + head) * kTokens + t], key);
    }
  }

  __syncthreads();
  add_rows<kQueries>(shared.partial, sum, rows, lanes, row, lane, owner);
  if (!owner || row != 0) return;
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    if (q >= queries) continue;
    const int64_t query_row = r * a.queries + first_query + q;
    if (parts.count == 1) {
#pragma unroll
      for (int c = 0; c < kVec; ++c) sum[q][c] *= a.scale;
      store(a.grad_query + query_row * a.heads * a.dim + channel, sum[q]);
    } else {
      const int64_t part_row = (r * a.max_parts + part) * a.queries + first_query + q;
      store_floats(a.part_output + part_row * a.heads * a.dim + channel, sum[q]);
    }
  }
}

// One block a region and query.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads) join_query_gradient_kernel(RegionAttentionArgs<T> a) {
  const int64_t r = blockIdx.x / a.queries, q = blockIdx.x % a.queries;
  const Region region = a.regions[r];
  const int parts = make_parts(make_footprint(region, a.images[region.image]).cells(), a.max_parts).count;
  if (parts == 1) return;
  const int channels = a.heads * a.dim;
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    float sum = 0;
    for (int part = 0; part < parts; ++part)
      sum += a.part_output[((r * a.max_parts + part) * a.queries + q) * channels + c];
    a.grad_query[(r * a.queries + q) * channels + c] = narrow<T>(a.scale * sum);
  }
}

// What a block of the tokens' gradients keeps of a region.
struct Visitor {
  int64_t r;
  Footprint footprint;
};

// Dynamic shared memory: what depends on the shape follows in this order.
struct TokenGradientShared {
  Visitor* visitors;  // [kRegionChunk]
  int* warp_counts;   // [kAttentionThreads / 32]
  float* bias;        // [tokens], -infinity where the region covers nothing of the cell
  float* score;       // [tokens][lanes]: partial sums of scores
  float* slope;       // likewise of grad . value
  float* weight;      // [tokens][heads]
  float* weight_slope;

  static __host__ __device__ int tokens(const AttentionShape& s) { return s.rows * kOwnedTokens; }
  static size_t bytes(const AttentionShape& s) {
    return sizeof(Visitor) * kRegionChunk + sizeof(int) * (kAttentionThreads / 32) +
           sizeof(float) * tokens(s) * (1 + 2 * s.lanes + 2 * s.heads);
  }
  __device__ __forceinline__ explicit TokenGradientShared(const AttentionShape& s) {
    visitors = reinterpret_cast<Visitor*>(shared_memory());
    warp_counts = reinterpret_cast<int*>(visitors + kRegionChunk);
    bias = reinterpret_cast<float*>(warp_counts + kAttentionThreads / 32);
    score = bias + tokens(s);
    slope = score + tokens(s) * s.lanes;
    weight = slope + tokens(s) * s.lanes;
    weight_slope = weight + tokens(s) * s.heads;
  }
};

template <typename T, int kVec>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    region_attention_token_gradient_kernel(RegionAttentionArgs<T> a) {
  const TokenGradientShared shared(a.shape);
  const int lanes = a.shape.lanes, tokens = TokenGradientShared::tokens(a.shape);
  const int row = threadIdx.x / lanes, lane = threadIdx.x % lanes, head = lane / a.shape.head_lanes;
  const int first_head = blockIdx.y * a.shape.heads;
  const int heads = min(a.shape.heads, a.heads - first_head);
  const OwnedTile tile = find_tile(a.images, a.tile_start, {a.shape.rows, kOwnedTokens}, blockIdx.x);
  if (tile.image.width == 0) return;
  const int y = tile.y + row;
  const bool owner = row < a.shape.rows && head < heads && y < tile.end_y;
  const int64_t channel = static_cast<int64_t>(first_head) * a.dim + lane * kVec;
  const int64_t first_token = static_cast<int64_t>(y) * tile.image.width + tile.x;

  float key[kOwnedTokens][kVec], value[kOwnedTokens][kVec], key_sum[kOwnedTokens][kVec], value_sum[kOwnedTokens][kVec];
#pragma unroll
  for (int c = 0; c < kOwnedTokens; ++c) {
    set_zero(key[c]);
    set_zero(value[c]);
    set_zero(key_sum[c]);
    set_zero(value_sum[c]);
    if (!owner || tile.x + c >= tile.end_x) continue;
    load(a.key.image(tile.image, tile.b) + (first_token + c) * a.key.row_stride + channel, key[c]);
    load(a.value.image(tile.image, tile.b) + (first_token + c) * a.value.row_stride + channel, value[c]);
  }

  const int64_t last = a.region_start[tile.b + 1];
  const int chunk = min(static_cast<int>(blockDim.x), kRegionChunk);
  for (int64_t first = a.region_start[tile.b]; first < last; first += chunk) {
    Visitor visitor{};
    bool visits = false;
    if (static_cast<int>(threadIdx.x) < chunk && first + threadIdx.x < last) {
      visitor.r = a.order[first + threadIdx.x];
      const Footprint& f = visitor.footprint = make_footprint(a.regions[visitor.r], tile.image);
      visits = tile.touches(f.row, f.column, f.height, f.width);
    }
    const Rank rank = rank_threads(visits, shared.warp_counts);
    if (visits) shared.visitors[rank.before] = visitor;
    for (int i = 0; i < rank.count; ++i) {
      __syncthreads();  // the last region's coverage has been read
      const int64_t r = shared.visitors[i].r;
      const Footprint& f = shared.visitors[i].footprint;
      for (int t = threadIdx.x; t < tokens; t += blockDim.x) {
        const int from_y = tile.y + t / kOwnedTokens - f.row, from_x = tile.x + t % kOwnedTokens - f.column;
        const bool covered = from_y >= 0 && from_y < f.height && from_x >= 0 && from_x < f.width;
        shared.bias[t] = covered ? f.log_coverage(from_y, from_x) : -INFINITY;
      }
      for (int64_t q = 0; q < a.queries; ++q) {
        float query[kVec], grad[kVec];
        set_zero(query);
        set_zero(grad);
        if (owner) {
          load(a.query + r * a.query_region_stride + q * a.query_stride + channel, query);
          load(a.grad + (r * a.queries + q) * a.heads * a.dim + channel, grad);
#pragma unroll
          for (int c = 0; c < kOwnedTokens; ++c) {
            const int t = row * kOwnedTokens + c;
            shared.score[t * lanes + lane] = dot(query, key[c]);
            shared.slope[t * lanes + lane] = dot(grad, value[c]);
          }
        }
        __syncthreads();
        for (int j = threadIdx.x; j < tokens * heads; j += blockDim.x) {
          const int t = j % tokens, h = j / tokens;
          if (shared.bias[t] == -INFINITY) continue;
          const int partial = t * lanes + h * a.shape.head_lanes;
          const float4 s = a.statistics[(r * a.heads + first_head + h) * a.queries + q];
          const float score = a.scale * sum_lanes(shared.score + partial, a.shape.head_lanes) + shared.bias[t];
          const float weight = expf(score - s.x - s.y);
          shared.weight[t * a.shape.heads + h] = weight;
          shared.weight_slope[t * a.shape.heads + h] =
              weight * (sum_lanes(shared.slope + partial, a.shape.head_lanes) - s.z);
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < kOwnedTokens; ++c) {
          const int t = row * kOwnedTokens + c;
          if (!owner || shared.bias[t] == -INFINITY) continue;
          add(value_sum[c], shared.weight[t * a.shape.heads + head], grad);
          add(key_sum[c], shared.weight_slope[t * a.shape.heads + head], query);
        }
      }
    }
    __syncthreads();  // these visitors have been read
  }
  if (!owner) return;
#pragma unroll
  for (int c = 0; c < kOwnedTokens; ++c) {
    if (tile.x + c >= tile.end_x) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) key_sum[c][i] *= a.scale;
    store(a.grad_key.image(tile.image, tile.b) + (first_token + c) * a.grad_key.row_stride + channel, key_sum[c]);
    store(a.grad_value.image(tile.image, tile.b) + (first_token + c) * a.grad_value.row_stride + channel, value_sum[c]);
  }
}

}  // namespace granvit::cuda
