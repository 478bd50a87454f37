"""Units of reconstruction: every layer in one, in order of execution; and the layers that see t alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TINY

from refquant.autograd import Tensor, ops
from refquant.errors import ShapeError, UnknownNameError
from refquant.nn.layers import Linear
from refquant.nn.unet import AttentionBlock, ResBlock, UNet
from refquant.quant.units import ORDERS, find_units, temporal_layers
from refquant.quant.wrap import rebuild, wrap


@st.composite
def networks(draw):
    """Small UNets with random weights: 1 to 3 levels, 1 or 2 blocks in each, attention anywhere or nowhere."""
    levels = draw(st.integers(1, 3))
    cfg = replace(
        TINY,
        multipliers=tuple(draw(st.lists(st.integers(1, 2), min_size=levels, max_size=levels))),
        blocks=draw(st.integers(1, 2)),
        attention=draw(st.sampled_from([(), (8,), (4,), (8, 4, 2)])),
        image_channels=draw(st.integers(1, 3)),
    )
    return UNet(cfg, np.random.default_rng(draw(st.integers(0, 9))))


def projections(network):
    return {f"{name}.temb_proj" for name, m in network.named_modules() if isinstance(m, ResBlock)}


@settings(max_examples=15)
@given(networks(), st.sampled_from(ORDERS))
def test_every_layer_is_in_exactly_one_unit(network, order):
    """A unit's layers lie below its module, and blocks are never cut."""
    wrapped, layers = wrap(network)
    units = find_units(wrapped, layers, order=order)
    names = [layer.name for unit in units for layer in unit.layers]
    assert sorted(names) == sorted(layers)
    modules = dict(wrapped.named_modules())
    for unit in units:
        assert unit.module is modules[unit.name]
        for layer in unit.layers:
            assert layer is layers[layer.name] and (layer.name + ".").startswith(unit.name + ".")
    blocks = {n for n, m in network.named_modules() if isinstance(m, (ResBlock, AttentionBlock))}
    assert blocks <= {unit.name for unit in units}


@settings(max_examples=15)
@given(networks())
def test_temporal_layers_are_the_time_mlp_and_all_projections(network):
    """Found by what they do; the names that the UNet gives them are the answer."""
    assert set(temporal_layers(network)) == {"temb.dense.0", "temb.dense.1"} | projections(network)


@settings(max_examples=10)
@given(networks())
def test_layers_left_out_are_in_no_unit(network):
    """`without` takes layers out of their blocks and leaves the blocks."""
    wrapped, layers = wrap(network)
    temporal = frozenset(temporal_layers(network))
    units = find_units(wrapped, layers, without=temporal)
    assert {layer.name for unit in units for layer in unit.layers} == set(layers) - temporal
    for unit in units:
        if isinstance(unit.module, ResBlock):
            assert f"{unit.name}.temb_proj" not in [layer.name for layer in unit.layers]


def test_order_of_execution_and_of_registration(model):
    """Execution goes up.1 before up.0, as the signal does; registration takes up.0 first."""
    wrapped, layers = wrap(model.network)
    execution = [unit.name for unit in find_units(wrapped, layers)]
    assert execution == [
        "temb.dense.0", "temb.dense.1", "conv_in", "down.0.block.0", "down.0.downsample.conv", "down.1.block.0",
        "down.1.attn.0", "mid.block_1", "mid.attn_1", "mid.block_2", "up.1.block.0", "up.1.attn.0", "up.1.block.1",
        "up.1.attn.1", "up.1.upsample.conv", "up.0.block.0", "up.0.block.1", "conv_out",
    ]  # fmt: skip
    registration = [unit.name for unit in find_units(wrapped, layers, order="registration")]
    assert sorted(registration) == sorted(execution)
    up = [name for name in registration if name.startswith("up.")]
    assert up == [
        "up.0.block.0", "up.0.block.1", "up.1.block.0", "up.1.block.1", "up.1.attn.0", "up.1.attn.1",
        "up.1.upsample.conv",
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match="execution, registration"):
        find_units(wrapped, layers, order="reversed")


# ------------------------------------------------------------------ networks that are not what they seem


class LeakyBlock(ResBlock):
    """The mutant: what its projection is told about t is mixed with a little of the image."""

    def __call__(self, x, temb, rng=None):
        leak = Tensor(1e-3 * x.data.mean(axis=(1, 2)))
        wide = Tensor(np.resize(leak.data, temb.shape))
        return super().__call__(x, ops.add(temb, wide), rng)


def leaky(network, at):
    def swap(name, module):
        if name != at:
            return None
        other = LeakyBlock.__new__(LeakyBlock)
        vars(other).update(vars(module))
        return other

    return rebuild(network, swap)


@pytest.mark.parametrize("at", ["down.0.block.0", "mid.block_2", "up.0.block.1"])
def test_a_temporal_block_that_reads_the_image_is_caught(model, at):
    """By its name it would be temporal; its input moves with x, so it is not listed, and all others are."""
    want = {"temb.dense.0", "temb.dense.1"} | projections(model.network)
    assert set(temporal_layers(leaky(model.network, at))) == want - {f"{at}.temb_proj"}


def test_a_layer_of_t_by_another_name_is_found(model):
    """A third linear layer in the time MLP is temporal, whatever it is called."""
    longer = rebuild(model.network, lambda name, module: None)
    width = 4 * model.network.cfg.channels
    longer.temb.dense = [*longer.temb.dense, Linear(np.random.default_rng(0), width, width)]
    mlp = type("Longer", (type(longer.temb),), {"__call__": lambda self, t: self.dense[2](self.short(t))})
    mlp.short = type(longer.temb).__call__
    longer.temb.__class__ = mlp
    assert temporal_layers(longer)[:3] == ["temb.dense.0", "temb.dense.1", "temb.dense.2"]


def test_a_network_without_a_time_embedding_says_so(model):
    """No layer sees t alone: one sentence, and what to do."""

    class Blind(type(model.network)):
        def __call__(self, x, t, rng=None):
            return self.conv_out(self.conv_in(x))

    network = rebuild(model.network, lambda name, module: None)
    network.__class__ = Blind
    with pytest.raises(ShapeError, match="no layer that sees the time-step alone.*Choose another method"):
        temporal_layers(network)
