"""Float islands: the stated error bounds, one set of bits from all kernels in C, exact codes, refusals."""

from dataclasses import replace

import numpy as np
import pytest
from guards import Guarded, every_kernel
from hypothesis import given
from hypothesis import strategies as st
from islands_judge import (
    INF,
    NAN,
    STAGES,
    Norm,
    S,
    V,
    X,
    exact_group_norm,
    norm,
    norms,
    one_set_of_bits,
    quantize_check,
    silu_check,
    softmax_check,
    with_number,
)

from refquant import kernels
from refquant.errors import RangeError, ShapeError
from refquant.kernels import _ext
from refquant.ref import islands as ref
from refquant.threads import using_threads

needs_extension = pytest.mark.skipif(_ext.lib is None, reason="the C core is not compiled")


@given(norms(), STAGES)
def test_group_norm(case, stage):
    scale, (zero_point, bits) = stage
    want = exact_group_norm(case)
    one_set_of_bits({isa: case.check(want, scale, zero_point, bits) for isa in every_kernel()})


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


@pytest.mark.parametrize(("c", "d"), [(1, 1), (3, 5), (16, 7), (5, 64), (4, 0), (0, 4)])
@pytest.mark.parametrize("lines", [1, 13])  # 7 and 91 pixels an image: less and more than a unit's 64
def test_concat_channels(isa, c, d, lines):
    rng = np.random.default_rng(c + d)
    x, y = (rng.standard_normal((2, lines, 7, n), dtype=np.float32) for n in (c, d))
    x.reshape(-1)[:1] = np.nan  # bits are copied, whatever they mean
    out = Guarded((2, lines, 7, c + d), np.float32)
    kernels.concat_channels(x, y, out=out.array)
    np.testing.assert_array_equal(out.array, np.concatenate((x, y), axis=3))
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


def test_the_number_of_threads_does_not_matter(isa):
    rng = np.random.default_rng(0)
    # fewer images than threads, 38,400 numbers each: all threads work on one, in stages
    large = Norm(rng.normal(1, 3, (2, 40, 40, 24)).astype(np.float32), *rng.normal(0, 1, (2, 24)).astype(np.float32), 3)
    case = Norm(rng.normal(1, 3, (7, 11, 13, 24)).astype(np.float32), *np.float32([[1.5] * 24, [0.2] * 24]), 3)
    x, scores = rng.normal(0, 5, 70_001).astype(np.float32), rng.normal(0, 5, (5, 49, 49)).astype(np.float32)
    image = rng.integers(0, 256, (3, 40, 41, 20), np.uint8)

    def everything():
        return [
            case.run(), case.run(scale=0.02, zero_point=14), large.run(), large.run(scale=0.02, zero_point=14),
            replace(large, x=large.x[1:]).run(scale=0.02), kernels.quantize(x, 0.1, 128), kernels.silu_quantize(x),
            kernels.softmax_quantize(scores, scale=1 / 255), kernels.concat_channels(case.x, case.x[..., :5]),
            kernels.upsample_nearest(image),
        ]  # fmt: skip

    with using_threads(1):
        want = everything()
    for threads in (2, 3, 7):
        with using_threads(threads):
            for got, one in zip(everything(), want, strict=True):
                np.testing.assert_array_equal(got, one)
            for at in (0, 38_400, -1):
                x_bad = large.x.copy()
                x_bad.flat[at] = NAN
                with pytest.raises(RangeError, match="x is nan"):
                    replace(large, x=x_bad).run()


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
            lambda a: kernels.concat_channels(a, x),
            lambda a: kernels.upsample_nearest(a),
        ):
            np.testing.assert_array_equal(run(same), run(x))


@pytest.mark.parametrize("shape", [(0, 2, 2, 4), (2, 0, 3, 4), (2, 3, 0, 4)])
def test_nothing(isa, shape):
    x, v = np.zeros(shape, np.float32), np.ones(4, np.float32)
    assert kernels.group_norm_silu_quantize(x, v, v, 2).shape == shape
    assert kernels.group_norm_silu_quantize(x, v, v, 2, scale=1).dtype == np.uint8
    assert kernels.quantize(x, 1).shape == kernels.silu_quantize(x).shape == shape
    assert kernels.concat_channels(x, x).shape == (*shape[:3], 8)
    assert kernels.softmax_quantize(x).shape == kernels.softmax_quantize(x[..., :0]).shape[:3] + (4,) == shape
    assert kernels.upsample_nearest(x).size == 0
    assert kernels.quantize(np.array(7, np.float32), 1).shape == ()


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
    (lambda: kernels.concat_channels(X, X.astype(float)), ShapeError, "y has dtype float64"),
    (lambda: kernels.concat_channels(X, X[:1]), ShapeError, "the same images"),
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
    "concat": (np.empty((*X.shape[:3], 12), np.float32), lambda out: kernels.concat_channels(X, X.copy(), out=out)),
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
        lambda: kernels.softmax_quantize(x, out=late),
        lambda: kernels.concat_channels(x[:1], x[1:], out=memory[:144].reshape(1, *X.shape[1:3], 12)),
        lambda: kernels.upsample_nearest(x[:, :1, :1], out=x[:, :2, :2]),
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
    assert lib.rq_concat(1, x, ffi.NULL, 4, 1, 1, y) == lib.RQ_ERR_NULL
    assert lib.rq_concat(1, x, x, -1, 1, 1, y) == lib.rq_concat(1, x, x, 1, 2**31, 1, y) == lib.RQ_ERR_SIZE
    assert lib.rq_concat(1, x, ffi.NULL, 4, 1, 0, y) == lib.RQ_OK
    assert lib.rq_upsample_nearest(1, ffi.NULL, 1, 1, 1, y) == lib.RQ_ERR_NULL


def test_the_reference_needs_no_kernel():
    """ref.islands is complete on its own, and refuses as the kernels do."""
    case = Norm(X + np.arange(6, dtype=np.float32), V, V, 2)
    with kernels.using("ref"):
        np.testing.assert_array_equal(case.run(), ref.group_norm_silu_quantize(case.x, V, V, 2))
    with pytest.raises(RangeError, match="x is nan"):
        ref.quantize(with_number(X, NAN), 1)
