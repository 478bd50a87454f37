"""MRQ for outputs of GELU and SiLU: one step for the numbers below 0, another for those above.

GELU never goes below -0.17004, SiLU never below -0.27846, so the negative side has a known range. With k bits and
top = 2^(k-1) - 1:

    x <  0    q = min(round(-x / s-), top)      s- = 0.17004 / top, fixed
    x >= 0    q = min(round( x / s+), top)      s+ searched

    code = flag q: the most significant bit says "not negative", the other k - 1 bits are q

Integer arithmetic takes two products, since the steps have no common measure:

    X W = s+ s_w (X+ W_int) + s- s_w (X- W_int)            X+ and X- with zeros in the places of the other

**When it pays.** An asymmetric uniform quantizer with the same clip has the step s everywhere, and the error s²/12 for
each number. Here positive numbers get half as many codes, the step 2 s and the error 4 s²/12, and negative ones next to
none. With a share r of positive numbers the two are even at 4 r = 1: `pays` is true where **fewer than a quarter are
positive**. Against the *symmetric* quantizer that PTQ4ViT compares with it always wins, as that wastes half its codes
in the same way.

Sources: TQ-DiT (arXiv 2502.04056; zerohye/TQ-DiT ``quant_layers/linear.py``), PTQ4ViT (arXiv 2111.12293, section 3.2).
The released code has the minimum of erf-GELU, 0.16997; DiT's GELU is the tanh formula, with 0.17004.

Shapes: x is any array, taken as float32; codes are uint8 of the same shape.
Errors: `RangeError` for bits outside of 3..8, steps that are not positive, NaN, sums that could overflow int32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import RangeError, ShapeError
from .affine import QParams

GELU_LOWEST = 0.17004076  # of x/2 (1 + tanh(...)), at x = -0.7524
SILU_LOWEST = 0.27846454  # of x sigmoid(x), at x = -1.2785
PAYS_BELOW = 0.25  # share of positive numbers

#: The released search: 100 steps from 0.01 to 1.2 times the one that just reaches the largest number.
STEPS = np.linspace(0.01, 1.2, 100)

Codes = NDArray[np.uint8]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class SignSplit:
    """The grid of k bits with a step for either sign.

    Attributes
    ----------
    bits : int
        k, 3 to 8.
    negative, positive : float
        s- and s+, kept as float32.

    Examples
    --------
    >>> SignSplit(bits=4, negative=0.125, positive=0.5).quantize([-0.3, -9.0, 0.0, 1.1, 99.0])
    array([ 2,  7,  8, 10, 15], dtype=uint8)
    """

    bits: int
    negative: float
    positive: float
    kind: ClassVar[str] = "mrq-sign"

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8:
            raise RangeError(f"bits={self.bits!r}: a step for either sign needs 3 to 8 bits")
        for name in ("negative", "positive"):
            step = np.float32(getattr(self, name))
            if not np.finfo(np.float32).tiny <= step < np.inf:
                raise RangeError(f"the {name} step is {step}; a positive normal float32 is needed")
            object.__setattr__(self, name, float(step))

    @property
    def half(self) -> int:
        """Codes of either sign; also the flag's bit."""
        return 1 << (self.bits - 1)

    def quantize(self, x: ArrayLike) -> Codes:
        """Codes of x: the flag and k - 1 bits; what lies beyond the last code saturates."""
        x32 = np.asarray(x, np.float32)
        if np.isnan(x32).any():
            raise RangeError("NaN has no integer code: find where it was made")
        up = x32 >= 0
        q = np.rint(np.abs(x32) / np.where(up, np.float32(self.positive), np.float32(self.negative)))
        return np.minimum(q, self.half - 1).astype(np.uint8) | (up.astype(np.uint8) << np.uint8(self.bits - 1))

    def planes(self, codes: Codes) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(X+, X-): integers >= 0 and <= 0, each with zeros in the places of the other."""
        if codes.dtype != np.uint8 or (codes.size and codes.max() >= 2 * self.half):
            raise ShapeError(f"codes of dtype {codes.dtype}: {self.bits} bits are uint8 numbers below {2 * self.half}")
        up, q = codes >= self.half, (codes & np.uint8(self.half - 1)).astype(np.int32)
        return np.where(up, q, 0), np.where(up, 0, -q)

    def dequantize(self, codes: Codes) -> Float32:
        """The numbers that codes stand for. Code 0, "negative, magnitude 0", is 0 as code 2^(k-1) is."""
        up, down = self.planes(codes)
        return np.float32(self.positive) * up.astype(np.float32) + np.float32(self.negative) * down.astype(np.float32)

    def fake_quantize(self, x: NDArray[Any]) -> NDArray[Any]:
        """x rounded to the grid: `dequantize` of `quantize` in fewer passes (NaN passes through)."""
        step = np.where(x < 0, x.dtype.type(self.negative), x.dtype.type(self.positive))
        rounded: NDArray[Any] = np.clip(np.rint(x / step), 1 - self.half, self.half - 1) * step
        return rounded

    def inside(self, x: NDArray[Any]) -> NDArray[np.bool_]:
        """Where x rounds to one of the codes."""
        step = np.where(x < 0, x.dtype.type(self.negative), x.dtype.type(self.positive))
        return np.asarray(np.rint(np.abs(x) / step) <= self.half - 1)

    def facts(self) -> dict[str, Any]:
        """Bits and the fixed step."""
        return {"bits": self.bits, "negative": self.negative}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The searched step."""
        return {"positive": np.array(self.positive, np.float32)}


def product(split: SignSplit, codes: Codes, w_codes: NDArray[np.integer], w: QParams) -> Float32:
    """X Wᵀ from codes, with two integer products.

    Parameters
    ----------
    split : SignSplit
    codes : uint8 array, (..., K)
    w_codes : int8 or uint8 array, (O, K)
    w : QParams
        Per output channel (axis 0), or one for the tensor.

    Returns
    -------
    float32 array, (..., O)
    """
    up, down = split.planes(codes)
    centred = w_codes.astype(np.int32) - w.zero_point.reshape(-1, 1)
    reach = int(np.abs(centred).sum(axis=1, dtype=np.int64).max(initial=0)) * (split.half - 1)
    if reach >= 2**31:
        raise RangeError(f"a sum of up to {reach} overflows int32; cut the K = {codes.shape[-1]} inputs into parts")
    above, below = (np.matmul(plane, centred.T).astype(np.float32) for plane in (up, down))
    return w.scale * (np.float32(split.positive) * above + np.float32(split.negative) * below)


def share_of_positives(x: ArrayLike) -> float:
    """Part of the numbers that are above 0."""
    return float(np.mean(np.asarray(x) > 0))


def pays(x: ArrayLike) -> bool:
    """Whether a step for either sign is expected to beat one asymmetric step on x (module docstring)."""
    return share_of_positives(x) < PAYS_BELOW


def candidates(largest: float, bits: int, lowest: float = GELU_LOWEST) -> list[SignSplit]:
    """The grids of the released search for numbers up to `largest`, in order of their positive step."""
    half = 1 << (bits - 1)
    first = max(largest, 1e-8) / (half - 0.5)
    return [SignSplit(bits, lowest / (half - 1), first * r) for r in STEPS]


def choose_positive(x: ArrayLike, bits: int, lowest: float = GELU_LOWEST) -> SignSplit:
    """The candidate with the smallest squared rounding error on x."""
    x32 = np.asarray(x, np.float32)
    if not x32.size or not np.isfinite(x32).all():
        raise RangeError(f"a tensor of shape {x32.shape}, empty or with NaN or infinity, has no step; give finite ones")
    found = candidates(float(x32.max()), bits, lowest)
    errors = [float(np.square(grid.fake_quantize(x32) - x32, dtype=np.float64).sum()) for grid in found]
    return found[int(np.argmin(errors))]
