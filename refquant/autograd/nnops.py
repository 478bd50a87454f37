"""The coarse operations of a network: each is one node of the tape with a hand-derived vjp.

Activations are NHWC: ``x`` is (N, H, W, C), channels last. Weights have the output channel first,
``w`` is (O, kh, kw, C) for a convolution and (O, C) for a linear layer, which is the order in
which the integer kernels take them. A row of the convolution's matrix product is then one
output channel.

Two habits make NumPy fast here, and both are visible in the code:

* A convolution is one large matrix product over an unfolded copy of its input (im2col). The copy
  is made through a strided view whose innermost run is kw*C numbers long, and the gradient with
  respect to the input *and* to the weight come from one unfolding of the output's gradient.
* Per-channel arithmetic on (N, H, W, C) would give inner loops of C elements, which cost more in
  loop overhead than in arithmetic. `_per_row` tiles the (N, C) operand W times, so that the inner
  loop is W*C long (measured at 28x28x24: 3 to 5 times faster).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ..errors import ShapeError
from .ops import softmax_array
from .tensor import Tensor, op

Array = NDArray[Any]


# ---------------------------------------------------------------- linear layers


@op
def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """y = x wᵀ + b with x (..., C), w (O, C), b (O,); y (..., O). A 1x1 convolution is this, too."""
    if x.shape[-1] != w.shape[1]:
        raise ShapeError(
            f"linear: w {w.shape} (O, C) takes {w.shape[1]} input features, x {x.shape} has {x.shape[-1]}."
        )
    x2 = x.data.reshape(-1, w.shape[1])
    y = x2 @ w.data.T
    y += b.data

    def vjp(g: Array) -> tuple[Array | None, ...]:
        g2 = g.reshape(-1, w.shape[0])
        dx = (g2 @ w.data).reshape(x.shape) if x.requires_grad else None
        dw = g2.T @ x2 if w.requires_grad else None
        return dx, dw, g2.sum(axis=0)

    return Tensor(y.reshape(*x.shape[:-1], w.shape[0]), (x, w, b), vjp)


# ---------------------------------------------------------------- convolution


def unfold(x: Array, kh: int, kw: int, stride: int, pads: tuple[int, int, int, int]) -> Array:
    """im2col: x (N, H, W, C) -> (N * Ho * Wo, kh * kw * C), a copy; `pads` is (top, bottom, left, right)."""
    top, bottom, left, right = pads
    n, h, w, c = x.shape
    padded = np.zeros((n, h + top + bottom, w + left + right, c), x.dtype)
    padded[:, top : top + h, left : left + w] = x
    ho, wo = (padded.shape[1] - kh) // stride + 1, (padded.shape[2] - kw) // stride + 1
    sn, sh, sw, sc = padded.strides
    # window (i, j) of pixel (y, x) starts at (stride*y + i, stride*x); its kw*C numbers are contiguous
    windows = as_strided(padded, (n, ho, wo, kh, kw * c), (sn, stride * sh, stride * sw, sh, sc))
    return windows.reshape(n * ho * wo, kh * kw * c)


@op
def conv2d(x: Tensor, w: Tensor, b: Tensor, stride: int = 1, pads: tuple[int, int, int, int] = (1, 1, 1, 1)) -> Tensor:
    """2-D convolution (cross-correlation, as everywhere in this field).

    The vjp unfolds the gradient g
    (spread out with zeros where stride > 1) once, as V, and then

        dx = V · flip(w)      and      dw = flip(xᵀ · V),

    because the full correlation that spreads g back onto x pairs each pixel of x with exactly
    those gradients that meet it in dw.

    Parameters
    ----------
    x : Tensor, (N, H, W, C)
    w : Tensor, (O, kh, kw, C)
    b : Tensor, (O,)
    stride : int
    pads : tuple of int
        Zeros at the top, the bottom, the left and the right.

    Returns
    -------
    Tensor, (N, Ho, Wo, O)
    """
    n, h, width, c = x.shape
    o, kh, kw, cin = w.shape
    if c != cin:
        raise ShapeError(
            f"conv2d: weight expects {cin} input channels, input has {c}.  x {x.shape} NHWC, w {w.shape} OHWI."
        )
    top, bottom, left, right = pads
    if min(pads) < 0 or max(top, bottom) >= kh or max(left, right) >= kw:  # a window would see padding only
        raise ShapeError(f"conv2d: padding {pads} must be from 0 to one less than the {kh}x{kw} window.")
    ho, wo = (h + top + bottom - kh) // stride + 1, (width + left + right - kw) // stride + 1
    if min(ho, wo) < 1:
        raise ShapeError(f"conv2d: a {kh}x{kw} window does not fit.  x {x.shape} NHWC, padding {pads}.")
    y = unfold(x.data, kh, kw, stride, pads) @ w.data.reshape(o, -1).T
    y.reshape(n * ho, wo * o)[...] += np.tile(b.data, wo)

    def vjp(g: Array) -> tuple[Array | None, ...]:
        db = g.reshape(n * ho, wo * o).sum(axis=0).reshape(wo, o).sum(axis=0)
        if not x.requires_grad:  # the first layer: x has few channels, so unfold x instead
            dw = g.reshape(-1, o).T @ unfold(x.data, kh, kw, stride, pads)
            return None, dw.reshape(w.shape), db
        # dilated[stride*y, stride*x] = g[y, x]: what a stride-1 convolution would have received
        hd, wd = h + top + bottom - kh + 1, width + left + right - kw + 1
        if stride > 1:
            dilated = np.zeros((n, hd, wd, o), g.dtype)
            dilated[:, ::stride, ::stride] = g
            g = dilated
        back = (kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right)
        v = unfold(g, kh, kw, 1, back)  # (N*H*W, kh*kw*O)
        flipped = w.data[:, ::-1, ::-1].transpose(1, 2, 0, 3).reshape(kh * kw * o, c)
        dx = (v @ flipped).reshape(x.shape)
        if not w.requires_grad:
            return dx, None, db
        dw = (x.data.reshape(-1, c).T @ v).reshape(c, kh, kw, o)[:, ::-1, ::-1].transpose(3, 1, 2, 0)
        return dx, dw, db

    return Tensor(y.reshape(n, ho, wo, o), (x, w, b), vjp)


# ---------------------------------------------------------------- per-channel arithmetic


def _per_row(v: Array, width: int) -> Array:
    """(N, C) -> (N, 1, W*C): the operand of a per-channel operation on rows of W pixels."""
    return np.tile(v, (1, width))[:, None, :]


def _sum_pixels(rows: Array, channels: int) -> Array:
    """(N, H, W*C) -> (N, C): sum over the pixels, the long contiguous axis first."""
    s = rows.sum(axis=1)
    return s.reshape(s.shape[0], -1, channels).sum(axis=1)


@op
def add_channels(x: Tensor, e: Tensor) -> Tensor:
    """x (N, H, W, C) + e (N, C) at every pixel: how a time embedding enters a ResBlock."""
    n, h, w, c = x.shape
    if e.shape != (n, c):
        raise ShapeError(f"add_channels: x {x.shape} NHWC wants e of shape {(n, c)}, got {e.shape}.")
    y = x.data.reshape(n, h, w * c) + _per_row(e.data, w)
    return Tensor(y.reshape(x.shape), (x, e), lambda g: (g, _sum_pixels(g.reshape(n, h, w * c), c)))


@op
def group_norm(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """Group normalisation (Wu & He 2018): y = γ (x - μ)/√(v + ε) + β, μ and v per image and group.

    With x̂ the normalised value, M = H W C / groups and sums
    over a group,

        dx = (γ g - mean(γ g) - x̂ mean(γ g x̂)) / √(v + ε).

    Parameters
    ----------
    x : Tensor, (N, H, W, C)
    gamma, beta : Tensor, (C,)
    groups : int
        Must divide C.
    eps : float

    Returns
    -------
    Tensor, (N, H, W, C)
    """
    n, h, w, c = x.shape
    if c % groups:
        raise ShapeError(f"group_norm: {c} channels do not divide into {groups} groups.")
    m = h * w * c // groups

    def mean_over_group(per_channel: Array) -> Array:  # (N, C) sums over pixels -> (N, C), equal in a group
        s = per_channel.reshape(n, groups, c // groups).sum(axis=2) / m
        return np.repeat(s, c // groups, axis=1)

    rows = x.data.reshape(n, h, w * c)
    centred = rows - _per_row(mean_over_group(_sum_pixels(rows, c)), w)
    energy = np.einsum("nhk,nhk->nk", centred, centred).reshape(n, w, c).sum(axis=1)
    rstd = 1 / np.sqrt(mean_over_group(energy) + eps)  # (N, C)
    y = centred * _per_row(rstd * gamma.data, w)
    y += np.tile(beta.data, w)

    def vjp(g: Array) -> tuple[Array, ...]:
        g_rows = g.reshape(n, h, w * c)
        sum_g = _sum_pixels(g_rows, c)
        sum_gx = np.einsum("nhk,nhk->nk", g_rows, centred).reshape(n, w, c).sum(axis=1) * rstd  # of g x̂
        mean_g, mean_gx = mean_over_group(gamma.data * sum_g), mean_over_group(gamma.data * sum_gx)
        dx = g_rows * _per_row(gamma.data * rstd, w)
        dx -= centred * _per_row(rstd * rstd * mean_gx, w)
        dx -= _per_row(rstd * mean_g, w)
        return dx.reshape(x.shape), sum_gx.sum(axis=0), sum_g.sum(axis=0)

    return Tensor(y.reshape(x.shape), (x, gamma, beta), vjp)


# ---------------------------------------------------------------- attention


@op
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √C) v with q, k, v (N, L, C); single head, as in DDPM's attention block."""
    factor = 1 / np.sqrt(q.shape[-1]).astype(q.dtype)
    p = softmax_array((q.data @ k.data.swapaxes(1, 2)) * factor)  # (N, L, L)

    def vjp(g: Array) -> tuple[Array, ...]:
        dp = g @ v.data.swapaxes(1, 2)
        ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) * factor
        return ds @ k.data, ds.swapaxes(1, 2) @ q.data, p.swapaxes(1, 2) @ g

    return Tensor(p @ v.data, (q, k, v), vjp)


# ---------------------------------------------------------------- resampling


@op
def upsample_nearest(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, 2H, 2W, C), every pixel four times."""
    n, h, w, c = x.shape
    y = np.broadcast_to(x.data[:, :, None, :, None, :], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)

    def vjp(g: Array) -> tuple[Array]:
        g6 = g.reshape(n, h, 2, w, 2, c)
        rows = g6[:, :, 0] + g6[:, :, 1]  # contiguous rows first, then pairs of pixels
        return (rows[:, :, :, 0] + rows[:, :, :, 1],)

    return Tensor(y, (x,), vjp)


@op
def max_pool(x: Tensor) -> Tensor:
    """2x2 maximum, stride 2: (N, H, W, C) -> (N, H/2, W/2, C), H and W even. Ties share the gradient."""
    n, h, w, c = x.shape
    if h % 2 or w % 2:
        raise ShapeError(f"max_pool: H and W must be even, x is {x.shape} NHWC.")
    windows = x.data.reshape(n, h // 2, 2, w // 2, 2, c)
    y = windows.max(axis=(2, 4))

    def vjp(g: Array) -> tuple[Array]:
        hit = windows == y[:, :, None, :, None, :]
        share = g / hit.sum(axis=(2, 4))
        return ((hit * share[:, :, None, :, None, :]).reshape(x.shape).astype(g.dtype),)

    return Tensor(y, (x,), vjp)


# ---------------------------------------------------------------- training only


@op
def dropout(x: Tensor, rate: float, rng: np.random.Generator) -> Tensor:
    """Zero each element with probability `rate` and divide the rest by 1 - rate (Srivastava et al. 2014)."""
    keep = (rng.random(x.shape, dtype=np.float32) >= rate).astype(x.dtype) / x.dtype.type(1 - rate)
    return Tensor(x.data * keep, (x,), lambda g: (g * keep,))


@op
def cross_entropy(logits: Tensor, labels: Array) -> Tensor:
    """Mean of -log softmax(logits)[label]; logits (N, K), labels (N,) integers in [0, K)."""
    index = (np.arange(len(logits.data)), labels.data if isinstance(labels, Tensor) else labels)
    p = softmax_array(logits.data)
    shifted = logits.data - logits.data.max(axis=1, keepdims=True)
    loss = (np.log(np.exp(shifted).sum(axis=1)) - shifted[index]).mean()

    def vjp(g: Array) -> tuple[Array]:
        d = p.copy()
        d[index] -= 1
        return (d * (g / len(d)),)

    return Tensor(loss, (logits,), vjp)
