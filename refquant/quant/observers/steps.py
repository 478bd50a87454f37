"""One quantizer for every step of the sampler: finite set calibration (FSC of TFMQ-DM, arXiv 2311.16503).

A sampler of S steps shows a layer S distributions of activations, and they differ (early steps see noise,
late ones images). Nothing forces one scale on all of them: the table below holds S pairs (scale, zero point),
looked up once a step. 50 steps of 40 layers are 4,000 numbers.

**The index is the step of the sampler, 0 at the noisiest, never the time-step t.** The quadratic schedule of
100 steps visits 96 different t, t = 0 four times; a table indexed by t would let steps overwrite each other. That
goes unnoticed easily: between equal t, DDIM stands still, so their exact ranges are alike. Running ranges are
not, for they start from other random samples, nor are those of samplers that remember earlier steps. (The
released code indexes by step for DDIM, and for latent diffusion computes the index from t, which for 400 steps
gives indices down to -100.)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import RangeError, ShapeError
from ..affine import QParams, QSpec
from .ranges import as_rows, from_range
from .running import RunningRange, released_batches


@dataclass(frozen=True, eq=False)  # arrays have no single truth value, so == stays identity
class StepTable:
    """Quantizers of one tensor, one for each step of a sampler: ``table[step]`` is a ``QParams``.

    Attributes
    ----------
    scale : float32 array, (S,)
    zero_point : int32 array, (S,)
    spec : QSpec
        With ``axis=None``: activations take one scale for the tensor.

    Raises
    ------
    ShapeError
        Where the arrays are not of one length S, or spec has an axis.
    RangeError
        Where S is 0, or a pair is none that ``QParams`` accepts.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    spec: QSpec

    def __post_init__(self) -> None:
        if self.spec.axis is not None:
            raise ShapeError(f"a table of steps with axis={self.spec.axis}: activations take one scale for the tensor")
        # a channel for each step: QParams checks all pairs at once and copies them
        checked = QParams(self.scale, self.zero_point, replace(self.spec, axis=0))
        if checked.scale.size == 0:
            raise RangeError("a table of 0 steps; give the quantizers of at least one step")
        object.__setattr__(self, "scale", checked.scale)
        object.__setattr__(self, "zero_point", checked.zero_point)

    @classmethod
    def of(cls, quantizers: Sequence[QParams]) -> StepTable:
        """The table of these quantizers, in the order of the steps; all with the same spec."""
        specs = {q.spec for q in quantizers}
        if len(specs) != 1:
            raise ShapeError(f"a table of steps takes quantizers of one spec, got {len(specs)} different ones")
        return cls(np.array([q.scale for q in quantizers]), np.array([q.zero_point for q in quantizers]), specs.pop())

    def __len__(self) -> int:
        return len(self.scale)

    def __getitem__(self, step: int) -> QParams:
        i = checked_step(step, len(self))
        return QParams(self.scale[i], self.zero_point[i], self.spec)

    def arrays(self) -> dict[str, NDArray[np.float32] | NDArray[np.int32]]:
        """What a file holds: ``scale`` and ``zero_point``, (S,). ``StepTable(**arrays, spec=spec)`` is the way back."""
        return {"scale": self.scale, "zero_point": self.zero_point}


class StepRanges:
    """The exact range of one tensor at every step of a sampler.

    Parameters
    ----------
    steps : int
        S, the steps of the sampler.

    Examples
    --------
    >>> ranges = StepRanges(2)
    >>> ranges.update(0, [-1.0, 2.0])
    >>> ranges.update(1, [0.0, 0.5])
    >>> ranges.table(QSpec(bits=2)).scale
    array([1.        , 0.16666667], dtype=float32)
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise RangeError(f"steps={steps}: a sampler has at least one step")
        # the empty range: min and max with it change nothing
        self.lo = np.full(steps, np.inf, dtype=np.float32)
        self.hi = np.full(steps, -np.inf, dtype=np.float32)

    def update(self, step: int, x: ArrayLike) -> None:
        """Take in one batch seen at `step` (0 .. S-1): x of any shape, finite, not empty."""
        i, rows = checked_step(step, len(self.lo)), as_rows(x, None)
        self.lo[i] = min(self.lo[i], rows.min())
        self.hi[i] = max(self.hi[i], rows.max())

    def merged(self, other: StepRanges) -> StepRanges:
        """The ranges of both runs together: those of one run over the concatenated batches."""
        if len(other.lo) != len(self.lo):
            raise ShapeError(
                f"ranges of {len(self.lo)} and of {len(other.lo)} steps: runs of different samplers have no common "
                "steps; record both with the same number"
            )
        both = StepRanges(len(self.lo))
        both.lo, both.hi = np.minimum(self.lo, other.lo), np.maximum(self.hi, other.hi)
        return both

    def table(self, spec: QSpec) -> StepTable:
        """One min-max quantizer for each step; raises RangeError where a step was never seen."""
        unseen = np.flatnonzero(self.lo > self.hi)
        if unseen.size:
            raise RangeError(
                f"{unseen.size} of {len(self.lo)} steps have no data, the first is step {unseen[0]}; "
                "record the inputs of every step of the sampler"
            )
        q = from_range(self.lo, self.hi, replace(spec, axis=0))
        return StepTable(q.scale, q.zero_point, spec)

    def shared(self, spec: QSpec) -> QParams:
        """One min-max quantizer for all steps that were seen: what the table is compared with."""
        if not (self.lo <= self.hi).any():
            raise RangeError("no step has data yet; call update(step, x) first")
        return from_range(self.lo.min(), self.hi.max(), spec)


def released_table(
    recordings: Iterable[ArrayLike], spec: QSpec, rng: np.random.Generator, *, momentum: float = 0.95
) -> StepTable:
    """The table by TFMQ-DM's released recipe: at each step the running range of small batches.

    Parameters
    ----------
    recordings : iterable of array_like, (N, ...)
        The tensor at step 0, 1, ... for N trajectories.
    spec : QSpec
    rng : numpy.random.Generator
        Which samples start the average, and the order of the rest. They matter: see `RunningRange`.
    momentum : float

    Returns
    -------
    StepTable

    Notes
    -----
    Source: TFMQ-DM ``quant/calibration.py:108-152``. There the batches run through the network while its
    quantizers are being calibrated; `released_batches` gives the indices for that.
    """
    return StepTable.of([_running(np.asarray(x), rng, momentum).minmax(spec) for x in recordings])


def checked_step(step: int, steps: int) -> int:
    """`step` as an int in 0 .. steps-1; no wrapping around from the end."""
    i = operator.index(step)
    if not 0 <= i < steps:
        raise RangeError(
            f"step {i} of a table for {steps} steps: indices are 0 (noisiest) to {steps - 1}; "
            "sample with as many steps as were calibrated, and index by step, not by t"
        )
    return i


def _running(x: NDArray[np.float32], rng: np.random.Generator, momentum: float) -> RunningRange:
    running = RunningRange(momentum=momentum)
    for batch in released_batches(len(x), rng):
        running.update(x[batch])
    return running
