"""The guided search: the least weighted output error of the candidates, per channel and per group."""

import numpy as np
import pytest

from refquant.errors import ShapeError
from refquant.quant.affine import QSpec, fake_quantize
from refquant.quant.guided import rounded, search, shrunk_ranges
from refquant.quant.mrq_sign import candidates as sign_candidates
from refquant.quant.observers import SHRINK, minmax

W4, A4 = QSpec(4, signed=True, axis=0), QSpec(4)


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 8)).astype(np.float32) * rng.choice([1, 4], 8)
    w = rng.standard_normal((5, 8)).astype(np.float32)
    g = rng.uniform(0.1, 2, (60, 5)).astype(np.float32)
    return x, w, g, np.repeat([0, 1], 30)


def score(x_q, w_q, x, w, g):
    return np.square(((x_q @ w_q.T - x @ w.T) * g).astype(np.float64))


def test_weights_alone_are_the_best_of_each_channel(layer):
    """Inputs in float: every output channel takes the candidate with its least weighted error."""
    x, w, g, group = layer
    found = shrunk_ranges(w, W4)
    best, inputs = search(x, w, g, group, found, [[], []])
    assert inputs == [None, None]
    errors = np.array([score(x, fake_quantize(w, q), x, w, g).sum(axis=0) for q in found])
    for o, k in enumerate(errors.argmin(axis=0)):
        assert best.scale[o] == found[k].scale[o] and best.zero_point[o] == found[k].zero_point[o]
    assert len(set(errors.argmin(axis=0))) > 1  # they do differ


def test_inputs_alone_are_the_best_of_each_group(layer):
    """Weights in float: each group is judged by its own rows, with candidates of its own."""
    x, w, g, group = layer
    x[group == 1] *= 0.1
    inputs = [shrunk_ranges(x[group == i], A4) for i in (0, 1)]
    best, chosen = search(x, w, g, group, [], inputs)
    assert best is None
    for i, q in enumerate(chosen):
        rows = group == i
        errors = [score(rounded(x[rows], c), w, x[rows], w, g[rows]).sum() for c in inputs[i]]
        assert q is inputs[i][int(np.argmin(errors))]
    assert chosen[1].scale < 0.3 * chosen[0].scale


def test_one_group_is_the_plain_search(layer):
    """All rows in one group, or in two with the same candidates where only one has rows."""
    x, w, g, _ = layer
    weights, inputs = shrunk_ranges(w, W4), shrunk_ranges(x, A4)
    a, (one,) = search(x, w, g, np.zeros(60, int), weights, [inputs])
    b, (same, other) = search(x, w, g, np.zeros(60, int), weights, [inputs, []])
    np.testing.assert_array_equal(a.scale, b.scale)
    assert one is same and other is None


def test_rounds_never_make_it_worse(layer):
    """Each half of a round is a minimum with the other half fixed: the score falls, or stays."""
    x, w, g, group = layer
    weights, inputs = shrunk_ranges(w, W4), [shrunk_ranges(x, A4)] * 2
    scores = []
    for rounds in (1, 2, 3):
        best, chosen = search(x, w, g, group, weights, inputs, rounds)
        x_q = x.copy()
        for i, q in enumerate(chosen):
            x_q[group == i] = rounded(x[group == i], q)
        scores.append(score(x_q, fake_quantize(w, best), x, w, g).sum())
    assert scores[0] >= scores[1] >= scores[2]
    plain = score(rounded(x, minmax(x, A4)), fake_quantize(w, minmax(w, W4)), x, w, g).sum()
    assert scores[2] < plain


def test_importance_decides(layer):
    """Two channels, two groups of rows: what has no weight has no say."""
    x, w, g, group = layer
    g[group == 0] = 0
    weights = shrunk_ranges(w, W4)
    best, _ = search(x, w, g, group, weights, [[], []])
    alone, _ = search(x[group == 1], w, g[group == 1], np.zeros(30, int), weights, [[]])
    np.testing.assert_array_equal(best.scale, alone.scale)


def test_other_grids_are_candidates_too(layer):
    x, w, g, group = layer
    found = sign_candidates(float(x.max()), 6, lowest=float(-x.min()))
    _, chosen = search(x, w, g, group, [], [found, found])
    assert all(q in found for q in chosen)


def test_shrunk_ranges_begin_with_min_max(layer):
    x, w, _, _ = layer
    for array, spec in ((x, A4), (w, W4)):
        first, plain = shrunk_ranges(array, spec)[0], minmax(array, spec)
        np.testing.assert_array_equal(first.scale, plain.scale)
        np.testing.assert_array_equal(first.zero_point, plain.zero_point)
        assert len(shrunk_ranges(array, spec)) == len(SHRINK)


def test_what_does_not_fit(layer):
    x, w, g, group = layer
    for bad in ((x[:, :3], w, g, group), (x, w, g[:, :2], group), (x, w, g, group[:5]), (x, w, g, group + 1)):
        with pytest.raises(ShapeError, match="guided search"):
            search(*bad, [], [[], []])
