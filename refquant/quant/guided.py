"""Hessian-guided scale search: the scales whose rounding the network's loss minds least, layer by layer.

To second order an error e of a layer's output z costs e' H e, H the Hessian of the loss there. With its diagonal
estimated by squares g² of gradients (`refquant.quant.curvature`), a pair of scales is scored by

    score = sum over rows n and outputs o of  g[n, o]² ((X^ W^' - X W')[n, o])²        (TQ-DiT eq. 16; PTQ4ViT eq. 7)

and the search alternates: the best weight scale of each output channel for the present inputs, then the best input
scale of each time group for the present weights (TQ-DiT eq. 17: the sum over the states of that group alone), three
rounds. With g = 1 it is a search for the layer's own output error.

Why not the released gradient. Both PTQ4ViT and TQ-DiT differentiate KL(softmax(raw) || softmax(pred)), where `raw` and
`pred` are outputs of the *same* float network: the derivative, softmax(pred) - softmax(raw), is nothing. In PTQ4ViT
what remains is float32's rounding noise (1e-7, where probabilities are 0.03). In TQ-DiT it is not 0, but for another
reason: the two passes go through the guidance wrapper in batches of 32 and of 4, and that wrapper mixes element j of a
batch with element j + B/2, so they compute different things. A squared error has no gradient at its minimum either; its
Hessian is not 0, and `curvature` estimates that.

Shapes: X (n, K) rows, W (O, K), g (n, O). The bias cancels.
Errors: `ShapeError` where they do not fit, or there are no candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ShapeError
from ..intmath import grid_codes
from .affine import QParams, QSpec, broadcast
from .grids import Grid
from .observers import SHRINK
from .observers.ranges import affine_map, as_rows, per_spec

Array = NDArray[Any]
Float64 = NDArray[np.float64]
ROUNDS = 3


def shrunk_ranges(x: ArrayLike, spec: QSpec, shrink: Sequence[float] | Array = SHRINK) -> list[QParams]:
    """Candidates: quantizers for r [m, M] of x, widened to contain 0, for each r of `shrink`."""
    rows = as_rows(x, spec.axis)
    low, high = np.minimum(rows.min(axis=1), 0).astype(np.float64), np.maximum(rows.max(axis=1), 0).astype(np.float64)
    return [QParams(*(per_spec(a, spec) for a in affine_map(r * low, r * high, spec)), spec) for r in shrink]


def rounded(x: Array, quantizer: QParams | Grid) -> Array:
    """x on the quantizer's grid: what `affine.fake_quantize` gives, without its detour through bytes."""
    if not isinstance(quantizer, QParams):
        return quantizer.fake_quantize(x)
    scale, zero = broadcast(quantizer, x.shape)
    codes = grid_codes(x, scale, zero, quantizer.spec.qmin, quantizer.spec.qmax)
    codes -= zero.astype(codes.dtype)
    codes *= scale
    return codes


def search(
    x: Array,
    w: Array,
    g: Array,
    group: NDArray[np.integer],
    weights: Sequence[QParams],
    inputs: Sequence[Sequence[QParams | Grid]],
    rounds: int = ROUNDS,
) -> tuple[QParams | None, list[QParams | Grid | None]]:
    """Choose the scales of one linear layer.

    Parameters
    ----------
    x : float32 array, (n, K)
        Inputs of the float network.
    w : float32 array, (O, K)
    g : float32 array, (n, O)
    group : int array, (n,)
        Time group of each row, 0 .. G-1, none without rows.
    weights : sequence of QParams
        Candidates, each with O scales (axis 0); empty where the weight stays float.
    inputs : sequence of sequence of quantizers, G long
        Candidates of each group; all empty where inputs stay float.
    rounds : int

    Returns
    -------
    QParams or None
        The best candidate of every channel, put together.
    list of quantizers or None, (G,)
    """
    n = len(x)
    if x.shape[1:] != w.shape[1:] or g.shape != (n, len(w)) or group.shape != (n,) or len(inputs) <= group.max():
        raise ShapeError(
            f"guided search: x {x.shape}, w {w.shape}, g {g.shape}, groups {group.shape} of {len(inputs)}; "
            "want (n, K), (O, K), (n, O), (n,)"
        )
    exact = x @ w.T
    parts = [np.flatnonzero(group == i) for i in range(len(inputs))]
    chosen: list[QParams | Grid | None] = [None] * len(inputs)
    best: QParams | None = None
    x_now, w_now = x, w
    for _ in range(rounds if any(map(len, inputs)) and weights else 1):
        if weights:
            errors = np.array([_error(x_now @ rounded(w, q).T - exact, g).sum(axis=0) for q in weights])
            best = _combined(weights, errors.argmin(axis=0))
            w_now = rounded(w, best)
        x_now = x.copy()
        for i, (rows, candidates) in enumerate(zip(parts, inputs, strict=True)):
            if not candidates:
                continue
            errors = np.array(
                [_error(rounded(x[rows], q) @ w_now.T - exact[rows], g[rows]).sum() for q in candidates]
            )
            chosen[i] = candidates[int(errors.argmin())]
            x_now[rows] = rounded(x[rows], candidates[int(errors.argmin())])
    return best, chosen


def search_attention(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    group: NDArray[np.integer],
    candidates: Mapping[str, Sequence[QParams | Grid]],
    grouped: Collection[str] = (),
) -> dict[str, list[QParams | Grid]]:
    """Choose the quantizers of an attention product's operands by the weighted error of its output.

    Parameters
    ----------
    q, k, v, g : float32 array, (n, L, d)
        n products of L tokens: states times heads.
    group : int array, (n,)
        Time group of each product, 0 .. G-1.
    candidates : mapping
        Of "q", "k", "probs" and "v"; what is missing stays float.
    grouped : collection of str
        Operands that get a quantizer for each group; the others get one for all.

    Returns
    -------
    dict of str to list of quantizers, (G,)
        Chosen one after another: q and k with everything after them in float, then the probabilities with V in float
        (as the released search), then V.
    """
    exact = _attend(q, k, v, lambda p: p)
    count = int(group.max()) + 1
    now: dict[str, list[QParams | Grid]] = {}

    def output(part: str, quantizer: QParams | Grid) -> Array:
        def at(name: str, x: Array) -> Array:
            if name == part:
                return rounded(x, quantizer)
            return _by_group(x, now[name], group) if name in now else x

        return _attend(at("q", q), at("k", k), at("v", v), lambda p: at("probs", p))

    for part in ("q", "k", "probs", "v"):
        found = candidates.get(part, ())
        if not found:
            continue
        errors = np.array([_error(output(part, c) - exact, g).sum(axis=(1, 2)) for c in found])  # (candidates, n)
        sums = np.array([errors[:, group == i].sum(axis=1) for i in range(count)])
        best = sums.argmin(axis=1) if part in grouped else np.full(count, sums.sum(axis=0).argmin())
        now[part] = [found[i] for i in best]
    return now


def _attend(q: Array, k: Array, v: Array, between: Callable[[Array], Array]) -> Array:
    """softmax(q k' / sqrt(d)) v with something done to the probabilities."""
    scores = np.matmul(q, k.transpose(0, 2, 1)) * np.float32(1 / np.sqrt(q.shape[-1]))
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.matmul(between(scores), v)


def _by_group(x: Array, quantizers: Sequence[QParams | Grid], group: NDArray[np.integer]) -> Array:
    if all(other is quantizers[0] for other in quantizers):
        return rounded(x, quantizers[0])
    out = np.empty_like(x)
    for i, quantizer in enumerate(quantizers):
        out[group == i] = rounded(x[group == i], quantizer)
    return out


def _error(difference: Array, g: Array) -> Float64:
    difference *= g
    return np.square(difference, out=difference).astype(np.float64)


def _combined(candidates: Sequence[QParams], index: NDArray[np.intp]) -> QParams:
    """One quantizer whose channel o is that of candidate index[o]."""
    o = np.arange(len(index))
    scale, zero = np.stack([q.scale for q in candidates]), np.stack([q.zero_point for q in candidates])
    return QParams(scale[index, o], zero[index, o], candidates[0].spec)
