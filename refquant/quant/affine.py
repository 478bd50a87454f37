"""Uniform affine quantization: which integers (QSpec), what they mean (QParams), and the three maps.

    quantize       float32 -> uint8/int8     q   = clamp(round(x / scale) + zero_point, qmin, qmax)
    dequantize     uint8/int8 -> float32     x^  = scale * (q - zero_point)
    fake_quantize  float32 -> float32        x^  = dequantize(quantize(x)): floats on the grid of the codes

The arithmetic is ``refquant.intmath``'s; this module adds bits, signedness and channels. Where scale and
zero point come from is the business of ``quant.observers``.

Shapes: x is any array. With ``axis=None`` scale and zero_point are (), one pair for the tensor; with
``axis=k`` they are (C,), one pair for each index along axis k of x (axis 0 for weights: output channels).

Errors: ``RangeError`` for bits outside of 2..8, unusable scales or zero points, and NaN in x;
``ShapeError`` where x does not fit the axis or codes have the wrong dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refquant import intmath
from refquant.errors import RangeError, ShapeError
from refquant.intmath import FloatArray, IntArray

# float32 has 24 bits: up to here zero_point +- code is exact, so the codes mean what the formula says
ZERO_POINT_MAX = 1 << 23


@dataclass(frozen=True)
class QSpec:
    """The integers a tensor may use. With L = 2**bits and a range [m, M] that contains 0:

    ========  ===========  ==============  ===========  ==============  =================================
    signed    symmetric    codes           zero_point   scale           name, use
    ========  ===========  ==============  ===========  ==============  =================================
    False     False        0 .. L-1        a code       (M - m)/(L-1)   asymmetric; activations, weights
    True      False        -L/2 .. L/2-1   a code       (M - m)/(L-1)   the same, moved by L/2; int8 weights
    True      True         -L/2 .. L/2-1   0            2a/(L-2)        symmetric, a = max(-m, M)
    False     True         0 .. L-1        0            M/(L-1)         ``always_zero``; softmax outputs
    ========  ===========  ==============  ===========  ==============  =================================

    ``symmetric`` thus says "zero_point is pinned to 0", and ``signed`` which side of 0 has codes.

    Attributes
    ----------
    bits : int
        2 to 8.
    signed, symmetric : bool
        See the table.
    axis : int or None
        None: one scale for the tensor. An int: one scale for each index along that axis.

    Notes
    -----
    Source: TFMQ-DM ``quant/quant_layer.py:20-64,211-227``. The scale of the symmetric row lets a land on code
    L/2-1, so code -L/2 is used by saturation and rounding only.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    axis: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise RangeError(f"bits={self.bits!r}: 2 to 8 bits are supported; keep wider tensors in float")
        if self.axis is not None and not isinstance(self.axis, int):
            raise ShapeError(f"axis={self.axis!r}: give None (per tensor) or one integer axis (per channel)")

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return self.qmin + (1 << self.bits) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The byte type of the codes: int8 if signed, else uint8 (4-bit codes too, one a byte)."""
        return np.dtype(np.int8 if self.signed else np.uint8)


@dataclass(frozen=True, eq=False)  # arrays have no single truth value, so == stays identity
class QParams:
    """What the codes mean: x = scale * (q - zero_point). Immutable; the arrays are private copies.

    Attributes
    ----------
    scale : array_like, shape () or (C,)
        Stored as float32. Positive, finite and normal (>= 2**-126), and small enough for every code to
        dequantize to a finite float32.
    zero_point : array_like, same shape
        Integer-valued, stored as int32. |zero_point| <= 2**23; 0 if ``spec.symmetric``.
    spec : QSpec

    Notes
    -----
    The zero point may lie outside of [qmin, qmax]: the released TFMQ-DM search makes such pairs for tensors
    of one sign, and then no code means 0 exactly. ``zero_is_exact`` tells. Everything else in this library
    makes pairs for which it holds, and integer convolution, which pads with the zero point, requires it.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    spec: QSpec

    def __post_init__(self) -> None:
        spec = self.spec
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is refused below
            scale = np.array(self.scale, dtype=np.float32)
        zero = np.array(self.zero_point, dtype=np.float64)
        if scale.ndim != (spec.axis is not None) or scale.shape != zero.shape:
            raise ShapeError(
                f"scale {scale.shape} and zero_point {zero.shape} with axis={spec.axis}: give scalars for "
                "axis=None, arrays (C,) for a channel axis"
            )
        if not (np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny)).all():
            raise RangeError(
                f"scale {scale.min() if scale.ndim else scale} is no positive normal float32; "
                "observers never go below 1e-8: calibrate with one, or check the range"
            )
        if not (np.abs(zero) <= ZERO_POINT_MAX).all() or (zero != np.trunc(zero)).any():
            raise RangeError(
                f"zero_point must be an integer of at most 2**23 in size, got {zero}; "
                "the range lies too far from 0 for its width: let it contain 0"
            )
        if spec.symmetric and zero.any():
            raise RangeError(f"zero_point {zero} with symmetric=True: it must be 0; use symmetric=False")
        reach = np.maximum(np.abs(spec.qmin - zero), np.abs(spec.qmax - zero)) * scale.astype(np.float64)
        if (reach > np.finfo(np.float32).max).any():
            raise RangeError(
                f"codes would mean numbers up to {reach.max():.3g}, beyond float32 (3.4e38); "
                "rescale the tensor before quantizing"
            )
        zero_point = zero.astype(np.int32)
        scale.setflags(write=False)
        zero_point.setflags(write=False)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero_point)

    @property
    def zero_is_exact(self) -> bool:
        """True if real 0 has a code of its own in every channel: qmin <= zero_point <= qmax."""
        return bool(((self.spec.qmin <= self.zero_point) & (self.zero_point <= self.spec.qmax)).all())


def quantize(x: ArrayLike, qparams: QParams) -> IntArray:
    """Integer codes of x: ``clamp(round(x / scale) + zero_point, qmin, qmax)``.

    Parameters
    ----------
    x : array_like, any shape
        Taken as float32, the precision in which codes are defined. +-inf saturates.
    qparams : QParams

    Returns
    -------
    array of uint8 or int8 (``qparams.spec.dtype``), shape of x

    Raises
    ------
    RangeError
        If x contains NaN.
    ShapeError
        If x does not have the channels of qparams along its axis.

    Examples
    --------
    >>> quantize([-1.0, 0.0, 0.25, 0.75, 9.0], QParams(0.5, 2, QSpec(bits=4)))
    array([ 0,  2,  2,  4, 15], dtype=uint8)
    """
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf and saturates, as it should
        x32 = np.asarray(x, dtype=np.float32)
    scale, zero_point = broadcast(qparams, x32.shape)
    return intmath.quantize_codes(x32, scale, zero_point, qparams.spec.qmin, qparams.spec.qmax)


def dequantize(codes: IntArray, qparams: QParams) -> NDArray[np.float32]:
    """The real numbers that codes stand for: ``scale * (codes - zero_point)``, in float32.

    Parameters
    ----------
    codes : array of uint8 or int8 (``qparams.spec.dtype``), any shape
    qparams : QParams

    Returns
    -------
    array of float32, shape of codes

    Raises
    ------
    ShapeError
        If the dtype is not the one of ``qparams.spec``, or the channels do not fit.
    """
    codes = np.asarray(codes)
    if codes.dtype != qparams.spec.dtype:
        raise ShapeError(
            f"codes of dtype {codes.dtype}, but {qparams.spec} stores {qparams.spec.dtype}; "
            "dequantize with the QParams that made the codes"
        )
    scale, zero_point = broadcast(qparams, codes.shape)
    return intmath.dequantize_codes(codes, scale, zero_point).astype(np.float32, copy=False)


def fake_quantize(x: ArrayLike, qparams: QParams) -> NDArray[np.float32]:
    """x rounded to the grid of the codes, still as float32: ``dequantize(quantize(x))``.

    By construction, not by approximation, this is what an integer kernel sees. Idempotent: a second call
    changes nothing, because scale * k / scale rounds back to k for |k| <= 2**9 (error 2**-15 of a step).

    Parameters, errors and shapes are those of ``quantize``.

    Examples
    --------
    >>> fake_quantize([0.1, 0.3, -5.0], QParams(0.25, 8, QSpec(bits=4)))
    array([ 0.  ,  0.25, -2.  ], dtype=float32)
    """
    return dequantize(quantize(x, qparams), qparams)


def broadcast(qparams: QParams, shape: tuple[int, ...]) -> tuple[FloatArray, IntArray]:
    """scale and zero_point shaped (1, .., C, .., 1) so that they multiply an array of that shape."""
    axis = qparams.spec.axis
    if axis is None:
        return qparams.scale, qparams.zero_point
    channels = qparams.scale.size
    if not -len(shape) <= axis < len(shape) or shape[axis] != channels:
        raise ShapeError(
            f"array of shape {shape} for {channels} channels along axis {axis}: that axis must exist and "
            f"have {channels} entries; calibrate on the same layout"
        )
    along = [1] * len(shape)
    along[axis] = channels
    return qparams.scale.reshape(along), qparams.zero_point.reshape(along)
