// Sine, cosine and the normal distribution on vectors. The float32 polynomials are minimax fits made for this file.
#pragma once

#include <cmath>

#include "units.h"

namespace granvit::cpu::GRANVIT_ISA {

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

template <typename V, typename Mask>
GRANVIT_INLINE V select(Mask mask, V yes, V no) {
  Mask yes_bits, no_bits;
  std::memcpy(&yes_bits, &yes, sizeof yes);
  std::memcpy(&no_bits, &no, sizeof no);
  const Mask bits = (mask & yes_bits) | (~mask & no_bits);
  V x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Nearest integer of |x| < 2^51 (2^22 in float32), by letting an addition round.
GRANVIT_INLINE f64x8 round_to_integer(f64x8 x) { return (x + 6755399441055744.0) - 6755399441055744.0; }
GRANVIT_INLINE Register<float> round_to_integer(Register<float> x) { return (x + 12582912.0f) - 12582912.0f; }

template <typename A>
struct SineCosine {
  Vec<A> sine;
  Vec<A> cosine;
};

// Whole quarter turns in an angle, modulo 4, and what remains of it: at most an eighth of a turn either way.
struct QuarterTurns {
  i64x8 count;
  f64x8 rest;
};

GRANVIT_INLINE QuarterTurns quarter_turns(f64x8 turns) {
  // Beyond 2^48 turns a double is whole quarters or too coarse to say.
  const f64x8 quarters = round_to_integer(select(i64x8(turns * turns < 0x1p96), turns, turns * 0.0) * 4.0);
  const f64x8 modulo = quarters - 4.0 * round_to_integer(quarters * 0.25);
  const i64x8 far = i64x8(turns * turns >= 0x1p96);
  return {__builtin_convertvector(modulo, i64x8) & 3, select(far, turns * 0.0, turns - 0.25 * quarters)};
}

// sin and cos of 2 pi * turns. The reduction to an eighth of a turn is exact, so float32 results are right to about one
// ulp however many turns there are.
GRANVIT_INLINE void sine_cosine(const f64x8* turns, SineCosine<float>* out) {
  f32x16 f;
  i32x16 count;
  for (int half = 0; half < 2; ++half) {
    const QuarterTurns reduced = quarter_turns(turns[half]);
    const f32x8 rest = __builtin_convertvector(reduced.rest, f32x8);
    const i32x8 quarters = __builtin_convertvector(reduced.count, i32x8);
    std::memcpy(reinterpret_cast<char*>(&f) + half * sizeof rest, &rest, sizeof rest);
    std::memcpy(reinterpret_cast<char*>(&count) + half * sizeof quarters, &quarters, sizeof quarters);
  }
  const f32x16 z = f * f;
  const f32x16 s = f * ((((41.4698894f * z - 76.69777412f) * z + 81.60520381f) * z - 41.34170215f) * z + 6.283185307f);
  const f32x16 c = (((59.20279606f * z - 85.44229797f) * z + 64.93931074f) * z - 19.73920863f) * z + 1.0f;
  const i32x16 odd = (count & 1) != 0;
  const f32x16 sine = select(odd, c, s), cosine = select(odd, s, c);
  out->sine = select(i32x16((count & 2) != 0), -sine, sine);
  out->cosine = select(i32x16(((count + 1) & 2) != 0), -cosine, cosine);
}

GRANVIT_INLINE void sine_cosine(const f64x8* turns, SineCosine<double>* out) {
  const QuarterTurns reduced = quarter_turns(*turns);
  for (int i = 0; i < 8; ++i) {
    const double angle = 6.283185307179586476925 * reduced.rest[i];
    const double s = std::sin(angle), c = std::cos(angle);
    const int64_t quarter = reduced.count[i];
    const double sine = (quarter & 1) != 0 ? c : s, cosine = (quarter & 1) != 0 ? s : c;
    out->sine[i] = (quarter & 2) != 0 ? -sine : sine;
    out->cosine[i] = ((quarter + 1) & 2) != 0 ? -cosine : cosine;
  }
}

// Distribution function and density of the standard normal distribution: GELU(x) = x * cdf and its derivative is
// cdf + x * density.
template <typename A>
struct Normal {
  Register<A> cdf;
  Register<A> density;
};

// The tail is exp(-x^2 / 2) times a smooth function of |x|, fitted in s = (|x| - 3) / (|x| + 3): a small relative error
// everywhere, where 1 + erf cancels for negative x.
GRANVIT_INLINE Normal<float> normal(Register<float> x) {
  using F = Register<float>;
  using I = Register<int32_t>;
  const F a = select(I(x < 0.0f), -x, x);
  F power = x * x * -0.72134752044f;  // exp(-x^2 / 2) = 2^power
  power = select(I(power < -126.0f), F{} - 126.0f, power);
  const F whole = round_to_integer(power);
  const F r = power - whole;
  F e = 0.0001534581477f * r + 0.001339993124f;
  e = e * r + 0.009618488945f;
  e = e * r + 0.05550328777f;
  e = e * r + 0.2402264689f;
  e = e * r + 0.6931472057f;
  e = e * r + 1.0f;
  I bits;
  std::memcpy(&bits, &e, sizeof bits);
  const I scaled = bits + (__builtin_convertvector(whole, I) << 23);
  std::memcpy(&e, &scaled, sizeof e);

  const F s = 1.0f - 6.0f / (a + 3.0f);
  F p = 5.36718683e-05f * s + 1.1554377e-04f;
  p = p * s - 3.39484886e-04f;
  p = p * s - 9.83758452e-04f;
  p = p * s + 2.90455617e-03f;
  p = p * s + 6.13207067e-03f;
  p = p * s - 4.6213291e-02f;
  p = p * s + 0.123225031f;
  p = p * s - 0.206402619f;
  p = p * s + 0.121513948f;
  const F tail = e * p;
  return {select(I(x < 0.0f), tail, 1.0f - tail), e * 0.3989422804f};
}

GRANVIT_INLINE Normal<double> normal(Register<double> x) {
  Normal<double> out;
  for (int i = 0; i < kRegisterLanes<double>; ++i) {
    out.cdf[i] = 0.5 * std::erfc(-0.70710678118654752440 * x[i]);
    out.density[i] = 0.39894228040143267794 * std::exp(-0.5 * x[i] * x[i]);
  }
  return out;
}

template <typename A, typename Function>
GRANVIT_INLINE Vec<A> by_registers(Vec<A> x, const Function& function) {
  A lanes[kLanes<A>];
  store(lanes, x);
#pragma GCC unroll 4
  for (int i = 0; i < kLanes<A>; i += kRegisterLanes<A>) {
    const Register<A> y = function(load_register(lanes + i));
    std::memcpy(lanes + i, &y, sizeof y);
  }
  return load(lanes);
}

template <typename A>
GRANVIT_INLINE Vec<A> gelu(Vec<A> x) {
  return by_registers<A>(x, [](Register<A> r) { return r * normal(r).cdf; });
}

template <typename A>
GRANVIT_INLINE Vec<A> gelu_derivative(Vec<A> x) {
  return by_registers<A>(x, [](Register<A> r) {
    const Normal<A> n = normal(r);
    return n.cdf + r * n.density;
  });
}

}  // namespace granvit::cpu::GRANVIT_ISA
