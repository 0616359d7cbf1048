// Elementary functions on whole vectors.
#pragma once

#include <cmath>

#include "vec.h"

namespace granvit::cpu::GRANVIT_ISA {

// exp within one unit in the last place, gradual underflow included: exp(x) = 2^n * exp(r), |r| <= ln(2) / 2. The
// polynomial of degree 6 is a minimax fit of exp on that interval (relative error 3e-9).
GRANVIT_INLINE f32x16 exp(f32x16 x) {
  x = x < -104.0f ? splat(-104.0f) : x;  // exp is 0 below, infinite above; NaN passes both comparisons
  x = x > 89.0f ? splat(89.0f) : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const f32x16 shifted = x * 1.44269504088896341f + kRound;
  const f32x16 n = shifted - kRound;
  const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts, the first exact in products
  f32x16 p = r * 0.00138145394f + 0.00836874545f;
  p = p * r + 0.0416683890f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
  i32x16 exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent -= 0x4b400000;             // the bits of kRound
  const i32x16 half = exponent >> 1;  // 2^n in two factors, since n reaches beyond the range of normal numbers
  const i32x16 low_bits = (half + 127) << 23, high_bits = (exponent - half + 127) << 23;
  f32x16 low, high;
  std::memcpy(&low, &low_bits, sizeof low);
  std::memcpy(&high, &high_bits, sizeof high);
  return p * low * high;
}

GRANVIT_INLINE f64x8 exp(f64x8 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <typename A>
GRANVIT_INLINE A max_lanes(Vec<A> x) {
  A lane[kLanes<A>];
  std::memcpy(lane, &x, sizeof x);
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

}  // namespace granvit::cpu::GRANVIT_ISA
