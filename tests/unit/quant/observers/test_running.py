"""The running range by hand, and the order in which the released recipe shows it the samples."""

import numpy as np
import pytest

from refquant.errors import RangeError, ShapeError
from refquant.quant.affine import QSpec
from refquant.quant.observers import RunningRange
from refquant.quant.observers.running import released_batches


def test_by_hand():
    running = RunningRange(momentum=0.75)
    running.update([-4.0, 0.0, 8.0])
    running.update([[-8.0], [4.0]])
    assert running.range() == (-5.0, 7.0)  # 3/4 (-4) + 1/4 (-8), 3/4 8 + 1/4 4
    assert running.minmax(QSpec(bits=2)).scale == 4.0


def test_channels():
    running = RunningRange(axis=1, momentum=0.5)
    running.update([[0.0, 4.0], [2.0, -4.0]])
    running.update([[0.0, 0.0]])
    lo, hi = running.range()
    assert (lo.tolist(), hi.tolist()) == ([0.0, -2.0], [1.0, 2.0])
    assert running.minmax(QSpec(bits=2, axis=1)).scale.shape == (2,)
    with pytest.raises(ShapeError, match="3 channels along axis 1 after batches with 2"):
        running.update(np.zeros((1, 3)))
    with pytest.raises(ShapeError, match="same axis"):
        running.minmax(QSpec())


def test_ranges_that_a_search_found_are_averaged_like_batches():
    by_range, by_batch = RunningRange(momentum=0.9), RunningRange(momentum=0.9)
    for batch in ([-1.0, 2.0], [-3.0, 1.0]):
        by_batch.update(batch)
        by_range.update_range(min(batch), max(batch))
    assert by_range.range() == by_batch.range()


@pytest.mark.parametrize("ends", [(1.0, 0.0), (np.nan, 1.0), (0.0, np.inf), ([0.0, 0.0], [1.0])])
def test_update_range_refuses(ends):
    running = RunningRange()
    with pytest.raises(RangeError, match="two finite ends"):
        running.update_range(*ends)
    with pytest.raises(RangeError, match="no batch yet"):
        running.range()


def test_a_bad_batch_leaves_the_average_as_it_was():
    running = RunningRange()
    running.update([-1.0, 1.0])
    for bad, why in (([5.0, np.nan], "NaN"), ([5.0, np.inf], "infinity"), ([], "empty")):
        with pytest.raises(RangeError, match=why):
            running.update(bad)
    assert running.range() == (-1.0, 1.0)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, np.nan])
def test_momentum(momentum):
    with pytest.raises(RangeError, match="weight of the past"):
        RunningRange(momentum=momentum)


@pytest.mark.parametrize(("samples", "sizes"), [(256, [16] * 17), (40, [16, 16, 16, 8]), (5, [5, 5]), (1, [1, 1])])
def test_released_batches(samples, sizes):
    first, *rest = released_batches(samples, np.random.default_rng(0))
    assert [len(b) for b in (first, *rest)] == sizes
    assert len(set(first)) == len(first)  # drawn without repetition
    assert sorted(np.concatenate(rest)) == list(range(samples))  # every sample once
    if samples > 16:
        assert rest[0].tolist() != sorted(rest[0])


def test_sixteen_random_samples_weigh_44_percent():
    """Of 256 samples at -1 .. 1, the first batch alone reaches 10: (1 + 9 * 0.95**16) remains of it."""
    running, past = RunningRange(), 0.95**16
    running.update([-10.0, 10.0])
    for _ in range(16):
        running.update([-1.0, 1.0])
    assert round(past, 2) == 0.44
    np.testing.assert_allclose(running.range(), [-1 - 9 * past, 1 + 9 * past], rtol=1e-6)


def test_released_batches_refuses_nothing():
    with pytest.raises(RangeError, match="at least one of each"):
        next(released_batches(0, np.random.default_rng(0)))
