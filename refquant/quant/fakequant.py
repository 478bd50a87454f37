"""Fake quantization as an operation of the tape: floats on the grid, gradients straight through.

Forward is exactly `refquant.quant.affine.fake_quantize` (a test holds them equal, bit for bit), in
five passes over one buffer instead of a round trip through bytes: this is what every activation of
a simulated network goes through. Backward is the straight-through estimator,

    dx^/dx = 1 where qmin <= round(x / scale) + zero_point <= qmax, else 0      (both ends count as inside)

which is the derivative of the clip and ignores the rounding (TFMQ-DM ``quant_layer.py:159-160,211-227``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import intmath
from ..autograd.tensor import Tensor, op
from ..errors import ShapeError
from .affine import QParams
from .grids import Grid


@op
def fake_quant(x: Tensor, qparams: QParams | Grid) -> Tensor:
    """Round x to the grid of `qparams` (one scale for the tensor), or to another `Grid`; same shape and dtype.

    Parameters
    ----------
    x : Tensor, any shape
        Finite (NaN passes through as NaN: the caller checks its results once, not every layer).
    qparams : QParams or Grid

    Returns
    -------
    Tensor, shape and dtype of x
    """
    if not isinstance(qparams, QParams):
        return Tensor(qparams.fake_quantize(x.data), (x,), lambda g: (g * qparams.inside(x.data),))
    spec = qparams.spec
    if spec.axis is not None:
        raise ShapeError(f"fake_quant: activations take one scale for the tensor, got axis={spec.axis}.")
    scale, zero = qparams.scale.astype(x.dtype), qparams.zero_point
    q = intmath.grid_codes(x.data, scale, zero, spec.qmin, spec.qmax)
    unclipped = np.rint(x.data / scale) + zero if x.requires_grad else None
    q -= zero.astype(q.dtype)
    q *= scale

    def vjp(g: NDArray[Any]) -> tuple[NDArray[Any]]:
        return (g * ((unclipped >= spec.qmin) & (unclipped <= spec.qmax)),)

    return Tensor(q, (x,), vjp)
