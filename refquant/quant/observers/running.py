"""The running range: a moving average of what the batches reach, as the papers calibrate activations.

    lo <- 0.95 lo + 0.05 min(batch)        hi <- 0.95 hi + 0.05 max(batch)

An outlier of one batch moves the range by a twentieth of its excess, so the range clips; after n batches the
first one still weighs 0.95**n, which is 0.44 for the 16 that TFMQ-DM's released recipe takes at each step of
the sampler. Where all batches are equal, as for layers that see the time-step only, the average is the range.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import RangeError, ShapeError
from ..affine import QParams, QSpec
from .ranges import as_rows, from_range


class RunningRange:
    """The moving average of the smallest and the largest value of batches.

    Parameters
    ----------
    axis : int or None
        As in the ``QSpec`` that will be asked for.
    momentum : float
        Weight of the past, in [0, 1). TFMQ-DM and Q-Diffusion take 0.95, PTQ4DM 0.9.

    Notes
    -----
    The first batch starts the average, and counts again if it is shown again. In float32, as the authors'
    tensors. Source: TFMQ-DM ``quant/quant_layer.py:229-244``. There the first quantizer is an MSE search's;
    every later one is ``minmax`` of the running range, so the search leaves no trace.

    Examples
    --------
    >>> running = RunningRange(momentum=0.5)
    >>> running.update([-2.0, 1.0])
    >>> running.update([-1.0, 2.0])
    >>> running.range()
    (array(-1.5, dtype=float32), array(1.5, dtype=float32))
    """

    def __init__(self, axis: int | None = None, *, momentum: float = 0.95) -> None:
        if not 0 <= momentum < 1:
            raise RangeError(f"momentum={momentum}: give the weight of the past, 0 (none) up to, not including, 1")
        self.axis = axis
        self.momentum = momentum
        self._lo: NDArray[np.float32] | None = None
        self._hi: NDArray[np.float32] | None = None

    def update(self, x: ArrayLike) -> None:
        """Take in one batch: x of any shape; one that raises leaves the average as it was."""
        rows = as_rows(x, self.axis)
        self._update(rows.min(axis=1), rows.max(axis=1))

    def update_range(self, lo: ArrayLike, hi: ArrayLike) -> None:
        """Take in the range that a search chose for a batch (PTQ4DM averages those).

        Parameters
        ----------
        lo, hi : float or array_like, () or, with an axis, (C,)
            Finite, lo <= hi.
        """
        low, high = (np.atleast_1d(np.asarray(end, dtype=np.float32)) for end in (lo, hi))
        if low.shape != high.shape or not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
            raise RangeError(f"range [{low}, {high}]: give two finite ends with lo <= hi, for every channel")
        self._update(low, high)

    def range(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The averages (lo, hi), of shape () or, with an axis, (C,)."""
        if self._lo is None or self._hi is None:
            raise RangeError("the running range has seen no batch yet; call update(x) first")
        shape = () if self.axis is None else self._lo.shape
        return self._lo.reshape(shape), self._hi.reshape(shape)

    def minmax(self, spec: QSpec) -> QParams:
        """``from_range`` of the running range."""
        if spec.axis != self.axis:
            raise ShapeError(f"{spec} asked of a running range with axis={self.axis}; both need the same axis")
        return from_range(*self.range(), spec)

    def _update(self, lo: NDArray[np.float32], hi: NDArray[np.float32]) -> None:
        if self._lo is None or self._hi is None:
            self._lo, self._hi = lo, hi
            return
        if lo.shape != self._lo.shape:
            raise ShapeError(
                f"a batch with {lo.size} channels along axis {self.axis} after batches with {self._lo.size}; "
                "use one running range for each tensor"
            )
        past, new = np.float32(self.momentum), np.float32(1.0 - self.momentum)
        self._lo, self._hi = past * self._lo + new * lo, past * self._hi + new * hi


def released_batches(
    samples: int, rng: np.random.Generator, *, first: int = 16, batch: int = 16
) -> Iterator[NDArray[np.intp]]:
    """Indices of the batches that TFMQ-DM shows to the running ranges of one step of the sampler.

    First `first` samples drawn at random, which start the average; then all samples once, in random order.

    Parameters
    ----------
    samples : int
        Recorded at this step (256 in the paper). With fewer than `first`, all of them start the average; the
        authors' code raises.
    rng : numpy.random.Generator
    first, batch : int

    Yields
    ------
    array of int, (<= first,), then (<= batch,)

    Notes
    -----
    Source: TFMQ-DM ``quant/calibration.py:108-152``. The last batch may be smaller, and weighs as much.
    """
    if min(samples, first, batch) < 1:
        raise RangeError(f"samples={samples}, first={first}, batch={batch}: give at least one of each")
    yield rng.choice(samples, min(first, samples), replace=False)
    order = rng.permutation(samples)
    for start in range(0, samples, batch):
        yield order[start : start + batch]
