"""MRQ for softmax outputs: a fine step for the many small probabilities, a coarse one for the few large.

With k bits, h = 2^(k-1) and an exponent m:

    p <  2^-m    fine      q = round(p / s1)        s1 = 2^-m / (h - 1)
    p >= 2^-m    coarse    q = round(p / s2)        s2 = 1 / (h - 1) = 2^m s1

    code = flag q: the most significant bit says "coarse", the other k - 1 bits are q

**One integer accumulator.** Because s2 is s1 shifted by m bits, a probability is s1 times an integer,
u = (hi << m) + lo, where hi and lo are the two planes of q, one of which is 0 at every place. So

    P V = s1 s_v  (u @ (V_int - z_v))

with one integer product and one scale, whatever region each probability is in. Were the ratio no power of two, it would
take two products. m <= k - 1, or values just above the split would be less than half a coarse step, and lost.

**Disjoint regions.** The released code adds its halves, Q2(clip(p, 2^-m, 1)) + Q1(clip(p, 0, 2^-m)): every large
probability comes out 2^-m too large, every small one Q2(2^-m) too large, which is 0 only while 2^-m < s2 / 2.
PTQ4ViT's has the same line. `released_additive` repeats it for study; nothing else here uses it.

Sources: TQ-DiT (Hwang, Lee, Kang 2025, arXiv 2502.04056; zerohye/TQ-DiT ``quant_layers/matmul.py``,
``utils/integer.py``), PTQ4ViT (Yuan et al. 2022, arXiv 2111.12293, section 3.2: twin uniform quantization).

Shapes: p is any array of numbers in [0, 1], taken as float32; codes are uint8 of the same shape.
Errors: `RangeError` for bits outside of 3..8, m outside of 0..k-1, NaN, and sums that could overflow int32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import RangeError, ShapeError
from .affine import QParams

Codes = NDArray[np.uint8]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class SoftmaxRegions:
    """The two-region grid of k bits, split at 2^-m.

    Attributes
    ----------
    bits : int
        k, 3 to 8. With 2 one bit would be left for the magnitude.
    shift : int
        m, 0 to k - 1. 0 puts everything but 1 itself into the fine region, whose step is then the coarse one.

    Notes
    -----
    Codes come back from what they stand for, but for two at the split: the last fine one means 2^-m, which is coarse,
    and with m = 1 the first coarse one may mean a little less than 1/2 (3/7 with 4 bits).

    Examples
    --------
    >>> regions = SoftmaxRegions(bits=4, shift=2)         # fine below 1/4: s1 = 1/28; coarse: s2 = 1/7
    >>> regions.quantize([0.0, 0.1, 0.3, 1.0])
    array([ 0,  3, 10, 15], dtype=uint8)
    """

    bits: int
    shift: int
    kind: ClassVar[str] = "mrq-softmax"

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8:
            raise RangeError(f"bits={self.bits!r}: two regions for softmax outputs need 3 to 8 bits")
        if not 0 <= self.shift < self.bits:
            raise RangeError(
                f"shift={self.shift!r} with {self.bits} bits: give 0 to {self.bits - 1}; a finer split flushes what "
                "lies just above it to 0"
            )

    @property
    def half(self) -> int:
        """h, the codes of each region; also the flag's bit."""
        return 1 << (self.bits - 1)

    @property
    def coarse(self) -> np.float32:
        """s2."""
        return np.float32(1 / (self.half - 1))

    @property
    def fine(self) -> np.float32:
        """s1, exactly 2^-m s2."""
        return np.ldexp(self.coarse, -self.shift)

    def quantize(self, p: ArrayLike) -> Codes:
        """Codes of p: the flag and k - 1 bits; numbers outside of [0, 1] saturate."""
        p32 = np.asarray(p, np.float32)
        if np.isnan(p32).any():
            raise RangeError("NaN has no integer code; softmax outputs lie in [0, 1]: find where it was made")
        big, top = p32 >= np.float32(2.0**-self.shift), self.half - 1
        q = np.clip(np.rint(p32 / np.where(big, self.coarse, self.fine)), 0, top).astype(np.uint8)
        return q | (big.astype(np.uint8) << np.uint8(self.bits - 1))

    def planes(self, codes: Codes) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(hi, lo): the magnitudes of the coarse and of the fine region, 0 where a code belongs to the other."""
        if codes.dtype != np.uint8 or (codes.size and codes.max() >= 2 * self.half):
            raise ShapeError(f"codes of dtype {codes.dtype}: {self.bits} bits are uint8 numbers below {2 * self.half}")
        big, q = codes >= self.half, (codes & np.uint8(self.half - 1)).astype(np.int32)
        return np.where(big, q, 0), np.where(big, 0, q)

    def integers(self, codes: Codes) -> NDArray[np.int32]:
        """u = (hi << m) + lo: the numbers that p = s1 u is made of."""
        hi, lo = self.planes(codes)
        return (hi << self.shift) + lo

    def dequantize(self, codes: Codes) -> Float32:
        """The probabilities that codes stand for, s1 u in float32."""
        return self.fine * self.integers(codes).astype(np.float32)

    def fake_quantize(self, x: NDArray[Any]) -> NDArray[Any]:
        """x rounded to the grid: `dequantize` of `quantize` in fewer passes (NaN passes through)."""
        step = np.where(x >= 2.0**-self.shift, self.coarse, self.fine).astype(x.dtype, copy=False)
        rounded: NDArray[Any] = np.clip(np.rint(x / step), 0, self.half - 1) * step
        return rounded

    def inside(self, x: NDArray[Any]) -> NDArray[np.bool_]:
        """All of [0, 1]."""
        return np.asarray((x >= 0) & (x <= 1))

    def facts(self) -> dict[str, Any]:
        """Bits."""
        return {"bits": self.bits}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """m."""
        return {"shift": np.array(self.shift, np.uint8)}


def accumulate(regions: SoftmaxRegions, codes: Codes, v: NDArray[np.integer], zero_point: int) -> NDArray[np.int32]:
    """The integer product of attention, u @ (v - z_v), in one int32 accumulator.

    Parameters
    ----------
    regions : SoftmaxRegions
    codes : uint8 array, (..., L, L)
        Of the probabilities.
    v : uint8 or int8 array, (..., L, d)
        Codes of the values.
    zero_point : int

    Returns
    -------
    int32 array, (..., L, d)

    Raises
    ------
    RangeError
        If a sum could overflow. Rows of a softmax sum to 1, so their u sum to 1/s1 = 2^m (h - 1) and some rounding:
        16,256 for 8 bits with m = 7, times 255, far below 2^31 = 2.1e9. Codes of something else may be refused.
    """
    u, centred = regions.integers(codes), v.astype(np.int64) - zero_point
    reach = int(u.sum(axis=-1, dtype=np.int64).max(initial=0)) * int(np.abs(centred).max(initial=0))
    if reach >= 2**31:
        raise RangeError(f"a sum of up to {reach} overflows int32: these are no codes of softmax rows, which sum to 1")
    return np.matmul(u, centred.astype(np.int32))


def product(regions: SoftmaxRegions, codes: Codes, v_codes: NDArray[np.integer], v: QParams) -> Float32:
    """P V from codes: s1 s_v times the integer accumulator; shapes as in `accumulate`."""
    return regions.fine * v.scale * accumulate(regions, codes, v_codes, int(v.zero_point)).astype(np.float32)


def choose_shift(p: Float32, v: Float32, bits: int, importance: Float32 | None = None) -> SoftmaxRegions:
    """The split with the smallest squared error of P V, V in float.

    Parameters
    ----------
    p : float32 array, (..., L, L)
    v : float32 array, (..., L, d)
    bits : int
    importance : float32 array, (..., L, d), optional
        Each error is multiplied by it before it is squared (see `refquant.quant.guided`).

    Returns
    -------
    SoftmaxRegions
        The first minimum over m = 0 .. k - 1 (the released search tries 20 exponents, most of them useless).
    """
    candidates = [SoftmaxRegions(bits, m) for m in range(bits)]
    errors = []
    for regions in candidates:
        error = np.matmul(regions.fake_quantize(p) - p, v)
        if importance is not None:
            error *= importance
        errors.append(float(np.square(error, dtype=np.float64).sum()))
    return candidates[int(np.argmin(errors))]


def released_additive(p: ArrayLike, bits: int, shift: int) -> Float32:
    """What the released quantizer makes of p: the sum of its halves (module docstring). For study.

    Parameters
    ----------
    p : array_like
        Probabilities.
    bits : int
    shift : int
        Anything from 0; the released search tries 0 to 19.

    Returns
    -------
    float32 array, shape of p
    """
    half, p32, split = 1 << (bits - 1), np.asarray(p, np.float32), np.float32(2.0**-shift)

    def uniform(x: Float32, step: np.float32) -> Float32:
        return np.clip(np.rint(x / step), -half, half - 1) * step

    coarse = np.float32(1 / (half - 1))
    return uniform(np.clip(p32, split, 1), coarse) + uniform(np.clip(p32, 0, split), coarse * split)
