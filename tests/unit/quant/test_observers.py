"""Observers by hand: the three formulas, degenerate tensors, the released search, batches, errors."""

import numpy as np
import pytest

from refquant.errors import RangeError, ShapeError
from refquant.quant.affine import QSpec, fake_quantize
from refquant.quant.observers import RangeObserver, from_range, minmax, mse, search

ASYMMETRIC, SYMMETRIC, ALWAYS_ZERO = QSpec(4), QSpec(4, signed=True, symmetric=True), QSpec(4, symmetric=True)


@pytest.mark.parametrize(
    ("spec", "lo", "hi", "scale", "zero_point"),
    [
        (ASYMMETRIC, -1.5, 6.0, 0.5, 3),
        (ASYMMETRIC, 1.0, 7.5, 0.5, 0),  # widened to [0, 7.5]
        (ASYMMETRIC, -7.5, -1.0, 0.5, 15),  # widened to [-7.5, 0]
        (QSpec(4, signed=True), -1.5, 6.0, 0.5, -5),
        (SYMMETRIC, -1.5, 3.5, 0.5, 0),  # 2 * 3.5 / 14
        (SYMMETRIC, -3.5, 1.0, 0.5, 0),
        (ALWAYS_ZERO, 0.0, 7.5, 0.5, 0),
        (ALWAYS_ZERO, -9.0, 7.5, 0.5, 0),  # negative numbers have no code
        (ASYMMETRIC, 0.0, 0.0, 1e-8, 0),
        (ASYMMETRIC, -1e-12, 1e-12, 1e-8, 0),
    ],
)
def test_from_range_by_hand(spec, lo, hi, scale, zero_point):
    q = from_range(lo, hi, spec)
    assert (q.scale, q.zero_point) == (np.float32(scale), zero_point)
    x = minmax([hi, lo], spec)
    assert (x.scale, x.zero_point) == (q.scale, q.zero_point)


@pytest.mark.parametrize(("lo", "hi"), [(1.0, 0.0), (np.nan, 1.0), (0.0, np.inf), (-np.inf, 0.0)])
def test_from_range_refuses(lo, hi):
    with pytest.raises(RangeError, match="two finite ends"):
        from_range(lo, hi, ASYMMETRIC)


def test_from_range_wants_a_range_for_each_channel():
    assert from_range([-1, 0], [1, 2], QSpec(4, axis=0)).scale.shape == (2,)
    with pytest.raises(ShapeError):
        from_range([-1, 0], [1, 2], QSpec(4))


def test_mse_clips_an_outlier_where_that_pays():
    x = np.append(np.linspace(-1, 1, 2000), 1.6).astype(np.float32)
    whole, best = minmax(x, ASYMMETRIC), mse(x, ASYMMETRIC)
    assert best.scale < whole.scale
    assert np.abs(fake_quantize(x, best) - x).mean() < np.abs(fake_quantize(x, whole) - x).mean()


def test_first_of_equal_candidates_wins():
    x = np.float32([0.0, 0.0, 15.0])  # r = 1 has no error at all, so nothing can be better
    assert mse(x, ASYMMETRIC).scale == 1.0


def test_released_search_on_one_sign_leaves_zero_without_a_code():
    x = np.linspace(2.0, 3.0, 100, dtype=np.float32)
    released, ours = mse(x, ASYMMETRIC, zero_in_range=False), mse(x, ASYMMETRIC)
    assert not released.zero_is_exact
    assert released.zero_point == -30  # -2 / (1 / 15), at r = 1
    assert ours.zero_is_exact
    assert np.abs(fake_quantize(x, released) - x).max() < np.abs(fake_quantize(x, ours) - x).max()


def test_released_search_on_a_constant_is_an_error():
    with pytest.raises(RangeError, match="let it contain 0"):  # the authors' code raises TypeError here
        mse(np.full(4, 0.5), QSpec(8), zero_in_range=False)


@pytest.mark.parametrize("observer", [minmax, mse])
def test_inputs_that_have_no_range(observer):
    with pytest.raises(RangeError, match="empty"):
        observer(np.zeros((0, 3)), ASYMMETRIC)
    with pytest.raises(RangeError, match="contains NaN"):
        observer([np.inf, np.nan], ASYMMETRIC)
    with pytest.raises(RangeError, match="infinity"):
        observer([0.0, 1e300], ASYMMETRIC)
    with pytest.raises(ShapeError, match="no axis 2"):
        observer(np.zeros((3, 3)), QSpec(4, axis=2))


def test_blocks_do_not_change_the_search(monkeypatch):
    x = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    spec = QSpec(4, axis=0)
    whole = mse(x, spec)
    monkeypatch.setattr(search, "BLOCK", 64)
    np.testing.assert_array_equal(mse(x, spec).scale, whole.scale)


def test_observer_keeps_a_bounded_uniform_sample():
    observer = RangeObserver(axis=1, sample_size=200, seed=1)
    for start in range(0, 10_000, 1000):
        column = np.arange(start, start + 1000, dtype=np.float32)
        observer.update(np.stack([column, -column], axis=1))
    assert observer.sample.shape == (2, 100)
    np.testing.assert_array_equal(observer.sample[0], -observer._sample[1])  # whole positions are kept
    assert np.all(np.diff(observer.sample[0]) > 0)  # in order of arrival, without repetition
    # mean of 100 uniform draws from 0..9999: 5000 +- 289, so 4 sigma
    assert abs(observer.sample[0].mean() - 5000) < 1160
    q = observer.minmax(QSpec(8, axis=1))
    np.testing.assert_allclose(q.scale, 9999 / 255, rtol=1e-6)
    assert q.zero_point.tolist() == [0, 255]


def test_observer_is_a_function_of_data_and_seed():
    x = np.random.default_rng(0).standard_normal(5000)
    samples = []
    for seed in (0, 0, 1):
        observer = RangeObserver(sample_size=50, seed=seed)
        observer.update(x)
        samples.append(observer.sample)
    np.testing.assert_array_equal(samples[0], samples[1])
    assert (samples[0] != samples[2]).any()


def test_observer_does_not_hold_on_to_the_callers_buffer():
    x = np.array([-1.0, 1.0], dtype=np.float32)
    observer = RangeObserver()
    observer.update(x)
    before = observer.mse(ASYMMETRIC).scale
    x[:] = 100
    assert observer.mse(ASYMMETRIC).scale == before
    assert observer.minmax(ASYMMETRIC).scale == np.float32(2 / 15)


def test_a_bad_batch_leaves_the_observer_as_it_was():
    observer = RangeObserver()
    observer.update([-1.0, 1.0])
    with pytest.raises(RangeError):
        observer.update([5.0, np.nan])
    assert observer.minmax(ASYMMETRIC).scale == np.float32(2 / 15)


def test_observer_says_what_is_missing():
    with pytest.raises(RangeError, match="no batch yet"):
        RangeObserver().minmax(ASYMMETRIC)
    range_only = RangeObserver(sample_size=0)
    range_only.update([1.0])
    assert range_only.minmax(ASYMMETRIC).scale == np.float32(1 / 15)
    with pytest.raises(RangeError, match="sample_size=0"):
        range_only.mse(ASYMMETRIC)
    with pytest.raises(ShapeError, match="same axis"):
        range_only.minmax(QSpec(4, axis=0))
    channels = RangeObserver(axis=0)
    channels.update(np.ones((3, 2)))
    with pytest.raises(ShapeError, match="4 channels along axis 0 after batches with 3"):
        channels.update(np.ones((4, 2)))
