"""Every kernel's matrix product is the reference's, for every layout; the laws of products are in test_laws.py."""

from itertools import pairwise

import numpy as np
import pytest
from asserts import assert_same_integers
from guards import Guarded, every_kernel
from hypothesis import given
from hypothesis import strategies as st
from strategies import LANE_EDGES, codes, dequantizers, noise, requantizers, strided, weight_zero_points

from refquant import kernels, ref
from refquant.kernels import pack_weights

K_SIZES = (0, *LANE_EDGES)
ZERO_POINTS = st.sampled_from([0, 1, 128, 255]) | st.integers(0, 255)


@st.composite
def products(draw, largest=40):
    """a, b, bits, zero points: rows around the height of a tile, outputs around the width of a panel."""
    m, n, k = draw(st.integers(0, largest)), draw(st.integers(0, largest)), draw(st.sampled_from(K_SIZES))
    bits = draw(st.sampled_from([8, 4]))
    a, b = draw(noise(np.uint8, (m, k))), draw(noise(np.int8, (n, k), *((-8, 7) if bits == 4 else ())))
    return draw(strided(a)), draw(strided(b)), bits, draw(ZERO_POINTS), draw(weight_zero_points(n))


def random_operands(m, n, k, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (m, k), np.uint8), rng.integers(-128, 128, (n, k), np.int8)


@given(products())
def test_sums(case):
    """gemm = ref.gemm, of codes and of packed weights, into an array of its own or into the caller's."""
    a, b, bits, za, zb = case
    want = ref.gemm(a, b, a_zero_point=za, b_zero_point=zb)
    packed = pack_weights(b, bits=bits, zero_point=zb)
    for isa in every_kernel():
        guarded = Guarded(want.shape, np.int32)
        assert kernels.gemm(a, packed, a_zero_point=za, out=guarded.array) is guarded.array
        assert_same_integers(guarded.array, want, isa=isa)
        guarded.check()
        got = kernels.gemm(a, b, a_zero_point=za, b_zero_point=zb)
        assert got.dtype == np.int32
        assert_same_integers(got, want, isa=isa)


@given(codes(np.uint8, (3, 17)), codes(np.int8, (4, 17)), ZERO_POINTS, st.integers(-128, 127))
def test_three_loops(a, b, za, zb):
    """gemm = the definition in Python's own integers; drawn by element, so that a failure shrinks to few of them."""
    want = ref.gemm_loops(a, b, a_zero_point=za, b_zero_point=zb)
    for isa in every_kernel():
        assert_same_integers(kernels.gemm(a, b, a_zero_point=za, b_zero_point=zb), want, isa=isa)


@given(st.data(), products())
def test_output_stages(data, case):
    """The stages are those of a convolution: one comparison each."""
    a, b, bits, za, zb = case
    sums = ref.gemm(a, b, a_zero_point=za, b_zero_point=zb)
    packed = pack_weights(b, bits=bits, zero_point=zb)
    real, code = data.draw(dequantizers(len(b))), data.draw(requantizers(len(b), b.shape[1]))
    residual = data.draw(noise(np.int8, sums.shape)).astype(np.float32)
    with np.errstate(over="ignore"):
        reals, all_codes = real.apply(sums, residual), code.apply(sums)
        for isa in every_kernel():
            got = kernels.gemm(a, packed, a_zero_point=za, output=real, residual=residual)
            assert_same_integers(got.view(np.uint32), reals.view(np.uint32), isa=isa)
            assert_same_integers(kernels.gemm(a, packed, a_zero_point=za, output=code), all_codes, isa=isa)


@pytest.mark.parametrize("a_value", [0, 255])
@pytest.mark.parametrize("b_value", [-128, 127])
@pytest.mark.parametrize("k", [*K_SIZES, ref.MAX_K])
def test_corner_values(isa, a_value, b_value, k):
    """The largest sums, of both signs: at K = 65793 they come within 128 of the end of int32."""
    a, b = np.full((2, k), a_value, np.uint8), np.full((3, k), b_value, np.int8)
    assert_same_integers(kernels.gemm(a, b), np.full((2, 3), a_value * b_value * k))


@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 5), (0, 0, 0), (3, 4, 0)])
def test_empty(isa, shape):
    """No rows, no outputs: nothing. No K: sums of nothing, which are 0."""
    m, n, k = shape
    assert_same_integers(kernels.gemm(*random_operands(m, n, k)), np.zeros((m, n), np.int32))


LAYOUTS = {
    "rows apart": lambda x: np.pad(x, ((0, 0), (3, 5)))[:, 3 : 3 + x.shape[1]],
    "every other row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "every other column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "column-major": np.asfortranarray,
    "rows reversed": lambda x: x[::-1].copy()[::-1],
    "columns reversed": lambda x: x[:, ::-1].copy()[:, ::-1],
    "overlapping rows": lambda x: np.lib.stride_tricks.sliding_window_view(x.ravel(), x.shape[1])[: len(x)],
    "one row repeated": lambda x: np.broadcast_to(x[0], x.shape),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "unaligned": lambda x: np.frombuffer(b"." + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 5, 33), (7, 5, 32), (1, 1, 1), (2, 3, 1), (1, 4, 17)])
def test_layouts(isa, layout, shape):
    """The values count, not how they lie in memory; and the operands come back unchanged."""
    a, b = (LAYOUTS[layout](x) for x in random_operands(*shape))
    a_before, b_before = a.copy(), b.copy()
    assert_same_integers(kernels.gemm(a, b), ref.gemm(a_before, b_before))
    assert_same_integers(a, a_before)
    assert_same_integers(b, b_before)


def test_splitting_k_and_adding(isa):
    """sum over k = sum over the parts of k."""
    a, b = random_operands(5, 6, 200)
    cuts = (0, 1, 33, 96, 200)
    parts = [kernels.gemm(a[:, i:j], b[:, i:j]) for i, j in pairwise(cuts)]
    assert_same_integers(sum(parts), kernels.gemm(a, b))


def test_adding_a_constant_to_a_adds_column_sums(isa):
    """(a + c) b = a b + c sum b."""
    a, b = random_operands(5, 6, 70)
    a //= 2
    shifted = kernels.gemm(a + np.uint8(100), b) - kernels.gemm(a, b)
    assert_same_integers(shifted, np.broadcast_to(100 * b.sum(axis=1, dtype=np.int32), (5, 6)))
