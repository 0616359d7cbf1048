// roi_align backward: a block owns a tile of tokens and a block of channels and collects, region by region, the cells
// that read the tile. Every token is written once and sums have a fixed order: no atomics, the same bits every time.
#pragma once

#include "roi_align_args.h"

namespace granvit::cuda {

constexpr int kTileWidth = 4;      // tokens of a row that a thread of the backward owns
constexpr int kCellChunk = 32;     // cells along an axis whose weights are prepared at a time
constexpr int kRegionChunk = 128;  // regions that are looked at at a time; a multiple of a warp

// What a block of the backward keeps of a region.
struct Reader {
  Axis axis_y;
  Axis axis_x;
  CellSpan span_y;
  CellSpan span_x;
  int64_t first_cell;
  int width;  // of its output grid
};

struct RoiAlignBackwardShared {
  float weight_x[kCellChunk][kTileWidth];  // first: read as float4
  float weight_y[kMaxRows][kCellChunk];
  Reader regions[kRegionChunk];
  int readers[kRegionChunk];  // of `regions`, in order
  int warp_counts[kRegionChunk / 32];
};

// A tile of tokens of an image, cut at the image's edges.
struct TokenTile {
  int y;
  int x;
  int end_y;
  int end_x;
};

// Of the regions at positions [first, last) of the plan's order, at most kRegionChunk, finds the readers of the tile,
// in order. Every thread of the block takes part. Returns how many.
template <typename T>
__device__ __forceinline__ int find_readers(const RoiAlignArgs<const T, T>& a, const ImageGrid& image,
                                            const TokenTile& tile, int64_t first, int64_t last,
                                            RoiAlignBackwardShared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t position = first + threadIdx.x;
  const int warps = min(static_cast<int>(blockDim.x), kRegionChunk) / 32;
  bool reads = false;
  __syncthreads();  // the readers before these have been read
  if (position < last) {
    Reader& reader = shared.regions[threadIdx.x];
    const int64_t r = a.order[position];
    const Region region = a.regions[r];
    const auto out = a.outputs[r];
    reader.axis_y = make_axis(region.y0, region.y1, out.height, image.height, a.sampling_ratio);
    reader.axis_x = make_axis(region.x0, region.x1, out.width, image.width, a.sampling_ratio);
    const CellSpan y = cells_reading(reader.axis_y, tile.y, tile.end_y);
    const CellSpan x = cells_reading(reader.axis_x, tile.x, tile.end_x);
    reader.span_y = y;
    reader.span_x = x;
    reader.first_cell = out.first_cell;
    reader.width = out.width;
    reads = y.begin < y.end && x.begin < x.end;
  }
  const unsigned ballot = __ballot_sync(0xffffffffu, reads);
  if (lane == 0 && warp < warps) shared.warp_counts[warp] = __popc(ballot);
  __syncthreads();
  int before = 0, count = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) before += shared.warp_counts[w];
    count += shared.warp_counts[w];
  }
  if (reads) shared.readers[before + __popc(ballot & ((1u << lane) - 1))] = threadIdx.x;
  __syncthreads();
  return count;
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kMaxThreads, 1) roi_align_backward_kernel(RoiAlignArgs<const T, T> a) {
  auto& shared = *reinterpret_cast<RoiAlignBackwardShared*>(shared_memory());
  const int row = threadIdx.x / a.shape.lanes, lane = threadIdx.x % a.shape.lanes;
  const Tile shape{a.shape.rows, kTileWidth};
  int64_t b, t;
  if (a.tile_start == nullptr) {
    const int64_t tiles = shape.count(a.images.height, a.images.width);
    b = blockIdx.x / tiles;
    t = blockIdx.x % tiles;
  } else {
    // Where the grids are on the device, there are more blocks than tiles.
    if (blockIdx.x >= a.tile_start[a.images.count]) return;
    b = find_segment(a.tile_start, a.images.count, blockIdx.x);
    t = blockIdx.x - a.tile_start[b];
  }
  const ImageGrid image = a.images[b];
  if (image.width == 0) return;
  const int tiles_x = (image.width + kTileWidth - 1) / kTileWidth;
  TokenTile tile{static_cast<int>(t / tiles_x) * shape.height, static_cast<int>(t % tiles_x) * kTileWidth, 0, 0};
  tile.end_y = min(tile.y + shape.height, image.height);
  tile.end_x = min(tile.x + kTileWidth, image.width);
  const int y = tile.y + row;
  const int64_t channel = (static_cast<int64_t>(blockIdx.y) * a.shape.lanes + lane) * kVec;
  const bool owner = row < shape.height && y < tile.end_y && channel < a.channels;

  float sum[kTileWidth][kVec];
#pragma unroll
  for (int c = 0; c < kTileWidth; ++c) set_zero(sum[c]);
  const int64_t end = a.region_start[b + 1];
  const int chunk = min(static_cast<int>(blockDim.x), kRegionChunk);
  for (int64_t first = a.region_start[b]; first < end; first += chunk) {
    const int readers = find_readers(a, image, tile, first, min(first + chunk, end), shared);
    for (int i = 0; i < readers; ++i) {
      const Reader& reader = shared.regions[shared.readers[i]];
      for (int p0 = reader.span_y.begin; p0 < reader.span_y.end; p0 += kCellChunk) {
        const int cells_y = min(kCellChunk, reader.span_y.end - p0);
        for (int q0 = reader.span_x.begin; q0 < reader.span_x.end; q0 += kCellChunk) {
          const int cells_x = min(kCellChunk, reader.span_x.end - q0);
          __syncthreads();
          for (int j = threadIdx.x; j < cells_x * kTileWidth; j += blockDim.x)
            shared.weight_x[j / kTileWidth][j % kTileWidth] =
                reader.axis_x.weight(q0 + j / kTileWidth, tile.x + j % kTileWidth);
          for (int j = threadIdx.x; j < cells_y * shape.height; j += blockDim.x)
            shared.weight_y[j / cells_y][j % cells_y] = reader.axis_y.weight(p0 + j % cells_y, tile.y + j / cells_y);
          __syncthreads();
          if (!owner) continue;
          const float* weight_y = shared.weight_y[row];
          int p_begin = 0, p_end = cells_y;
          while (p_begin < p_end && weight_y[p_begin] == 0) ++p_begin;
          while (p_begin < p_end && weight_y[p_end - 1] == 0) --p_end;
          if (p_begin == p_end) continue;
          const T* from =
              a.cells + (reader.first_cell + static_cast<int64_t>(p0) * reader.width + q0) * a.channels + channel;
          const int64_t line = reader.width * a.channels;
          for (int q = 0; q < cells_x; ++q) {
            const float4 w = *reinterpret_cast<const float4*>(shared.weight_x[q]);
            if (w.x == 0 && w.y == 0 && w.z == 0 && w.w == 0) continue;
            float blended[kVec];
            set_zero(blended);
#pragma unroll 2
            for (int p = p_begin; p < p_end; ++p) {
              float grad[kVec];
              load(from + p * line + q * a.channels, grad);
              add(blended, weight_y[p], grad);
            }
            add(sum[0], w.x, blended);
            add(sum[1], w.y, blended);
            add(sum[2], w.z, blended);
            add(sum[3], w.w, blended);
          }
        }
      }
    }
  }
  if (!owner) return;
  T* to = a.tokens.image(image, b) + (static_cast<int64_t>(y) * image.width + tile.x) * a.tokens.row_stride + channel;
#pragma unroll
  for (int c = 0; c < kTileWidth; ++c)
    if (tile.x + c < tile.end_x) store(to + c * a.tokens.row_stride, sum[c]);
}

}  // namespace granvit::cuda
