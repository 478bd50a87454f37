"""Dynamic per-token quantization and groups of channels: each token, each group, is quantized by itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import assert_killed

from refquant.errors import RangeError, ShapeError
from refquant.quant import groupwise
from refquant.quant.affine import QSpec, dequantize, fake_quantize, quantize
from refquant.quant.dynamic import PerToken
from refquant.quant.observers import minmax, mse


@st.composite
def tokens(draw):
    """(grid, x (N, L, K)): tokens of very different ranges, constant and all-zero ones among them."""
    group = draw(st.sampled_from([0, 1, 2, 4]))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), 8)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = rng.choice([0, 1e-3, 1, 100], shape[:2])[..., None]
    x = rng.standard_normal(shape) + rng.choice([0, 3, -3], shape[:2])[..., None]
    return PerToken(draw(st.integers(2, 8)), group), (scale * x).astype(np.float32)


def tokens_do_not_meet(case):
    """Permuting tokens (and images) commutes with quantizing them."""
    grid, x = case
    flat, order = x.reshape(-1, x.shape[-1]), np.random.default_rng(0).permutation(x.shape[0] * x.shape[1])
    got = grid.fake_quantize(np.ascontiguousarray(flat[order])[None])[0]
    np.testing.assert_array_equal(got, grid.fake_quantize(x).reshape(flat.shape)[order])


def a_token_alone_is_minmax(case):
    """Each token's (group's) values are those of min-max on itself, up to a float32 rounding of the scale."""
    grid, x = case
    out = grid.fake_quantize(x).reshape(-1, grid.group or x.shape[-1])
    for got, row in zip(out, x.reshape(out.shape), strict=True):
        q = minmax(row, QSpec(grid.bits))
        # a step's rounding moves a value by at most itself, and where a tie is decided otherwise, by a step
        assert (np.abs(got - row) <= float(q.scale) * (0.5 + 1e-3)).all()
        assert (np.abs(got - fake_quantize(row, q)) <= float(q.scale) * 1.001).all()
        assert np.unique(got).size <= 2**grid.bits


@given(tokens())
def test_tokens_do_not_meet(case):
    tokens_do_not_meet(case)


@given(tokens())
def test_a_token_alone_is_minmax(case):
    a_token_alone_is_minmax(case)


@given(tokens())
def test_groups_are_tokens_of_their_own(case):
    """PerToken(group=g) of (..., K) = PerToken() of (..., K/g, g)."""
    grid, x = case
    alone = PerToken(grid.bits).fake_quantize(x.reshape(*x.shape[:2], -1, grid.group or 8))
    np.testing.assert_array_equal(grid.fake_quantize(x), alone.reshape(x.shape))


@given(tokens())
def test_scaling_a_token_scales_it(case):
    """A power of two on every token changes no code."""
    grid, x = case
    x = np.where(np.abs(x) < 1e-3, np.float32(0), x)
    np.testing.assert_array_equal(grid.fake_quantize(x * np.float32(8)), 8 * grid.fake_quantize(x))


def _one_scale(self, x):
    return fake_quantize(x, minmax(x, QSpec(self.bits)))


def _scale_by_feature(self, x):
    return fake_quantize(x, minmax(x, QSpec(self.bits, axis=x.ndim - 1)))


def _scale_by_position(self, x):
    return fake_quantize(x, minmax(x, QSpec(self.bits, axis=1)))


@pytest.mark.parametrize(
    ("mutant", "law"),
    [
        (_one_scale, a_token_alone_is_minmax),
        (_scale_by_feature, a_token_alone_is_minmax),
        (_scale_by_position, a_token_alone_is_minmax),
        (_scale_by_position, tokens_do_not_meet),  # the others have one scale for all tokens: their order is no matter
    ],
)
def test_other_scales_are_caught(mutant, law, monkeypatch):
    monkeypatch.setattr(PerToken, "fake_quantize", mutant)
    assert_killed(law, tokens())


# ---------------------------------------------------------------------------------------------------------- weights


@st.composite
def weights(draw):
    """(w (O, 8) or (O, 2, 2, 2), spec, group)."""
    shape = draw(st.sampled_from([(3, 8), (1, 8), (2, 2, 2, 2)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = (rng.standard_normal(shape) * rng.choice([0.1, 1, 10], (shape[0], *(1,) * (len(shape) - 1)))).astype(np.float32)
    w.reshape(shape[0], -1)[:, 3] *= 20  # an outlier's column
    spec = QSpec(draw(st.integers(2, 8)), signed=True, symmetric=draw(st.booleans()), axis=0)
    return w, spec, draw(st.sampled_from([0, 1, 2, 4, 8]))


def rounded(w, q):
    rows = groupwise.as_rows(w, q)
    return dequantize(quantize(rows, q), q).reshape(w.shape)


def a_group_is_a_weight_of_its_own(case):
    """Columns k .. k+g-1 of the group-wise weight = the quantized weight of those columns alone."""
    w, spec, group = case
    got = rounded(w, groupwise.group_qparams(minmax, w, spec, group)).reshape(len(w), -1)
    flat, size = w.reshape(len(w), -1), group or 8
    for k in range(0, 8, size):
        part = flat[:, k : k + size]
        np.testing.assert_array_equal(got[:, k : k + size], fake_quantize(part, minmax(part, spec)))


@given(weights())
def test_a_group_is_a_weight_of_its_own(case):
    a_group_is_a_weight_of_its_own(case)


@given(weights())
def test_no_groups_is_the_plain_quantizer(case):
    """Group 0, or all K inputs: one scale for each output channel."""
    w, spec, _ = case
    for group in (0, 8):
        for observer in (minmax, mse):
            q, plain = groupwise.group_qparams(observer, w, spec, group), observer(w, spec)
            np.testing.assert_array_equal(q.scale, plain.scale)
            np.testing.assert_array_equal(rounded(w, q), fake_quantize(w, plain))


def test_strided_groups_are_caught(monkeypatch):
    """DiTAS' released view takes every 32nd number for a group; here groups are neighbours."""

    def strided(w, group):
        size = group or 8
        return np.ascontiguousarray(w.reshape(len(w), size, -1).transpose(0, 2, 1)).reshape(-1, size)

    monkeypatch.setattr(groupwise, "group_rows", strided)
    assert_killed(a_group_is_a_weight_of_its_own, weights())


def test_bad_groups():
    with pytest.raises(ShapeError, match="groups of 3 do not divide 8 inputs"):
        groupwise.group_rows(np.ones((2, 8), np.float32), 3)
    with pytest.raises(ShapeError, match="groups of 3 do not divide the 8 features"):
        PerToken(8, 3).fake_quantize(np.ones((1, 8), np.float32))
    with pytest.raises(ShapeError, match="4 scales for a weight of shape"):
        groupwise.as_rows(np.ones((3, 8)), minmax(np.ones((4, 2)), QSpec(axis=0)))
    for bad in ({"bits": 1}, {"bits": 9}, {"bits": 8, "group": -1}):
        with pytest.raises(RangeError):
            PerToken(**bad)
