"""Multi-region quantization: codes pack and unpack, integer products are the float ones, regions are disjoint."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mutants import assert_killed

from refquant.quant import mrq_sign, mrq_softmax
from refquant.quant.affine import QParams, QSpec, dequantize
from refquant.quant.mrq_sign import GELU_LOWEST, SILU_LOWEST, SignSplit
from refquant.quant.mrq_softmax import SoftmaxRegions, released_additive

# --------------------------------------------------------------------------------------------------------- softmax

regions = st.integers(3, 8).flatmap(lambda k: st.builds(SoftmaxRegions, st.just(k), st.integers(0, k - 1)))


@st.composite
def probabilities(draw):
    """(regions, p): 0, 1, the split and its neighbours, ties of either region, and anything between."""
    r = draw(regions)
    split = np.float32(2.0**-r.shift)
    corners = [0.0, 1.0, split, np.nextafter(split, np.float32(0)), 0.5 * float(r.fine), 1.5 * float(r.coarse)]
    element = st.sampled_from([float(np.float32(min(c, 1))) for c in corners]) | st.floats(0, 1, width=32)
    return r, draw(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=element))


@st.composite
def attention(draw):
    """(regions, p, codes of v, quantizer of v): rows of p sum to 1, peaked or flat."""
    r, n, tokens, width = draw(regions), draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.standard_normal((n, tokens, tokens)) * draw(st.sampled_from([0.1, 1, 3, 30]))
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    bits, scale = draw(st.integers(2, 8)), np.float32(draw(st.sampled_from([1e-3, 0.125, 7.0])))
    v = QParams(scale, draw(st.integers(0, 2**bits - 1)), QSpec(bits))
    codes = rng.choice([0, 2**bits - 1, *range(2**bits)], (n, tokens, width)).astype(np.uint8)
    return r, (e / e.sum(axis=-1, keepdims=True)).astype(np.float32), codes, v


def softmax_codes_pack_and_unpack(case):
    """One plane is 0 everywhere, flag and magnitude make the code again, and the code stands for the nearest step."""
    r, p = case
    codes = r.quantize(p)
    hi, lo = r.planes(codes)
    assert codes.dtype == np.uint8 and codes.max(initial=0) < 2**r.bits
    assert (hi * lo == 0).all() and max(hi.max(initial=0), lo.max(initial=0)) < r.half
    big = p >= 2.0**-r.shift
    assert (hi[~big] == 0).all() and (lo[big] == 0).all() and (codes >= r.half)[big].all()
    np.testing.assert_array_equal(np.where(big, r.half + hi, lo), codes)
    want = [round(Fraction(float(x / (r.coarse if b else r.fine)))) for x, b in zip(p.flat, big.flat, strict=True)]
    np.testing.assert_array_equal((hi + lo).ravel(), np.clip(want, 0, r.half - 1))
    np.testing.assert_array_equal(r.fake_quantize(p), r.dequantize(codes))
    back = r.dequantize(codes)
    own = (back >= 2.0**-r.shift) == big  # but for codes at the split, which rounding took across it
    assert own[(hi != (r.half - 1) >> 1) & (lo != r.half - 1)].all()
    np.testing.assert_array_equal(r.quantize(back)[own], codes[own])


def softmax_error_is_half_a_step(case):
    """|p^ - p| <= s1 / 2 below the split, s2 / 2 from there on; and p >= 2^-m never becomes 0."""
    r, p = case
    back, big = r.dequantize(r.quantize(p)), p >= 2.0**-r.shift
    assert (np.abs(back - p) <= np.where(big, r.coarse, r.fine) * (0.5 + 2.0**-14)).all()
    assert (back[big] > 0).all()


def one_accumulator_is_the_float_product(case):
    """u @ (v - z) in one int32 sum = the two planes' sums, shifted = dequantized P times V, exactly."""
    r, p, v_codes, v = case
    codes = r.quantize(p)
    acc = mrq_softmax.accumulate(r, codes, v_codes, int(v.zero_point))
    assert acc.dtype == np.int32
    hi, lo = r.planes(codes)
    centred = v_codes.astype(np.int64) - int(v.zero_point)
    np.testing.assert_array_equal(acc, ((hi.astype(np.int64) @ centred) << r.shift) + lo.astype(np.int64) @ centred)
    # p^ / s1 is an integer up to 2^14: float64 computes its product with V exactly, whatever the scale is
    whole = r.dequantize(codes).astype(np.float64) / float(r.fine)
    np.testing.assert_allclose(whole, np.rint(whole), rtol=2.0**-23)
    np.testing.assert_array_equal(np.rint(whole) @ centred, acc)
    got = mrq_softmax.product(r, codes, v_codes, v)
    want = r.dequantize(codes).astype(np.float64) @ dequantize(v_codes, v).astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * float(np.abs(want).max()))


@given(probabilities())
def test_softmax_codes_pack_and_unpack(case):
    softmax_codes_pack_and_unpack(case)


@given(probabilities())
def test_softmax_error_is_half_a_step(case):
    softmax_error_is_half_a_step(case)


@given(attention())
def test_one_accumulator_is_the_float_product(case):
    one_accumulator_is_the_float_product(case)


@given(regions)
def test_every_code_means_one_integer_and_steps_are_a_power_of_two_apart(r):
    """All 2^k codes: u of the fine ones 0..h-1, of the coarse ones their multiples of 2^m; s2 = 2^m s1 to the bit."""
    u = r.integers(np.arange(2**r.bits, dtype=np.uint8))
    np.testing.assert_array_equal(u[: r.half], np.arange(r.half))
    np.testing.assert_array_equal(u[r.half :], np.arange(r.half) << r.shift)
    assert r.fine * np.float32(2**r.shift) == r.coarse


def _no_shift(self, codes):
    hi, lo = self.planes(codes)
    return hi + lo


def _shifts_the_fine_plane(self, codes):
    hi, lo = self.planes(codes)
    return hi + (lo << self.shift)


def _fine_step_not_a_power_apart(self):
    return np.float32(2.0**-self.shift / self.half)


def _additive_codes(self, p):
    """What comes of the released sum, stored with the flag of the large region."""
    x = released_additive(p, self.bits, self.shift)
    big = p >= 2.0**-self.shift
    q = np.clip(np.rint(x / np.where(big, self.coarse, self.fine)), 0, self.half - 1).astype(np.uint8)
    return q | (big.astype(np.uint8) << np.uint8(self.bits - 1))


def _flag_of_the_rounded(self, p):
    q = np.rint(np.asarray(p, np.float32) / self.fine)
    big = q >= self.half  # the split itself rounds to h - 1 and stays fine
    q = np.where(big, np.rint(np.asarray(p, np.float32) / self.coarse), q)
    return np.clip(q, 0, self.half - 1).astype(np.uint8) | (big.astype(np.uint8) << np.uint8(self.bits - 1))


@pytest.mark.parametrize(
    ("name", "mutant", "law", "cases"),
    [
        ("integers", _no_shift, one_accumulator_is_the_float_product, attention()),
        ("integers", _shifts_the_fine_plane, one_accumulator_is_the_float_product, attention()),
        ("fine", property(_fine_step_not_a_power_apart), softmax_codes_pack_and_unpack, probabilities()),
        ("quantize", _additive_codes, softmax_error_is_half_a_step, probabilities()),
        ("quantize", _flag_of_the_rounded, softmax_codes_pack_and_unpack, probabilities()),
    ],
)
def test_wrong_regions_are_caught(name, mutant, law, cases, monkeypatch):
    monkeypatch.setattr(SoftmaxRegions, name, mutant)
    assert_killed(law, cases)


@given(probabilities())
def test_the_released_sum_is_too_large(case):
    """p^ = p + 2^-m above the split, up to rounding; the disjoint regions are not off by more than half a step."""
    r, p = case
    big = (p > 2.0**-r.shift) & (p <= 1)
    excess = released_additive(p, r.bits, r.shift)[big] - p[big]
    assert (np.abs(excess - 2.0**-r.shift) <= r.coarse / 2 + r.fine / 2 + 1e-6).all()


# ------------------------------------------------------------------------------------------------------------ signs


@st.composite
def activations(draw):
    """(split, x): ties, both ends and beyond, zeros of either sign."""
    bits = draw(st.integers(3, 8))
    lowest = draw(st.sampled_from([GELU_LOWEST, SILU_LOWEST]))
    split = SignSplit(bits, lowest / (2 ** (bits - 1) - 1), draw(st.floats(1e-4, 10)))
    halves = st.integers(-(2**bits) - 3, 2**bits + 3).map(
        lambda h: float(np.float32(h / 2 * (split.positive if h > 0 else split.negative)))
    )
    corners = st.sampled_from([0.0, -0.0, float(np.float32(-lowest)), 1e30, -1e30])
    element = corners | halves | st.floats(-9, 9, width=32)
    return split, draw(hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=6), elements=element))


@st.composite
def sign_products(draw):
    """(split, x, codes of W, quantizer of W)."""
    split, outputs, k = draw(activations())[0], draw(st.integers(1, 4)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = (rng.standard_normal((3, k)) * draw(st.sampled_from([0.1, 2.0]))).astype(np.float32)
    spec = QSpec(draw(st.integers(2, 8)), signed=True, axis=0)
    w = QParams(rng.uniform(0.01, 1, outputs), rng.integers(spec.qmin, spec.qmax + 1, outputs), spec)
    return split, x, rng.integers(spec.qmin, spec.qmax + 1, (outputs, k)).astype(np.int8), w


def sign_codes_pack_and_unpack(case):
    """The flag is the sign, the rest the nearest magnitude; values and codes come back, code 0 as the other zero."""
    s, x = case
    codes = s.quantize(x)
    np.testing.assert_array_equal(codes >= s.half, x >= 0)
    step = np.where(x < 0, np.float32(s.negative), np.float32(s.positive))
    want = [min(round(Fraction(float(a))), s.half - 1) for a in np.abs(x / step).ravel()]
    np.testing.assert_array_equal((codes & (s.half - 1)).ravel(), want)
    back = s.dequantize(codes)
    np.testing.assert_array_equal(s.fake_quantize(x), back)
    np.testing.assert_array_equal(s.quantize(back), np.where(codes == 0, s.half, codes))


def two_products_are_the_float_product(case):
    """s+ s_w (X+ W) + s- s_w (X- W) = x^ w^'."""
    s, x, w_codes, w = case
    codes = s.quantize(x)
    want = s.dequantize(codes).astype(np.float64) @ dequantize(w_codes, w).astype(np.float64).T
    reach = np.abs(s.dequantize(codes)).astype(np.float64) @ np.abs(dequantize(w_codes, w)).astype(np.float64).T
    error = np.abs(mrq_sign.product(s, codes, w_codes, w) - want)
    assert (error <= 1e-6 * reach + 1e-30).all()


@given(activations())
def test_sign_codes_pack_and_unpack(case):
    sign_codes_pack_and_unpack(case)


@given(sign_products())
def test_two_products_are_the_float_product(case):
    two_products_are_the_float_product(case)


@given(activations())
def test_gradient_passes_where_nothing_is_clipped(case):
    """inside = |x| rounds to at most the last code of its sign."""
    s, x = case
    step = np.where(x < 0, np.float32(s.negative), np.float32(s.positive))
    np.testing.assert_array_equal(s.inside(x), np.rint(np.abs(x) / step) <= s.half - 1)


def _both_signs_up(self, codes):
    up = codes >= self.half
    q = (codes & np.uint8(self.half - 1)).astype(np.int32)
    return np.where(up, q, 0), np.where(up, 0, q)


def _one_step(self, x):
    q = np.minimum(np.rint(np.abs(x) / np.float32(self.positive)), self.half - 1).astype(np.uint8)
    return q | ((x >= 0).astype(np.uint8) << np.uint8(self.bits - 1))


@pytest.mark.parametrize(
    ("name", "mutant", "law", "cases"),
    [
        ("planes", _both_signs_up, sign_codes_pack_and_unpack, activations()),
        ("quantize", _one_step, sign_codes_pack_and_unpack, activations()),
    ],
)
def test_wrong_signs_are_caught(name, mutant, law, cases, monkeypatch):
    monkeypatch.setattr(SignSplit, name, mutant)
    assert_killed(law, cases)


def test_a_product_that_swaps_the_steps_is_caught(monkeypatch):
    right = mrq_sign.product
    monkeypatch.setattr(
        mrq_sign, "product", lambda s, c, *rest: right(SignSplit(s.bits, s.positive, s.negative), c, *rest)
    )
    assert_killed(two_products_are_the_float_product, sign_products())
