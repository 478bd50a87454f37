"""Reconstruction losses: how far the output y of a quantized layer or block is from the float output.

With e = y - target, sums over channels c, and means over everything else (samples b, pixels or tokens):

    reconstruction_loss   mean_b,pixels Σ_c |e|^p                          p = 2 for weights; 2.4 in Q-Diffusion
    fisher_diag           mean_b,pixels Σ_c e² g²                          BRECQ (Li et al. 2021, arXiv 2102.05426)
    fisher_full           mean_b,pixels,c (Σ_pixels,c |e g|)_b |e g| / 100

g estimates how much the network's final loss minds an error at that place: its gradient with respect to the
layer's output. (Released: g = |d KL(float output || quantized output) / dy| + 1, ``quant/data_utill.py``.)

Source: TFMQ-DM ``quant/quant_layer.py:146-156`` and ``quant/reconstruction_util.py:51-61``. The 100 is theirs.

Shapes: y (N, ..., C), channels last: NHWC, (N, C) or (N, tokens, C); target and g are constants of the same
shape. The result is a scalar of y's dtype.

Where we differ: the authors sum over axis 1. That is the channels of their NCHW and of (N, C), where we agree,
but the *tokens* of (N, tokens, C), so there their loss is tokens/C times ours. We always sum over channels: the
weight of the rounding term against this loss should not depend on how a layer's input is laid out.

Errors: ``ShapeError`` if the shapes differ (nothing is broadcast), there is no channel axis or nothing to
average; ``RangeError`` for p < 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..autograd.tensor import Tensor, as_tensor, op
from ..errors import RangeError, ShapeError

Array = NDArray[Any]


@op
def reconstruction_loss(y: Tensor, target: Tensor | Array, p: float = 2.0) -> Tensor:
    """Σ |e|^p / (number of elements / C), with slope p |e|^(p-1) sign(e); at e = 0 the slope is 0, for p = 1 too."""
    if not 1 <= p < np.inf:
        raise RangeError(f"p={p}: must be finite and at least 1, or the slope is infinite at 0; 2 and 2.4 are in use")
    e = _difference(y, target)
    power = e if p == 2 else np.sign(e) * np.abs(e) ** (float(p) - 1)
    places = e.size // e.shape[-1]
    return Tensor((power * e).sum() / e.dtype.type(places), (y,), lambda g: (g * (float(p) / places) * power,))


@op
def fisher_diag(y: Tensor, target: Tensor | Array, grad: Tensor | Array) -> Tensor:
    """Σ e² g² / (number of elements / C): the squared error, weighted by a diagonal Fisher matrix."""
    e = _difference(y, target)
    weighted = e * np.square(_like(y, grad, "grad"))
    places = e.size // e.shape[-1]
    return Tensor((weighted * e).sum() / e.dtype.type(places), (y,), lambda g: (g * (2 / places) * weighted,))


@op
def fisher_full(y: Tensor, target: Tensor | Array, grad: Tensor | Array) -> Tensor:
    """Σ_b D_b² / (100 * number of elements) with D_b = Σ |e g| over sample b; a rank-one Fisher matrix each."""
    e = _difference(y, target)
    weight = np.abs(_like(y, grad, "grad"))
    dot = (np.abs(e) * weight).reshape(len(e), -1).sum(axis=1)
    per_sample = dot.reshape(-1, *[1] * (e.ndim - 1))
    scale = e.dtype.type(100 * e.size)
    return Tensor(
        np.square(dot).sum() / scale,
        (y,),
        lambda g: (g * (2 / scale) * per_sample * weight * np.sign(e),),
    )


def _difference(y: Tensor, target: Tensor | Array) -> Array:
    if y.ndim < 2 or not y.data.size:
        raise ShapeError(f"a reconstruction loss wants y of shape (N, ..., C) with at least one element, got {y.shape}")
    return y.data - _like(y, target, "target")


def _like(y: Tensor, constant: Tensor | Array, name: str) -> Array:
    data = as_tensor(constant).data
    if data.shape != y.shape:
        raise ShapeError(f"{name} has shape {data.shape}, y has {y.shape}; they must be the same, channels last")
    return data.astype(y.dtype, copy=False)
