"""intmath by hand: values that can be checked on paper, dtypes, edges and errors."""

import numpy as np
import pytest
from asserts import assert_same_integers

from refquant.errors import RangeError, ShapeError
from refquant.intmath import (
    dequantize_codes,
    fixed_point,
    quantize_codes,
    requantize,
    round_half_even,
    rounding_shift,
    saturate,
)

ONE = np.float32(1)


def codes(x, scale=ONE, zero_point=0, qmin=0, qmax=255):
    return quantize_codes(np.asarray(x), np.asarray(scale), np.asarray(zero_point, np.int32), qmin, qmax)


def test_ties_go_to_the_even_neighbour():
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], dtype=np.float32)
    assert_same_integers(round_half_even(x).astype(int), [-2, -2, 0, 0, 2, 2], x=x)
    assert round_half_even(x).dtype == np.float32


@pytest.mark.parametrize(
    ("qmin", "qmax", "dtype"), [(0, 255, np.uint8), (0, 15, np.uint8), (-128, 127, np.int8), (-8, 7, np.int8)]
)
def test_saturate_chooses_the_byte(qmin, qmax, dtype):
    got = saturate(np.array([-(2**62), -1, 0, 3, 2**62]), qmin, qmax)
    assert got.dtype == dtype
    assert_same_integers(got, [qmin, max(qmin, -1), 0, 3, qmax])


@pytest.mark.parametrize(("qmin", "qmax"), [(0, 256), (-129, 0), (-1, 128), (3, 3), (5, 2)])
def test_saturate_refuses_what_no_byte_holds(qmin, qmax):
    with pytest.raises(RangeError, match=f"from {qmin} to {qmax}"):
        saturate(np.array([0]), qmin, qmax)


def test_zero_point_is_added_after_rounding():
    assert codes(np.float32([0.5, 1.5]), zero_point=1).tolist() == [
        1,
        3,
    ]  # 0 + 1 and 2 + 1, not round(1.5), round(2.5)


def test_clamp_comes_after_the_zero_point():
    assert codes(np.float32([-3.0]), zero_point=10).tolist() == [7]  # clamping -3 to 0 first would give 10


def test_infinities_saturate_and_so_does_overflow_in_the_division():
    x = np.array([np.inf, -np.inf, 3e38, -3e38], dtype=np.float32)
    assert codes(x, scale=np.float32(1e-8), zero_point=3).tolist() == [255, 0, 255, 0]


def test_nan_is_named_with_its_index():
    with pytest.raises(RangeError, match=r"NaN at index \(1, 0\) of an array of shape \(2, 2\)"):
        codes(np.float32([[0, 0], [np.nan, 0]]))


def test_float32_is_divided_in_float32():
    # (n + 0.5) * 0.7 / 0.7 is mostly the tie itself in float32; float64 sees which side of it x is on
    scale = np.float32(0.7)
    x = np.arange(0.5, 200, dtype=np.float32) * scale
    in32, in64 = np.rint(x / scale), np.rint(x.astype(np.float64) / np.float64(scale))
    assert (in32 != in64).any()
    assert_same_integers(codes(x, scale), in32.astype(int), x=x)
    assert_same_integers(codes(x.astype(np.float64), scale.astype(np.float64)), in64.astype(int), x=x)


def test_integers_beside_float32_do_not_promote():
    q = codes(np.zeros((2, 3), np.float32), zero_point=7)
    assert dequantize_codes(q, np.asarray(ONE), np.asarray(7, np.int32)).dtype == np.float32


def test_dequantize_knows_negative_differences():
    q = np.array([0, 128, 255], dtype=np.uint8)  # uint8 - 128 must not wrap around
    got = dequantize_codes(q, np.asarray(np.float32(0.5)), np.asarray(128, np.int32))
    assert got.tolist() == [-64.0, 0.0, 63.5]


def test_empty_and_scalar_arrays():
    assert codes(np.zeros((0, 4), np.float32)).shape == (0, 4)
    assert codes(np.float32(2.0)).shape == ()


@pytest.mark.parametrize(
    ("m", "mantissa", "shift"),
    [
        (1.0, 2**30, 30),
        (0.5, 2**30, 31),
        (0.75, 3 * 2**29, 31),
        (2.0**-32, 2**30, 62),
        (2.0**30, 2**30, 0),
        (1 - 2.0**-40, 2**30, 30),  # rounds up to 1: the carry
        (2.0**31 - 1, 2**31 - 1, 0),
    ],
)
def test_fixed_point_by_hand(m, mantissa, shift):
    got = fixed_point(m)
    assert (int(got[0]), int(got[1])) == (mantissa, shift)
    assert got[0].dtype == got[1].dtype == np.int32


@pytest.mark.parametrize("m", [0.0, -1.0, np.nan, np.inf, 2.0**31, 2.0**-33, 2.0**31 - 2.0**-2])
def test_fixed_point_refuses(m):
    with pytest.raises(RangeError, match="multiplier"):
        fixed_point(np.array([0.5, m]))


def test_rounding_shift_by_hand():
    p = np.array([-6, -5, -3, -2, -1, 0, 1, 2, 3, 5, 6])  # / 4: -1.5 and 1.5, -0.5 and 0.5 are the ties
    assert_same_integers(rounding_shift(p, 2), [-2, -1, -1, 0, 0, 0, 0, 0, 1, 1, 2], p=p)
    assert_same_integers(rounding_shift(p, 0), p)


def test_requantize_takes_every_int32():
    acc = np.array([-(2**31), -1, 0, 1, 2**31 - 1], dtype=np.int32)
    for m in (2.0**-32, 0.3, 1.0, 2.0**30):
        got = requantize(acc, *fixed_point(m), 5, 0, 255)
        want = [min(max(round(int(a) * m) + 5, 0), 255) for a in acc]
        assert_same_integers(got, want, acc=acc)


def test_requantize_adds_the_zero_point_before_it_saturates():
    acc = np.array([-300, 300], dtype=np.int32)
    assert requantize(acc, *fixed_point(0.5), 200, 0, 255).tolist() == [50, 255]


def test_requantize_refuses_other_accumulators_and_other_mantissas():
    with pytest.raises(ShapeError, match="int32 accumulators, got int64"):
        requantize(np.zeros(2, np.int64), *fixed_point(0.5), 0, 0, 255)
    for mantissa, shift in ((2**30 - 1, 31), (-(2**30), 31), (2**30, 63), (2**30, -1)):
        with pytest.raises(RangeError, match=f"mantissa {mantissa} with shift {shift}"):
            requantize(np.zeros(2, np.int32), np.int32(mantissa), np.int32(shift), 0, 0, 255)
