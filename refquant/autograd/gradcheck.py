"""Gradients against finite differences: the test that every hand-derived vjp has to pass.

A function y = f(x_0, x_1, ...) of any shape is made scalar by a fixed random projection,
L = <c, y>. The tape's gradient of L is then compared with central differences,

    dL/dv  ~  <c, f(x + h v) - f(x - h v)> / 2h,

along one random direction v for each input (the check of HIPS autograd: two evaluations, whatever
the size), and along every axis for inputs that are small enough. The first misses nothing but a
coincidence; the second says which element is wrong.

Step. The difference is off by about h² L'''/6, and rounding adds eps L/h; their sum is least near
h = cbrt(eps) = 6e-6, in units of the input's magnitude m (its largest absolute value, or 1 if it
is all zeros). Both errors are then about eps^(2/3) = 4e-11 of L / m.

Tolerance. Analytic a and numeric n agree when

    |a - n| <= tolerance * max(|a|, |n|, 1e-4 Σ|c y| / m),       tolerance = 1e-6.

The third term is for derivatives that are (nearly) zero: below it the difference above is mostly
rounding, since 1e-6 * 1e-4 is 1e-10, three times the 4e-11 it can resolve.

Everything is float64: in float32 the same analysis leaves 2e-5, too coarse to see a wrong term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import RefquantError, ShapeError
from .ops import mul, sum_all
from .tensor import Tensor, gradients, no_grad

STEP = float(np.cbrt(np.finfo(np.float64).eps))
FLOOR = 1e-4


class GradientError(RefquantError, AssertionError):
    """A derivative disagrees with the finite difference of its own function."""


def check_gradients(
    f: Callable[..., Tensor],
    *inputs: Tensor | ArrayLike,
    rng: np.random.Generator | None = None,
    per_index_limit: int = 200,
    tolerance: float = 1e-6,
    name: str | None = None,
) -> None:
    """Compare the gradients of `f` with central differences.

    Parameters
    ----------
    f : callable
        ``f(*inputs)`` returns a Tensor of any shape, the same one for the same inputs.
    *inputs : array_like or Tensor
        Where to differentiate. Arrays are copied to float64. A Tensor must be float64 and have
        requires_grad; it is used as it is, so `f` may also reach it by another way: pass
        ``*module.parameters()`` to check a whole network.
    rng : Generator, optional
        For the projection and the directions; a fixed seed by default.
    per_index_limit : int
        Inputs of at most so many elements are also checked element by element.
    tolerance : float
        See the module's description.
    name : str, optional
        What to call `f` in the message.

    Raises
    ------
    GradientError
        Naming the function, the input, the index, and both values.
    ShapeError
        A Tensor among the inputs is not a float64 leaf with requires_grad.

    Examples
    --------
    >>> from refquant.autograd import ops
    >>> check_gradients(ops.silu, [-1.0, 0.0, 2.0])
    """
    rng = np.random.default_rng(0) if rng is None else rng
    name = name or getattr(f, "__name__", "the function")
    leaves = [_leaf(x, number) for number, x in enumerate(inputs)]
    y = f(*leaves)
    c = rng.standard_normal(y.shape)
    size = float(np.abs(c * y.data).sum())
    analytic = gradients(sum_all(mul(y, Tensor(c))), leaves)

    def slope(leaf: Tensor, v: NDArray[np.float64], h: float) -> float:
        """<c, f(x + h v) - f(x - h v)> / 2h; subtracted before projecting, so that less is rounded off."""
        x = leaf.data
        try:
            with no_grad():
                leaf.data = x + h * v
                above = f(*leaves).data
                leaf.data = x - h * v
                below = f(*leaves).data
        finally:
            leaf.data = x
        return float((c * (above - below)).sum() / (2 * h))

    for number, (leaf, gradient) in enumerate(zip(leaves, analytic, strict=True)):
        magnitude = float(np.abs(leaf.data).max(initial=0)) or 1.0
        for where, v in _directions(leaf.shape, per_index_limit, rng):
            a, n = float((gradient * v).sum()), slope(leaf, v, STEP * magnitude)
            allowed = tolerance * max(abs(a), abs(n), FLOOR * size / magnitude)
            if not abs(a - n) <= allowed:  # also true for nan
                raise GradientError(
                    f"{name}: the gradient with respect to input {number} {leaf.shape} is wrong {where}: "
                    f"analytic {a:.12g}, numeric {n:.12g}; they differ by {abs(a - n):.3g} "
                    f"and may differ by {allowed:.3g}. "
                    "Compare the vjp with the derivative of the formula above it."
                )


def _leaf(x: Tensor | ArrayLike, number: int) -> Tensor:
    if not isinstance(x, Tensor):
        return Tensor(np.array(x, dtype=np.float64), requires_grad=True)
    if x.dtype != np.float64 or not x.requires_grad:
        raise ShapeError(
            f"check_gradients: input {number} is {x!r}; a Tensor must be float64 with requires_grad=True. "
            "Use Module.astype(np.float64), or pass an array."
        )
    return x


def _directions(
    shape: tuple[int, ...], per_index_limit: int, rng: np.random.Generator
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield every axis of a small input, then one random unit vector; each with its name for the message."""
    if np.prod(shape, dtype=int) <= per_index_limit:
        for index in np.ndindex(shape):
            axis = np.zeros(shape)
            axis[index] = 1
            yield f"at index {index}", axis
    v = rng.standard_normal(shape)
    yield "along a random direction", v / (np.sqrt(np.square(v).sum()) or 1.0)
