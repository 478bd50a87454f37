"""What a lowered network consists of: which operations multiply integers, which are float islands, and what it keeps.

`inventory` lists every operation of a program; `refquant info` prints that list, grouped by `what`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass

import numpy as np

from ..kernels import PackedWeights
from ..quant.mrq_softmax import SoftmaxRegions
from .program import INTEGER, Convolve, Encode, Mix, Operation, Program, Scores
from .program_dit import Condition, HeadMix, HeadScores, SignedLinear

WORDS = {
    "Scores": "q times k, 8-bit codes",
    "Mix": "probabilities times v, 8-bit codes",
    "Probabilities": "softmax, to codes",
    "Pad": "a border of codes that mean 0",
    "Upsample": "pixels repeated (codes)",
    "Concat": "channels side by side (float32)",
    "HeadScores": "q times k, 8-bit codes",
    "HeadMix": "probabilities times v, 8-bit codes",
    "Condition": "modulations of step and class (table)",
    "Constant": "positions (table)",
    "Modulated": "layer norm, modulation, to codes",
    "Parts": "q, k and v, to codes",
    "Regions": "softmax, to codes of two regions",
    "Gelu": "GELU, to codes",
    "Signs": "GELU, to codes of two signs",
    "Gated": "sum with a gated branch (float32)",
    "Unpatchify": "patches in their places (float32)",
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
        Of integers, for one image; the zeros of a border count as well, and so do those of the other region or sign.
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
        out.append(
            Entry(value.name, _words(op, program), isinstance(op, INTEGER), value.shape, _multiplications(op, program),
                  _weight_bytes(op, seen), _bytes(op, seen))
        )  # fmt: skip
    return out


def is_transformer(program: Program) -> bool:
    """Tell whether the pixels of inner values are tokens, and windows of 1 x 1 linear layers."""
    return any(isinstance(op, Condition) for op in program.operations)


def _words(op: Operation, program: Program) -> str:
    if isinstance(op, Convolve):
        linear = is_transformer(program) and op.weights.shape[1:3] == (1, 1)
        return f"{'linear layer' if linear else 'convolution'}, {op.weights.bits}-bit weights"
    if isinstance(op, SignedLinear):
        return f"linear layer, one sign of its input, {op.weights.bits}-bit weights"
    if isinstance(op, Encode):
        return f"{'group norm, ' if op.norm else ''}{'SiLU, ' if op.silu else ''}to codes"
    return WORDS.get(type(op).__name__, type(op).__name__)


def _multiplications(op: Operation, program: Program) -> int:
    places = int(np.prod(program.values[op.out].shape))
    if isinstance(op, (Convolve, SignedLinear)):
        return places * int(np.prod(op.weights.shape[1:]))
    if isinstance(op, HeadScores):
        return places * program.values[op.x].shape[-1] // (3 * program.values[op.out].shape[0])
    if isinstance(op, HeadMix):
        planes = 2 if isinstance(op.p_params[0], SoftmaxRegions) else 1
        return places * program.values[op.p].shape[-1] * planes
    if isinstance(op, Scores):
        return places * program.values[op.q].shape[-1]
    return places * program.values[op.p].shape[-1] if isinstance(op, Mix) else 0


def _weight_bytes(op: Operation, seen: set[int]) -> int:
    if not isinstance(op, (Convolve, SignedLinear)) or id(op.weights) in seen:
        return 0
    seen.add(id(op.weights))
    return op.weights.nbytes


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
