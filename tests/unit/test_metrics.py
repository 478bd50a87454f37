"""Metrics against closed forms, other algorithms, and the invariances that define them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refquant.errors import RangeError, ShapeError
from refquant.metrics import (
    FeatureStats,
    Spread,
    cosine_similarity,
    feature_stats,
    feature_stats_of_batches,
    frechet_distance,
    mean_and_spread,
    mse,
    per_image_psnr,
    psnr,
)

seeds = st.integers(0, 2**32 - 1)
images = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=4, max_dims=4, max_side=4), elements=st.floats(-1, 1, width=32)
)


def covariance(rng: np.random.Generator, d: int, samples: int | None = None) -> np.ndarray:
    """Of `samples` points in d dimensions; singular when there are no more points than dimensions."""
    x = rng.normal(size=(samples or 3 * d, d)) @ rng.normal(size=(d, d))
    return np.cov(x, rowvar=False).reshape(d, d)


def rotation(rng: np.random.Generator, d: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


# --- pictures -----------------------------------------------------------------------------------------


@given(images)
def test_identical_images(x):
    assert mse(x, x) == 0.0
    assert psnr(x, x) == np.inf
    assert (per_image_psnr(x, x) == np.inf).all()


@given(images, st.floats(1e-3, 1.0))
def test_constant_offset_closed_form(x, offset):
    """x and x + d: mse = d^2 and psnr = 20 log10(range / d)."""
    x = x.astype(np.float64)
    np.testing.assert_allclose(mse(x, x + offset), offset**2, rtol=1e-9)
    np.testing.assert_allclose(psnr(x, x + offset), 20 * np.log10(2 / offset), rtol=1e-9)
    np.testing.assert_allclose(psnr(x, x + offset, data_range=1), 20 * np.log10(1 / offset), atol=1e-8)


@given(images, seeds)
def test_psnr_averages_errors_before_decibels(x, seed):
    """psnr = -10 log10 of the mean of 10^(-psnr_i / 10), and by Jensen at most the mean of psnr_i."""
    y = x + np.random.default_rng(seed).uniform(0.01, 1.0, x.shape)
    each = per_image_psnr(x, y)
    assert each.shape == (len(x),)
    np.testing.assert_allclose(psnr(x, y), -10 * np.log10(np.mean(10 ** (-each / 10))), rtol=1e-12)
    assert psnr(x, y) <= each.mean() + 1e-9
    for i in range(len(x)):
        np.testing.assert_allclose(each[i], psnr(x[i], y[i]), rtol=1e-12)


def test_one_exact_image_does_not_hide_the_others():
    x, y = np.zeros((2, 1, 2, 2)), np.zeros((2, 1, 2, 2))
    y[1] = 0.2
    assert per_image_psnr(x, y)[0] == np.inf
    assert psnr(x, y) == pytest.approx(20 + 10 * np.log10(2))


def test_bytes_do_not_wrap_around():
    a, b = np.array([0, 255], np.uint8), np.array([255, 0], np.uint8)
    assert mse(a, b) == 255**2
    assert psnr(a, b, data_range=255) == 0.0


# --- directions ---------------------------------------------------------------------------------------


@given(hnp.arrays(np.float64, (3, 5), elements=st.floats(-1e3, 1e3)), st.floats(1e-3, 1e3))
def test_cosine_of_parallel_vectors(x, factor):
    assume((np.linalg.norm(x, axis=1) > 1e-6).all())
    same, opposite = cosine_similarity(x, factor * x), cosine_similarity(x, -factor * x)
    np.testing.assert_allclose(same, 1, rtol=1e-12)
    np.testing.assert_allclose(opposite, -1, rtol=1e-12)
    assert np.abs([same, opposite]).max() <= 1


@given(seeds)
def test_cosine_of_a_known_angle(seed):
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, np.pi)
    plane = rotation(rng, 6)[:2]
    got = cosine_similarity(plane[0], np.cos(angle) * plane[0] + np.sin(angle) * plane[1])
    np.testing.assert_allclose(got, np.cos(angle), atol=1e-14)


def test_cosine_shapes_and_zero():
    assert cosine_similarity(np.ones((2, 3, 4)), np.ones((2, 3, 4))).shape == (2, 3)
    with pytest.raises(RangeError, match="zero and has no direction"):
        cosine_similarity([[1.0, 0.0], [0.0, 0.0]], np.ones((2, 2)))
    with pytest.raises(ShapeError, match="scalars"):
        cosine_similarity(1.0, 1.0)


# --- feature statistics -------------------------------------------------------------------------------


@given(seeds, st.integers(2, 30), st.integers(1, 5))
def test_feature_stats_are_numpys(seed, n, d):
    x = np.random.default_rng(seed).normal(3, 2, (n, d)).astype(np.float32)
    stats = feature_stats(x)
    assert stats.count == n and stats.mean.dtype == stats.cov.dtype == np.float64
    np.testing.assert_allclose(stats.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(
        stats.cov, np.cov(x.astype(np.float64), rowvar=False).reshape(d, d), rtol=1e-9, atol=1e-12
    )


@given(seeds, st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 2))
def test_batches_equal_one_shot(seed, sizes):
    """Also with empty batches, with single samples, and with a mean of 1e6 beside a spread of 1."""
    x = np.random.default_rng(seed).normal(1e6, 1, (sum(sizes), 3))
    whole = feature_stats(x)
    parts = feature_stats_of_batches(np.split(x, np.cumsum(sizes)[:-1]))
    assert parts.count == whole.count
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-14)
    # an ulp of 1e6 is 1e-10, and a product of deviations of size ~ 1 inherits it
    np.testing.assert_allclose(parts.cov, whole.cov, atol=1e-8)


def test_feature_stats_errors():
    for features, error, what in [
        (np.ones((1, 4)), RangeError, "given 1 samples"),
        (np.ones((0, 4)), RangeError, "given 0 samples"),
        (np.ones(4), ShapeError, r"shape \(4,\)"),
        (np.ones((4, 2, 2)), ShapeError, "Flatten"),
        (np.ones((4, 0)), ShapeError, r"shape \(4, 0\)"),
        ([[1.0, np.nan], [0.0, np.inf]], RangeError, "2 of the 4 values"),
    ]:
        with pytest.raises(error, match=what):
            feature_stats(features)
    with pytest.raises(RangeError, match="given 0 samples"):
        feature_stats_of_batches([])
    with pytest.raises(ShapeError, match="given 3 features after a batch with 2"):
        feature_stats_of_batches([np.ones((2, 2)), np.ones((2, 3))])
    with pytest.raises(ShapeError, match="wanted"):
        FeatureStats(np.zeros(2), np.zeros((2, 3)), 5)
    with pytest.raises(RangeError, match="at least 2"):
        FeatureStats(np.zeros(2), np.zeros((2, 2)), 1)


# --- Frechet distance ---------------------------------------------------------------------------------


@given(seeds, st.integers(1, 12), st.integers(2, 20))
def test_equal_gaussians_have_distance_zero(seed, d, samples):
    """For singular covariances too: 1e-12 of the trace, where roots of eigenvalues would leave 1e-8."""
    rng = np.random.default_rng(seed)
    mu, sigma = rng.normal(size=d), covariance(rng, d, samples)
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) <= 1e-12 * (1 + np.trace(sigma)) * d


@given(seeds, st.integers(1, 12))
def test_commuting_covariances_closed_form(seed, d):
    """Shared eigenvectors: |d|^2 + sum (sqrt a_i - sqrt b_i)^2; without rotation, the diagonal case."""
    rng = np.random.default_rng(seed)
    mu1, mu2 = rng.normal(size=(2, d))
    a, b = rng.uniform(0, 5, (2, d))
    want = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    np.testing.assert_allclose(frechet_distance(mu1, np.diag(a), mu2, np.diag(b)), want, rtol=1e-10)
    q = rotation(rng, d)
    got = frechet_distance(q @ mu1, (q * a) @ q.T, q @ mu2, (q * b) @ q.T)
    np.testing.assert_allclose(got, want, rtol=1e-10)


@given(seeds, st.integers(1, 10))
def test_two_independent_computations(seed, d):
    """tr (S1 S2)^(1/2) from the eigenvalues of the unsymmetric product, and by Denman-Beavers iteration."""
    rng = np.random.default_rng(seed)
    mu1, mu2 = rng.normal(size=(2, d))
    s1, s2 = covariance(rng, d), covariance(rng, d)
    rest = np.sum((mu1 - mu2) ** 2) + np.trace(s1) + np.trace(s2)
    got = frechet_distance(mu1, s1, mu2, s2)
    product = s1 @ s2
    by_eigenvalues = rest - 2 * np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()
    np.testing.assert_allclose(got, by_eigenvalues, rtol=1e-6, atol=1e-6 * rest)
    assume(np.linalg.cond(product) < 1e6)  # the iteration inverts
    root, inverse = product, np.eye(d)
    for _ in range(60):
        root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
    np.testing.assert_allclose(got, rest - 2 * np.trace(root), rtol=1e-6, atol=1e-6 * rest)


@given(seeds, st.integers(1, 10), st.integers(2, 20))
def test_symmetry_rotation_scale_and_shift(seed, d, samples):
    rng = np.random.default_rng(seed)
    mu1, mu2, shift = rng.normal(size=(3, d))
    s1, s2 = covariance(rng, d, samples), covariance(rng, d)
    got = frechet_distance(mu1, s1, mu2, s2)
    # s1 may be singular: an eigenvalue that is 0 up to rounding must not enter through its root, 1e-8
    close = {"rtol": 1e-10, "atol": 1e-10 * np.sqrt(np.trace(s1) * np.trace(s2))}
    np.testing.assert_allclose(frechet_distance(mu2, s2, mu1, s1), got, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(frechet_distance(3 * mu1, 9 * s1, 3 * mu2, 9 * s2), 9 * got, **close)
    q = rotation(rng, d)
    np.testing.assert_allclose(frechet_distance(q @ mu1, q @ s1 @ q.T, q @ mu2, q @ s2 @ q.T), got, **close)
    # moving one mean away from the other adds |shift|^2 exactly
    start = frechet_distance(mu1, s1, mu1, s2)
    moved = frechet_distance(mu1 + shift, s1, mu1, s2)
    np.testing.assert_allclose(moved - start, shift @ shift, rtol=1e-10, atol=1e-10)


@given(seeds)
def test_it_is_the_cost_of_the_best_transport(seed):
    """With T = S1^(-1/2) (S1^(1/2) S2 S1^(1/2))^(1/2) S1^(-1/2), x -> T x carries one Gaussian onto the
    other and E|x - T x|^2 = tr (I - T) S1 (I - T) is the distance; no linear map that does so costs less."""
    rng = np.random.default_rng(seed)
    d = 4
    s1, s2 = covariance(rng, d) + np.eye(d), covariance(rng, d) + np.eye(d)
    values, vectors = np.linalg.eigh(s1)
    root, inverse = (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T
    values, vectors = np.linalg.eigh(root @ s2 @ root)
    best = inverse @ (vectors * np.sqrt(values)) @ vectors.T @ inverse
    got = frechet_distance(np.zeros(d), s1, np.zeros(d), s2)

    def cost(transport: np.ndarray) -> float:
        np.testing.assert_allclose(transport @ s1 @ transport.T, s2, rtol=1e-8, atol=1e-8)
        rest = np.eye(d) - transport
        return float(np.trace(rest @ s1 @ rest.T))

    np.testing.assert_allclose(got, cost(best), rtol=1e-8, atol=1e-8)
    assert got <= cost(best @ root @ rotation(rng, d) @ inverse) + 1e-8


def test_frechet_errors():
    mu, eye = np.zeros(2), np.eye(2)
    for arguments, error, what in [
        ((mu, eye, np.zeros(3), np.eye(3)), ShapeError, r"\(2,\) and \(3,\)"),
        ((mu, eye, mu, np.eye(3)), ShapeError, "wanted equal"),
        ((mu, np.ones(2), mu, np.ones(2)), ShapeError, r"wanted \(D,\), \(D, D\)"),
        ((eye, eye, eye, eye), ShapeError, r"wanted \(D,\), \(D, D\)"),
        ((np.zeros(0), np.zeros((0, 0)), np.zeros(0), np.zeros((0, 0))), ShapeError, "not empty"),
        ((mu, eye * np.nan, mu, eye), RangeError, "NaN"),
        ((mu, [[1.0, 0.5], [0.0, 1.0]], mu, eye), RangeError, "not symmetric"),
        ((mu, -eye, mu, eye), RangeError, "eigenvalue -1"),
    ]:
        with pytest.raises(error, match=what):
            frechet_distance(*arguments)


def test_zero_covariances_are_points():
    assert frechet_distance([3.0, 0.0], np.zeros((2, 2)), [0.0, 4.0], np.zeros((2, 2))) == 25.0


# --- spread, and errors that are the same everywhere ---------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_mean_and_spread(values):
    mean, std = mean_and_spread(values)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert std == pytest.approx(
        (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5, rel=1e-9, abs=1e-6
    )


def test_spread_errors():
    assert mean_and_spread(np.array([4.0, 4.0])) == Spread(4.0, 0.0)
    for values, error, what in [
        ([], RangeError, "given 0 values"),
        ([1.0], RangeError, "Run more seeds"),
        ([1.0, np.nan], RangeError, "NaN"),
        ([[1.0, 2.0]], ShapeError, r"\(1, 2\)"),
        (["a", "b"], ShapeError, "no array of real numbers"),
    ]:
        with pytest.raises(error, match=what):
            mean_and_spread(values)


@pytest.mark.parametrize("function", [mse, psnr, per_image_psnr, cosine_similarity])
def test_pairs_must_fit_and_be_finite(function):
    x = np.ones((2, 3))
    with pytest.raises(ShapeError, match=r"\(2, 3\) and \(2, 1\)"):
        function(x, x[:, :1])  # no broadcasting
    with pytest.raises(ShapeError, match="not empty"):
        function(x[:0], x[:0])
    with pytest.raises(RangeError, match="1 of the 6 values"):
        function(x, np.where(np.arange(6).reshape(2, 3) == 4, np.nan, x))


def test_psnr_arguments():
    for data_range in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(RangeError, match="data_range"):
            psnr([0.0], [1.0], data_range)
    with pytest.raises(ShapeError, match="batch axis"):
        per_image_psnr([0.0], [1.0])
