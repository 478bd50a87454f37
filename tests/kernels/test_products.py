"""Products of codes with codes: every kernel is the reference, for any layout, size, zero point and region."""

import numpy as np
import pytest
from asserts import assert_same_integers
from guards import Guarded, every_kernel
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from products_judge import bits_of, in_integers
from strategies import LANE_EDGES, codes, noise, strided

from refquant import kernels
from refquant.errors import RangeError, ShapeError
from refquant.quant import mrq_softmax
from refquant.quant.affine import QParams, QSpec
from refquant.threads import using_threads

ZERO_POINTS = st.sampled_from([0, 1, 127, 128, 129, 255]) | st.integers(0, 255)
REGIONS = st.none() | st.integers(3, 8).flatmap(lambda bits: st.tuples(st.just(bits), st.integers(0, bits - 1)))
SIDES = st.integers(0, 20) | st.sampled_from([31, 32, 33, 40, 49])


@st.composite
def batches(draw):
    """Operands and options: any axes in front, K around the steps of a kernel, N around panels and pairs of them."""
    front = draw(st.sampled_from([(), (1,), (3,), (2, 3), (1, 2), (2, 1), (0, 2)]))
    m, n, k = draw(SIDES), draw(SIDES), draw(st.sampled_from([0, *LANE_EDGES]))
    transpose, regions = draw(st.booleans()), draw(REGIONS)
    top = 255 if regions is None else (1 << regions[0]) - 1
    a = draw(noise(np.uint8, (*front, m, k), 0, top))
    b = draw(noise(np.uint8, (*front, n, k) if transpose else (*front, k, n)))
    za = draw(ZERO_POINTS) if regions is None else 0
    scale = draw(st.sampled_from([1.0, 2.0**-7, 0.0123, 3e4]))
    options = {
        "transpose_b": transpose, "a_zero_point": za, "b_zero_point": draw(ZERO_POINTS), "scale": scale,
        "regions": regions,
    }  # fmt: skip
    return draw(strided(a)), draw(strided(b)), options


@given(batches())
def test_every_kernel_is_the_definition(case):
    a, b, options = case
    want = in_integers(a, b, **options)
    for isa in every_kernel():
        guarded = Guarded(want.shape, np.float32)
        assert kernels.products(a, b, **options, out=guarded.array) is guarded.array
        assert_same_integers(bits_of(guarded.array), bits_of(want), isa=isa)
        guarded.check()
        assert_same_integers(bits_of(kernels.products(a, b, **options)), bits_of(want), isa=isa)


@given(codes(np.uint8, (2, 3, 9)), codes(np.uint8, (2, 9, 4)), ZERO_POINTS, ZERO_POINTS)
def test_drawn_by_element(a, b, za, zb):
    """So that a failure shrinks to few of them."""
    want = in_integers(a, b, a_zero_point=za, b_zero_point=zb)
    for isa in every_kernel():
        got = kernels.products(a, b, a_zero_point=za, b_zero_point=zb)
        assert_same_integers(bits_of(got), bits_of(want), isa=isa)


@pytest.mark.parametrize("k", [1, 8, 49, 33025])
def test_largest_sums(isa, k):
    """All codes at a corner; K = 33025 comes within 31,000 of the end of int32."""
    for corner_a, za, corner_b, zb in ((255, 0, 255, 0), (255, 0, 0, 255), (0, 255, 255, 0), (0, 255, 0, 255)):
        a, b = np.full((7, k), corner_a, np.uint8), np.full((k, 5), corner_b, np.uint8)
        got = kernels.products(a, b, a_zero_point=za, b_zero_point=zb)
        want = np.full((7, 5), (corner_a - za) * (corner_b - zb) * k, np.int32)
        assert_same_integers(bits_of(got), bits_of(want.astype(np.float32)))


@pytest.mark.parametrize("regions", [None, (8, 5)])
def test_heads_side_by_side(isa, regions):
    """q, k and v in one row, as a linear layer leaves them, and the result likewise; nothing beside it is touched."""
    rng = np.random.default_rng(0)
    n, tokens, heads, d = 3, 49, 3, 32
    together = rng.integers(0, 256, (n, tokens, 3, heads, d), np.uint8)
    q, k, v = (together[:, :, part].transpose(0, 2, 1, 3) for part in range(3))
    scores = kernels.products(q, k, transpose_b=True, a_zero_point=3, b_zero_point=200, scale=0.01)
    assert_same_integers(
        bits_of(scores), bits_of(in_integers(q, k, True, a_zero_point=3, b_zero_point=200, scale=0.01))
    )
    p = rng.integers(0, 256, (n, heads, tokens, tokens), np.uint8)
    room = np.full((n, tokens, heads * d + 5), 7, np.float32)
    view = as_strided(room, (n, heads, tokens, d), (room.strides[0], 4 * d, room.strides[1], 4))
    kernels.products(p, v, b_zero_point=9, scale=0.5, regions=regions, out=view)
    assert_same_integers(bits_of(view), bits_of(in_integers(p, v, b_zero_point=9, scale=0.5, regions=regions)))
    assert (room[..., heads * d :] == 7).all()


def test_the_number_of_threads_does_not_matter(isa):
    """One product cut by rows, and many."""
    rng = np.random.default_rng(0)
    for front, m in (((), 301), ((5, 3), 49)):
        a, b = rng.integers(0, 256, (*front, m, 130), np.uint8), rng.integers(0, 256, (*front, 130, 61), np.uint8)
        want = in_integers(a, b, a_zero_point=7, b_zero_point=3)
        for threads in (1, 2, 3, 7, 20):
            with using_threads(threads):
                got = kernels.products(a, b, a_zero_point=7, b_zero_point=3)
            assert_same_integers(bits_of(got), bits_of(want))


@given(st.integers(3, 8).flatmap(lambda bits: st.tuples(st.just(bits), st.integers(0, bits - 1))), st.data())
def test_two_regions_are_one_accumulator(regions, data):
    """P V from codes = what `mrq_softmax` says of them, on every kernel: one integer for both regions."""
    grid = mrq_softmax.SoftmaxRegions(*regions)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(0, data.draw(st.sampled_from([0.3, 2, 6])), (2, 49, 49))
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    v_params = QParams(0.031, int(rng.integers(0, 256)), QSpec(8, signed=False))
    p_codes, v = grid.quantize(p), rng.integers(0, 256, (2, 49, 7), np.uint8)
    sums = mrq_softmax.accumulate(grid, p_codes, v, int(v_params.zero_point))
    # the float product of what codes stand for, each of which is rounded to float32 once
    centred = v.astype(np.float64) - float(v_params.zero_point)
    p_hat = grid.dequantize(p_codes).astype(np.float64)
    assert (np.abs(p_hat @ centred - sums * float(grid.fine)) <= 2.0**-24 * (p_hat @ np.abs(centred)) + 1e-12).all()
    scale = np.float32(grid.fine) * v_params.scale
    for _ in every_kernel():
        got = kernels.products(p_codes, v, b_zero_point=int(v_params.zero_point), scale=scale, regions=regions)
        assert_same_integers(bits_of(got), bits_of(sums.astype(np.float32) * scale))


A, B = np.zeros((2, 3, 4), np.uint8), np.zeros((2, 4, 5), np.uint8)
REFUSED = [
    ({"a": A.astype(np.int8)}, ShapeError, "a is int8"),
    ({"b": [1]}, ShapeError, "b is a list"),
    ({"a": A[0, 0]}, ShapeError, "a is uint8"),
    ({"a": A[None, None], "b": B[None, None]}, ShapeError, "at most two axes"),
    ({"b": B[:1]}, ShapeError, "differ in K or in the axes"),
    ({"transpose_b": True}, ShapeError, "transposed differ in K"),
    ({"a_zero_point": 256}, RangeError, "zero point of a is 256"),
    ({"b_zero_point": -1}, RangeError, "zero point of b is -1"),
    ({"b_zero_point": 1.0}, RangeError, "zero point of b is 1.0"),
    ({"scale": 0}, RangeError, "scale is 0"),
    ({"scale": np.nan}, RangeError, "scale is nan"),
    ({"scale": "1"}, RangeError, "scale is '1'"),
    ({"regions": (9, 0)}, RangeError, r"\(9, 0\)"),
    ({"regions": (4, 4)}, RangeError, "shift from 0 to bits - 1"),
    ({"regions": (4, 1), "a_zero_point": 1}, RangeError, "zero point 0"),
    ({"a": np.zeros((1, 33026), np.uint8), "b": np.zeros((33026, 1), np.uint8)}, RangeError, "K = 33026"),
    ({"out": np.zeros((2, 3, 5))}, ShapeError, "out is float64"),
    ({"out": np.zeros((2, 3, 4), np.float32)}, ShapeError, "must be float32, shape"),
    ({"out": np.zeros((2, 5, 3), np.float32).transpose(0, 2, 1)}, ShapeError, "rows in one piece"),
    ({"out": np.broadcast_to(np.zeros((3, 5), np.float32), (2, 3, 5))}, ShapeError, "out must be writeable"),
    ({"out": as_strided(np.zeros(99, np.float32), (2, 3, 5), (4, 40, 4))}, ShapeError, "no two in one"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused(isa, number):
    options, error, message = REFUSED[number]
    options = dict(options)
    with pytest.raises(error, match=message):
        kernels.products(options.pop("a", A), options.pop("b", B), **options)


def test_out_must_not_overlap(isa):
    memory = np.zeros(120, np.float32)
    with pytest.raises(ShapeError, match="overlaps"):
        kernels.products(memory.view(np.uint8)[:24].reshape(2, 3, 4), B, out=memory[:30].reshape(2, 3, 5))
