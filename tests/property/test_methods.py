"""Properties of whole methods over random tiny models."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TINY, tiny_model, tiny_session

from refquant.quant.calibrate import Calibration, CalibrationConfig
from refquant.quant.coverage import COVERAGES, coverage
from refquant.quant.methods import METHODS, methods_for

SHORT = {"tfmq": {"tiar_iterations": 1}, "ptqd": {"on": "squant", "images": 1}}
FEW = settings(max_examples=3 if settings().max_examples < 1000 else 100)  # each is a whole quantization or more


@st.composite
def calibrations(draw):
    """Of random models: one or two levels, with or without attention, any number of image channels, eps or v."""
    cfg = replace(
        TINY,
        image_size=4,
        multipliers=draw(st.sampled_from([(1,), (1, 2), (2, 1)])),
        attention=draw(st.sampled_from([(), (2, 4)])),
        image_channels=draw(st.integers(1, 3)),
    )
    model = tiny_model(cfg, seed=draw(st.integers(0, 99)), prediction=draw(st.sampled_from(["eps", "v"])))
    steps = draw(st.integers(1, 4))
    return Calibration(model, CalibrationConfig(images=draw(st.integers(1, 3)), steps=steps, every=2))


def quantized(name, calibration, **session):
    given = {"states": 1, "effort": {"iterations": 2}, **session}
    return METHODS[name](tiny_session(calibration, **given), **SHORT.get(name, {}))


def weight_error(made):
    original = made.base.network.state_dict()
    return sum(
        float(np.square(layer.layer.weight.data - original[f"{name}.weight"], dtype=np.float64).sum())
        for name, layer in made.layers.items()
    )


@pytest.mark.parametrize("name", methods_for("unet"))
@FEW
@given(calibrations(), st.integers(2, 8), st.sampled_from([2, 4, 8]), st.sampled_from(COVERAGES))
def test_codes_lie_in_range_and_float_layers_keep_every_bit(name, calibration, weight_bits, input_bits, policy):
    """qmin <= q <= qmax with the zero point a code; where coverage says float, the weight is the original array."""
    made = quantized(name, calibration, weight_bits=weight_bits, input_bits=input_bits, coverage=policy)
    kept = coverage(policy, made.base.network).float_weights
    original = made.base.network.state_dict()
    for layer_name, layer in made.layers.items():
        if layer_name in kept:
            assert layer.codes is None and layer.weight_qparams is None
            np.testing.assert_array_equal(layer.layer.weight.data, original[f"{layer_name}.weight"])
            continue
        spec = layer.weight_qparams.spec
        assert layer.codes.dtype == spec.dtype and spec.bits >= weight_bits
        assert spec.qmin <= layer.codes.min() and layer.codes.max() <= spec.qmax
        assert layer.weight_qparams.zero_is_exact
    for quantizer in made.quantizers().values():
        if quantizer.qparams is not None:
            assert quantizer.qparams.zero_is_exact and quantizer.qparams.scale > 0


@FEW
@given(calibrations(), st.sampled_from(["minmax", "mse"]))
def test_more_weight_bits_are_closer(calibration, search):
    """Nearest: the squared error of all weights falls with every bit."""
    errors = [
        weight_error(METHODS["nearest"](tiny_session(calibration, weight_bits=b, input_bits=32), search=search))
        for b in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * errors[0]


@FEW
@given(calibrations())
def test_eight_bits_answer_better_than_four(calibration):
    """Nearest: W8A8 is closer to the float model than W4A8, on the states of the trajectory itself."""
    model, trajectories = calibration.model, calibration.trajectories
    error = []
    for bits in (8, 4):
        eps, total = quantized("nearest", calibration, weight_bits=bits).denoiser(), 0.0
        for step, t in enumerate(trajectories.t.tolist()):
            x = trajectories.x[step]
            total += float(np.square(eps(x, t, step) - model.denoiser()(x, t, step), dtype=np.float64).sum())
        error.append(total)
    assert error[0] < error[1]


@FEW
@given(calibrations(), st.integers(0, 3))
def test_learned_codes_are_next_to_the_float_weights(calibration, seed):
    """BRECQ moves no weight by a whole step from where it was, clipping aside."""
    made = quantized("brecq", calibration, weight_bits=4, effort={"iterations": 3, "seed": seed})
    original = made.base.network.state_dict()
    for name, layer in made.layers.items():
        q, w = layer.weight_qparams, original[f"{name}.weight"]
        scale, zero = (p.reshape(-1, *[1] * (w.ndim - 1)).astype(np.float64) for p in (q.scale, q.zero_point))
        exact = np.clip(w / scale + zero, q.spec.qmin, q.spec.qmax)
        assert np.abs(layer.codes - exact).max() <= 1 + 1e-4
