"""The observers family: ranges, the searches for one, and batches against their concatenation."""

import laws
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import floats32, qspecs, tensors

from refquant.errors import RangeError
from refquant.quant.affine import QParams, QSpec, fake_quantize, quantize
from refquant.quant.observers import RangeObserver, RunningRange, from_range, histogram, kl, minmax, mse, percentile


def kl_released(x, spec):
    return kl(x, spec, released=True)


def histogram_released(x, spec):
    return histogram(x, spec, released=True)


OBSERVERS = pytest.mark.parametrize("observer", [minmax, mse, percentile, kl, histogram])
RELEASED = pytest.mark.parametrize("observer", [kl_released, histogram_released])


def error(x, q, power=2.4):
    """Mean |fq(x) - x|**power, the score of the search."""
    return np.mean(np.abs(fake_quantize(x, q) - x).astype(np.float64) ** power)


def same(a, b):
    np.testing.assert_array_equal(a.scale, b.scale)
    np.testing.assert_array_equal(a.zero_point, b.zero_point)


@OBSERVERS
@given(x=tensors(), spec=qspecs())
def test_zero_has_a_code(observer, x, spec):
    """qmin <= z <= qmax, hence dq(q(0)) = 0, whatever the data."""
    q = observer(x, spec)
    assert q.zero_is_exact
    laws.zero_is_exact((np.asarray(x), q))


@given(tensors(), qspecs())
def test_minmax_clips_nothing(x, spec):
    """|x - fq(x)| <= s (1/2 + 2**-15) for all x, where spec has codes for the sign of x.

    Asymmetric: the ends of the range are off the grid by the rounding of z, at most another s/2.
    """
    if spec.symmetric and not spec.signed:
        x = np.abs(x)
    q = minmax(x, spec)
    slack = 0.5 if spec.symmetric else 1.0
    assert (np.abs(fake_quantize(x, q) - x.astype(np.float64)) <= float(q.scale) * (slack + 2.0**-15)).all()


@given(tensors(), qspecs(), st.sampled_from([2.0, 2.4]))
def test_mse_is_never_worse_than_minmax(x, spec, power):
    """err(mse(x)) <= err(minmax(x)): r = 1 is among the candidates. 1e-12 is for the order of the sum."""
    best, whole = error(x, mse(x, spec, power=power), power), error(x, minmax(x, spec), power)
    assert best <= whole * (1 + 1e-12)


@given(tensors(), qspecs())
def test_percentile_100_is_minmax(x, spec):
    """The 0th and the 100th percentile are the extremes."""
    same(percentile(x, spec, 100), minmax(x, spec))


@pytest.mark.parametrize("observer", [mse, percentile, kl, histogram, kl_released, histogram_released])
@given(x=tensors(), spec=qspecs())
def test_searches_only_shrink_the_range(observer, x, spec):
    """s(search x) <= s(minmax x), up to a rounding of the range's ends."""
    assert observer(x, spec).scale <= minmax(x, spec).scale * (1 + 2e-7)


@RELEASED
@given(x=tensors(), spec=qspecs())
def test_released_histograms_are_defined(observer, x, spec):
    """A quantizer in which 0 has a code comes out, also of constants, zeros, subnormals and single elements."""
    assert observer(x, spec).zero_is_exact


@given(tensors(limit=2.0**20), st.integers(2, 8), st.sampled_from([0.5, 0.9, 0.9996, 1.0]))
def test_histogram_keeps_its_share(x, bits, coverage):
    """#{|x| <= c + max|x| / 2L} >= share * n: c is the middle of the bin in which the share is reached."""
    q = histogram(x, QSpec(bits, signed=True, symmetric=True), coverage=coverage)
    size = np.abs(x.astype(np.float64))
    reach = (float(q.scale) * q.spec.qmax + size.max() / 2 ** (bits + 1)) * (1 + 1e-6)  # c as float32 has it
    assert (size <= reach).sum() >= coverage * x.size * (1 - 1e-9)


@given(tensors(), qspecs(), st.integers(1, 40), st.sampled_from([0.0, 0.9, 0.95]))
def test_running_range_of_equal_batches_is_their_range(x, spec, n, momentum):
    """lo <- m lo + (1 - m) lo: the range itself, up to n roundings of 2**-24."""
    running = RunningRange(momentum=momentum)
    for _ in range(n):
        running.update(x)
    lo, hi = running.range()
    np.testing.assert_allclose([lo, hi], [x.min(), x.max()], rtol=n * 2.0**-22, atol=n * 2.0**-148)


@given(st.lists(tensors(shape=(3,), limit=1e6), min_size=1, max_size=6), st.sampled_from([0.0, 0.9, 0.95]))
def test_running_range_weighs_batches_exponentially(batches, momentum):
    """lo = m**n lo_0 + sum_k (1 - m) m**(n-k) lo_k: in float64, to float32's rounding."""
    running = RunningRange(momentum=momentum)
    for batch in batches:
        running.update(batch)
    n = len(batches) - 1
    weights = [momentum**n, *((1 - momentum) * momentum ** (n - k) for k in range(1, n + 1))]
    for got, ends in zip(running.range(), (np.min, np.max), strict=True):
        values = np.array([ends(b) for b in batches], dtype=np.float64)
        np.testing.assert_allclose(got, np.dot(weights, values), rtol=1e-5, atol=1e-5 * np.abs(values).max() + 1e-37)


@given(tensors(), qspecs())
def test_mse_equals_the_released_search_where_zero_is_inside(x, spec):
    """min x <= 0 <= max x: widening changes nothing."""
    assume(x.min() <= 0 <= x.max())
    same(mse(x, spec), mse(x, spec, zero_in_range=False))


@OBSERVERS
@given(x=tensors(shape=hnp.array_shapes(min_dims=2, max_dims=4, max_side=5)), data=st.data())
def test_channels_are_observed_each_by_itself(observer, x, data):
    """obs(x; axis)[c] = obs(x[c])."""
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    spec = data.draw(qspecs(axis))
    q = observer(x, spec)
    alone = QSpec(spec.bits, spec.signed, spec.symmetric)
    parts = [observer(part, alone) for part in np.moveaxis(x, axis, 0)]
    same(q, QParams([p.scale for p in parts], [p.zero_point for p in parts], spec))


@OBSERVERS
@given(x=tensors(limit=2.0**20), spec=qspecs(), k=st.integers(-8, 8))
def test_scaling_by_powers_of_two(observer, x, spec, k):
    """obs(2**k x) = (2**k s, z) and the codes are the same, above the floor of 1e-8."""
    x = np.where(np.abs(x) < 2.0**-60, np.float32(0), x)
    q, scaled = observer(x, spec), observer(np.ldexp(x, k), spec)
    assume(min(q.scale, scaled.scale) > 1e-7)
    same(scaled, QParams(np.ldexp(q.scale, k), q.zero_point, spec))
    np.testing.assert_array_equal(quantize(np.ldexp(x, k), scaled), quantize(x, q))


@given(st.lists(tensors(shape=(2, 3)), min_size=1, max_size=4), qspecs(), st.sampled_from([None, 1]))
def test_batches_are_one_run_over_their_concatenation(batches, spec, axis):
    """obs(x1), obs(x2) merged = obs(x1 ++ x2), for both estimators while the sample holds all values."""
    spec = QSpec(spec.bits, spec.signed, spec.symmetric, axis)
    observer = RangeObserver(axis)
    for batch in batches:
        observer.update(batch)
    whole = np.concatenate(batches)
    same(observer.minmax(spec), minmax(whole, spec))
    same(observer.mse(spec), mse(whole, spec))


@given(tensors(shape=(40,)), st.integers(1, 39), qspecs())
def test_the_cut_into_batches_does_not_matter(x, cut, spec):
    """The sample of (x[:k], x[k:]) = the sample of x, also when it drops values."""
    once, twice = RangeObserver(sample_size=7, seed=3), RangeObserver(sample_size=7, seed=3)
    once.update(x)
    twice.update(x[:cut])
    twice.update(x[cut:])
    same(once.minmax(spec), twice.minmax(spec))
    same(once.mse(spec), twice.mse(spec))


@OBSERVERS
@given(x=tensors(), bad=st.sampled_from([np.nan, np.inf, -np.inf]), spec=qspecs())
def test_a_range_has_two_finite_ends(observer, x, bad, spec):
    """NaN and +-inf anywhere raise."""
    poisoned = np.array(x)
    poisoned.flat[x.size // 2] = bad
    with pytest.raises(RangeError, match="NaN" if np.isnan(bad) else "infinity"):
        observer(poisoned, spec)


@OBSERVERS
@given(c=floats32(), shape=st.sampled_from([(), (1,), (3, 2)]), spec=qspecs())
def test_constants_and_single_elements(observer, c, shape, spec):
    """|fq(c) - c| <= the min-max step for a constant c; c = 0 gives scale 1e-8 with 0 on the lowest code."""
    q = observer(np.full(shape, c, dtype=np.float32), spec)
    if c == 0:
        same(q, QParams(1e-8, 0 if spec.symmetric else spec.qmin, spec))
    elif not (spec.symmetric and not spec.signed and c < 0):  # always_zero has no negative codes
        assert abs(float(fake_quantize(c, q)) - c) <= float(from_range(c, c, spec).scale)
