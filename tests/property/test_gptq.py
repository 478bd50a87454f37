"""GPTQ and the low-rank branch: exact where they must be, better where they are meant to be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import assert_killed

from refquant.errors import RangeError, ShapeError
from refquant.quant import gptq as module
from refquant.quant import groupwise
from refquant.quant.affine import QSpec, dequantize, fake_quantize, quantize
from refquant.quant.gptq import gptq, second_moment
from refquant.quant.low_rank import low_rank, truncated
from refquant.quant.observers import minmax


@st.composite
def weights(draw, correlated=False):
    """(w (O, K), H (K, K), quantizer, group)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    o, k, group = draw(st.integers(1, 4)), draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([0, 2]))
    w = rng.standard_normal((o, k)).astype(np.float32)
    spec = QSpec(draw(st.integers(2, 5)), signed=True, symmetric=draw(st.booleans()), axis=0)
    h = np.diag(rng.choice([1e-4, 1, 50], k))
    if correlated:
        h = second_moment(rng.standard_normal((40, k)) @ rng.standard_normal((k, k)))
    return w, h, groupwise.group_qparams(minmax, w, spec, group)


def nearest(w, q):
    return quantize(groupwise.as_rows(w, q), q).reshape(w.shape)


def values(codes, q):
    return dequantize(groupwise.as_rows(codes, q), q).reshape(codes.shape).astype(np.float64)


def diagonal_is_nearest(case):
    """Inputs that are uncorrelated cannot make good for each other: H diagonal gives the nearest codes."""
    w, h, q = case
    np.testing.assert_array_equal(module.gptq(w, h, q), nearest(w, q))


def each_column_is_the_best_answer(case):
    """After column k is rounded, the later columns are where they minimise the output error, for each k.

    The free minimum of e H e' over the entries of e after k, given those up to k, is e_> = -H_>>^-1 H_>< e_<; and a
    column's code is the nearest to its value there (clipped): checked from the codes alone.
    """
    w, h, q = case
    codes, damped = module.gptq(w, h, q), h + 0.01 * np.trace(h) / len(h) * np.eye(len(h))
    error = values(codes, q) - w
    columns = groupwise.check_group(w.shape[1], w.size // q.scale.size)
    for k in range(w.shape[1]):
        place = w[:, k].astype(np.float64)
        if k:
            pull = np.linalg.solve(damped[k:, k:], damped[k:, :k] @ error[:, :k].T)[0]
            place = place - pull
        index = np.arange(len(w)) * (w.shape[1] // columns) + k // columns
        s, z = q.scale[index].astype(np.float64), q.zero_point[index]
        exact = np.clip(place / s + z, q.spec.qmin, q.spec.qmax)
        assert (np.abs(codes[:, k] - exact) <= 0.5 + 1e-6).all()


@given(weights())
def test_diagonal_is_nearest(case):
    diagonal_is_nearest(case)


@given(weights(correlated=True))
def test_each_column_is_the_best_answer(case):
    each_column_is_the_best_answer(case)


def _wrong_triangle(h):
    """The lower factor in the upper one's place, transposed: right for diagonal H, wrong otherwise."""
    return np.linalg.inv(np.linalg.cholesky(h)).T


def test_a_wrong_factor_is_caught(monkeypatch):
    monkeypatch.setattr(module, "_factor", _wrong_triangle)
    assert_killed(each_column_is_the_best_answer, weights(correlated=True))


@pytest.mark.parametrize("law", [diagonal_is_nearest, each_column_is_the_best_answer])
def test_scales_of_other_groups_are_caught(law, monkeypatch):
    def reversed_groups(w, h, q):
        return gptq(w[:, ::-1], h[::-1, ::-1], q)[:, ::-1]

    monkeypatch.setattr(module, "gptq", reversed_groups)
    assert_killed(law, weights(correlated=law is each_column_is_the_best_answer))


def test_output_error_falls_on_correlated_inputs():
    """32 inputs that mix 8 sources, 3 bits: the sum of errors over 20 layers is less than half of nearest's."""
    total = np.zeros(2)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((200, 8)) @ rng.standard_normal((8, 32)) + 0.1 * rng.standard_normal((200, 32))
        w = rng.standard_normal((16, 32)).astype(np.float32)
        q, h = minmax(w, QSpec(3, signed=True, axis=0)), second_moment(x)
        for i, codes in enumerate((nearest(w, q), gptq(w, h, q))):
            e = values(codes, q) - w
            total[i] += np.einsum("ok,kl,ol->", e, h, e)
    assert total[1] < 0.5 * total[0]


def test_inputs_that_were_never_seen():
    """H of zeros: nearest codes, no division by 0."""
    w = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    q = minmax(w, QSpec(3, signed=True, axis=0))
    np.testing.assert_array_equal(gptq(w, np.zeros((4, 4)), q), nearest(w, q))


def test_bad_input():
    w = np.ones((2, 4), np.float32)
    q = minmax(w, QSpec(3, axis=0))
    one, few = minmax(w, QSpec(3)), minmax(w[:1], QSpec(3, axis=0))
    for h, quantizer in ((np.eye(3), q), (np.eye(4), one), (np.eye(4), few)):
        with pytest.raises(ShapeError, match="gptq"):
            gptq(w, h, quantizer)
    with pytest.raises(ShapeError, match="3 groups do not divide 4 inputs"):
        gptq(w, np.eye(4), minmax(np.ones((6, 2)), QSpec(3, axis=0)))
    for h, damping in ((np.eye(4), 0.0), (np.full((4, 4), np.nan), 0.01)):
        with pytest.raises(RangeError, match="damping"):
            gptq(w, h, q, damping)


# --------------------------------------------------------------------------------------------------- low-rank branch


def ranges(w):
    return minmax(w, QSpec(4, signed=True, axis=0))


@given(st.integers(0, 2**32 - 1), st.integers(0, 4))
def test_a_branch_never_hurts(seed, rank):
    """The error kept is the least of all rounds, the first being without a branch; it is what codes and branch give."""
    w = np.random.default_rng(seed).standard_normal((6, 8)).astype(np.float32)
    w[:, 2] *= 12
    found = low_rank(w, rank, ranges, rounds=4)
    whole = found.left @ found.right + dequantize(found.codes, found.qparams)
    assert np.square((whole - w).astype(np.float64)).sum() == pytest.approx(found.errors.min(), rel=1e-4)
    assert found.errors[0] == pytest.approx(np.square((fake_quantize(w, ranges(w)) - w).astype(np.float64)).sum())
    assert found.left.shape == (6, found.left.shape[1]) and found.left.shape[1] in (0, rank)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_truncated_is_the_best_of_its_rank(seed, rank):
    """Eckart & Young: the squared error is the sum of the other singular values' squares."""
    w = np.random.default_rng(seed).standard_normal((6, 8)).astype(np.float32)
    left, right = truncated(w, rank)
    s = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    error, rest = np.square((left @ right - w).astype(np.float64)).sum(), np.square(s[rank:]).sum()
    assert error == pytest.approx(rest, rel=1e-6, abs=1e-8)


def test_an_outlier_column_goes_into_the_branch():
    """48 x 64 with a column 12 times as large, 4 bits: rank 4 takes the squared error to less than half."""
    w = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    w[:, 5] *= 12
    found = low_rank(w, 4, ranges)
    assert found.errors.min() < 0.5 * found.errors[0]


def test_impossible_branches():
    w = np.ones((3, 4), np.float32)
    for rank, rounds in ((-1, 1), (4, 1), (1, 0)):
        with pytest.raises(RangeError, match="rank"):
            low_rank(w, rank, ranges, rounds)
