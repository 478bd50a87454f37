"""Channel balancing: move the range of salient input channels from the activations into the weights, or back.

    X W = (X B) (B^-1 W)          B = diag(b) > 0, one number for each of the K input channels

changes nothing in float, and everything for a quantizer. With s_x = max |X_j| over tokens and s_w = max |W_j| over
outputs,

    SmoothQuant   b_j = s_w^(1 - alpha) / s_x^alpha                  (arXiv 2211.10438, eq. 4; they divide X by it)
    CSB           b_j = sqrt(s_x s_w) / s_x = SmoothQuant, alpha 1/2 (PTQ4DiT, arXiv 2405.16005, eq. 5 to 7)
    SSC           s_x = sum_t eta_t s_x^(t)                          (PTQ4DiT, eq. 9 to 11)
                  eta_t = exp(-rho_t) / sum exp(-rho),   rho_t = Spearman's rank correlation of s_x^(t) and s_w

SSC gives more weight to time-steps at which activations and weights are salient in *different* channels: there
balancing helps most. DiTAS (arXiv 2409.07756) takes the largest s_x^(t) of all t instead.

**Folding.** B costs nothing at run time where the layer's input is made by something linear in each channel:

    LN(x) (1 + gamma) + beta, gamma and beta from adaLN's linear layer: its rows of both times b, their biases
        beta b and (1 + gamma) b - 1                                     (`fold_modulation`)
    P V, all of a channel's tokens mixed by the same probabilities: V's rows and biases times b (`fold_rows`)

and the layer itself takes its columns divided by b (`fold_columns`). GELU is not linear, so fc2 has no such place.

Shapes: s_x, s_w, b (K,); weights (O, K), biases (O,). Folding is done in float64 and rounded once.
Errors: `ShapeError` where lengths differ, `RangeError` for alpha outside of [0, 1] and for b that is not positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import RangeError, ShapeError

Array = NDArray[Any]
Float64 = NDArray[np.float64]

FLOOR = 1e-8  # of a salience: a channel that is never used gets a finite factor
REACH = 1e4  # b lies in [1/REACH, REACH]: beyond, folded weights lose digits and nothing is gained


def salience(x: Array) -> Float64:
    """max |x_j| over all but the last axis: (..., K) -> (K,)."""
    return np.abs(x.reshape(-1, x.shape[-1])).max(axis=0).astype(np.float64)


def balancing(s_x: ArrayLike, s_w: ArrayLike, alpha: float = 0.5) -> Float64:
    """b (K,): what activations are multiplied by, and weights divided.

    Parameters
    ----------
    s_x, s_w : array_like, (K,)
        Salience of activations and of weights.
    alpha : float
        0 leaves weights all alike and their range to the activations; 1 makes activations all alike; 1/2 is CSB.

    Returns
    -------
    float64 array, (K,)
    """
    x, w = (np.maximum(np.asarray(s, np.float64), FLOOR) for s in (s_x, s_w))
    if x.shape != w.shape or x.ndim != 1:
        raise ShapeError(f"salience of activations {x.shape} and of weights {w.shape}: both must be (K,)")
    if not 0 <= alpha <= 1:
        raise RangeError(f"alpha={alpha}: give 0 to 1 (1/2 is PTQ4DiT's balance)")
    if not (np.isfinite(x) & np.isfinite(w)).all():
        raise RangeError("a salience is NaN or infinite: the calibration data or the weights are; look for it there")
    return np.clip(w ** (1 - alpha) / x**alpha, 1 / REACH, REACH)


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation in [-1, 1]: Pearson's of the ranks, ties sharing theirs; 0 where one is constant."""
    ranks = [_ranks(np.asarray(v, np.float64)) for v in (a, b)]
    if ranks[0].shape != ranks[1].shape:
        raise ShapeError(f"ranks of {ranks[0].size} and of {ranks[1].size} numbers cannot be correlated")
    x, y = (r - r.mean() for r in ranks)
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else 0.0


def ssc_weights(s_x: Sequence[ArrayLike], s_w: ArrayLike) -> Float64:
    """eta (T,) of PTQ4DiT: the share of each time-step's salience; positive, with the sum 1."""
    rho = np.array([spearman(s, s_w) for s in s_x])
    weights = np.exp(-rho)
    return np.asarray(weights / weights.sum())


def ssc_salience(s_x: Sequence[ArrayLike], s_w: ArrayLike) -> Float64:
    """s_x (K,) of all time-steps together, by their weights."""
    return np.asarray(ssc_weights(s_x, s_w) @ np.asarray(s_x, np.float64))


# ---------------------------------------------------------------- folding


def fold_columns(weight: Array, b: Float64) -> Array:
    """The balanced layer's own weight (O, K): columns divided by b."""
    return np.asarray(weight / _factors(b, weight.shape[1])).astype(weight.dtype)


def fold_rows(weight: Array, bias: Array, rows: slice, b: Float64) -> tuple[Array, Array]:
    """A linear layer whose outputs in `rows` are multiplied by b: V's part of qkv, before proj."""
    return _scaled(weight, bias, rows, b, b * bias[rows])


def fold_modulation(weight: Array, bias: Array, shift: slice, scale: slice, b: Float64) -> tuple[Array, Array]:
    """adaLN's linear layer so that LN(x) (1 + scale) + shift comes out multiplied by b.

    Parameters
    ----------
    weight, bias : array, (6 D, D) and (6 D,)
    shift, scale : slice
        Rows of the two vectors, D of each.
    b : float64 array, (D,)

    Returns
    -------
    weight, bias : array
        As given, with other numbers in these rows.
    """
    weight, bias = _scaled(weight, bias, shift, b, b * bias[shift])
    return _scaled(weight, bias, scale, b, (1 + bias[scale].astype(np.float64)) * b - 1)


def _scaled(weight: Array, bias: Array, rows: slice, b: Float64, new_bias: Array) -> tuple[Array, Array]:
    w, v = weight.copy(), bias.copy()
    w[rows] = _factors(b, len(w[rows]))[:, None] * weight[rows].astype(np.float64)
    v[rows] = new_bias
    return w, v


def _factors(b: Float64, channels: int) -> Float64:
    if b.shape != (channels,):
        raise ShapeError(f"{b.shape} factors for {channels} channels; give one for each")
    if not ((b > 0) & (b < np.inf)).all():
        raise RangeError("a balancing factor is not positive and finite; make them with `balancing`")
    return b


def _ranks(x: Float64) -> Float64:
    """Ranks from 0; equal numbers get the mean of theirs."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count + 1) / 2)[place.ravel()])
