"""Split quantizers: each part as if it were alone, and together as one tensor; and the network that has them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import qspecs, tensors
from toys import TINY, tiny_model

from refquant.autograd import Tensor, nnops, no_grad
from refquant.errors import ShapeError
from refquant.quant.affine import QSpec, fake_quantize
from refquant.quant.observers import minmax
from refquant.quant.record import unit_inputs
from refquant.quant.split import fake_quantize_split, is_split, observe_split, split_shortcuts
from refquant.quant.wrap import wrap

concatenated = tensors(shape=hnp.array_shapes(min_dims=1, max_dims=4, min_side=2, max_side=5))


@given(concatenated, st.data(), qspecs())
def test_parts_are_quantized_each_by_itself(x, data, spec):
    """split(x) = concat(fq(x[..., :c]), fq(x[..., c:])), with the quantizers of the parts."""
    c = data.draw(st.integers(1, x.shape[-1] - 1))
    got = fake_quantize_split(x, c, observe_split(x, c, lambda part: minmax(part, spec)))
    for part, same in ((x[..., :c], got[..., :c]), (x[..., c:], got[..., c:])):
        np.testing.assert_array_equal(same, fake_quantize(part, minmax(part, spec)))


@given(concatenated, st.data(), qspecs())
def test_equal_quantizers_are_no_split(x, data, spec):
    """q_0 = q_1 gives fq(x)."""
    c, q = data.draw(st.integers(1, x.shape[-1] - 1)), minmax(x, spec)
    np.testing.assert_array_equal(fake_quantize_split(x, c, (q, q)), fake_quantize(x, q))


@given(st.integers(1, 5), st.integers(0, 2**31))
def test_the_convolution_is_two_convolutions_added(c, seed):
    """conv(x^, w^) = conv(x^[..., :c], w^[..., :c]) + conv(x^[..., c:], w^[..., c:]): one scale for each sum."""
    rng = np.random.default_rng(seed)
    x, w = 30 * rng.standard_normal((2, 3, 3, 6)), rng.standard_normal((4, 1, 1, 6))
    x[..., c:] /= 40
    q_x = observe_split(x, c, lambda part: minmax(part, QSpec(8)))
    q_w = observe_split(w, c, lambda part: minmax(part, QSpec(4, axis=0)))
    x_hat, w_hat = (fake_quantize_split(a, c, q).astype(np.float64) for a, q in ((x, q_x), (w, q_w)))

    def conv(x, w):
        return nnops.conv2d(Tensor(x), Tensor(w), Tensor(np.zeros(4)), 1, (0, 0, 0, 0)).data

    parts = conv(x_hat[..., :c], w_hat[..., :c]) + conv(x_hat[..., c:], w_hat[..., c:])
    np.testing.assert_allclose(conv(x_hat, w_hat), parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "channels"), [((2, 4), 0), ((2, 4), 4), ((2, 4), -1), ((), 1), ((3, 1), 1)])
def test_both_parts_need_a_channel(shape, channels):
    with pytest.raises(ShapeError, match="both parts need a channel"):
        observe_split(np.zeros(shape), channels, lambda part: minmax(part, QSpec()))
    with pytest.raises(ShapeError, match="both parts need a channel"):
        fake_quantize_split(np.zeros(shape), channels, (minmax([1.0], QSpec()),) * 2)


# ------------------------------------------------------------------ the network with split shortcuts

UP = {"up.1.block.0": 16, "up.1.block.1": 16, "up.0.block.0": 16, "up.0.block.1": 8}  # channels of h


def answer(network, seed=0):
    cfg = network.cfg
    x = np.random.default_rng(seed).standard_normal((3, cfg.image_size, cfg.image_size, cfg.image_channels))
    with no_grad():
        return network(Tensor(x.astype(np.float32)), np.array([0, 7, 19])).data


def test_parts_of_a_weight_are_the_weight(model):
    """Concatenated they are the original, cut where h ends; the bias is added once; the down path is as it was."""
    split, original = split_shortcuts(model).network.state_dict(), model.network.state_dict()
    for block, channels in UP.items():
        name = f"{block}.nin_shortcut"
        parts = [split.pop(f"{name}.part.{i}.weight") for i in (0, 1)]
        assert parts[0].shape[-1] == channels
        np.testing.assert_array_equal(np.concatenate(parts, axis=-1), original.pop(f"{name}.weight"))
        np.testing.assert_array_equal(split.pop(f"{name}.part.0.bias"), original.pop(f"{name}.bias"))
        np.testing.assert_array_equal(split.pop(f"{name}.part.1.bias"), 0)
    assert split.keys() == original.keys() and "down.1.block.0.nin_shortcut.weight" in split
    for name, array in original.items():
        assert split[name] is array


@pytest.mark.parametrize(
    "cfg", [TINY, replace(TINY, multipliers=(1, 2, 3), blocks=2), replace(TINY, multipliers=(2,), attention=())]
)
def test_the_split_network_computes_the_same(cfg):
    """To sums of float32; it is another network by name, and the original is not touched."""
    model = tiny_model(cfg)
    before = answer(model.network)
    split = split_shortcuts(model)
    assert is_split(split.network) and not is_split(model.network)
    np.testing.assert_allclose(answer(split.network), before, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(answer(model.network), before)
    assert split.schedule is model.schedule and split.prediction == model.prediction


@pytest.mark.parametrize("block", UP)
def test_with_equal_quantizers_the_split_layer_is_the_unsplit_one(model, calibration, block):
    """Codes of both parts are those of the whole; so are outputs, to sums of float32."""
    name = f"{block}.nin_shortcut"
    whole = wrap(model.network)[1][name]
    weights = minmax(whole.layer.weight.data, QSpec(4, signed=True, axis=0))
    (x,) = unit_inputs(model.network, name, calibration.trajectories.at([0, 3]))
    inputs = minmax(x, QSpec(6))
    network, layers = wrap(split_shortcuts(model).network)
    parts = [layers[f"{name}.part.{i}"] for i in (0, 1)]
    for layer in (whole, *parts):
        layer.quantize_weight(weights)
        layer.input.set(inputs)
    np.testing.assert_array_equal(np.concatenate([p.codes for p in parts], axis=-1), whole.codes)
    with no_grad():
        got, want = dict(network.named_modules())[name](Tensor(x)), whole(Tensor(x))
    np.testing.assert_allclose(got.data, want.data, rtol=1e-4, atol=1e-5)


def test_ranges_of_the_parts_are_their_own(model, calibration):
    """What `observed` says of a part is the min-max of its share of the channels, and of the whole the larger one."""
    seen = calibration.observed(split_shortcuts(model).network)
    for block in UP:
        whole = calibration.inputs[f"{block}.nin_shortcut.input"]
        parts = [seen[f"{block}.nin_shortcut.part.{i}.input"] for i in (0, 1)]
        scales = [float(p.minmax(QSpec(8)).scale) for p in parts]
        assert scales[0] != scales[1]
        assert max(scales) <= float(whole.minmax(QSpec(8)).scale) * (1 + 1e-5)
