"""Elementary differentiable operations: arithmetic, shape, reductions, pointwise functions.

Each function computes its value and, in the same three to six lines, defines the vjp. Arguments
are Tensors (arrays are taken as constants); broadcasting follows NumPy and is undone in the vjp
by `unbroadcast`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError
from .tensor import Tensor, as_tensor, op


def unbroadcast(g: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Sum `g` over the axes that broadcasting added or stretched, back to `shape`."""
    if g.shape == shape:
        return g
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=stretched, keepdims=True) if stretched else g


@op
def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b."""
    return Tensor(a.data + b.data, (a, b), lambda g: (unbroadcast(g, a.shape), unbroadcast(g, b.shape)))


@op
def sub(a: Tensor, b: Tensor) -> Tensor:
    """a - b."""
    return Tensor(a.data - b.data, (a, b), lambda g: (unbroadcast(g, a.shape), unbroadcast(-g, b.shape)))


@op
def mul(a: Tensor, b: Tensor) -> Tensor:
    """a * b, elementwise."""
    return Tensor(
        a.data * b.data,
        (a, b),
        lambda g: (unbroadcast(g * b.data, a.shape), unbroadcast(g * a.data, b.shape)),
    )


@op
def scale(a: Tensor, c: float) -> Tensor:
    """c * a for a Python number c (keeps the dtype of `a`)."""
    c = a.dtype.type(c)  # NumPy 1 would make a float64 of a scalar float32 times a Python number
    return Tensor(a.data * c, (a,), lambda g: (g * c,))


@op
def square(a: Tensor) -> Tensor:
    """a², elementwise."""
    return Tensor(np.square(a.data), (a,), lambda g: (g * (2 * a.data),))


@op
def exp(a: Tensor) -> Tensor:
    """e^a, elementwise."""
    y = np.exp(a.data)
    return Tensor(y, (a,), lambda g: (g * y,))


@op
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product over the last two axes; leading axes must agree (no broadcasting of batches)."""
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ShapeError(f"matmul: {a.shape} and {b.shape} do not fit; wants (..., M, K) and (..., K, N).")
    return Tensor(
        a.data @ b.data,
        (a, b),
        lambda g: (g @ b.data.swapaxes(-1, -2), a.data.swapaxes(-1, -2) @ g),
    )


@op
def reshape(a: Tensor, shape: Sequence[int]) -> Tensor:
    """The same elements in row-major order under another shape."""
    return Tensor(a.data.reshape(shape), (a,), lambda g: (g.reshape(a.shape),))


@op
def transpose(a: Tensor, axes: Sequence[int]) -> Tensor:
    """Permute the axes."""
    return Tensor(np.ascontiguousarray(a.data.transpose(axes)), (a,), lambda g: (g.transpose(np.argsort(axes)),))


@op
def concat(a: Tensor, b: Tensor) -> Tensor:
    """Join along the last axis (the channels of an NHWC tensor)."""
    cut = a.shape[-1]
    return Tensor(
        np.concatenate((a.data, b.data), axis=-1),
        (a, b),
        lambda g: (np.ascontiguousarray(g[..., :cut]), np.ascontiguousarray(g[..., cut:])),
    )


def split(a: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Undo `concat`: the first `at` channels of the last axis, and the others."""
    return channels(a, 0, at), channels(a, at, a.shape[-1])


@op
def channels(a: Tensor, start: int, stop: int) -> Tensor:
    """Take channels start .. stop-1 of the last axis."""

    def vjp(g: NDArray[Any]) -> tuple[NDArray[Any]]:
        whole = np.zeros(a.shape, g.dtype)
        whole[..., start:stop] = g
        return (whole,)

    return Tensor(np.ascontiguousarray(a.data[..., start:stop]), (a,), vjp)


@op
def sum_all(a: Tensor) -> Tensor:
    """Sum of all elements, a scalar."""
    return Tensor(a.data.sum(), (a,), lambda g: (np.broadcast_to(g, a.shape),))


@op
def mean_all(a: Tensor) -> Tensor:
    """Mean of all elements, a scalar."""
    size = a.dtype.type(a.data.size)  # not an int: see `scale`
    return Tensor(a.data.mean(), (a,), lambda g: (np.broadcast_to(g / size, a.shape),))


@op
def relu(a: Tensor) -> Tensor:
    """max(a, 0); the derivative at 0 is taken as 0."""
    return Tensor(np.maximum(a.data, 0), (a,), lambda g: (g * (a.data > 0),))


@op
def silu(x: Tensor) -> Tensor:
    """y = x σ(x), with dy/dx = σ + y (1 - σ).

    The lines are in place because each NumPy pass over a large array costs as much as a tenth
    of a convolution; e^(-x) may overflow to inf, which gives σ = 0 exactly as it should.

    Parameters
    ----------
    x : Tensor, any shape

    Returns
    -------
    Tensor, shape of x
    """
    s = np.negative(x.data)
    with np.errstate(over="ignore"):
        np.exp(s, out=s)
    s += 1
    np.reciprocal(s, out=s)  # s = σ(x)
    y = x.data * s

    def vjp(g: NDArray[Any]) -> tuple[NDArray[Any]]:
        d = 1 - s
        d *= y
        d += s
        d *= g
        return (d,)

    return Tensor(y, (x,), vjp)


@op
def softmax(a: Tensor) -> Tensor:
    """Softmax over the last axis."""
    y = softmax_array(a.data)
    return Tensor(y, (a,), lambda g: (y * (g - (g * y).sum(axis=-1, keepdims=True)),))


def softmax_array(x: NDArray[Any]) -> NDArray[Any]:
    """Softmax over the last axis of a plain array; the maximum is subtracted, so nothing overflows."""
    e = x - x.max(axis=-1, keepdims=True)
    np.exp(e, out=e)
    e /= e.sum(axis=-1, keepdims=True)
    return e


def mse(prediction: Tensor, target: Tensor | NDArray[Any]) -> Tensor:
    """Mean squared error, a scalar."""
    return mean_all(square(sub(prediction, as_tensor(target))))
