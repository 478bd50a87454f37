"""The operations of a transformer, executed: views that the kernels read in place, and one call for each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..quant.affine import QParams
from ..quant.mrq_softmax import SoftmaxRegions
from .lower_dit import accumulator_scale, score_scale
from .program import at
from .program_dit import (
    Condition,
    Constant,
    Gated,
    Gelu,
    HeadMix,
    HeadScores,
    Modulated,
    Parts,
    Regions,
    SignedLinear,
    Signs,
    TokenOperation,
    Unpatchify,
)

Arrays = list[NDArray[Any]]


def run(op: TokenOperation, arrays: Arrays, classes: NDArray[np.int64], step: int) -> None:
    """Fill the value of an operation.

    Parameters
    ----------
    op : TokenOperation
    arrays : list of array
        All values of the program for N images.
    classes : int64 array, (N,)
        Read again whenever the call is repeated.
    step : int
    """
    out = arrays[op.out]
    if isinstance(op, Condition):
        table = op.table[step]
        kernels.fill("condition", lambda: np.take(table, classes, axis=0, out=out, mode="clip"))
    elif isinstance(op, Constant):
        numbers = op.numbers
        kernels.fill("constant", lambda: np.copyto(out, numbers))
    elif isinstance(op, Modulated):
        width = out.shape[-1]
        gamma, beta = (arrays[op.condition][:, i : i + width] for i in (op.gamma, op.beta))
        kernels.layer_norm_modulate_quantize(
            _tokens(arrays[op.x]), gamma, beta, eps=op.eps, **_stage(at(op.quantizers, step)), out=_tokens(out)
        )
    elif isinstance(op, Parts):
        stages = [tuple(_stage(at(part, step)).values()) for part in op.quantizers]
        kernels.quantize_parts(arrays[op.x], stages, out=out)
    elif isinstance(op, HeadScores):
        q, k = at(op.q_params, step), at(op.k_params, step)
        q_codes, k_codes, _ = _heads(arrays[op.x], out.shape[1])
        kernels.products(
            q_codes, k_codes, transpose_b=True, a_zero_point=int(q.zero_point), b_zero_point=int(k.zero_point),
            scale=score_scale(q, k, q_codes.shape[-1]), out=out,
        )  # fmt: skip
    elif isinstance(op, Regions):
        grid = at(op.grids, step)
        kernels.softmax_quantize_regions(arrays[op.x], bits=grid.bits, shift=grid.shift, out=out)
    elif isinstance(op, HeadMix):
        p, v = at(op.p_params, step), at(op.v_params, step)
        codes = arrays[op.p]
        n, heads, tokens, _ = codes.shape
        regions = isinstance(p, SoftmaxRegions)
        kernels.products(
            codes, _heads(arrays[op.x], heads)[2], b_zero_point=int(v.zero_point), scale=accumulator_scale(p, v),
            a_zero_point=0 if regions else int(p.zero_point), regions=(p.bits, p.shift) if regions else None,
            out=out.reshape(n, tokens, heads, -1).transpose(0, 2, 1, 3),
        )  # fmt: skip
    elif isinstance(op, Gelu):
        kernels.gelu_quantize(arrays[op.x], **_stage(at(op.quantizers, step)), out=out)
    elif isinstance(op, Signs):
        grid = at(op.grids, step)
        kernels.gelu_quantize_signs(arrays[op.x], grid.positive, grid.negative, bits=grid.bits, out=out)
    elif isinstance(op, SignedLinear):
        x, width = arrays[op.x], arrays[op.x].shape[-1] // 2
        half = x.reshape(-1, 2 * width)[:, op.plane * width : (op.plane + 1) * width]
        kernels.gemm(
            half, op.weights, output=at(op.outputs, step), out=_rows(out),
            residual=None if op.residual is None else _rows(arrays[op.residual]),
        )  # fmt: skip
    elif isinstance(op, Gated):
        gate = arrays[op.condition][:, op.gate : op.gate + out.shape[-1]]
        kernels.gated_add(_tokens(arrays[op.x]), gate, _tokens(arrays[op.y]), out=_tokens(out))
    elif isinstance(op, Unpatchify):
        _unpatchify(arrays[op.x], out)


def _stage(q: QParams) -> dict[str, Any]:
    return {"scale": float(q.scale), "zero_point": int(q.zero_point), "bits": q.spec.bits}


def _rows(x: NDArray[Any]) -> NDArray[Any]:
    return x.reshape(-1, x.shape[-1])


def _tokens(x: NDArray[Any]) -> NDArray[Any]:
    """Tokens (N, h, w, D) as (N, L, D)."""
    return x.reshape(len(x), -1, x.shape[-1])


def _heads(x: NDArray[np.uint8], heads: int) -> tuple[NDArray[np.uint8], ...]:
    """q, k and v (N, heads, L, d) out of (N, h, w, 3 D)."""
    n, h, w, features = x.shape
    parts = x.reshape(n, h * w, 3, heads, features // (3 * heads))
    return tuple(parts[:, :, i].transpose(0, 2, 1, 3) for i in range(3))


def _unpatchify(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Features of a token are ordered by row, column, channel of its patch."""
    (n, h, w, _), patch, channels = x.shape, out.shape[1] // x.shape[1], out.shape[-1]
    pixels = x.reshape(n, h, w, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    places = out.reshape(n, h, patch, w, patch, channels)
    kernels.fill("unpatchify", lambda: np.copyto(places, pixels))
