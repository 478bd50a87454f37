"""The integer arithmetic of refquant, defined once: rounding, saturation, affine codes, requantization.

Everything else that rounds or saturates (fake quantization, the integer reference in ``ref``, the C
core, the tutorials) means exactly what stands here, so a change of one line here is a change everywhere,
and ``tests/property`` fails on it.

=====================  ==========================================================================
``round_half_even``    real -> integer-valued real, ties to the even neighbour
``saturate``           integer -> uint8 or int8, limited to [qmin, qmax]
``quantize_codes``     q = saturate(round(x / scale) + zero_point)
``grid_codes``         the same, still as floats
``dequantize_codes``   x = scale * (q - zero_point)
``fixed_point``        real multiplier m -> (mantissa, shift) with m = mantissa * 2**-shift
``rounding_shift``     round(p / 2**shift), in integers only
``requantize``         q = saturate(round(acc * m) + zero_point), in integers only
=====================  ==========================================================================

Two rules hold throughout. The zero point is added *after* rounding, so it can never turn a tie into
something else. Saturation comes *last*, after the zero point, so every code is reachable.

Arguments broadcast as in NumPy; per-channel callers reshape their (C,) parameters first (``quant.affine``
does). Wrong dtypes raise ``ShapeError``; NaN and numbers out of bounds raise ``RangeError``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refquant.errors import RangeError, ShapeError

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]

MANTISSA_MIN = 1 << 30  # 31 significant bits: m is represented with a relative error of at most 2**-31
MANTISSA_END = 1 << 31
SHIFT_MAX = 62  # |acc * mantissa| <= 2**62, so any longer shift gives 0 for every accumulator


def round_half_even(x: FloatArray) -> FloatArray:
    """Round to the nearest integer, ties to the even one: 0.5 -> 0, 1.5 -> 2, -2.5 -> -2.

    Ties to even has no drift: half of all ties go up. It is also the default of IEEE 754, NumPy, PyTorch
    and of the SIMD conversion instructions, which is what makes bit-equality with them possible.

    Parameters
    ----------
    x : array of float, any shape

    Returns
    -------
    array of the same dtype and shape, integer-valued; infinities and NaN pass through
    """
    return np.asarray(np.rint(x))


def saturate(q: FloatArray | IntArray, qmin: int, qmax: int) -> IntArray:
    """Limit integers (or integer-valued floats) to [qmin, qmax] and store them in one byte.

    Parameters
    ----------
    q : array, any shape
        Integer-valued; +-inf is allowed, NaN is not.
    qmin, qmax : int
        0 <= qmin < qmax <= 255 gives uint8, otherwise -128 <= qmin < qmax <= 127 gives int8.

    Returns
    -------
    array of uint8 or int8, shape of q

    Raises
    ------
    RangeError
        If no byte type holds [qmin, qmax].
    """
    dtype: type[np.integer[Any]]
    if 0 <= qmin < qmax <= 255:
        dtype = np.uint8
    elif -128 <= qmin < qmax <= 127:
        dtype = np.int8
    else:
        raise RangeError(
            f"codes from {qmin} to {qmax} fit neither uint8 (0..255) nor int8 (-128..127); "
            "give qmin < qmax inside one of them, as QSpec does"
        )
    return np.clip(q, qmin, qmax).astype(dtype)


def quantize_codes(x: FloatArray, scale: FloatArray, zero_point: IntArray, qmin: int, qmax: int) -> IntArray:
    """Map real numbers to integer codes: ``saturate(round_half_even(x / scale) + zero_point)``.

    Parameters
    ----------
    x : array of float, any shape
        +-inf saturates to qmax or qmin.
    scale : array of float, broadcastable to x
        Positive and finite (``QParams`` guarantees it).
    zero_point : array of int, broadcastable to x
        |zero_point| <= 2**23, so that the sum below is exact wherever it is not saturated.
    qmin, qmax : int
        As in ``saturate``.

    Returns
    -------
    array of uint8 or int8, shape of x

    Raises
    ------
    RangeError
        If x contains NaN: there is no code for it.

    Notes
    -----
    float32 x and float32 scale are divided in float32, as the authors' code does
    (TFMQ-DM ``quant/quant_layer.py:211-227``); a float64 operand makes it a float64 division. Dividing,
    rather than multiplying by 1/scale, rounds once and keeps x = k * 2**n * scale exact.
    """
    if np.isnan(x).any():
        index = tuple(int(i) for i in np.argwhere(np.isnan(x))[0])
        raise RangeError(
            f"NaN at index {index} of an array of shape {x.shape} has no integer code; "
            "finite numbers and infinities are allowed: find where the NaN was made"
        )
    return saturate(grid_codes(x, scale, zero_point, qmin, qmax), qmin, qmax)


def grid_codes(x: FloatArray, scale: FloatArray, zero_point: IntArray, qmin: int, qmax: int) -> FloatArray:
    """The codes of ``quantize_codes`` as integer-valued floats: what fake quantization computes with.

    Parameters are those of ``quantize_codes``; NaN passes through instead of raising, so that a network's
    inner layers need no extra pass over their inputs.

    Returns
    -------
    array with the dtype of x / scale, shape of x
    """
    with np.errstate(over="ignore"):  # a quotient beyond the float range is +-inf and saturates
        q = round_half_even(x / scale)
    q += zero_point.astype(q.dtype)  # the cast: int32 + float32 would be promoted to float64
    return np.asarray(np.clip(q, qmin, qmax, out=q))


def dequantize_codes(codes: IntArray, scale: FloatArray, zero_point: IntArray) -> FloatArray:
    """Map integer codes to the real numbers they stand for: ``scale * (codes - zero_point)``.

    Parameters
    ----------
    codes : array of int, any shape
    scale : array of float, broadcastable to codes
    zero_point : array of int, broadcastable to codes
        |zero_point| <= 2**23: the difference is then exact in float32 and only the product rounds.

    Returns
    -------
    array with the dtype of scale, shape of codes
    """
    x = codes.astype(scale.dtype)
    x -= zero_point.astype(scale.dtype)
    x *= scale
    return x


def fixed_point(multiplier: float | FloatArray) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Write a positive real multiplier as ``mantissa * 2**-shift`` with 31 significant bits.

    Parameters
    ----------
    multiplier : float or array of float, any shape
        Usually scale_a * scale_w / scale_out. 2**-32 <= multiplier < 2**31 (1 - 2**-32).

    Returns
    -------
    mantissa : array of int32 in [2**30, 2**31), shape of multiplier
    shift : array of int32 in [0, 62], shape of multiplier

    Raises
    ------
    RangeError
        If a multiplier is not positive and finite, or outside of the bounds above.

    Notes
    -----
    frexp gives m = f * 2**e with f in [1/2, 1); the mantissa is round(f * 2**31), the shift 31 - e. The
    relative error is at most 2**-32 / f <= 2**-31, so for |acc * m| <= 255 the product is off by less
    than 2**-23 before it is rounded. Powers of two are exact.
    """
    m = np.asarray(multiplier, dtype=np.float64)
    if not (np.isfinite(m) & (m > 0)).all():
        raise RangeError(
            f"a multiplier must be positive and finite, got {_first(m, ~(np.isfinite(m) & (m > 0)))}; "
            "check the scales it was made from"
        )
    fraction, exponent = np.frexp(m)
    mantissa = round_half_even(np.ldexp(fraction, 31)).astype(np.int64)
    carry = mantissa == MANTISSA_END  # f rounded up to 1: it is 1/2 with the next exponent
    mantissa = np.where(carry, MANTISSA_MIN, mantissa)
    shift = 31 - (exponent + carry)
    bad = (shift < 0) | (shift > SHIFT_MAX)
    if bad.any():
        raise RangeError(
            f"multiplier {_first(m, bad)} is outside of [2**-32, 2**31); "
            "the scales of input, weight and output are out of proportion: calibrate again"
        )
    return mantissa.astype(np.int32), shift.astype(np.int32)


def rounding_shift(p: NDArray[np.int64], shift: IntArray | int) -> NDArray[np.int64]:
    """Divide int64 integers by 2**shift and round, ties to even. A shift of 0 is the identity.

    Parameters
    ----------
    p : array of int64, any value
    shift : int or array of int in [0, 62], broadcastable to p

    Returns
    -------
    array of int64

    Notes
    -----
    ``>>`` is floor division and ``&`` its non-negative remainder, for negative p too. Comparing twice the
    remainder with the divisor needs no special case for shift 0 (0 is neither above nor equal to 1) and
    stays below 2**63.
    """
    unit = np.int64(1) << np.asarray(shift, dtype=np.int64)
    floor = p >> np.asarray(shift, dtype=np.int64)
    twice_rest = (p & (unit - 1)) << 1
    round_up = (twice_rest > unit) | ((twice_rest == unit) & (floor & 1 == 1))
    return np.asarray(floor + round_up)


def requantize(
    acc: NDArray[np.int32],
    mantissa: NDArray[np.int32],
    shift: NDArray[np.int32],
    zero_point: int | IntArray,
    qmin: int,
    qmax: int,
) -> IntArray:
    """Scale int32 accumulators to one-byte codes: ``saturate(round(acc * m) + zero_point)``.

    Parameters
    ----------
    acc : array of int32, any shape, any value
    mantissa, shift : arrays of int32, broadcastable to acc
        From ``fixed_point``: m = mantissa * 2**-shift.
    zero_point : int or array of int32, broadcastable to acc
    qmin, qmax : int
        As in ``saturate``.

    Returns
    -------
    array of uint8 or int8, shape of acc

    Raises
    ------
    ShapeError
        If acc is not int32.
    RangeError
        If a mantissa lies outside of [2**30, 2**31) or a shift outside of [0, 62].

    Notes
    -----
    Exact integers for all inputs: |acc * mantissa| <= 2**31 * (2**31 - 1) < 2**62 fits int64 and is rounded
    once; neither the rounding nor the zero point can overflow. m = 1 (mantissa 2**30, shift 30) changes no
    acc.
    """
    if acc.dtype != np.int32:
        raise ShapeError(f"requantize takes int32 accumulators, got {acc.dtype}; use acc.astype(np.int32)")
    bad = (mantissa < MANTISSA_MIN) | (mantissa >= MANTISSA_END) | (shift < 0) | (shift > SHIFT_MAX)
    if np.any(bad):
        raise RangeError(
            f"mantissa {_first(mantissa, bad)} with shift {_first(shift, bad)}: a mantissa lies in "
            "[2**30, 2**31), a shift in [0, 62]; make both with fixed_point"
        )
    product = acc.astype(np.int64) * mantissa.astype(np.int64)
    return saturate(rounding_shift(product, shift) + np.asarray(zero_point, dtype=np.int64), qmin, qmax)


def _first(values: NDArray[Any], where: NDArray[np.bool_]) -> Any:
    """The first offending value, for an error message."""
    return np.broadcast_to(values, where.shape)[where].flat[0].item()
