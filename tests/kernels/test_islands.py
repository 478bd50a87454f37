"""Float islands: the stated error bounds, one set of bits from all kernels in C, exact codes, refusals, mutants.

The judge is neither NumPy's float64 nor C: `exact_...` computes in extended precision. Where a machine has none,
np.longdouble is float64, and the bounds (2e-6 of a step, 0.6 ulp of float32) still leave room for it.
"""

import dataclasses
import subprocess

import numpy as np
import pytest
from cbuild import CEXT, build_ext
from guards import Guarded, every_kernel
from hypothesis import given
from hypothesis import strategies as st

from refquant import kernels
from refquant.errors import RangeError, ShapeError
from refquant.kernels import _ext, _islands
from refquant.quant import affine
from refquant.ref import islands as ref
from refquant.threads import using_threads

ULP, STEP = 0.6, 2e-6  # the bounds of refquant/ref/islands.py
CANCELLED = 2.0**-36  # of |gamma| + |beta|
L = np.longdouble

needs_extension = pytest.mark.skipif(_ext.lib is None, reason="the C core is not compiled")


# ------------------------------------------------------------------ the judge


def exact_silu(z):
    with np.errstate(over="ignore", under="ignore"):
        return z / (1 + np.exp(-z))


def exact_group_norm(case):
    n, h, w, c = case.x.shape
    d = case.x.astype(L).reshape(n, h * w, case.groups, -1)
    d = d - d[:, :1, :, :1]
    d = d - d.mean(axis=(1, 3), keepdims=True)
    z = d / np.sqrt(np.square(d).mean(axis=(1, 3), keepdims=True) + L(case.eps))
    z = z.reshape(case.x.shape) * case.gamma.astype(L) + case.beta.astype(L)
    return exact_silu(z) if case.silu else z


def exact_softmax(scores, factor):
    e = scores.astype(L)
    with np.errstate(under="ignore"):
        e = np.exp((e - e.max(axis=-1, keepdims=True)) * L(factor))
        return e / e.sum(axis=-1, keepdims=True)


def assert_float(got, want, slack=0.0):
    """At most ULP units of the last place of float32 away, and the slack."""
    with np.errstate(over="ignore", under="ignore"):
        ulp = np.spacing(np.abs(want).astype(np.float32)).astype(L)
    fits = np.abs(want) < np.finfo(np.float32).max
    error = np.abs(got.astype(L) - want) - np.asarray(slack, L)
    wrong = fits & ~(error <= ULP * ulp)
    assert not wrong.any(), f"{got[wrong][0]!r} is {(error / ulp)[wrong][0]} ulp from {want[wrong][0]!r}"


def assert_codes(got, want, scale, zero_point=0, bits=8, slack=0.0):
    """The codes of `want`; both where it lies closer than STEP to the middle between two."""
    y, room = want / L(np.float32(scale)), STEP + np.asarray(slack, L) / L(np.float32(scale))
    low, high = (np.clip(np.rint(y + side) + zero_point, 0, 2**bits - 1) for side in (-room, room))
    wrong = (got < low) | (got > high)
    assert not wrong.any(), f"code {got[wrong][0]} of {y[wrong][0]} steps, zero point {zero_point}"


@dataclasses.dataclass
class Norm:
    """Operands of a group norm."""

    x: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    groups: int
    eps: float = 1e-6
    silu: bool = True

    @property
    def slack(self):
        """SiLU's slope is below 1.1."""
        return 1.1 * CANCELLED * (np.abs(self.gamma.astype(L)) + np.abs(self.beta.astype(L)))

    def run(self, **options):
        operands = (self.x, self.gamma, self.beta, self.groups)
        return kernels.group_norm_silu_quantize(*operands, eps=self.eps, silu=self.silu, **options)

    def check(self, want, scale=0.02, zero_point=14, bits=8):
        """Both results of the active kernel, in guarded arrays; return their bits."""
        real, codes = Guarded(self.x.shape, np.float32), Guarded(self.x.shape, np.uint8)
        assert_float(self.run(out=real.array), want, self.slack)
        stage = {"scale": scale, "zero_point": zero_point, "bits": bits}
        assert_codes(self.run(out=codes.array, **stage), want, *stage.values(), self.slack)
        real.check()
        codes.check()
        return real.array.tobytes() + codes.array.tobytes()


FILLS = {
    "normal": lambda rng, shape: rng.normal(1, 3, shape),
    "far from 0": lambda rng, shape: 1e4 + rng.normal(0, 1e-2, shape),
    "constant": lambda rng, shape: np.full(shape, rng.choice([0, 1, -0.1, 3e38, 1e-40, 16777217.0])),
    "constant in a channel": lambda rng, shape: np.broadcast_to(rng.normal(0, 1e20, shape[-1]), shape),
    "one outlier": lambda rng, shape: np.where(rng.random(shape) < 2 / np.prod(shape), 1e9, 1.5),
    "one ulp": lambda rng, shape: np.where(rng.random(shape) < 0.5, 1e6, np.nextafter(np.float32(1e6), np.inf)),
    "huge": lambda rng, shape: rng.choice([-3e38, 3e38, 1e38, 0], shape),
    "denormal": lambda rng, shape: rng.choice([1e-45, -1e-40, 0, 1e-42], shape),
    "corners": lambda rng, shape: rng.choice([0, -0.0, 30, -30, 1, -1, 88.8, -104, 1e-8], shape),
}
VECTORS = {
    "ones": lambda rng, c: np.ones(c),
    "zeros": lambda rng, c: np.zeros(c),
    "normal": lambda rng, c: rng.normal(0, 1, c),
    "large": lambda rng, c: rng.choice([30, -30, 700, 1e-3, 0], c),
}


@st.composite
def norms(draw):
    """One pixel, one group, as many groups as channels, and channels that are no multiple of 16."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups, each = draw(st.sampled_from([1, 2, 3, 5, 8, 16])), draw(st.sampled_from([1, 2, 3, 4, 8, 17, 32]))
    sizes = st.sampled_from([1, 2, 3, 5, 7])
    shape = (draw(st.integers(1, 3)), draw(sizes), draw(sizes), groups * each)
    gamma, beta = (VECTORS[draw(st.sampled_from(list(VECTORS)))](rng, shape[3]).astype(np.float32) for _ in range(2))
    x = FILLS[draw(st.sampled_from(list(FILLS)))](rng, shape).astype(np.float32)
    return Norm(x, gamma, beta, groups, draw(st.sampled_from([1e-6, 1e-5, 1e-20, 1.0])), draw(st.booleans()))


STAGES = st.tuples(
    st.sampled_from([0.02, 1e-3, 0.5, 1e-30, 1e30, 2.0**-126]) | st.floats(1e-4, 10),
    st.sampled_from([(0, 8), (14, 8), (255, 8), (3, 4), (15, 4), (1, 2)]),
)


def one_set_of_bits(results):
    """All kernels in C agree; `ref` may differ from them."""
    bits = {isa: b for isa, b in results.items() if isa != "ref"}
    assert len(set(bits.values())) <= 1, f"{list(bits)} differ"


# ------------------------------------------------------------------ bounds and bits


@given(norms(), STAGES)
def test_group_norm(case, stage):
    scale, (zero_point, bits) = stage
    want = exact_group_norm(case)
    one_set_of_bits({isa: case.check(want, scale, zero_point, bits) for isa in every_kernel()})


def silu_check(x, scale=0.02, zero_point=14, bits=8):
    real, codes = Guarded(x.shape, np.float32), Guarded(x.shape, np.uint8)
    want, stage = exact_silu(x.astype(L)), {"scale": scale, "zero_point": zero_point, "bits": bits}
    assert_float(kernels.silu_quantize(x, out=real.array), want)
    assert_codes(kernels.silu_quantize(x, out=codes.array, **stage), want, *stage.values())
    real.check()
    codes.check()
    return real.array.tobytes() + codes.array.tobytes()


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-30, 30, width=32)
FLOATS = st.lists(FINITE, max_size=70)


@given(FLOATS, STAGES)
def test_silu(numbers, stage):
    scale, (zero_point, bits) = stage
    x = np.array(numbers, np.float32)
    one_set_of_bits({isa: silu_check(x, scale, zero_point, bits) for isa in every_kernel()})


@needs_extension
def test_silu_everywhere(isa):
    """Dense from -120, where float32 ends, to 40; and the whole range of exponents."""
    silu_check(np.linspace(-120, 40, 100_003, dtype=np.float32))
    silu_check(np.outer([1, -1], np.ldexp(np.float32(1.37), np.arange(-149, 128))).astype(np.float32))


def softmax_check(scores, factor=1.0, scale=1 / 255, bits=8):
    real, codes = Guarded(scores.shape, np.float32), Guarded(scores.shape, np.uint8)
    want = exact_softmax(scores, factor)
    assert_float(kernels.softmax_quantize(scores, factor=factor, out=real.array), want)
    got = kernels.softmax_quantize(scores, factor=factor, scale=scale, bits=bits, out=codes.array)
    assert_codes(got, want, scale, 0, bits)
    real.check()
    codes.check()
    return real.array.tobytes() + codes.array.tobytes()


@st.composite
def score_arrays(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 7, 15, 16, 17, 31, 49, 64])))
    match draw(st.sampled_from(["normal", "masked", "equal", "huge", "int32", "corners of int32"])):
        case "normal":
            return rng.normal(0, 4, shape).astype(np.float32), 1.0
        case "masked":
            x = np.where(rng.random(shape) < 0.5, -np.inf, rng.normal(0, 20, shape))
            x[..., 0] = 1
            return x.astype(np.float32), 0.3
        case "equal":
            return np.full(shape, rng.choice([0, -3e38, 5]), np.float32), 1e30
        case "huge":
            x = rng.choice([3e38, -3e38, 2.9e38, 0], shape).astype(np.float32)
            return x, draw(st.sampled_from([1e-30, 1.0, 1e30]))
        case "int32":
            return rng.integers(-40_000, 40_000, shape).astype(np.int32), 2.3e-4
    return rng.choice([-(2**31), 2**31 - 1, 0, 2**31 - 2], shape).astype(np.int32), draw(st.sampled_from([1e-9, 1.0]))


@given(score_arrays(), st.sampled_from([1 / 255, 0.1, 1e-4, 1.0]), st.sampled_from([8, 4, 2]))
def test_softmax(operands, scale, bits):
    scores, factor = operands
    one_set_of_bits({isa: softmax_check(scores, factor, scale, bits) for isa in every_kernel()})


def test_softmax_of_one_score(isa):
    """One, exactly."""
    assert kernels.softmax_quantize(np.full((2, 1), 7, np.int32)).tolist() == [[1], [1]]
    assert kernels.softmax_quantize(np.array([5, -np.inf], np.float32), scale=1 / 255).tolist() == [255, 0]


def quantize_check(x, scale, zero_point, bits):
    codes = Guarded(x.shape, np.uint8)
    want = affine.quantize(x, affine.QParams(scale, zero_point, affine.QSpec(bits)))
    np.testing.assert_array_equal(kernels.quantize(x, scale, zero_point, bits=bits, out=codes.array), want)
    codes.check()


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=70), STAGES)
def test_quantize_gives_the_codes_of_affine(numbers, stage):
    """Infinities too."""
    scale, (zero_point, bits) = stage
    if scale < 1e30:  # QParams wants codes that mean a float32
        for _ in every_kernel():
            quantize_check(np.array(numbers, np.float32), scale, zero_point, bits)


@given(st.floats(2**-10, 10, width=32), st.integers(0, 255))
def test_quantize_at_the_boundaries(scale, zero_point):
    """Every middle between two codes, and both its neighbours."""
    middles = (np.arange(-300, 300) + np.float32(0.5)) * np.float32(scale)
    x = np.concatenate([np.nextafter(middles, side) for side in (-np.inf, np.inf)] + [middles]).astype(np.float32)
    for _ in every_kernel():
        quantize_check(x, scale, zero_point, 8)


@given(FLOATS)
def test_residual_add(numbers):
    a = np.array(numbers, np.float32)
    b = np.roll(a, 1) * np.float32(0.7)
    with np.errstate(over="ignore"):
        want = a + b
    for _ in every_kernel():
        out = Guarded(a.shape, np.float32)
        np.testing.assert_array_equal(kernels.residual_add(a, b, out=out.array), want)
        out.array[...] = a
        np.testing.assert_array_equal(kernels.residual_add(out.array, b, out=out.array), want)  # a += b
        out.array[...] = b
        np.testing.assert_array_equal(kernels.residual_add(a, out.array, out=out.array), want)
        out.check()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("c", [1, 3, 15, 16, 17, 32, 100])
def test_upsample_nearest(isa, dtype, c):
    x = np.random.default_rng(c).integers(0, 256, (2, 3, 5, c)).astype(dtype)
    out = Guarded((2, 6, 10, c), dtype)
    kernels.upsample_nearest(x, out=out.array)
    for i in range(2):
        for j in range(2):
            np.testing.assert_array_equal(out.array[:, i::2, j::2], x)
    out.check()


# ------------------------------------------------------------------ everything that surrounds the numbers


def test_the_number_of_threads_does_not_matter(isa):
    rng = np.random.default_rng(0)
    case = Norm(rng.normal(1, 3, (7, 11, 13, 24)).astype(np.float32), *np.float32([[1.5] * 24, [0.2] * 24]), 3)
    x, scores = rng.normal(0, 5, 70_001).astype(np.float32), rng.normal(0, 5, (5, 49, 49)).astype(np.float32)
    image = rng.integers(0, 256, (3, 40, 41, 20), np.uint8)

    def everything():
        return [
            case.run(), case.run(scale=0.02, zero_point=14), kernels.quantize(x, 0.1, 128), kernels.silu_quantize(x),
            kernels.softmax_quantize(scores, scale=1 / 255), kernels.residual_add(x, x),
            kernels.upsample_nearest(image),
        ]  # fmt: skip

    with using_threads(1):
        want = everything()
    for threads in (2, 3, 7):
        with using_threads(threads):
            for got, one in zip(everything(), want, strict=True):
                np.testing.assert_array_equal(got, one)


def test_any_layout_is_read(isa):
    """Strides, an odd address, an array that cannot be written, another order of axes."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 3, (2, 4, 3, 12)).astype(np.float32)
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    odd[...] = x
    wide = np.repeat(x, 2, axis=3)
    whole = x.copy()
    whole.flags.writeable = False
    gamma, beta = rng.normal(0, 1, (2, 12)).astype(np.float32)
    for same in (odd, wide[..., ::2], np.asfortranarray(x), whole):
        for run in (
            lambda a: kernels.group_norm_silu_quantize(a, np.repeat(gamma, 2)[::2], beta, 3, scale=0.1, zero_point=3),
            lambda a: kernels.quantize(a, 0.1, 3),
            lambda a: kernels.silu_quantize(a),
            lambda a: kernels.softmax_quantize(a),
            lambda a: kernels.residual_add(a, x),
            lambda a: kernels.upsample_nearest(a),
        ):
            np.testing.assert_array_equal(run(same), run(x))


@pytest.mark.parametrize("shape", [(0, 2, 2, 4), (2, 0, 3, 4), (2, 3, 0, 4)])
def test_nothing(isa, shape):
    x, v = np.zeros(shape, np.float32), np.ones(4, np.float32)
    assert kernels.group_norm_silu_quantize(x, v, v, 2).shape == shape
    assert kernels.group_norm_silu_quantize(x, v, v, 2, scale=1).dtype == np.uint8
    assert kernels.quantize(x, 1).shape == kernels.silu_quantize(x).shape == kernels.residual_add(x, x).shape == shape
    assert kernels.softmax_quantize(x).shape == kernels.softmax_quantize(x[..., :0]).shape[:3] + (4,) == shape
    assert kernels.upsample_nearest(x).size == 0
    assert kernels.quantize(np.array(7, np.float32), 1).shape == ()


X, V = np.ones((2, 3, 4, 6), np.float32), np.ones(6, np.float32)
S = np.ones((2, 3, 3), np.float32)


def norm(x=X, gamma=V, beta=V, groups=2, **options):
    return kernels.group_norm_silu_quantize(x, gamma, beta, groups, **options)


def with_number(x, number):
    x = x.copy()
    x.flat[7 % x.size] = number
    return x


NAN, INF = np.nan, np.inf
REFUSED = [
    (lambda: norm(X.astype(float)), ShapeError, "x has dtype float64.*must be float32"),
    (lambda: norm(X[0]), ShapeError, r"\(N, H, W, C\)"),
    (lambda: norm([1]), ShapeError, "x is a list"),
    (lambda: norm(gamma=V[:5]), ShapeError, r"gamma \(5,\).*for 6 channels"),
    (lambda: norm(beta=V.astype(int)), ShapeError, "beta has dtype int64"),
    (lambda: norm(groups=4), ShapeError, "groups is 4.*divides 6"),
    (lambda: norm(groups=0), ShapeError, "groups is 0"),
    (lambda: norm(groups=2.0), ShapeError, "groups is 2.0"),
    (lambda: norm(eps=0), RangeError, "eps is 0.0.*positive"),
    (lambda: norm(eps=NAN), RangeError, "eps is nan"),
    (lambda: norm(scale=0), RangeError, "scale is 0.0.*positive"),
    (lambda: norm(scale=1e-39), RangeError, "scale is 1e-39.*normal"),
    (lambda: norm(scale=1e39), RangeError, r"scale is 1e\+39"),
    (lambda: norm(scale=NAN), RangeError, "scale is nan"),
    (lambda: norm(scale=V), RangeError, "must be one number"),
    (lambda: norm(scale="1"), RangeError, "must be one number"),
    (lambda: norm(scale=1, zero_point=256), RangeError, r"zero_point is 256.*0\.\.255"),
    (lambda: norm(scale=1, zero_point=16, bits=4), RangeError, r"zero_point is 16.*0\.\.15"),
    (lambda: norm(scale=1, zero_point=1.0), RangeError, "zero_point is 1.0"),
    (lambda: norm(scale=1, bits=9), RangeError, "bits is 9"),
    (lambda: norm(scale=1, bits=1), RangeError, "bits is 1"),
    (lambda: norm(with_number(X, NAN)), RangeError, r"x is nan at index \(0, 0, 1, 1\)"),
    (lambda: norm(with_number(X, INF), scale=1), RangeError, "x is inf at index"),
    (lambda: norm(with_number(X, -INF), silu=False), RangeError, "x is -inf at index"),
    (lambda: norm(gamma=with_number(V, INF)), RangeError, r"gamma is inf at index \(1,\)"),
    (lambda: norm(beta=with_number(V, NAN), scale=1), RangeError, r"beta is nan at index \(1,\)"),
    (lambda: kernels.silu_quantize(X.astype(np.float16)), ShapeError, "x is float16"),
    (lambda: kernels.silu_quantize(with_number(X, NAN)), RangeError, "x is nan at index"),
    (lambda: kernels.silu_quantize(with_number(V, INF), scale=1), RangeError, r"x is inf at index \(1,\)"),
    (lambda: kernels.silu_quantize(with_number(V, -INF), scale=1), RangeError, "x is -inf at index"),
    (lambda: kernels.quantize(X.astype(float), 1), ShapeError, "x is float64"),
    (lambda: kernels.quantize(with_number(X, NAN), 1), RangeError, r"x is nan at index \(0, 0, 1, 1\)"),
    (lambda: kernels.quantize(with_number(V, NAN), 1), RangeError, r"x is nan at index \(1,\)"),
    (lambda: kernels.quantize(X, -1), RangeError, "scale is -1.0"),
    (lambda: kernels.softmax_quantize(S.astype(np.int64)), ShapeError, "scores is int64"),
    (lambda: kernels.softmax_quantize(np.float32(1)), ShapeError, "scores is a float32"),
    (lambda: kernels.softmax_quantize(S, factor=0), RangeError, "factor is 0"),
    (lambda: kernels.softmax_quantize(S, factor=1e31), RangeError, "factor is 1e"),
    (lambda: kernels.softmax_quantize(S, scale=1e-50), RangeError, "scale is 1e-50"),
    (lambda: kernels.softmax_quantize(with_number(S, NAN)), RangeError, r"line \(0, 2\) of \(2, 3\) is nan"),
    (lambda: kernels.softmax_quantize(with_number(S, INF), scale=1), RangeError, r"line \(0, 2\) of \(2, 3\) is inf"),
    (lambda: kernels.softmax_quantize(np.full((1, 3), -INF, np.float32)), RangeError, r"line \(0,\) of \(1,\) is -inf"),
    (lambda: kernels.residual_add(X, X.astype(float)), ShapeError, "b is float64"),
    (lambda: kernels.residual_add(X, X[:1]), ShapeError, "differ in shape"),
    (lambda: kernels.upsample_nearest(X.astype(np.int8)), ShapeError, "x is int8"),
    (lambda: kernels.upsample_nearest(X[0]), ShapeError, r"\(N, H, W, C\)"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused(isa, number):
    call, error, message = REFUSED[number]
    with pytest.raises(error, match=message):
        call()


CALLS = {  # name: (result without out, call with out)
    "group_norm": (np.empty(X.shape, np.float32), lambda out: norm(out=out)),
    "group_norm to codes": (np.empty(X.shape, np.uint8), lambda out: norm(scale=1, out=out)),
    "silu": (np.empty(X.shape, np.float32), lambda out: kernels.silu_quantize(X, out=out)),
    "quantize": (np.empty(X.shape, np.uint8), lambda out: kernels.quantize(X, 1, out=out)),
    "softmax": (np.empty(S.shape, np.float32), lambda out: kernels.softmax_quantize(S, out=out)),
    "add": (np.empty(X.shape, np.float32), lambda out: kernels.residual_add(X, X.copy(), out=out)),
    "upsample": (np.empty((2, 6, 8, 6), np.float32), lambda out: kernels.upsample_nearest(X, out=out)),
}


@pytest.mark.parametrize("name", CALLS)
def test_out_must_fit(isa, name):
    right, call = CALLS[name]
    assert call(right) is right
    read_only = right.copy()
    read_only.flags.writeable = False
    for out, message in (
        (right.astype(np.int32), "out is int32.*must be"),
        (right[:1], "out is .*must be"),
        ([1], "out is a list"),
        (np.repeat(right, 2, axis=-1)[..., ::2], "C-contiguous"),
        (read_only, "writeable"),
    ):
        with pytest.raises(ShapeError, match=message):
            call(out)


def test_out_must_not_overlap(isa):
    memory = np.ones(200, np.float32)
    x, late = memory[:144].reshape(X.shape), memory[1:145].reshape(X.shape)
    codes = memory.view(np.uint8)[:144].reshape(X.shape)
    v = memory[:6]
    for call in (
        lambda: norm(x, out=x), lambda: norm(x, scale=1, out=codes), lambda: norm(gamma=v, out=x),
        lambda: kernels.silu_quantize(x, out=late), lambda: kernels.quantize(x, 1, out=codes),
        lambda: kernels.softmax_quantize(x, out=late), lambda: kernels.residual_add(x, X, out=late),
        lambda: kernels.residual_add(x, late, out=x), lambda: kernels.upsample_nearest(x[:, :1, :1], out=x[:, :2, :2]),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match="overlaps|C-contiguous"):
            call()


@needs_extension
def test_the_door_of_c():
    """Whoever calls C without Python in between gets a status and no crash."""
    lib, ffi = _ext.lib, _ext.ffi
    x, y = ffi.new("float[16]"), ffi.new("float[16]")

    def status(
        row=0, n=1, pixels=4, c=4, groups=2, source=x, gamma=x, eps=1e-6, kind=1, scale=1.0, zero=0, qmax=255
    ):  # fmt: skip
        return lib.rq_group_norm(row, 1, source, n, pixels, c, groups, gamma, x, eps, 1, kind, scale, zero, qmax, y)

    assert status() == status(kind=2) == status(n=0, source=ffi.NULL) == lib.RQ_OK
    assert status(row=99) == lib.RQ_ERR_KERNEL
    for wrong in ({"n": -1}, {"c": 2**31}, {"pixels": 2**30, "n": 2**30}, {"groups": 3}, {"groups": 0}):
        assert status(**wrong) == lib.RQ_ERR_SIZE
    for wrong in ({"eps": 0}, {"eps": NAN}, {"kind": 0}, {"kind": 3}):
        assert status(**wrong) == lib.RQ_ERR_RANGE
    for wrong in ({"scale": 0}, {"scale": NAN}, {"scale": INF}, {"zero": 256}, {"zero": -1}, {"qmax": 256}):
        assert status(kind=2, **wrong) == lib.RQ_ERR_RANGE
    assert status(source=ffi.NULL) == status(gamma=ffi.NULL) == lib.RQ_ERR_NULL
    assert lib.rq_quantize(0, 1, x, -1, 0, 2, 1.0, 0, 255, y) == lib.RQ_ERR_SIZE
    assert lib.rq_quantize(0, 1, x, 4, 0, 1, 1.0, 0, 255, y) == lib.RQ_ERR_RANGE
    assert lib.rq_quantize(0, 1, ffi.NULL, 4, 0, 2, 1.0, 0, 255, y) == lib.RQ_ERR_NULL
    assert lib.rq_softmax(0, 1, x, 0, 0.0, 2, 2, 1, 1.0, 255, y) == lib.RQ_ERR_RANGE
    assert lib.rq_softmax(0, 1, x, 0, 1.0, -1, 2, 1, 1.0, 255, y) == lib.RQ_ERR_SIZE
    assert lib.rq_add(0, 1, x, ffi.NULL, 4, y) == lib.RQ_ERR_NULL
    assert lib.rq_upsample_nearest(1, ffi.NULL, 1, 1, 1, y) == lib.RQ_ERR_NULL


# ------------------------------------------------------------------ the battery must notice mistakes


def battery():
    """Fixed cases for the active kernel: one for each mistake that has been thought of."""
    rng = np.random.default_rng(0)
    for shape, groups in (((2, 7, 5, 32), 4), ((1, 4, 3, 20), 5), ((1, 3, 3, 5), 1)):
        for fill in FILLS:
            x = FILLS[fill](rng, shape).astype(np.float32)
            gamma, beta = rng.normal(1, 1, (2, shape[3])).astype(np.float32)
            for silu in (True, False):
                case = Norm(x, gamma, beta, groups, silu=silu)
                case.check(exact_group_norm(case))
    flat = Norm(X, 0 * V, np.float32([0.5, 1.5, -0.5, -1.5, 254.5, 2.5]), 2, silu=False)  # ties, exactly
    assert (flat.run(scale=1.0, zero_point=1) == [1, 3, 1, 0, 255, 3]).all()
    silu_check(np.linspace(-120, 40, 20_003, dtype=np.float32))
    silu_check(np.float32([-3e38, -1000, 1000, 3e38]))
    silu_check(np.linspace(0, 5, 20_003, dtype=np.float32), scale=5 / 255, zero_point=0)
    for length in (1, 15, 16, 17, 49):
        softmax_check(rng.normal(0, 4, (3, length)).astype(np.float32))
        softmax_check(rng.integers(10**6, 10**6 + 9000, (3, length)).astype(np.int32), factor=1e-3)
    for scale in (0.1, 0.3):
        quantize_check(((np.arange(-600, 611) / 2) * np.float32(scale)).astype(np.float32), scale, 7, 8)
    for number in (NAN, INF, -INF):
        with pytest.raises(RangeError):
            kernels.silu_quantize(with_number(np.zeros(40, np.float32), number), scale=1)
    with pytest.raises(RangeError):
        kernels.quantize(with_number(np.zeros(40, np.float32), NAN), 1)
    with pytest.raises(RangeError):
        norm(with_number(X, NAN), scale=1)


def test_the_battery_passes(isa):
    battery()


CRUDE = {  # the best polynomial of degree 5: relative error 9.2e-8
    "0x1.6ae7205ce8ab0p-10": "0.0", "-0x1.126780654d164p-7": "-0x1.0fa82096a6082p-7",
    "0x1.5558224ee0bc1p-5": "0x1.573a4f461aad6p-5", "-0x1.555419636bad0p-3": "-0x1.555a6aadc2351p-3",
    "0x1.fffffc1d1712dp-2": "0x1.fffdc54c97b9ap-2", "-0x1.0000008a243f9p+0": "-0x1.fffff62cd8a6bp-1",
}  # fmt: skip
MEAN = "(float)(x[g * (j->c / j->groups)] + mean[g * (j->c / j->groups)])"
MUTANTS = {  # name: (kernel, file, *pairs of text)
    "variance without mean subtraction, in float32": (
        "scalar", "islands_units.c", ("offset[p] = shift[p] + mean[p]", "offset[p] = 0"),
        ("square_root(group[g] + j->number)", f"square_root((float)group[g] - {MEAN} * {MEAN} + j->number)"),
    ),
    "x0 is forgotten where it is large": ("scalar", "islands_units.c", ("tame &= x0 < 4096", "tame &= 1 || x0 < 4096")),
    "no limits where |z| is large": ("scalar", "islands_body.h", ("if (!tame)", "if (0)")),
    "a cruder polynomial": ("scalar", "islands_body.h", *CRUDE.items()),
    "ties are rounded up": (
        "scalar", "islands_scalar.c",
        ("-zero_point : q[i]) + 0x1.8p52", "-zero_point : q[i]) + (0.5 - 0x1p-40) + 0x1.8p52 - 0.0"),
        ("q[i] + 0x1.8p52; /* exact", "(double)(int)(q[i] + 512.5) - 512 + 0x1.8p52; /* exact"),
    ),
    "codes: the zero point is added before rounding": (
        "scalar", "islands_scalar.c", ("-zero_point : q[i]) + 0x1.8p52", "-zero_point : q[i]) + zero_point + 0x1.8p52"),
        ("bits + (uint64_t)zero_point", "bits"),
    ),
    "a product with 1 / scale": (
        "scalar", "islands_body.h", ("/ all_narrow((float)f->unit)", "* all_narrow(1 / (float)f->unit)"),
    ),
    "channels are one block off": (
        "scalar", "islands_body.h", ("p + RQ_BLOCK < f->period", "p + RQ_BLOCK <= f->period"),
    ),
    "the end of the image is not summed": (
        "scalar", "islands_body.h", ("for (int64_t q = p; i < count;", "for (int64_t q = p; 0;"),
    ),
    "a whole block is stored at the end": (
        "scalar", "islands_body.h", ("memcpy(out + i, end, (size_t)(count - i));", "memcpy(out + i, end, RQ_BLOCK);"),
    ),
    "infinities are not seen": ("scalar", "islands_body.h", ("*bad = *bad + (z - z);", ";")),
    "NaN is not seen": ("scalar", "islands_body.h", ("*bad = *bad + q[v];", ";")),
    "the largest score is not subtracted": ("scalar", "islands_body.h", ("all(largest) - load", "all(0.0) - load")),
    "behind the line are scores of 0": ("scalar", "islands_body.h", ("room[i] = nothing;", "room[i] = 0;")),
    "avx2: quarters exchanged": ("avx2", "islands_avx2.c", ("_mm_packs_epi32(q0, q1)", "_mm_packs_epi32(q1, q0)")),
    "avx2: what is below 0 wraps": (
        "avx2", "islands_avx2.c", ("_mm_adds_epi16", "_mm_add_epi16"), ("_mm_packus_epi16(low", "_mm_packs_epi16(low"),
    ),
    "avx512: halves exchanged": (
        "avx512vnni", "islands_avx512.c", ("_mm512_cvtpd_epi32(q[0])", "_mm512_cvtpd_epi32(q[1])"),
    ),
    "avx512: no lower limit": (
        "avx512vnni", "islands_avx512.c", ("_mm512_setzero_si512()", "_mm512_set1_epi32(-1000)"),
    ),
}  # fmt: skip

# What islands.c asks of the rest of the core; the kernels that are not tested are empty.
STUB = """
#include <stdlib.h>
#include "impl.h"
#include "islands.h"
static const struct rq_kernel row = {.name = "mutant", .needs = NEEDS};
const struct rq_kernel *rq_kernel_row(int i) { return i == 0 ? &row : NULL; }
uint32_t rq_cpu_features(void) { return NEEDS; }
void rq_team_run(int threads, rq_task *task, void *context) { (void)threads; task(context, 0); }
void *rq_scratch(int64_t bytes) { static void *p; free(p); return p = malloc((size_t)bytes); }
"""
NEEDS = {"scalar": "0", "avx2": "RQ_CPU_AVX2", "avx512vnni": "RQ_CPU_AVX512VNNI"}


@pytest.fixture
def run_mutant(tmp_path, compiler, monkeypatch):
    """Compile the islands with changes for one kernel, and make the Python face call them."""
    cffi = pytest.importorskip("cffi")

    def run(isa, file, *changes):
        if isa not in kernels.supported():
            pytest.skip(f"{isa}: not this machine")
        for source in (*CEXT.glob("islands*"), CEXT / "impl.h", CEXT / "refquant.h", CEXT / "target.h"):
            (tmp_path / source.name).write_bytes(source.read_bytes())
        text = (tmp_path / file).read_text(encoding="utf-8")
        for old, new in changes:
            assert old in text, f"{file} no longer has {old!r}: choose another mutant"
            text = text.replace(old, new)
        (tmp_path / file).write_text(text, encoding="utf-8")
        own = f"islands_{isa.removesuffix('vnni')}"
        names = ("islands_scalar", "islands_avx2", "islands_avx512")
        empty = "".join(f"const struct rq_islands rq_{name};\n" for name in names if name != own)
        (tmp_path / "stub.c").write_text(STUB.replace("NEEDS", NEEDS[isa]) + empty, encoding="utf-8")
        sources = [tmp_path / name for name in ("stub.c", "islands.c", "islands_units.c", f"{own}.c")]
        core = tmp_path / "islands.so"
        flags = [flag for flag in build_ext().FLAGS if flag != "-O3"]
        command = [compiler, *flags, "-O1", "-fPIC", "-shared", *sources, "-o", core]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ffi = cffi.FFI()
        header = (tmp_path / "refquant.h").read_text(encoding="utf-8")
        ffi.cdef(build_ext().cdef(header))
        monkeypatch.setattr(_islands, "lib", ffi.dlopen(str(core)))
        monkeypatch.setattr(_islands, "ROWS", {isa: 0})
        with kernels.using(isa):
            battery()

    return run


@needs_extension
@pytest.mark.parametrize("isa", NEEDS)
def test_without_a_change_the_battery_passes(run_mutant, isa):
    run_mutant(isa, "islands.c")


@needs_extension
@pytest.mark.parametrize("name", MUTANTS)
def test_the_battery_kills(run_mutant, name):
    with pytest.raises((AssertionError, RangeError, pytest.fail.Exception)):
        run_mutant(*MUTANTS[name])


def test_the_reference_needs_no_kernel():
    """ref.islands is complete on its own, and refuses as the kernels do."""
    case = Norm(X + np.arange(6, dtype=np.float32), V, V, 2)
    with kernels.using("ref"):
        np.testing.assert_array_equal(case.run(), ref.group_norm_silu_quantize(case.x, V, V, 2))
    with pytest.raises(RangeError, match="x is nan"):
        ref.quantize(with_number(X, NAN), 1)
