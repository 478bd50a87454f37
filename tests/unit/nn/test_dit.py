"""The diffusion transformer against the published one: names, sizes, formulas; then its gradients and its manners."""

import json
import math

import numpy as np
import pytest

from refquant.autograd import Tensor, check_gradients, gradients, nnops, no_grad, ops
from refquant.errors import CheckpointError, RangeError, ShapeError
from refquant.nn.dit import (
    DiT,
    DiTBlock,
    DiTConfig,
    parameter_shapes,
    position_embedding,
    timestep_embedding,
    unpatchify,
)
from refquant.nn.networks import CONFIGS, KINDS, build, config, config_from_json
from refquant.quant.wrap import activation_quantizers, wrap

TINY = DiTConfig(4, 2, patch=2, width=8, depth=2, heads=2, mlp_ratio=2, classes=3)
UNCONDITIONAL = DiTConfig(6, 1, patch=3, width=4, depth=1, heads=1)
SIGMA = DiTConfig(4, 2, patch=2, width=8, depth=1, heads=4, classes=2, learn_sigma=True)


def randomised(module, dtype=np.float32, seed=7):
    """Random values everywhere: at its initialisation the network answers 0."""
    rng = np.random.default_rng(seed)
    for p in module.parameters():
        p.data = (rng.standard_normal(p.shape) / np.sqrt(np.prod(p.shape[1:]) if p.ndim > 1 else 4)).astype(dtype)
    return module


def tiny(dtype=np.float32, cfg=TINY):
    return randomised(DiT(cfg, np.random.default_rng(0)), dtype)


def images(n, cfg=TINY, dtype=np.float32, seed=1):
    x = np.random.default_rng(seed).standard_normal((n, cfg.image_size, cfg.image_size, cfg.image_channels))
    return x.astype(dtype)


# ---------------------------------------------------------------- the network of the paper


CASES = {"classes": TINY, "no classes": UNCONDITIONAL, "variances": SIGMA, "mnist-dit": config("mnist-dit")}


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_the_list_of_parameters_is_that_of_the_network(cfg):
    """Names, shapes and order."""
    shapes = {name: p.shape for name, p in DiT(cfg, np.random.default_rng(0)).named_parameters()}
    assert list(shapes.items()) == list(parameter_shapes(cfg).items())


def test_dit_xl_2_has_the_parameters_of_the_paper():
    """675,129,632 in the published module, the 256 x 1152 fixed numbers of pos_embed among them."""
    cfg = config("dit-xl-2")
    learned = sum(math.prod(shape) for shape in parameter_shapes(cfg).values())
    assert (learned, cfg.tokens * cfg.width) == (674_834_720, 294_912)
    assert learned + cfg.tokens * cfg.width == 675_129_632


@pytest.mark.parametrize(
    "name, shape",
    [
        ("x_embedder.proj.weight", (1152, 2, 2, 4)),  # (1152, 4, 2, 2) there
        ("x_embedder.proj.bias", (1152,)),
        ("t_embedder.mlp.0.weight", (1152, 256)),
        ("t_embedder.mlp.2.bias", (1152,)),
        ("y_embedder.embedding_table.weight", (1001, 1152)),
        ("blocks.0.attn.qkv.weight", (3456, 1152)),
        ("blocks.0.attn.qkv.bias", (3456,)),
        ("blocks.13.attn.proj.weight", (1152, 1152)),
        ("blocks.27.mlp.fc1.weight", (4608, 1152)),
        ("blocks.27.mlp.fc2.weight", (1152, 4608)),
        ("blocks.27.adaLN_modulation.1.weight", (6912, 1152)),
        ("final_layer.linear.weight", (32, 1152)),
        ("final_layer.adaLN_modulation.1.bias", (2304,)),
    ],
)
def test_names_are_those_of_the_published_checkpoints(name, shape):
    """facebookresearch/DiT models.py:145-235, but for the order of the first layer's axes."""
    assert parameter_shapes(config("dit-xl-2"))[name] == shape


def test_there_is_nothing_else():
    """Four embeddings' arrays and a table, ten a block, four at the end; no null class without classes."""
    names = parameter_shapes(config("dit-xl-2"))
    assert len(names) == 6 + 1 + 28 * 10 + 4
    assert not any(name.startswith("y_embedder") for name in parameter_shapes(UNCONDITIONAL))


def test_mnist_dit_is_small():
    """0.3 to 2 million parameters."""
    assert sum(math.prod(shape) for shape in parameter_shapes(config("mnist-dit")).values()) == 1_060_816


# ---------------------------------------------------------------- what is fixed


def test_positions_are_the_published_ones():
    """Feature by feature: a quarter each of sin and cos of the column, then of the row, over 10000^(4 j / D)."""
    width, side = 12, 5
    table = position_embedding(width, side)
    assert table.shape == (25, 12) and table.dtype == np.float32
    for row in range(side):
        for column in range(side):
            for feature in range(width):
                quarter, j = divmod(feature, 3)
                angle = (column if quarter < 2 else row) / 10000 ** (j / 3)
                want = (math.sin, math.cos)[quarter % 2](angle)
                assert abs(table[row * side + column, feature] - want) < 1e-6


def test_timestep_embedding_is_the_published_one():
    """cos first, then sin, of t / 10000^(j / 128)."""
    got = timestep_embedding(np.array([0, 1, 437]))
    assert got.shape == (3, 256) and got.dtype == np.float32
    for i, t in enumerate((0, 1, 437)):
        for j in (0, 1, 77, 127):
            angle = t * 10000 ** (-j / 128)
            np.testing.assert_allclose(got[i, [j, 128 + j]], [math.cos(angle), math.sin(angle)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size, patch, channels", [(4, 2, 1), (6, 2, 3), (28, 4, 1), (6, 6, 2)])
def test_unpatchify_undoes_the_cutting(size, patch, channels):
    """The windows of a convolution of stride p, features by row, column, channel, go back to their places."""
    x = np.arange(2 * size * size * channels, dtype=np.float32).reshape(2, size, size, channels)
    windows = nnops.unfold(x, patch, patch, patch, (0, 0, 0, 0)).reshape(2, -1, patch * patch * channels)
    np.testing.assert_array_equal(unpatchify(Tensor(windows), patch).data, x)


def test_position_reaches_the_tokens():
    """The first block receives patch · weight + bias + position, patch after patch, row by row."""
    net, x = tiny(), images(1)
    seen = []
    net.blocks[0] = lambda h, c: seen.append(h.data) or h
    net(Tensor(x), np.array([3]))
    proj, positions = net.x_embedder.proj, position_embedding(8, 2)
    for i, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        patch = x[0, row : row + 2, column : column + 2].ravel()
        want = proj.weight.data.reshape(8, -1) @ patch + proj.bias.data + positions[i]
        np.testing.assert_allclose(seen[0][0, i], want, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- initialisation


def test_a_new_network_is_the_identity_and_answers_0():
    """adaLN-Zero: every block gives back the bits it was given, for any condition; all outputs are 0."""
    rng = np.random.default_rng(0)
    net = DiT(TINY, rng)
    x, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 8), (3, 8)))
    for block in net.blocks:
        np.testing.assert_array_equal(block(Tensor(x), Tensor(c)).data, x)
    y = net(Tensor(images(2)), np.array([0, 999]), y=np.array([0, 2])).data
    np.testing.assert_array_equal(y, np.zeros((2, 4, 4, 2), np.float32))


def test_initial_weights_are_the_published_ones():
    """Xavier's bound (the patches' layer as a linear one), deviation 0.02, zeros."""
    net = DiT(DiTConfig(8, 1, patch=4, width=64, depth=1, heads=4, classes=9), np.random.default_rng(0))
    state = net.state_dict()
    for name, fans in (("x_embedder.proj", 16 + 64), ("blocks.0.attn.qkv", 64 + 192), ("blocks.0.mlp.fc2", 64 + 256)):
        bound = math.sqrt(6 / fans)
        assert 0.97 * bound < np.abs(state[f"{name}.weight"]).max() <= bound
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert abs(state[name].std() / 0.02 - 1) < 0.1
    zeros = {name for name, a in state.items() if not a.any()}
    assert zeros == {name for name in state if name.endswith(".bias") or "adaLN" in name or name.startswith("final")}


# ---------------------------------------------------------------- a block, written out


def test_a_block_is_its_formula():
    """Token by token and head by head in float64: shift, scale, gate for attention, then for the MLP."""
    rng = np.random.default_rng(3)
    cfg = DiTConfig(4, 1, patch=2, width=12, depth=1, heads=3, mlp_ratio=2)
    block = randomised(DiTBlock(rng, cfg), np.float64)
    x, c = rng.standard_normal((2, 5, 12)), rng.standard_normal((2, 12))
    p = {name: a.data for name, a in block.named_parameters()}

    def norm(v):
        return (v - v.mean()) / math.sqrt(((v - v.mean()) ** 2).mean() + 1e-6)

    def gelu(v):
        return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    want = x.copy()
    for n in range(2):
        s = np.array([v / (1 + math.exp(-v)) for v in c[n]])
        m = p["adaLN_modulation.1.weight"] @ s + p["adaLN_modulation.1.bias"]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (m[12 * i : 12 * i + 12] for i in range(6))
        h = [norm(token) * (1 + scale_1) + shift_1 for token in want[n]]
        q, k, v = (
            [p["attn.qkv.weight"][i : i + 12] @ token + p["attn.qkv.bias"][i : i + 12] for token in h]
            for i in (0, 12, 24)
        )
        attended = np.zeros((5, 12))
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            for i in range(5):
                e = [math.exp(q[i][part] @ k[j][part] / math.sqrt(4)) for j in range(5)]
                attended[i, part] = sum(e[j] * v[j][part] for j in range(5)) / sum(e)
        for i in range(5):
            want[n, i] += gate_1 * (p["attn.proj.weight"] @ attended[i] + p["attn.proj.bias"])
            inner = p["mlp.fc1.weight"] @ (norm(want[n, i]) * (1 + scale_2) + shift_2) + p["mlp.fc1.bias"]
            hidden = np.array([gelu(u) for u in inner])
            want[n, i] += gate_2 * (p["mlp.fc2.weight"] @ hidden + p["mlp.fc2.bias"])
    np.testing.assert_allclose(block(Tensor(x), Tensor(c)).data, want, rtol=0, atol=1e-12)


def test_the_final_layer_shifts_and_scales():
    """Linear(LN(x) (1 + scale) + shift) with (shift, scale) = Linear(SiLU(c)), in this order."""
    rng = np.random.default_rng(3)
    final = randomised(DiT(TINY, rng).final_layer, np.float64)
    x, c = rng.standard_normal((2, 4, 8)), rng.standard_normal((2, 8))
    m = (c / (1 + np.exp(-c))) @ final.adaLN_modulation[1].weight.data.T + final.adaLN_modulation[1].bias.data
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    want = (normed * (1 + m[:, None, 8:]) + m[:, None, :8]) @ final.linear.weight.data.T + final.linear.bias.data
    np.testing.assert_allclose(final(Tensor(x), Tensor(c)).data, want, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- gradients


def test_gradients_of_a_whole_network():
    """Loss -> every parameter and x, float64, with classes dropped from a fixed seed."""
    net, t, y = tiny(np.float64), np.array([3, 700, 20]), np.array([0, 2, 2])
    check_gradients(
        lambda x, *_: net(x, t, np.random.default_rng(5), y=y),
        images(3, dtype=np.float64),
        *net.parameters(),
        per_index_limit=0,  # a direction per array; element by element is done for each operation
        name="dit",
    )


def test_every_parameter_receives_a_gradient():
    """dL/dp is not zero, save for the keys' biases: softmax ignores what all scores of a query share."""
    net = tiny(np.float64)
    y = net(Tensor(images(2, dtype=np.float64)), np.array([3, 700]), y=np.array([1, 3]))
    found = gradients(ops.mean_all(ops.square(y)), net.parameters())
    for (name, p), g in zip(net.named_parameters(), found, strict=True):
        silent = np.abs(g).max(axis=tuple(range(1, p.ndim))) < 1e-12
        want = np.zeros(len(g), bool)
        if name.endswith("qkv.bias"):
            want[8:16] = True
        if name.startswith("y_embedder"):
            want[[0, 2]] = True  # classes that no image has
        np.testing.assert_array_equal(silent, want, err_msg=name)


# ---------------------------------------------------------------- classes


def test_time_and_class_reach_their_own_image_only():
    net, x = tiny(), np.repeat(images(1), 4, axis=0)
    out = net(Tensor(x), np.array([0, 500, 0, 0]), y=np.array([1, 1, 2, 1])).data
    np.testing.assert_allclose(out[0], out[3], atol=1e-5)
    assert np.abs(out[0] - out[1]).max() > 1e-2 and np.abs(out[0] - out[2]).max() > 1e-2


def test_no_class_is_the_last_id():
    net, x, t = tiny(), Tensor(images(2)), np.array([3, 700])
    np.testing.assert_array_equal(net(x, t).data, net(x, t, y=np.array([3, 3])).data)
    assert np.abs(net(x, t).data - net(x, t, y=np.array([2, 0])).data).max() > 1e-2


def test_classes_are_dropped_in_training_only():
    """With a generator, each with probability 0.1 (5 standard deviations of 2,000 draws); without, none."""
    net = tiny()
    taken = []
    net.y_embedder = lambda y: taken.append(y) or Tensor(np.zeros((len(y), 8), np.float32))
    x, y = Tensor(np.zeros((2000, 4, 4, 2), np.float32)), np.resize([0, 1, 2], 2000)
    net.blocks, t = [], np.zeros(2000, int)
    net(x, t, y=y)
    for seed in (0, 0, 1):
        net(x, t, np.random.default_rng(seed), y=y)
    kept, first, again, other = taken
    np.testing.assert_array_equal(kept, y)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    dropped = first != y
    assert set(first[dropped]) == {3} and abs(dropped.mean() - 0.1) < 5 * math.sqrt(0.09 / 2000)


@pytest.mark.parametrize("y", [[0, -1], [0, 4], [1], [[0, 1]], [0.0, 1.0]], ids=str)
def test_classes_that_do_not_exist_are_refused(y):
    with pytest.raises(RangeError, match="integers from 0 to 3"):
        tiny()(Tensor(images(2)), np.array([0, 1]), y=np.array(y))


def test_an_unconditional_network_takes_no_classes():
    net, x = tiny(cfg=UNCONDITIONAL), Tensor(images(2, UNCONDITIONAL))
    assert np.abs(net(x, np.array([0, 1])).data).max() > 0.1
    with pytest.raises(RangeError, match="unconditional"):
        net(x, np.array([0, 1]), y=np.array([0, 0]))


def test_variances_double_the_channels():
    assert tiny(cfg=SIGMA)(Tensor(images(2, SIGMA)), np.array([0, 1])).shape == (2, 4, 4, 4)


# ---------------------------------------------------------------- manners


def test_calling_twice_gives_the_same_bits():
    net, x, t, y = tiny(), Tensor(images(2)), np.array([10, 900]), np.array([0, 1])
    first, second = net(x, t, y=y), net(x, t, y=y)
    with no_grad():
        third = net(x, t, y=y)
    assert third._parents == ()
    for other in (second, third):
        np.testing.assert_array_equal(first.data, other.data)


def test_images_of_a_batch_do_not_meet():
    """f(x)_i = f(x_i), up to the order of sums (1e-5 of the largest): heads are unfolded to their own images."""
    net, x, t, y = tiny(), images(3), np.array([0, 500, 999]), np.array([0, 1, 3])
    together = net(Tensor(x), t, y=y).data
    alone = np.concatenate([net(Tensor(x[i : i + 1]), t[i : i + 1], y=y[i : i + 1]).data for i in range(3)])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_quantizers_find_their_places():
    """Wrapped, it gives the same bits; every linear layer and both products of attention have quantizers."""
    net, x, t = tiny(), Tensor(images(2)), np.array([10, 900])
    wrapped, layers = wrap(net)
    np.testing.assert_array_equal(wrapped(x, t, y=np.array([0, 1])).data, net(x, t, y=np.array([0, 1])).data)
    assert len(layers) == 1 + 2 + 2 * 5 + 2
    names = activation_quantizers(wrapped)
    assert {f"blocks.1.attn.product.{part}" for part in ("q", "k", "v", "probs")} <= names.keys()
    assert "blocks.0.adaLN_modulation.1.input" in names
    seen = {}
    for quantizer in names.values():
        quantizer.watcher = lambda key, value: seen.update({key: value.shape})
    got = wrapped(x, t, y=np.array([0, 1])).data  # watched attention is computed in steps
    assert seen.keys() == names.keys()
    assert seen["blocks.0.attn.product.probs"] == (2 * 2, 4, 4)  # images x heads
    np.testing.assert_allclose(got, net(x, t, y=np.array([0, 1])).data, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "shape, t",
    [((2, 4, 4, 1), [0, 1]), ((2, 8, 4, 2), [0, 1]), ((2, 2, 4, 4), [0, 1]), ((4, 4, 2), [0]), ((2, 4, 4, 2), [0])],
)
def test_wrong_shapes_are_refused(shape, t):
    with pytest.raises(ShapeError, match=r"DiT: wants x \(N, 4, 4, 2\)"):
        tiny()(Tensor(np.zeros(shape, np.float32)), np.array(t))


@pytest.mark.parametrize(
    "change",
    [
        {"patch": 3},  # does not tile 4 pixels
        {"width": 6},  # no four quarters
        {"heads": 3},
        {"depth": 0},
        {"mlp_ratio": 0.5},
        {"classes": -1},
        {"class_dropout": 0},
        {"class_dropout": 1.0},
    ],
    ids=str,
)
def test_impossible_networks_are_refused(change):
    with pytest.raises(RangeError, match=next(iter(change))):
        DiTConfig(**{**TINY.to_json(), **change})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_survives_json_with_its_kind(name):
    """config_from_json(kind, loads(dumps(to_json(c)))) = c; fields of the other kind are refused."""
    cfg = config(name)
    fields = json.loads(json.dumps(cfg.to_json()))
    assert config_from_json(cfg.kind, fields) == cfg
    (other,) = KINDS.keys() - {cfg.kind}
    for kind, wrong in ((other, fields), (cfg.kind, {**fields, "colour": 4})):
        with pytest.raises(CheckpointError, match="not the configuration"):
            config_from_json(kind, wrong)


def test_build_makes_the_kind_that_is_described():
    for cfg in (TINY, config("mnist-unet")):
        network = build(cfg, np.random.default_rng(0))
        assert type(network) is KINDS[cfg.kind][1] and network.cfg == cfg
