"""Float islands of a transformer, between its integer products. The definition.

    layer_norm_modulate_quantize   normalise each token, times 1 + gamma, plus beta, make codes
    gelu_quantize                  GELU by its tanh formula, make codes
    gelu_quantize_signs            the same with a step for either sign: two codes a number
    softmax_quantize_regions       softmax, make codes of two regions
    quantize_parts                 make codes of float32 as it is, each part of a row with its own quantizer
    gated_add                      x + gate h

The first four are computed in float64 and rounded once, at the end, as in `refquant.ref.islands`, and the C core keeps
to the bounds that are stated there: float32 within 0.6 ulp of the float64 number (layer norm: another
2^-40 (|1 + gamma| + |beta|) for D up to 1000, where it is a small difference of large terms), codes those of the
float64 number but for those within 2e-6 of a step from a rounding boundary, of which the border of two regions is one.
The last two are exactly what NumPy gives in float32.

GELU. x/2 (1 + tanh(w/2)) = x / (1 + e^-w) with w = 2 sqrt(2/pi) (x + 0.044715 x³), which loses nothing where tanh is
near -1.

Conditions. gamma, beta and gate are (N, D), one row for each image, the same for its L tokens.

Errors: `ShapeError` for a wrong dtype or shape, `RangeError` for parameters out of range and numbers without a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError, ShapeError
from .islands import Floats, Result, check_codes, check_factor, check_finite, check_floats, check_lines, finish
from .islands import quantize as quantize_one
from .products import check_regions

Codes = NDArray[np.uint8]
Stage = tuple[float, int, int]  # scale, zero point, bits of a part

GELU_A, GELU_C = 0.044715, 2 * np.sqrt(2 / np.pi)


# ---------------------------------------------------------------- what is allowed


def check_tokens(function: str, x: Any, conditions: dict[str, Any], others: dict[str, Any] | None = None) -> None:
    """Refuse x, and others, that are not float32 (N, L, D) of one shape, and conditions that are not (N, D)."""
    for name, array in {"x": x, **(others or {})}.items():
        if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 3:
            raise ShapeError(f"{function}: {name} is {_kind(array)}; it must be float32, shape (N, L, D).")
        if array.shape != x.shape:
            raise ShapeError(f"{function}: {name} {array.shape} and x {x.shape} must have the same shape.")
    want = (x.shape[0], x.shape[2])
    for name, array in conditions.items():
        if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != want:
            raise ShapeError(f"{function}: {name} is {_kind(array)}; it must be float32, shape (N, D) = {want}.")


def check_rows(function: str, x: Any) -> None:
    """Refuse what is no float32 array with rows."""
    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.ndim < 1:
        raise ShapeError(f"{function}: x is {_kind(x)}; it must be float32, shape (..., width).")


def check_signs(positive: Any, negative: Any, bits: Any) -> tuple[float, float, int]:
    """Return both steps rounded to float32, and the largest code of either sign."""
    name = "gelu_quantize_signs"
    if not isinstance(bits, (int, np.integer)) or not 3 <= bits <= 8:
        raise RangeError(f"{name}: bits is {bits!r}; it must be a whole number from 3 to 8: one of them is the sign.")
    up, _, qmax = check_codes(name, positive, 0, int(bits) - 1)
    down, _, _ = check_codes(name, negative, 0, int(bits) - 1)
    return up, down, qmax


def check_parts(x: Any, stages: Sequence[Stage]) -> list[tuple[float, int, int]]:
    """Return scale, zero point and largest code of each part; refuse parts that do not divide a row."""
    check_rows("quantize_parts", x)
    if not 1 <= len(stages) <= 64 or x.shape[-1] % len(stages):
        raise ShapeError(f"quantize_parts: {len(stages)} parts of a row of {x.shape[-1]}; give 1 to 64 that divide it.")
    return [check_codes("quantize_parts", *stage) for stage in stages]


def check_scores(scores: Any) -> None:
    """Refuse scores that are no float32 lines."""
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32 or scores.ndim < 1:
        raise ShapeError(f"softmax_quantize_regions: scores is {_kind(scores)}; it must be float32, shape (..., L).")


def _kind(x: Any) -> str:
    return f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"


# ---------------------------------------------------------------- the definition


def layer_norm_modulate_quantize(
    x: Floats,
    gamma: Floats,
    beta: Floats,
    *,
    eps: float = 1e-6,
    scale: float | None = None,
    zero_point: int = 0,
    bits: int = 8,
) -> Result:
    """Normalise each token over its D features, modulate, make codes: z = (x - m) / sqrt(v + eps) (1 + gamma) + beta.

    Parameters are those of `refquant.kernels.layer_norm_modulate_quantize`.
    """
    name = "layer_norm_modulate_quantize"
    check_tokens(name, x, {"gamma": gamma, "beta": beta})
    eps = check_factor(name, "eps", eps)
    stage = None if scale is None else check_codes(name, scale, zero_point, bits)
    for label, array in (("x", x), ("gamma", gamma), ("beta", beta)):
        check_finite(name, label, array)
    if x.size == 0:
        return np.empty(x.shape, np.float32 if stage is None else np.uint8)
    d = x.astype(np.float64)
    d -= d[:, :, :1]  # the variance of numbers near 0: exactly 0 where all of them are equal
    d -= d.mean(axis=2, keepdims=True)
    d /= np.sqrt(np.square(d).mean(axis=2, keepdims=True) + eps)
    z = d * (1 + gamma.astype(np.float64))[:, None] + beta.astype(np.float64)[:, None]
    return finish(z, stage)


def gelu(x: NDArray[Any]) -> NDArray[np.float64]:
    """GELU in float64."""
    x64 = x.astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(x64 / (1 + np.exp(-GELU_C * (x64 + GELU_A * x64 * x64 * x64))))


def gelu_quantize(x: Floats, *, scale: float | None = None, zero_point: int = 0, bits: int = 8) -> Result:
    """Apply GELU, make codes: see `refquant.kernels.gelu_quantize`."""
    check_floats("gelu_quantize", x)
    stage = None if scale is None else check_codes("gelu_quantize", scale, zero_point, bits)
    check_finite("gelu_quantize", "x", x)
    return finish(gelu(x), stage)


def gelu_quantize_signs(x: Floats, positive: float, negative: float, *, bits: int = 8) -> Codes:
    """Apply GELU, make two codes a number: see `refquant.kernels.gelu_quantize_signs`."""
    check_rows("gelu_quantize_signs", x)
    up, down, qmax = check_signs(positive, negative, bits)
    check_finite("gelu_quantize_signs", "x", x)
    y = gelu(x)
    planes = [np.minimum(np.rint(np.maximum(part, 0)), qmax) for part in (y / up, y / -down)]
    return np.asarray(np.concatenate(planes, axis=-1).astype(np.uint8))


def softmax_quantize_regions(scores: Floats, *, bits: int, shift: int, factor: float = 1.0) -> Codes:
    """Softmax, make codes of two regions: see `refquant.kernels.softmax_quantize_regions`."""
    check_scores(scores)
    check_regions((bits, shift))
    factor = check_factor("softmax_quantize_regions", "factor", factor)
    check_lines(scores)
    if scores.size == 0:
        return np.empty(scores.shape, np.uint8)
    e = scores.astype(np.float64)
    with np.errstate(under="ignore"):
        e = np.exp((e - e.max(axis=-1, keepdims=True)) * factor)
    p = e / e.sum(axis=-1, keepdims=True)
    flag = 1 << (bits - 1)
    coarse = float(np.float32(1 / (flag - 1)))
    large = p >= 2.0**-shift
    magnitude = np.minimum(np.rint(p / np.where(large, coarse, coarse * 2.0**-shift)), flag - 1)
    codes: Codes = (magnitude + np.where(large, flag, 0)).astype(np.uint8)
    return codes


def quantize_parts(x: Floats, stages: Sequence[Stage]) -> Codes:
    """Make codes of each part of a row: see `refquant.kernels.quantize_parts`."""
    check_parts(x, stages)
    parts = np.split(x, len(stages), axis=-1)
    return np.concatenate(
        [quantize_one(part, scale, zero, bits=bits) for part, (scale, zero, bits) in zip(parts, stages, strict=True)],
        axis=-1,
    )


def gated_add(x: Floats, gate: Floats, h: Floats) -> Floats:
    """Let a branch in, x + gate h: see `refquant.kernels.gated_add`."""
    check_tokens("gated_add", x, {"gate": gate}, {"h": h})
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(h * gate[:, None] + x)
