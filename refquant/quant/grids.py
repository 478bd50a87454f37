"""Grids: ways of rounding an activation that are no single pair of scale and zero point.

A `QParams` is one affine map for a tensor. The quantizers for transformers need more: two regions with a step each
(`mrq_softmax`, `mrq_sign`), or a map for every token, made at run time (`dynamic`). All of them are a `Grid`, and an
activation quantizer takes a grid wherever it takes a `QParams`:

    fake_quantize(x)    x rounded to the grid, as floats
    inside(x)           where the straight-through gradient passes: True unless x is clipped

`GridTable` holds one grid for each step of the sampler, as `StepTable` holds one `QParams`; tables whose rows repeat
over a group of steps are TQ-DiT's time groups (see `refquant.quant.observers.time_groups`).

In files a grid is its `kind`, its `facts` (JSON) and its `arrays`, those of a table with one row a step.
Errors: `ShapeError` where grids of one table differ in kind or facts, `RangeError` for a table without steps or a
step that is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError, ShapeError
from .dynamic import PerToken
from .mrq_sign import SignSplit
from .mrq_softmax import SoftmaxRegions
from .observers.steps import checked_step

Array = NDArray[Any]


class Grid(Protocol):
    """What an activation quantizer needs to know of a grid; immutable."""

    kind: ClassVar[str]
    bits: int

    def fake_quantize(self, x: Array) -> Array:
        """Round x, any shape, to the grid; same shape and dtype."""

    def inside(self, x: Array) -> NDArray[np.bool_]:
        """Where x is not clipped."""

    def facts(self) -> dict[str, Any]:
        """What every step's grid has in common, as JSON values."""

    def arrays(self) -> dict[str, Array]:
        """Numbers that may differ from step to step, each of shape ()."""


@dataclass(frozen=True, eq=False)
class GridTable:
    """One grid for each step of the sampler, 0 the noisiest: ``table[step]``.

    Attributes
    ----------
    grids : sequence of Grid
        All of one kind, with the same facts.
    """

    grids: Sequence[Grid]

    def __post_init__(self) -> None:
        grids = tuple(self.grids)
        if not grids:
            raise RangeError("a table of 0 steps; give the grids of at least one step")
        if any(type(g) is not type(grids[0]) or g.facts() != grids[0].facts() for g in grids):
            raise ShapeError("a table of grids takes grids of one kind and of the same bits")
        object.__setattr__(self, "grids", grids)

    @property
    def kind(self) -> str:
        """The kind of all its grids."""
        return self.grids[0].kind

    @property
    def bits(self) -> int:
        """Bits of all its grids."""
        return self.grids[0].bits

    def facts(self) -> dict[str, Any]:
        """What all grids have in common."""
        return self.grids[0].facts()

    def arrays(self) -> dict[str, Array]:
        """One row a step, (S,)."""
        return {key: np.stack([g.arrays()[key] for g in self.grids]) for key in self.grids[0].arrays()}

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, step: int) -> Grid:
        return self.grids[checked_step(step, len(self))]


KINDS: dict[str, type[Grid]] = {cls.kind: cls for cls in (SoftmaxRegions, SignSplit, PerToken)}


def described(grid: Grid | GridTable) -> dict[str, Any]:
    """What the metadata of a file say of a grid; its `arrays` are the rest."""
    return {"kind": grid.kind, **grid.facts()}


def from_file(facts: dict[str, Any], arrays: dict[str, Array]) -> Grid | GridTable:
    """Undo `described` and `arrays`.

    Raises KeyError for an unknown kind, TypeError and ValueError where the parts do not fit it.

    Parameters
    ----------
    facts : dict
    arrays : dict of str to array

    Returns
    -------
    Grid or GridTable
    """
    cls, common = KINDS[facts["kind"]], {key: value for key, value in facts.items() if key != "kind"}
    steps = {a.shape for a in arrays.values()}
    if steps <= {()}:
        return cls(**common, **{key: a.item() for key, a in arrays.items()})
    if len(steps) != 1 or any(len(shape) != 1 for shape in steps):
        raise ValueError(f"a {facts['kind']} with arrays of shapes {sorted(steps)}")
    count = steps.pop()[0]
    return GridTable([cls(**common, **{key: a[i].item() for key, a in arrays.items()}) for i in range(count)])
