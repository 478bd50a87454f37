"""SQuant at the edges: tensors without spread, bad input, ranges of activations, and whole models."""

import time

import numpy as np
import pytest
from asserts import assert_same_integers
from toys import tiny_session

from refquant.diffusion.denoiser import Denoiser
from refquant.errors import RangeError, ShapeError, UnknownNameError
from refquant.quant.affine import dequantize
from refquant.quant.calibrate import Calibration, CalibrationConfig
from refquant.quant.methods import METHODS
from refquant.quant.methods.squant import ACTIVATIONS, MODES, sigma_range, squant
from refquant.quant.quantized import load_quantized

# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("value", [0.0, 0.3, -2.5, 1e-12])
@pytest.mark.parametrize("mode", MODES)
def test_constant_channels_are_exact_to_rounding(value, mode):
    """An all-zero channel gives 0, and a constant one spans [0, c], of which c is an end."""
    weight = np.full((2, 3, 3, 4), value, dtype=np.float32)
    codes, q = squant(weight, 4, mode)
    np.testing.assert_allclose(dequantize(codes, q), weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_weights_must_be_finite(bad):
    weight = np.ones((3, 3, 3, 2))
    weight[1, 0, 2, 1] = bad
    with pytest.raises(RangeError, match="channel 1"):
        squant(weight, 8)


def test_a_channel_must_fit_float32():
    with pytest.raises(RangeError, match="3.4e38"):
        squant([[3e38, -3e38]], 8)


@pytest.mark.parametrize("bits", [0, 1, 9, 4.0])
def test_bits_are_two_to_eight(bits):
    with pytest.raises(RangeError, match="2 to 8"):
        squant(np.ones((2, 2)), bits)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4), (2, 3, 3, 0)])
def test_shapes(shape):
    with pytest.raises(ShapeError, match=r"\(O, kh, kw, C\)"):
        squant(np.ones(shape), 4)


def test_unknown_names_are_listed():
    with pytest.raises(UnknownNameError, match="e, k, c, full"):
        squant(np.ones((2, 2)), 4, "squant-k")


def test_arguments_are_not_written_to():
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 5), dtype=np.float32)
    weight.setflags(write=False)
    squant(weight, 3)


def test_a_large_layer_takes_no_time():
    """A Python loop over its 110,592 kernels would take seconds; a second of slack for a busy machine."""
    weight = np.random.default_rng(0).standard_normal((576, 3, 3, 192), dtype=np.float32)
    began = time.process_time()
    squant(weight, 4)
    assert time.process_time() - began < 1.5


# ------------------------------------------------------------------ activations


@pytest.mark.parametrize(
    ("x", "want"),
    [
        ([0.0, 0.0, 0.0], (0.0, 0.0)),
        ([2.0], (0.0, 2.0)),  # one value has no spread: it keeps its own size
        ([-3.0, -3.0], (-3.0, 3.0)),
        ([0.0, 5.0], (0.0, 5.0)),  # one positive value
        ([-1.0, -2.0, -6.0], (-6.0, 6.0)),  # negative throughout, clipped at max |x| below 6 bits
    ],
)
def test_sigma_range_of_tensors_without_spread(x, want):
    assert sigma_range(x, 4, 12.0) == want


def test_sigma_range_clips_below_six_bits_only():
    x = np.random.default_rng(0).standard_normal(1000)
    assert sigma_range(x, 5, 12.0)[1] == np.abs(x).max()
    np.testing.assert_allclose(sigma_range(x, 6, 12.0)[1], 12 * x.std(ddof=1) / 1.25)
    np.testing.assert_allclose(sigma_range(np.maximum(x, 0), 6, 12.0), (0, 12 * x[x > 0].std(ddof=1)))


@pytest.mark.parametrize(("x", "sigma"), [([1.0, np.nan], 12.0), ([], 12.0), ([1.0, 2.0], 0.0), ([1.0], np.nan)])
def test_sigma_range_refuses(x, sigma):
    with pytest.raises(RangeError):
        sigma_range(x, 8, sigma)


# ------------------------------------------------------------------ whole models


@pytest.fixture(scope="module")
def calibration(model):
    return Calibration(model, CalibrationConfig(images=1, steps=4, every=2))  # one sample is enough to be defined


def quantized(calibration, method="squant", bits=(8, 8), **options):
    return METHODS[method](tiny_session(calibration, weight_bits=bits[0], input_bits=bits[1]), **options)


def test_model_has_the_codes_of_squant_and_the_activations_of_nearest(model, calibration):
    before = {k: v.copy() for k, v in model.network.state_dict().items()}
    q = quantized(calibration, bits=(4, 8), mode="full")
    nearest = quantized(calibration, "nearest", (4, 8))
    assert q.layers.keys() == nearest.layers.keys()
    for name, layer in q.layers.items():
        assert_same_integers(layer.codes, squant(before[f"{name}.weight"], 4)[0])
    for name, quantizer in q.quantizers().items():
        assert quantizer.qparams.scale == nearest.quantizers()[name].qparams.scale
        assert quantizer.qparams.zero_point == nearest.quantizers()[name].qparams.zero_point
    for name, array in model.network.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_sigma_activations_are_those_of_the_observed_sample(model, calibration):
    q = quantized(calibration, activations="sigma", sigma=9.0)
    for name, quantizer in q.quantizers().items():
        lo, hi = sigma_range(calibration.inputs[name].sample, 8, 9.0)
        np.testing.assert_allclose(quantizer.qparams.scale, (hi - lo) / 255, rtol=1e-6)
    assert q.recipe["options"]["activations"] == "sigma" and q.recipe["options"]["sigma"] == 9.0
    assert quantized(calibration).recipe["options"]["sigma"] is None


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_file_and_back(model, calibration, tmp_path, activations):
    q = quantized(calibration, bits=(3, 6), activations=activations)
    q.save(tmp_path / "q.safetensors")
    back = load_quantized(str(tmp_path / "q.safetensors"))
    x = np.random.default_rng(1).standard_normal((2, *model.image_shape), dtype=np.float32)
    np.testing.assert_array_equal(back.denoiser()(x, 3, 0), q.denoiser()(x, 3, 0))
    assert back.recipe == q.recipe and np.isfinite(q.denoiser()(x, 3, 0)).all()


def test_eight_bits_are_close(model, calibration):
    x = np.random.default_rng(1).standard_normal((2, *model.image_shape), dtype=np.float32)
    y = Denoiser(model.network)(x, 3, 0)
    q = quantized(calibration)
    # 1.7 % here: one calibration image sees ranges that others go beyond
    assert np.mean((q.denoiser()(x, 3, 0) - y) ** 2) < 0.05 * np.mean(y**2)


def test_unknown_activations_are_refused(model, calibration):
    with pytest.raises(UnknownNameError, match="mse, minmax, sigma"):
        quantized(calibration, activations="percentile")
