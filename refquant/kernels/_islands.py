"""Float islands on the active kernel: normalise, SiLU, softmax, make codes, enlarge, put side by side.

What they compute, and how exactly, stands in `refquant.ref.islands`; here operands are checked and handed over. The
active kernel `ref` is that NumPy definition; all kernels in C give the same bits as each other, whatever the number
of threads. An operand whose elements do not lie together is copied; `out` must be as it is to be filled.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError
from ..ref import islands
from ..threads import get_threads
from ._call import call, fill, refuse_copy
from ._dispatch import active
from ._ext import ROWS, ffi, lib

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Result = NDArray[Any]
ALONE_BELOW = 8192  # COSTLY_BELOW of cext/islands.c
Stage = tuple[float, int, int]  # scale, zero point, largest code

if lib is not None:
    _FLOATS, _BYTES = ffi.typeof("float[]"), ffi.typeof("uint8_t[]")  # looked up once: a microsecond each


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
    out: Result | None = None,
) -> Result:
    """Group normalisation, SiLU and quantization at once: z = gamma (x - m) / sqrt(v + eps) + beta, y = z / (1 + e^-z).

    m and v are mean and variance over the pixels and the C / groups channels of a group, image by image.

    Parameters
    ----------
    x : float32 array, (N, H, W, C)
    gamma, beta : float32 arrays, (C,)
    groups : int
        A divisor of C.
    eps : float
        1e-30 to 1e30.
    silu : bool
        False: y = z.
    scale : float, optional
        Rounded to float32; a positive normal number. None: the result is float32.
    zero_point : int
        The code of 0, 0 to 2^bits - 1.
    bits : int
        2 to 8.
    out : array, (N, H, W, C), optional
        Filled and returned: C-contiguous, uint8 if there is a scale, else float32; overlapping no operand.

    Returns
    -------
    array, (N, H, W, C)
        Codes limit(round(y / scale) + zero_point, 0, 2^bits - 1), ties to even, or y in float32.

    Raises
    ------
    ShapeError
        Wrong dtype, number of axes, groups or `out`.
    RangeError
        A parameter out of range, or NaN or infinity in x, gamma or beta; `out` then has no meaning.

    Notes
    -----
    The float32 result is within 0.6 ulp of y computed in float64, plus 2^-36 (|gamma| + |beta|) where z is a small
    difference of large terms; the codes are those of the float64 y, except where y / scale is within 2e-6 of a
    rounding boundary. (M = H W C / groups up to 10^4; beyond, 2^-36 grows as H W sqrt(M).)
    """
    name = "group_norm_silu_quantize"
    groups, eps = islands.check_group_norm(x, gamma, beta, groups, eps)
    stage = None if scale is None else islands.check_codes(name, scale, zero_point, bits)
    out = _target(name, x.shape, np.float32 if stage is None else np.uint8, out, x, gamma, beta)
    isa = active()
    if isa == "ref":
        stated: dict[str, Any] = {"eps": eps, "silu": silu, "scale": scale, "zero_point": zero_point, "bits": bits}
        fill(name, lambda: np.copyto(out, islands.group_norm_silu_quantize(x, gamma, beta, groups, **stated)))
        return out

    def explain() -> None:
        for label, array in (("x", x), ("gamma", gamma), ("beta", beta)):
            islands.check_finite(name, label, array)

    n, h, w, c = x.shape
    call(
        name, lib.rq_group_norm, ROWS[isa], _threads(x.size), _floats(x), n, h * w, c, groups, _floats(gamma),
        _floats(beta), eps, bool(silu), *_stage(stage), _filled(out), explain=explain,
    )  # fmt: skip
    return out


def silu_quantize(
    x: Floats, *, scale: float | None = None, zero_point: int = 0, bits: int = 8, out: Result | None = None
) -> Result:
    """SiLU and quantization at once: y = x / (1 + e^-x).

    Parameters
    ----------
    x : float32 array, any shape
    scale, zero_point, bits : float or None, int, int
        As in `group_norm_silu_quantize`.
    out : array, shape of x, optional
        Filled and returned: C-contiguous, uint8 if there is a scale, else float32; not overlapping x.

    Returns
    -------
    array, shape of x
        uint8 codes, or float32 if there is no scale.

    Raises
    ------
    ShapeError
        Wrong dtype or `out`.
    RangeError
        A parameter out of range, or NaN or infinity in x.

    Notes
    -----
    float32 within 0.6 ulp of the float64 y; codes as those of the float64 y up to 2e-6 of a step.
    """
    islands.check_floats("silu_quantize", x)
    stage = None if scale is None else islands.check_codes("silu_quantize", scale, zero_point, bits)
    out = _target("silu_quantize", x.shape, np.float32 if stage is None else np.uint8, out, x)
    isa = active()
    if isa == "ref":
        stated: dict[str, Any] = {"scale": scale, "zero_point": zero_point, "bits": bits}
        fill("silu_quantize", lambda: np.copyto(out, islands.silu_quantize(x, **stated)))
        return out
    call(
        "silu_quantize", lib.rq_quantize, ROWS[isa], _threads(x.size), _floats(x), x.size, True, *_stage(stage),
        _filled(out), explain=lambda: islands.check_finite("silu_quantize", "x", x),
    )  # fmt: skip
    return out


def quantize(x: Floats, scale: float, zero_point: int = 0, *, bits: int = 8, out: Codes | None = None) -> Codes:
    """Codes of float32: exactly those of `refquant.quant.affine.quantize`, which divides in float32.

    Parameters
    ----------
    x : float32 array, any shape
        Infinities saturate.
    scale, zero_point, bits : float or None, int, int
        As in `group_norm_silu_quantize`.
    out : uint8 array, shape of x, optional
        Filled and returned: C-contiguous, not overlapping x.

    Returns
    -------
    uint8 array, shape of x
        limit(round(x / scale) + zero_point, 0, 2^bits - 1), ties to even.

    Raises
    ------
    ShapeError
        Wrong dtype or `out`.
    RangeError
        A parameter out of range, or NaN in x.

    Examples
    --------
    >>> quantize(np.array([-1.0, 0.25, 0.75, 9.0], np.float32), 0.5, 2, bits=4)
    array([ 0,  2,  4, 15], dtype=uint8)
    """
    islands.check_floats("quantize", x)
    stage = islands.check_codes("quantize", scale, zero_point, bits)
    out = _target("quantize", x.shape, np.uint8, out, x)
    isa = active()
    if isa == "ref":
        fill("quantize", lambda: np.copyto(out, islands.quantize(x, scale, zero_point, bits=bits)))
        return out
    call(
        "quantize", lib.rq_quantize, ROWS[isa], _threads(x.size), _floats(x), x.size, False, *_stage(stage),
        _filled(out), explain=lambda: islands.check_no_nan("quantize", x),
    )  # fmt: skip
    return out


def softmax_quantize(
    scores: NDArray[Any], *, factor: float = 1.0, scale: float | None = None, bits: int = 8, out: Result | None = None
) -> Result:
    """Softmax of factor * scores over the last axis, and quantization with zero_point 0, at once.

    Parameters
    ----------
    scores : float32 or int32 array, (..., L), such as (N, L, L)
        -inf is a mask: its share is 0.
    factor : float
        1e-30 to 1e30: the scale of int32 scores, or 1 / sqrt(C).
    scale : float, optional
        Of the codes, rounded to float32; a positive normal number. None: the result is float32.
    bits : int
        2 to 8.
    out : array, shape of scores, optional
        Filled and returned: C-contiguous, uint8 if there is a scale, else float32; not overlapping scores.

    Returns
    -------
    array, shape of scores
        Codes limit(round(y / scale), 0, 2^bits - 1), ties to even, or y in float32.

    Raises
    ------
    ShapeError
        Wrong dtype, no axis, or a wrong `out`.
    RangeError
        A parameter out of range, or a line with NaN, +inf or nothing but -inf.

    Notes
    -----
    float32 within 0.6 ulp of the float64 y; codes as those of the float64 y up to 2e-6 of a step.
    """
    name = "softmax_quantize"
    islands.check_scores(scores)
    factor = islands.check_factor(name, "factor", factor)
    stage = None if scale is None else islands.check_codes(name, scale, 0, bits)
    out = _target(name, scores.shape, np.float32 if stage is None else np.uint8, out, scores)
    isa = active()
    if isa == "ref":
        fill(name, lambda: np.copyto(out, islands.softmax_quantize(scores, factor=factor, scale=scale, bits=bits)))
        return out
    length = scores.shape[-1]
    kind, unit, _, qmax = _stage(stage)
    call(
        name, lib.rq_softmax, ROWS[isa], _threads(scores.size), ffi.from_buffer(_whole(scores)),
        scores.dtype == np.int32, factor, scores.size // length if length else 0, length, kind, unit, qmax,
        _filled(out), explain=lambda: islands.check_lines(scores),
    )  # fmt: skip
    return out


def upsample_nearest(x: NDArray[Any], *, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Enlarge images to twice their height and width: every pixel four times.

    Parameters
    ----------
    x : uint8 or float32 array, (N, H, W, C)
    out : array of that dtype, (N, 2H, 2W, C), optional
        Filled and returned: C-contiguous, not overlapping x.

    Returns
    -------
    array, (N, 2H, 2W, C)
        The same bits, whatever they mean.

    Raises
    ------
    ShapeError
        Wrong dtype, axes or `out`.
    """
    islands.check_image(x)
    n, h, w, c = x.shape
    out = _target("upsample_nearest", (n, 2 * h, 2 * w, c), x.dtype.type, out, x)
    if active() == "ref":
        fill("upsample_nearest", lambda: np.copyto(out, islands.upsample_nearest(x)))
        return out
    call(
        "upsample_nearest", lib.rq_upsample_nearest, _threads(x.nbytes), ffi.from_buffer(_whole(x)), n * h, w,
        c * x.itemsize, ffi.from_buffer(out),
    )  # fmt: skip
    return out


def concat_channels(x: Floats, y: Floats, *, out: Floats | None = None) -> Floats:
    """Put two images side by side along their channels.

    Parameters
    ----------
    x, y : float32 arrays, (N, H, W, C) and (N, H, W, D)
    out : float32 array, (N, H, W, C + D), optional
        Filled and returned: C-contiguous, overlapping no operand.

    Returns
    -------
    float32 array, (N, H, W, C + D)

    Raises
    ------
    ShapeError
        Wrong dtype or axes, or `out` that does not fit.
    """
    islands.check_beside(x, y)
    c, d = x.shape[3], y.shape[3]
    out = _target("concat_channels", (*x.shape[:3], c + d), np.float32, out, x, y)
    if active() == "ref":
        fill("concat_channels", lambda: np.copyto(out, islands.concat_channels(x, y)))
        return out
    call(
        "concat_channels", lib.rq_concat, _threads(out.size), _floats(x), _floats(y), math.prod(x.shape[:3]), c, d,
        _filled(out),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- between Python and C

def _threads(size: int) -> int:
    """Return how many threads to offer; below 8192 elements the C core wants one, and asking costs 3 microseconds."""
    return get_threads() if size >= ALONE_BELOW else 1


def _target(name: str, shape: tuple[int, ...], dtype: Any, out: Any, *operands: NDArray[Any]) -> NDArray[Any]:
    """Return the array to be filled, new or the caller's; refuse an `out` that does not fit."""
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray) or out.dtype != dtype or out.shape != shape:
        have = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else f"a {type(out).__name__}"
        raise ShapeError(f"{name}: out is {have}; it must be {np.dtype(dtype)}, shape {shape}.")
    if not (out.flags.c_contiguous and out.flags.writeable and out.flags.aligned):
        raise ShapeError(f"{name}: out must be writeable, aligned and C-contiguous. Pass another array, or none.")
    if out.flags.owndata and all(x.flags.owndata and x is not out for x in operands):
        return out  # memory of their own, all of them: it cannot overlap
    if any(np.may_share_memory(out, x) for x in operands):
        raise ShapeError(f"{name}: out overlaps an operand, which is read while out is written. Pass another array.")
    return out


def _whole(x: NDArray[Any]) -> NDArray[Any]:
    """Return x, or a copy, with its elements together and aligned."""
    if x.flags.c_contiguous and x.flags.aligned:
        return x
    refuse_copy(x)
    return np.require(x, requirements=["C", "A"])


def _floats(x: Floats) -> Any:
    return ffi.from_buffer(_FLOATS, _whole(x))


def _filled(out: NDArray[Any]) -> Any:
    return ffi.from_buffer(_FLOATS if out.dtype == np.float32 else _BYTES, out)


def _stage(stage: Stage | None) -> tuple[int, float, int, int]:
    """Return kind, scale, zero point and largest code, as C wants them."""
    return (lib.RQ_FLOAT32, 1.0, 0, 1) if stage is None else (lib.RQ_UINT8, *stage)
