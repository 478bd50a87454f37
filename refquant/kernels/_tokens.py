"""Float islands of a transformer on the active kernel: layer norm, GELU, softmax in two regions, gates.

What they compute, and how exactly, stands in `refquant.ref.tokens`; here operands are checked and handed over, as in
`_islands`. Conditions may be columns of a wider array, such as one with those of all blocks: they are read in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ref import islands, tokens
from ..ref.products import check_regions
from ._call import call, fill, refuse_copy
from ._dispatch import active
from ._ext import ROWS, ffi, lib
from ._islands import Codes, Floats, Result, _filled, _floats, _stage, _target, _threads


def layer_norm_modulate_quantize(
    x: Floats,
    gamma: Floats,
    beta: Floats,
    *,
    eps: float = 1e-6,
    scale: float | None = None,
    zero_point: int = 0,
    bits: int = 8,
    out: Result | None = None,
) -> Result:
    """Layer normalisation, modulation and quantization at once: z = (x - m) / sqrt(v + eps) (1 + gamma) + beta.

    m and v are mean and variance over the D features of a token.

    Parameters
    ----------
    x : float32 array, (N, L, D)
    gamma, beta : float32 arrays, (N, D)
        Of each image; columns of a wider array are read in place.
    eps : float
        1e-30 to 1e30.
    scale : float, optional
        Rounded to float32; a positive normal number. None: the result is float32.
    zero_point : int
        The code of 0, 0 to 2^bits - 1.
    bits : int
        2 to 8.
    out : array, (N, L, D), optional
        Filled and returned: C-contiguous, uint8 if there is a scale, else float32; overlapping no operand.

    Returns
    -------
    array, (N, L, D)
        Codes limit(round(z / scale) + zero_point, 0, 2^bits - 1), ties to even, or z in float32.

    Raises
    ------
    ShapeError
        Wrong dtype, axes or `out`.
    RangeError
        A parameter out of range, or NaN or infinity in x, gamma or beta; `out` then has no meaning.
    """
    name = "layer_norm_modulate_quantize"
    tokens.check_tokens(name, x, {"gamma": gamma, "beta": beta})
    eps = islands.check_factor(name, "eps", eps)
    stage = None if scale is None else islands.check_codes(name, scale, zero_point, bits)
    out = _target(name, x.shape, np.float32 if stage is None else np.uint8, out, x, gamma, beta)
    isa = active()
    if isa == "ref":
        stated: dict[str, Any] = {"eps": eps, "scale": scale, "zero_point": zero_point, "bits": bits}
        fill(name, lambda: np.copyto(out, tokens.layer_norm_modulate_quantize(x, gamma, beta, **stated)))
        return out

    def explain() -> None:
        for label, array in (("x", x), ("gamma", gamma), ("beta", beta)):
            islands.check_finite(name, label, array)

    (gamma_in_place, beta_in_place), stride = _conditions(gamma, beta)
    call(
        name, lib.rq_layer_norm, ROWS[isa], _threads(x.size), _floats(x), *x.shape, _pointer(gamma_in_place),
        _pointer(beta_in_place), stride, eps, *_stage(stage), _filled(out),
        kept=(gamma_in_place, beta_in_place), explain=explain,
    )  # fmt: skip
    return out


def gelu_quantize(
    x: Floats, *, scale: float | None = None, zero_point: int = 0, bits: int = 8, out: Result | None = None
) -> Result:
    """GELU (tanh formula) and quantization at once.

    Parameters
    ----------
    x : float32 array, any shape
    scale, zero_point, bits : float or None, int, int
        As in `layer_norm_modulate_quantize`.
    out : array, shape of x, optional
        Filled and returned: C-contiguous, uint8 if there is a scale, else float32; not overlapping x.

    Returns
    -------
    array, shape of x

    Raises
    ------
    ShapeError
        Wrong dtype or `out`.
    RangeError
        A parameter out of range, or NaN or infinity in x.

    Examples
    --------
    >>> gelu_quantize(np.float32([-5, -0.75, 0, 1, 2]), scale=0.05, zero_point=4)
    array([ 4,  1,  4, 21, 43], dtype=uint8)
    """
    islands.check_floats("gelu_quantize", x)
    stage = None if scale is None else islands.check_codes("gelu_quantize", scale, zero_point, bits)
    out = _target("gelu_quantize", x.shape, np.float32 if stage is None else np.uint8, out, x)
    isa = active()
    if isa == "ref":
        stated: dict[str, Any] = {"scale": scale, "zero_point": zero_point, "bits": bits}
        fill("gelu_quantize", lambda: np.copyto(out, tokens.gelu_quantize(x, **stated)))
        return out
    call(
        "gelu_quantize", lib.rq_gelu, ROWS[isa], _threads(x.size), _floats(x), x.size, *_stage(stage), _filled(out),
        explain=lambda: islands.check_finite("gelu_quantize", "x", x),
    )  # fmt: skip
    return out


def gelu_quantize_signs(
    x: Floats, positive: float, negative: float, *, bits: int = 8, out: Codes | None = None
) -> Codes:
    """GELU, and quantization with a step for either sign: two codes a number, of which one is 0.

    Parameters
    ----------
    x : float32 array, (..., W)
    positive, negative : float
        The steps, rounded to float32; positive normal numbers.
    bits : int
        3 to 8, one of them the sign.
    out : uint8 array, (..., 2 W), optional
        Filled and returned: C-contiguous, not overlapping x.

    Returns
    -------
    uint8 array, (..., 2 W)
        In each row first W codes min(round(y / positive), 2^(bits-1) - 1) of y >= 0, then W codes of -y / negative.

    Raises
    ------
    ShapeError
        Wrong dtype or `out`.
    RangeError
        A parameter out of range, or NaN or infinity in x.

    Examples
    --------
    >>> gelu_quantize_signs(np.float32([-0.75, 2]), 0.1, 0.01)
    array([ 0, 20, 17,  0], dtype=uint8)
    """
    name = "gelu_quantize_signs"
    tokens.check_rows(name, x)
    up, down, qmax = tokens.check_signs(positive, negative, bits)
    out = _target(name, (*x.shape[:-1], 2 * x.shape[-1]), np.uint8, out, x)
    isa = active()
    if isa == "ref":
        fill(name, lambda: np.copyto(out, tokens.gelu_quantize_signs(x, up, down, bits=bits)))
        return out
    width = x.shape[-1]
    call(
        name, lib.rq_gelu_signs, ROWS[isa], _threads(x.size), _floats(x), x.size // width if width else 0, width, up,
        down, qmax, _filled(out), explain=lambda: islands.check_finite(name, "x", x),
    )  # fmt: skip
    return out


def softmax_quantize_regions(
    scores: Floats, *, bits: int, shift: int, factor: float = 1.0, out: Codes | None = None
) -> Codes:
    """Softmax of factor * scores over the last axis, to the codes of two regions.

    With h = 2^(bits-1), p below 2^-shift becomes round(p (h - 1) 2^shift), and from there on h + round(p (h - 1)):
    see `refquant.quant.mrq_softmax`. `products` takes them with ``regions=(bits, shift)``.

    Parameters
    ----------
    scores : float32 array, (..., L)
        -inf is a mask: its share is 0.
    bits : int
        3 to 8.
    shift : int
        0 to bits - 1.
    factor : float
        1e-30 to 1e30.
    out : uint8 array, shape of scores, optional
        Filled and returned: C-contiguous, not overlapping scores.

    Returns
    -------
    uint8 array, shape of scores

    Raises
    ------
    ShapeError
        Wrong dtype, no axis, or a wrong `out`.
    RangeError
        A parameter out of range, or a line with NaN, +inf or nothing but -inf.

    Examples
    --------
    >>> softmax_quantize_regions(np.log(np.float32([0.1, 0.3, 0.6])), bits=4, shift=2)
    array([ 3, 10, 12], dtype=uint8)
    """
    name = "softmax_quantize_regions"
    tokens.check_scores(scores)
    check_regions((bits, shift))
    factor = islands.check_factor(name, "factor", factor)
    out = _target(name, scores.shape, np.uint8, out, scores)
    isa = active()
    if isa == "ref":
        fill(
            name, lambda: np.copyto(out, tokens.softmax_quantize_regions(scores, bits=bits, shift=shift, factor=factor))
        )
        return out
    length = scores.shape[-1]
    call(
        name, lib.rq_softmax_regions, ROWS[isa], _threads(scores.size), _floats(scores), factor,
        scores.size // length if length else 0, length, bits, shift, _filled(out),
        explain=lambda: islands.check_lines(scores),
    )  # fmt: skip
    return out


def quantize_parts(x: Floats, stages: Sequence[tuple[float, int, int]], *, out: Codes | None = None) -> Codes:
    """Codes of float32 rows whose parts have a quantizer each, such as q, k and v side by side.

    Parameters
    ----------
    x : float32 array, (..., P * W)
        Infinities saturate.
    stages : sequence of (float, int, int), P of them
        Scale, zero point and bits of each part, as in `quantize`.
    out : uint8 array, shape of x, optional
        Filled and returned: C-contiguous, not overlapping x.

    Returns
    -------
    uint8 array, shape of x
        Exactly the codes of `quantize` for each part.

    Raises
    ------
    ShapeError
        Wrong dtype or `out`, or a number of parts that does not divide a row.
    RangeError
        A parameter out of range, or NaN in x.

    Examples
    --------
    >>> quantize_parts(np.float32([1, 2, 3, 4]), [(1, 0, 8), (0.5, 100, 8)])
    array([  1,   2, 106, 108], dtype=uint8)
    """
    name = "quantize_parts"
    checked = tokens.check_parts(x, stages)
    out = _target(name, x.shape, np.uint8, out, x)
    isa = active()
    if isa == "ref":

        def done() -> None:
            islands.check_no_nan(name, x)
            np.copyto(out, tokens.quantize_parts(x, stages))

        fill(name, done)
        return out
    parts = ffi.new("struct rq_part[]", checked)
    row = x.shape[-1]
    call(
        name, lib.rq_quantize_parts, ROWS[isa], _threads(x.size), _floats(x), x.size // row if row else 0, len(checked),
        row // len(checked), parts, _filled(out), explain=lambda: islands.check_no_nan(name, x),
    )  # fmt: skip
    return out


def gated_add(x: Floats, gate: Floats, h: Floats, *, out: Floats | None = None) -> Floats:
    """Let a branch in through its gate: x + gate h, each operation rounded to float32, what NumPy gives.

    Parameters
    ----------
    x : float32 array, (N, L, D)
    gate : float32 array, (N, D)
        Of each image; columns of a wider array are read in place.
    h : float32 array, (N, L, D)
    out : float32 array, (N, L, D), optional
        Filled and returned: C-contiguous. It may be x or h itself, and may overlap no operand otherwise.

    Returns
    -------
    float32 array, (N, L, D)

    Raises
    ------
    ShapeError
        Wrong dtype, axes or `out`.
    """
    tokens.check_tokens("gated_add", x, {"gate": gate}, {"h": h})
    others = [array for array in (x, gate, h) if array is gate or out is None or not _same(out, array)]
    out = _target("gated_add", x.shape, np.float32, out, *others)
    isa = active()
    if isa == "ref":
        fill("gated_add", lambda: np.copyto(out, tokens.gated_add(x, gate, h)))
        return out
    (in_place,), stride = _conditions(gate)
    call(
        "gated_add", lib.rq_gated_add, ROWS[isa], _threads(x.size), _floats(x), _pointer(in_place), stride, _floats(h),
        *x.shape, _filled(out), kept=in_place,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- between Python and C


def _conditions(*arrays: Floats) -> tuple[tuple[Floats, ...], int]:
    """Return rows (N, D) as C reads them, all at one distance in elements; copied where they do not lie so."""
    n, d = arrays[0].shape
    distances = {x.strides[0] // 4 if n > 1 else d for x in arrays}
    forward = all(x.flags.aligned and (d == 1 or x.strides[1] == 4) and x.strides[0] % 4 == 0 for x in arrays)
    if forward and len(distances) == 1 and min(distances) >= d:
        return arrays, distances.pop()
    refuse_copy(arrays[0])
    return tuple(np.require(x, requirements=["C", "A"]) for x in arrays), d


def _pointer(x: Floats) -> Any:
    return ffi.cast("float *", x.ctypes.data)


def _same(out: Any, x: NDArray[Any]) -> bool:
    """Tell whether out is x, element for element."""
    return (
        isinstance(out, np.ndarray)
        and x.flags.c_contiguous
        and out.flags.c_contiguous
        and out.nbytes == x.nbytes
        and out.ctypes.data == x.ctypes.data
    )
