"""Scales, zero points, codes and fake-quantized values of TFMQ-DM's released code (see README.md here)."""

import json
from pathlib import Path

import numpy as np
import pytest
from asserts import assert_same_integers

from refquant.quant.affine import QSpec, dequantize, fake_quantize, quantize
from refquant.quant.observers import SHRINK, from_range, minmax, mse

GOLDEN = json.loads((Path(__file__).parent / "tfmq.json").read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in GOLDEN["cases"]}


def released_mse(x, spec):
    return mse(x, spec, zero_in_range=False)


def cases(*families):
    return [case for id_, case in CASES.items() if id_.startswith(families)]


def observers(case):
    """The released search must match, and so must our default, for these tensors contain 0."""
    return [mse, released_mse] if ".mse." in case["id"] else [minmax]


def tensor(case):
    x = case["inputs"]["x"]
    return np.array(GOLDEN["tensors"][x.split()[0]] if isinstance(x, str) else x, dtype=np.float32)


def assert_close(got, want, case, x):
    atol = 1e-6 * np.abs(x).max()
    np.testing.assert_allclose(got, np.reshape(want, got.shape), rtol=case["rtol"], atol=atol)


@pytest.mark.parametrize("case", cases("tfmq.minmax.", "tfmq.mse."), ids=lambda c: c["id"])
def test_per_tensor(case):
    x, inputs, want = tensor(case), case["inputs"], case["outputs"]
    assert not inputs["always_zero"]
    spec = QSpec(inputs["bits"], signed=inputs["symmetric"], symmetric=inputs["symmetric"])
    for observer in observers(case):
        q = observer(x, spec)
        np.testing.assert_allclose(q.scale, want["delta"], rtol=case["rtol"])
        assert q.zero_point == want["zero_point"]
        codes = quantize(x, q)
        assert_same_integers(codes, np.array(want["q_int"]).astype(int), x=x, scale=q.scale)
        assert_close(dequantize(codes, q), want["dequant"], case, x)
        assert_close(fake_quantize(x, q), want["dequant"], case, x)


@pytest.mark.parametrize("case", cases("tfmq.mse."), ids=lambda c: c["id"])
def test_search_finds_the_same_candidate_with_the_same_score(case):
    x, inputs, want = tensor(case), case["inputs"], case["outputs"]
    spec = QSpec(inputs["bits"], signed=inputs["symmetric"], symmetric=inputs["symmetric"])
    q, r = mse(x, spec), SHRINK[want["grid_index"]]
    np.testing.assert_array_equal(q.scale, from_range(r * float(x.min()), r * float(x.max()), spec).scale)
    score = np.mean(np.abs(fake_quantize(x, q) - x).astype(np.float64) ** 2.4)
    np.testing.assert_allclose(score, want["lp2.4_score"], rtol=case["rtol"])


@pytest.mark.parametrize("case", cases("tfmq.channelwise."), ids=lambda c: c["id"])
def test_per_output_channel(case):
    x, want = tensor(case), case["outputs"]
    for observer in observers(case):
        q = observer(x, QSpec(case["inputs"]["bits"], axis=0))
        np.testing.assert_allclose(q.scale, want["delta"], rtol=case["rtol"])
        assert_same_integers(q.zero_point, np.array(want["zero_point"]).astype(int))
        assert_close(fake_quantize(x, q), want["dequant"], case, x)


# what ours return: the released result, or, where that code raises, what the docstrings of observers promise
DEGENERATE = {
    "tfmq.degenerate.zeros.minmax": (minmax, 1e-8, 0),
    "tfmq.degenerate.zeros.mse": (mse, 1e-8, 0),
    "tfmq.degenerate.const.minmax": (minmax, 0.5 / 255, 0),
    "tfmq.degenerate.const.mse": (mse, 0.5 / 255, 0),
}


@pytest.mark.parametrize("case", cases("tfmq.degenerate."), ids=lambda c: c["id"])
def test_degenerate(case):
    observer, scale, zero_point = DEGENERATE[case["id"]]
    released = case["outputs"]["result"]
    if isinstance(released, str):
        assert released.startswith("TypeError")
    else:
        np.testing.assert_allclose([scale, zero_point], released, rtol=case["rtol"])
    q = observer(tensor(case), QSpec(case["inputs"]["bits"]))
    np.testing.assert_allclose(q.scale, scale, rtol=case["rtol"])
    assert q.zero_point == zero_point
