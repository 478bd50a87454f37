"""The range searches of Q-Diffusion, as released: ``max``, its scaled variant, and ``mse``.

    scale_method="max"              `max_range`                     qdiff/quant_layer.py:66-190
    a name with "max" and "scale"   `max_range` with scaled=True       (UniformAffineQuantizer:
    scale_method="mse"              `mse`                               init_quantization_scale, quantize)
    the same with symmetric=True    `symmetric_mse_as_released`

They look like ``observers.minmax`` and ``observers.mse``, and differ where a tensor has one sign:

==============  =========================================  ==========================================
                Q-Diffusion                                refquant, TFMQ-DM
==============  =========================================  ==========================================
max, x > 0      step (max - min)/(L-1) with zero point 0:  step max/(L-1)
                the top ``min x`` of the range is clipped
max, symmetric  step a/(L/2-1), in float64                 the same
mse             raw [min, max], in float32; 0 may have     0 always has a code
                no code
mse, symmetric  scored on codes 0 .. L/2-2 with a zero     zero point 0
                point, used with codes -L/2 .. L/2-1
==============  =========================================  ==========================================

The last one is a defect: zero point 135 and codes up to 127 clip every positive value (all 23 of the golden
tensor ``mixed`` become -0.07). It can be had for study, under a name that says so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import RangeError
from ..affine import QParams, QSpec
from .ranges import as_rows, as_zero_point, per_spec
from .search import SHRINK, candidate_errors

Float32 = NDArray[np.float32]

POWER = 2.4
SMALLEST = np.finfo(np.float32).tiny  # of the scales that QParams accepts


def max_range(x: ArrayLike, spec: QSpec, *, scaled: bool = False) -> QParams:
    """Quantizer by the extremes of x: Q-Diffusion's ``max``.

    Parameters
    ----------
    x : array_like, any shape
    spec : QSpec
        All four kinds; per channel if it has an axis.
    scaled : bool
        The range times (bits + 2) / 8, which at 4 bits is 0.75. Of asymmetric quantizers it changes the zero
        point only, for their step is computed from the raw range.

    Returns
    -------
    QParams

    Raises
    ------
    RangeError
        Also where x is negative and so nearly constant that the zero point exceeds 2**23. The authors' code
        goes on with codes that float32 cannot tell apart.

    Notes
    -----
    In float64, with m = min(min x, 0) and a = max abs(x), both times (bits + 2)/8 if scaled::

        asymmetric    scale = (max x - min x) / (L - 1)   zero_point = qmin + round(-m / scale)
        symmetric     scale = a / (L/2 - 1)               zero_point = 0
        always_zero   scale = (max x - min x) / (L - 1)   zero_point = 0

    and scale >= 1e-8.
    """
    rows = as_rows(x, spec.axis).astype(np.float64)
    lo, hi = rows.min(axis=1), rows.max(axis=1)
    factor = (spec.bits + 2) / 8 if scaled else 1.0
    if spec.symmetric and spec.signed:
        scale = factor * np.maximum(np.abs(lo), np.abs(hi)) / spec.qmax
    else:
        scale = (hi - lo) / (spec.qmax - spec.qmin)
    scale = np.maximum(scale, 1e-8)
    offset = np.zeros(scale.shape) if spec.symmetric else spec.qmin + np.rint(-factor * np.minimum(lo, 0) / scale)
    return QParams(per_spec(scale, spec), per_spec(as_zero_point(offset), spec), spec)


def mse(x: ArrayLike, spec: QSpec) -> QParams:
    """Quantizer of the shrunk raw range with the least error: Q-Diffusion's ``mse``.

    Parameters
    ----------
    x : array_like, any shape
    spec : QSpec
        Asymmetric or always_zero. For symmetric ones see `symmetric_mse_as_released`.

    Returns
    -------
    QParams

    Raises
    ------
    RangeError
        Also where no candidate has a usable scale: constant tensors, for which the authors' code returns
        nothing, and always_zero ones without a positive value.

    Notes
    -----
    The 80 candidates r [min x, max x] of `observers.mse`, in float32; 0 is not forced into the range.
    """
    if spec.symmetric and spec.signed:
        raise RangeError(
            f"{spec}: Q-Diffusion's mse search is broken for symmetric quantizers; use observers.mse, or "
            "symmetric_mse_as_released to study what it does"
        )
    return _mse(x, spec, (spec.qmin, spec.qmax), spec)


def symmetric_mse_as_released(x: ArrayLike, bits: int, axis: int | None = None) -> QParams:
    """What Q-Diffusion's ``mse`` does for a symmetric quantizer: not a good one (module docstring).

    Parameters
    ----------
    x : array_like, any shape
    bits : int
    axis : int, optional
        Of the channels.

    Returns
    -------
    QParams
        On signed codes, with the zero point of the *unsigned* ones: it may lie outside of the codes.
    """
    unsigned, signed = QSpec(bits, axis=axis), QSpec(bits, signed=True, axis=axis)
    return _mse(x, unsigned, (0, signed.qmax - 1), signed)


def _mse(x: ArrayLike, spec: QSpec, scored: tuple[int, int], result: QSpec) -> QParams:
    """Search with the formulas of `spec` and errors on the codes `scored`, and label the winner `result`."""
    rows = as_rows(x, spec.axis)
    shrink = SHRINK.astype(np.float32)[:, None]
    lo, hi = shrink * rows.min(axis=1), shrink * rows.max(axis=1)  # (80, C)
    scale = (hi if spec.symmetric else hi - lo) / np.float32(spec.qmax - spec.qmin)
    usable = scale >= SMALLEST
    if not usable.any(axis=0).all():
        raise RangeError(
            f"a tensor of shape {np.shape(x)} has a channel without a range (constant, or without positive values for "
            "always_zero): the released search returns nothing there; use max_range or observers.mse"
        )
    scale = np.where(usable, scale, np.float32(1))
    offset = np.zeros(scale.shape) if spec.symmetric else spec.qmin + np.rint(-lo / scale)
    zero_point = as_zero_point(offset)
    error = np.where(usable, candidate_errors(rows, scale, zero_point, scored, POWER), np.inf)
    best, row = error.argmin(axis=0), np.arange(rows.shape[0])
    return QParams(per_spec(scale[best, row], spec), per_spec(zero_point[best, row], spec), result)
