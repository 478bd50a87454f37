"""How far pictures and features are from those they should be.

Four questions, one function each: how different are two sets of pictures (`mse`, `psnr`), do two feature
vectors point the same way (`cosine_similarity`), how far apart are two clouds of features
(`frechet_distance`), and how much does a number vary over seeds (`mean_and_spread`).

The Frechet distance here is **not the Inception FID** of the literature. The formula is the same, but the
features come from whichever network the caller used (in refquant a small classifier trained here), and
distances on different features cannot be compared with each other.

Shapes: pictures (N, C, H, W), features (N, D); two arguments of one function have the same shape.
All arithmetic is in float64.
Errors: `ShapeError` for shapes that do not fit; `RangeError` for NaN, infinity and too few samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import RangeError, ShapeError

Float64Array = NDArray[np.float64]


def mse(a: ArrayLike, b: ArrayLike) -> float:
    """Mean squared error over all elements.

    Parameters
    ----------
    a, b : array_like, the same shape
        Not empty. Integers are widened first, so uint8 pictures do not wrap around.

    Returns
    -------
    float

    Examples
    --------
    >>> mse([0.0, 1.0], [0.0, 3.0])
    2.0
    """
    a, b = _pair("mse", a, b)
    return float(np.mean((a - b) ** 2))


def psnr(a: ArrayLike, b: ArrayLike, data_range: float = 2.0) -> float:
    r"""Peak signal-to-noise ratio in dB; infinity for identical arrays.

    Parameters
    ----------
    a, b : array_like, the same shape
    data_range : float
        Largest minus smallest possible value: 2 for pictures in [-1, 1], 255 for bytes.

    Returns
    -------
    float

    Notes
    -----
    .. math:: 10 \log_{10}(\mathrm{data\_range}^2 / \mathrm{mse}(a, b))

    The squared error is averaged over all pictures before the logarithm. The mean of `per_image_psnr`
    is another number, never a smaller one, and infinite as soon as one picture is exact.

    Examples
    --------
    >>> psnr([0.2, -0.2], [0.0, 0.0])
    20.0
    """
    a, b = _pair("psnr", a, b)
    return float(_decibel(np.mean((a - b) ** 2), data_range))


def per_image_psnr(a: ArrayLike, b: ArrayLike, data_range: float = 2.0) -> Float64Array:
    """`psnr` of each picture on its own.

    Parameters
    ----------
    a, b : array_like, (N, ...), the same shape
    data_range : float
        As for `psnr`.

    Returns
    -------
    float64 array, (N,)

    Examples
    --------
    >>> per_image_psnr([[0.0, 0.0], [1.0, 1.0]], [[0.2, 0.2], [1.0, 1.0]])
    array([20., inf])
    """
    a, b = _pair("per_image_psnr", a, b)
    if a.ndim < 2:
        raise ShapeError(f"per_image_psnr: given shape {a.shape}, wanted (N, ...). Put a batch axis first.")
    return _decibel(np.mean((a - b) ** 2, axis=tuple(range(1, a.ndim))), data_range)


def cosine_similarity(a: ArrayLike, b: ArrayLike) -> Float64Array:
    """Cosine of the angle between vectors that lie along the last axis.

    Parameters
    ----------
    a, b : array_like, (..., D), the same shape

    Returns
    -------
    float64 array, (...)

    Raises
    ------
    RangeError
        One of the vectors is zero and has no direction.

    Examples
    --------
    >>> cosine_similarity([[1.0, 0.0], [1.0, 1.0]], [[0.0, 2.0], [3.0, 3.0]]).round(6)
    array([0., 1.])
    """
    a, b = _pair("cosine_similarity", a, b)
    if a.ndim == 0:
        raise ShapeError("cosine_similarity: given two scalars, wanted vectors of shape (..., D).")
    length_a, length_b = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    if not (length_a.all() and length_b.all()):
        raise RangeError("cosine_similarity: a vector is zero and has no direction. Leave such rows out.")
    # Each is scaled before they are multiplied, so that the product cannot overflow.
    cosine = np.sum((a / length_a[..., None]) * (b / length_b[..., None]), axis=-1)
    return np.asarray(np.clip(cosine, -1.0, 1.0))  # rounding may pass 1 by an ulp, and arccos would give NaN


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """The Gaussian that stands for a cloud of features: all that `frechet_distance` needs.

    Attributes
    ----------
    mean : (D,) float64
    cov : (D, D) float64
        Unbiased: divided by ``count - 1``.
    count : int
        How many samples it was estimated from, at least 2.
    """

    mean: Float64Array
    cov: Float64Array
    count: int

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.cov.shape != 2 * self.mean.shape:
            raise ShapeError(
                f"FeatureStats: given mean {self.mean.shape} and cov {self.cov.shape}; wanted (D,), (D, D)."
            )
        if self.count < 2:
            raise RangeError(f"FeatureStats: given {self.count} samples; a covariance needs at least 2.")


def feature_stats(features: ArrayLike) -> FeatureStats:
    """Mean and unbiased covariance of features, in float64.

    Parameters
    ----------
    features : array_like, (N, D)
        N >= 2 samples. The covariance has full rank only if N > D.

    Returns
    -------
    FeatureStats

    Examples
    --------
    >>> stats = feature_stats([[0.0, 1.0], [2.0, 1.0]])
    >>> stats.mean, stats.cov[0, 0], stats.count
    (array([1., 1.]), np.float64(2.0), 2)
    """
    return feature_stats_of_batches([features])


def feature_stats_of_batches(batches: Iterable[ArrayLike]) -> FeatureStats:
    r"""`feature_stats` of all batches together, with only one of them in memory at a time.

    Parameters
    ----------
    batches : iterable of array_like, (N_i, D)
        Batches of any size, at least 2 samples in all.

    Returns
    -------
    FeatureStats

    Notes
    -----
    With the scatter matrix S = sum (x - mean)(x - mean)^T, two groups A and B merge as

    .. math:: S = S_A + S_B + d d^T n_A n_B / (n_A + n_B), \quad d = mean_B - mean_A

    Sums of x x^T would cancel when the mean is large beside the spread; these terms do not.

    References
    ----------
    Chan, Golub, LeVeque (1982), Updating formulae and a pairwise algorithm for computing sample variances.
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for features in batches:
        x = _finite("feature_stats", features)
        if x.ndim != 2 or x.shape[1] == 0:
            raise ShapeError(f"feature_stats: given shape {x.shape}, wanted (N, D). Flatten features first.")
        if len(x) == 0:
            continue
        if count == 0:
            mean, scatter = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
        elif x.shape[1] != len(mean):
            raise ShapeError(f"feature_stats: given {x.shape[1]} features after a batch with {len(mean)}.")
        batch_mean = x.mean(axis=0)
        centred, shift = x - batch_mean, batch_mean - mean
        total = count + len(x)
        scatter += centred.T @ centred + np.outer(shift, shift) * (count * len(x) / total)
        mean = mean + shift * (len(x) / total)
        count = total
    if count < 2:
        raise RangeError(f"feature_stats: given {count} samples; a covariance needs at least 2.")
    return FeatureStats(mean, scatter / (count - 1), count)


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    r"""Squared Frechet (Wasserstein-2) distance of two Gaussians. It is not the Inception FID.

    "FID" is this formula on the features of one published Inception network. On other features it is a
    fair measure between sets judged by the same features, and comparable with nothing else.

    Parameters
    ----------
    mu1, sigma1, mu2, sigma2 : array_like, (D,) and (D, D), twice
        Means and covariances. A covariance is symmetric and has no eigenvalue below zero by more than rounding;
        singular ones are allowed.

    Returns
    -------
    float
        At least 0. With sample statistics it is biased upwards, more so for fewer samples, so compare
        only distances from equal sample counts.

    Notes
    -----
    .. math:: |\mu_1 - \mu_2|^2 + \mathrm{tr}\,\Sigma_1 + \mathrm{tr}\,\Sigma_2
              - 2\,\mathrm{tr}\,(\Sigma_1 \Sigma_2)^{1/2}

    The product is not symmetric, but it has the eigenvalues of :math:`\Sigma_1^{1/2} \Sigma_2
    \Sigma_1^{1/2}`, which is, so the last trace is the sum of the square roots of these. They are the
    singular values of :math:`\Sigma_1^{1/2} \Sigma_2^{1/2}`, and are computed as such: the root of an
    eigenvalue that should be 0 and came out as 1e-16 is wrong by 1e-8. (50 samples of 128 features against
    themselves, trace 1.7e4: the distance is 6e-4 through eigenvalues and 3e-11 through singular values.)

    References
    ----------
    Dowson, Landau (1982), The Frechet distance between multivariate normal distributions, eq. (4).
    Heusel et al. (2017), GANs trained by a two time-scale update rule converge to a local Nash
    equilibrium, eq. (6), arXiv:1706.08500.

    Examples
    --------
    >>> frechet_distance([0.0], [[1.0]], [3.0], [[4.0]])
    10.0
    """
    mu1, mu2 = _pair("frechet_distance", mu1, mu2)
    sigma1, sigma2 = _pair("frechet_distance", sigma1, sigma2)
    if mu1.ndim != 1 or sigma1.shape != 2 * mu1.shape:
        raise ShapeError(f"frechet_distance: given means {mu1.shape}, covariances {sigma1.shape}; wanted (D,), (D, D).")
    shift = mu1 - mu2
    roots = np.linalg.svd(_symmetric_root(sigma1) @ _symmetric_root(sigma2), compute_uv=False)
    distance = shift @ shift + np.trace(sigma1) + np.trace(sigma2) - 2.0 * roots.sum()
    return max(float(distance), 0.0)  # of equal Gaussians rounding may leave -1e-15


class Spread(NamedTuple):
    """A number over repeated runs: its mean and its sample standard deviation (divided by n - 1)."""

    mean: float
    std: float


def mean_and_spread(values: ArrayLike) -> Spread:
    """Mean and sample standard deviation of one number measured with several seeds.

    Parameters
    ----------
    values : array_like, (n,)
        n >= 2: one run says nothing about the spread.

    Returns
    -------
    Spread

    Examples
    --------
    >>> mean_and_spread([1.0, 2.0, 3.0])
    Spread(mean=2.0, std=1.0)
    """
    x = _finite("mean_and_spread", values)
    if x.ndim != 1:
        raise ShapeError(f"mean_and_spread: given shape {x.shape}, wanted (n,).")
    if len(x) < 2:
        raise RangeError(f"mean_and_spread: given {len(x)} values, at least 2 are needed. Run more seeds.")
    return Spread(float(x.mean()), float(x.std(ddof=1)))


def _finite(function: str, values: ArrayLike) -> Float64Array:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as problem:
        raise ShapeError(f"{function}: given no array of real numbers: {problem}.") from problem
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise RangeError(
            f"{function}: {bad} of the {array.size} values are NaN or infinity; allowed are finite ones. "
            "Look for the step or layer that made them."
        )
    return array


def _pair(function: str, a: ArrayLike, b: ArrayLike) -> tuple[Float64Array, Float64Array]:
    a, b = _finite(function, a), _finite(function, b)
    if a.shape != b.shape or a.size == 0:
        raise ShapeError(f"{function}: given shapes {a.shape} and {b.shape}, wanted equal, not empty ones.")
    return a, b


def _decibel(error: ArrayLike, data_range: float) -> Float64Array:
    if not 0.0 < data_range < np.inf:
        raise RangeError(f"psnr: data_range is {data_range}, must be positive: 2 for pictures in [-1, 1].")
    with np.errstate(divide="ignore"):
        return np.asarray(10.0 * np.log10(np.divide(data_range**2, error)))


def _symmetric_root(sigma: Float64Array) -> Float64Array:
    """The symmetric R with R R = sigma."""
    tolerance = 1e-8 * max(float(np.abs(sigma).max()), np.finfo(np.float64).tiny)
    if np.abs(sigma - sigma.T).max() > tolerance:
        raise RangeError("frechet_distance: a covariance is not symmetric. Make it with `feature_stats`.")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    if values[0] < -tolerance * len(values):
        raise RangeError(
            f"frechet_distance: a covariance has the eigenvalue {values[0]:.3g}, none below 0 is allowed. "
            "Make it with `feature_stats`."
        )
    # An eigenvalue within rounding of 0 is 0: the root of 1e-16 would be 1e-8, and would change with
    # the basis. (Rotating a singular covariance moves the distance by 1e-13 so, and by 5e-7 otherwise.)
    values[values < 10 * len(values) * np.finfo(np.float64).eps * values[-1]] = 0.0
    return np.asarray((vectors * np.sqrt(values)) @ vectors.T)
