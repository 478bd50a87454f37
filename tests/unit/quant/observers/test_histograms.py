"""KL and histogram by hand: what they keep, what the released ones do instead, degenerate tensors."""

import numpy as np
import pytest

from refquant.errors import RangeError
from refquant.quant.affine import QSpec, fake_quantize
from refquant.quant.observers import histogram, kl, minmax

SYMMETRIC = QSpec(4, signed=True, symmetric=True)


def reach(q):
    return round(float(q.scale) * q.spec.qmax, 4)  # float32 does not hold 64 / 7


def test_histogram_drops_the_outlier():
    x = np.append(np.linspace(-1, 1, 10_000), 64.0)  # one of 10,001 is less than the 0.0004 that may be lost
    assert reach(minmax(x, SYMMETRIC)) == 64
    assert reach(histogram(x, SYMMETRIC)) == 2  # the middle of the first of 16 bins of 4
    assert reach(histogram(x, SYMMETRIC, coverage=1.0)) == 62  # the middle of the last


def test_histogram_counts_both_signs_and_the_released_one_does_not():
    x = np.append(np.linspace(-64, 0, 1000), np.linspace(0, 4, 1000))
    assert reach(histogram(x, SYMMETRIC)) == 62
    assert reach(histogram(x, SYMMETRIC, released=True)) == 6  # 4 lies in the second bin of the positive values


def test_released_histogram_has_nothing_to_count_in_negative_tensors():
    x = -np.linspace(1, 4, 100)  # the authors' code raises TypeError here
    q, whole = histogram(x, QSpec(4), released=True), minmax(x, QSpec(4))
    assert (q.scale, q.zero_point) == (whole.scale, whole.zero_point)


@pytest.mark.parametrize("coverage", [0.0, -1.0, 1.5, np.nan])
def test_coverage(coverage):
    with pytest.raises(RangeError, match="share of the values"):
        histogram([1.0], QSpec(), coverage=coverage)


def test_kl_clips_heavy_tails_and_keeps_a_flat_distribution():
    rng = np.random.default_rng(0)
    tails, flat = rng.standard_t(3, 16384), rng.uniform(-1, 1, 16384)
    whole, kept = minmax(tails, QSpec(4)), kl(tails, QSpec(4))
    assert kept.scale < 0.8 * whole.scale
    assert np.mean((fake_quantize(tails, kept) - tails) ** 2) < np.mean((fake_quantize(tails, whole) - tails) ** 2)
    assert kl(flat, QSpec(4)).scale == minmax(flat, QSpec(4)).scale


def test_released_kl_clips_by_an_accident_of_rounding():
    """Its divergence of "clip nothing" would be 0 if both histograms of x were made alike; see the module."""
    x = np.random.default_rng(0).standard_normal(8192).astype(np.float32)
    assert 0.8 < kl(x, QSpec(8), released=True).scale / minmax(x, QSpec(8)).scale < 0.97
    in_32, edges_32 = np.histogram(x, 256, density=True)
    in_64, edges_64 = np.histogram(x.astype(np.float64), 256, density=True)
    assert 0 < np.abs(edges_32 - edges_64).max() < 1e-6  # the edges differ by a rounding, and that is all


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("x", [0.0, 0.5, -0.5, [0.0] * 5, [0.5] * 5, [2.0**-149], [1e30, 1e30]])
def test_constants_are_not_clipped_by_kl(x, released):
    q, whole = kl(x, QSpec(8), released=released), minmax(x, QSpec(8))
    assert (q.scale, q.zero_point) == (whole.scale, whole.zero_point)


def test_released_kl_without_room_for_its_bins():
    x = np.float32([1, np.nextafter(np.float32(1), np.float32(2))])  # one rounding wide, 256 bins
    assert kl(x, QSpec(8), released=True).scale == minmax(x, QSpec(8)).scale
