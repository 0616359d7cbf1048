// region_attention backward with matrix units: the gradient of the queries by region, as the forward goes, and those of
// keys and values by tile of 4 x 4 tokens.
#pragma once

#include "region_attention_cells.h"

namespace granvit::cuda {

// A warp's tiles in shared memory: queries, gradients of their outputs, and those of cells.
constexpr int kQueryGradientTiles = 2 + kCellTiles;

// Of a product, the number at row and column group + 8 * half.
__device__ __forceinline__ float diagonal(const float (&product)[2][4], int half) {
  const int group = threadIdx.x % 32 / 4;
  const float own = group % 2 == 0 ? product[half][half * 2] : product[half][half * 2 + 1];
  return __shfl_sync(kAll, own, group * 4 + group / 2);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kMatrixWarps * 32, 3)
    region_attention_matrix_query_gradient_kernel(RegionAttentionArgs<T> a) {
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
  const Cover cover = make_cover(footprint);
  const CellWalk start(cover, image.width, begin, end);
  const float scale = a.scale * static_cast<float>(kLog2E);
  T* query_tile = reinterpret_cast<T*>(shared_memory()) + warp * kQueryGradientTiles * rows.tile_elements();
  T* grad_tile = query_tile + rows.tile_elements();
  T* cells = grad_tile + rows.tile_elements();
  T* output_tile = cells + (kCellTiles - 1) * rows.tile_elements();  // until cells need the place
  if (a.covers != nullptr && unit.first == 0 && unit.part == 0 && unit.first_query == 0 && lane == 0)
    a.covers[unit.r] = cover;

  for (int i = unit.first; i < unit.last; ++i) {
    const int head = i / rows.slices(), first = i % rows.slices() * rows.shape.tiles;
    const int64_t channel = static_cast<int64_t>(head) * rows.dim(), own_stride = static_cast<int64_t>(a.heads) * a.dim;
    const int64_t own = query_row(a, unit) * own_stride + channel;
    const HeadTokens<T> keys(a.key, image, region.image, channel), values(a.value, image, region.image, channel);
    CellPipeline<T, kDim> pipeline(rows, start, cells, keys, values);
    copy_queries(rows, query_tile, from_queries + channel, a.query_stride, queries);
    copy_queries(rows, grad_tile, a.grad + own, own_stride, queries);
    copy_queries(rows, output_tile, static_cast<const T*>(a.output) + own, own_stride, queries);
    commit_copies();
    if (a.grad_query != nullptr) pipeline.begin();

    // Of rows group and group + 8, with lse in log2.
    const int64_t of_query = of_head(a, unit, head) + group;
    double lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      lse[half] = group + 8 * half < queries ? a.lse[of_query + 8 * half] * kLog2E : 0;
    if (a.grad_query != nullptr)
      wait_for_copies<kCellStages - 1>();
    else
      wait_for_copies<0>();
    __syncwarp();
    // In the order in which grad . value is added up, so that their difference is zero where one cell has all the
    // weight: here as a product with the outputs, for the tokens' gradients as one of the outputs.
    float slope[2][4], other[2][4];
    rows.multiply(slope, grad_tile, output_tile);
    rows.multiply(other, output_tile, grad_tile);
    __syncwarp();  // before cells take the outputs' place
    float4 statistics[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      statistics[half] = make_statistics(lse[half], diagonal(slope, half));
      const float for_tokens = diagonal(other, half);
      if (a.statistics != nullptr && member == 0 && group + 8 * half < queries && unit.part == 0 && first == 0)
        a.statistics[of_query + 8 * half] = make_float4(statistics[half].x, statistics[half].y, for_tokens, 0);
    }
    if (a.grad_query == nullptr) continue;

    float total[kHeadTiles<T, kDim>][4];
    set_zero(total);
    for (int left = end - begin; left > 0; left -= kSide) {
      const CellTile<T> tile = pipeline.next();
      float weight[2][4];
      rows.multiply(weight, query_tile, tile.keys);
      rows.multiply(slope, grad_tile, tile.values);
      float bias[4];
      spread_columns(bias, tile.bias);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half * 8 >= queries) continue;  // nobody reads these rows
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float score = fmaf(weight[c / 2][half * 2 + c % 2], scale, bias[c]);
          float& x = slope[c / 2][half * 2 + c % 2];
          x = bias[c] == -INFINITY
                  ? 0
                  : exp2_of(score - statistics[half].x - statistics[half].y) * (x - statistics[half].z);
        }
      }
      uint32_t packed[4];
      pack<T>(packed, slope);
      rows.accumulate(total, packed, tile.keys, first);
      __syncwarp();  // before another tile takes this one's place
    }
    wait_for_copies<0>();
    __syncwarp();
    if (parts.count > 1)
      store_part(a, rows, unit, head, first, total, queries);
    else
      rows.store(total, make_float2(a.scale, a.scale), query_tile, first,
                 [&](int row) { return row < queries ? a.grad_query + own + row * own_stride : nullptr; });
    __syncwarp();  // before the next head's queries take this one's place
  }
}

constexpr Tile kTokenTile{4, 4};

// Queries of regions, of one head, that a tile of tokens meets together.
template <typename T>
struct QueryTable {
  Cover cover[kSide];        // of their regions
  float4 statistics[kSide];  // see make_statistics
  const T* query[kSide];     // their rows
  const T* grad[kSide];
};

// Dynamic shared memory of the tokens' gradients: what a block shares, then each warp's own.
template <typename T>
struct TokenTileShared {
  static constexpr int kTiles = 6;  // of a warp: keys, values, and two of queries and of gradients of their outputs

  Cover* covers;     // [kRegionChunk]: regions that touch the tile
  int64_t* regions;  // [kRegionChunk]
  int* warp_counts;  // [kMatrixWarps]

  static constexpr size_t kBlockBytes = (sizeof(Cover) + sizeof(int64_t)) * kRegionChunk + sizeof(int) * kMatrixWarps;
  static_assert(kBlockBytes % 16 == 0);
  static size_t warp_bytes(const MatrixShape& shape) {
    return 2 * sizeof(QueryTable<T>) + kTiles * kSide * shape.pitch * sizeof(T);
  }
  __device__ __forceinline__ TokenTileShared() {
    covers = reinterpret_cast<Cover*>(shared_memory());
    regions = reinterpret_cast<int64_t*>(covers + kRegionChunk);
    warp_counts = reinterpret_cast<int*>(regions + kRegionChunk);
  }
  static __device__ __forceinline__ QueryTable<T>* tables(int warp, int tile_elements) {
    return reinterpret_cast<QueryTable<T>*>(shared_memory() + kBlockBytes +
                                            warp * (2 * sizeof(QueryTable<T>) + kTiles * tile_elements * sizeof(T)));
  }
};

// 0 * NaN would reach tokens of the tile that a region does not cover: a query in which anything is not finite becomes
// zeros, with weights of NaN where it belongs. By a whole warp, whose copies have arrived.
template <typename T, int kDim>
__device__ __forceinline__ void keep_finite(const HeadRows<T, kDim>& rows, QueryTable<T>& table, T* queries, T* grads) {
  const int row = threadIdx.x % kSide;
  const float4 s = table.statistics[row];
  const bool finite = fabsf(s.x) < INFINITY && fabsf(s.z) < INFINITY;
  const unsigned others = __ballot_sync(kAll, !finite);
  if (others == 0) return;
  if (!finite && threadIdx.x % 32 < kSide) table.statistics[row].x = NAN;
  rows.for_each_piece([&](int at, int of_row, int) {
    if (at < 0 || (others >> of_row & 1) == 0) return;
#pragma unroll 1
    for (int c = 0; c < kChannels; ++c) queries[at + c] = grads[at + c] = narrow<T>(0);
  });
  __syncwarp();
}

// From products with keys and values to weights and their slopes, for the query of a column, the `own`th of this lane's
// two, and the tokens at (y, x) and two rows below.
template <typename T>
__device__ __forceinline__ void weigh(const QueryTable<T>& table, int column, int own, int y, int x, float scale,
                                      float (&weight)[4], float (&slope)[4]) {
  const Cover region = table.cover[column];
  const float4 s = table.statistics[column];
  const int from_x = x - region.column;
  const bool inside_x = static_cast<unsigned>(from_x) < static_cast<unsigned>(region.width);
  const float across = region.of_column(from_x) - s.x;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int from_y = y + half * (8 / kTokenTile.width) - region.row;
    const bool covered = inside_x && static_cast<unsigned>(from_y) < static_cast<unsigned>(region.height);
    float& w = weight[half * 2 + own];
    float& d = slope[half * 2 + own];
    // What is not covered is computed all the same, and left out: whatever it is, it must not be multiplied by zero.
    const float all = exp2_of(fmaf(w, scale, region.of_row(from_y)) + across - s.y), all_slopes = all * (d - s.z);
    w = covered ? all : 0;
    d = covered ? all_slopes : 0;
  }
}

// A block owns a tile of tokens, a warp a head of it. Queries of all regions that touch the tile form one list, which
// the warp walks 16 at a time, the next 16 under way meanwhile.
template <typename T, int kDim>
__global__ void __launch_bounds__(kMatrixWarps * 32, 3)
    region_attention_matrix_token_gradient_kernel(RegionAttentionArgs<T> a) {
  const HeadRows<T, kDim> rows(a);
  const TokenTileShared<T> shared;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, group = lane / 4,
            member = lane % 4;
  const int units = a.heads * rows.slices(), blocks = (units + warps - 1) / warps;
  // From the last image to the first: the queries' gradient read the last one's tokens last, so that they are still
  // near.
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int unit = static_cast<int>(block % blocks) * warps + warp;
  const OwnedTile owned = find_tile(a.images, a.tile_start, kTokenTile, block / blocks);
  if (owned.image.width == 0) return;
  const int head = unit / rows.slices(), first = unit % rows.slices() * rows.shape.tiles;
  const int64_t channel = static_cast<int64_t>(head) * rows.dim();
  QueryTable<T>* tables = TokenTileShared<T>::tables(warp, rows.tile_elements());
  T* key_tile = reinterpret_cast<T*>(tables + 2);
  T* value_tile = key_tile + rows.tile_elements();
  T* query_tiles = value_tile + rows.tile_elements();  // queries and gradients of even steps, then of odd ones
  const float scale = a.scale * static_cast<float>(kLog2E);
  const int y = owned.y + group / kTokenTile.width, x = owned.x + group % kTokenTile.width;  // and two rows below
  // Of row `row` of the tiles; negative outside the image.
  const auto token_of = [&](int row) {
    const int token_y = owned.y + row / kTokenTile.width, token_x = owned.x + row % kTokenTile.width;
    const bool inside = token_y < owned.end_y && token_x < owned.end_x;
    return inside ? token_y * owned.image.width + token_x : -1;
  };
  const auto copy_tokens = [&] {
    const HeadTokens<T> keys(a.key, owned.image, owned.b, channel), values(a.value, owned.image, owned.b, channel);
    rows.for_each_piece([&](int to, int row, int from) {
      if (to < 0) return;
      const int token = token_of(row), at = max(token, 0);
      copy_async(key_tile + to, keys.at(at, from), token >= 0);
      copy_async(value_tile + to, values.at(at, from), token >= 0);
    });
  };
  // Queries `from` to `from` + 15 of the list of `count`.
  const auto fetch = [&](int from, int count, int odd) {
    const int row = lane % kSide, position = from + row;
    const bool valid = position < count;
    const auto queries = static_cast<int>(a.queries);
    const int slot = valid ? position / queries : 0, q = valid ? position % queries : 0;
    const int64_t r = shared.regions[slot];
    QueryTable<T>& table = tables[odd];
    if (lane < kSide) {
      table.cover[row] = valid ? shared.covers[slot] : Cover{};
      table.query[row] = a.query + r * a.query_region_stride + q * a.query_stride + channel;
      table.grad[row] = a.grad + (r * a.queries + q) * a.heads * a.dim + channel;
      copy_async(&table.statistics[row], a.statistics + (r * a.heads + head) * a.queries + q, valid);
    }
    __syncwarp();
    T* to = query_tiles + odd * 2 * rows.tile_elements();
    rows.for_each_piece([&](int at, int of_row, int piece) {
      if (at < 0) return;
      copy_async(to + at, table.query[of_row] + piece, from + of_row < count);
      copy_async(to + rows.tile_elements() + at, table.grad[of_row] + piece, from + of_row < count);
    });
  };

  float key_total[kHeadTiles<T, kDim>][4], value_total[kHeadTiles<T, kDim>][4];
  set_zero(key_total);
  set_zero(value_total);
  bool loaded = false;
  const int64_t last = a.region_start[owned.b + 1];
  const int chunk = min(static_cast<int>(blockDim.x), kRegionChunk);
  for (int64_t start = a.region_start[owned.b]; start < last; start += chunk) {
    int64_t r = 0;
    Cover cover{};
    bool touches = false;
    if (static_cast<int>(threadIdx.x) < chunk && start + threadIdx.x < last) {
      r = a.order[start + threadIdx.x];
      cover = a.covers[r];
      touches = owned.touches(cover.row, cover.column, cover.height, cover.width);
    }
    const Rank rank = rank_threads(touches, shared.warp_counts);
    if (touches) {
      shared.regions[rank.before] = r;
      shared.covers[rank.before] = cover;
    }
    __syncthreads();
    const int count = unit < units ? rank.count * static_cast<int>(a.queries) : 0;
    if (count > 0) {
      if (!loaded) copy_tokens();
      loaded = true;
      fetch(0, count, 0);
      commit_copies();
    }
    for (int from = 0, odd = 0; from < count; from += kSide, odd ^= 1) {
      if (from + kSide < count) fetch(from + kSide, count, odd ^ 1);
      commit_copies();
      wait_for_copies<1>();
      __syncwarp();
      T* query_tile = query_tiles + odd * 2 * rows.tile_elements();
      T* grad_tile = query_tile + rows.tile_elements();
      keep_finite(rows, tables[odd], query_tile, grad_tile);
      float weight[2][4], slope[2][4];  // (tokens, queries)
      rows.multiply(weight, key_tile, query_tile);
      rows.multiply(slope, value_tile, grad_tile);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i * 8 >= count - from) {  // most tiles meet no more than eight queries
          set_zero(weight[i]);
          set_zero(slope[i]);
          continue;
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) weigh(tables[odd], i * 8 + 2 * member + c, c, y, x, scale, weight[i], slope[i]);
      }
      uint32_t packed[4];
      pack<T>(packed, weight);
      rows.accumulate(value_total, packed, grad_tile, first);
      pack<T>(packed, slope);
      rows.accumulate(key_total, packed, query_tile, first);
      __syncwarp();  // before the next but one step takes this one's place
    }
    __syncthreads();  // these regions have been read
  }
  if (unit >= units) return;
  const auto store = [&](const auto& total, float factor, T* tile, const TokenView<T>& to) {
    T* start = to.image(owned.image, owned.b) + channel;
    rows.store(total, make_float2(factor, factor), tile, first, [&](int row) {
      const int token = token_of(row);
      return token < 0 ? nullptr : start + token * to.row_stride;
    });
  };
  store(key_total, a.scale, key_tile, a.grad_key);
  store(value_total, 1, value_tile, a.grad_value);
}

}  // namespace granvit::cuda
