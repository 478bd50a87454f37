"""Every kernel equals the NumPy reference exactly, for every layout; and wrong input stops in Python."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refquant import kernels, ref
from refquant.errors import RangeError, RefquantError, ShapeError
from refquant.kernels import _ext

# Sizes around the lanes of 8, 16, 32 and 64 elements, where a wrong tail shows.
K_SIZES = (0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130)
UINT8 = st.sampled_from([0, 1, 127, 128, 254, 255]) | st.integers(0, 255)
INT8 = st.sampled_from([-128, -127, -1, 0, 1, 127]) | st.integers(-128, 127)


@st.composite
def operands(draw):
    m, n = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    k = draw(st.sampled_from(K_SIZES))
    return draw(arrays(np.uint8, (m, k), elements=UINT8)), draw(arrays(np.int8, (n, k), elements=INT8))


def random_operands(m, n, k, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (m, k), dtype=np.uint8)
    b = rng.integers(-128, 128, (n, k), dtype=np.int8)
    return a, b


def by_hand(a, b):
    """The definition in Python's own integers, which know no overflow: the judge of the reference."""
    return [[sum(int(x) * int(y) for x, y in zip(row, column, strict=True)) for column in b] for row in a]


@given(operands())
@settings(deadline=None)
def test_reference_is_the_definition(operands):
    a, b = operands
    got = ref.gemm(a, b)
    assert got.dtype == np.int32 and got.shape == (len(a), len(b))
    assert got.tolist() == by_hand(a, b)


@given(operands=operands())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernel_equals_reference(isa, operands):
    got = kernels.gemm(*operands)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, ref.gemm(*operands))


@pytest.mark.parametrize("a_value", [0, 255])
@pytest.mark.parametrize("b_value", [-128, 127])
@pytest.mark.parametrize("k", [*K_SIZES, ref.MAX_K])
def test_corner_values(isa, a_value, b_value, k):
    """The largest sums, of both signs: at K = 65793 they come within 128 of the end of int32."""
    a, b = np.full((2, k), a_value, np.uint8), np.full((3, k), b_value, np.int8)
    np.testing.assert_array_equal(kernels.gemm(a, b), np.full((2, 3), a_value * b_value * k))


@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 5), (0, 0, 0), (3, 4, 0)])
def test_empty(isa, shape):
    m, n, k = shape
    np.testing.assert_array_equal(kernels.gemm(*random_operands(m, n, k)), np.zeros((m, n), np.int32))


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
@pytest.mark.parametrize("shape", [(7, 5, 33), (1, 1, 1), (2, 3, 1), (1, 4, 17)])
def test_layouts(isa, layout, shape):
    """The values count, not how they lie in memory; and the operands come back unchanged."""
    a, b = (LAYOUTS[layout](x) for x in random_operands(*shape))
    a_before, b_before = a.copy(), b.copy()
    np.testing.assert_array_equal(kernels.gemm(a, b), ref.gemm(a_before, b_before))
    np.testing.assert_array_equal(a, a_before)
    np.testing.assert_array_equal(b, b_before)


def test_splitting_k_and_adding(isa):
    a, b = random_operands(5, 6, 200)
    cuts = (0, 1, 33, 96, 200)
    parts = [kernels.gemm(a[:, i:j], b[:, i:j]) for i, j in pairwise(cuts)]
    np.testing.assert_array_equal(sum(parts), kernels.gemm(a, b))


def test_adding_a_constant_to_a_adds_column_sums(isa):
    a, b = random_operands(5, 6, 70)
    a //= 2
    shifted = kernels.gemm(a + np.uint8(100), b) - kernels.gemm(a, b)
    np.testing.assert_array_equal(shifted, np.broadcast_to(100 * b.sum(axis=1, dtype=np.int32), (5, 6)))


WRONG = {
    "a is int8": (np.zeros((2, 3), np.int8), np.zeros((2, 3), np.int8), "a has dtype int8"),
    "b is uint8": (np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8), "b has dtype uint8"),
    "a is float": (np.zeros((2, 3)), np.zeros((2, 3), np.int8), "a has dtype float64"),
    "a is a list": ([[1, 2]], np.zeros((2, 2), np.int8), "a is a list"),
    "a has one axis": (np.zeros(3, np.uint8), np.zeros((2, 3), np.int8), r"shape \(3,\)"),
    "b has three axes": (np.zeros((2, 3), np.uint8), np.zeros((2, 3, 1), np.int8), r"shape \(2, 3, 1\)"),
    "K differs": (np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.int8), "differ in K"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_operands(isa, case):
    a, b, message = WRONG[case]
    with pytest.raises(ShapeError, match=message):
        kernels.gemm(a, b)


def test_bound_on_k(isa):
    assert (2**31 - 1) // (255 * 128) == ref.MAX_K
    a, b = np.zeros((1, ref.MAX_K + 1), np.uint8), np.zeros((1, ref.MAX_K + 1), np.int8)
    with pytest.raises(RangeError, match="K = 65794 could overflow int32.*65793"):
        kernels.gemm(a, b)


def test_errors_are_refquant_errors():
    with pytest.raises(RefquantError):
        ref.gemm(np.zeros(1), np.zeros(1))


@pytest.mark.skipif(_ext.lib is None, reason="the C core is not compiled")
class TestTheDoorInC:
    """rq_gemm_u8s8s32 refuses what Python never sends: a code, and not one byte written."""

    GOOD = dict(row=0, m=2, n=2, k=3, a="a", lda=3, b="b", ldb=3, c="c", ldc=2)

    def call(self, **changes):
        ffi = _ext.ffi
        buffers = {
            "a": ffi.new("uint8_t[]", [1] * 6),
            "b": ffi.new("int8_t[]", [1] * 6),
            "c": ffi.new("int32_t[]", [-7] * 8),
            None: ffi.NULL,
        }
        arguments = {**self.GOOD, **changes}
        status = _ext.lib.rq_gemm_u8s8s32(*(buffers.get(x, x) for x in arguments.values()))
        return status, list(buffers["c"])

    def test_good(self):
        assert self.call() == (_ext.lib.RQ_OK, [3, 3, 3, 3, -7, -7, -7, -7])

    def test_only_the_rows_of_c_are_written(self):
        assert self.call(ldc=3) == (_ext.lib.RQ_OK, [3, 3, -7, 3, 3, -7, -7, -7])

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            (dict(row=-1), "RQ_ERR_KERNEL"),
            (dict(row=1000), "RQ_ERR_KERNEL"),
            (dict(m=-1), "RQ_ERR_SIZE"),
            (dict(n=-1), "RQ_ERR_SIZE"),
            (dict(k=-1), "RQ_ERR_SIZE"),
            (dict(lda=2), "RQ_ERR_SIZE"),
            (dict(ldb=2), "RQ_ERR_SIZE"),
            (dict(ldc=1), "RQ_ERR_SIZE"),
            (dict(k=ref.MAX_K + 1, lda=ref.MAX_K + 1, ldb=ref.MAX_K + 1), "RQ_ERR_RANGE"),
            (dict(a=None), "RQ_ERR_NULL"),
            (dict(b=None), "RQ_ERR_NULL"),
            (dict(c=None), "RQ_ERR_NULL"),
        ],
    )
    def test_refused(self, changes, code):
        assert self.call(**changes) == (getattr(_ext.lib, code), [-7] * 8)

    def test_bound_is_the_one_of_the_reference(self):
        assert _ext.lib.RQ_MAX_K == ref.MAX_K
