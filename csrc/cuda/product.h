// Tiled products of matrices: sum(row, column) = sum over k of a(row, k) b(column, k), in float32, in a fixed order.
// 16-bit operands go through the matrix units, float32 ones through plain multiply-adds, because all their bits are
// wanted. Tiles of the operands arrive by asynchronous copies, several steps ahead of their use.
#pragma once

#include "epilogue.h"
#include "launch.h"
#include "mma.h"

namespace granvit::cuda {

constexpr int kProductThreads = kEpilogueThreads;
constexpr int kGroupedRows = 8;  // row blocks that are worked on together, so that they share operands in the cache

// How a block goes about its part of a product. Four warps; kSlices of them share a tile and split each step's depth.
template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kSlices_, int kDepthBytes_, int kStages_,
          int kBlocks_>
struct ProductTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kSlices = kSlices_, kDepthBytes = kDepthBytes_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // of a multiprocessor, at least
  static constexpr int kStageBytes = (kRows + kColumns) * kDepthBytes;
  static constexpr int kPitch = kColumns + 8;  // of the sums in shared memory, so that a warp's writes do not collide
  static constexpr int kSumBytes = kSlices * kRows * kPitch * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static_assert((kRows / kWarpRows) * (kColumns / kWarpColumns) * kSlices * 32 == kProductThreads);
};

// A matrix in memory whose lines are contiguous.
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;  // between lines
  int lines;
  int columns;
  bool wide;  // whether lines can be read 16 bytes at a time
};

// A tile of lines in shared memory. 16-byte chunks are permuted within a line (or within the 128 bytes that several
// lines fill), so that eight lines' chunks of one column lie in different banks.
template <typename T, int kLines, int kColumns>
struct SharedTile {
  static constexpr int kPerChunk = 16 / sizeof(T);
  static constexpr int kChunks = kColumns / kPerChunk;
  static constexpr int kLinesAtOnce = kProductThreads / kChunks;
  static_assert(kColumns % kPerChunk == 0 && kChunks >= 4 && (kChunks & (kChunks - 1)) == 0);
  static_assert(kProductThreads % kChunks == 0 && kLines % kLinesAtOnce == 0);

  static __device__ __forceinline__ int chunk_place(int line, int chunk) {
    const int turn = kChunks >= 8 ? line & 7 : line / 2 & 3;
    return (line * kChunks + (chunk ^ turn)) * kPerChunk;
  }
  static __device__ __forceinline__ int place(int line, int column) {
    return chunk_place(line, column / kPerChunk) + column % kPerChunk;
  }

  // Starts copies of the tile at (first_line, first_column); zeros beyond the matrix.
  static __device__ __forceinline__ void load(T* to, const Matrix<T>& from, int first_line, int first_column) {
    const int chunk = threadIdx.x % kChunks, line = threadIdx.x / kChunks;
    const int column = first_column + chunk * kPerChunk;
    const T* row = from.data + static_cast<int64_t>(first_line + line) * from.stride + column;
    if (from.wide) {
#pragma unroll
      for (int i = 0; i < kLines; i += kLinesAtOnce) {
        const bool keep = first_line + line + i < from.lines && column < from.columns;
        copy_async(to + chunk_place(line + i, chunk), keep ? row : from.data, keep);
        row += kLinesAtOnce * from.stride;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kLines; i += kLinesAtOnce) {
        const bool inside = first_line + line + i < from.lines;
        T* const place = to + chunk_place(line + i, chunk);
        for (int e = 0; e < kPerChunk; ++e) place[e] = inside && column + e < from.columns ? row[e] : narrow<T>(0);
        row += kLinesAtOnce * from.stride;
      }
    }
  }
};

// An operand of a product: kInner where its lines run along the inner dimension; else they run along the outer one.
template <typename T, bool kInner, int kOuter, int kDepth>
struct ProductOperand {
  using Tile = std::conditional_t<kInner, SharedTile<T, kOuter, kDepth>, SharedTile<T, kDepth, kOuter>>;

  static __device__ __forceinline__ void load(T* to, const Matrix<T>& from, int outer, int inner) {
    if constexpr (kInner)
      Tile::load(to, from, outer, inner);
    else
      Tile::load(to, from, inner, outer);
  }

  // Fragments of 16 x 16 elements: to[0], to[1] are outer 0 to 7 and 8 to 15 of inner 0 to 7, then the same of inner 8
  // to 15; with kAcross the second and the third change places.
  template <bool kAcross>
  static __device__ __forceinline__ void fragments(uint32_t (&to)[4], const T* tile, int outer, int inner) {
    const int lane = threadIdx.x % 32, far = lane / 16 * 8, near = lane / 8 % 2 * 8;
    const int o = outer + (kAcross ? far : near), i = inner + (kAcross ? near : far);
    if constexpr (kInner)
      load_matrices(to, tile + Tile::place(o + lane % 8, i));
    else
      load_matrices_transposed(to, tile + Tile::place(i + lane % 8, o));
  }

  // Four neighbours along the inner dimension.
  static __device__ __forceinline__ void quad(float (&to)[4], const T* tile, int outer, int inner) {
    if constexpr (kInner) {
      const float4 four = *reinterpret_cast<const float4*>(tile + Tile::place(outer, inner));
      to[0] = four.x;
      to[1] = four.y;
      to[2] = four.z;
      to[3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = tile[Tile::place(inner + i, outer)];
    }
  }
};

// The sums of one warp, in registers.
template <typename T, typename Tile, bool kInnerA, bool kInnerB>
struct WarpProduct {
  static constexpr int kDepth = Tile::kDepthBytes / sizeof(T);
  static constexpr int kOwnDepth = kDepth / Tile::kSlices;
  using A = ProductOperand<T, kInnerA, Tile::kRows, kDepth>;
  using B = ProductOperand<T, kInnerB, Tile::kColumns, kDepth>;
  // Matrix units take 16 x 8 sums a warp; without them lanes are 4 x 8.
  static constexpr bool kUnits = sizeof(T) == 2;
  static constexpr int kDown = Tile::kWarpRows / (kUnits ? 16 : 4), kRight = Tile::kWarpColumns / 8;
  static constexpr int kSums = kUnits ? 4 : 1;

  float sum[kDown][kRight][kSums];
  int row, column, slice;  // of the warp in the tile

  __device__ __forceinline__ WarpProduct() {
    constexpr int kAcross = Tile::kColumns / Tile::kWarpColumns, kWarps = kAcross * (Tile::kRows / Tile::kWarpRows);
    const int warp = threadIdx.x / 32;
    slice = warp / kWarps;
    row = warp % kWarps / kAcross * Tile::kWarpRows;
    column = warp % kAcross * Tile::kWarpColumns;
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kRight; ++j) set_zero(sum[i][j]);
  }

  // Adds one step's products.
  __device__ __forceinline__ void add(const T* a, const T* b) {
    if constexpr (kUnits) {
#pragma unroll
      for (int k = 0; k < kOwnDepth; k += 16) {
        const int inner = slice * kOwnDepth + k;
        uint32_t left[kDown][4], right[kRight / 2][4];
#pragma unroll
        for (int i = 0; i < kDown; ++i) A::template fragments<false>(left[i], a, row + 16 * i, inner);
#pragma unroll
        for (int j = 0; j < kRight / 2; ++j) B::template fragments<true>(right[j], b, column + 16 * j, inner);
#pragma unroll
        for (int i = 0; i < kDown; ++i)
#pragma unroll
          for (int j = 0; j < kRight; ++j)
            mma(sum[i][j], left[i], {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]}, T());
      }
    } else {
      const int down = threadIdx.x % 32 / 8, across = threadIdx.x % 8;
      // A step's products on their own first: rounding errors grow with the number of terms of a sum.
      float part[kDown][kRight];
#pragma unroll
      for (int i = 0; i < kDown; ++i) set_zero(part[i]);
#pragma unroll 1
      for (int k = 0; k < kOwnDepth; k += 4) {
        const int inner = slice * kOwnDepth + k;
        float right[kRight][4];
#pragma unroll
        for (int j = 0; j < kRight; ++j) B::quad(right[j], b, column + across + 8 * j, inner);
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          float left[4];
          A::quad(left, a, row + down + 4 * i, inner);
#pragma unroll
          for (int j = 0; j < kRight; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) part[i][j] += left[e] * right[j][e];
        }
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int j = 0; j < kRight; ++j) sum[i][j][0] += part[i][j];
    }
  }

  __device__ __forceinline__ void write(float* sums) const {
    float* const own = sums + (slice * Tile::kRows + row) * Tile::kPitch + column;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kRight; ++j) {
        if constexpr (kUnits) {
          float* const to = own + (16 * i + lane / 4) * Tile::kPitch + 8 * j + lane % 4 * 2;
          *reinterpret_cast<float2*>(to) = make_float2(sum[i][j][0], sum[i][j][1]);
          *reinterpret_cast<float2*>(to + 8 * Tile::kPitch) = make_float2(sum[i][j][2], sum[i][j][3]);
        } else {
          own[(4 * i + lane / 8) * Tile::kPitch + 8 * j + lane % 8] = sum[i][j][0];
        }
      }
  }
};

template <typename T>
struct ProductArgs {
  Matrix<T> a;
  Matrix<T> b;
  int rows;
  int columns;
  int depth;
};

// Block of rows and block of columns of this block's tile.
struct TilePlace {
  int row_block;
  int column_block;
};
__device__ __forceinline__ TilePlace tile_place(int row_blocks, int column_blocks) {
  const int tile = blockIdx.x, group = tile / (kGroupedRows * column_blocks);
  const int size = min(row_blocks - kGroupedRows * group, kGroupedRows);
  const int within = tile - group * kGroupedRows * column_blocks;
  return {kGroupedRows * group + within % size, within / size};
}

template <typename T, typename Tile, bool kInnerA, bool kInnerB, typename Epilogue>
__global__ void __launch_bounds__(kProductThreads, Tile::kBlocks)
    box_embedding_product_kernel(ProductArgs<T> args, Epilogue epilogue) {
  using Product = WarpProduct<T, Tile, kInnerA, kInnerB>;
  constexpr int kDepth = Product::kDepth;
  const TilePlace place =
      tile_place((args.rows + Tile::kRows - 1) / Tile::kRows, (args.columns + Tile::kColumns - 1) / Tile::kColumns);
  const int first_row = place.row_block * Tile::kRows, first_column = place.column_block * Tile::kColumns;
  const int steps = (args.depth + kDepth - 1) / kDepth;
  const auto stage = [](int step) {
    return reinterpret_cast<T*>(shared_memory() + step % Tile::kStages * Tile::kStageBytes);
  };
  const auto load = [&](int step) {
    if (step < steps) {
      T* const to = stage(step);
      Product::A::load(to, args.a, first_row, step * kDepth);
      Product::B::load(to + Tile::kRows * kDepth, args.b, first_column, step * kDepth);
    }
    commit_copies();
  };
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
  Product product;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<Tile::kStages - 2>();
    __syncthreads();  // this step's tiles have arrived, and those of the step before have been read
    load(step + Tile::kStages - 1);
    const T* const tiles = stage(step);
    product.add(tiles, tiles + Tile::kRows * kDepth);
  }
  wait_for_copies<0>();
  __syncthreads();
  auto* const sums = reinterpret_cast<float*>(shared_memory());
  product.write(sums);
  __syncthreads();

  apply_epilogue<Tile::kRows, Tile::kColumns>(
      epilogue, {place.row_block, args.rows, first_column, args.columns}, sums,
      [&](int r, int own, int, float (&x)[kEpilogueVec]) {
        set_zero(x);
#pragma unroll
        for (int s = 0; s < Tile::kSlices; ++s) {
          const auto* from = reinterpret_cast<const float4*>(sums + (s * Tile::kRows + r) * Tile::kPitch + own);
#pragma unroll
          for (int i = 0; i < kEpilogueVec; i += 4) {
            const float4 part = from[i / 4];
            x[i] += part.x;
            x[i + 1] += part.y;
            x[i + 2] += part.z;
            x[i + 3] += part.w;
          }
        }
      });
}

}  // namespace granvit::cuda
