"""Learned step size: fake quantization whose scale has a gradient, too (LSQ, Esser et al. 2020, arXiv 1902.08153).

Forward is ``fake_quant``, bit for bit. Backward treats rounding as the addition of a constant, so with
v = x/s, the code q = clamp(⌊v⌉ + z, qmin, qmax) and z constant:

                inside: qmin <= ⌊v⌉ + z <= qmax         clipped
    dx^/dx      1                                       0
    dx^/ds      ⌊v⌉ - v                                 q - z, that is qmin - z or qmax - z

A larger step is thus worth what the rounding error of the values inside, and the reach of the values beyond,
say it is: growing s moves a clipped value outwards by q - z.

Where this differs from the paper, as the authors' code does (TFMQ-DM ``quant/quant_layer.py:159-160,211-227``):

* Inside is decided by the rounded code, not by v: at v = 7.3 with codes to 7 the slope is -0.3, where eq. 3 of
  the paper has 7. The paper's clip comes before its rounding.
* No factor 1/√(N qmax) on the step's gradient (section 2.2 of the paper). Adam divides it out again, up to the
  size of its epsilon; with plain gradient descent the rate must be chosen for the number of values N.
* z may be other than 0 (as in LSQ+, Bhalgat et al. 2020, arXiv 2004.09576, which learns it, too).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import intmath
from ..autograd.tensor import Tensor, as_tensor, op
from ..errors import RangeError, ShapeError
from .affine import QParams, QSpec


@op
def lsq(x: Tensor, scale: Tensor, zero_point: ArrayLike, spec: QSpec) -> Tensor:
    """Round x to the grid of (scale, zero_point, spec); differentiable in x and in scale.

    x is any shape, finite (NaN passes through as NaN); scale () and zero_point an integer, both checked as
    ``QParams`` does. Same shape and dtype as x.

    Errors: ``RangeError`` if the step is no longer positive, or unusable otherwise; ``ShapeError`` if there is
    more than one.

    Parameters
    ----------
    x : Tensor, any shape
        Finite (NaN passes through as NaN: the caller checks its results once, not every layer).
    scale : Tensor, ()
    zero_point : int
        Both checked as ``QParams`` does.
    spec : QSpec

    Returns
    -------
    Tensor, shape and dtype of x
    """
    if spec.axis is not None or scale.shape != ():
        raise ShapeError(
            f"lsq: one learned step for the tensor, got scale {scale.shape} and axis={spec.axis}; "
            "give a scalar Tensor and a spec with axis=None"
        )
    if not scale.data > 0:
        raise RangeError(
            f"lsq: the learned step is {scale.item()} and must be positive; lower its learning rate "
            "(the authors' are 4e-5 to 4e-4)"
        )
    zero = QParams(scale.data, as_tensor(zero_point).data, spec).zero_point
    s = scale.data.astype(x.dtype)
    codes = intmath.grid_codes(x.data, s, zero, spec.qmin, spec.qmax)
    with np.errstate(over="ignore"):  # an infinite quotient is clipped
        v = x.data / s
    inside = intmath.round_half_even(v) + zero.astype(x.dtype) == codes
    codes -= zero.astype(x.dtype)
    step_slope = np.subtract(codes, v, out=codes.copy(), where=inside)

    def vjp(g: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        return g * inside, np.asarray((g * step_slope).sum(), dtype=scale.dtype)

    return Tensor(codes * s, (x, scale), vjp)
