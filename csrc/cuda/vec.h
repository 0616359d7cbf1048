// Token dtypes on the device: reads into float registers and rounded writes, 16 bytes at a time where memory allows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace granvit::cuda {

template <typename T>
constexpr int kWide = 16 / sizeof(T);  // elements of one 16-byte access

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half(x);
}

// Two elements of a 16-bit type as one register.
template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ float2 widen(Type x) { return __bfloat1622float2(x); }
  static __device__ __forceinline__ Type narrow(float x, float y) { return __floats2bfloat162_rn(x, y); }
};
template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ __forceinline__ float2 widen(Type x) { return __half22float2(x); }
  static __device__ __forceinline__ Type narrow(float x, float y) { return __floats2half2_rn(x, y); }
};

// kVec is kWide<T>, for addresses that are multiples of 16 bytes, or 1.
template <typename T, int kVec>
__device__ __forceinline__ void load(const T* from, float (&to)[kVec]) {
  static_assert(kVec == 1 || kVec == kWide<T>);
  if constexpr (kVec == 1) {
    to[0] = widen(*from);
  } else {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    if constexpr (sizeof(T) == 4) {
      memcpy(to, &bits, sizeof(bits));
    } else {
      typename Pair<T>::Type pairs[kVec / 2];
      memcpy(pairs, &bits, sizeof(bits));
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        const float2 pair = Pair<T>::widen(pairs[i]);
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
      }
    }
  }
}

template <typename T, int kVec>
__device__ __forceinline__ void store(T* to, const float (&from)[kVec]) {
  static_assert(kVec == 1 || kVec == kWide<T>);
  if constexpr (kVec == 1) {
    *to = narrow<T>(from[0]);
  } else {
    // An intrinsic, because the compiler takes assignments of uint4 apart and does not always join them again.
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        memcpy(&words[i], &from[i], sizeof(unsigned));
      } else {
        const auto pair = Pair<T>::narrow(from[2 * i], from[2 * i + 1]);
        memcpy(&words[i], &pair, sizeof(unsigned));
      }
    }
    __stwb(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// Unrounded; 16 bytes at a time where kVec allows.
template <int kVec>
__device__ __forceinline__ void store_floats(float* to, const float (&from)[kVec]) {
  if constexpr (kVec % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kVec; i += 4)
      __stwb(reinterpret_cast<float4*>(to + i), make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]));
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) to[i] = from[i];
  }
}

template <int kVec>
__device__ __forceinline__ void set_zero(float (&x)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] = 0;
}

// sum += factor * x
template <int kVec>
__device__ __forceinline__ void add(float (&sum)[kVec], float factor, const float (&x)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] += factor * x[i];
}

}  // namespace granvit::cuda
