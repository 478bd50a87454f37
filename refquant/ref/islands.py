"""Float islands: what an integer network computes in real numbers between two integer layers. The definition.

    group_norm_silu_quantize   normalise (N, H, W, C) in groups, apply SiLU, make codes
    silu_quantize              SiLU y = x / (1 + e^-x), make codes
    softmax_quantize           softmax over the last axis, make codes with zero_point 0
    quantize                   make codes of float32 as it is
    upsample_nearest           every pixel four times
    concat_channels            two images side by side along the channels

All but the last three are computed in float64 and rounded once, at the end: to float32, or to the codes
limit(round(y / scale) + zero_point, 0, 2^bits - 1), ties to even, of the float64 y. `quantize` divides in float32
and gives exactly the codes of `refquant.quant.affine.quantize`; copies are exact as well.

The C core (`refquant.kernels`) gives the same bits on all its instruction sets and with any number of threads, and

- its float32 results lie within 0.6 ulp of the float64 y, and for group norm another 2^-36 (|gamma| + |beta|) of it
  (more only for groups of more than 10^4 numbers: cext/islands_units.c has the formula);
- its codes are those of the float64 y, except where y / scale lies within 2e-6 of the middle between two integers.

Bounds are measured and asserted in tests/kernels/test_islands.py.

Errors: `ShapeError` for a wrong dtype or shape; `RangeError` for parameters out of range and for numbers without a
code. NaN is refused everywhere but in copies, infinities everywhere but there and in `quantize`, where they
saturate; scores may be -inf (a mask) where the line has a finite one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError, ShapeError
from ..intmath import quantize_codes
from .gemm import check_array

Floats = NDArray[np.float32]
Result = NDArray[Any]  # float32, or uint8 where there is a scale

SMALLEST, LARGEST = 1e-30, 1e30  # of eps and of a factor: their products with float32 stay in float64's range
TINY = float(np.finfo(np.float32).tiny)
BEYOND = 2.0**128 - 2.0**103  # float64 numbers from here on round to infinity in float32


# ---------------------------------------------------------------- what is allowed


def check_codes(function: str, scale: Any, zero_point: Any, bits: Any) -> tuple[float, int, int]:
    """Return scale (rounded to float32), zero point and largest code; refuse what describes no uint8 codes."""
    if not isinstance(bits, (int, np.integer)) or not 2 <= bits <= 8:
        raise RangeError(f"{function}: bits is {bits!r}; it must be a whole number from 2 to 8.")
    qmax = (1 << int(bits)) - 1
    if not isinstance(zero_point, (int, np.integer)) or not 0 <= zero_point <= qmax:
        raise RangeError(f"{function}: zero_point is {zero_point!r}; it must be a code of {bits} bits, 0..{qmax}.")
    number = _number(function, "scale", scale)
    rounded = float(np.float32(number)) if 0 < number < BEYOND else math.inf  # NaN fails both
    if not TINY <= rounded < math.inf:
        raise RangeError(
            f"{function}: scale is {number}; it must be a positive normal float32, from 2^-126. Calibrate."
        )
    return rounded, int(zero_point), qmax


def check_factor(function: str, name: str, number: Any) -> float:
    """Return a positive number of reasonable size."""
    value = _number(function, name, number)
    if not SMALLEST <= value <= LARGEST:
        raise RangeError(f"{function}: {name} is {value}; it must be positive, {SMALLEST} to {LARGEST}.")
    return value


def check_finite(function: str, name: str, x: NDArray[Any]) -> None:
    """Refuse NaN and infinities, and say where the first one is."""
    finite = np.isfinite(x)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise RangeError(
            f"{function}: {name} is {x[index]} at index {index} of shape {x.shape}; finite numbers are allowed. "
            "Find where it was made."
        )


def check_group_norm(x: Any, gamma: Any, beta: Any, groups: Any, eps: Any) -> tuple[int, float]:
    """Return the number of groups and eps; refuse operands that do not fit each other."""
    name = "group_norm_silu_quantize"
    for label, array, axes in (("x", x, "(N, H, W, C)"), ("gamma", gamma, "(C)"), ("beta", beta, "(C)")):
        if type(array) is not np.ndarray or array.dtype != np.float32 or array.ndim != axes.count(",") + 1:
            check_array(name, label, array, np.float32, axes)  # puts a message together first: 3 microseconds
    c = x.shape[3]
    if gamma.shape != (c,) or beta.shape != (c,):
        raise ShapeError(f"{name}: gamma {gamma.shape} and beta {beta.shape} for {c} channels; both must be ({c},).")
    if not isinstance(groups, (int, np.integer)) or groups < 1 or c % groups:
        raise ShapeError(f"{name}: groups is {groups!r}; it must be a whole number from 1 that divides {c} channels.")
    return int(groups), check_factor(name, "eps", eps)


def check_scores(scores: Any) -> None:
    """Refuse scores that are no float32 or int32 array with a last axis to sum over."""
    if not isinstance(scores, np.ndarray) or scores.dtype not in (np.float32, np.int32) or scores.ndim < 1:
        have = f"{scores.dtype} {scores.shape}" if isinstance(scores, np.ndarray) else f"a {type(scores).__name__}"
        raise ShapeError(f"softmax_quantize: scores is {have}; it must be float32 or int32, shape (..., L).")


def check_lines(scores: NDArray[Any]) -> None:
    """Refuse lines of scores that have no softmax: with NaN, +inf, or nothing but -inf."""
    largest = scores.max(axis=-1) if scores.shape[-1] else np.zeros(())
    bad = ~np.isfinite(largest)  # the maximum of a line with NaN is NaN
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise RangeError(
            f"softmax_quantize: the largest score of line {index} of {scores.shape[:-1]} is {largest[index]}; "
            "it must be finite. Find where it was made."
        )


def check_beside(x: Any, y: Any) -> None:
    """Refuse what are no two images with the same pixels."""
    for name, image in (("x", x), ("y", y)):
        check_array("concat_channels", name, image, np.float32, "(N, H, W, C)")
    if x.shape[:3] != y.shape[:3]:
        raise ShapeError(f"concat_channels: x {x.shape} and y {y.shape} must have the same images, lines and columns.")


def check_image(x: Any) -> None:
    """Refuse what is no image of codes or numbers."""
    if not isinstance(x, np.ndarray) or x.dtype not in (np.uint8, np.float32) or x.ndim != 4:
        have = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
        raise ShapeError(f"upsample_nearest: x is {have}; it must be uint8 or float32, shape (N, H, W, C).")


def check_floats(function: str, x: Any) -> None:
    """Refuse what is no float32 array, of any shape."""
    if not isinstance(x, np.ndarray) or x.dtype != np.float32:
        have = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
        raise ShapeError(f"{function}: x is {have}; it must be a float32 array. Nothing is converted silently.")


def _number(function: str, name: str, value: Any) -> float:
    if isinstance(value, (int, float, np.number)) or (isinstance(value, np.ndarray) and value.shape == ()):
        return float(value)
    raise RangeError(f"{function}: {name} is {value!r}; it must be one number.")


# ---------------------------------------------------------------- the definition


def group_norm_silu_quantize(
    x: Floats,
    gamma: Floats,
    beta: Floats,
    groups: int,
    *,
    eps: float = 1e-6,
    silu: bool = True,
    scale: float | None = None,
    zero_point: int = 0,
    bits: int = 8,
) -> Result:
    """Normalise each group of channels of each image, scale and shift, apply SiLU, make codes.

        z = gamma (x - m) / sqrt(v + eps) + beta        m, v: mean and variance over H, W and the C / groups channels
        y = z / (1 + e^-z)  or  z

    Parameters are those of `refquant.kernels.group_norm_silu_quantize`.
    """
    groups, eps = check_group_norm(x, gamma, beta, groups, eps)
    stage = None if scale is None else check_codes("group_norm_silu_quantize", scale, zero_point, bits)
    for name, array in (("x", x), ("gamma", gamma), ("beta", beta)):
        check_finite("group_norm_silu_quantize", name, array)
    if x.size == 0:
        return np.empty(x.shape, np.float32 if stage is None else np.uint8)
    n, h, w, c = x.shape
    d = x.astype(np.float64).reshape(n, h * w, groups, c // groups)
    d = d - d[:, :1, :, :1]  # the variance of numbers near 0: exactly 0 where all of them are equal
    d -= d.mean(axis=(1, 3), keepdims=True)
    d /= np.sqrt(np.square(d).mean(axis=(1, 3), keepdims=True) + eps)
    z = d.reshape(x.shape) * gamma.astype(np.float64) + beta.astype(np.float64)
    return finish(_silu(z) if silu else z, stage)


def silu_quantize(x: Floats, *, scale: float | None = None, zero_point: int = 0, bits: int = 8) -> Result:
    """Apply SiLU y = x / (1 + e^-x), make codes: see `refquant.kernels.silu_quantize`."""
    check_floats("silu_quantize", x)
    stage = None if scale is None else check_codes("silu_quantize", scale, zero_point, bits)
    check_finite("silu_quantize", "x", x)
    return finish(_silu(x.astype(np.float64)), stage)


def softmax_quantize(scores: NDArray[Any], *, factor: float = 1.0, scale: float | None = None, bits: int = 8) -> Result:
    """Softmax of factor * scores over the last axis, make codes: see `refquant.kernels.softmax_quantize`."""
    check_scores(scores)
    factor = check_factor("softmax_quantize", "factor", factor)
    stage = None if scale is None else check_codes("softmax_quantize", scale, 0, bits)
    check_lines(scores)
    if scores.size == 0:
        return np.empty(scores.shape, np.float32 if stage is None else np.uint8)
    e = scores.astype(np.float64)
    with np.errstate(under="ignore"):
        e = np.exp((e - e.max(axis=-1, keepdims=True)) * factor)
        return finish(e / e.sum(axis=-1, keepdims=True), stage)


def quantize(x: Floats, scale: float, zero_point: int = 0, *, bits: int = 8) -> NDArray[np.uint8]:
    """Make codes of float32, dividing in float32: exactly those of `refquant.quant.affine.quantize`."""
    check_floats("quantize", x)
    rounded, zero_point, qmax = check_codes("quantize", scale, zero_point, bits)
    check_no_nan("quantize", x)
    codes = quantize_codes(x, np.asarray(rounded, np.float32), np.asarray(zero_point), 0, qmax)
    return codes.astype(np.uint8, copy=False)


def check_no_nan(function: str, x: Floats) -> None:
    """Refuse NaN, and say where the first one is."""
    nan = np.isnan(x)
    if nan.any():
        index = tuple(int(i) for i in np.argwhere(nan)[0])
        raise RangeError(
            f"{function}: x is nan at index {index} of shape {x.shape}; finite numbers and infinities are allowed. "
            "Find where it was made."
        )


def concat_channels(x: Floats, y: Floats) -> Floats:
    """(N, H, W, C) beside (N, H, W, D): (N, H, W, C + D)."""
    check_beside(x, y)
    return np.concatenate((x, y), axis=3)


def upsample_nearest(x: NDArray[Any]) -> NDArray[Any]:
    """Enlarge (N, H, W, C) to (N, 2H, 2W, C), every pixel four times."""
    check_image(x)
    return x.repeat(2, axis=1).repeat(2, axis=2)


def _silu(z: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore", under="ignore"):  # e^-z beyond float64 is infinite: y is 0, as it should be
        return np.asarray(z / (1 + np.exp(-z)))


def finish(y: NDArray[np.float64], stage: tuple[float, int, int] | None) -> Result:
    """Round float64 once: to float32, or to codes."""
    if stage is None:
        with np.errstate(over="ignore", under="ignore"):
            return y.astype(np.float32)
    scale, zero_point, qmax = stage
    codes = quantize_codes(y, np.asarray(scale, np.float64), np.asarray(zero_point), 0, qmax)
    return codes.astype(np.uint8, copy=False)
