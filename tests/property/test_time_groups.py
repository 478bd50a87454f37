"""Time groups: a partition of the steps into equal runs, and tables between one range and a range a step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import assert_killed
from strategies import qspecs, tensors

from refquant.errors import RangeError, ShapeError
from refquant.quant.affine import QSpec
from refquant.quant.observers import StepRanges, TimeGroups, minmax

groups = st.integers(1, 60).flatmap(lambda s: st.builds(TimeGroups, st.just(s), st.integers(1, s)))


@st.composite
def recordings(draw):
    """(groups, one array a step, spec)."""
    steps = draw(st.integers(1, 6))
    xs = [draw(tensors(shape=(3,))) for _ in range(steps)]
    return TimeGroups(steps, draw(st.integers(1, steps))), xs, draw(qspecs())


def ranges_of(xs):
    ranges = StepRanges(len(xs))
    for step, x in enumerate(xs):
        ranges.update(step, x)
    return ranges


def same(a, b):
    np.testing.assert_array_equal(a.scale, b.scale)
    np.testing.assert_array_equal(a.zero_point, b.zero_point)


def steps_are_partitioned(g):
    """Each step is in exactly one group, groups are runs in order, and their sizes differ by one at most."""
    members = [list(g.members(i)) for i in range(g.count)]
    assert sum(members, []) == list(range(g.steps))
    sizes = [len(m) for m in members]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    for i, m in enumerate(members):
        assert all(g.of(step) == i for step in m)
    assert g.repeated(list(range(g.count))) == g.index.tolist() == [g.of(step) for step in range(g.steps)]


def a_group_has_the_range_of_its_steps(case):
    """table[k] = minmax(everything that any step of k's group saw)."""
    g, xs, spec = case
    table = g.table(ranges_of(xs), spec)
    assert len(table) == g.steps
    for step in range(g.steps):
        same(table[step], minmax(np.concatenate([xs[i] for i in g.members(g.of(step))]), spec))


@given(groups)
def test_steps_are_partitioned(g):
    steps_are_partitioned(g)


@given(recordings())
def test_a_group_has_the_range_of_its_steps(case):
    a_group_has_the_range_of_its_steps(case)


@given(recordings())
def test_one_group_is_the_plain_quantizer_and_a_group_a_step_is_fsc(case):
    """G = 1: every row is the shared range's. G = S: the table is finite set calibration's."""
    g, xs, spec = case
    ranges = ranges_of(xs)
    one = TimeGroups(g.steps, 1).table(ranges, spec)
    for step in range(g.steps):
        same(one[step], ranges.shared(spec))
    same(TimeGroups(g.steps, g.steps).table(ranges, spec), ranges.table(spec))


@given(groups, st.data())
def test_samples_are_those_of_the_group(g, data):
    step = np.array(data.draw(st.lists(st.integers(0, g.steps - 1), min_size=1, max_size=20)))
    for i, rows in enumerate(g.samples(step)):
        assert rows.tolist() == [n for n, s in enumerate(step) if g.of(s) == i]


@pytest.mark.parametrize(
    "index",
    [
        lambda g: np.arange(g.steps) % g.count,  # interleaved, not contiguous
        lambda g: np.minimum(np.arange(g.steps) // max(1, g.steps // g.count), g.count - 1),  # the rest in the last
        lambda g: np.arange(g.steps) * g.count // max(g.steps - 1, 1),  # one off at the end
    ],
)
def test_other_cuts_are_caught(index, monkeypatch):
    monkeypatch.setattr(TimeGroups, "index", property(index))
    monkeypatch.setattr(TimeGroups, "of", lambda g, step: int(g.index[step]))
    assert_killed(steps_are_partitioned, groups)


def test_a_group_that_looks_at_its_first_step_only_is_caught(monkeypatch):
    def first_only(self, ranges, spec):
        first = StepRanges(self.steps)
        for i in range(self.count):
            m = self.members(i)
            first.lo[m.start : m.stop], first.hi[m.start : m.stop] = ranges.lo[m.start], ranges.hi[m.start]
        return first.table(spec)

    monkeypatch.setattr(TimeGroups, "table", first_only)
    assert_killed(a_group_has_the_range_of_its_steps, recordings())


@pytest.mark.parametrize("given_", [(5, 0), (5, 6), (0, 0), (5, -1)])
def test_impossible_groups(given_):
    with pytest.raises(RangeError, match="one range for all"):
        TimeGroups(*given_)


def test_other_errors():
    g = TimeGroups(4, 2)
    with pytest.raises(RangeError, match="group 2 of 2"):
        g.members(2)
    with pytest.raises(RangeError, match="index by step, not by t"):
        g.of(4)
    with pytest.raises(ShapeError, match="3 values for 2 groups"):
        g.repeated([1, 2, 3])
    with pytest.raises(ShapeError, match="record the same sampler"):
        g.table(StepRanges(5), QSpec())
