"""GPTQ: round weights column by column, and let the columns to come make good for each error.

The output error of a linear layer is the sum over channels of (w^ - w) H (w^ - w)', with H = mean x x' over the inputs.
Column k is rounded to the nearest code; of the error e = w_k - w^_k the best that the later columns can do is

    w_j -= e / U_kk  U_kj     for j > k           U'U = H^-1, U upper triangular

so a column that is correlated with later ones leaves a small part of its error behind (Frantar et al. 2022,
arXiv 2210.17323, algorithm 1; for DiT in Q-DiT, arXiv 2406.17343). Scales and zero
points are given and stay ("static groups"): the original finds a group's when it arrives there, from weights that are
already corrected.

Shapes: w (O, K), x (..., K), H (K, K). Computed in float64.
Errors: `ShapeError` where shapes do not fit, `RangeError` where H is not finite or damping not positive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import intmath
from ..errors import RangeError, ShapeError
from .affine import QParams

Array = NDArray[Any]
Float64 = NDArray[np.float64]


def second_moment(x: Array) -> Float64:
    """H (K, K) of inputs (..., K): the mean of x x'."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    return rows.T @ rows / len(rows)


def gptq(w: Array, h: Float64, qparams: QParams, damping: float = 0.01) -> NDArray[np.integer]:
    """Codes (O, K) of a weight.

    Parameters
    ----------
    w : float array, (O, K)
    h : float64 array, (K, K)
        `second_moment` of the layer's inputs.
    qparams : QParams
        With axis 0: a scale for each channel, or for each of its groups of inputs (see `groupwise`).
    damping : float
        Added to H's diagonal, in units of its mean: inputs that were never seen, or are copies of each other, make
        H singular. The authors' 0.01.

    Returns
    -------
    int8 or uint8 array, (O, K)
    """
    outputs, inputs = w.shape
    if h.shape != (inputs, inputs) or qparams.spec.axis != 0 or qparams.scale.size % outputs:
        raise ShapeError(
            f"gptq: weight {w.shape}, H {h.shape} and {qparams.scale.size} scales; H must be (K, K), and there must "
            "be a scale for each output channel or group"
        )
    if not np.isfinite(h).all() or not 0 < damping < np.inf:
        raise RangeError(f"gptq: damping is {damping} and must be positive, and H finite")
    groups = qparams.scale.size // outputs
    if inputs % groups:
        raise ShapeError(f"gptq: {groups} groups do not divide {inputs} inputs")
    scale, zero = (a.reshape(outputs, groups).astype(np.float64) for a in (qparams.scale, qparams.zero_point))
    mean = float(np.trace(h)) / inputs
    u = _factor(h + damping * (mean if mean > 0 else 1.0) * np.eye(inputs))
    left, codes = w.astype(np.float64), np.empty(w.shape, qparams.spec.dtype)
    for k in range(inputs):
        s, z = scale[:, k * groups // inputs], zero[:, k * groups // inputs]
        q = np.clip(intmath.round_half_even(left[:, k] / s) + z, qparams.spec.qmin, qparams.spec.qmax)
        codes[:, k] = q
        error = (left[:, k] - s * (q - z)) / u[k, k]
        left[:, k + 1 :] -= error[:, None] * u[k, k + 1 :]
    return codes


def _factor(h: Float64) -> Float64:
    """U upper triangular with U'U = H^-1, without inverting H.

    With the rows and columns of H reversed, H~ = L L'; reversed again, H = M M' with M upper triangular, and
    H^-1 = (M^-1)' M^-1.
    """
    m = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return np.asarray(np.linalg.inv(m))
