"""Shortcut splitting of the released codes: two activation and two weight quantizers in one 1x1 convolution."""

import numpy as np
import pytest
from goldens import assert_close, cases, floats

from refquant.autograd import Tensor, nnops
from refquant.quant.affine import QSpec, fake_quantize
from refquant.quant.observers import mse
from refquant.quant.split import fake_quantize_split, observe_split


@pytest.mark.parametrize("case", cases("split."))
def test_split_convolution(case):
    inputs, want = case["inputs"], case["outputs"]
    x, w = (np.moveaxis(floats(inputs[name]), 1, -1) for name in ("x", "w"))  # NCHW, OCHW to channels last
    of_input, of_weight = QSpec(inputs["a_bits"]), QSpec(inputs["w_bits"], axis=0)
    channels = inputs["split"]

    q_x = observe_split(x, channels, lambda part: mse(part, of_input))
    q_w = observe_split(w, channels, lambda part: mse(part, of_weight))
    np.testing.assert_allclose([q.scale for q in q_x], want["act_delta"], rtol=case["rtol"])
    np.testing.assert_array_equal([q.zero_point for q in q_x], want["act_zp"])
    np.testing.assert_allclose(q_w[0].scale, want["w_delta0"], rtol=case["rtol"])
    np.testing.assert_allclose(q_w[1].scale, want["w_delta1"], rtol=case["rtol"])

    def conv(x, w):
        bias = Tensor(floats(inputs["bias"]))
        return np.moveaxis(nnops.conv2d(Tensor(x), Tensor(w), bias, 1, (0, 0, 0, 0)).data, -1, 1)

    in_float = conv(x, w)
    split = conv(fake_quantize_split(x, channels, q_x), fake_quantize_split(w, channels, q_w))
    whole = conv(fake_quantize(x, mse(x, of_input)), fake_quantize(w, mse(w, of_weight)))
    for name, got in {"out_fp": in_float, "out_split": split, "out_nosplit": whole}.items():
        assert_close(got, want[name], case, x)
    for name, got in {"mse_split": split, "mse_nosplit": whole}.items():
        np.testing.assert_allclose(np.mean((got - in_float) ** 2), want[name], rtol=1e-4)
