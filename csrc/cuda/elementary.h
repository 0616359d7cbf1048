// Sine, cosine and the normal distribution in float32; the polynomials for float32 results are those of
// csrc/cpu/elementary.h.
#pragma once

#include <cuda_runtime.h>

namespace granvit::cuda {

struct SineCosine {
  float sine;
  float cosine;
};

// Of 2 pi times `turns`, however many they are.
__device__ __forceinline__ SineCosine sine_cosine(double turns) {
  // Whole turns go in double, where that is exact; what is left fits float. The addition rounds to an integer.
  constexpr double kRound = 6755399441055744.0;
  const double whole = (turns + kRound) - kRound;
  const auto rest = static_cast<float>(turns - whole);
  const float quarters = rintf(rest * 4.0f);
  const float f = rest - 0.25f * quarters;  // at most an eighth of a turn either way
  const auto count = static_cast<int>(quarters);
  const float z = f * f;
  const float s = f * ((((41.4698894f * z - 76.69777412f) * z + 81.60520381f) * z - 41.34170215f) * z + 6.283185307f);
  const float c = (((59.20279606f * z - 85.44229797f) * z + 64.93931074f) * z - 19.73920863f) * z + 1.0f;
  const float sine = count & 1 ? c : s, cosine = count & 1 ? s : c;
  return {count & 2 ? -sine : sine, (count + 1) & 2 ? -cosine : cosine};
}

struct Normal {
  float cdf;
  float density;
};

// Of the standard normal distribution at x: GELU(x) = x * cdf, and its derivative is cdf + x * density. The tail is
// exp(-x^2 / 2) times a smooth function of |x|: a small relative error where 1 + erf cancels.
__device__ __forceinline__ Normal normal(float x) {
  const float e = exp2f(x * x * -0.72134752044f);
  const float s = 1.0f - 6.0f / (fabsf(x) + 3.0f);
  float p = 5.36718683e-05f * s + 1.1554377e-04f;
  p = p * s - 3.39484886e-04f;
  p = p * s - 9.83758452e-04f;
  p = p * s + 2.90455617e-03f;
  p = p * s + 6.13207067e-03f;
  p = p * s - 4.6213291e-02f;
  p = p * s + 0.123225031f;
  p = p * s - 0.206402619f;
  p = p * s + 0.121513948f;
  const float tail = e * p;
  return {x < 0 ? tail : 1.0f - tail, 0.3989422804f * e};
}

#ifdef __CUDACC__
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
inline float fast_exp2(float x) { return exp2f(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
#endif

// In half as many instructions, to 14 bits of the tail: enough for results of 11 bits and less.
__device__ __forceinline__ Normal normal_for_16_bits(float x) {
  const float e = fast_exp2(x * x * -0.72134752044f);
  const float t = fast_reciprocal(0.39f * fabsf(x) + 1.0f);
  float p = -0.0872328505f * t + 0.165150121f;
  p = p * t + 0.10805247f;
  p = p * t + 0.158528805f;
  p = p * t + 0.15547137f;
  const float tail = e * (p * t);
  return {x < 0 ? tail : 1.0f - tail, 0.3989422804f * e};
}

template <typename T>
__device__ __forceinline__ Normal normal_for(float x) {
  if constexpr (sizeof(T) == 2)
    return normal_for_16_bits(x);
  else
    return normal(x);
}

}  // namespace granvit::cuda
