"""Range estimators of the released codes: running, KL, histogram, Q-Diffusion's and PTQ4DM's searches."""

import numpy as np
import pytest
from goldens import CASES, assert_close, assert_same_quantizer, cases, floats, normal, tensor

from refquant.quant.affine import QSpec, fake_quantize
from refquant.quant.observers import RunningRange, histogram, kl, mse, ptq4dm, qdiffusion


@pytest.mark.parametrize("case", cases("tfmq.running_stat"))
def test_running_range(case):
    inputs, want = case["inputs"], case["outputs"]
    spec = QSpec(inputs["bits"], symmetric=case["id"].endswith("always_zero"))
    batches = floats(inputs["batches"])
    running = RunningRange(momentum=inputs["momentum"])
    running.update(batches[0])
    scale, zero_point, *ends = want["init_delta_zp_xmin_xmax"]
    assert_same_quantizer(mse(batches[0], spec, zero_in_range=False), scale, zero_point, case)  # overwritten below
    np.testing.assert_allclose(running.range(), ends, rtol=case["rtol"])
    for batch, (lo, hi, scale, zero_point) in zip(batches, want["trace_xmin_xmax_delta_zp"], strict=True):
        running.update(batch)
        np.testing.assert_allclose(running.range(), (lo, hi), rtol=case["rtol"])
        assert_same_quantizer(running.minmax(spec), scale, zero_point, case)
    assert_close(fake_quantize(batches[-1], running.minmax(spec)), want["last_dequant"], case, batches)


@pytest.mark.parametrize("case", cases("tfmq.kl.", "tfmq.hist."))
def test_histograms(case):
    outliers = np.random.RandomState(6).rand(512) < 0.02  # noqa: NPY002 - the case names this generator
    x = (normal(5, 512) * np.where(outliers, 6, 1)).astype(np.float32)
    estimator = {"kl": kl, "hist": histogram}[case["id"].split(".")[1]]
    spec = QSpec(case["inputs"]["level"].bit_length() - 1)
    assert_same_quantizer(estimator(x, spec, released=True), *case["outputs"]["result"], case)


def qdiffusion_search(x, inputs):
    bits, symmetric, method = inputs["n_bits"], inputs["symmetric"], inputs["scale_method"]
    if method == "mse" and symmetric:
        return qdiffusion.symmetric_mse_as_released(x, bits)
    spec = QSpec(bits, signed=symmetric, symmetric=symmetric)
    return qdiffusion.mse(x, spec) if method == "mse" else qdiffusion.max_range(x, spec, scaled="scale" in method)


@pytest.mark.parametrize("case", cases("qdiff."))
def test_qdiffusion(case):
    x, want = tensor(case["inputs"]["x"]), case["outputs"]
    q = qdiffusion_search(x, case["inputs"])
    assert_same_quantizer(q, want["delta"], want["zero_point"], case)
    assert_close(fake_quantize(x, q), want["dequant"], case, x)


def test_the_released_symmetric_mse_clips_all_positive_values():
    case = CASES["qdiff.mse.b8.sym.mixed"]
    x, want = tensor(case["inputs"]["x"]), floats(case["outputs"]["dequant"])
    assert (x > 0).sum() == 23 and (want[x > 0] == want.max()).all() and want.max() < 0


@pytest.mark.parametrize("case", cases("ptq4dm."))
def test_ptq4dm(case):
    inputs, want = case["inputs"], case["outputs"]
    per_channel = case["id"].endswith("channelwise")
    x = tensor(inputs["w" if per_channel else "x"])
    q = ptq4dm.search(
        x,
        QSpec(inputs["bits"], axis=0 if per_channel else None),
        symmetric=inputs.get("symmetric", ".sym." in case["id"]),
    )
    assert_same_quantizer(q, want["delta"], want["zero_point"], case)
    assert_close(fake_quantize(x, q), want["dequant"], case, x)
    assert ptq4dm.one_side(x) == want.get("one_side", "no")
