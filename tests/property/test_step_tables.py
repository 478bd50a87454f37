"""The step table: one range for each step of the sampler, looked up by the step and by nothing else."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import qspecs, tensors

from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.sampling import NoiseSource, timestep_sequence
from refquant.diffusion.schedule import linear
from refquant.errors import RangeError, ShapeError
from refquant.quant.affine import QSpec
from refquant.quant.observers import StepRanges, StepTable, minmax
from refquant.quant.observers.steps import released_table

batches_of_a_step = st.lists(tensors(shape=(3,)), min_size=1, max_size=3)
runs = st.integers(1, 5).flatmap(lambda steps: st.lists(batches_of_a_step, min_size=steps, max_size=steps))


def same(a, b):
    np.testing.assert_array_equal(a.scale, b.scale)
    np.testing.assert_array_equal(a.zero_point, b.zero_point)


def ranges_of(run):
    """StepRanges that saw run[step] at each step."""
    ranges = StepRanges(len(run))
    for step, batches in enumerate(run):
        for batch in batches:
            ranges.update(step, batch)
    return ranges


@given(runs, qspecs())
def test_each_step_has_its_own_range(run, spec):
    """table[k] = minmax(everything seen at k), and the shared one = minmax(everything)."""
    ranges = ranges_of(run)
    table = ranges.table(spec)
    assert len(table) == len(run)
    for step, batches in enumerate(run):
        same(table[step], minmax(np.concatenate(batches), spec))
    same(ranges.shared(spec), minmax(np.concatenate([b for batches in run for b in batches]), spec))


@given(runs, st.data(), qspecs())
def test_merging_is_concatenation(run, data, spec):
    """ranges(x) merged with ranges(y) = ranges(x ++ y) at every step, in either order."""
    other = [data.draw(batches_of_a_step) for _ in run]
    both = ranges_of([a + b for a, b in zip(run, other, strict=True)]).table(spec)
    a, b = ranges_of(run), ranges_of(other)
    same(a.merged(b).table(spec), both)
    same(b.merged(a).table(spec), both)


@given(runs, qspecs())
def test_arrays_bring_it_back(run, spec):
    """StepTable(**t.arrays(), spec) = t, and = the table of its own entries."""
    table = ranges_of(run).table(spec)
    same(StepTable(**table.arrays(), spec=spec), table)
    same(StepTable.of([table[k] for k in range(len(table))]), table)


@given(st.lists(tensors(shape=(4,), limit=2.0**100), min_size=1, max_size=4), st.integers(1, 40), qspecs())
def test_released_recipe_is_exact_where_all_samples_agree(values, samples, spec):
    """Layers that see t alone: every batch has the range of the step, hence so has their average.

    Scales to 24 roundings of float32 (16 of them in the average of 40 samples are 4); zero points to 1.
    """
    table = released_table([np.stack([v] * samples) for v in values], spec, np.random.default_rng(0))
    exact = StepTable.of([minmax(v, spec) for v in values])
    np.testing.assert_allclose(table.scale, exact.scale, rtol=24 * 2.0**-24)
    assert np.abs(table.zero_point.astype(int) - exact.zero_point).max() <= 1


# ------------------------------------------------------------- a table indexed by t, and the law that catches it


class ByTimestep:
    """The mutant: remembers the range of a time-step. The quadratic schedule visits some of them repeatedly."""

    def __init__(self, sequence):
        self.sequence = sequence
        self.by_t = StepRanges(max(sequence) + 1)

    def update(self, step, x):
        self.by_t.update(self.sequence[step], x)

    def lookup(self, spec):
        seen = np.flatnonzero(self.by_t.lo <= self.by_t.hi)
        table = StepRanges(len(seen))
        table.lo, table.hi = self.by_t.lo[seen], self.by_t.hi[seen]
        quantizers = dict(zip(seen, (table.table(spec)[i] for i in range(len(seen))), strict=True))
        return lambda step: quantizers[self.sequence[step]]


class ByStep:
    """The library's table behind the same three calls."""

    def __init__(self, sequence):
        self.ranges = StepRanges(len(sequence))
        self.update = self.ranges.update

    def lookup(self, spec):
        return self.ranges.table(spec).__getitem__


def steps_keep_their_ranges(table, spacing, seed, steps=100):
    """What was recorded at step k is looked up at step k: table[k] = minmax(x_k), for any x_k."""
    watched = table(timestep_sequence(1000, steps, spacing))
    recordings = np.random.default_rng(seed).standard_normal((steps, 8)).astype(np.float32)
    for step, x in enumerate(recordings):
        watched.update(step, x)
    lookup = watched.lookup(QSpec())
    for step, x in enumerate(recordings):
        same(lookup(step), minmax(x, QSpec()))


@settings(max_examples=10)
@given(st.sampled_from(["uniform", "quadratic"]), st.integers(0, 1000))
def test_steps_keep_their_ranges(spacing, seed):
    steps_keep_their_ranges(ByStep, spacing, seed)


def test_a_table_indexed_by_t_is_caught_on_the_quadratic_schedule():
    steps_keep_their_ranges(ByTimestep, "uniform", seed=0)  # where every t comes once, nobody would notice
    with pytest.raises(AssertionError):
        steps_keep_their_ranges(ByTimestep, "quadratic", seed=0)


def test_ddim_stands_still_between_equal_time_steps():
    """Why the slip above is easily missed: a DDIM step from t to t moves x by rounding only, whatever eta is.

    So the exact ranges of the repeated steps are alike. Running ranges, which start from other random samples at
    each step, and samplers that remember earlier steps are not so kind.
    """
    seen = []

    def eps(x, t, step):
        seen.append((t, x))
        return np.tanh(x) * np.float32(0.5)

    noise = NoiseSource(0, 2, (1, 2, 2))
    ddim_sample(eps, noise.draw(), linear(), noise, steps=100, eta=1.0, spacing="quadratic", clip=False)
    still = [(x, y) for (t, x), (u, y) in pairwise(seen) if t == u]
    assert len(still) == 100 - 96
    for x, y in still:
        np.testing.assert_allclose(y, x, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- errors


@given(st.integers(1, 6), st.integers(-10, 16))
def test_steps_out_of_range(steps, step):
    """0 <= step < S or RangeError: no wrapping around, and no t in place of a step."""
    ranges = StepRanges(steps)
    for k in range(steps):
        ranges.update(k, [-1.0, 1.0])
    table = ranges.table(QSpec())
    if 0 <= step < steps:
        assert table[np.int64(step)].scale == table[step].scale
        return
    for call in (lambda: table[step], lambda: ranges.update(step, [0.0])):
        with pytest.raises(RangeError, match="index by step, not by t"):
            call()


@given(tensors(), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_bad_values_leave_the_ranges_as_they_were(x, bad):
    ranges = StepRanges(1)
    ranges.update(0, x)
    poisoned = np.array(x)
    poisoned.flat[0] = bad
    for batch, why in ((poisoned, "NaN" if np.isnan(bad) else "infinity"), (np.zeros((0, 3)), "empty")):
        with pytest.raises(RangeError, match=why):
            ranges.update(0, batch)
    same(ranges.table(QSpec())[0], minmax(x, QSpec()))


@given(st.integers(1, 5), st.integers(1, 5))
def test_runs_of_different_samplers_do_not_merge(a, b):
    if a != b:
        with pytest.raises(ShapeError, match="no common steps"):
            StepRanges(a).merged(StepRanges(b))
