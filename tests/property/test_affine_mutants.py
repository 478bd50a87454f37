"""Wrong arithmetic that the laws must notice: each mutant is a slip that a careful person could make.

A mutant replaces one function of ``refquant.intmath``; the named law is then searched for a counterexample,
and the test fails if there is none.
"""

import laws
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from strategies import affine_cases, requantize_cases

from refquant import intmath
from refquant.intmath import round_half_even, rounding_shift, saturate


def half_up(x):
    return np.floor(x + np.asarray(x).dtype.type(0.5))


def half_away_from_zero(x):
    return np.copysign(np.floor(np.abs(x) + np.asarray(x).dtype.type(0.5)), x)


def zero_point_before_rounding(x, scale, zero_point, qmin, qmax):
    return saturate(round_half_even(x / scale + zero_point.astype(x.dtype)), qmin, qmax)


def clamp_before_zero_point(x, scale, zero_point, qmin, qmax):
    return saturate(np.clip(round_half_even(x / scale), qmin, qmax) + zero_point, qmin, qmax)


def zero_point_clamped_before_adding(x, scale, zero_point, qmin, qmax):
    return saturate(round_half_even(x / scale) + np.clip(zero_point, qmin, qmax), qmin, qmax)


def multiply_by_reciprocal(x, scale, zero_point, qmin, qmax):
    return saturate(round_half_even(x * (np.float32(1) / scale)) + zero_point, qmin, qmax)


def one_code_less(x, scale, zero_point, qmin, qmax):
    return saturate(round_half_even(x / scale) + zero_point, qmin, qmax - 1)


def zero_point_never_at_the_top(x, scale, zero_point, qmin, qmax):
    return saturate(round_half_even(x / scale) + np.minimum(zero_point, qmax - 1), qmin, qmax)


def wrap_instead_of_saturate(x, scale, zero_point, qmin, qmax):
    q = round_half_even(x / scale).astype(np.int64) + zero_point
    return q.astype(saturate(q, qmin, qmax).dtype)


def saturate_the_byte_not_the_bits(x, scale, zero_point, qmin, qmax):
    low, high = (0, 255) if qmin == 0 else (-128, 127)
    return saturate(round_half_even(x / scale) + zero_point, low, high)


def epsilon_in_the_division(x, scale, zero_point, qmin, qmax):
    return saturate(round_half_even(x / (scale + np.float32(1e-8))) + zero_point, qmin, qmax)


def one_scale_for_all_channels(x, scale, zero_point, qmin, qmax):
    return saturate(round_half_even(x / scale.max()) + zero_point, qmin, qmax)


def shift_half_up(p, shift):
    shift = np.asarray(shift, dtype=np.int64)
    return (p + ((np.int64(1) << shift) >> 1)) >> shift


def shift_truncated(p, shift):
    return p >> np.asarray(shift, dtype=np.int64)


def requantize_clamps_before_zero_point(acc, mantissa, shift, zero_point, qmin, qmax):
    scaled = rounding_shift(acc.astype(np.int64) * mantissa, shift)
    return saturate(np.clip(scaled, qmin, qmax) + zero_point, qmin, qmax)


any_zero_point = affine_cases(zero_in_range=False)
per_channel = affine_cases(per_channel=(True,))

MUTANTS = [
    ("round_half_even", half_up, laws.codes_are_the_exact_ones, affine_cases()),
    ("round_half_even", half_away_from_zero, laws.codes_are_the_exact_ones, affine_cases()),
    ("round_half_even", np.floor, laws.error_is_half_a_step, affine_cases()),
    ("round_half_even", np.trunc, laws.idempotent, affine_cases()),
    ("quantize_codes", zero_point_before_rounding, laws.signed_codes_are_unsigned_ones_moved, affine_cases()),
    ("quantize_codes", zero_point_before_rounding, laws.codes_are_the_exact_ones, affine_cases()),
    ("quantize_codes", clamp_before_zero_point, laws.error_is_half_a_step, affine_cases()),
    ("quantize_codes", clamp_before_zero_point, laws.outside_saturates, affine_cases()),
    ("quantize_codes", zero_point_clamped_before_adding, laws.codes_are_the_exact_ones, any_zero_point),
    ("quantize_codes", multiply_by_reciprocal, laws.codes_are_the_exact_ones, affine_cases()),
    ("quantize_codes", one_code_less, laws.outside_saturates, affine_cases()),
    ("quantize_codes", zero_point_never_at_the_top, laws.zero_is_exact, affine_cases()),
    ("quantize_codes", wrap_instead_of_saturate, laws.monotone, affine_cases()),
    ("quantize_codes", saturate_the_byte_not_the_bits, laws.codes_stay_in_range, affine_cases()),
    ("quantize_codes", epsilon_in_the_division, laws.scaling_by_powers_of_two, affine_cases()),
    ("quantize_codes", one_scale_for_all_channels, laws.channels_are_a_stack_of_tensors, per_channel),
    ("rounding_shift", shift_half_up, laws.requantize_is_exact, requantize_cases()),
    ("rounding_shift", shift_truncated, laws.requantize_is_exact, requantize_cases()),
    ("requantize", requantize_clamps_before_zero_point, laws.requantize_is_exact, requantize_cases()),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mutants do not silence overflow
@pytest.mark.parametrize(
    ("name", "mutant", "law", "cases"),
    [pytest.param(*m, id=f"{m[1].__name__}-{m[2].__name__}") for m in MUTANTS],
)
def test_law_kills_mutant(name, mutant, law, cases, monkeypatch):
    monkeypatch.setattr(intmath, name, mutant)

    @settings(
        max_examples=1000,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @given(cases)
    def search(case):
        law(case)

    with pytest.raises(AssertionError):
        search()
