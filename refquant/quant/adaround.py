"""AdaRound: for each weight, learn whether it is rounded down or up (Nagel et al. 2020, arXiv 2004.10568).

The nearest code is best for a weight alone, not for the sum it enters: two errors of opposite sign cancel.
So each weight w (scale s, zero point z) gets one number alpha, and is relaxed between its two neighbours:

    floor = ⌊w/s⌋                                              rounded down, a constant
    h     = clip(1.2 σ(α) - 0.1, 0, 1)                         rectified sigmoid, how far up
    ŵ     = s (clamp(floor + h + z, qmin, qmax) - z)           soft: for learning
    q     = clamp(floor + [α >= 0] + z, qmin, qmax)            hard: the codes that are kept
    R     = Σ (1 - |2h - 1|^β)                                 drives every h to 0 or 1

Learning starts at ŵ = w (h is the fraction of w/s that floor cut off) and minimises a reconstruction loss
(``quant.losses``) plus, after a warm-up, 0.01 R with β falling from 20 to 2. With β = 20, R is flat but
near the ends, and leaves undecided weights alone; β = 2 pushes all of them.

==============================  ==========================================  ==================================
paper                           here                                        authors' code (TFMQ-DM)
==============================  ==========================================  ==================================
initialisation                  ``initial_alpha``                           quant/adaptive_rounding.py:31-41
rectified sigmoid h             ``rectified_sigmoid``                       quant/adaptive_rounding.py:43-44
soft-quantized weight           ``soft_weight``                             quant/adaptive_rounding.py:46-70
the result                      ``hard_codes``                              quant/adaptive_rounding.py:46-70
regulariser f_reg               ``rounding_regulariser``                    quant/reconstruction_util.py:66-83
annealing of β                  ``beta_schedule``, ``rounding_is_active``   quant/reconstruction_util.py:176-198
==============================  ==========================================  ==================================

Shapes: weight and alpha are alike, (O, ...); scale and zero point are one pair, or (O,) with ``axis=0``.
float32 alpha gives float32 values and gradients; w/s is formed in float32 always, where codes are defined.

Errors: ``ShapeError`` if alpha, weight and the channels of qparams do not fit; ``RangeError`` for weights or
alphas without a rounding (NaN, infinite), beta <= 1, and impossible schedules. ``soft_weight`` runs once an
iteration and looks at shapes only: NaN in, NaN out.

Where we differ: alpha is written ln((r - γ)/(ζ - r)), which is the authors' -ln((ζ - γ)/(r - γ) - 1) without
a difference of near numbers. In float32 the two are within 2e-6, so codes and losses agree to rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..autograd.tensor import Tensor, as_tensor, op
from ..errors import RangeError, ShapeError
from ..intmath import saturate
from .affine import QParams, broadcast

Array = NDArray[Any]

# The sigmoid is stretched beyond [0, 1], so that h reaches both ends, at α = ∓ln 11 = ∓2.398, with slope 0.09.
ZETA, GAMMA = 1.1, -0.1


def initial_alpha(weight: ArrayLike, qparams: QParams) -> NDArray[np.float32]:
    """Alpha at which h is the fraction of w/s, so that the soft weight is the float weight.

    Parameters
    ----------
    weight : array_like, (O, ...)
    qparams : QParams

    Returns
    -------
    array of float32, shape of weight
        Between -ln 11 and ln 11, and >= 0 just where the fraction is >= 1/2: the hard codes are then the
        nearest ones, but that a tie goes up (nearest rounding sends it to the even code).

    Raises
    ------
    RangeError
        If a weight is NaN, or w/s infinite.
    ShapeError
        If the channels of qparams do not fit.

    Examples
    --------
    >>> from refquant.quant.affine import QSpec
    >>> alpha = initial_alpha([0.0, 0.5, 0.8], QParams(1.0, 2, QSpec(bits=4)))
    >>> rectified_sigmoid(alpha).round(6)
    array([0. , 0.5, 0.8], dtype=float32)
    """
    quotient = _checked_quotient(weight, qparams)
    fraction = quotient - np.floor(quotient)
    return np.log((fraction - GAMMA) / (ZETA - fraction))


def rectified_sigmoid(alpha: ArrayLike) -> Array:
    """h(α) = clip(σ(α) (ζ - γ) + γ, 0, 1): 0 at α <= -ln 11, 1/2 at 0, 1 at α >= ln 11; shape of alpha."""
    with np.errstate(over="ignore"):  # e^(-α) = inf gives σ = 0, as it should
        return np.clip((ZETA - GAMMA) / (1 + np.exp(-np.asarray(alpha))) + GAMMA, 0, 1)


@op
def soft_weight(alpha: Tensor, weight: Tensor | Array, qparams: QParams) -> Tensor:
    """s (clamp(⌊w/s⌋ + h(α) + z, qmin, qmax) - z), differentiable in alpha alone.

    With u what is clamped,

        dŵ/dα = s [qmin <= u <= qmax] dh/dα        (both ends count as inside, as for ``fake_quant``)

    Parameters
    ----------
    alpha : Tensor, (O, ...)
    weight : Tensor or array, (O, ...)
    qparams : QParams

    Returns
    -------
    Tensor, (O, ...)
        In the dtype of alpha.
    """
    w = as_tensor(weight).data
    if alpha.shape != w.shape:
        raise ShapeError(
            f"soft_weight: alpha {alpha.shape} for a weight of shape {w.shape}; "
            "each weight has one alpha: make them with initial_alpha"
        )
    scale, zero = (p.astype(alpha.dtype) for p in broadcast(qparams, w.shape))
    h, slope = _rectified_sigmoid_and_slope(alpha.data)
    u = np.floor(_quotient(w, qparams)).astype(alpha.dtype, copy=False)
    u += zero  # before h: whole numbers add without rounding
    u += h
    q = np.clip(u, qparams.spec.qmin, qparams.spec.qmax)
    slope *= q == u
    slope *= scale
    q -= zero
    q *= scale
    return Tensor(q, (alpha,), lambda g: (g * slope,))


def hard_codes(alpha: ArrayLike, weight: ArrayLike, qparams: QParams) -> Array:
    """Integer codes clamp(⌊w/s⌋ + [α >= 0] + z, qmin, qmax): what remains of alpha after learning.

    Parameters
    ----------
    alpha, weight : array_like, (O, ...)
    qparams : QParams

    Returns
    -------
    array of uint8 or int8 (``qparams.spec.dtype``), shape of weight

    Raises
    ------
    RangeError
        If an alpha or a weight is NaN, or w/s infinite.
    ShapeError
        If the shapes do not fit.
    """
    quotient, alpha = _checked_quotient(weight, qparams), np.asarray(alpha)
    if alpha.shape != quotient.shape:
        raise ShapeError(
            f"hard_codes: alpha {alpha.shape} for a weight of shape {quotient.shape}; each weight has one alpha"
        )
    if np.isnan(alpha).any():
        raise RangeError(
            f"hard_codes: {np.isnan(alpha).sum()} of {alpha.size} alphas are NaN and round neither way; "
            "the learning diverged: lower its rate, or look for NaN in the calibration data"
        )
    codes = np.floor(quotient) + broadcast(qparams, quotient.shape)[1].astype(np.float32)
    codes += alpha >= 0
    return saturate(codes, qparams.spec.qmin, qparams.spec.qmax)


@op
def rounding_regulariser(alpha: Tensor, beta: float) -> Tensor:
    """Σ (1 - |2h(α) - 1|^β) over all elements, a scalar: 0 if every h is 0 or 1; β > 1.

        dR/dα = -2 β |2h - 1|^(β-1) sign(2h - 1) dh/dα

    A sum, not a mean, while the reconstruction loss is a mean over pixels: of a layer with 10,000 weights
    0.01 R is up to 100, and decides alone what the warm-up has not. So the authors have it.

    Parameters
    ----------
    alpha : Tensor, any shape
    beta : float
        Above 1.

    Returns
    -------
    Tensor, ()
    """
    beta = float(beta)
    if not 1 < beta < np.inf:
        raise RangeError(f"beta={beta}: must be above 1, or the slope jumps at h = 1/2; the authors go from 20 to 2")
    h, slope = _rectified_sigmoid_and_slope(alpha.data)
    h *= 2
    h -= 1
    power = np.abs(h)
    power **= beta - 1
    np.copysign(power, h, out=power)
    slope *= power
    slope *= -2 * beta
    power *= h  # |2h - 1|^β
    np.subtract(1, power, out=power)
    return Tensor(power.sum(), (alpha,), lambda g: (g * slope,))


def beta_schedule(k: int, iterations: int, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float:
    """β at iteration k: `start` during the warm-up, then linearly to `end` at the last iteration.

    Parameters
    ----------
    k : int
        Counts from 1, as in the authors' loss; beyond `iterations` β stays at `end`.
    iterations : int
        At least 1.
    warmup : float
        Fraction of the iterations, 0 <= warmup < 1.
    start, end : float
        β at either end.

    Returns
    -------
    float

    Raises
    ------
    RangeError
        If one of them is out of its range.

    Examples
    --------
    >>> [beta_schedule(k, 20000) for k in (1, 4000, 12000, 20000)]
    [20.0, 20.0, 11.0, 2.0]
    """
    begin = _end_of_warmup(k, iterations, warmup)
    progress = max(0.0, (k - begin) / (iterations - begin))
    return end + (start - end) * max(0.0, 1 - progress)


def rounding_is_active(k: int, iterations: int, warmup: float = 0.2) -> bool:
    """Whether iteration k (from 1) has the rounding term: from warmup * iterations on, that one included."""
    return k >= _end_of_warmup(k, iterations, warmup)


def _end_of_warmup(k: int, iterations: int, warmup: float) -> float:
    if k < 1 or iterations < 1 or not 0 <= warmup < 1:
        raise RangeError(
            f"iteration {k} of {iterations} with warmup={warmup}: iterations count from 1, there is at least one, "
            "and the warm-up is a fraction from 0 to below 1"
        )
    return warmup * iterations


def _rectified_sigmoid_and_slope(alpha: Array) -> tuple[Array, Array]:
    """h, and dh/dα = (ζ - γ) σ (1 - σ) where the stretched sigmoid lies in [0, 1], else 0; both new arrays.

    In place, for memory fresh from the system costs more than the arithmetic: with a new array for each
    operation the regulariser of 300,000 weights took 3.4 ms, so it takes 1.3 ms.
    """
    sigma = np.negative(alpha)
    with np.errstate(over="ignore"):
        np.exp(sigma, out=sigma)
    sigma += 1
    np.reciprocal(sigma, out=sigma)
    slope = 1 - sigma
    slope *= sigma
    slope *= ZETA - GAMMA
    sigma *= ZETA - GAMMA
    sigma += GAMMA
    h = np.clip(sigma, 0, 1)
    slope *= h == sigma  # clip changed nothing: inside, or on an end
    return h, slope


def _quotient(weight: ArrayLike, qparams: QParams) -> NDArray[np.float32]:
    """w/s in float32, as ``affine.quantize`` has it."""
    w = np.asarray(weight, dtype=np.float32)
    with np.errstate(over="ignore"):  # infinities are refused, or saturate
        return w / broadcast(qparams, w.shape)[0]


def _checked_quotient(weight: ArrayLike, qparams: QParams) -> NDArray[np.float32]:
    quotient = _quotient(weight, qparams)
    if not np.isfinite(quotient).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(quotient))[0])
        raise RangeError(
            f"weight at index {index} is {quotient[index]} steps of its scale, which has no neighbours to choose "
            "from; weights must be finite, and the scale made for them: calibrate again"
        )
    return quotient
