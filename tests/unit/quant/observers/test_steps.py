"""The table of steps by hand: what it holds, what it refuses, and what it is good for."""

import numpy as np
import pytest

from refquant.errors import RangeError, ShapeError
from refquant.quant.affine import QParams, QSpec, fake_quantize
from refquant.quant.observers import StepRanges, StepTable, minmax
from refquant.quant.observers.steps import released_table

SPEC = QSpec(bits=2)


def filled(*ranges):
    out = StepRanges(len(ranges))
    for step, ends in enumerate(ranges):
        out.update(step, ends)
    return out


def test_by_hand():
    ranges = filled([-1.0, 2.0], [0.0, 6.0], [3.0])
    table = ranges.table(SPEC)
    assert table.scale.tolist() == [1.0, 2.0, 1.0]
    assert table.zero_point.tolist() == [1, 0, 0]
    assert (table[1].scale, table[1].zero_point, table[1].spec) == (2.0, 0, SPEC)
    shared = ranges.shared(SPEC)
    assert (shared.scale, shared.zero_point) == (np.float32(7 / 3), 0)


def test_a_table_is_worth_its_numbers():
    """Ranges from 8 to 1/8 over four steps: the error of the shared scale is the widest step's, everywhere."""
    rng = np.random.default_rng(0)
    recordings = [rng.uniform(-1, 1, 1000) * 2.0**k for k in (3, 1, -1, -3)]
    ranges = filled(*recordings)
    table, shared = ranges.table(QSpec(4)), ranges.shared(QSpec(4))

    def error(x, q):
        return np.mean((fake_quantize(x, q) - x) ** 2)

    own, common = zip(*((error(x, table[k]), error(x, shared)) for k, x in enumerate(recordings)), strict=True)
    assert np.all(np.array(own[1:]) < np.array(common[1:]) / 8)
    assert own[0] == common[0]


def test_released_table_is_that_of_a_running_range():
    """Of 40 samples 0 .. 39, one a batch would be exact; batches of 16 average their extremes, which clips."""
    x = np.arange(40.0).reshape(40, 1)
    table = released_table([x, x - 39], SPEC, np.random.default_rng(0))
    whole = minmax(x, SPEC).scale
    assert 0.8 * whole < table.scale[0] < whole
    assert table.zero_point.tolist() == [0, 3]
    again = released_table([x, x - 39], SPEC, np.random.default_rng(0))
    other = released_table([x, x - 39], SPEC, np.random.default_rng(1))
    assert (table.scale == again.scale).all()
    assert (table.scale != other.scale).any()  # it depends on which samples were drawn


def test_what_a_table_refuses():
    with pytest.raises(ShapeError, match="one scale for the tensor"):
        StepTable(np.ones(2), np.zeros(2), QSpec(axis=0))
    with pytest.raises(ShapeError, match="scale"):
        StepTable(np.ones(2), np.zeros(3), SPEC)
    with pytest.raises(ShapeError, match="scale"):
        StepTable(np.float32(1), np.int32(0), SPEC)
    with pytest.raises(RangeError, match="0 steps"):
        StepTable(np.ones(0), np.zeros(0), SPEC)
    with pytest.raises(RangeError, match="no positive normal"):
        StepTable(np.array([1.0, np.nan]), np.zeros(2), SPEC)
    with pytest.raises(ShapeError, match="2 different"):
        StepTable.of([QParams(1, 0, SPEC), QParams(1, 0, QSpec(bits=3))])
    with pytest.raises(ShapeError, match="0 different"):
        StepTable.of([])
    with pytest.raises(TypeError):
        StepTable(np.ones(2), np.zeros(2), SPEC)[0.5]


def test_a_table_is_immutable_and_owns_its_arrays():
    scale = np.ones(2, dtype=np.float32)
    table = StepTable(scale, np.zeros(2, dtype=np.int32), SPEC)
    scale[0] = 7
    assert table[0].scale == 1
    with pytest.raises(ValueError, match="read-only"):
        table.scale[0] = 7


def test_what_ranges_refuse():
    with pytest.raises(RangeError, match="at least one step"):
        StepRanges(0)
    ranges = StepRanges(3)
    with pytest.raises(RangeError, match="no step has data"):
        ranges.shared(SPEC)
    ranges.update(1, [0.0, 1.0])
    with pytest.raises(RangeError, match="2 of 3 steps have no data, the first is step 0"):
        ranges.table(SPEC)
    assert ranges.shared(SPEC).scale == np.float32(1 / 3)
