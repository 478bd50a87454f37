"""Choosing regions and steps: the search finds the least error, the rule of a quarter holds, bad input is refused."""

import numpy as np
import pytest

from refquant.autograd import Tensor, gradients, ops, tokenops
from refquant.errors import RangeError, ShapeError
from refquant.quant import mrq_softmax
from refquant.quant.affine import QParams, QSpec
from refquant.quant.dynamic import PerToken
from refquant.quant.fakequant import fake_quant
from refquant.quant.grids import GridTable
from refquant.quant.guided import shrunk_ranges
from refquant.quant.mrq_sign import GELU_LOWEST, SILU_LOWEST, SignSplit, candidates, choose_positive, pays
from refquant.quant.mrq_sign import product as sign_product
from refquant.quant.mrq_softmax import SoftmaxRegions, choose_shift

GRIDS = [SoftmaxRegions(6, 2), SignSplit(6, 0.01, 0.1), PerToken(6), PerToken(6, 2)]


def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (e / e.sum(axis=-1, keepdims=True)).astype(np.float32)


def attention(tokens, sigma, seed=0, images=4):
    rng = np.random.default_rng(seed)
    p = softmax(sigma * rng.standard_normal((images, tokens, tokens)))
    return p, rng.standard_normal((images, tokens, 8)).astype(np.float32)


def gelu_of(mean, deviation):
    x = np.random.default_rng(0).normal(mean, deviation, 20000).astype(np.float32)
    return tokenops.gelu(Tensor(x)).data


# ------------------------------------------------------------------ the search


def test_choose_shift_takes_the_least_error_of_all():
    p, v = attention(16, 3.0)
    errors = [np.square((SoftmaxRegions(6, m).fake_quantize(p) - p) @ v).sum() for m in range(6)]
    assert choose_shift(p, v, 6).shift == int(np.argmin(errors))


def test_flat_attention_splits_lower_than_peaked():
    """The split follows the probabilities: 1/49 each, or a few near 1. What makes time groups worth their exponents."""
    flat, peaked = (choose_shift(*attention(49, sigma), 8).shift for sigma in (0.3, 6.0))
    assert flat > peaked


def test_importance_decides_where_errors_differ():
    """Half of the rows flat, half peaked: the split is that of the half that counts."""
    flat, peaked = attention(49, 0.3), attention(49, 6.0)
    p, v = (np.concatenate(pair) for pair in zip(flat, peaked, strict=True))
    weight = np.zeros_like(v)
    weight[:4] = 1
    assert choose_shift(p, v, 8, weight) == choose_shift(*flat, 8)
    assert choose_shift(p, v, 8, weight[::-1]) == choose_shift(*peaked, 8)


@pytest.mark.parametrize(("tokens", "sigma", "bits"), [(49, 3.0, 8), (256, 3.0, 8), (49, 3.0, 6)])
def test_regions_beat_the_searched_uniform_step(tokens, sigma, bits):
    """Peaked attention, 8 and 6 bits: the output's error is at least a quarter less than of the best uniform step."""
    p, v = attention(tokens, sigma)
    ours = np.square((choose_shift(p, v, bits).fake_quantize(p) - p) @ v).mean()
    spec = QSpec(bits, signed=False, symmetric=True)
    uniform = min(np.square((fake_quant(Tensor(p), q).data - p) @ v).mean() for q in shrunk_ranges(p, spec))
    assert ours < 0.75 * uniform


def test_the_released_sum_is_worse_than_uniform():
    p, v = attention(49, 1.0)
    released = min(np.square((mrq_softmax.released_additive(p, 8, m) - p) @ v).mean() for m in range(20))
    uniform = min(
        np.square((fake_quant(Tensor(p), q).data - p) @ v).mean() for q in shrunk_ranges(p, QSpec(8, False, True))
    )
    assert released > 2 * uniform


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1.5), (-2, 1.5), (-1, 0.7), (-2, 1.0)])
def test_the_rule_of_a_quarter(mean, deviation, bits):
    """Fewer than a quarter positive: a step for either sign has less error than the best asymmetric one; else more."""
    x = gelu_of(mean, deviation)
    ours = np.square(choose_positive(x, bits).fake_quantize(x) - x).mean()
    uniform = min(np.square(fake_quant(Tensor(x), q).data - x).mean() for q in shrunk_ranges(x, QSpec(bits)))
    assert pays(x) == (ours < uniform)


def test_choose_positive_takes_the_least_error_of_all():
    x = gelu_of(-1, 1)
    errors = [np.square((grid.fake_quantize(x) - x).astype(np.float64)).sum() for grid in candidates(x.max(), 5)]
    assert choose_positive(x, 5) == candidates(x.max(), 5)[int(np.argmin(errors))]


def test_the_lowest_values_have_a_code():
    """GELU's and SiLU's minima are the last negative code, and nothing is lower."""
    x = np.linspace(-3, 3, 60001, dtype=np.float32)
    for y, lowest in ((tokenops.gelu(Tensor(x)).data, GELU_LOWEST), (ops.silu(Tensor(x)).data, SILU_LOWEST)):
        assert y.min() == pytest.approx(-lowest, abs=1e-7)
        split = SignSplit(8, lowest / 127, 0.1)
        assert split.quantize(y.min()) == 127 and split.inside(y[y < 0]).all()


def test_nothing_positive_still_has_a_step():
    x = np.float32([-0.1, -0.2])
    assert choose_positive(x, 4).positive > 0


# ------------------------------------------------------------------ grids as activation quantizers


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.kind)
def test_forward_and_straight_through(grid):
    """Forward is the grid's rounding; the gradient passes where `inside` says so."""
    x = np.random.default_rng(0).uniform(-0.5, 5, (2, 3, 4)).astype(np.float32)
    t = Tensor(x, requires_grad=True)
    y = fake_quant(t, grid)
    np.testing.assert_array_equal(y.data, grid.fake_quantize(x))
    assert y.data.dtype == np.float32
    (g,) = gradients(ops.sum_all(y), [t])
    np.testing.assert_array_equal(g, grid.inside(x))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.kind)
def test_rounding_is_idempotent_and_keeps_double_precision(grid):
    x = np.random.default_rng(0).uniform(0, 0.2, (2, 3, 4)).astype(np.float32)
    once = grid.fake_quantize(x)
    np.testing.assert_allclose(grid.fake_quantize(once), once, rtol=1e-5, atol=1e-7)
    assert grid.fake_quantize(x.astype(np.float64)).dtype == np.float64


def test_tables_of_grids():
    table = GridTable([SoftmaxRegions(8, m) for m in (1, 1, 5)])
    assert len(table) == 3 and table[2].shift == 5 and table.bits == 8 and table.kind == "mrq-softmax"
    assert table.arrays()["shift"].tolist() == [1, 1, 5] and table.facts() == {"bits": 8}
    with pytest.raises(RangeError, match="index by step, not by t"):
        table[3]
    with pytest.raises(RangeError, match="a table of 0 steps"):
        GridTable([])
    for mixed in ([SoftmaxRegions(8, 1), SoftmaxRegions(6, 1)], [SoftmaxRegions(8, 1), PerToken(8)]):
        with pytest.raises(ShapeError, match="one kind"):
            GridTable(mixed)


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 9}, {"shift": -1}, {"shift": 8}])
def test_impossible_regions(options):
    with pytest.raises(RangeError):
        SoftmaxRegions(**{"bits": 8, "shift": 3, **options})


@pytest.mark.parametrize(
    "options", [{"bits": 2}, {"bits": 9}, {"negative": 0.0}, {"positive": -1.0}, {"positive": np.nan}]
)
def test_impossible_signs(options):
    with pytest.raises(RangeError):
        SignSplit(**{"bits": 8, "negative": 0.1, "positive": 0.1, **options})


def test_values_that_have_no_code():
    for grid in GRIDS[:2]:
        with pytest.raises(RangeError, match="NaN has no integer code"):
            grid.quantize([0.1, np.nan])
        for codes in (np.array([64], np.uint8), np.array([1], np.int32)):
            with pytest.raises(ShapeError, match="6 bits are uint8 numbers below 64"):
                grid.planes(codes)
        assert np.isnan(grid.fake_quantize(np.float32([np.nan])))[0]
    for bad in ([], [np.inf]):
        with pytest.raises(RangeError, match="has no step"):
            choose_positive(bad, 8)


def test_sums_that_could_overflow():
    codes = np.full((1, 1, 2000), 255, np.uint8)  # 2000 times 127 << 7: no row of a softmax
    with pytest.raises(RangeError, match="no codes of softmax rows"):
        mrq_softmax.accumulate(SoftmaxRegions(8, 7), codes, np.full((1, 2000, 1), 255, np.uint8), 0)
    w = QParams(np.ones(1), np.zeros(1), QSpec(8, signed=True, axis=0))
    wide = np.full((1, 140_000), 255, np.uint8)
    with pytest.raises(RangeError, match="overflows int32"):
        sign_product(SignSplit(8, 0.1, 0.1), wide, np.full((1, 140_000), -128, np.int8), w)
