"""The UNet against the network of Ho et al.: sizes, names, shapes; then its gradients and its manners."""

import json
from pathlib import Path

import numpy as np
import pytest

from refquant.autograd import Tensor, check_gradients, gradients, nnops, no_grad, ops
from refquant.errors import CheckpointError, ShapeError, UnknownNameError
from refquant.nn.networks import CONFIGS, config
from refquant.nn.unet import AttentionBlock, ResBlock, UNet, UNetConfig, timestep_embedding

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "tfmq.json").read_text(encoding="utf-8"))
TINY = UNetConfig(
    image_size=4,
    image_channels=1,
    channels=4,
    multipliers=(1, 2),
    blocks=1,
    attention=(2,),
    groups=2,
    dropout=0.5,
)


def randomised(module, dtype=np.float32, seed=7):
    """Random values everywhere: at its initialisation half of a network is multiplied by almost zero."""
    rng = np.random.default_rng(seed)
    for p in module.parameters():
        fan = np.prod(p.shape[1:]) if p.ndim > 1 else 4
        p.data = ((p.ndim == 1) + rng.standard_normal(p.shape) / np.sqrt(fan)).astype(dtype)
    return module


def tiny(dtype=np.float32):
    return randomised(UNet(TINY, np.random.default_rng(0)), dtype)


def images(n, cfg=TINY, dtype=np.float32, seed=1):
    x = np.random.default_rng(seed).standard_normal((n, cfg.image_size, cfg.image_size, cfg.image_channels))
    return x.astype(dtype)


# ---------------------------------------------------------------- the network of the paper


@pytest.fixture(scope="module")
def cifar10():
    return UNet(config("ddpm-cifar10"), np.random.default_rng(0))


@pytest.fixture(scope="module")
def mnist():
    return UNet(config("mnist-unet"), np.random.default_rng(0))


def test_ddpm_cifar10_has_the_parameters_of_the_paper(cifar10):
    """35.7 million (Ho et al., appendix B): 35,746,307 in the published checkpoint."""
    assert cifar10.parameter_count() == 35_746_307


def count_macs(unet, monkeypatch):
    """Multiply-accumulates of one image: outputs x inputs of a window, and 2 L² C per attention."""
    total = 0

    def counting(name, cost):
        original = getattr(nnops, name)

        def call(*args, **kwargs):
            nonlocal total
            y = original(*args, **kwargs)
            total += cost(y, args)
            return y

        monkeypatch.setattr(nnops, name, call)

    counting("conv2d", lambda y, args: y.data.size * args[1].data[0].size)
    counting("linear", lambda y, args: y.data.size * args[1].shape[1])
    counting("attention", lambda y, args: 2 * y.data.size * args[1].shape[1])
    with no_grad():
        unet(Tensor(images(1, unet.cfg)), np.array([3]))
    return total


def test_mnist_unet_is_small(mnist, monkeypatch):
    """1 to 2 million parameters, at most 170 million multiply-accumulates an image."""
    assert 1e6 <= mnist.parameter_count() <= 2e6
    assert 50e6 <= count_macs(mnist, monkeypatch) <= 170e6


@pytest.mark.parametrize(
    "name, shape",
    [
        ("temb.dense.0.weight", (512, 128)),
        ("temb.dense.1.bias", (512,)),
        ("conv_in.weight", (128, 3, 3, 3)),
        ("down.0.block.0.conv1.weight", (128, 3, 3, 128)),
        ("down.0.block.1.temb_proj.weight", (128, 512)),
        ("down.0.downsample.conv.weight", (128, 3, 3, 128)),
        ("down.1.block.0.nin_shortcut.weight", (256, 1, 1, 128)),
        ("down.1.attn.0.q.weight", (256, 1, 1, 256)),
        ("down.1.attn.1.proj_out.bias", (256,)),
        ("down.2.downsample.conv.bias", (256,)),
        ("down.3.block.1.norm2.bias", (256,)),
        ("mid.block_1.conv1.weight", (256, 3, 3, 256)),
        ("mid.attn_1.norm.weight", (256,)),
        ("mid.block_2.conv2.bias", (256,)),
        ("up.0.block.0.conv1.weight", (128, 3, 3, 384)),  # 256 from below, 128 over the skip
        ("up.0.block.2.nin_shortcut.weight", (128, 1, 1, 256)),
        ("up.1.attn.2.k.weight", (256, 1, 1, 256)),
        ("up.1.upsample.conv.bias", (256,)),
        ("up.3.block.2.nin_shortcut.weight", (256, 1, 1, 512)),
        ("up.3.upsample.conv.weight", (256, 3, 3, 256)),
        ("norm_out.weight", (128,)),
        ("conv_out.weight", (3, 3, 3, 128)),
        ("conv_out.bias", (3,)),
    ],
)
def test_names_are_those_of_the_published_checkpoints(cifar10, name, shape):
    """ermongroup/ddim models/diffusion.py, (O, C, kh, kw) there is (O, kh, kw, C) here."""
    assert cifar10.state_dict()[name].shape == shape


def test_there_is_nothing_else(cifar10):
    """No downsample at the end, no upsample at the top, attention at 16x16 and in the middle."""
    modules = {name for name, _ in cifar10.named_modules()}
    assert {m for m in modules if m.endswith("sample")} == {
        *(f"down.{i}.downsample" for i in (0, 1, 2)),
        *(f"up.{i}.upsample" for i in (1, 2, 3)),
    }
    attention = {m.rsplit(".", 1)[0] for m in modules if m.endswith(".proj_out")}
    want = {"mid.attn_1", "down.1.attn.0", "down.1.attn.1", "up.1.attn.0", "up.1.attn.1", "up.1.attn.2"}
    assert attention == want
    top = {m.split(".")[0] for m in modules if m}
    assert top == {"temb", "conv_in", "down", "mid", "up", "norm_out", "conv_out"}
    names = [name for name, _ in cifar10.named_parameters()]
    # layers: time; ResBlocks; their shortcuts (one down, all up); attention; resampling, ends
    layers = 2 + 5 * (8 + 2 + 12) + (1 + 12) + 5 * (2 + 1 + 3) + (3 + 3 + 3)
    assert len(names) == len(set(names)) == 2 * layers == 328


def test_ddpm_cifar10_runs(cifar10):
    """One forward pass of random weights: (1, 32, 32, 3) to the same, finite."""
    with no_grad():
        y = cifar10(Tensor(images(1, cifar10.cfg)), np.array([999]))
    assert y.shape == (1, 32, 32, 3) and y.dtype == np.float32 and y._parents == ()
    assert np.isfinite(y.data).all() and y.data.any()


def test_unknown_names_list_the_known():
    with pytest.raises(UnknownNameError, match="mnist-unet, ddpm-cifar10"):
        config("ddpm-cifar")


@pytest.mark.parametrize("name", [name for name, cfg in CONFIGS.items() if cfg.kind == "unet"])
def test_configurations_survive_json(name):
    """from_json(loads(dumps(to_json(c)))) = c; a missing or a foreign field is an error."""
    fields = json.loads(json.dumps(config(name).to_json()))
    assert UNetConfig.from_json(fields) == config(name)
    for wrong in ({**fields, "heads": 4}, {k: v for k, v in fields.items() if k != "groups"}):
        with pytest.raises(CheckpointError, match="heads|groups"):
            UNetConfig.from_json(wrong)


# ---------------------------------------------------------------- time


def test_timestep_embedding_is_the_published_one():
    """[sin(t f_j) | cos(t f_j)], against outputs of TFMQ-DM's ddim/models/diffusion.py."""
    case = next(c for c in GOLDEN["cases"] if c["id"] == "emb.ddim")
    got = timestep_embedding(np.array(case["inputs"]["t"]), case["inputs"]["dim"])
    np.testing.assert_allclose(got, case["outputs"]["emb"], rtol=0, atol=1e-4)  # float32 sin of up to 999
    assert got.dtype == np.float32


def test_time_enters_every_block():
    """The prediction depends on t, and each image on its own t only."""
    net, x = tiny(), np.repeat(images(1), 3, axis=0)
    y = net(Tensor(x), np.array([0, 500, 0])).data
    np.testing.assert_allclose(y[0], y[2], atol=1e-5)
    assert np.abs(y[0] - y[1]).max() > 1e-2


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("outputs", [4, 6])
def test_gradients_of_a_block(outputs):
    """ResBlock (identity or 1x1 shortcut) and attention: x, temb and all parameters, float64, 1e-6."""
    rng = np.random.default_rng(0)
    block = randomised(ResBlock(rng, 4, outputs, 8, TINY), np.float64)
    attend = randomised(AttentionBlock(rng, outputs, TINY), np.float64)
    check_gradients(
        lambda x, temb, *_: attend(block(x, temb, None)),
        rng.standard_normal((2, 3, 3, 4)),
        rng.standard_normal((2, 8)),
        *block.parameters(),
        *attend.parameters(),
        name="block",
    )


def test_gradients_of_a_whole_unet():
    """Loss -> every parameter and x, through skips, attention, down and up; dropout from a fixed seed."""
    net, t = tiny(np.float64), np.array([3, 700])
    check_gradients(
        lambda x, *_: net(x, t, np.random.default_rng(5)),
        images(2, dtype=np.float64),
        *net.parameters(),
        per_index_limit=0,  # a direction per array; element by element is done for the block above
        name="unet",
    )


def test_every_parameter_receives_a_gradient():
    """dL/dp is not zero, save for the key's bias: softmax ignores what all scores of a query share."""
    net = tiny(np.float64)
    y = net(Tensor(images(2, dtype=np.float64)), np.array([3, 700]))
    names = [name for name, _ in net.named_parameters()]
    found = gradients(ops.mean_all(ops.square(y)), net.parameters())
    silent = {name for name, g in zip(names, found, strict=True) if np.abs(g).max() < 1e-12}
    assert silent == {name for name in names if name.endswith(".k.bias")}


# ---------------------------------------------------------------- dropout, repetition, batches


def test_dropout_is_on_only_with_a_generator():
    """No generator: the same as rate 0. With one: different, and reproducible by its seed."""
    net, x, t = tiny(), Tensor(images(2)), np.array([1, 2])
    off = net(x, t).data
    on = [net(x, t, np.random.default_rng(seed)).data for seed in (0, 0, 1)]
    np.testing.assert_array_equal(on[0], on[1])
    assert np.abs(on[0] - off).max() > 1e-3 and np.abs(on[0] - on[2]).max() > 1e-3
    without = UNet(UNetConfig(**{**TINY.to_json(), "dropout": 0.0}), np.random.default_rng(0))
    without.load_state_dict(net.state_dict())
    np.testing.assert_array_equal(without(x, t, np.random.default_rng(0)).data, off)


def test_calling_twice_gives_the_same_bits(mnist):
    """A module has no state; recording does not change values either."""
    x, t = Tensor(images(2, mnist.cfg)), np.array([10, 900])
    first, second = mnist(x, t).data, mnist(x, t).data
    with no_grad():
        third = mnist(x, t).data
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)


def test_the_same_seed_builds_the_same_network(mnist):
    again = UNet(mnist.cfg, np.random.default_rng(0)).state_dict()
    for name, array in mnist.state_dict().items():
        np.testing.assert_array_equal(again[name], array)


def test_images_of_a_batch_do_not_meet(mnist):
    """f(x)_i = f(x_i): each image alone as in the batch, up to the order of sums (1e-5 of the largest)."""
    net = randomised(UNet(mnist.cfg, np.random.default_rng(0)))
    x, t = images(3, mnist.cfg), np.array([0, 500, 999])
    with no_grad():
        together = net(Tensor(x), t).data
        alone = np.concatenate([net(Tensor(x[i : i + 1]), t[i : i + 1]).data for i in range(3)])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "shape, t",
    [
        ((2, 4, 4, 3), [0, 1]),  # channels
        ((2, 4, 8, 1), [0, 1]),  # width
        ((2, 1, 4, 4), [0, 1]),  # NCHW
        ((4, 4, 1), [0]),  # no batch
        ((2, 4, 4, 1), [0]),  # one t for two images
        ((2, 4, 4, 1), 0),
    ],
)
def test_wrong_shapes_are_refused(shape, t):
    with pytest.raises(ShapeError, match=r"UNet: wants x \(N, 4, 4, 1\)"):
        tiny()(Tensor(np.zeros(shape, np.float32)), np.array(t))


def test_impossible_networks_are_refused():
    """A size that cannot be halved, channels that groups do not divide."""
    for change in ({"image_size": 5}, {"groups": 3}):
        with pytest.raises(ShapeError):
            UNet(UNetConfig(**{**TINY.to_json(), **change}), np.random.default_rng(0))


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.pop("norm_out.bias"),  # missing
        lambda s: s.update(extra=np.zeros(1)),
        lambda s: s.update({"norm_out.bias": s["norm_out.bias"][:2]}),  # misshapen
        lambda s: s.update({"norm_out.bias": s["norm_out.bias"][None]}),  # would broadcast
        lambda s: s.update({"norm_out.bias": s["norm_out.bias"].astype(np.int32)}),
    ],
    ids=["missing", "extra", "misshapen", "another rank", "integers"],
)
def test_weights_that_do_not_fit_change_nothing(damage):
    """CheckpointError, and every parameter is the array it was, with its bits."""
    net = tiny()
    before = {name: (a, a.copy()) for name, a in net.state_dict().items()}
    state = {name: a + 1 for name, a in before.items() for a in a[:1]}
    damage(state)
    with pytest.raises(CheckpointError):
        net.load_state_dict(state)
    for name, array in net.state_dict().items():
        assert array is before[name][0]
        np.testing.assert_array_equal(array, before[name][1])


def test_loading_copies():
    """What was loaded may be overwritten afterwards; another float type is converted to the network's."""
    net, other = tiny(), tiny().astype(np.float64)
    state = {name: 2 * a for name, a in other.state_dict().items()}
    net.load_state_dict(state)
    want = {name: a.astype(np.float32) for name, a in state.items()}
    for a in state.values():
        a[...] = 0
    for name, a in net.state_dict().items():
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, want[name])


def test_astype_is_a_copy_in_another_precision():
    """float64 network = float32 network up to float32's rounding; the original keeps its arrays."""
    net = tiny()
    x, t = images(2), np.array([3, 700])
    y64 = net.astype(np.float64)(Tensor(x.astype(np.float64)), t)
    assert y64.dtype == np.float64 and {p.dtype for p in net.parameters()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(net(Tensor(x), t).data, y64.data, rtol=0, atol=1e-5 * np.abs(y64.data).max())
