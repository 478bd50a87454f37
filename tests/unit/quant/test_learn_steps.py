"""Learned activation steps: the gradient of the surrogate, Adam's first move, and what stays as it was."""

import numpy as np
import pytest
from toys import tiny_session

import refquant.quant.learn_steps as module
from refquant.errors import RangeError
from refquant.quant.learn_steps import POWER, learn_steps
from refquant.quant.record import pick, unit_inputs, unit_output
from refquant.quant.units import find_units
from refquant.quant.wrap import activation_quantizers


@pytest.fixture
def run(calibration):
    made = tiny_session(calibration, weight_bits=4, input_bits=4).start("any")
    made.nearest_weights()
    made.shared_inputs()
    return made


@pytest.fixture
def states(calibration):
    return pick(calibration.trajectories, 6, 0)


def unit_of(run, name):
    return next(unit for unit in find_units(run.network, run.layers) if unit.name == name)


def numbers(run):
    return {name: (q.qparams.scale, q.qparams.zero_point) for name, q in activation_quantizers(run.network).items()}


def test_gradient_of_the_scale_is_that_of_the_surrogate(run, states):
    """One linear layer, by hand: d x^ / d s = round(v) - v inside of the codes, the code minus z outside."""
    unit = unit_of(run, "temb.dense.1")
    (x,), y = unit_inputs(run.model.network, unit.name, states), unit_output(run.model.network, unit.name, states)
    layer, q = unit.layers[0], unit.layers[0].input.qparams
    for scale in (q.scale, q.scale * np.float32(0.6)):  # the second one clips
        chosen = np.array([4, 1, 2])
        _, found = module._differentiate(unit, [layer.input], np.array([scale]), (x,), y, chosen)
        v = x[chosen].astype(np.float64) / scale
        codes = np.clip(np.rint(v) + q.zero_point, 0, 15)
        inside = np.rint(v) + q.zero_point == codes
        slope = np.where(inside, np.rint(v) - v, codes - q.zero_point)
        w, b = layer.layer.weight.data.astype(np.float64), layer.layer.bias.data.astype(np.float64)
        error = (codes - q.zero_point) * scale @ w.T + b - y[chosen]
        by_output = POWER * np.sign(error) * np.abs(error) ** (POWER - 1) / len(chosen)
        np.testing.assert_allclose(found, [(by_output @ w * slope).sum()], rtol=1e-3)
    assert (~inside).any() and layer.input.learned is None


def test_the_first_step_of_adam_moves_every_scale_by_the_rate(run, states):
    """s becomes s (1 +- rate), whatever its size; zero points and weights stay."""
    before, weights = numbers(run), {n: la.codes.copy() for n, la in run.layers.items()}
    learn_steps(run, find_units(run.network, run.layers), states, 1, rate=0.01)
    moved = 0
    for name, (scale, zero_point) in numbers(run).items():
        factor = scale / before[name][0]
        assert min(abs(factor - 0.99), abs(factor - 1.01)) < 1e-4 or factor == 1
        moved += factor != 1
        assert zero_point == before[name][1]
    assert moved > 0.9 * len(before)  # a gradient of exactly 0 moves nothing
    for name, layer in run.layers.items():
        np.testing.assert_array_equal(layer.codes, weights[name])


def test_layers_and_products_of_attention_learn(run, states):
    """A unit of one layer, and the four quantizers of an attention product."""
    before = numbers(run)
    for name in ("conv_in", "mid.attn_1"):
        learn_steps(run, [unit_of(run, name)], states, 1)
    changed = {name for name, (scale, _) in numbers(run).items() if scale != before[name][0]}
    assert "conv_in.input" in changed and all(n == "conv_in.input" or n.startswith("mid.attn_1.") for n in changed)
    assert {f"mid.attn_1.product.{part}" for part in ("q", "k", "v")} <= changed


def test_learning_lowers_the_loss_of_a_badly_scaled_layer(run, states):
    """A step ten times too small clips nearly everything; 40 iterations make it wider, and the error smaller."""
    unit = unit_of(run, "temb.dense.1")
    q = unit.layers[0].input
    q.set(type(q.qparams)(q.qparams.scale / 10, q.qparams.zero_point, q.qparams.spec))
    (x,), y = unit_inputs(run.model.network, unit.name, states), unit_output(run.model.network, unit.name, states)

    def loss():
        return module._differentiate(unit, [q], np.array([q.qparams.scale]), (x,), y, np.arange(len(y)))[0]

    before, scale = loss(), q.qparams.scale
    learn_steps(run, [unit], states, 40, rate=0.2)
    assert loss() < 0.5 * before and q.qparams.scale > scale


def test_scales_stay_positive(run, states):
    learn_steps(run, find_units(run.network, run.layers), states, 6, rate=0.1)
    assert all(scale > 0 and np.isfinite(scale) for scale, _ in numbers(run).values())


def test_a_step_that_learning_drives_to_zero_is_one_clear_error(run, states, monkeypatch):
    """And no quantizer is left with a leaf of the tape."""
    monkeypatch.setattr(module.Adam, "update", lambda self, values, *_: values.__isub__(2))
    with pytest.raises(RangeError, match="learned step is .* must be positive"):
        learn_steps(run, [unit_of(run, "mid.block_1")], states, 2)
    assert all(q.learned is None for q in activation_quantizers(run.network).values())


def test_units_without_quantizers_are_left_out(calibration, states):
    run = tiny_session(calibration, input_bits=32).start("any")
    run.nearest_weights()
    learn_steps(run, find_units(run.network, run.layers), states, 1)
    assert all(q.qparams is None for q in activation_quantizers(run.network).values())


@pytest.mark.parametrize(("iterations", "rate"), [(0, 0.1), (1, 0.0), (1, 1.0), (1, np.nan)])
def test_what_is_refused(run, states, iterations, rate):
    with pytest.raises(RangeError, match="at least 1, and a rate in"):
        learn_steps(run, [], states, iterations, rate)
