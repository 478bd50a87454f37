"""The searches of the baselines: what their released arithmetic guarantees, and what it does not."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import floats32, tensors

from refquant.errors import RangeError
from refquant.quant.affine import QParams, QSpec, fake_quantize
from refquant.quant.observers import SHRINK, minmax, ptq4dm, qdiffusion

# Not so large that a range overflows float32, nor so small that a hundredth of one loses digits: both belong to
# the float64 arithmetic of `observers`, which the released float32 does not have.
usual = tensors(limit=2.0**60)
codes = st.builds(QSpec, st.integers(2, 5), st.booleans())


def error(x, q):
    return np.sum(np.abs(fake_quantize(x, q) - x).astype(np.float64) ** 2.4)


def same(a, b):
    np.testing.assert_array_equal(a.scale, b.scale)
    np.testing.assert_array_equal(a.zero_point, b.zero_point)


@given(usual, codes, st.booleans())
def test_ptq4dm_zero_has_a_code(x, spec, symmetric):
    """Zero points are clamped to the codes, whatever the range."""
    assert ptq4dm.search(x, spec, symmetric=symmetric).zero_is_exact


@given(usual, codes, st.booleans())
def test_ptq4dm_finds_the_least_error_of_all_candidates(x, spec, symmetric):
    """err(search x) = min of err over every candidate: dropping the losers early drops no winner."""
    q, top = ptq4dm.search(x, spec, symmetric=symmetric), np.float32(2**spec.bits - 1)
    row, sides = x.reshape(-1), ptq4dm.one_side(x)
    two_sided = sides == "no" and not symmetric
    lo, hi = ptq4dm._ranges_2d(row, top) if two_sided else ptq4dm._thresholds(row, sides)
    every = [error(x, ptq4dm.from_search_range(a, b, spec)) for a, b in zip(lo, hi, strict=True)]
    assert error(x, q) <= min(every) * (1 + 1e-9)


@given(tensors(shape=hnp.array_shapes(min_dims=2, max_dims=3, max_side=4), limit=2.0**60), codes, st.booleans())
def test_ptq4dm_channels_are_searched_each_by_itself(x, spec, symmetric):
    """search(x; axis)[c] = search(x[c]), where no channel has a sign that the tensor does not have."""
    sides = {ptq4dm.one_side(part) for part in x}
    assume(len(sides | {ptq4dm.one_side(x)}) == 1)
    q = ptq4dm.search(x, QSpec(spec.bits, spec.signed, axis=0), symmetric=symmetric)
    parts = [ptq4dm.search(part, spec, symmetric=symmetric) for part in x]
    same(q, QParams([p.scale for p in parts], [p.zero_point for p in parts], q.spec))


@given(usual, st.integers(2, 8), st.sampled_from(["asymmetric", "signed", "symmetric", "always_zero"]))
def test_qdiffusion_max_is_minmax_where_zero_is_inside(x, bits, kind):
    """min x <= 0 <= max x: one range, and steps alike to float32's rounding; zero points may differ at a tie."""
    x = np.where(np.abs(x) < 1e-20, np.float32(0), x)  # both have their floor of 1e-8, in different precisions
    assume(x.min() <= 0 <= x.max())
    if kind == "always_zero":
        x = np.abs(x)
        x.flat[0] = 0  # else the step is that of max - min
    spec = QSpec(bits, signed=kind in ("signed", "symmetric"), symmetric=kind in ("symmetric", "always_zero"))
    theirs, ours = qdiffusion.max_range(x, spec), minmax(x, spec)
    np.testing.assert_allclose(theirs.scale, ours.scale, rtol=2e-7)
    assert abs(int(theirs.zero_point) - int(ours.zero_point)) <= 1


@given(usual, st.integers(2, 8))
def test_qdiffusion_max_clips_the_smallest_value_off_the_top(x, bits):
    """All x > 0: the codes reach up to max x - min x, not to max x; the defect that min-max does not have."""
    x = np.abs(x) + np.float32(1e-3)
    assume(x.max() > x.min() * 1.01)
    q = qdiffusion.max_range(x, QSpec(bits))
    assert q.zero_point == 0
    np.testing.assert_allclose(fake_quantize(x, q).max(), float(x.max()) - x.min(), rtol=1e-5)


@given(usual, st.integers(2, 8))
def test_qdiffusion_mse_is_the_raw_range_or_better(x, bits):
    """The step is r (max - min)/(L-1) for one of the 80 r, and its error at most that of r = 1."""
    width = float(x.max()) - float(x.min())
    assume(width > 1e-6 * np.abs(x).max() and width > 1e-20)
    q, top = qdiffusion.mse(x, QSpec(bits)), np.float32(2**bits - 1)
    assert np.isclose(q.scale, SHRINK * width / top, rtol=1e-5).any()
    scale = (x.max() - x.min()) / top
    whole = QParams(scale, np.rint(-x.min() / scale), QSpec(bits))
    assert error(x, q) <= error(x, whole) * (1 + 1e-9)


@given(floats32(limit=2.0**60), st.integers(2, 8))
def test_constants(c, bits):
    """PTQ4DM's 1-D search represents a constant; Q-Diffusion's mse refuses it; its max is right for c >= 0 only up to
    the step 1e-8, which is the released result.
    """
    x = np.full(4, c, dtype=np.float32)
    q = ptq4dm.search(x, QSpec(bits))
    assert abs(float(fake_quantize(x, q)[0]) - c) <= max(1e-6 * abs(c), 1e-8)
    with pytest.raises(RangeError, match="returns nothing there"):
        qdiffusion.mse(x, QSpec(bits))
    if c >= 0:
        assert qdiffusion.max_range(x, QSpec(bits)).scale == np.float32(1e-8)


SEARCHES = {
    "ptq4dm-1d": lambda x, axis: ptq4dm.search(x, QSpec(4, axis=axis)),
    "ptq4dm-2d": lambda x, axis: ptq4dm.search(x, QSpec(4, axis=axis), symmetric=False),
    "qdiffusion-max": lambda x, axis: qdiffusion.max_range(x, QSpec(4, axis=axis)),
    "qdiffusion-mse": lambda x, axis: qdiffusion.mse(x, QSpec(4, axis=axis)),
    "qdiffusion-symmetric-mse": lambda x, axis: qdiffusion.symmetric_mse_as_released(x, 4, axis),
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@given(x=usual, bad=st.sampled_from([np.nan, np.inf, -np.inf]), axis=st.sampled_from([None, 0]))
def test_bad_values_raise(search, x, bad, axis):
    poisoned = np.array(x)
    poisoned.flat[x.size // 2] = bad
    with pytest.raises(RangeError, match="NaN" if np.isnan(bad) else "infinity"):
        search(poisoned, axis)
    with pytest.raises(RangeError, match="empty"):
        search(np.zeros((3, 0)), axis)
