"""SQuant (Guo et al., ICLR 2022, arXiv 2202.07471): round weights without data, so that errors cancel.

Rounding each weight to its nearest code (stage E) keeps every error within half a step, and lets the errors
of a kernel add up. The paper approximates the Hessian of the loss by three diagonal parts, and minimising
with those means: the *sums* of errors must be small too, of each kernel (K) and of each output channel (C).

    E   |e_i| <= 1/2 for each weight                      nearest rounding
    K   |sum e| <= 1/2 over each kernel                   and then |e_i| < 1
    C   |sum e| <= 1/2 over each output channel           and then |sum e| <= 1 over each kernel

A *kernel* is the kh x kw window between one input and one output channel. A stage flips weights from their
nearest code to the other neighbour, which moves the sum by one; it flips the weights whose errors are
largest, for they are nearly ties and cost least: 1 - 2|e| in squared error. Nothing is learned, and no
activation is looked at.

    paper                               function here           authors' code (clevercool/SQuant 3cd8933)
    grid: x = s w - zp                  `grid`                  quant_affine.py:37-57,83-104
    E, and which weights may flip       `neighbours`            quant_modules.py:109-135
    one stage over groups of weights    `flip`                  squant_function.py:43-93, quant_modules.py:142-190
    E, K, C in order                    `squant`                quant_modules.py:109-195,230-253
    activations: range from the spread  `sigma_range`           quant_modules.py:88-91,204-217,261-278

Where we differ and why. On weights without ties and with both signs in each channel the codes are those of
the released code: all golden cases, and all 1,326,112 codes of the shipped UNet at 4 bits against its rules
written out as loops (``tests/methods``). The differences are at the edges.

1. A kernel whose errors sum to exactly 0 flips nothing, and their index k-1 = -1 then nominates its *worst*
   weight for stage C. Ours nominates none: the bound of C does not need it.
2. Where clipping leaves too few weights to flip, their list goes on with weights that cannot flip, and the
   flip is lost. Ours nominates weights that can flip only.
3. They saturate after the last stage, we before the first, so that sums are those of the codes that are
   stored. It matters for x = qmax + 1/2: the top of a channel with max w = -min w.
4. Their grid spans [min w, max w]; ours is widened to contain 0, so that 0 has a code also in a channel of
   one sign, and a constant channel is not divided by its width 0.
5. They sum errors in float32, we in float64, so that ties do not depend on the order of a sum.
6. Activations below 6 bits are clipped at max x in theirs, at max |x| here: for a tensor that is negative
   throughout theirs is an empty range. And a tensor without spread keeps its max |x|, where theirs is 0 or NaN.

Where a tensor has weights outside of the codes (half a step at most, at both ends of a channel) the bounds
above still hold as long as it is one weight at each end.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import RangeError, ShapeError, UnknownNameError
from ...intmath import IntArray, round_half_even, saturate
from ...threads import parallel_map
from ..affine import QParams, QSpec
from ..observers import from_range
from ..quantized import QuantizedModel
from ..session import Session
from ..wrap import QuantLayer, activation_quantizers

MODES = ("e", "k", "c", "full")
ACTIVATIONS = ("mse", "minmax", "sigma")

Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


def squant(weight: ArrayLike, bits: int, mode: str = "full") -> tuple[IntArray, QParams]:
    """Round a weight tensor by SQuant.

    Parameters
    ----------
    weight : array_like, (O, kh, kw, C) or (O, C)
        Finite.
    bits : int
        2 to 8.
    mode : {"e", "k", "c", "full"}
        Nearest rounding only; then kernels; or then channels; or then both. A kernel of one weight (linear
        layers, 1x1 convolutions) has nothing to balance: "k" is "e" there, and "full" is "c".

    Returns
    -------
    codes : int8 array, shape of weight
    qparams : QParams
        One scale and zero point for each output channel; min-max, for a clipped weight has no second
        neighbour to flip to.

    Raises
    ------
    RangeError
        If the weight contains NaN or infinity, or bits lie outside of 2..8.
    ShapeError
        If it has neither two nor four axes, or no elements.
    UnknownNameError
        If there is no such mode.

    Examples
    --------
    >>> codes, q = squant([[0.0, 0.4, 0.4, 0.4, 3.0]], bits=2)  # nearest would be 0 0 0 0 3: 1.2 steps lost
    >>> (codes - q.zero_point[:, None]).tolist()
    [[0, 1, 0, 0, 3]]
    """
    if mode not in MODES:
        raise UnknownNameError(f"SQuant has no mode {mode!r}. Known: {', '.join(MODES)}.")
    scaled, qparams = grid(weight, bits)
    spec = qparams.spec
    x = kernels(scaled).astype(np.float64)  # (O, C, kh * kw)
    q, other = neighbours(x, spec.qmin, spec.qmax)
    may_flip = np.ones(x.shape, dtype=bool)
    if mode in ("k", "full") and x.shape[2] > 1:
        q, other, may_flip = flip(x, q, other, may_flip)
    if mode in ("c", "full"):
        rows = (len(x), -1)
        q, _, _ = flip(x.reshape(rows), q.reshape(rows), other.reshape(rows), may_flip.reshape(rows))
    codes = q.reshape(x.shape).transpose(0, 2, 1).reshape(scaled.shape)
    return saturate(codes, spec.qmin, spec.qmax), qparams


def grid(weight: ArrayLike, bits: int) -> tuple[NDArray[np.float32], QParams]:
    """Scale a weight to the grid on which codes are the integers from -2**(b-1) to 2**(b-1) - 1.

    Parameters
    ----------
    weight : array_like, (O, ...)
    bits : int

    Returns
    -------
    x : float32 array, shape of weight
        In steps: ``s w - zp``. Codes are x rounded, in whatever way.
    qparams : QParams, per output channel
        What the codes mean, ``w = (q + zp) / s``.

    Notes
    -----
    ``s = (2**b - 1) / max(max w - min w, 1e-8)`` and ``zp = round(s min w) + 2**(b-1)``, in float32 as the
    authors have it: s is the *inverse* of the step. 0 is made part of the range (module docstring, 4).
    """
    spec = QSpec(bits, signed=True, symmetric=False, axis=0)
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf and is refused below
        w = np.asarray(weight, dtype=np.float32)
    if w.ndim not in (2, 4) or w.size == 0:
        raise ShapeError(f"SQuant takes weights (O, kh, kw, C) or (O, C) with elements, got shape {w.shape}.")
    rows = w.reshape(len(w), -1)
    low, high = np.minimum(rows.min(axis=1), 0), np.maximum(rows.max(axis=1), 0)
    with np.errstate(over="ignore", invalid="ignore"):
        span = high - low
    if not np.isfinite(span).all():
        raise RangeError(
            f"channel {int(np.argmin(np.isfinite(span)))} of a weight {w.shape} contains NaN or infinity, or spans "
            "more than float32 holds (3.4e38): find where that was made; SQuant needs finite weights."
        )
    s = np.float32(spec.qmax - spec.qmin) / np.maximum(span, np.float32(1e-8))
    zp = round_half_even(s * low) - np.float32(spec.qmin)
    per_channel = (-1,) + (1,) * (w.ndim - 1)
    return s.reshape(per_channel) * w - zp.reshape(per_channel), QParams(1 / s, (-zp).astype(np.int32), spec)


def kernels(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Regroup (O, kh, kw, C) or (O, C) as (O, C, kh * kw): one kernel, of kh * kw weights, in each row."""
    return weight.reshape(len(weight), -1, weight.shape[-1]).transpose(0, 2, 1)


def neighbours(x: Float64, qmin: int, qmax: int) -> tuple[Float64, Float64]:
    """Stage E: the nearest code of x, and the one on the other side of x, to which it may be flipped.

    Parameters
    ----------
    x : float64 array, any shape
        In steps.
    qmin, qmax : int

    Returns
    -------
    q, other : float64 arrays, shape of x, integer-valued
        |q - x| <= |other - x| inside of [qmin, qmax]. Equal where nothing is to be flipped to: x is an
        integer, or lies beyond the end of the codes.
    """
    q = np.clip(round_half_even(x), qmin, qmax)
    return q, np.clip(q + np.sign(x - q), qmin, qmax)


def flip(x: Float64, q: Float64, other: Float64, may_flip: Mask) -> tuple[Float64, Float64, Mask]:
    """One stage: flip weights to their other neighbour until the errors of each group sum to at most 1/2.

    Parameters
    ----------
    x, q, other : float64 arrays, (..., n)
        Values, their codes, and the codes on the other side. A group is what lies along the last axis.
    may_flip : bool array, (..., n)
        The weights that this stage may flip.

    Returns
    -------
    q, other : float64 arrays, (..., n)
        Exchanged where flipped, so that a later stage can flip back.
    may_flip : bool array, (..., n)
        At most one weight of each group, the only one that the next stage may flip. If the stage went past
        a sum of 0, it is the last flipped weight, else the first unflipped one. Flipping it takes the sum
        to the other side of 0, and to at most 1 in size.
    """
    error = q - x
    total = error.sum(axis=-1, keepdims=True)
    eligible = may_flip & (other - q == -np.sign(total))  # a flip that takes the sum towards 0
    priority = np.where(eligible, np.abs(error), 0)
    rank = np.argsort(-priority, axis=-1, kind="stable").argsort(axis=-1)  # 0: the largest error
    excess = np.abs(total)
    k = round_half_even(excess)
    flipped = eligible & (rank < k)
    nominated = eligible & (rank == np.where(k >= excess, k - 1, k))
    return np.where(flipped, other, q), np.where(flipped, q, other), nominated


def sigma_range(x: ArrayLike, bits: int, sigma: float) -> tuple[float, float]:
    """SQuant's range for activations: so many standard deviations, instead of the extremes.

    Parameters
    ----------
    x : array_like, any shape
        Activations, finite.
    bits : int
    sigma : float
        The authors' ``run.sh`` takes 12 for 4 bits, 14 for 6 and 25 for 8.

    Returns
    -------
    lo, hi : float
        [0, a] with a = sigma std(x[x > 0]), or [-a, a] with a = sigma std(x) / 1.25 where x has negative
        elements. Below 6 bits a is at most max |x|: only there does a wide step cost more than clipping.
    """
    values = np.asarray(x, dtype=np.float64).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        raise RangeError(
            f"a range needs finite values, at least one; got {values.size} with "
            f"{np.count_nonzero(~np.isfinite(values))} NaN or infinite. Find where they were made."
        )
    if not (np.isfinite(sigma) and sigma > 0):
        raise RangeError(f"sigma is {sigma}; it must be positive: 12 for 4 bits, 14 for 6, 25 for 8.")
    signed, reach = bool(values.min() < 0), float(np.abs(values).max())
    spread = values if signed else values[values > 0]
    std = float(spread.std(ddof=1)) if spread.size > 1 else 0.0
    alpha = sigma * std / (1.25 if signed else 1) or reach
    if bits < 6:
        alpha = min(alpha, reach)
    return (-alpha if signed else 0.0), alpha


def quantize(session: Session, *, mode: str = "full", activations: str = "mse", sigma: float = 12.0) -> QuantizedModel:
    """Round weights by SQuant; activations to the nearest code, with one scale for all time-steps.

    Parameters
    ----------
    session : Session
    mode : {"e", "k", "c", "full"}
        Stages of the weights, see `squant`.
    activations : {"mse", "minmax", "sigma"}
        The search that `nearest` uses; or min-max; or SQuant's own `sigma_range`, of what was seen at all
        steps. (The authors take it from the first batch that passes, which here would be the noisiest step.)
    sigma : float
        For `sigma_range`.

    Returns
    -------
    QuantizedModel
    """
    if mode not in MODES:
        raise UnknownNameError(f"SQuant has no mode {mode!r}. Known: {', '.join(MODES)}.")
    if activations not in ACTIVATIONS:
        raise UnknownNameError(f"no activation range is called {activations!r}. Known: {', '.join(ACTIVATIONS)}.")
    run = session.start("squant", mode=mode, activations=activations, sigma=sigma if activations == "sigma" else None)

    def round_weight(layer: QuantLayer) -> None:
        spec = run.coverage.weight_spec(layer.name, session.weight_bits)
        if spec is not None:
            layer.set_codes(*squant(layer.layer.weight.data, spec.bits, mode))

    with run.phase("weights"):
        parallel_map(round_weight, run.layers.values())
    if activations != "sigma":
        run.shared_inputs(activations)
        return run.finish()
    quantizers, seen = activation_quantizers(run.network), session.calibration.inputs
    for name, spec in run.input_specs().items():
        lo, hi = sigma_range(seen[name].sample, spec.bits, sigma)
        quantizers[name].set(from_range(0.0 if spec.symmetric else lo, hi, spec))
    return run.finish()
