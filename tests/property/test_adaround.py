"""The AdaRound family: the two neighbours, the start at the float weight, slopes, regulariser, schedule.

The laws are functions of one case (weight, qparams, alpha); the last part runs them on wrong arithmetic and
demands that they fail.
"""

import numpy as np
import pytest
from asserts import assert_same_integers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import affine_cases, along

from refquant.autograd import Tensor, check_gradients, gradients, ops
from refquant.quant import adaround
from refquant.quant.affine import QParams, QSpec, dequantize, quantize

LN11 = float(np.log(11))
ALPHAS = st.sampled_from([0.0, -0.0, 1e-6, -1e-6, LN11, -LN11, 3.0, -3.0, 200.0, -200.0]) | st.floats(-3, 3, width=32)


@st.composite
def cases(draw):
    """(weight, qparams, alpha): weights on codes, on ties, beyond both ends, anywhere; any bits and channels."""
    weight, q = draw(affine_cases())
    return weight, q, draw(hnp.arrays(np.float32, weight.shape, elements=ALPHAS))


def whole_and_fraction(weight, q):
    """⌊w/s⌋ and the rest in float64, from the float32 quotient in which codes are defined."""
    scale, _ = along(q, weight.ndim)
    quotient = (weight / scale.astype(np.float32)).astype(np.float64)
    return np.floor(quotient), quotient - np.floor(quotient)


def h_by_the_formula(alpha):
    with np.errstate(over="ignore"):
        return np.clip(1.2 / (1 + np.exp(-alpha.astype(np.float64))) - 0.1, 0, 1)


# ---------------------------------------------------------------- laws


def hard_codes_are_the_neighbours(case):
    """q = clip(⌊w/s⌋ + z) where alpha < 0, clip(⌊w/s⌋ + 1 + z) elsewhere; never another code."""
    weight, q, alpha = case
    whole, _ = whole_and_fraction(weight, q)
    _, zero = along(q, weight.ndim)
    up = np.where(alpha < 0, 0, 1)
    want = np.clip(whole + up + zero, q.spec.qmin, q.spec.qmax).astype(int)
    got = adaround.hard_codes(alpha, weight, q)
    assert got.dtype == q.spec.dtype
    assert_same_integers(got, want, weight=weight, alpha=alpha)


def h_is_the_formula(case):
    """0 <= h <= 1, h = clip(1.2 σ - 0.1), and h reaches its ends: |alpha| >= 2.4 gives 0 or 1 exactly."""
    alpha = case[2]
    h = adaround.rectified_sigmoid(alpha)
    assert h.dtype == np.float32 and (h >= 0).all() and (h <= 1).all()
    np.testing.assert_allclose(h, h_by_the_formula(alpha), rtol=0, atol=3e-7)
    np.testing.assert_array_equal(h[np.abs(alpha) > 2.4], (alpha > 0)[np.abs(alpha) > 2.4])


def soft_weight_is_the_formula(case):
    """ŵ = s (clamp(⌊w/s⌋ + h + z) - z), to 2**-15 of a step: u and q - z are below 2**9, and round twice."""
    weight, q, alpha = case
    whole, _ = whole_and_fraction(weight, q)
    scale, zero = along(q, weight.ndim)
    want = np.clip(whole + h_by_the_formula(alpha) + zero, q.spec.qmin, q.spec.qmax) - zero
    got = adaround.soft_weight(Tensor(alpha), weight, q).data
    assert got.dtype == np.float32
    assert (np.abs(got / scale - want) <= 2.0**-15).all()


def starts_at_the_float_weight(case):
    """ŵ(alpha0) = w where qmin <= w/s + z <= qmax, to 2**-14 of a step; the nearest end of the grid elsewhere."""
    weight, q, _ = case
    scale, zero = along(q, weight.ndim)
    alpha = adaround.initial_alpha(weight, q)
    assert alpha.dtype == np.float32 and (np.abs(alpha) <= LN11 + 1e-6).all()
    soft = adaround.soft_weight(Tensor(alpha), weight, q).data
    want = np.clip(weight, scale * (q.spec.qmin - zero), scale * (q.spec.qmax - zero))
    assert (np.abs(soft - want) <= scale * 2.0**-14).all()


def hard_at_the_start_is_nearest(case):
    """hard(alpha0) = quantize(w), but that a tie goes up and not to the even code."""
    weight, q, _ = case
    whole, fraction = whole_and_fraction(weight, q)
    _, zero = along(q, weight.ndim)
    up = np.clip(whole + 1 + zero, q.spec.qmin, q.spec.qmax).astype(int)
    want = np.where(fraction == 0.5, up, quantize(weight, q))
    got = adaround.hard_codes(adaround.initial_alpha(weight, q), weight, q)
    assert_same_integers(got, want, weight=weight)


def soft_becomes_hard(case):
    """ŵ = dequantize(hard codes), bit for bit, as soon as every h is 0 or 1."""
    weight, q, alpha = case
    decided = np.where(alpha < 0, np.float32(-3), np.float32(3))
    hard = dequantize(adaround.hard_codes(decided, weight, q), q)
    np.testing.assert_array_equal(adaround.soft_weight(Tensor(decided), weight, q).data, hard)


def slope_is_the_formula(case):
    """dŵ/dα = s [qmin <= u <= qmax] [0 <= 1.2 σ - 0.1 <= 1] 1.2 σ (1 - σ); u and h within 1e-5 of an end not judged."""
    weight, q, alpha = case
    whole, _ = whole_and_fraction(weight, q)
    scale, zero = along(q, weight.ndim)
    t = Tensor(alpha, requires_grad=True)
    g = np.arange(1, alpha.size + 1, dtype=np.float32).reshape(alpha.shape)
    (got,) = gradients(ops.sum_all(ops.mul(adaround.soft_weight(t, weight, q), g)), [t])
    with np.errstate(over="ignore"):
        sigma = 1 / (1 + np.exp(-alpha.astype(np.float64)))
    stretched = 1.2 * sigma - 0.1
    u = whole + np.clip(stretched, 0, 1) + zero
    # at h = 0 or 1 exactly, u is a whole number, computed without rounding, and may lie on an end: that is inside
    decided = (stretched < -1e-5) | (stretched > 1 + 1e-5)
    clear = (np.abs(u - q.spec.qmin) > 1e-4) & (np.abs(u - q.spec.qmax) > 1e-4)
    judged = decided | (clear & (np.abs(stretched) > 1e-5) & (np.abs(stretched - 1) > 1e-5))
    inside = (u >= q.spec.qmin) & (u <= q.spec.qmax) & ~decided
    want = g * scale * inside * 1.2 * sigma * (1 - sigma)
    np.testing.assert_allclose(got[judged], want[judged], rtol=1e-5)


def regulariser_is_the_sum(case):
    """R = Σ (1 - |2h - 1|^β), whatever the size; R([a, a]) = 2 R(a)."""
    alpha = case[2]
    for beta in (20, 11, 7.5, 2):
        want = (1 - np.abs(2 * h_by_the_formula(alpha) - 1) ** beta).sum()
        got = adaround.rounding_regulariser(Tensor(alpha), beta)
        assert got.shape == () and got.dtype == np.float32
        np.testing.assert_allclose(got.data, want, rtol=2e-5, atol=2e-5 * alpha.size)
        twice = adaround.rounding_regulariser(Tensor(np.stack([alpha, alpha])), beta)
        np.testing.assert_allclose(twice.data, 2 * got.data, rtol=1e-5)


def regulariser_has_its_slope(_):
    """dR/dα is the finite difference of R, for β = 20 ... 2, on both sides of 0 and of the corners at ∓ln 11."""
    alpha = np.array([-5, -2.3, -1.2, -0.3, 0.4, 1.7, 2.35, 2.5])
    for beta in (20, 7.5, 3, 2):
        check_gradients(lambda a, beta=beta: adaround.rounding_regulariser(a, beta), alpha)


def schedule_falls_linearly_from_the_first_active_iteration(_):
    """β = start up to k = warmup K, the first iteration with the rounding term; end at K; equal steps between."""
    for iterations, warmup in ((20000, 0.2), (100, 0.25), (10, 0.5), (8, 0.0)):
        first = int(warmup * iterations)
        k = np.arange(max(first, 1), iterations + 1)
        beta = np.array([adaround.beta_schedule(int(i), iterations, warmup, 20, 2) for i in k])
        np.testing.assert_allclose(beta, 20 - 18 * (k - first) / (iterations - first), rtol=1e-12)
        active = [adaround.rounding_is_active(i, iterations, warmup) for i in range(1, iterations + 1)]
        assert active == [i >= first for i in range(1, iterations + 1)]
        assert adaround.beta_schedule(1, iterations, warmup) == (20 if first else 20 - 18 / iterations)
        assert adaround.beta_schedule(iterations, iterations, warmup) == 2
        assert adaround.beta_schedule(iterations + 1, iterations, warmup) == 2


LAWS = [
    hard_codes_are_the_neighbours,
    h_is_the_formula,
    soft_weight_is_the_formula,
    starts_at_the_float_weight,
    hard_at_the_start_is_nearest,
    soft_becomes_hard,
    slope_is_the_formula,
    regulariser_is_the_sum,
    regulariser_has_its_slope,
    schedule_falls_linearly_from_the_first_active_iteration,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law):
    needs_no_case = law in LAWS[-2:]
    given(st.none() if needs_no_case else cases())(law)()


# ---------------------------------------------------------------- mutants

soft_weight, hard_codes, regulariser = adaround.soft_weight, adaround.hard_codes, adaround.rounding_regulariser
quotient, slope_of, initial_alpha = adaround._quotient, adaround._rectified_sigmoid_and_slope, adaround.initial_alpha


def half_up_instead_of_floor(weight, q):
    return quotient(weight, q) + np.float32(0.5)


def toward_zero_instead_of_floor(weight, q):
    return np.trunc(quotient(weight, q))


def times_the_reciprocal(weight, q):
    scale, _ = along(q, weight.ndim)
    return weight * (1 / scale.astype(np.float32))


def first_channel_scale(weight, q):
    return weight / q.scale.flat[0]


def zero_alpha_rounds_down(alpha, weight, q):
    return hard_codes(np.where(alpha == 0, -1, alpha), weight, q)


def codes_clamped_before_zero_point(alpha, weight, q):
    whole, _ = whole_and_fraction(weight, q)
    up = np.clip(whole + (alpha >= 0), q.spec.qmin, q.spec.qmax)
    return np.clip(up + along(q, weight.ndim)[1], q.spec.qmin, q.spec.qmax).astype(q.spec.dtype)


def h_without_clip(alpha):
    with np.errstate(over="ignore"):
        return (np.float32(1.2) / (1 + np.exp(-alpha)) - np.float32(0.1)).astype(np.float32)


def soft_weight_without_clamp(alpha, weight, q):
    return soft_weight(alpha, weight, QParams(q.scale, q.zero_point, QSpec(8, q.spec.signed, axis=q.spec.axis)))


def clamp_of_codes_ignored_in_the_gradient(alpha, weight, q):
    slope = slope_of(alpha.data)[1] * along(q, weight.ndim)[0].astype(np.float32)
    return Tensor(soft_weight(alpha, weight, q).data, (alpha,), lambda g: (g * slope,))


def clip_of_h_ignored_in_the_gradient(alpha):
    with np.errstate(over="ignore"):
        sigma = 1 / (1 + np.exp(-alpha))
    return slope_of(alpha)[0], np.float32(1.2) * sigma * (1 - sigma)


def ends_of_h_count_as_outside(alpha):
    h, slope = slope_of(alpha)
    return h, slope * ((h > 0) & (h < 1))


def scale_ignored_in_the_gradient(alpha, weight, q):
    y = soft_weight(alpha, weight, q)
    return Tensor(y.data, (alpha,), lambda g: (y._vjp(g)[0] / along(q, weight.ndim)[0].astype(np.float32),))


def start_undecided(weight, q):
    return np.zeros_like(initial_alpha(weight, q))


def start_mirrored(weight, q):
    return -initial_alpha(weight, q)


def start_without_stretching(weight, q):
    _, r = whole_and_fraction(weight, q)
    r = np.clip(r, 0.1, 0.9)
    return np.log(r / (1 - r)).astype(np.float32)


def beta_one_less(alpha, beta):
    return regulariser(alpha, beta - 0.999)


def slope_with_beta_instead_of_beta_less_one(alpha, beta):
    h, slope = slope_of(alpha.data)
    u = 2 * h - 1
    slope = slope * (-2 * beta) * np.abs(u) ** beta * np.sign(u)
    return Tensor(regulariser(alpha, beta).data, (alpha,), lambda g: (g * slope,))


def mean_instead_of_sum(alpha, beta):
    return ops.scale(regulariser(alpha, beta), 1 / alpha.data.size)


def sign_of_the_side_forgotten(alpha, beta):
    y = regulariser(alpha, beta)
    return Tensor(y.data, (alpha,), lambda g: (-np.abs(y._vjp(g)[0]),))


schedule, is_active = adaround.beta_schedule, adaround.rounding_is_active


def schedule_counted_from_zero(k, iterations, *rest):
    return schedule(max(k - 1, 1), iterations, *rest)


def schedule_without_warmup(k, iterations, warmup=0.2, start=20, end=2):
    return schedule(k, iterations, 0.0, start, end)


def schedule_falls_like_a_cosine(k, iterations, warmup=0.2, start=20, end=2):
    progress = min(1.0, max(0.0, (k - warmup * iterations) / ((1 - warmup) * iterations)))
    return end + (start - end) * (1 + np.cos(np.pi * progress)) / 2


def active_one_late(k, iterations, warmup=0.2):
    return k > warmup * iterations


MUTANTS = [
    ("_quotient", half_up_instead_of_floor, hard_codes_are_the_neighbours),
    ("_quotient", toward_zero_instead_of_floor, starts_at_the_float_weight),
    ("_quotient", toward_zero_instead_of_floor, soft_weight_is_the_formula),
    ("_quotient", times_the_reciprocal, hard_codes_are_the_neighbours),
    ("_quotient", first_channel_scale, soft_weight_is_the_formula),
    ("hard_codes", zero_alpha_rounds_down, hard_at_the_start_is_nearest),
    ("hard_codes", codes_clamped_before_zero_point, soft_becomes_hard),
    ("rectified_sigmoid", h_without_clip, h_is_the_formula),
    ("soft_weight", soft_weight_without_clamp, starts_at_the_float_weight),
    ("soft_weight", clamp_of_codes_ignored_in_the_gradient, slope_is_the_formula),
    ("_rectified_sigmoid_and_slope", clip_of_h_ignored_in_the_gradient, slope_is_the_formula),
    ("_rectified_sigmoid_and_slope", clip_of_h_ignored_in_the_gradient, regulariser_has_its_slope),
    ("soft_weight", scale_ignored_in_the_gradient, slope_is_the_formula),
    ("initial_alpha", start_undecided, starts_at_the_float_weight),
    ("initial_alpha", start_mirrored, hard_at_the_start_is_nearest),
    ("initial_alpha", start_without_stretching, starts_at_the_float_weight),
    ("rounding_regulariser", beta_one_less, regulariser_is_the_sum),
    ("rounding_regulariser", slope_with_beta_instead_of_beta_less_one, regulariser_has_its_slope),
    ("rounding_regulariser", mean_instead_of_sum, regulariser_is_the_sum),
    ("rounding_regulariser", sign_of_the_side_forgotten, regulariser_has_its_slope),
    ("beta_schedule", schedule_counted_from_zero, schedule_falls_linearly_from_the_first_active_iteration),
    ("beta_schedule", schedule_without_warmup, schedule_falls_linearly_from_the_first_active_iteration),
    ("beta_schedule", schedule_falls_like_a_cosine, schedule_falls_linearly_from_the_first_active_iteration),
    ("rounding_is_active", active_one_late, schedule_falls_linearly_from_the_first_active_iteration),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mutants do not silence overflow
@pytest.mark.parametrize(
    ("name", "mutant", "law"), [pytest.param(*m, id=f"{m[1].__name__}-{m[2].__name__}") for m in MUTANTS]
)
def test_law_kills_mutant(name, mutant, law, monkeypatch):
    monkeypatch.setattr(adaround, name, mutant)
    search = settings(max_examples=1000, derandomize=True, database=None, phases=[Phase.generate])(given(cases())(law))
    with pytest.raises(AssertionError):
        search()
