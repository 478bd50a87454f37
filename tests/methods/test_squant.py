"""SQuant: the bounds that the paper promises, the optimum where it can be enumerated, the released list method."""

import itertools

import numpy as np
import pytest
from asserts import assert_same_integers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import floats32, layouts

import refquant.quant.methods.squant as method
from refquant.diffusion.model import asset_names, load_model
from refquant.intmath import round_half_even
from refquant.quant.affine import quantize
from refquant.quant.methods.squant import MODES, grid, squant
from refquant.quant.wrap import wrap

ROUNDING = 1e-9  # of float64 sums of at most some thousand errors


@st.composite
def weights(draw, windows=((3, 3), (2, 3), (1, 1), None), most_channels=4):
    """(weight, bits): convolutions and linear layers; Gaussian, or full of ties, equal and extreme weights."""
    window, o, c = draw(st.sampled_from(windows)), draw(st.integers(1, 3)), draw(st.integers(1, most_channels))
    shape = (o, c) if window is None else (o, *window, c)
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        weight = rng.standard_normal(shape, dtype=np.float32)
    else:
        weight = draw(hnp.arrays(np.float32, shape, elements=floats32(limit=10.0)))
    return draw(layouts(weight)), draw(st.integers(2, 8))


linear_layers = weights(windows=(None,), most_channels=8)
convolutions = weights(windows=((3, 3), (2, 3)))


def rows(array):
    """(O, kh, kw, C) or (O, C) as (O, C, kh * kw), without help from the code under test."""
    array = np.asarray(array)
    if array.ndim == 2:
        return array[:, :, None]
    return np.stack([[array[o, :, :, c].ravel() for c in range(array.shape[3])] for o in range(array.shape[0])])


def solve(case, mode):
    """x and codes as (O, C, kh * kw) float64, and the ends of the codes."""
    weight, bits = case
    codes, q = squant(weight, bits, mode)
    x, _ = grid(weight, bits)
    return rows(x).astype(np.float64), rows(codes).astype(np.float64), q.spec.qmin, q.spec.qmax


def one_outlier_at_most(x, qmin, qmax):
    """Where the bounds are promised: at most one weight of each group beyond each end of the codes."""
    return ((x > qmax).sum(axis=-1) <= 1) & ((x < qmin).sum(axis=-1) <= 1)


# ------------------------------------------------------------------ laws, each of one case (weight, bits)


def codes_are_floor_or_ceil(case):
    """Every code is the grid's neighbour of its weight, below or above, in every mode."""
    for mode in MODES:
        x, codes, qmin, qmax = solve(case, mode)
        assert codes.min() >= qmin and codes.max() <= qmax
        assert (np.clip(np.floor(x), qmin, qmax) <= codes).all() and (codes <= np.clip(np.ceil(x), qmin, qmax)).all()


def e_is_nearest(case):
    """Mode e: |e| <= 1/2 inside of the codes, the codes of `quantize` where that is no tie."""
    x, codes, qmin, qmax = solve(case, "e")
    inside = np.clip(x, qmin, qmax)
    assert np.abs(codes - inside).max() <= 0.5
    weight, bits = case
    # s w - zp in float32 is good to 255 ulp of 2**-24, 1.5e-5 of a step, and so is w / scale
    clear = np.abs(np.abs(inside - np.floor(inside)) - 0.5) > 1e-3
    nearest = rows(quantize(weight, grid(weight, bits)[1]))
    assert_same_integers(nearest[clear].astype(int), codes[clear].astype(int), x=x[clear])


def k_balances_kernels(case):
    """Mode k: |sum e| <= 1/2 over each kernel of more than one weight."""
    x, codes, qmin, qmax = solve(case, "k")
    if x.shape[2] > 1:
        error = np.abs((codes - x).sum(axis=-1))
        assert (error[one_outlier_at_most(x, qmin, qmax)] <= 0.5 + ROUNDING).all(), error


def c_balances_channels(case):
    """Modes c and full: |sum e| <= 1/2 over each output channel."""
    for mode in ("c", "full"):
        x, codes, qmin, qmax = solve(case, mode)
        x, codes = x.reshape(len(x), -1), codes.reshape(len(x), -1)
        error = np.abs((codes - x).sum(axis=-1))
        assert (error[one_outlier_at_most(x, qmin, qmax)] <= 0.5 + ROUNDING).all(), (mode, error)


def full_keeps_kernels_within_one(case):
    """Mode full: |sum e| <= 1 over each kernel of more than one weight."""
    x, codes, qmin, qmax = solve(case, "full")
    if x.shape[2] > 1:
        error = np.abs((codes - x).sum(axis=-1))
        assert (error[one_outlier_at_most(x, qmin, qmax)] <= 1 + ROUNDING).all(), error


def stages_are_nested(case):
    """K flips one kernel in one direction only; C flips at most one weight of each kernel after it."""
    e, k, full = (solve(case, mode)[1] for mode in ("e", "k", "full"))
    if e.shape[2] == 1:
        np.testing.assert_array_equal(k, e)
        np.testing.assert_array_equal(full, solve(case, "c")[1])
    else:
        assert (np.abs((k - e).sum(axis=-1)) == np.abs(k - e).sum(axis=-1)).all()
        assert (np.abs(full - k).sum(axis=-1) <= 1).all()


def groups_are_optimal(case):
    """The least sum of e² among all floor-or-ceil codes of a group with |sum e| <= 1/2, by enumeration.

    Of a kernel in mode k, of a channel of a linear layer in mode c. Where nearest errors sum to a tie such as
    3/2, one flip and two keep the bound, and half-even takes two: dearer, and exempt here.
    """
    weight, _ = case
    x, codes, qmin, qmax = solve(case, "c" if np.ndim(weight) == 2 else "k")
    if np.ndim(weight) == 2:
        x, codes = x.reshape(len(x), 1, -1), codes.reshape(len(x), 1, -1)
    for row, chosen in zip(x.reshape(-1, x.shape[2]), codes.reshape(-1, x.shape[2]), strict=True):
        tie = abs(abs((np.rint(row) - row).sum()) % 1 - 0.5) < ROUNDING
        if tie or row.min() < qmin or row.max() > qmax:
            continue
        choices = np.array(list(itertools.product((0, 1), repeat=len(row))))
        error = np.where(choices == 0, np.floor(row), np.ceil(row)) - row
        allowed = np.abs(error.sum(axis=1)) <= 0.5 + ROUNDING
        best = (error[allowed] ** 2).sum(axis=1).min()
        assert ((chosen - row) ** 2).sum() <= best + ROUNDING, row


def channels_are_independent(case):
    """squant(w)[o] = squant(w[o]): other output channels are neither seen nor touched."""
    weight, bits = case
    codes, q = squant(weight, bits)
    for o in range(len(weight)):
        alone, params = squant(weight[o : o + 1], bits)
        assert_same_integers(alone[0], codes[o])
        assert params.scale[0] == q.scale[o] and params.zero_point[0] == q.zero_point[o]


def zero_has_a_code(case):
    """0 is a code of every channel, so a pruned or padded weight stays exact."""
    weight, bits = case
    assert grid(weight, bits)[1].zero_is_exact


LAWS = [
    codes_are_floor_or_ceil,
    e_is_nearest,
    k_balances_kernels,
    c_balances_channels,
    full_keeps_kernels_within_one,
    stages_are_nested,
    channels_are_independent,
    zero_has_a_code,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@given(case=weights())
def test_law(law, case):
    law(case)


@given(linear_layers | convolutions)
def test_groups_are_optimal(case):
    groups_are_optimal(case)


# ------------------------------------------------------------------ wrong stages that the laws must notice


def mutant_flip(*, count=round_half_even, order=-1, direction=1, nominate=True):
    """`flip` with one thing changed."""

    def flip(x, q, other, may_flip):
        total = (q - x).sum(axis=-1, keepdims=True)
        eligible = may_flip & (other - q == -direction * np.sign(total))
        priority = np.where(eligible, np.abs(q - x) if order < 0 else 1 - np.abs(q - x), 0)
        rank = np.argsort(-priority, axis=-1, kind="stable").argsort(axis=-1)
        k = count(np.abs(total))
        flipped = eligible & (rank < k)
        last = eligible & (rank == np.where(k >= np.abs(total), k - 1, k))
        return np.where(flipped, other, q), np.where(flipped, q, other), last if nominate else np.ones_like(last)

    return flip


def past_the_end(x, qmin, qmax):
    q = round_half_even(x)
    return q, q + np.sign(x - q)


def rounded_down(x, qmin, qmax):
    q = np.clip(np.floor(x), qmin, qmax)
    return q, np.clip(q + np.sign(x - q), qmin, qmax)


def neighbour_behind(x, qmin, qmax):
    q = np.clip(round_half_even(x), qmin, qmax)
    return q, np.clip(q - np.sign(x - q), qmin, qmax)


def windows_not_regrouped(weight):
    """Takes OHWI for OIHW: a "kernel" becomes kh * kw neighbouring numbers in memory."""
    return weight.reshape(len(weight), weight.shape[-1], -1)


MUTANTS = [
    ("flip", mutant_flip(count=np.floor), k_balances_kernels, convolutions),
    ("flip", mutant_flip(count=np.ceil), k_balances_kernels, convolutions),
    ("flip", mutant_flip(order=1), groups_are_optimal, convolutions),
    ("flip", mutant_flip(order=1), groups_are_optimal, linear_layers),
    ("flip", mutant_flip(direction=-1), c_balances_channels, weights()),
    ("flip", mutant_flip(nominate=False), full_keeps_kernels_within_one, convolutions),
    ("flip", mutant_flip(nominate=False), stages_are_nested, convolutions),
    ("neighbours", past_the_end, c_balances_channels, weights()),
    ("neighbours", rounded_down, e_is_nearest, weights()),
    ("neighbours", neighbour_behind, codes_are_floor_or_ceil, weights()),
    ("kernels", windows_not_regrouped, k_balances_kernels, convolutions),
]


@pytest.mark.parametrize(
    ("name", "mutant", "law", "cases"),
    [pytest.param(*m, id=f"{i}-{m[0]}-{m[2].__name__}") for i, m in enumerate(MUTANTS)],
)
def test_law_kills_mutant(name, mutant, law, cases, monkeypatch):
    monkeypatch.setattr(method, name, mutant)

    @settings(max_examples=1000, derandomize=True, database=None, phases=[Phase.generate], report_multiple_bugs=False)
    @given(cases)
    def search(case):
        law(case)

    with pytest.raises(AssertionError):
        search()


def test_the_rebuilt_stage_is_the_stage(monkeypatch):
    """What `mutant_flip` changes one thing of is the real one."""
    weight = np.random.default_rng(0).standard_normal((8, 3, 3, 8))
    want = squant(weight, 4)[0]
    monkeypatch.setattr(method, "flip", mutant_flip())
    assert_same_integers(squant(weight, 4)[0], want)


# ------------------------------------------------------------------ the released method, as two lists


def released(x, qmin, qmax, mode):
    """SQuant as its code has it: a list of upward and one of downward flips, group after group; x (O, C, n)."""
    shape = x.shape
    x = x.reshape(shape[0], -1)
    q = np.rint(x)
    e = q - x
    able = {1: (e < 0) & (x < qmax), -1: (e > 0) & (x > qmin)}
    number = {d: np.where(able[d], q + d, q) for d in able}
    error = {d: np.where(able[d], e + d, 0) for d in able}
    priority = {d: np.where(able[d], np.abs(e), 0) for d in able}

    def stage(o, groups, before):
        for group in groups:
            total = e[o, group].sum()
            d = 1 if total < 0 else -1
            order = group[np.argsort(-before[d][o, group], kind="stable")]
            k = int(np.rint(abs(total)))
            e[o, order[:k]], q[o, order[:k]] = error[d][o, order[:k]], number[d][o, order[:k]]
            over = k >= abs(total)
            i = order[k - 1 if over else k]
            priority[-d if over else d][o, i] = abs(e[o, i])

    if mode in ("k", "full") and shape[2] > 1:
        before, priority = priority, {d: np.zeros_like(x) for d in able}
        for o in range(shape[0]):
            stage(o, np.arange(x.shape[1]).reshape(shape[1:]), before)
    if mode in ("c", "full"):
        before = {d: priority[d].copy() for d in able}
        for o in range(shape[0]):
            stage(o, np.arange(x.shape[1])[None], before)
    return np.clip(q, qmin, qmax).reshape(shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(7, 3, 3, 12), (5, 5, 1, 3), (9, 40), (4, 1, 1, 17)], ids=str)
def test_equals_the_released_method_on_generic_weights(shape, bits, mode):
    weight = np.random.default_rng([bits, *shape]).standard_normal(shape, dtype=np.float32)
    x, codes, qmin, qmax = solve((weight, bits), mode)
    assert_same_integers(codes.astype(int), released(x, qmin, qmax, mode).astype(int), x=x)


@pytest.mark.slow
@pytest.mark.skipif("mnist-unet" not in asset_names(), reason="no UNet in refquant/assets")
def test_equals_the_released_method_on_the_shipped_network():
    for name, layer in wrap(load_model("mnist-unet").network)[1].items():
        x, codes, qmin, qmax = solve((layer.layer.weight.data, 4), "full")
        assert np.array_equal(codes, released(x, qmin, qmax, "full")), name


def test_a_kernel_whose_errors_cancel_nominates_nobody():
    """Difference 1: there the released method flips a weight that lies nearer to its code than another could."""
    balanced, tilted = [0.25, -0.25, 0.25, -0.25], [0.375, 0.375, -0.125, -0.125]  # sums of x: 0 and 1/2
    x = np.array([[balanced, balanced, tilted, tilted]])
    q, other = method.neighbours(x, -2, 1)
    _, _, nominated = method.flip(x, q, other, np.ones(x.shape, dtype=bool))
    assert not nominated[0, :2].any() and (nominated[0, 2:].sum(axis=-1) == 1).all()


def test_top_of_a_symmetric_channel_is_saturated_before_it_is_counted():
    """Difference 3: x = 7.5 rounds to 8, is stored as 7, and counts with -1/2, not +1/2."""
    weight = np.array([[-1.0, 1.0, 0.1, 0.7, 0.3]], dtype=np.float32)
    x, codes, qmin, qmax = solve((weight, 4), "c")
    assert x.max() == 7.5 and codes.max() == 7
    assert abs((codes - x).sum()) <= 0.5
    assert abs((released(x, qmin, qmax, "c") - x).sum()) > 0.5
