"""The rounding family: ties to even against ``fractions.Fraction``, and fixed-point requantization."""

from fractions import Fraction

import laws
import numpy as np
from asserts import assert_same_integers
from hypothesis import given
from hypothesis import strategies as st
from strategies import int32s, mantissas, requantize_cases, shifts

from refquant.intmath import fixed_point, requantize, round_half_even, rounding_shift


def test_floats_round_as_fractions_exhaustively():
    """round_half_even(n / 8) = round(Fraction(n, 8)) for all |n| <= 8192: every tie up to 1024."""
    n = np.arange(-8192, 8193)
    want = [round(Fraction(int(k), 8)) for k in n]
    for dtype in (np.float32, np.float64):
        assert_same_integers(round_half_even((n / 8).astype(dtype)).astype(int), want, n=n)


def test_shifts_round_as_fractions_exhaustively():
    """rounding_shift(p, k) = round(Fraction(p, 2**k)) for all |p| <= 600, 0 <= k <= 10."""
    p = np.arange(-600, 601)
    for k in range(11):
        want = [round(Fraction(int(v), 2**k)) for v in p]
        assert_same_integers(rounding_shift(p, k), want, p=p, k=k)


@given(st.integers(-(2**63), 2**63 - 1), shifts)
def test_shifts_round_as_fractions_anywhere(p, k):
    """rounding_shift(p, k) = round(Fraction(p, 2**k)) for all int64 p and 0 <= k <= 62."""
    assert rounding_shift(np.array([p]), k)[0] == round(Fraction(p, 2**k))


@given(st.integers(-(2**63), 2**63 - 1))
def test_shift_of_zero_is_the_identity(p):
    """rounding_shift(p, 0) = p."""
    assert rounding_shift(np.array([p]), 0)[0] == p


@given(requantize_cases())
def test_requantize_is_exact(case):
    laws.requantize_is_exact(case)


@given(int32s, int32s, mantissas, shifts, st.integers(0, 255))
def test_requantize_is_monotone(a, b, mantissa, shift, zero_point):
    """a <= b implies rq(a) <= rq(b)."""
    acc = np.array(sorted([a, b]), dtype=np.int32)
    low, high = requantize(acc, np.int32(mantissa), np.int32(shift), zero_point, 0, 255)
    assert low <= high


@given(st.integers(-300, 300), st.integers(0, 255))
def test_multiplier_one_is_the_identity(acc, zero_point):
    """m = 1: rq(a) = clamp(a + z)."""
    mantissa, shift = fixed_point(1.0)
    got = requantize(np.array([acc], np.int32), mantissa, shift, zero_point, 0, 255)
    assert got[0] == min(max(acc + zero_point, 0), 255)


@given(st.floats(2.0**-32, 2.0**31 * (1 - 2.0**-32), exclude_max=True))
def test_fixed_point_is_within_two_to_the_minus_31(m):
    """|M 2**-n / m - 1| <= 2**-31, with M in [2**30, 2**31) and n in [0, 62]."""
    mantissa, shift = fixed_point(m)
    assert 2**30 <= mantissa < 2**31
    assert 0 <= shift <= 62
    assert abs(Fraction(int(mantissa), 2 ** int(shift)) / Fraction(m) - 1) <= Fraction(1, 2**31)


@given(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=5))
def test_channels_are_requantized_each_by_its_own_multiplier(multipliers):
    """rq(a; m)[c] = rq(a[c]; m[c])."""
    acc = np.arange(-500, 500, 7, dtype=np.int32)[:, None] * np.ones(len(multipliers), np.int32)
    together = requantize(acc, *fixed_point(np.array(multipliers)), 3, -128, 127)
    for c, m in enumerate(multipliers):
        assert_same_integers(together[:, c], requantize(acc[:, c], *fixed_point(m), 3, -128, 127), m=m)
