"""TGQ: the sampler's steps cut into groups, each with its own quantizer (TQ-DiT, arXiv 2502.04056, section 3.2).

    group(k) = floor(k G / S)        k = 0 .. S-1 the step, G groups of S/G steps (as equal as whole numbers allow)

Between one range for all steps (G = 1) and one for each step (G = S, finite set calibration) it trades memory for
samples: each range is found from S/G times as many states as a single step has. Groups are contiguous in the *index*
of the sampler, not in the time-step t. (The released code counts the index from the image, we from the noise, which
matters only where G does not divide S.)

A group's table is a `StepTable` whose rows repeat, so nothing that uses tables needs to know of groups.

What is grouped: the text speaks of activations, the released code groups the softmax outputs alone, by their split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import RangeError, ShapeError
from ..affine import QSpec
from .steps import StepRanges, StepTable, checked_step

T = TypeVar("T")


@dataclass(frozen=True)
class TimeGroups:
    """S steps in G groups.

    Attributes
    ----------
    steps, count : int
        S and G, 1 <= G <= S.

    Examples
    --------
    >>> TimeGroups(steps=5, count=2).index
    array([0, 0, 0, 1, 1])
    """

    steps: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.steps:
            raise RangeError(
                f"{self.count} groups of {self.steps} steps: give 1 (one range for all) to {self.steps} (one a step)"
            )

    @property
    def index(self) -> NDArray[np.int64]:
        """The group of each step, (S,), ascending."""
        return np.arange(self.steps) * self.count // self.steps

    def of(self, step: int) -> int:
        """The group of one step."""
        return int(checked_step(step, self.steps) * self.count // self.steps)

    def members(self, group: int) -> range:
        """The steps of one group."""
        if not 0 <= group < self.count:
            raise RangeError(f"group {group} of {self.count}: give 0 to {self.count - 1}")
        first, end = np.searchsorted(self.index, [group, group + 1])
        return range(int(first), int(end))

    def repeated(self, values: Sequence[T]) -> list[T]:
        """One value a group -> one a step."""
        if len(values) != self.count:
            raise ShapeError(f"{len(values)} values for {self.count} groups; give one for each")
        return [values[g] for g in self.index]

    def table(self, ranges: StepRanges, spec: QSpec) -> StepTable:
        """Min-max quantizers of the groups, each for the union of its steps' ranges, as a table of S rows."""
        if len(ranges.lo) != self.steps:
            raise ShapeError(f"ranges of {len(ranges.lo)} steps for groups of {self.steps}; record the same sampler")
        merged = StepRanges(self.steps)
        for group in range(self.count):
            part = slice(self.members(group).start, self.members(group).stop)
            merged.lo[part], merged.hi[part] = ranges.lo[part].min(), ranges.hi[part].max()
        return merged.table(spec)

    def samples(self, step: NDArray[Any]) -> list[NDArray[np.intp]]:
        """Indices of the states of each group, given each state's step (M,)."""
        group = self.index[step]
        return [np.flatnonzero(group == g) for g in range(self.count)]
