"""Wrapping, calibration, nearest rounding and the quantized file."""

import numpy as np
import pytest
from toys import CALIBRATION, tiny_session

from refquant import io
from refquant.diffusion.denoiser import Denoiser
from refquant.errors import CheckpointError, RangeError, ShapeError, UnknownNameError
from refquant.nn.layers import Conv2d, Linear
from refquant.quant.affine import QParams, QSpec, dequantize, fake_quantize
from refquant.quant.calibrate import Calibration, CalibrationConfig
from refquant.quant.methods import METHODS
from refquant.quant.observers import minmax
from refquant.quant.quantized import load_quantized
from refquant.quant.wrap import CodedWeight, wrap
from refquant.threads import using_threads


def nearest(calibration, search="mse", **options):
    return METHODS["nearest"](tiny_session(calibration, **options), search=search)


@pytest.fixture
def x(model):
    return np.random.default_rng(1).standard_normal((5, *model.image_shape), dtype=np.float32)


def test_wrapping_changes_no_bit_until_a_quantizer_is_set(model, x):
    network, layers = wrap(model.network)
    np.testing.assert_array_equal(Denoiser(network)(x, 3, 0), Denoiser(model.network)(x, 3, 0))
    every = {name for name, m in model.network.named_modules() if isinstance(m, (Conv2d, Linear))}
    assert set(layers) == every


def test_the_network_is_not_edited(model, calibration, x):
    before = {k: v.copy() for k, v in model.network.state_dict().items()}
    y = Denoiser(model.network)(x, 3, 0)
    nearest(calibration, weight_bits=2, input_bits=2)
    assert model.network.state_dict().keys() == before.keys()
    for k, v in model.network.state_dict().items():
        np.testing.assert_array_equal(v, before[k])
    np.testing.assert_array_equal(Denoiser(model.network)(x, 3, 0), y)


def test_weights_lie_on_the_grid_of_their_codes(model, calibration):
    q = nearest(calibration, weight_bits=4)
    original = model.network.state_dict()
    for name, layer in q.layers.items():
        assert layer.codes.min() >= -8 and layer.codes.max() <= 7
        np.testing.assert_array_equal(layer.layer.weight.data, dequantize(layer.codes, layer.weight_qparams))
        np.testing.assert_array_equal(
            layer.layer.weight.data, fake_quantize(original[f"{name}.weight"], layer.weight_qparams)
        )


def test_more_bits_are_closer(model, calibration, x):
    """MSE to the float network falls with every two bits, for weights and for activations."""
    y = Denoiser(model.network)(x, 3, 0)

    def error(w, a):
        q = nearest(calibration, weight_bits=w, input_bits=a)
        return float(np.mean((q.denoiser()(x, 3, 0) - y) ** 2))

    by_weight, by_input = [error(b, 8) for b in (2, 4, 6, 8)], [error(8, b) for b in (2, 4, 6, 8)]
    assert by_weight == sorted(by_weight, reverse=True) and by_input == sorted(by_input, reverse=True)


def test_minmax_ranges_are_those_of_the_float_trajectory(model, calibration):
    """The observer of conv_in saw the sampler's x at every second step: its extremes are exact."""
    from refquant.diffusion.ddim import ddim_sample
    from refquant.diffusion.sampling import NoiseSource

    seen = []

    def eps(x, t, step):
        if step % 2 == 0:
            seen.append(x)
        return Denoiser(model.network, chunk=8)(x, t, step)

    noise = NoiseSource(CALIBRATION.seed, 3, model.image_shape)
    ddim_sample(eps, noise.draw(), model.schedule, noise, steps=4)
    want = minmax(np.concatenate(seen), QSpec(8))
    got = calibration.inputs["conv_in.input"].minmax(QSpec(8))
    assert got.scale == want.scale and got.zero_point == want.zero_point


def test_calibration_does_not_depend_on_threads(model):
    with using_threads(1):
        alone = Calibration(model, CALIBRATION).inputs
    with using_threads(2):
        together = Calibration(model, CALIBRATION).inputs
    for name, observer in alone.items():
        a, b = observer.mse(QSpec(8)), together[name].mse(QSpec(8))
        assert a.scale == b.scale and a.zero_point == b.zero_point


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_file_round_trip_computes_the_same_bits(model, calibration, x, tmp_path, bits):
    q = nearest(calibration, weight_bits=bits, search="minmax")
    q.save(tmp_path / "q.safetensors")
    again = load_quantized(str(tmp_path / "q.safetensors"))
    np.testing.assert_array_equal(again.denoiser()(x, 3, 0), q.denoiser()(x, 3, 0))
    assert again.recipe == q.recipe and again.size_bytes() == q.size_bytes()
    for name, layer in q.layers.items():
        np.testing.assert_array_equal(again.layers[name].codes, layer.codes)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()


def test_four_bits_take_half_the_bytes_of_eight(model, calibration):
    weights = sum(layer.layer.weight.data.size for layer in wrap(model.network)[1].values())
    eight, four = (nearest(calibration, weight_bits=b).size_bytes() for b in (8, 4))
    odd = 40  # rows of odd length end with half a byte unused
    assert abs(eight - four - weights // 2) <= odd


def test_a_file_whose_parts_do_not_fit_is_one_clear_error(model, calibration, tmp_path):
    path = tmp_path / "q.safetensors"
    nearest(calibration, weight_bits=4).save(path)
    found = io.load(path)
    missing = {k: v for k, v in found.tensors.items() if k != "conv_in.codes"}
    bad_scale = {**found.tensors, "conv_in.weight_scale": -found.tensors["conv_in.weight_scale"]}
    short = {**found.tensors, "conv_in.codes": found.tensors["conv_in.codes"][:, :-1].copy()}
    extra = {**found.tensors, "other": np.zeros(3, np.float32)}
    for tensors in (missing, bad_scale, short, extra):
        io.save(path, tensors, found.metadata)
        with pytest.raises(CheckpointError):
            load_quantized(str(path))
    io.save(path, found.tensors, {k: v for k, v in found.metadata.items() if k != "specs"})
    with pytest.raises(CheckpointError):
        load_quantized(str(path))


def test_errors_name_what_is_allowed(model, calibration):
    with pytest.raises(RangeError, match="2 to 8"):
        nearest(calibration, weight_bits=9)
    with pytest.raises(UnknownNameError, match="mse, minmax"):
        nearest(calibration, search="no-such")
    with pytest.raises(RangeError, match="images is 0"):
        CalibrationConfig(images=0)
    layer = wrap(model.network)[1]["conv_in"]
    with pytest.raises(ShapeError, match="conv_in"):
        layer.set_codes(np.zeros((2, 3, 3, 1), np.int8), minmax(np.zeros((2, 3, 3, 1)), QSpec(8, True, axis=0)))


def test_float_weights_are_made_when_they_are_asked_for():
    """Codes are what a layer has; an integer network never pays for float32 beside them."""
    codes = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    q = QParams(np.array([0.5, 1, 2], np.float32), np.zeros(3, np.int32), QSpec(4, signed=True, axis=0))
    weight = CodedWeight(codes, q)
    assert weight.shape == (3, 4) and weight._floats is None
    np.testing.assert_array_equal(weight.data, dequantize(codes, q))
    assert weight.data is weight.data and weight.dtype == np.float32
    weight.data = weight.data.astype(np.float64)
    assert weight.dtype == np.float64
