"""Codes, error sums and activation ranges of SQuant's released code (see README.md here)."""

import numpy as np
import pytest
from asserts import assert_same_integers
from goldens import GOLDEN, assert_close, cases, floats

from refquant.quant.affine import QSpec, dequantize, fake_quantize
from refquant.quant.methods.squant import grid, kernels, sigma_range, squant
from refquant.quant.observers import from_range

SHAPES = {"conv2x3x3x3": (2, 3, 3, 3), "linear3x10": (3, 10)}
MODES = {"squant-e": "e", "squant-k": "k", "squant-c": "c", "squant": "full"}


def ours(values, shape):
    """Their (O, C, kh, kw), or (O, C), in our layout."""
    array = np.array(values).reshape(shape)
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


@pytest.mark.parametrize("case", cases("squant.squant"))
def test_weights(case):
    inputs, want = case["inputs"], case["outputs"]
    name = inputs["w"].split()[0]
    weight = ours(floats(GOLDEN["tensors2"][name]), SHAPES[name])
    codes, q = squant(weight, inputs["bits"], MODES[inputs["mode"]])
    x, _ = grid(weight, inputs["bits"])
    np.testing.assert_allclose(1 / q.scale, want["scale"], rtol=case["rtol"])
    assert_same_integers(-q.zero_point, np.array(want["zero_point"]).astype(int))
    assert_same_integers(codes, ours(want["codes"], SHAPES[name]).astype(int), x=x)
    error = kernels(codes - x.astype(np.float64))
    # codes are exact, so 1e-6 is the float32 of their sums
    np.testing.assert_allclose(error.sum(axis=2).ravel(), want["kernel_err"], rtol=case["rtol"], atol=1e-6)
    np.testing.assert_allclose(error.sum(axis=(1, 2)), want["channel_err"], rtol=case["rtol"], atol=1e-6)
    assert np.abs(dequantize(codes, q) - weight).max() < q.scale.max()


@pytest.mark.parametrize("case", cases("squant.act."))
def test_activations(case):
    inputs, want = case["inputs"], case["outputs"]
    x = floats(inputs["x"])
    lo, hi = sigma_range(x, inputs["bits"], inputs["sigma"])
    np.testing.assert_allclose([lo, hi], [want["x_min"], want["x_max"]], rtol=case["rtol"])
    q = from_range(lo, hi, QSpec(inputs["bits"]))
    assert_close(fake_quantize(x, q), want["dequant"], case, x)
