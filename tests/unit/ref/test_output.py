"""The output stages against their slow definitions: fractions for codes, one float32 operation at a time for reals."""

from fractions import Fraction

import numpy as np
import pytest
from asserts import assert_same_integers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import dequantizers, floats32, int32s, requantizers

from refquant.errors import RangeError, ShapeError
from refquant.intmath import fixed_point
from refquant.ref import Dequantize, Requantize

OUTPUTS = st.integers(0, 6)


@st.composite
def sums(draw, outputs, largest=2**31 - 1):
    shape = (*draw(st.sampled_from([(), (1,), (3,), (2, 2)])), outputs)
    return draw(hnp.arrays(np.int32, shape, elements=int32s)).clip(-largest, largest)


@given(st.data(), OUTPUTS)
def test_dequantize_rounds_after_each_operation(data, outputs):
    """y = fl(fl(fl(fl(acc) s) + b) + r), the same bits."""
    output, acc = data.draw(dequantizers(outputs)), data.draw(sums(outputs))
    residual = data.draw(st.none() | hnp.arrays(np.float32, acc.shape, elements=floats32()))
    with np.errstate(over="ignore"):
        got = output.apply(acc, residual)
        assert got.dtype == output.dtype == np.float32 and got.shape == acc.shape
        for i in np.ndindex(acc.shape):
            y = np.float32(acc[i]) * output.scale[i[-1]]
            if output.bias is not None:
                y = y + output.bias[i[-1]]
            if residual is not None:
                y = y + residual[i]
            assert_same_integers(got[i].view(np.uint32), y.view(np.uint32), acc=acc[i])


@given(st.data(), OUTPUTS, st.integers(0, 500))
def test_requantize_is_the_nearest_code(data, outputs, k):
    """q = clamp(round_half_even((acc + b) M / 2^n) + z, qmin, qmax), in rational arithmetic."""
    output = data.draw(requantizers(outputs, k))
    acc = data.draw(sums(outputs, 2**31 - 1 - output.largest_bias))
    got = output.apply(acc)
    assert got.dtype == output.dtype == np.uint8
    want = np.empty(acc.shape, np.int64)
    for i in np.ndindex(acc.shape):
        o = i[-1]
        total = int(acc[i]) + (0 if output.bias is None else int(output.bias[o]))
        code = round(Fraction(total * int(output.mantissa[o]), 2 ** int(output.shift[o]))) + output.zero_point
        want[i] = min(max(code, output.qmin), output.qmax)
    assert_same_integers(got, want, acc=acc)


def test_a_tie_goes_to_the_even_code():
    """acc / 2: 1/2 -> 0, 3/2 -> 2, 5/2 -> 2, -1/2 -> 0, -3/2 -> -2; then the zero point."""
    output = Requantize(*fixed_point(np.full(5, 0.5)), zero_point=10)
    assert output.apply(np.array([1, 3, 5, -1, -3], np.int32)).tolist() == [10, 12, 12, 10, 8]


def test_the_largest_bias():
    """Its magnitude, also where int32 has no room for that: |-2^31| = 2^31."""
    mantissa, shift = np.full(2, 2**30, np.int32), np.full(2, 30, np.int32)
    for bias, largest in ((None, 0), ([0, 0], 0), ([5, -7], 7), ([-(2**31), 1], 2**31)):
        array = None if bias is None else np.array(bias, np.int32)
        assert Requantize(mantissa, shift, bias=array).largest_bias == largest
    assert Dequantize(np.ones(2, np.float32), np.ones(2, np.float32)).largest_bias == 0


def test_outputs():
    assert Dequantize(np.ones(3, np.float32)).outputs == 3
    assert Requantize(np.zeros(0, np.int32), np.zeros(0, np.int32)).outputs == 0


def test_a_residual_among_codes_is_refused():
    output = Requantize(*fixed_point(np.ones(1)))
    with pytest.raises(ShapeError, match="float32 results only. Use Dequantize"):
        output.apply(np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32))


SCALE, M, N = np.ones(4, np.float32), np.full(4, 2**30, np.int32), np.full(4, 30, np.int32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Dequantize([1.0]), ShapeError, "scale is list; it must be float32"),
        (lambda: Dequantize(SCALE.astype(float)), ShapeError, r"scale is float64 \(4,\); it must be float32"),
        (lambda: Dequantize(np.float32(1)), ShapeError, "scale is float32; it must be float32, shape"),
        (lambda: Dequantize(SCALE[:, None]), ShapeError, r"scale is float32 \(4, 1\).*shape \(O,\)"),
        (lambda: Dequantize(SCALE, SCALE[:3]), ShapeError, r"bias is float32 \(3,\).*shape \(4,\)"),
        (lambda: Dequantize(SCALE, M), ShapeError, "bias is int32.*must be float32"),
        (lambda: Dequantize(SCALE[::2]), ShapeError, "gaps between its elements.*ascontiguousarray"),
        (lambda: Dequantize(np.frombuffer(bytes(17), np.float32, 4, 1)), ShapeError, "gaps|aligned"),
        (lambda: Requantize(M.astype(np.int64), N), ShapeError, "mantissa is int64.*must be int32"),
        (lambda: Requantize(M, N[:3]), ShapeError, r"shift is int32 \(3,\).*shape \(4,\)"),
        (lambda: Requantize(M, 30), ShapeError, "shift is int; it must be int32"),
        (lambda: Requantize(M[::2], N[::2]), ShapeError, "gaps"),
        (lambda: Requantize(M - 1, N), RangeError, "mantissa runs from 1073741823.*1073741824..2147483647"),
        (lambda: Requantize(-M, N), RangeError, "mantissa runs from -1073741824"),
        (lambda: Requantize(M, N + np.int32(33)), RangeError, r"shift runs from 63.*0\.\.62.*fixed_point"),
        (lambda: Requantize(M, -N), RangeError, "shift runs from -30"),
        (lambda: Requantize(M, N, 256), RangeError, r"zero point 256.*0\.\.255"),
        (lambda: Requantize(M, N, -1), RangeError, "zero point -1"),
        (lambda: Requantize(M, N, qmin=-1), RangeError, r"codes -1\.\.255"),
        (lambda: Requantize(M, N, qmax=256), RangeError, r"codes 0\.\.256"),
        (lambda: Requantize(M, N, qmin=7, qmax=7), RangeError, r"codes 7\.\.7.*qmin < qmax"),
        (lambda: Requantize(M, N, 1.5), RangeError, "zero point 1.5.*whole numbers"),
        (lambda: Requantize(M, N, qmin=0.5), RangeError, r"codes 0.5\.\.255.*whole numbers"),
        (lambda: Requantize(M, N, "a"), RangeError, "zero point a.*whole numbers"),
        (lambda: Requantize(M, N, bias=M.astype(np.int64)), ShapeError, "bias is int64.*must be int32"),
        (lambda: Requantize(M, N, bias=M[:1]), ShapeError, r"bias is int32 \(1,\).*shape \(4,\)"),
    ],
)
def test_errors_say_what_is_allowed(call, error, words):
    with pytest.raises(error, match=words):
        call()
