"""The coarse operations of a transformer, each one node of the tape with a hand-derived vjp.

Activations are tokens: ``x`` is (N, L, D), L tokens of D features for each of N images. What a block is told
about its image (time-step, class) arrives as one vector (N, D) and holds for all L tokens.

Heads of attention are folded into the batch, (N * heads, L, D / heads), by `split_heads` and back by
`merge_heads`: `nnops.attention`, and whatever is put around it, then knows nothing of heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError
from .tensor import Tensor, op

Array = NDArray[Any]

_GELU_A, _GELU_C = 0.044715, float(np.sqrt(2 / np.pi))


# ---------------------------------------------------------------- normalisation and modulation


@op
def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer normalisation (Ba et al. 2016) over the last axis, without scale and shift: x̂ = (x - μ)/√(v + ε).

    With means over the last axis, dx = (g - mean(g) - x̂ mean(g x̂)) / √(v + ε).

    Parameters
    ----------
    x : Tensor, (..., D)
    eps : float

    Returns
    -------
    Tensor, shape of x
    """
    d = x.shape[-1]
    rows = x.data.reshape(-1, d)
    mean = np.full(d, 1 / d, x.dtype)  # a mean over features is a product with this: 5 times faster than x.mean
    normed = rows - (rows @ mean)[:, None]
    rstd = 1 / np.sqrt(np.einsum("ij,ij->i", normed, normed) / x.dtype.type(d) + x.dtype.type(eps))
    normed *= rstd[:, None]

    def vjp(g: Array) -> tuple[Array]:
        g2 = g.reshape(-1, d)
        dx = normed * (np.einsum("ij,ij->i", g2, normed) / x.dtype.type(-d))[:, None]
        dx += g2
        dx -= (g2 @ mean)[:, None]
        dx *= rstd[:, None]
        return (dx.reshape(x.shape),)

    return Tensor(normed.reshape(x.shape), (x,), vjp)


@op
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift with x (N, L, D), shift and scale (N, D): how a condition enters a block of DiT."""
    _check_condition("modulate", x, shift, scale)
    factor = 1 + scale.data[:, None]
    y = x.data * factor
    y += shift.data[:, None]
    return Tensor(y, (x, shift, scale), lambda g: (g * factor, g.sum(axis=1), np.einsum("nld,nld->nd", g, x.data)))


@op
def gated_add(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """x + gate h with x and h (N, L, D), gate (N, D): a branch that a condition lets in, or (0) not at all."""
    _check_condition("gated_add", x, gate)
    if h.shape != x.shape:
        raise ShapeError(f"gated_add: x {x.shape} and h {h.shape} must have one shape (N, L, D).")
    y = h.data * gate.data[:, None]
    y += x.data
    return Tensor(y, (x, gate, h), lambda g: (g, np.einsum("nld,nld->nd", g, h.data), g * gate.data[:, None]))


def _check_condition(name: str, x: Tensor, *condition: Tensor) -> None:
    for c in condition:
        if x.ndim != 3 or c.shape != (x.shape[0], x.shape[2]):
            raise ShapeError(f"{name}: x {x.shape} must be (N, L, D), and the condition (N, D), not {c.shape}.")


# ---------------------------------------------------------------- pointwise


@op
def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh formula (Hendrycks & Gimpel 2016): y = x/2 (1 + τ), τ = tanh(√(2/π) (x + 0.044715 x³)).

    dy/dx = (1 + τ)/2 + x/2 (1 - τ²) √(2/π) (1 + 3 · 0.044715 x²). In place for the same reason as `ops.silu`.

    Parameters
    ----------
    x : Tensor, any shape

    Returns
    -------
    Tensor, shape of x
    """
    tau = np.square(x.data)
    tau *= _GELU_A * _GELU_C
    tau += _GELU_C
    tau *= x.data
    np.tanh(tau, out=tau)
    y = tau + 1
    y *= x.data
    y *= 0.5

    def vjp(g: Array) -> tuple[Array]:
        inner = np.square(x.data)
        inner *= 3 * _GELU_A * _GELU_C
        inner += _GELU_C
        inner *= x.data  # x √(2/π) (1 + 3 a x²)
        d = 1 - tau
        d *= inner
        d += 1
        d *= tau + 1  # (1 + τ) (1 + (1 - τ) inner)
        d *= g
        d *= 0.5
        return (d,)

    return Tensor(y, (x,), vjp)


# ---------------------------------------------------------------- heads, tables


@op
def split_heads(x: Tensor, part: int, parts: int, heads: int) -> Tensor:
    """Take one of `parts` equal parts of the features and fold its heads into the batch.

    Features of x are ordered by part, head, feature. With
    parts = 3 this takes q, k or v out of their common linear layer.

    Parameters
    ----------
    x : Tensor, (N, L, parts * D)
    part, parts : int
        Which of how many.
    heads : int
        Must divide D.

    Returns
    -------
    Tensor, (N * heads, L, D / heads)
    """
    n, length, features = x.shape
    if features % (parts * heads) or not 0 <= part < parts:
        raise ShapeError(f"split_heads: {features} features do not divide into {parts} parts of {heads} heads.")
    width = features // parts
    taken = slice(part * width, (part + 1) * width)
    y = x.data[..., taken].reshape(n, length, heads, -1).transpose(0, 2, 1, 3)

    def vjp(g: Array) -> tuple[Array]:
        whole = np.zeros(x.shape, g.dtype)
        whole[..., taken].reshape(n, length, heads, -1)[...] = _by_token(g, heads)
        return (whole,)

    return Tensor(np.ascontiguousarray(y).reshape(n * heads, length, -1), (x,), vjp)


@op
def merge_heads(x: Tensor, heads: int) -> Tensor:
    """Undo `split_heads` of one part: (N * heads, L, d) -> (N, L, heads * d)."""
    batch, length, d = x.shape
    if batch % heads:
        raise ShapeError(f"merge_heads: a batch of {batch} is not {heads} heads of some images.")
    n = batch // heads

    def vjp(g: Array) -> tuple[Array]:
        by_head = g.reshape(n, length, heads, d).transpose(0, 2, 1, 3)
        return (np.ascontiguousarray(by_head).reshape(x.shape),)

    return Tensor(np.ascontiguousarray(_by_token(x.data, heads)).reshape(n, length, heads * d), (x,), vjp)


def _by_token(x: Array, heads: int) -> Array:
    """(N * heads, L, d) -> (N, L, heads, d), a view."""
    return x.reshape(-1, heads, *x.shape[1:]).transpose(0, 2, 1, 3)


@op
def embedding(table: Tensor, index: Array) -> Tensor:
    """Rows of a table: table (K, D), index (N,) integers in [0, K) -> (N, D)."""
    i = index.data if isinstance(index, Tensor) else index

    def vjp(g: Array) -> tuple[Array]:
        d = np.zeros(table.shape, g.dtype)
        np.add.at(d, i, g)  # a row that was taken twice receives both gradients
        return (d,)

    return Tensor(table.data[i], (table,), vjp)
