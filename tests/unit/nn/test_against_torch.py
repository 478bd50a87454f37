"""Forward and gradients against PyTorch in float64, where it is installed: a second author.

Activations are NHWC here and NCHW there, weights OHWI and OIHW; `nchw` and `nhwc` translate.
"""

import numpy as np
import pytest

from refquant.autograd import Tensor, gradients, nnops, ops
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


def run(module, names, call):
    """Ours with its parameters replaced by tensors: the attributes are set, `call` runs it."""

    def ours(*tensors):
        for name, tensor in zip(names, tensors, strict=False):
            *path, last = name.split(".")
            owner = module
            for step in path:
                owner = getattr(owner, step)
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
