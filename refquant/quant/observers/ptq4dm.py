"""The range searches of PTQ4DM, as released: 1-D over thresholds, 2-D over ranges and zero points.

    1-D   [-c, c], or [0, c] and [-c, 0] for tensors of one sign      c = max abs(x) i / 100,  i = 1 .. 100
    2-D   [-z d, (L-1-z) d]                                           d = (max x - min x) i / 100 / (L-1), all L z

Each candidate is scored by mean abs(x^ - x)**2.4 and the first minimum wins. Symmetric quantizers and tensors
of one sign take the 1-D search, all others the 2-D one. "Symmetric" means the range only: the codes are 0 ..
L-1 all the same, and [-c, c] has its zero point at the tie (L-1)/2, which rounds to either side.

    search of a tensor or of channels         `search_range`        QDrop/quant/quant_layer.py:179-287
    scale and zero point of a range           `from_search_range`   QDrop/quant/quant_layer.py:151-163
    both                                      `search`

Activations take the moving average of the ranges found in the batches: `RunningRange` with momentum 0.9 and
``update_range``, then `from_search_range`.

Where we differ and why. Errors are added up in float64 (theirs in float32). The 2-D search has 100 L candidates,
25,600 at 8 bits; ours drops a candidate as soon as its error on a part of the data is larger than another's
on all of them. That changes no result: 16,384 values at 8 bits take 0.07 s instead of 12 s.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import RangeError
from ..affine import QParams, QSpec
from .ranges import SCALE_FLOOR, as_rows, per_spec

Float32 = NDArray[np.float32]

STEPS = np.arange(1, 101, dtype=np.float32)  # i of the hundredths
POWER = 2.4
BLOCK = 1 << 18  # elements (candidates x values) scored at a time


def search(x: ArrayLike, spec: QSpec, *, symmetric: bool = True) -> QParams:
    """Quantizer of the range that `search_range` finds.

    Parameters
    ----------
    x : array_like, any shape
    spec : QSpec
        ``symmetric=False``, for all of these quantizers have a zero point. ``signed`` moves the codes by L/2.
    symmetric : bool
        The range is [-c, c]. Weights of the released recipe; activations take False.

    Returns
    -------
    QParams

    Examples
    --------
    >>> q = search(np.arange(-5, 11), QSpec(bits=4), symmetric=False)
    >>> float(q.scale), int(q.zero_point)
    (1.0, 5)
    """
    return from_search_range(*search_range(x, spec, symmetric=symmetric), spec)


def search_range(x: ArrayLike, spec: QSpec, *, symmetric: bool = True) -> tuple[Float32, Float32]:
    """The range whose quantizer has the least error on x, of PTQ4DM's 100 or 100 L candidates.

    Parameters
    ----------
    x : array_like, any shape
        Whether it has one sign is decided for the whole tensor, also where channels are searched each by itself.
    spec : QSpec
        For its bits and its axis.
    symmetric : bool

    Returns
    -------
    lo, hi : float32 array, () or (C,)
        Where a tensor is all zero, 0 and 0.
    """
    _check(spec)
    rows, top = as_rows(x, spec.axis), np.float32(spec.qmax - spec.qmin)
    sides = one_side(rows)
    best = []
    for row in rows:
        two_sided = sides == "no" and not symmetric
        lo, hi = _ranges_2d(row, top) if two_sided else _thresholds(row, sides)
        i = _least_error(row, *_affine(lo, hi, top), top)
        best.append((lo[i], hi[i]))
    lows, highs = np.array(best, dtype=np.float32).T
    return per_spec(lows, spec), per_spec(highs, spec)


def from_search_range(lo: ArrayLike, hi: ArrayLike, spec: QSpec) -> QParams:
    """Quantizer of a range by PTQ4DM's arithmetic: float32 throughout, the zero point clamped to the codes.

    ``observers.from_range`` computes in float64, and multiplies by 1/scale where this divides, which sends the
    tie of a range [-c, c] the other way for some c.

    Parameters
    ----------
    lo, hi : float or array_like, () or (C,)
        Widened to contain 0.
    spec : QSpec

    Returns
    -------
    QParams
    """
    _check(spec)
    low, high = np.asarray(lo, dtype=np.float32), np.asarray(hi, dtype=np.float32)
    if not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
        raise RangeError(f"range [{low}, {high}]: give two finite ends with lo <= hi, for every channel")
    scale, zero_point = _affine(low, high, np.float32(spec.qmax - spec.qmin))
    return QParams(scale, zero_point.astype(np.int32) + np.int32(spec.qmin), spec)


def one_side(x: ArrayLike) -> str:
    """The sign that the values of x share: "pos" (all >= 0), "neg" (all <= 0) or "no"."""
    values = np.asarray(x)
    return "pos" if values.min() >= 0 else "neg" if values.max() <= 0 else "no"


def _check(spec: QSpec) -> None:
    if spec.symmetric:
        raise RangeError(
            f"{spec}: PTQ4DM's quantizers have a zero point, also for symmetric ranges; give a QSpec with "
            "symmetric=False and search(..., symmetric=True)"
        )


def _thresholds(row: Float32, sides: str) -> tuple[Float32, Float32]:
    """The 100 ranges of the 1-D search."""
    thresholds = np.abs(row).max() / np.float32(100) * STEPS
    none = np.zeros_like(thresholds)
    return none if sides == "pos" else -thresholds, none if sides == "neg" else thresholds


def _ranges_2d(row: Float32, top: np.float32) -> tuple[Float32, Float32]:
    """The 100 L ranges of the 2-D search, all zero points of the narrowest first; (100 L,) each."""
    width = (max(row.max(), np.float32(0)) - min(row.min(), np.float32(0))) / np.float32(100) * STEPS[:, None]
    below = np.arange(top + 1, dtype=np.float32) * (width / top)
    return np.ravel(0 - below), np.ravel(width - below)


def _affine(lo: Float32, hi: Float32, top: np.float32) -> tuple[Float32, Float32]:
    """Scale and zero point (on codes 0 .. top, as floats) of ranges of any shape."""
    lo, hi = np.minimum(lo, np.float32(0)), np.maximum(hi, np.float32(0))
    scale = np.maximum((hi - lo) / top, SCALE_FLOOR)
    return scale, np.clip(0 - np.rint(lo / scale), 0, top)


def _least_error(row: Float32, scale: Float32, zero_point: Float32, top: np.float32) -> int:
    """The first of the K candidates with the least error on row (n,); scale and zero_point are (K,).

    A sum of errors only grows, so a candidate whose sum over a part of the values exceeds the whole sum of
    another has lost. The largest values come first, for they expose every range that clips them (without
    that, one outlier among 16,384 values left 70 % of the work); the rest comes in random order, because
    neighbours say the same thing.
    """
    order = np.argsort(-np.abs(row))
    extremes, rest = np.split(row[order], [len(row) // 64])
    values = np.concatenate([extremes, np.random.default_rng(0).permutation(rest)])
    alive, error, start = np.arange(len(scale)), np.zeros(len(scale)), 0
    bound = np.inf
    while start < len(values):
        part = values[start : start + max(1, BLOCK // len(alive))]
        error[alive] += _errors(part, scale[alive], zero_point[alive], top)
        leader = alive[[error[alive].argmin()]]
        bound = min(bound, float(_errors(values, scale[leader], zero_point[leader], top)[0]))
        alive = alive[error[alive] <= bound * (1 + 1e-9)]  # the two sums of a winner differ by rounding
        start += len(part)
    return int(alive[error[alive].argmin()])


def _errors(values: Float32, scale: Float32, zero_point: Float32, top: np.float32) -> NDArray[np.float64]:
    """Sum of abs(x^ - x)**2.4 over values (n,) for each candidate (K,)."""
    s, z = scale[:, None], zero_point[:, None]
    distance = np.clip(np.rint(values / s) + z, 0, top) - z
    distance *= s
    distance -= values
    return np.asarray((np.abs(distance).astype(np.float64) ** POWER).sum(axis=1))
