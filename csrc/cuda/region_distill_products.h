// Four matrix products, one after another in registers: V = A_y X, D^T = A_x V^T, and for the gradient of the cells E
// Z = A_y^T E, G^T = A_x^T Z^T. mma_tf32 leaves columns 2 member, 2 member + 1 of a row to a lane; where the inner
// index of the next product is permuted so that these come as rows member, member + 4, the result is its operand as it
// is, and transposed. The permutation also moves the columns of the weights; fragment_place() does that.
#pragma once

#include <type_traits>

#include "region_distill_args.h"

namespace granvit::cuda {

// A lane's part of a 16 x 16 matrix for each of a warp's channels. [half][i]: at 8 half + 2 member + i % 2 along the
// one side and group + i / 2 * 8 along the other; the sides are (y, x) for tokens and (p, q) for cells.
using Squares = float[kWarpChannels][2][4];

__device__ __forceinline__ void set_zero(Squares& x) {
#pragma unroll
  for (int c = 0; c < kWarpChannels; ++c)
#pragma unroll
    for (int i = 0; i < 8; ++i) x[c][i / 4][i % 4] = 0;
}

// float32 is multiplied as the sum of two tf32 numbers, of which the product of the small ones is left out; with 16-bit
// data intermediate results are rounded to tf32.
template <typename T>
constexpr bool kSplit = sizeof(T) == 4;

// Matrix `index` of an item.
template <typename T>
struct Weights {
  uint32_t big[2][4];
  uint32_t small[kSplit<T> ? 2 : 1][4];

  __device__ __forceinline__ Weights(const float* weights, int index) {
    const auto* from = reinterpret_cast<const float4*>(weights) + index * kSquare / 4 + threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const float4 w = from[step * 32];
      const float values[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        big[step][i] = tf32_bits(values[i]) + 0x1000u;  // nearest_tf32 of what is finite
        if constexpr (kSplit<T>) small[step][i] = nearest_tf32(tf32_rest(values[i], big[step][i]));
      }
    }
  }
};

// Where a 16-byte chunk of a token or cell lies in a stage: moved about so that the lanes of a read, which differ in
// a / 2 and b, meet all banks.
__device__ __forceinline__ int chunk_place(int a, int b, int chunk) {
  return ((a * kSide + b) * 4 + (chunk ^ (a / 2 % 4))) * 16;
}

// A warp's channels of a token or cell, as they lie in a stage.
template <typename T>
using Four = std::conditional_t<sizeof(T) == 4, float4, uint2>;

__device__ __forceinline__ void widen_four(float4 from, float (&to)[4], float) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}
__device__ __forceinline__ void widen_four(uint2 from, float (&to)[4], __nv_bfloat16) {
  // In one instruction each, which the conversion of a pair is not.
  const uint32_t bits[4] = {from.x << 16, from.x & 0xffff0000u, from.y << 16, from.y & 0xffff0000u};
  memcpy(to, bits, sizeof(bits));
}
__device__ __forceinline__ void widen_four(uint2 from, float (&to)[4], __half) {
  __half2 pairs[2];
  memcpy(pairs, &from, sizeof(from));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 x = __half22float2(pairs[i]);
    to[2 * i] = x.x;
    to[2 * i + 1] = x.y;
  }
}

// Four channels, 8 or 16 bytes at a time.
template <typename T>
__device__ __forceinline__ void store_four(T* to, const float (&x)[4]) {
  if constexpr (sizeof(T) == 4) {
    __stwb(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
  } else {
    const auto low = Pair<T>::narrow(x[0], x[1]), high = Pair<T>::narrow(x[2], x[3]);
    uint2 bits;
    memcpy(&bits.x, &low, sizeof(bits.x));
    memcpy(&bits.y, &high, sizeof(bits.y));
    __stwb(reinterpret_cast<uint2*>(to), bits);
  }
}

// A lane's part of a stage's tokens or cells, placed as in Squares.
template <typename T>
using RawSquares = Four<T>[2][4];

template <typename T>
__device__ __forceinline__ void load_squares(const unsigned char* stage, int warp, bool both_a, bool both_b,
                                             RawSquares<T>& to) {
  constexpr int kBytes = kWarpChannels * sizeof(T);
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const unsigned char* from = stage + warp * kBytes % 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half > 0 && !both_a) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i > 1 && !both_b) break;
      const int place = chunk_place(8 * half + 2 * member + i % 2, group + i / 2 * 8, warp * kBytes / 16);
      to[half][i] = *reinterpret_cast<const Four<T>*>(from + place);
    }
  }
}

// What a product takes besides weights. 16-bit tokens are exact in tf32, and the gradient of cells was rounded to it.
// On the way to the cells float32 keeps all of its bits, which takes a third number, so that a student equal to its
// teacher has a loss of exactly zero.
enum class Operand { kTokens, kRows, kCells, kGradient };

template <typename T, Operand kOperand>
__device__ __forceinline__ void multiply_step(float (&out)[4], const Weights<T>& weights, int step,
                                              const float (&values)[2]) {
  constexpr bool kExact = kOperand == Operand::kTokens || kOperand == Operand::kCells;
  uint32_t big[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) big[j] = !kSplit<T> && kExact ? tf32_bits(values[j]) : nearest_tf32(values[j]);
  if constexpr (kSplit<T>) {
    uint32_t small[2];
    float rest[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      rest[j] = tf32_rest(values[j], big[j]);
      small[j] = nearest_tf32(rest[j]);
    }
    if constexpr (kOperand == Operand::kTokens || kOperand == Operand::kRows) {
      const uint32_t last[2] = {tf32_bits(tf32_rest(rest[0], small[0])), tf32_bits(tf32_rest(rest[1], small[1]))};
      mma_tf32(out, weights.big[step], last);
    }
    mma_tf32(out, weights.small[step], big);
    mma_tf32(out, weights.big[step], small);
  }
  mma_tf32(out, weights.big[step], big);
}

// out[c] += weights in[c]^T for every channel; the second half of the inner index and of the columns only where asked.
template <typename T, Operand kOperand>
__device__ __forceinline__ void multiply(Squares& out, const Weights<T>& weights, const Squares& in, bool both_in,
                                         bool both_out) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    if (step > 0 && !both_in) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half > 0 && !both_out) break;
#pragma unroll
      for (int c = 0; c < kWarpChannels; ++c) {
        const float values[2] = {in[c][step][2 * half], in[c][step][2 * half + 1]};
        multiply_step<T, kOperand>(out[c][half], weights, step, values);
      }
    }
  }
}

// The same for tokens as they come from a stage.
template <typename T>
__device__ __forceinline__ void multiply_tokens(Squares& out, const Weights<T>& weights, const RawSquares<T>& in,
                                                bool both_in, bool both_out) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    if (step > 0 && !both_in) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half > 0 && !both_out) break;
      float first[kWarpChannels], second[kWarpChannels];
      widen_four(in[step][2 * half], first, T());
      widen_four(in[step][2 * half + 1], second, T());
#pragma unroll
      for (int c = 0; c < kWarpChannels; ++c)
        multiply_step<T, Operand::kTokens>(out[c][half], weights, step, {first[c], second[c]});
    }
  }
}

// One half of what multiply() makes: sum[c] = that half of weights in[c]^T.
template <typename T, Operand kOperand>
__device__ __forceinline__ void multiply_half(float (&sum)[kWarpChannels][4], const Weights<T>& weights,
                                              const Squares& in, int half, bool both_in) {
#pragma unroll
  for (int i = 0; i < 4 * kWarpChannels; ++i) sum[i / 4][i % 4] = 0;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    if (step > 0 && !both_in) break;
#pragma unroll
    for (int c = 0; c < kWarpChannels; ++c)
      multiply_step<T, kOperand>(sum[c], weights, step, {in[c][step][2 * half], in[c][step][2 * half + 1]});
  }
}

// Which of the lane's places in a window, named as in Squares, are in a set of rows and columns: bit 8 half + i.
__device__ __forceinline__ unsigned lane_places(unsigned bits) {
  const unsigned y = bits >> 2 * (threadIdx.x % 4), x = bits >> (16 + threadIdx.x % 32 / 4);
  return (y & 0x303u) * ((x & 1) + (x >> 6 & 4));
}

}  // namespace granvit::cuda
