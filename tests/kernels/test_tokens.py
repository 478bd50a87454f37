"""Islands of a transformer: the stated error bounds, one set of bits from all kernels in C, exact codes, refusals."""

import numpy as np
import pytest
from guards import Guarded, every_kernel
from hypothesis import given
from hypothesis import strategies as st
from islands_judge import INF, NAN, STAGES, one_set_of_bits, with_number
from tokens_judge import (
    TokenNorm,
    gelu_check,
    gelu_codes_are_scalars,
    regions_check,
    signs_check,
    softmax_codes_are_scalars,
    token_norms,
)

from refquant import kernels
from refquant.errors import RangeError, ShapeError
from refquant.quant.mrq_sign import SignSplit
from refquant.quant.mrq_softmax import SoftmaxRegions
from refquant.threads import using_threads

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-6, 6, width=32)
FLOATS = st.lists(FINITE, max_size=70)


@given(token_norms(), STAGES)
def test_layer_norm(case, stage):
    scale, (zero_point, bits) = stage
    want = case.exact()
    one_set_of_bits({isa: case.check(want, scale, zero_point, bits) for isa in every_kernel()})


def test_each_image_has_its_own_condition(isa):
    """And a token that is constant becomes beta, exactly."""
    x = np.full((3, 2, 20), 7.1, np.float32)
    beta = np.arange(60, dtype=np.float32).reshape(3, 20)
    got = kernels.layer_norm_modulate_quantize(x, beta * 2, beta)
    np.testing.assert_array_equal(got, np.broadcast_to(beta[:, None], x.shape))


@given(FLOATS, STAGES)
def test_gelu(numbers, stage):
    scale, (zero_point, bits) = stage
    x = np.array(numbers, np.float32)
    one_set_of_bits({isa: gelu_check(x, scale, zero_point, bits) for isa in every_kernel()})


def test_gelu_everywhere(isa):
    """Dense from -14, where float32 ends, to 8; and the whole range of exponents."""
    gelu_check(np.linspace(-14, 8, 100_003, dtype=np.float32))
    gelu_check(np.outer([1, -1], np.ldexp(np.float32(1.37), np.arange(-149, 128))).astype(np.float32))


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 5), (3, 16), (2, 17), (4, 33)]), st.integers(3, 8))
def test_gelu_of_two_signs(seed, shape, bits):
    rng = np.random.default_rng(seed)
    x = rng.normal(-0.5, 2, shape).astype(np.float32)
    positive, negative = rng.uniform(0.001, 0.2), 0.17 / (2 ** (bits - 1) - 1)
    one_set_of_bits({isa: signs_check(x, positive, negative, bits) for isa in every_kernel()})


def test_gelu_by_the_shorter_way(isa):
    """Where float32 is not sure of a code, it has to ask for double."""
    gelu_codes_are_scalars(200)


def test_softmax_by_the_shorter_way(isa):
    softmax_codes_are_scalars(20)


def test_two_signs_are_the_codes_of_the_grid(isa):
    """What `SignSplit` makes of the GELU in float32, but for numbers within 1e-4 of a step from a rounding boundary."""
    x = np.random.default_rng(0).normal(-0.3, 1.5, (40, 384)).astype(np.float32)
    grid = SignSplit(8, 0.17 / 127, 0.03)
    y = kernels.gelu_quantize(x)
    up, down = np.split(kernels.gelu_quantize_signs(x, grid.positive, grid.negative), 2, axis=-1)
    want_up, want_down = grid.planes(grid.quantize(y))
    far = np.abs(np.abs(y / np.where(y < 0, grid.negative, grid.positive)) % 1 - 0.5) > 1e-4
    np.testing.assert_array_equal(up[far], want_up[far])
    np.testing.assert_array_equal(down[far], -want_down[far])
    assert far.mean() > 0.999


REGIONS = st.integers(3, 8).flatmap(lambda bits: st.tuples(st.just(bits), st.integers(0, bits - 1)))


@given(st.integers(0, 2**32 - 1), REGIONS, st.sampled_from([1, 2, 15, 16, 17, 49]), st.sampled_from([0.1, 2.0, 9.0]))
def test_softmax_of_two_regions(seed, regions, length, spread):
    scores = np.random.default_rng(seed).normal(0, spread, (2, 3, length)).astype(np.float32)
    bits, shift = regions
    one_set_of_bits({isa: regions_check(scores, 0.7, bits, shift) for isa in every_kernel()})


def test_two_regions_are_the_codes_of_the_grid(isa):
    """What `SoftmaxRegions` makes of float32 probabilities, but for those within 1e-4 of a step from a boundary."""
    scores = np.random.default_rng(0).normal(0, 3, (60, 49)).astype(np.float32)
    grid, p = SoftmaxRegions(8, 3), kernels.softmax_quantize(scores)
    step = np.where(p >= 1 / 8, grid.coarse, grid.fine)
    far = (np.abs(p / step % 1 - 0.5) > 1e-4) & (np.abs(p * 8 - 1) > 1e-6)
    got = kernels.softmax_quantize_regions(scores, bits=8, shift=3)
    np.testing.assert_array_equal(got[far], grid.quantize(p)[far])
    assert far.mean() > 0.999 and (got >= 128).any()


PARTS = st.sampled_from([(1, 1), (3, 5), (3, 16), (2, 17), (3, 96), (7, 3)])


@given(st.integers(0, 2**32 - 1), PARTS, st.integers(0, 9))
def test_parts_have_the_codes_of_quantize(seed, parts, rows):
    count, width = parts
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 3, (rows, count * width)).astype(np.float32)
    x[rng.random(x.shape) < 0.02] = np.inf
    stages = []
    for _ in range(count):
        bits = int(rng.integers(2, 9))
        stages.append((float(rng.uniform(0.01, 0.3)), int(rng.integers(0, 1 << bits)), bits))
    for _ in every_kernel():
        codes = Guarded(x.shape, np.uint8)
        kernels.quantize_parts(x, stages, out=codes.array)
        for i, (scale, zero, bits) in enumerate(stages):
            part = slice(i * width, (i + 1) * width)
            want = kernels.quantize(np.ascontiguousarray(x[:, part]), scale, zero, bits=bits)
            np.testing.assert_array_equal(codes.array[:, part], want)
        codes.check()


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1, 1), (3, 33, 20), (2, 49, 96), (2, 5, 7)]))
def test_gated_add_is_what_numpy_gives(seed, shape):
    rng = np.random.default_rng(seed)
    x, h = rng.normal(0, 3, (2, *shape)).astype(np.float32)
    row = rng.normal(0, 1, (shape[0], 3 * shape[2])).astype(np.float32)
    gate = row[:, shape[2] : 2 * shape[2]]  # columns of a wider array
    want = x + gate[:, None] * h
    for _ in every_kernel():
        out = Guarded(shape, np.float32)
        np.testing.assert_array_equal(kernels.gated_add(x, gate, h, out=out.array), want)
        for operand in (x, h):
            out.array[...] = operand
            others = (out.array, gate, h) if operand is x else (x, gate, out.array)
            np.testing.assert_array_equal(kernels.gated_add(*others, out=out.array), want)
        out.check()


def test_the_number_of_threads_does_not_matter(isa):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 2, (5, 70, 96)).astype(np.float32)
    gamma, beta = rng.normal(0, 1, (2, 5, 96)).astype(np.float32)

    def everything():
        return [
            kernels.layer_norm_modulate_quantize(x, gamma, beta, scale=0.02, zero_point=99),
            kernels.gelu_quantize(x, scale=0.02, zero_point=9), kernels.gelu_quantize_signs(x, 0.02, 0.001),
            kernels.softmax_quantize_regions(x, bits=8, shift=4),
            kernels.quantize_parts(x, [(0.1, 3, 8), (0.2, 7, 8)]), kernels.gated_add(x, gamma, x * 3),
        ]  # fmt: skip

    with using_threads(1):
        want = everything()
    for threads in (2, 3, 7):
        with using_threads(threads):
            for got, one in zip(everything(), want, strict=True):
                np.testing.assert_array_equal(got, one)


def test_any_layout_is_read(isa):
    """Strides, another order of axes, conditions at different distances."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 3, (3, 4, 12)).astype(np.float32)
    wide, rows = np.repeat(x, 2, axis=2), rng.normal(0, 1, (3, 40)).astype(np.float32)
    gamma, beta = rows[:, 3:15], rows[:, 20:32].copy()
    for same in (wide[..., ::2], np.asfortranarray(x)):
        for run in (
            lambda a: kernels.layer_norm_modulate_quantize(a, gamma, beta, scale=0.1, zero_point=3),
            lambda a: kernels.layer_norm_modulate_quantize(a, np.asfortranarray(gamma), beta[:, ::-1]),
            lambda a: kernels.gelu_quantize(a), lambda a: kernels.gelu_quantize_signs(a, 0.1, 0.01),
            lambda a: kernels.softmax_quantize_regions(a, bits=8, shift=2),
            lambda a: kernels.quantize_parts(a, [(0.1, 3, 8)] * 3), lambda a: kernels.gated_add(a, gamma, x),
        ):  # fmt: skip
            np.testing.assert_array_equal(run(same), run(x))
    np.testing.assert_array_equal(
        kernels.layer_norm_modulate_quantize(x, gamma, beta),
        kernels.layer_norm_modulate_quantize(x, gamma.copy(), beta),
    )


def test_recorded_calls_read_in_place(isa):
    """What would be copied is refused: a repetition would read the copy."""
    x, rows = np.ones((2, 3, 4), np.float32), np.zeros((2, 8), np.float32)
    out = np.empty_like(x)
    with kernels.recording() as calls:
        kernels.layer_norm_modulate_quantize(x, rows[:, :4], rows[:, 4:], out=out)
    rows[:, 4:] = 5
    kernels.repeat(calls)
    assert (out == 5).all()
    if isa != "ref":
        with kernels.recording(), pytest.raises(ShapeError, match="in place"):
            kernels.gated_add(x, np.asfortranarray(rows[:, :4]), x, out=out)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing(isa, shape):
    x, c = np.zeros(shape, np.float32), np.zeros((shape[0], shape[2]), np.float32)
    assert kernels.layer_norm_modulate_quantize(x, c, c, scale=1).shape == shape
    assert kernels.gelu_quantize(x).shape == kernels.gated_add(x, c, x).shape == shape
    assert kernels.gelu_quantize_signs(x, 1, 1).shape == (*shape[:2], 2 * shape[2])
    assert kernels.softmax_quantize_regions(x, bits=8, shift=1).shape == shape
    assert kernels.quantize_parts(x, [(1, 0, 8)] * 2).shape == shape


X, C = np.ones((2, 3, 6), np.float32), np.ones((2, 6), np.float32)


def norm(x=X, gamma=C, beta=C, **options):
    return kernels.layer_norm_modulate_quantize(x, gamma, beta, **options)


REFUSED = [
    (lambda: norm(X.astype(float)), ShapeError, "x is float64"),
    (lambda: norm(X[0]), ShapeError, r"\(N, L, D\)"),
    (lambda: norm(gamma=C[:1]), ShapeError, r"gamma is float32 \(1, 6\)"),
    (lambda: norm(beta=C.astype(int)), ShapeError, "beta is int64"),
    (lambda: norm(eps=0), RangeError, "eps is 0.0"),
    (lambda: norm(scale=0), RangeError, "scale is 0.0"),
    (lambda: norm(scale=1, zero_point=256), RangeError, "zero_point is 256"),
    (lambda: norm(with_number(X, NAN)), RangeError, r"x is nan at index \(0, 1, 1\)"),
    (lambda: norm(with_number(X, -INF), scale=1), RangeError, "x is -inf"),
    (lambda: norm(gamma=with_number(C, INF)), RangeError, r"gamma is inf at index \(1, 1\)"),
    (lambda: norm(beta=with_number(C, NAN), scale=1), RangeError, "beta is nan"),
    (lambda: kernels.gelu_quantize([1]), ShapeError, "x is a list"),
    (lambda: kernels.gelu_quantize(with_number(X, INF), scale=1), RangeError, "x is inf"),
    (lambda: kernels.gelu_quantize_signs(with_number(X, NAN), 1, 1), RangeError, "x is nan"),
    (lambda: kernels.gelu_quantize_signs(X, 0, 1), RangeError, "scale is 0.0"),
    (lambda: kernels.gelu_quantize_signs(X, 1, NAN), RangeError, "scale is nan"),
    (lambda: kernels.gelu_quantize_signs(X, 1, 1, bits=2), RangeError, "bits is 2.*3 to 8"),
    (lambda: kernels.gelu_quantize_signs(np.float32(1), 1, 1), ShapeError, "x is a float32"),
    (lambda: kernels.softmax_quantize_regions(X.astype(int), bits=8, shift=1), ShapeError, "scores is int64"),
    (lambda: kernels.softmax_quantize_regions(X, bits=8, shift=8), RangeError, "shift from 0"),
    (lambda: kernels.softmax_quantize_regions(X, bits=8, shift=1, factor=0), RangeError, "factor is 0"),
    (lambda: kernels.softmax_quantize_regions(with_number(X, NAN), bits=8, shift=1), RangeError, r"line \(0, 1\)"),
    (lambda: kernels.quantize_parts(X, [(1, 0, 8)] * 4), ShapeError, "4 parts of a row of 6"),
    (lambda: kernels.quantize_parts(X, [(1, 0, 8), (1, 256, 8)]), RangeError, "zero_point is 256"),
    (lambda: kernels.quantize_parts(with_number(X, NAN), [(1, 0, 8)]), RangeError, "x is nan at index"),
    (lambda: kernels.gated_add(X, C, X[:1]), ShapeError, r"h \(1, 3, 6\)"),
    (lambda: kernels.gated_add(X, C[:, :5], X), ShapeError, "gate is float32"),
    (lambda: kernels.gated_add(X, C, X, out=X[:1]), ShapeError, "out is float32"),
    (lambda: kernels.gated_add(X, X[:, 0], X.copy(), out=X), ShapeError, "overlaps"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused(isa, number):
    call, error, message = REFUSED[number]
    with pytest.raises(error, match=message):
        call()


def test_no_norm_of_a_token_mixes_with_another(isa):
    """Permuting tokens permutes the result."""
    rng = np.random.default_rng(0)
    case = TokenNorm(rng.normal(0, 3, (2, 37, 20)).astype(np.float32), *rng.normal(0, 1, (2, 2, 20)).astype(np.float32))
    order = rng.permutation(37)
    other = TokenNorm(np.ascontiguousarray(case.x[:, order]), case.gamma, case.beta)
    np.testing.assert_array_equal(case.run(scale=0.02)[:, order], other.run(scale=0.02))
