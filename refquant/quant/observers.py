"""Observers: from the values of a tensor to the scale and zero point of its quantizer.

    minmax(x, spec)           the whole range of x: nothing is clipped
    mse(x, spec)              the range, of 80 shrunk ones, whose rounded values lie nearest to x
    from_range(lo, hi, spec)  a range that is known already
    RangeObserver             the first two over many batches, without keeping the batches

x is any array_like of finite numbers, taken as float32; results are ``QParams`` with scale and zero_point of
shape () or, if ``spec.axis`` is an int, (C,). Errors: ``RangeError`` for NaN, infinities (a range has two
finite ends) and empty tensors; ``ShapeError`` where x has no such axis.

All ranges are widened to contain 0, so real 0 always has a code of its own: zero padding, ReLU and
masked values stay exact. All-zero tensors, and all others whose step would be smaller, get scale 1e-8; a
constant c becomes the range [min(c, 0), max(c, 0)] and is represented exactly up to rounding.

Where we differ from the released TFMQ-DM code (``quant/quant_layer.py:20-64``), and why
--------------------------------------------------------------------------------------
1. Its mse search shrinks the raw [min x, max x]. For a tensor of one sign the zero point then falls outside
   of the codes and 0 is off by as much as the range is away from it. Ours shrinks the widened range, which
   makes min-max the first candidate: the search is never worse than min-max on its own data. On tensors that
   contain both signs the two are equal, code for code. ``mse(..., zero_in_range=False)`` is the released one.
2. All-zero tensors, and constant ones under mse, make it raise TypeError. Ours return scale 1e-8 with zero
   point 0 (the limit of its own formula), and the min-max result.
3. It scores in float32; ours adds the same float32 errors up in float64, so that the winner does not depend
   on the order of a sum. It starts from a best score of 1e10 and returns nothing if no candidate is below it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refquant.errors import RangeError, ShapeError
from refquant.intmath import grid_codes, round_half_even
from refquant.quant.affine import QParams, QSpec

SCALE_FLOOR = np.float32(1e-8)
SHRINK = 1.0 - np.arange(80) * 0.01  # 1.00, 0.99, ... 0.21: the authors' grid, in their double arithmetic
BLOCK = 1 << 17  # elements scored at a time: about 2 MB of temporaries, whatever the size of the tensor

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

    and scale >= 1e-8. Source: TFMQ-DM ``quant/quant_layer.py:20-35``.

    Examples
    --------
    >>> q = from_range(-1.5, 6.0, QSpec(bits=4))
    >>> float(q.scale), int(q.zero_point)
    (0.5, 3)
    """
    low, high = np.asarray(lo, dtype=np.float64), np.asarray(hi, dtype=np.float64)
    if not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
        raise RangeError(f"range [{low}, {high}]: give two finite ends with lo <= hi, for every channel")
    scale, zero_point = _affine_map(np.minimum(low, 0), np.maximum(high, 0), spec)
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
    rows = _rows(x, spec.axis)
    return from_range(_per_spec(rows.min(axis=1), spec), _per_spec(rows.max(axis=1), spec), spec)


def mse(x: ArrayLike, spec: QSpec, *, power: float = 2.4, zero_in_range: bool = True) -> QParams:
    """Quantizer for the shrunk range of x that has the smallest mean rounding and clipping error.

    Parameters
    ----------
    x : array_like, any shape
    spec : QSpec
    power : float
        Exponent of the error. 2 is the mean squared error; the authors' 2.4 weighs clipped outliers more.
    zero_in_range : bool
        False gives the released search on the raw range (module docstring, difference 1).

    Returns
    -------
    QParams

    Raises
    ------
    RangeError
        With zero_in_range=False also where the range is so narrow, and so far from 0, that float32 cannot
        hold the codes (abs(zero_point) > 2**23): constants above 0.084. The authors' code raises there too.

    Notes
    -----
    Candidates are r [m, M] for r = 1.00, 0.99, ... 0.21; each is scored by mean abs(x^ - x)**power over
    the tensor, or over each channel by itself, and the first minimum wins. All channels are searched at once.
    Source: TFMQ-DM ``quant/quant_layer.py:38-64``.
    """
    rows = _rows(x, spec.axis)
    return _search(rows, rows.min(axis=1), rows.max(axis=1), spec, power, zero_in_range)


class RangeObserver:
    """Watches a tensor over many batches, then makes its quantizer by min-max or by the mse search.

    The extremes are exact. Of the values a bounded uniform sample is kept: each position gets a random key,
    and the positions with the smallest keys stay. Keys are drawn in order of arrival, so the result depends
    on the data and the seed, but not on how the data are cut into batches (along axis 0).

    Parameters
    ----------
    axis : int or None
        As in the ``QSpec`` that will be asked for. One observer serves specs of any bits and signedness.
    sample_size : int
        Values kept for ``mse``, over all channels together (at least one a channel). With 65,536 the mean
        error of a candidate has a standard error of 0.4 % where rounding dominates. 0 keeps the range only.
    seed : int

    Examples
    --------
    >>> observer = RangeObserver()
    >>> observer.update([-1.0, 0.5])
    >>> observer.update([2.0])
    >>> observer.minmax(QSpec(bits=2)).scale
    array(1., dtype=float32)
    """

    def __init__(self, axis: int | None = None, *, sample_size: int = 65536, seed: int = 0) -> None:
        self.axis = axis
        self.sample_size = sample_size
        self._rng = np.random.default_rng(seed)
        self._lo: NDArray[np.float32] | None = None
        self._hi: NDArray[np.float32] | None = None
        self._sample: NDArray[np.float32] | None = None  # (C, n), columns in order of arrival
        self._keys: Float64 = np.empty(0, dtype=np.float64)  # (n,)

    def update(self, x: ArrayLike) -> None:
        """Take in one batch; a batch that raises leaves the observer as it was.

        Parameters
        ----------
        x : array_like, any shape
            With ``axis``, every batch has the same number of channels along it.
        """
        rows = _rows(x, self.axis)
        lo, hi = rows.min(axis=1), rows.max(axis=1)
        if self._lo is None or self._hi is None:
            self._lo, self._hi = lo, hi
        elif lo.shape != self._lo.shape:
            raise ShapeError(
                f"a batch with {lo.size} channels along axis {self.axis} after batches with {self._lo.size}; "
                "use one observer for each tensor"
            )
        else:
            self._lo, self._hi = np.minimum(self._lo, lo), np.maximum(self._hi, hi)
        if self.sample_size:
            self._keep(rows)

    def minmax(self, spec: QSpec) -> QParams:
        """As the function ``minmax`` on all batches together, exactly."""
        lo, hi = self._range(spec)
        return from_range(_per_spec(lo, spec), _per_spec(hi, spec), spec)

    def mse(self, spec: QSpec, *, power: float = 2.4) -> QParams:
        """As the function ``mse``, with the exact range of all batches and the error on the kept sample."""
        lo, hi = self._range(spec)
        if self._sample is None:
            raise RangeError("mse needs a sample of values, but sample_size=0; give a positive sample_size")
        return _search(self._sample, lo, hi, spec, power, zero_in_range=True)

    def _range(self, spec: QSpec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if spec.axis != self.axis:
            raise ShapeError(f"{spec} asked of an observer with axis={self.axis}; both need the same axis")
        if self._lo is None or self._hi is None:
            raise RangeError("the observer has seen no batch yet; call update(x) first")
        return self._lo, self._hi

    def _keep(self, rows: NDArray[np.float32]) -> None:
        """Merge a batch (C, n) into the sample: the columns with the smallest keys of all so far."""
        limit = max(1, self.sample_size // rows.shape[0])
        keys = self._rng.random((rows.shape[1],))
        if self._sample is None:
            self._sample = np.empty((rows.shape[0], 0), dtype=np.float32)
        # a full sample only takes keys below its largest; of later batches that is a small part
        fresh = keys < (self._keys.max() if self._keys.size == limit else 1.0)
        keys = np.concatenate([self._keys, keys[fresh]])
        sample = np.concatenate([self._sample, rows[:, fresh]], axis=1)
        if keys.size > limit:
            kept = np.sort(np.argpartition(keys, limit - 1)[:limit])  # sorted: stay in order of arrival
            keys, sample = keys[kept], sample[:, kept]
        self._keys, self._sample = keys, sample


def _rows(x: ArrayLike, axis: int | None) -> NDArray[np.float32]:
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


def _per_spec(values: NDArray[Any], spec: QSpec) -> NDArray[Any]:
    """(C,) values in the shape that spec wants: () without an axis."""
    return values if spec.axis is not None else values.reshape(())


def _affine_map(lo: Float64, hi: Float64, spec: QSpec) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
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
    zero_point = np.clip(zero_point, -(1 << 24), 1 << 24)  # far, narrow raw ranges, which QParams refuses
    return scale, spec.qmin + zero_point.astype(np.int32)


def _search(
    rows: NDArray[np.float32],
    lo: NDArray[np.float32],
    hi: NDArray[np.float32],
    spec: QSpec,
    power: float,
    zero_in_range: bool,
) -> QParams:
    """Score the 80 shrunk ranges on rows (C, n) and return, for each row, the first with the least error."""
    low, high = lo.astype(np.float64), hi.astype(np.float64)
    if zero_in_range:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale, zero_point = _affine_map(SHRINK[:, None] * low, SHRINK[:, None] * high, spec)  # (80, C)
    error = np.zeros(scale.shape)  # sums: the mean over a row has the same minimum
    width = max(1, BLOCK // rows.shape[0])
    for start in range(0, rows.shape[1], width):
        block = rows[:, start : start + width]
        for i in range(len(SHRINK)):
            s, z = scale[i, :, None], zero_point[i, :, None]
            distance = grid_codes(block, s, z, spec.qmin, spec.qmax)
            distance -= z.astype(np.float32)
            distance *= s
            distance -= block
            error[i] += (np.abs(distance, out=distance).astype(np.float64) ** power).sum(axis=1)

    best, row = error.argmin(axis=0), np.arange(rows.shape[0])  # argmin takes the first, as "<" does
    return QParams(_per_spec(scale[best, row], spec), _per_spec(zero_point[best, row], spec), spec)
