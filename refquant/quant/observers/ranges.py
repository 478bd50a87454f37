"""Ranges of a tensor that need no search: given ones, the extremes, percentiles.

``from_range`` is where every observer ends: the three formulas that turn a range of real numbers into a
scale and a zero point. The other modules of this package only differ in the range that they hand to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import RangeError, ShapeError
from ...intmath import round_half_even
from ..affine import QParams, QSpec

SCALE_FLOOR = np.float32(1e-8)

Rows = NDArray[np.float32]  # (C, n): one row for each channel, C = 1 where there is no channel axis
Float64 = NDArray[np.float64]


def from_range(lo: ArrayLike, hi: ArrayLike, spec: QSpec) -> QParams:
    """Quantizer for real numbers in [lo, hi], widened to contain 0.

    Parameters
    ----------
    lo, hi : float or array_like, shape () or (C,) as ``spec.axis`` says
        Finite, lo <= hi.
    spec : QSpec

    Returns
    -------
    QParams

    Raises
    ------
    RangeError
        If an end is NaN or infinite, or lo > hi.

    Notes
    -----
    With m = min(lo, 0), M = max(hi, 0), L = 2**bits, all in float64::

        asymmetric    scale = (M - m) / (L - 1)        zero_point = qmin + round(-m / scale)
        symmetric     scale = 2 max(-m, M) / (L - 2)   zero_point = 0
        always_zero   scale = M / (L - 1)              zero_point = 0

    and scale >= 1e-8. Source: TFMQ-DM ``quant/quant_layer.py:20-35``, which raises TypeError for an all-zero
    tensor; scale 1e-8 with zero point 0 is the limit of its own formula.

    Examples
    --------
    >>> q = from_range(-1.5, 6.0, QSpec(bits=4))
    >>> float(q.scale), int(q.zero_point)
    (0.5, 3)
    """
    low, high = np.asarray(lo, dtype=np.float64), np.asarray(hi, dtype=np.float64)
    if not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
        raise RangeError(f"range [{low}, {high}]: give two finite ends with lo <= hi, for every channel")
    scale, zero_point = affine_map(np.minimum(low, 0), np.maximum(high, 0), spec)
    return QParams(scale, zero_point, spec)


def minmax(x: ArrayLike, spec: QSpec) -> QParams:
    """Quantizer for the whole range of x: clips nothing, and pays for outliers with a large step.

    Parameters
    ----------
    x : array_like, any shape
    spec : QSpec

    Returns
    -------
    QParams
        ``from_range(min x, max x, spec)``, for each channel.

    Notes
    -----
    Source: TFMQ-DM ``quant/quant_layer.py:20-35``.
    """
    rows = as_rows(x, spec.axis)
    return from_range(per_spec(rows.min(axis=1), spec), per_spec(rows.max(axis=1), spec), spec)


def percentile(x: ArrayLike, spec: QSpec, percent: float = 99.99) -> QParams:
    """Quantizer for the range between two percentiles: a fixed share of the values is clipped.

    Parameters
    ----------
    x : array_like, any shape
    spec : QSpec
    percent : float
        In (50, 100]. The range reaches from the (100 - percent)-th to the percent-th percentile, by linear
        interpolation; 100 is min-max. The default clips one value in 10,000 at either end.

    Returns
    -------
    QParams

    Raises
    ------
    RangeError
        Also for other percents: at 50 and below the two ends change places.
    """
    if not 50 < percent <= 100:
        raise RangeError(f"percent={percent}: give a percentile above 50 and up to 100, which is min-max")
    lo, hi = np.percentile(as_rows(x, spec.axis).astype(np.float64), [100 - percent, percent], axis=1)
    return from_range(per_spec(lo, spec), per_spec(hi, spec), spec)


def as_rows(x: ArrayLike, axis: int | None) -> Rows:
    """x as (C, n) float32, one row for each channel (C = 1 without axis), proven finite and not empty."""
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf and is refused below
        array = np.asarray(x, dtype=np.float32)
    if array.size == 0:
        raise RangeError(f"an empty tensor of shape {array.shape} has no range; give at least one value")
    if axis is None:
        rows = array.reshape(1, -1)
    elif -array.ndim <= axis < array.ndim:
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    else:
        raise ShapeError(f"a tensor of shape {array.shape} has no axis {axis}; fit QSpec.axis to the layout")
    lo, hi = rows.min(), rows.max()  # NaN and infinities, if any, show in the extremes
    if not (np.isfinite(lo) and np.isfinite(hi)):
        what = "NaN" if np.isnan(lo) else "an infinity"
        raise RangeError(
            f"a tensor of shape {array.shape} contains {what} (in float32): a range has two finite ends; "
            "find where it was made, or clip the tensor first"
        )
    return rows


def per_spec(values: NDArray[Any], spec: QSpec) -> NDArray[Any]:
    """(C,) values in the shape that spec wants: () without an axis."""
    return values if spec.axis is not None else values.reshape(())


def affine_map(lo: Float64, hi: Float64, spec: QSpec) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The formulas of ``from_range``, for ranges of any shape and not necessarily around 0."""
    top = spec.qmax - spec.qmin  # L - 1
    if spec.symmetric:
        reach, steps = (2 * np.maximum(np.abs(lo), np.abs(hi)), top - 1) if spec.signed else (hi, top)
        scale = np.maximum((reach / steps).astype(np.float32), SCALE_FLOOR)
        return scale, np.zeros(scale.shape, dtype=np.int32)
    scale = np.maximum(((hi - lo) / top).astype(np.float32), SCALE_FLOOR)
    with np.errstate(over="ignore"):
        # -lo * (1/scale) in float32 is what "-x_min / delta" means in PyTorch (Tensor.__rtruediv__). Rounding
        # twice decides which way a range [-a, a] goes, whose -lo/scale is the tie 127.5.
        zero_point = round_half_even(-lo.astype(np.float32) * (np.float32(1) / scale))
    return scale, spec.qmin + as_zero_point(zero_point)


def as_zero_point(rounded: NDArray[np.floating[Any]]) -> NDArray[np.int32]:
    """Rounded offsets as int32; those of ranges too far from 0 for their width stay above 2**23: QParams refuses."""
    return np.asarray(np.clip(rounded, -(1 << 24), 1 << 24), dtype=np.int32)
