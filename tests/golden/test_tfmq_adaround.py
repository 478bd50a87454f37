"""AdaRound, its schedule and the learned step size of TFMQ-DM's released code (see README.md here)."""

import json
from pathlib import Path

import numpy as np
import pytest
from asserts import assert_same_integers

from refquant.autograd import Tensor, gradients, nnops, ops
from refquant.quant.adaround import (
    beta_schedule,
    hard_codes,
    initial_alpha,
    rectified_sigmoid,
    rounding_is_active,
    rounding_regulariser,
    soft_weight,
)
from refquant.quant.affine import QParams, QSpec, dequantize
from refquant.quant.losses import reconstruction_loss
from refquant.quant.lsq import lsq

GOLDEN = json.loads((Path(__file__).parent / "tfmq.json").read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in GOLDEN["cases"]}


def floats(values):
    return np.array(values, np.float32)


def inputs_and_outputs(id_):
    case = CASES[id_]
    return case["inputs"], case["outputs"], case["rtol"]


def quantizer(inputs):
    return QParams(inputs["delta"], inputs["zero_point"], QSpec(inputs["bits"], axis=0))


def assert_close(got, want, rtol, size):
    """To the case's rtol, and 1e-6 of the largest input."""
    np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-6 * np.abs(size).max())


def test_init():
    inputs, want, rtol = inputs_and_outputs("adaround.init")
    w, q = floats(inputs["w"]), quantizer(inputs)
    alpha = initial_alpha(w, q)
    np.testing.assert_allclose(alpha, want["alpha"], rtol=rtol)  # h at 1e-5 would do, as the case's note says
    np.testing.assert_allclose(rectified_sigmoid(alpha), want["h"], atol=1e-6)
    assert_close(soft_weight(Tensor(alpha), w, q).data, want["soft"], rtol, w)
    codes = hard_codes(alpha, w, q)
    assert_close(dequantize(codes, q), want["hard"], rtol, w)
    assert_same_integers(codes, np.rint(floats(want["hard"]) / q.scale[:, None]).astype(int) + q.zero_point[:, None])


def test_rectified_sigmoid():
    inputs, want, rtol = inputs_and_outputs("adaround.rectified_sigmoid")
    alpha = floats(inputs["alpha"])
    np.testing.assert_allclose(rectified_sigmoid(alpha), want["h"], rtol=rtol, atol=2e-7)
    codes = hard_codes(alpha, np.zeros_like(alpha), QParams(1.0, 0, QSpec(4)))
    assert_same_integers(codes, np.array(want["hard"]).astype(int))
    for beta in inputs["betas"]:
        got = rounding_regulariser(Tensor(alpha), beta).item()
        np.testing.assert_allclose(got, want["reg_sum"][str(beta)], rtol=rtol)


def test_loss_and_gradient():
    inputs, want, rtol = inputs_and_outputs("adaround.loss_grad")
    x, w, b, q = floats(inputs["X"]), floats(inputs["w"]), floats(inputs["bias"]), quantizer(inputs)
    alpha = Tensor(floats(CASES["adaround.init"]["outputs"]["alpha"]), requires_grad=True)
    rec = reconstruction_loss(nnops.linear(x, soft_weight(alpha, w, q), b), nnops.linear(x, w, b).data)
    rounding = ops.scale(rounding_regulariser(alpha, inputs["beta"]), inputs["weight"])
    total = ops.add(rec, rounding)
    for name, got in {"rec": rec, "round": rounding, "total": total}.items():
        np.testing.assert_allclose(got.item(), want[name], rtol=rtol)
    (grad,) = gradients(total, [alpha])
    assert_close(grad, want["grad"], rtol, grad)


@pytest.mark.parametrize("id_", [id_ for id_ in CASES if id_.startswith("temp_decay.")])
def test_beta_schedule(id_):
    case, iterations = CASES[id_], int(id_.split(".")[1])
    warmup = 0.0 if "rel_start_decay=0" == case["desc"] else 0.2
    for k, beta in zip(case["inputs"]["t"], case["outputs"]["b"], strict=True):
        np.testing.assert_allclose(beta_schedule(k, iterations, warmup), beta, rtol=case["rtol"])
        assert rounding_is_active(k, iterations, warmup) == (k >= warmup * iterations)


def test_the_first_regularised_iteration_of_20000_is_number_4000():
    assert "first regularised iteration is number 4000" in CASES["temp_decay.20000"]["note"]
    assert [rounding_is_active(k, 20000) for k in (1, 3999, 4000, 20000)] == [False, False, True, True]


def test_learned_step():
    inputs, want, rtol = inputs_and_outputs("lsq.delta_grad")
    x = Tensor(floats(inputs["x"]), requires_grad=True)
    scale = Tensor(np.float32(want["delta"]), requires_grad=True)
    y = lsq(x, scale, int(want["zero_point"]), QSpec(inputs["bits"]))
    grad_x, grad_scale = gradients(ops.sum_all(ops.mul(y, floats(inputs["g"]))), [x, scale])
    assert_close(y.data, want["y"], rtol, x.data)
    np.testing.assert_allclose(grad_scale, want["grad_delta"], rtol=rtol)
    assert_close(grad_x, want["grad_x"], rtol, inputs["g"])
