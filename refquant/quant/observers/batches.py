"""The range of a tensor over many batches, exactly, and a bounded sample of its values."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import RangeError, ShapeError
from ..affine import QParams, QSpec
from .ranges import Float64, as_rows, from_range, per_spec
from .search import search


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
        rows = as_rows(x, self.axis)
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
        return from_range(per_spec(lo, spec), per_spec(hi, spec), spec)

    def mse(self, spec: QSpec, *, power: float = 2.4) -> QParams:
        """As the function ``mse``, with the exact range of all batches and the error on the kept sample."""
        lo, hi = self._range(spec)
        if self._sample is None:
            raise RangeError("mse needs a sample of values, but sample_size=0; give a positive sample_size")
        return search(self._sample, lo, hi, spec, power, zero_in_range=True)

    @property
    def sample(self) -> NDArray[np.float32]:
        """The kept values in order of arrival, (n,) or, with an axis, (C, n): for searches without a method here."""
        if self._sample is None:
            raise RangeError("no sample was kept: sample_size=0, or no batch yet; give a positive sample_size")
        return self._sample if self.axis is not None else self._sample[0]

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
