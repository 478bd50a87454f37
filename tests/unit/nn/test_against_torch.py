"""Forward and gradients against PyTorch in float64, where it is installed: a second author.

Activations are NHWC here and NCHW there, weights OHWI and OIHW; `nchw` and `nhwc` translate.
"""

import numpy as np
import pytest

from refquant.autograd import Tensor, gradients, nnops, ops, tokenops
from refquant.nn.dit import DiT, DiTBlock, DiTConfig, timestep_embedding
from refquant.nn.unet import AttentionBlock, ResBlock, UNetConfig

torch = pytest.importorskip("torch", reason="PyTorch, a second opinion, is not installed (pip install torch)")
F = torch.nn.functional
RNG = np.random.default_rng(11)
CFG = UNetConfig(8, 1, 8, (1,), 1, (), 4, 0.0)


def nchw(x):
    """(N, H, W, C) -> (N, C, H, W), also (O, kh, kw, C) -> (O, C, kh, kw)."""
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def assert_agree(ours, theirs, *arrays):
    """y and d<c, y>/dx_i of both, within 1e-9 of the largest element; c is random."""
    leaves = [Tensor(a, requires_grad=True) for a in arrays]
    leaves_t = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, y_t = ours(*leaves), theirs(*leaves_t)
    c = RNG.standard_normal(y.shape)
    got = [y.data, *gradients(ops.sum_all(ops.mul(y, c)), leaves)]
    want = [y_t, *torch.autograd.grad((y_t * torch.tensor(c)).sum(), leaves_t)]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        w = w.detach().numpy()
        what = f"gradient {i - 1}" if i else "value"
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-9 * max(1, np.abs(w).max()), err_msg=what)


def n(*shape):
    return RNG.standard_normal(shape)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    "kernel, pads",
    [
        (1, (0, 0, 0, 0)),
        (2, (0, 1, 1, 0)),
        (3, (1, 1, 1, 1)),
        (3, (0, 1, 0, 1)),
        (3, (0, 0, 0, 0)),
        (5, (2, 2, 2, 2)),
        (5, (4, 0, 1, 3)),
    ],
)
def test_conv2d(kernel, pads, stride, size):
    """conv2d after F.pad(left, right, top, bottom)."""
    top, bottom, left, right = pads

    def theirs(x, w, b):
        padded = F.pad(nchw(x), (left, right, top, bottom))
        return nhwc(F.conv2d(padded, nchw(w), b, stride=stride))

    assert_agree(
        lambda x, w, b: nnops.conv2d(x, w, b, stride, pads), theirs, n(2, *size, 5), n(4, kernel, kernel, 5), n(4)
    )


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 4, 5, 6)])
def test_linear(shape):
    assert_agree(nnops.linear, F.linear, n(*shape), n(7, 6), n(7))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm(groups):
    assert_agree(
        lambda x, g, b: nnops.group_norm(x, g, b, groups),
        lambda x, g, b: nhwc(F.group_norm(nchw(x), groups, g, b, eps=1e-6)),
        3 + n(2, 5, 4, 8),
        n(8),
        n(8),
    )


def test_attention():
    """softmax(q kᵀ / √C) v, with fewer keys than queries."""
    assert_agree(nnops.attention, F.scaled_dot_product_attention, n(2, 9, 6), n(2, 7, 6), n(2, 7, 5))


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (ops.silu, F.silu),
        (ops.relu, F.relu),
        (ops.exp, torch.exp),
        (ops.softmax, lambda x: x.softmax(-1)),
        (nnops.upsample_nearest, lambda x: nhwc(F.interpolate(nchw(x), scale_factor=2, mode="nearest"))),
        (nnops.max_pool, lambda x: nhwc(F.max_pool2d(nchw(x), 2))),
    ],
    ids=["silu", "relu", "exp", "softmax", "upsample_nearest", "max_pool"],
)
def test_functions_of_one_tensor(ours, theirs):
    assert_agree(ours, theirs, 3 * n(2, 4, 6, 3))


def test_cross_entropy():
    """Mean of -log softmax(logits)[label]."""
    labels = RNG.integers(0, 10, 6)
    assert_agree(
        lambda x: nnops.cross_entropy(x, labels), lambda x: F.cross_entropy(x, torch.tensor(labels)), 10 * n(6, 10)
    )


def test_layer_norm():
    """nn.LayerNorm without affine, eps 1e-6."""
    layer = torch.nn.LayerNorm(8, eps=1e-6, elementwise_affine=False)
    assert_agree(tokenops.layer_norm, layer, 3 + n(2, 5, 8))


def test_gelu():
    assert_agree(tokenops.gelu, lambda x: F.gelu(x, approximate="tanh"), 3 * n(4, 7))


def test_embedding():
    index = np.array([2, 0, 2])
    assert_agree(
        lambda table: tokenops.embedding(table, index), lambda table: F.embedding(torch.tensor(index), table), n(4, 3)
    )


def run(module, names, call):
    """Ours with its parameters replaced by tensors: the attributes are set, `call` runs it."""

    def ours(*tensors):
        for name, tensor in zip(names, tensors, strict=False):
            *path, last = name.split(".")
            owner = module
            for step in path:
                owner = owner[int(step)] if step.isdecimal() else getattr(owner, step)
            setattr(owner, last, tensor)
        return call(*tensors[len(names) :])

    return ours


@pytest.mark.parametrize("outputs", [8, 12])
def test_res_block(outputs):
    """The block of ermongroup/ddim models/diffusion.py, written in PyTorch's functions."""
    block = ResBlock(np.random.default_rng(0), 8, outputs, 16, CFG)
    names = [name for name, _ in block.named_parameters()]

    def theirs(*tensors):
        p, (x, temb) = dict(zip(names, tensors, strict=False)), tensors[len(names) :]

        def norm(h, layer):
            return F.silu(F.group_norm(h, CFG.groups, p[f"{layer}.weight"], p[f"{layer}.bias"], eps=1e-6))

        def conv(h, layer):
            w = nchw(p[f"{layer}.weight"])
            return F.conv2d(h, w, p[f"{layer}.bias"], padding=w.shape[-1] // 2)

        x = nchw(x)
        h = conv(norm(x, "norm1"), "conv1")
        h = h + F.linear(temb, p["temb_proj.weight"], p["temb_proj.bias"])[:, :, None, None]
        h = conv(norm(h, "norm2"), "conv2")
        return nhwc(h + (conv(x, "nin_shortcut") if outputs != 8 else x))

    weights = [n(*p.shape) for p in block.parameters()]
    ours = run(block, names, lambda x, temb: block(x, temb, None))
    assert_agree(ours, theirs, *weights, n(2, 5, 4, 8), n(2, 16))


def test_attention_block():
    """x + proj(attention(q, k, v of norm(x))), one head over all pixels (ddim models/diffusion.py)."""
    block = AttentionBlock(np.random.default_rng(0), 8, CFG)
    names = [name for name, _ in block.named_parameters()]

    def theirs(*tensors):
        p, x = dict(zip(names, tensors, strict=False)), nchw(tensors[-1])

        def conv(h, layer):
            return F.conv2d(h, nchw(p[f"{layer}.weight"]), p[f"{layer}.bias"])

        h = F.group_norm(x, CFG.groups, p["norm.weight"], p["norm.bias"], eps=1e-6)
        q, k, v = (conv(h, layer).flatten(2) for layer in "qkv")  # (N, C, L)
        w = torch.softmax(q.transpose(1, 2) @ k / 8**0.5, dim=2)  # (N, queries, keys)
        return nhwc(x + conv((v @ w.transpose(1, 2)).reshape(x.shape), "proj_out"))

    weights = [n(*p.shape) for p in block.parameters()]
    assert_agree(run(block, names, block), theirs, *weights, n(2, 3, 4, 8))


def torch_dit_block(p, x, c, heads):
    """The block of facebookresearch/DiT models.py:103-123 in PyTorch's functions; p by published names."""

    def linear(h, layer):
        return F.linear(h, p[f"{layer}.weight"], p[f"{layer}.bias"])

    def normed(h, shift, scale):
        return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(F.silu(c), "adaLN_modulation.1").chunk(6, dim=1)
    batch, length, width = x.shape
    qkv = linear(normed(x, shift_1, scale_1), "attn.qkv").reshape(batch, length, 3, heads, width // heads)
    h = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(x.shape)
    x = x + gate_1[:, None] * linear(h, "attn.proj")
    h = F.gelu(linear(normed(x, shift_2, scale_2), "mlp.fc1"), approximate="tanh")
    return x + gate_2[:, None] * linear(h, "mlp.fc2")


def test_dit_block():
    """Values and gradients of x, c and every parameter, three heads."""
    cfg = DiTConfig(4, 1, patch=2, width=12, depth=1, heads=3, mlp_ratio=2)
    block = DiTBlock(np.random.default_rng(0), cfg)
    names = [name for name, _ in block.named_parameters()]
    weights = [n(*p.shape) / np.sqrt(p.shape[-1]) for p in block.parameters()]
    assert_agree(
        run(block, names, block),
        lambda *tensors: torch_dit_block(dict(zip(names, tensors, strict=False)), *tensors[len(names) :], heads=3),
        *weights,
        n(2, 5, 12),
        n(2, 12),
    )


def test_dit():
    """A whole network, from patches to pixels, NCHW there; classes, time, and 2 C channels."""
    cfg = DiTConfig(8, 2, patch=4, width=16, depth=2, heads=4, classes=3, learn_sigma=True)
    net = DiT(cfg, np.random.default_rng(0))
    names = [name for name, _ in net.named_parameters()]
    t, y = np.array([3, 700, 20]), np.array([0, 3, 1])

    def theirs(*tensors):
        p, x = dict(zip(names, tensors, strict=False)), nchw(tensors[-1])
        h = F.conv2d(x, nchw(p["x_embedder.proj.weight"]), p["x_embedder.proj.bias"], stride=4)
        h = h.flatten(2).transpose(1, 2) + torch.tensor(net.positions)
        sinusoid = torch.tensor(timestep_embedding(t)).double()
        c = F.linear(sinusoid, p["t_embedder.mlp.0.weight"], p["t_embedder.mlp.0.bias"])
        c = F.linear(F.silu(c), p["t_embedder.mlp.2.weight"], p["t_embedder.mlp.2.bias"])
        c = c + F.embedding(torch.tensor(y), p["y_embedder.embedding_table.weight"])
        for i in range(2):
            start = f"blocks.{i}."
            h = torch_dit_block({k[len(start) :]: v for k, v in p.items() if k.startswith(start)}, h, c, heads=4)
        m = F.linear(F.silu(c), p["final_layer.adaLN_modulation.1.weight"], p["final_layer.adaLN_modulation.1.bias"])
        shift, scale = m[:, None].chunk(2, dim=2)
        h = F.layer_norm(h, (16,), eps=1e-6) * (1 + scale) + shift
        h = F.linear(h, p["final_layer.linear.weight"], p["final_layer.linear.bias"])
        return nhwc(torch.einsum("nhwpqc->nchpwq", h.reshape(3, 2, 2, 4, 4, 4)).reshape(3, 4, 8, 8))

    weights = [n(*p.shape) / np.sqrt(np.prod(p.shape[1:])) for p in net.parameters()]
    assert_agree(run(net, names, lambda x: net(x, t, y=y)), theirs, *weights, n(3, 8, 8, 2))
