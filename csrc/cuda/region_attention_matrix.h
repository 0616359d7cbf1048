// What the kernels of region_attention with matrix units share. A warp works alone: it owns a head (or a slice of a
// wide one) and keeps tiles of 16 rows in its own part of shared memory. Rows are tokens or queries; scores are tiles
// of 16 x 16. Single queries take this path too: padded to 16 they still cost fewer instructions than multiplying one
// by one, because nothing has to be widened or summed over lanes.
#pragma once

#include "mma.h"
#include "region_attention_args.h"

namespace granvit::cuda {

constexpr int kSide = 16;        // rows of a tile
constexpr int kChannels = 8;     // of a product's tile, and of a 16-byte access
constexpr int kSliceTiles = 8;   // of kChannels, where the compiler does not know the dim
constexpr int kMatrixWarps = 4;  // of a block, at most
constexpr unsigned kAll = 0xffffffffu;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
static_assert(kTokens == kSide, "regions are cut into parts of whole tiles");

// Without the number of warps, which depends on the kernel.
inline MatrixShape matrix_shape(int64_t queries, int dim, bool known_dim) {
  const int tiles = dim / kChannels, slices = known_dim ? 1 : (tiles + kSliceTiles - 1) / kSliceTiles;
  return {slices,
          (tiles + slices - 1) / slices,
          (tiles | 1) * kChannels,
          0,
          1,
          static_cast<int>((queries + kSide - 1) / kSide)};
}

// Warps of a block, each of which needs `warp_bytes` of shared memory.
inline int matrix_warps(size_t warp_bytes) {
  constexpr size_t kBlockBytes = 74 << 10;  // three fit a multiprocessor of sm_90
  return static_cast<int>(std::clamp<size_t>(kBlockBytes / warp_bytes, 1, kMatrixWarps));
}

// A head's channels as a kernel sees them: constants where kDim is not 0. A row takes an odd number of 16-byte pieces
// in shared memory, so that eight rows of a matrix lie in different banks.
template <typename T, int kDim>
struct HeadRows {
  static constexpr int kTiles = kDim > 0 ? kDim / kChannels : kSliceTiles;  // of a slice, at most
  int run_time_dim;
  MatrixShape shape;

  __device__ __forceinline__ explicit HeadRows(const RegionAttentionArgs<T>& a)
      : run_time_dim(a.dim), shape(a.matrix) {}

  __device__ __forceinline__ int dim() const { return kDim > 0 ? kDim : run_time_dim; }
  __device__ __forceinline__ int pieces() const { return dim() / kChannels; }
  __device__ __forceinline__ int pitch() const { return kDim > 0 ? (kDim / kChannels | 1) * kChannels : shape.pitch; }
  __device__ __forceinline__ int slices() const { return kDim > 0 ? 1 : shape.slices; }
  // Of the slice that starts at piece `first`.
  __device__ __forceinline__ int tiles(int first) const {
    return kDim > 0 ? kTiles : min(shape.tiles, pieces() - first);
  }
  __device__ __forceinline__ int tile_elements() const { return kSide * pitch(); }

  // Calls visit(element of the tile, row, channel) for every 16-byte piece of a tile, lanes side by side in memory. All
  // lanes take part in every call, those that are left over with a negative element.
  template <typename Visit>
  __device__ __forceinline__ void for_each_piece(const Visit& visit) const {
    const int lane = threadIdx.x % 32;
    if constexpr (kDim > 0) {
      // Rows of eight pieces and perhaps a ninth: no divisions.
      static_assert(kDim % 64 == 0 || kDim % 64 == 8);
#pragma unroll
      for (int column = 0; column + 64 <= kDim; column += 64)
#pragma unroll
        for (int first = 0; first < kSide; first += 4) {
          const int row = first + lane / 8, channel = column + lane % 8 * kChannels;
          visit(row * pitch() + channel, row, channel);
        }
      if constexpr (kDim % 64 == 8) {
        const int row = lane % kSide, channel = kDim - kChannels;
        visit(lane < kSide ? row * pitch() + channel : -1, row, channel);
      }
    } else {
      const int count = kSide * pieces();
      for (int first = 0; first < count; first += 32) {
        const int i = first + lane, row = i / pieces() % kSide, channel = i % pieces() * kChannels;
        visit(i < count ? row * pitch() + channel : -1, row, channel);
      }
    }
  }

  // product = a b^T for tiles of rows: rows group, group + 8 of a; columns 2 member, + 1 of the first and last eight
  // rows of b. Every sum runs over the channels in the same order.
  __device__ __forceinline__ void multiply(float (&product)[2][4], const T* a, const T* b) const {
    const int lane = threadIdx.x % 32;
    const T* from_a = a + lane % 16 * pitch() + lane / 16 * 8;
    const T* from_b = b + (lane / 16 * 8 + lane % 8) * pitch() + lane / 8 % 2 * 8;
    set_zero(product[0]);
    set_zero(product[1]);
    uint32_t x[4], y[4];
#pragma unroll
    for (int k = 0; k + 16 <= dim(); k += 16) {
      load_matrices(x, from_a + k);
      load_matrices(y, from_b + k);
      mma(product[0], x, {y[0], y[1]}, T());
      mma(product[1], x, {y[2], y[3]}, T());
    }
    if (dim() % 16 != 0) {
      const int last = lane % 16 * pitch() + dim() - 8;
      load_matrices(x, a + last);
      load_matrices(y, b + last);
      mma_8(product[0], {x[0], x[1]}, y[0], T());
      mma_8(product[1], {x[0], x[1]}, y[1], T());
    }
  }

  // total += weights rows, for the slice's channels of a tile of rows; weights (16, 16) as pack() makes them.
  __device__ __forceinline__ void accumulate(float (&total)[kTiles][4], const uint32_t (&weights)[4], const T* rows,
                                             int first) const {
    const int lane = threadIdx.x % 32, count = tiles(first);
    const T* from = rows + lane % 16 * pitch() + first * kChannels;
    uint32_t y[4];
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
      if (i >= count) continue;
      const bool two = i + 1 < kTiles && i + 1 < count;
      load_matrices_transposed(y, from + (i + (two ? lane / 16 : 0)) * kChannels);
      mma(total[i], weights, {y[0], y[1]}, T());
      if (i + 1 < kTiles && two) mma(total[i + 1 < kTiles ? i + 1 : i], weights, {y[2], y[3]}, T());
    }
  }

  // Writes the slice's channels of totals, times a factor for rows group and group + 8, through `tile` in shared
  // memory: to(row) is where a row's first channel goes, or null. All lanes are done with `tile`.
  template <typename To>
  __device__ __forceinline__ void store(const float (&total)[kTiles][4], float2 factor, T* tile, int first,
                                        const To& to) const {
    const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4, count = tiles(first);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i >= count) continue;
      T* at = tile + group * pitch() + (first + i) * kChannels + 2 * member;
      put(at, total[i][0] * factor.x, total[i][1] * factor.x);
      put(at + 8 * pitch(), total[i][2] * factor.y, total[i][3] * factor.y);
    }
    __syncwarp();
    const int begin = first * kChannels, end = begin + count * kChannels;
    for_each_piece([&](int at, int row, int channel) {
      T* start = to(row);
      if (at >= 0 && start != nullptr && channel >= begin && channel < end)
        __stwb(reinterpret_cast<uint4*>(start + channel), *reinterpret_cast<const uint4*>(tile + at));
    });
  }

  static __device__ __forceinline__ void put(T* to, float x, float y) {
    const auto pair = Pair<T>::narrow(x, y);
    memcpy(to, &pair, sizeof(pair));
  }
};

template <typename T, int kDim>
constexpr int kHeadTiles = HeadRows<T, kDim>::kTiles;

// A product's tile, rounded, as the left side of the next product.
template <typename T>
__device__ __forceinline__ void pack(uint32_t (&packed)[4], const float (&x)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto pair = Pair<T>::narrow(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
    memcpy(&packed[i], &pair, sizeof(pair));
  }
}

template <int kTiles>
__device__ __forceinline__ void set_zero(float (&total)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) set_zero(total[i]);
}

// One instruction: without the care that exp2f takes of results that are no normal numbers. 2^-inf is 0.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// Over the four lanes that share rows of a product.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAll, x, 1);
  return x + __shfl_xor_sync(kAll, x, 2);
}

// Keys or values of one head. Bytes from one token to the next in 32 bits, so that an address takes one instruction.
template <typename T>
struct HeadTokens {
  const T* first;
  int stride;

  __device__ __forceinline__ HeadTokens(const TokenView<const T>& tokens, const ImageGrid& image, int64_t b,
                                        int64_t channel)
      : first(tokens.image(image, b) + channel), stride(static_cast<int>(tokens.row_stride * sizeof(T))) {}
  __device__ __forceinline__ const T* at(int token, int channel) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(first + channel) +
                                      static_cast<int64_t>(token) * stride);
  }
};

// Begins to copy rows of queries, of which there are `count`.
template <typename T, int kDim>
__device__ __forceinline__ void copy_queries(const HeadRows<T, kDim>& rows, T* to, const T* from, int64_t stride,
                                             int count) {
  rows.for_each_piece([&](int at, int row, int channel) {
    if (at >= 0) copy_async(to + at, from + (row < count ? row * stride : 0) + channel, row < count);
  });
}

}  // namespace granvit::cuda
