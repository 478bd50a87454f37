"""Channel balancing: folding changes no output, balances are what the papers say, and ranks are Spearman's."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mutants import assert_killed

from refquant.autograd import Tensor, nnops, tokenops
from refquant.errors import RangeError, ShapeError
from refquant.quant import balance
from refquant.quant.balance import balancing, spearman, ssc_salience, ssc_weights

saliences = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(1e-6, 1e6))


@st.composite
def transformers(draw):
    """What lies around a balanced layer: x (N, L, D), c (N, D), adaLN (3 D, D), two linear layers, factors (D,)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, tokens, d = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.sampled_from([2, 4, 8]))

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    factors = np.exp(rng.uniform(-1, 1, d) * draw(st.sampled_from([0, 1, 4])))
    return SimpleNamespace(
        x=normal(n, tokens, d), c=normal(n, d), ada=normal(3 * d, d), ada_bias=normal(3 * d), w=normal(5, d),
        bias=normal(5), qkv=normal(3 * d, d), qkv_bias=normal(3 * d), b=factors, d=d,
    )  # fmt: skip


def modulated(t, ada, ada_bias, w):
    """W (LN(x) (1 + gamma) + beta) with shift, gate and scale in this order, the gate in between as a bystander."""
    d, out = t.d, nnops.linear(Tensor(t.c), Tensor(ada), Tensor(ada_bias)).data
    shift, gate, scale = out[:, :d], out[:, d : 2 * d], out[:, 2 * d :]
    h = tokenops.modulate(tokenops.layer_norm(Tensor(t.x)), Tensor(shift), Tensor(scale))
    return nnops.linear(h, Tensor(w), Tensor(t.bias)).data * gate.mean(axis=1)[:, None, None], h.data


def attended(t, qkv, qkv_bias, w):
    """W (softmax(q k') v + its bias), one head."""
    d, together = t.d, nnops.linear(Tensor(t.x), Tensor(qkv), Tensor(qkv_bias)).data
    q, k, v = (Tensor(np.ascontiguousarray(together[..., i * d : (i + 1) * d])) for i in range(3))
    h = nnops.attention(q, k, v)
    return nnops.linear(h, Tensor(w), Tensor(t.bias)).data, h.data


def close(got, want, reach):
    """1e-5 of what the sum is made of: balanced terms are the same, so their rounding errors are, too."""
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(reach))


def folding_into_adaln_changes_nothing(t):
    d = t.d
    want, h = modulated(t, t.ada, t.ada_bias, t.w)
    ada, ada_bias = balance.fold_modulation(t.ada, t.ada_bias, slice(0, d), slice(2 * d, 3 * d), t.b)
    got, balanced = modulated(t, ada, ada_bias, balance.fold_columns(t.w, t.b))
    gate = np.abs(want).max() + np.abs(h).max() * np.abs(t.w).sum()
    close(got, want, gate * (1 + np.abs(t.c).max()) * 3)
    for j in range(d):  # what the layer sees is really balanced
        close(balanced[..., j], h[..., j] * t.b[j], np.abs(h[..., j]).max() * t.b[j] + t.b[j] * 10)


def folding_into_v_changes_nothing(t):
    d = t.d
    want, h = attended(t, t.qkv, t.qkv_bias, t.w)
    qkv, qkv_bias = balance.fold_rows(t.qkv, t.qkv_bias, slice(2 * d, 3 * d), t.b)
    got, balanced = attended(t, qkv, qkv_bias, balance.fold_columns(t.w, t.b))
    close(got, want, np.abs(want).max() + np.abs(h).max() * np.abs(t.w).sum())
    for j in range(d):
        close(balanced[..., j], h[..., j] * t.b[j], np.abs(h[..., j]).max() * t.b[j] + t.b[j])


@given(transformers())
def test_folding_into_adaln_changes_nothing(t):
    folding_into_adaln_changes_nothing(t)


@given(transformers())
def test_folding_into_v_changes_nothing(t):
    folding_into_v_changes_nothing(t)


def _scale_bias_not_moved(weight, bias, shift, scale, b):
    """The slip: (1 + gamma) b is not 1 + gamma b."""
    w, v = balance.fold_rows(weight, bias, shift, b)
    return balance.fold_rows(w, v, scale, b)


def _shift_forgotten(weight, bias, shift, scale, b):
    return balance._scaled(weight, bias, scale, b, (1 + bias[scale]) * b - 1)


def _neighbouring_rows(weight, bias, shift, scale, b):
    return RIGHT_MODULATION(weight, bias, shift, slice(scale.start - len(b), scale.start), b)


RIGHT_MODULATION, RIGHT_ROWS = balance.fold_modulation, balance.fold_rows


@pytest.mark.parametrize(
    ("name", "mutant", "law"),
    [
        ("fold_modulation", _scale_bias_not_moved, folding_into_adaln_changes_nothing),
        ("fold_modulation", _shift_forgotten, folding_into_adaln_changes_nothing),
        ("fold_modulation", _neighbouring_rows, folding_into_adaln_changes_nothing),
        ("fold_columns", lambda w, b: (w * b).astype(w.dtype), folding_into_adaln_changes_nothing),
        ("fold_rows", lambda w, v, rows, b: (RIGHT_ROWS(w, v, rows, b)[0], v), folding_into_v_changes_nothing),
        ("fold_rows", lambda w, v, rows, b: RIGHT_ROWS(w, v, slice(0, len(b)), b), folding_into_v_changes_nothing),
    ],
)
def test_wrong_folds_are_caught(name, mutant, law, monkeypatch):
    monkeypatch.setattr(balance, name, mutant)
    assert_killed(law, transformers())


@given(saliences, st.integers(0, 99))
def test_csb_gives_both_sides_the_geometric_mean(s_x, seed):
    """s_x b = s_w / b = sqrt(s_x s_w); PTQ4DiT eq. 5."""
    s_w = np.random.default_rng(seed).permutation(s_x) * 3
    b = balancing(s_x, s_w)
    inside = (b > 1 / balance.REACH) & (b < balance.REACH)
    for side in (s_x * b, s_w / b):
        np.testing.assert_allclose(side[inside], np.sqrt(s_x * s_w)[inside], rtol=1e-12)


@given(saliences)
def test_alpha_moves_all_or_nothing(s_x):
    """alpha = 1: activations all alike. alpha = 0: weights all alike."""
    s_w = s_x[::-1].copy()
    ok = (s_x > 1 / balance.REACH) & (s_x < balance.REACH) & (s_w > 1 / balance.REACH) & (s_w < balance.REACH)
    np.testing.assert_allclose((s_x * balancing(s_x, s_w, 1.0))[ok], 1, rtol=1e-12)
    np.testing.assert_allclose((s_w / balancing(s_x, s_w, 0.0))[ok], 1, rtol=1e-12)


@given(hnp.arrays(np.float64, st.integers(2, 9), elements=st.integers(0, 5).map(float)), st.integers(0, 99))
def test_spearman(a, seed):
    """Any growing function of a has rho 1, a falling one -1, a constant 0; symmetric; by the definition of ranks."""
    b = np.random.default_rng(seed).integers(0, 5, a.size).astype(float)
    if np.ptp(a) == 0:
        assert spearman(a, b) == 0
        return
    assert spearman(a, np.exp(a)) == pytest.approx(1) and spearman(a, -(a**3)) == pytest.approx(-1)
    assert spearman(a, b) == pytest.approx(spearman(b, a))
    ranks = [np.array([(v < x).sum() + ((v == x).sum() - 1) / 2 for x in v]) for v in (a, b)]
    want = np.corrcoef(*ranks)[0, 1] if np.ptp(b) else 0.0
    assert spearman(a, b) == pytest.approx(want, abs=1e-12)


@given(st.lists(hnp.arrays(np.float64, 6, elements=st.floats(0.01, 10)), min_size=1, max_size=4), st.integers(0, 9))
def test_ssc_prefers_steps_that_rank_unlike_the_weights(steps, seed):
    """eta > 0, sum 1, larger for smaller rho; one step is itself; the mean lies within the steps'."""
    s_w = np.random.default_rng(seed).uniform(0.1, 1, 6)
    eta, rho = ssc_weights(steps, s_w), np.array([spearman(s, s_w) for s in steps])
    assert (eta > 0).all() and eta.sum() == pytest.approx(1)
    assert (np.diff(eta[np.argsort(rho)]) <= 1e-15).all()
    s_x = ssc_salience(steps, s_w)
    assert (s_x <= np.max(steps, axis=0) * (1 + 1e-12)).all() and (s_x >= np.min(steps, axis=0) * (1 - 1e-12)).all()


def test_bad_input():
    with pytest.raises(ShapeError, match="both must be"):
        balancing(np.ones(3), np.ones(4))
    with pytest.raises(RangeError, match="alpha=1.5"):
        balancing(np.ones(3), np.ones(3), 1.5)
    with pytest.raises(RangeError, match="NaN or infinite"):
        balancing(np.array([1, np.nan]), np.ones(2))
    with pytest.raises(ShapeError, match="3 channels"):
        balance.fold_columns(np.ones((2, 3)), np.ones(2))
    with pytest.raises(RangeError, match="positive and finite"):
        balance.fold_columns(np.ones((2, 2)), np.array([1.0, 0.0]))
    with pytest.raises(ShapeError, match="cannot be correlated"):
        spearman(np.ones(3), np.ones(4))
