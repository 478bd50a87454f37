"""Scales, zero points, codes and fake-quantized values of TFMQ-DM's released code (see README.md here)."""

import numpy as np
import pytest
from asserts import assert_same_integers
from goldens import assert_close, assert_same_quantizer, cases, tensor

from refquant.quant.affine import QSpec, dequantize, fake_quantize, quantize
from refquant.quant.observers import SHRINK, minmax, mse
from refquant.quant.observers.ranges import affine_map


def released_mse(x, spec):
    return mse(x, spec, zero_in_range=False)


def observers(case, x):
    """The released search must match, and so must our default on tensors (or channels) that contain both signs."""
    if ".mse." not in case["id"]:
        return [minmax]
    channels = x.reshape(len(x), -1) if ".channelwise." in case["id"] else x.reshape(1, -1)
    both_signs = (channels.min(axis=1) < 0) & (channels.max(axis=1) > 0)
    return [mse, released_mse] if both_signs.all() else [released_mse]


def spec_of(inputs):
    """Released ``always_zero`` wins over ``symmetric``: codes from 0."""
    signed = inputs["symmetric"] and not inputs["always_zero"]
    return QSpec(inputs["bits"], signed=signed, symmetric=inputs["symmetric"] or inputs["always_zero"])


@pytest.mark.parametrize("case", cases("tfmq.minmax.", "tfmq.mse."))
def test_per_tensor(case):
    inputs, want = case["inputs"], case["outputs"]
    x, spec = tensor(inputs["x"]), spec_of(inputs)
    for observer in observers(case, x):
        q = observer(x, spec)
        assert_same_quantizer(q, want["delta"], want["zero_point"], case)
        codes = quantize(x, q)
        assert_same_integers(codes, np.array(want["q_int"]).astype(int), x=x, scale=q.scale)
        assert_close(dequantize(codes, q), want["dequant"], case, x)
        assert_close(fake_quantize(x, q), want["dequant"], case, x)


@pytest.mark.parametrize("case", cases("tfmq.mse."))
def test_search_finds_the_same_candidate_with_the_same_score(case):
    inputs, want = case["inputs"], case["outputs"]
    x, spec = tensor(inputs["x"]), spec_of(inputs)
    q, ends = released_mse(x, spec), SHRINK[want["grid_index"]] * np.float64([x.min(), x.max()])
    assert (q.scale, q.zero_point) == affine_map(*ends, spec)
    score = np.mean(np.abs(fake_quantize(x, q) - x).astype(np.float64) ** 2.4)
    np.testing.assert_allclose(score, want["lp2.4_score"], rtol=case["rtol"])


@pytest.mark.parametrize("case", cases("tfmq.channelwise."))
def test_per_output_channel(case):
    x, want = tensor(case["inputs"]["x"]), case["outputs"]
    for observer in observers(case, x):
        q = observer(x, QSpec(case["inputs"]["bits"], axis=0))
        assert_same_quantizer(q, want["delta"], want["zero_point"], case)
        assert_close(fake_quantize(x, q), want["dequant"], case, x)


# what ours return: the released result, or, where that code raises, what the docstrings of observers promise
DEGENERATE = {
    "tfmq.degenerate.zeros.minmax": (minmax, 1e-8, 0),
    "tfmq.degenerate.zeros.mse": (mse, 1e-8, 0),
    "tfmq.degenerate.const.minmax": (minmax, 0.5 / 255, 0),
    "tfmq.degenerate.const.mse": (mse, 0.5 / 255, 0),
}


@pytest.mark.parametrize("case", cases("tfmq.degenerate."))
def test_degenerate(case):
    observer, scale, zero_point = DEGENERATE[case["id"]]
    released = case["outputs"]["result"]
    if isinstance(released, str):
        assert released.startswith("TypeError")
    else:
        np.testing.assert_allclose([scale, zero_point], released, rtol=case["rtol"])
    q = observer(tensor(case["inputs"]["x"]), QSpec(case["inputs"]["bits"]))
    assert_same_quantizer(q, scale, zero_point, case)
