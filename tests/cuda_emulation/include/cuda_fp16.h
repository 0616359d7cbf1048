#pragma once

#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

using __half = c10::Half;
struct alignas(4) __half2 {
  __half x, y;
};
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half(float x) { return static_cast<__half>(x); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
