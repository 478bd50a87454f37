"""BRECQ: nearest ranges, learned rounding, by block or by layer; and the method that it is a special case of."""

import numpy as np
import pytest
from toys import tiny_session

import refquant.quant.blocks as blocks
from refquant.quant.methods import METHODS


def quantized(calibration, name="brecq", **options):
    return METHODS[name](tiny_session(calibration, weight_bits=3, effort={"iterations": 8}), **options)


def same(a, b):
    """Codes, scales and ranges of two models, bit for bit."""
    for name, layer in a.layers.items():
        np.testing.assert_array_equal(layer.codes, b.layers[name].codes)
        np.testing.assert_array_equal(layer.weight_qparams.scale, b.layers[name].weight_qparams.scale)
    for name, q in a.quantizers().items():
        assert q.qparams.scale == b.quantizers()[name].qparams.scale
        assert q.qparams.zero_point == b.quantizers()[name].qparams.zero_point


def test_scales_and_ranges_are_those_of_nearest(calibration):
    """Learning moves codes, and nothing else."""
    learned, nearest = quantized(calibration), METHODS["nearest"](tiny_session(calibration, weight_bits=3))
    moved = 0
    for name, layer in learned.layers.items():
        other = nearest.layers[name]
        np.testing.assert_array_equal(layer.weight_qparams.scale, other.weight_qparams.scale)
        np.testing.assert_array_equal(layer.weight_qparams.zero_point, other.weight_qparams.zero_point)
        assert layer.input.qparams.scale == other.input.qparams.scale
        moved += int((layer.codes != other.codes).sum())
    assert moved > 0


@pytest.mark.parametrize(("grain", "most"), [("layer", 1), ("block", 4)])
def test_grain(calibration, monkeypatch, grain, most):
    """AdaRound learns one layer at a time; BRECQ the four of a ResBlock with a shortcut. Each layer once."""
    given, original = [], blocks.reconstruct

    def spy(forward, layers, *rest, **options):
        given.append([layer.name for layer in layers])
        return original(forward, layers, *rest, **options)

    monkeypatch.setattr(blocks, "reconstruct", spy)
    made = METHODS["brecq"](tiny_session(calibration, effort={"iterations": 1}), grain=grain)
    assert max(map(len, given)) == most
    assert sorted(name for layers in given for name in layers) == sorted(made.layers)


def test_importance_with_the_plain_loss_is_brecq(calibration):
    """The same states and the same squared error."""
    same(quantized(calibration, "importance", loss="mse"), quantized(calibration))


@pytest.mark.parametrize(("name", "changed"), [("importance", {}), ("brecq", {"sampling": "uniform"})])
def test_each_kind_of_importance_changes_codes(calibration, name, changed):
    """Or the test above would say nothing."""
    session = tiny_session(calibration, weight_bits=3, effort={"iterations": 8}, **changed)
    other, brecq = METHODS[name](session), quantized(calibration)
    assert any(not np.array_equal(la.codes, brecq.layers[name].codes) for name, la in other.layers.items())
