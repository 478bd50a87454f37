"""A lowered network: a list of operations on numbered values, and nothing else.

Values are per image, channels last; codes are uint8, everything else float32. An operation reads values, writes one,
and holds its constants: packed weights, and for each step of the sampler the numbers that depend on it. What kind an
operation is says where it runs: `INTEGER` ones multiply integers and add them up exactly; the others are float
islands between them.

    Encode      float -> codes: group norm and SiLU before it where the network has them
    Convolve    codes -> float: int32 sums, then scale, bias and residual
    Scores      codes of q and k -> float: q kᵀ for each image
    Probabilities  float scores -> codes: softmax
    Mix         codes of probabilities and v -> float
    Upsample    codes, each repeated twice in both directions
    Concat      float channels side by side

Those of a transformer are in `program_dit`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError, ShapeError
from ..kernels import Dequantize, PackedWeights
from ..quant.affine import QParams
from .program_dit import TOKEN_INTEGER, TokenOperation

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Value:
    """What an operation writes: its shape for one image and its dtype.

    Attributes
    ----------
    name : str
        For traces: the layer or quantizer that it belongs to.
    shape : tuple of int
    codes : bool
        uint8 codes; else float32.
    """

    name: str
    shape: tuple[int, ...]
    codes: bool

    @property
    def bytes(self) -> int:
        """Size for one image."""
        return int(np.prod(self.shape)) * (1 if self.codes else 4)


@dataclass(frozen=True, eq=False)
class Norm:
    """A group normalisation, fused into the `Encode` after it."""

    gamma: Float32
    beta: Float32
    groups: int
    eps: float


@dataclass(frozen=True, eq=False)
class Encode:
    """out = codes of SiLU(norm(x)), or of x itself; one quantizer for all steps, or one for each."""

    x: int
    out: int
    quantizers: tuple[QParams, ...]
    norm: Norm | None = None
    silu: bool = False


@dataclass(frozen=True, eq=False)
class Pad:
    """out = x in a frame of codes that mean 0: `pads` (top, bottom, left, right), where they are not all the same."""

    x: int
    out: int
    pads: tuple[int, int, int, int]
    zero_points: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Convolve:
    """out = sums * scale + bias + residual, with the numbers of the step."""

    x: int
    out: int
    name: str
    weights: PackedWeights
    zero_points: tuple[int, ...]
    outputs: tuple[Dequantize, ...]
    stride: int
    padding: int
    residual: int | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """out[i, j] = scale * sum over c of (q[i, c] - zq) (k[j, c] - zk)."""

    q: int
    k: int
    out: int
    q_params: tuple[QParams, ...]
    k_params: tuple[QParams, ...]


@dataclass(frozen=True, eq=False)
class Probabilities:
    """out = codes of the softmax over the last axis."""

    x: int
    out: int
    quantizers: tuple[QParams, ...]


@dataclass(frozen=True, eq=False)
class Mix:
    """out[i, c] = scale * sum over j of p[i, j] (v[j, c] - zv)."""

    p: int
    v: int
    out: int
    p_params: tuple[QParams, ...]
    v_params: tuple[QParams, ...]


@dataclass(frozen=True, eq=False)
class Upsample:
    """out = x with every pixel repeated 2 x 2."""

    x: int
    out: int


@dataclass(frozen=True, eq=False)
class Concat:
    """out = x and y side by side along the channels."""

    x: int
    y: int
    out: int


Operation = Encode | Pad | Convolve | Scores | Probabilities | Mix | Upsample | Concat | TokenOperation
INTEGER = (Convolve, Scores, Mix, *TOKEN_INTEGER)
_READS = ("x", "y", "q", "k", "p", "v", "residual", "condition")


def reads(operation: Operation) -> tuple[int, ...]:
    """Values that an operation reads."""
    names = [f.name for f in fields(operation) if f.name in _READS]
    return tuple(v for v in (getattr(operation, name) for name in names) if v is not None)


def at(numbers: tuple, step: int):  # noqa: ANN001, ANN201  any tuple, its element
    """The entry of a step: of one number for all steps, or of one for each."""
    return numbers[step if len(numbers) > 1 else 0]


@dataclass(frozen=True, eq=False)
class Program:
    """A network in integers, for the steps of one sampler.

    Attributes
    ----------
    values : tuple of Value
        Value 0 is the input (H, W, C), the last operation writes the answer.
    operations : tuple
        In order of execution.
    timesteps : int64 array, (S,)
        t of each step.
    classes : int
        K of a conditional network, whose id K means "no class"; 0 for the others.
    """

    values: tuple[Value, ...]
    operations: tuple[Operation, ...]
    timesteps: NDArray[np.int64]
    classes: int = 0

    def check_step(self, t: int, step: int) -> None:
        """Raise RangeError where the program was not lowered for this step."""
        if not 0 <= step < len(self.timesteps) or self.timesteps[step] != t:
            raise RangeError(
                f"step {step}, t = {t}: this program was made for {len(self.timesteps)} steps from "
                f"t = {self.timesteps[0]} to {self.timesteps[-1]}. "
                "Sample with as many steps, or quantize for others (`refquant quantize --steps`)."
            )

    def checked_classes(self, y: NDArray[np.integer] | None, images: int) -> NDArray[np.integer]:
        """Class of each image, K for none; raise where y (N,) are no classes of this network."""
        if y is None:
            return np.full(images, self.classes)
        y = np.asarray(y)
        if not self.classes:
            raise RangeError("this network is unconditional: it knows no classes. Leave y away.")
        if y.shape != (images,) or y.dtype.kind not in "iu":
            raise ShapeError(f"y is {y.dtype} {y.shape}; {images} images want integers ({images},).")
        if y.min() < 0 or y.max() > self.classes:
            raise RangeError(f"y is {y.tolist()}; classes are 0 to {self.classes - 1}, and {self.classes} is none.")
        return y

    def describe(self) -> dict[str, int]:
        """How many operations there are of each kind, and how many of them are in integers."""
        kinds: dict[str, int] = {}
        for operation in self.operations:
            kinds[type(operation).__name__] = kinds.get(type(operation).__name__, 0) + 1
        integer = sum(isinstance(operation, INTEGER) for operation in self.operations)
        return {**kinds, "integer": integer, "float islands": len(self.operations) - integer}
