"""What a lowered network consists of: which operations multiply integers, which are float islands, and what it keeps.

`inventory` lists every operation of a program; `refquant info` prints that list, grouped by `what`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass

import numpy as np

from ..kernels import PackedWeights
from .program import INTEGER, Convolve, Encode, Mix, Operation, Program, Scores

WORDS = {
    "Scores": "q times k, 8-bit codes",
    "Mix": "probabilities times v, 8-bit codes",
    "Probabilities": "softmax, to codes",
    "Upsample": "pixels repeated (codes)",
    "Concat": "channels side by side (float32)",
}


@dataclass(frozen=True)
class Entry:
    """One operation of a program.

    Attributes
    ----------
    name : str
        Of the layer or quantizer.
    what : str
        In words, the same for operations of the same kind.
    integer : bool
        It multiplies integers; else it is a float island.
    shape : tuple of int
        Of the result for one image.
    multiplications : int
        Of integers, for one image; the zeros of a border count as well.
    weight_bytes, table_bytes : int
        Memory of packed weights, and of all other constants: scales, biases and quantizers of every step.
    """

    name: str
    what: str
    integer: bool
    shape: tuple[int, ...]
    multiplications: int
    weight_bytes: int
    table_bytes: int


def inventory(program: Program) -> list[Entry]:
    """List the operations in order of execution; constants that two of them share count for the first."""
    seen: set[int] = set()
    out = []
    for op in program.operations:
        value = program.values[op.out]
        weights = op.weights.nbytes if isinstance(op, Convolve) else 0
        out.append(
            Entry(value.name, _words(op), isinstance(op, INTEGER), value.shape, _multiplications(op, program), weights,
                  _bytes(op, seen))
        )  # fmt: skip
    return out


def _words(op: Operation) -> str:
    if isinstance(op, Convolve):
        return f"convolution, {op.weights.bits}-bit weights"
    if isinstance(op, Encode):
        return f"{'group norm, ' if op.norm else ''}{'SiLU, ' if op.silu else ''}to codes"
    return WORDS.get(type(op).__name__, type(op).__name__)


def _multiplications(op: Operation, program: Program) -> int:
    places = int(np.prod(program.values[op.out].shape))
    if isinstance(op, Convolve):
        return places * int(np.prod(op.weights.shape[1:]))
    if isinstance(op, Scores):
        return places * program.values[op.q].shape[-1]
    return places * program.values[op.p].shape[-1] if isinstance(op, Mix) else 0


def _bytes(what: object, seen: set[int]) -> int:
    """Memory of all arrays inside of constants, each of them once; not of packed weights."""
    if isinstance(what, np.ndarray):
        known = id(what) in seen
        seen.add(id(what))
        return 0 if known else what.nbytes
    if isinstance(what, tuple):
        return sum(_bytes(part, seen) for part in what)
    if is_dataclass(what) and not isinstance(what, PackedWeights):
        return sum(_bytes(getattr(what, field.name), seen) for field in fields(what))
    return 0
