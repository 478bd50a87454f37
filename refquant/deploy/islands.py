"""The float islands between integer operations: what turns floats into codes, and moves codes about.

float32 in and uint8 codes out, with the arithmetic of the float network (`refquant.autograd`): these are the twins
that the C core's fused versions are held to.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, nnops, no_grad, ops
from ..intmath import grid_codes
from ..quant.affine import QParams
from .program import Norm


def encode(x: NDArray[np.float32], q: QParams, norm: Norm | None, silu: bool, out: NDArray[np.uint8]) -> None:
    """Codes of SiLU(norm(x)), of whichever of the two is asked for; x and out (N, H, W, C) or (N, L, C)."""
    with no_grad():
        y = Tensor(x)
        if norm is not None:
            y = nnops.group_norm(y, Tensor(norm.gamma), Tensor(norm.beta), norm.groups, norm.eps)
        if silu:
            y = ops.silu(y)
    out[...] = grid_codes(y.data, q.scale, q.zero_point, q.spec.qmin, q.spec.qmax)


def probabilities(x: NDArray[np.float32], q: QParams, out: NDArray[np.uint8]) -> None:
    """Codes of the softmax over the last axis."""
    out[...] = grid_codes(ops.softmax_array(x), q.scale, q.zero_point, q.spec.qmin, q.spec.qmax)


def upsample(x: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Every pixel of x (N, H, W, C) twice in both directions."""
    n, h, w, c = x.shape
    out.reshape(n, h, 2, w, 2, c)[...] = x[:, :, None, :, None, :]
