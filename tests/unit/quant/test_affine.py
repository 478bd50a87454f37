"""QSpec, QParams and the three maps: the table of codes, validation, channels, dtypes."""

import dataclasses

import numpy as np
import pytest

from refquant.errors import RangeError, ShapeError
from refquant.quant.affine import QParams, QSpec, dequantize, fake_quantize, quantize


@pytest.mark.parametrize(
    ("bits", "signed", "qmin", "qmax", "dtype"),
    [
        (8, False, 0, 255, np.uint8),
        (8, True, -128, 127, np.int8),
        (4, False, 0, 15, np.uint8),
        (4, True, -8, 7, np.int8),
        (2, False, 0, 3, np.uint8),
        (2, True, -2, 1, np.int8),
    ],
)
def test_codes_of_a_spec(bits, signed, qmin, qmax, dtype):
    spec = QSpec(bits, signed)
    assert (spec.qmin, spec.qmax, spec.dtype) == (qmin, qmax, dtype)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "8", None, True])
def test_spec_refuses_bits(bits):
    with pytest.raises(RangeError, match="2 to 8 bits"):
        QSpec(bits)


def test_spec_refuses_axis():
    with pytest.raises(ShapeError, match="axis"):
        QSpec(8, axis=(0, 1))


def test_specs_are_values():
    assert QSpec(4, axis=0) == QSpec(4, axis=0)
    assert hash(QSpec(4)) == hash(QSpec(4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        QSpec(4).bits = 5


def test_params_are_private_frozen_and_of_one_dtype():
    scale = np.array([0.5, 0.25])
    q = QParams(scale, [1, 2], QSpec(4, axis=0))
    scale[0] = 9
    assert q.scale.tolist() == [0.5, 0.25]
    assert (q.scale.dtype, q.zero_point.dtype) == (np.float32, np.int32)
    for array in (q.scale, q.zero_point):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(
    ("scale", "zero_point", "spec"),
    [
        ([1.0], [0], QSpec()),
        (1.0, 0, QSpec(axis=0)),
        ([1.0, 2.0], [0], QSpec(axis=0)),
        (1.0, [0], QSpec()),
        ([[1.0]], [[0]], QSpec(axis=0)),
    ],
)
def test_params_refuse_shapes(scale, zero_point, spec):
    with pytest.raises(ShapeError, match="scale .* and zero_point"):
        QParams(scale, zero_point, spec)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e-50, 1e-40, 1e39])
def test_params_refuse_scales(scale):
    with pytest.raises(RangeError, match="positive normal float32"):
        QParams(scale, 0, QSpec())


@pytest.mark.parametrize("zero_point", [0.5, np.nan, np.inf, 2**23 + 1, -(2**31)])
def test_params_refuse_zero_points(zero_point):
    with pytest.raises(RangeError, match="zero_point must be an integer"):
        QParams(1.0, zero_point, QSpec())


def test_symmetric_pins_the_zero_point():
    with pytest.raises(RangeError, match="must be 0"):
        QParams(1.0, 3, QSpec(symmetric=True))


def test_codes_must_mean_finite_numbers():
    with pytest.raises(RangeError, match="beyond float32"):
        QParams(3e36, 128, QSpec())


def test_zero_is_exact_tells():
    assert QParams([1, 1], [0, 255], QSpec(axis=0)).zero_is_exact
    assert not QParams([1, 1], [0, 256], QSpec(axis=0)).zero_is_exact
    assert not QParams(1, -1, QSpec()).zero_is_exact


def test_always_zero_is_unsigned_and_symmetric():
    q = QParams(1 / 255, 0, QSpec(8, signed=False, symmetric=True))
    assert quantize([-0.3, 0.0, 0.25, 1.0, 1.2], q).tolist() == [0, 0, 64, 255, 255]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_channels_lie_along_the_axis(axis):
    x = np.ones((3, 3, 3), np.float32)
    q = QParams([1.0, 0.5, 0.25], [0, 1, 2], QSpec(4, axis=axis))
    codes = np.moveaxis(quantize(x, q), axis, 0)
    assert [set(c.ravel().tolist()) for c in codes] == [{1}, {3}, {6}]
    np.testing.assert_array_equal(fake_quantize(x, q), x)


@pytest.mark.parametrize("shape", [(), (2, 4), (3,)])
def test_channels_must_fit(shape):
    q = QParams([1.0, 1.0], [0, 0], QSpec(axis=1))
    with pytest.raises(ShapeError, match="2 channels along axis 1"):
        quantize(np.zeros((3, 3), np.float32), q)
    if shape != (2, 4):
        with pytest.raises(ShapeError, match="2 channels along axis 1"):
            dequantize(np.zeros(shape, np.uint8), q)


def test_dequantize_wants_the_codes_of_its_spec():
    with pytest.raises(ShapeError, match="int8, but"):
        dequantize(np.zeros(3, np.int8), QParams(1.0, 0, QSpec()))
    with pytest.raises(ShapeError, match="float32, but"):
        dequantize(np.zeros(3, np.float32), QParams(1.0, 0, QSpec()))


@pytest.mark.parametrize("x", [1.0, [1, 2], np.ones((2, 2)), np.ones(3, np.float16), np.zeros((0, 2))])
def test_any_real_input_is_taken_as_float32(x):
    q = QParams(0.5, 3, QSpec())
    assert quantize(x, q).dtype == np.uint8
    assert quantize(x, q).shape == fake_quantize(x, q).shape == np.shape(x)
    assert fake_quantize(x, q).dtype == np.float32


def test_float64_beyond_float32_saturates():
    assert quantize([1e300, -1e300], QParams(0.5, 3, QSpec())).tolist() == [255, 0]


def test_infinities_saturate_and_nan_raises():
    q = QParams(0.5, 3, QSpec(4))
    assert fake_quantize([np.inf, -np.inf], q).tolist() == [6.0, -1.5]
    with pytest.raises(RangeError, match="NaN at index"):
        fake_quantize([0.0, np.nan], q)
