"""The integer reference against its own definition: three products, two convolutions, all equal."""

import numpy as np
import pytest
from asserts import assert_same_integers
from hypothesis import given
from hypothesis import strategies as st
from strategies import codes, strided

from refquant import ref
from refquant.errors import RangeError, ShapeError

SIZES = st.integers(0, 5)


@st.composite
def gemm_cases(draw):
    m, n, k = draw(SIZES), draw(SIZES), draw(SIZES)
    zb = draw(st.integers(-128, 127) | codes(np.int8, (n,)))
    a, b = draw(codes(np.uint8, (m, k))), draw(codes(np.int8, (n, k)))
    return draw(strided(a)), draw(strided(b)), draw(st.integers(0, 255)), zb


@st.composite
def conv_cases(draw):
    kh, kw, padding = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    h = draw(st.integers(max(1, kh - 2 * padding), 5))
    w = draw(st.integers(max(1, kw - 2 * padding), 5))
    n, c, o = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    x, weight = draw(codes(np.uint8, (n, h, w, c))), draw(codes(np.int8, (o, kh, kw, c)))
    zw = draw(st.integers(-128, 127) | codes(np.int8, (o,)))
    options = {"stride": draw(st.integers(1, 3)), "padding": padding, "x_zero_point": draw(st.integers(0, 255))}
    return draw(strided(x)), draw(strided(weight)), options | {"w_zero_point": zw}


@given(gemm_cases())
def test_three_products_agree(case):
    """loops = int64 = float64 BLAS, for any layout, with zero points on both sides."""
    a, b, za, zb = case
    want = ref.gemm_loops(a, b, a_zero_point=za, b_zero_point=zb)
    for product in (ref.gemm, ref.gemm_blas):
        got = product(a, b, a_zero_point=za, b_zero_point=zb)
        assert got.dtype == np.int32
        assert_same_integers(got, want)


@given(gemm_cases())
def test_zero_points_leave_by_algebra(case):
    """sum (a - za)(b - zb) = sum ab - za sum b - zb sum a + K za zb."""
    a, b, za, zb = case
    a64, b64, zb64 = a.astype(np.int64), b.astype(np.int64), np.broadcast_to(zb, len(b)).astype(np.int64)
    sums = za * b64.sum(axis=1) + np.multiply.outer(a64.sum(axis=1), zb64) - a.shape[1] * za * zb64
    want = ref.gemm(a, b).astype(np.int64) - sums
    assert_same_integers(ref.gemm(a, b, a_zero_point=za, b_zero_point=zb), want.astype(np.int32))


@pytest.mark.parametrize("za, zb", [(0, 0), (255, 0), (128, -128), (255, 127), (0, 127)])
def test_the_bound_on_k_is_sharp(za, zb):
    """At K = max_k the extreme sum fits int32; one more term and, for the worst data, it would not."""
    k = ref.max_k(za, zb)
    a_value = 255 if 255 - za >= za else 0
    b_value = -128 if 128 + zb >= 127 - zb else 127
    a, b = np.full((1, k), a_value, np.uint8), np.full((1, k), b_value, np.int8)
    exact = k * (a_value - za) * (b_value - zb)
    for product in (ref.gemm, ref.gemm_blas):
        assert product(a, b, a_zero_point=za, b_zero_point=zb).item() == exact
    assert abs(exact) <= 2**31 - 1 < abs(exact) + abs((a_value - za) * (b_value - zb))
    with pytest.raises(RangeError, match=f"limit is {k}"):
        ref.gemm(np.zeros((1, k + 1), np.uint8), np.zeros((1, k + 1), np.int8), a_zero_point=za, b_zero_point=zb)


@given(conv_cases())
def test_two_convolutions_agree(case):
    """im2col = seven loops: any size, stride, padding, layout and zero points."""
    x, w, options = case
    assert_same_integers(ref.conv2d(x, w, **options), ref.conv2d_loops(x, w, **options))


@given(conv_cases())
def test_a_1x1_convolution_is_a_product_of_pixels(case):
    """conv(x, w[:, :1, :1]) with stride 1 and no padding = gemm of the pixels' rows."""
    x, w, options = case
    w = w[:, :1, :1]
    zx, zw = options["x_zero_point"], options["w_zero_point"]
    want = ref.gemm(x.reshape(-1, x.shape[3]), w.reshape(len(w), -1), a_zero_point=zx, b_zero_point=zw)
    got = ref.conv2d(x, w, x_zero_point=zx, w_zero_point=zw)
    assert_same_integers(got, want.reshape(*x.shape[:3], len(w)))


@given(conv_cases())
def test_the_padding_means_zero(case):
    """conv(x, padding=p) = conv(x surrounded by p pixels of the code zx, padding=0)."""
    x, w, options = case
    p = options.pop("padding")
    surrounded = ref.pad(x, p, options["x_zero_point"])
    assert_same_integers(ref.conv2d(x, w, padding=p, **options), ref.conv2d(surrounded, w, **options))


def test_padding_with_the_code_zero_is_another_result():
    """The classical mistake: where zx is not 0, a border of code 0 means -zx."""
    x, w = np.full((1, 2, 2, 1), 9, np.uint8), np.ones((1, 3, 3, 1), np.int8)
    right = ref.conv2d(x, w, padding=1, x_zero_point=9)
    wrong = ref.conv2d(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), w, x_zero_point=9)
    assert not right.any() and wrong.all()


A, B = np.zeros((2, 3), np.uint8), np.zeros((4, 3), np.int8)
X, W = np.zeros((1, 4, 4, 2), np.uint8), np.zeros((3, 3, 3, 2), np.int8)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ref.gemm(A.astype(np.int8), B), ShapeError, "a has dtype int8"),
        (lambda: ref.gemm(A, B[0]), ShapeError, r"b has dtype int8, shape \(3,\)"),
        (lambda: ref.gemm(A, B[:, :2]), ShapeError, "differ in K"),
        (lambda: ref.gemm([[1]], B), ShapeError, "a is a list"),
        (lambda: ref.gemm(A, B, a_zero_point=256), RangeError, "0..255"),
        (lambda: ref.gemm(A, B, a_zero_point=0.5), ShapeError, "float64"),
        (lambda: ref.gemm(A, B, b_zero_point=np.zeros(3, int)), ShapeError, "4 outputs"),
        (lambda: ref.gemm(A, B, b_zero_point=-129), RangeError, "-128..127"),
        (lambda: ref.conv2d(X, W[..., :1]), ShapeError, "expects 1 input channels, input has 2"),
        (lambda: ref.conv2d(X[0], W), ShapeError, r"\(N, H, W, C\)"),
        (lambda: ref.conv2d(X, W, stride=0), RangeError, "stride is 0"),
        (lambda: ref.conv2d(X, W, padding=-1), RangeError, "padding is -1"),
        (lambda: ref.conv2d(X[:, :2], W), ShapeError, "does not fit"),
        (lambda: ref.conv2d(X, W[:, :0]), ShapeError, "nothing to convolve"),
        (lambda: ref.conv2d(X, W, w_zero_point=[1, 2]), ShapeError, "3 outputs"),
    ],
)
def test_errors_say_what_is_allowed(call, error, words):
    with pytest.raises(error, match=words):
        call()
