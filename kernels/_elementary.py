"""Sine, cosine and the normal distribution in float32; the polynomials are those of csrc/cpu/elementary.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sine_cosine(turns):
    """sin and cos (float32) of 2 pi times `turns` (float64), however many they are."""
    # Whole turns go in float64, where that is exact; what is left fits float32.
    rest = (turns - tl.floor(turns + 0.5)).to(tl.float32)
    quarters = tl.floor(rest * 4.0 + 0.5)
    count = quarters.to(tl.int32)
    f = rest - 0.25 * quarters  # at most an eighth of a turn either way
    z = f * f
    s = f * ((((41.4698894 * z - 76.69777412) * z + 81.60520381) * z - 41.34170215) * z + 6.283185307)
    c = (((59.20279606 * z - 85.44229797) * z + 64.93931074) * z - 19.73920863) * z + 1.0
    odd = (count & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where((count & 2) != 0, -sine, sine), tl.where(((count + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def normal(x):
    """Distribution function and density of the standard normal distribution at x (float32).

    GELU(x) = x * cdf, and its derivative is cdf + x * density.
    """
    # The tail is exp(-x^2 / 2) times a smooth function of |x|: a small relative error where 1 + erf cancels.
    e = tl.exp2(x * x * -0.72134752044)
    s = 1.0 - 6.0 / (tl.abs(x) + 3.0)
    p = 5.36718683e-05 * s + 1.1554377e-04
    p = p * s - 3.39484886e-04
    p = p * s - 9.83758452e-04
    p = p * s + 2.90455617e-03
    p = p * s + 6.13207067e-03
    p = p * s - 4.6213291e-02
    p = p * s + 0.123225031
    p = p * s - 0.206402619
    p = p * s + 0.121513948
    tail = e * p
    return tl.where(x < 0, tail, 1.0 - tail), 0.3989422804 * e
