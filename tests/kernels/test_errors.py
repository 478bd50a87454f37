"""The Python face stops every wrong operand, with a message that names what is allowed; C never sees it."""

import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from guards import Guarded

from refquant import kernels
from refquant.errors import RangeError, RefquantError, ShapeError
from refquant.kernels import Dequantize, Requantize, pack_weights

A, B = np.zeros((4, 18), np.uint8), np.zeros((3, 18), np.int8)
X, W = np.zeros((2, 4, 5, 2), np.uint8), np.zeros((3, 3, 3, 2), np.int8)
Y = (2, 2, 3, 3)  # of conv2d(X, W)
PACKED = pack_weights(W)
SCALE, MANTISSA, SHIFT = np.ones(3, np.float32), np.full(3, 2**30, np.int32), np.full(3, 30, np.int32)
REAL, CODE = Dequantize(SCALE), Requantize(MANTISSA, SHIFT)


def conv2d(x=X, w=W, **options):
    return kernels.conv2d(x, w, **options)


def gemm(a=A, b=B, **options):
    return kernels.gemm(a, b, **options)


def array(dtype=np.int32, shape=Y):
    return np.zeros(shape, dtype)


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


OPERANDS = [
    (lambda: gemm(A.astype(np.int8)), ShapeError, "a has dtype int8.*must be uint8"),
    (lambda: gemm(b=B.astype(np.uint8)), ShapeError, "b has dtype uint8.*must be int8"),
    (lambda: gemm(A.astype(float)), ShapeError, "a has dtype float64"),
    (lambda: gemm([[1, 2]]), ShapeError, "a is a list"),
    (lambda: gemm(A[0]), ShapeError, r"shape \(18,\)"),
    (lambda: gemm(b=B[..., None]), ShapeError, r"shape \(3, 18, 1\)"),
    (lambda: gemm(b=B[:, :17]), ShapeError, "differ in K"),
    (lambda: gemm(b=pack_weights(B[:, :17])), ShapeError, "differ in K"),
    (lambda: gemm(b=PACKED), ShapeError, r"packed weights \(O, kh, kw, C\) = \(3, 3, 3, 2\) differ in K"),
    (lambda: gemm(A[0], pack_weights(B)), ShapeError, r"shape \(18,\)"),
    (lambda: gemm(A.astype(np.int8), pack_weights(B)), ShapeError, "a has dtype int8"),
    (lambda: gemm([[1, 2]], pack_weights(B)), ShapeError, "a is a list"),
    (lambda: conv2d(X.astype(np.int8)), ShapeError, "x has dtype int8.*must be uint8"),
    (lambda: conv2d(X.astype(np.int8), PACKED), ShapeError, "x has dtype int8.*must be uint8"),
    (lambda: conv2d(X[0]), ShapeError, r"\(N, H, W, C\)"),
    (lambda: conv2d(X[0], PACKED), ShapeError, r"\(N, H, W, C\)"),
    (lambda: conv2d("x", PACKED), ShapeError, "x is a str"),
    (lambda: conv2d(w=W[0]), ShapeError, r"\(O, kh, kw, C\)"),
    (lambda: conv2d(w=None), ShapeError, "w is a NoneType"),
    (lambda: conv2d(X[..., :1]), ShapeError, "expects 2 input channels, input has 1"),
    (lambda: conv2d(X[..., :1], PACKED), ShapeError, "expects 2 input channels, input has 1"),
    (lambda: conv2d(w=W[:, :0]), ShapeError, "nothing to convolve"),
    (lambda: conv2d(X[:, :0]), ShapeError, "nothing to convolve"),
    (lambda: conv2d(X[:, :2], PACKED), ShapeError, "a 3x3 window does not fit.*Pad more"),
    (lambda: conv2d(X[:, :, :2], PACKED), ShapeError, "a 3x3 window does not fit"),
]

NUMBERS = [
    (lambda: conv2d(stride=0), RangeError, "stride is 0.*from 1"),
    (lambda: conv2d(w=PACKED, stride=-1), RangeError, "stride is -1"),
    (lambda: conv2d(stride=1.0), RangeError, "stride is 1.0; it must be a whole number"),
    (lambda: conv2d(stride=(1, 1)), RangeError, r"stride is \(1, 1\)"),
    (lambda: conv2d(padding=-1), RangeError, "padding is -1.*from 0"),
    (lambda: conv2d(w=PACKED, padding=0.5), RangeError, "padding is 0.5"),
    (lambda: conv2d(padding=2**31), RangeError, "padding is 2147483648; at most 1073741824"),
    (lambda: conv2d(padding=2**31, stride=2**31), RangeError, "padding is 2147483648; at most 1073741824"),
    (lambda: conv2d(x_zero_point=256), RangeError, r"0\.\.255"),
    (lambda: conv2d(w=PACKED, x_zero_point=-1), RangeError, r"0\.\.255"),
    (lambda: conv2d(w=PACKED, x_zero_point=1.0), ShapeError, "float64.*must be an integer"),
    (lambda: conv2d(w=PACKED, x_zero_point=[1]), ShapeError, r"shape \(1,\).*must be an integer"),
    (lambda: conv2d(w_zero_point=128), RangeError, r"-128\.\.127"),
    (lambda: conv2d(w_zero_point=[1, 2]), ShapeError, "3 outputs"),
    (lambda: conv2d(w=PACKED, w_zero_point=1), RangeError, "Give zero_point to pack_weights"),
    (lambda: conv2d(w=PACKED, w_zero_point=[0, 0, 0]), RangeError, "Give zero_point to pack_weights"),
    (lambda: gemm(a_zero_point=256), RangeError, r"0\.\.255"),
    (lambda: gemm(b=pack_weights(B), a_zero_point=-1), RangeError, r"0\.\.255"),
    (lambda: gemm(b_zero_point=-129), RangeError, r"-128\.\.127"),
    (lambda: gemm(b=pack_weights(B), b_zero_point=1), RangeError, "Give zero_point to pack_weights"),
    (lambda: gemm(np.zeros((1, 65794), np.uint8), np.zeros((1, 65794), np.int8)), RangeError, "65794.*65793"),
    (
        lambda: gemm(np.zeros((1, 65794), np.uint8), pack_weights(np.zeros((1, 65794), np.int8))),
        RangeError,
        "K = 65794 .* could overflow int32.*Split K",
    ),
    (
        lambda: gemm(np.zeros((1, 33026), np.uint8), pack_weights(np.zeros((1, 33026), np.int8), zero_point=-128),
                     a_zero_point=255),
        RangeError,
        "K = 33026 .* could overflow int32",
    ),
]  # fmt: skip

OUTPUTS = [
    (lambda: conv2d(out=array(np.int64)), ShapeError, "out is int64.*must be int32"),
    (lambda: conv2d(out=array(">i4")), ShapeError, "out is >i4.*must be int32"),
    (lambda: conv2d(out=array(), output=REAL), ShapeError, "out is int32.*must be float32"),
    (lambda: conv2d(out=array(np.int8), output=CODE), ShapeError, "out is int8.*must be uint8"),
    (lambda: conv2d(out=array(shape=(2, 2, 3, 4))), ShapeError, r"must be int32, shape \(2, 2, 3, 3\)"),
    (lambda: conv2d(out=array().ravel()), ShapeError, r"must be int32, shape \(2, 2, 3, 3\)"),
    (lambda: conv2d(out=array().tolist()), ShapeError, "out is a list"),
    (lambda: gemm(out=array(shape=(3, 4)).T), ShapeError, "C-contiguous"),
    (lambda: gemm(out=array(shape=(4, 6))[:, ::2]), ShapeError, "C-contiguous"),
    (lambda: gemm(out=array(shape=(4, 3))[::-1]), ShapeError, "C-contiguous"),
    (lambda: gemm(out=read_only(array(shape=(4, 3)))), ShapeError, "writeable"),
    (lambda: gemm(out=np.frombuffer(bytearray(49), np.int32, 12, 1).reshape(4, 3)), ShapeError, "aligned"),
    (lambda: gemm(out=array(shape=(3, 3))), ShapeError, r"must be int32, shape \(4, 3\)"),
    (lambda: gemm(A[:0], out=array(shape=(1, 3))), ShapeError, r"must be int32, shape \(0, 3\)"),
    (lambda: conv2d(output=Dequantize(SCALE[:2])), ShapeError, "for 2 outputs, the weights have 3"),
    (lambda: gemm(output=Requantize(MANTISSA[:1], SHIFT[:1])), ShapeError, "for 1 outputs, the weights have 3"),
    (lambda: conv2d(output="int8"), ShapeError, "output is a str.*Dequantize or Requantize"),
    (lambda: conv2d(output=Dequantize), ShapeError, "output is a type.*Dequantize or Requantize"),
    (lambda: conv2d(residual=array(np.float32)), ShapeError, "float32 results only"),
    (lambda: conv2d(output=CODE, residual=array(np.float32)), ShapeError, "float32 results only"),
    (lambda: conv2d(output=REAL, residual=array(np.float64)), ShapeError, "residual is float64.*must be float32"),
    (lambda: conv2d(output=REAL, residual=np.float32(1)), ShapeError, "residual is a float32; it must be float32"),
    (lambda: conv2d(output=REAL, residual=array(np.float32)[:1]), ShapeError, r"shape \(2, 2, 3, 3\)"),
    (lambda: gemm(output=REAL, residual=array(np.float32, (3,))), ShapeError, r"must be float32, shape \(4, 3\)"),
]


@pytest.mark.parametrize(("call", "error", "words"), [*OPERANDS, *NUMBERS, *OUTPUTS])
def test_errors_say_what_is_allowed(isa, call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_errors_are_refquant_errors():
    with pytest.raises(RefquantError):
        gemm(B)


def views(*parts):
    """Arrays of (dtype, shape, byte) that lie in one piece of memory from that byte on."""
    memory = np.zeros(4096, np.uint8)
    size = [int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape, _ in parts]
    return [
        memory[at : at + n].view(dtype).reshape(shape) for n, (dtype, shape, at) in zip(size, parts, strict=True)
    ]


@pytest.mark.parametrize("at", [0, 64, 76])  # X takes 80 bytes
def test_out_overlaps_x(isa, at):
    x, out = views((np.uint8, X.shape, 0), (np.int32, Y, at))
    with pytest.raises(ShapeError, match="overlaps an operand"):
        conv2d(x, out=out)
    x, out = views((np.uint8, X.shape, 160), (np.int32, Y, 144 - at))
    with pytest.raises(ShapeError, match="overlaps an operand"):
        conv2d(x, out=out)


@pytest.mark.parametrize("at", [0, 140])  # a result takes 144 bytes
def test_out_overlaps_the_residual(isa, at):
    """Not even the very same array: elements are not read and written in one order by all kernels."""
    residual, out = views((np.float32, Y, 0), (np.float32, Y, at))
    with pytest.raises(ShapeError, match="overlaps an operand"):
        conv2d(output=REAL, residual=residual, out=out)


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_out_overlaps_the_stage_to_reals(isa, name):
    vector, out = views((np.float32, (3,), 12), (np.float32, Y, 0))
    stage = Dequantize(**{"scale": SCALE, name: vector})
    with pytest.raises(ShapeError, match="overlaps an operand"):
        conv2d(output=stage, out=out)


@pytest.mark.parametrize("name", ["mantissa", "shift", "bias"])
def test_out_overlaps_the_stage_to_codes(isa, name):
    vector, out = views((np.int32, (3,), 12), (np.uint8, Y, 0))
    vector[...] = {"mantissa": 2**30, "shift": 30, "bias": 0}[name]
    stage = Requantize(**{"mantissa": MANTISSA, "shift": SHIFT, name: vector})
    with pytest.raises(ShapeError, match="overlaps an operand"):
        conv2d(output=stage, out=out)


def test_side_by_side_is_no_overlap(isa):
    """x ends where out begins, and out where the residual begins."""
    x, out, residual = views((np.uint8, X.shape, 0), (np.float32, Y, 80), (np.float32, Y, 80 + 144))
    conv2d(x, out=out, output=REAL, residual=residual)
    x, out = views((np.uint8, X.shape, 144), (np.int32, Y, 0))
    conv2d(x, out=out)


@pytest.mark.parametrize(("zx", "zw"), [(0, 0), (255, -128)])
def test_a_bias_that_could_overflow(isa, zx, zw):
    """|sum| <= K max|x - zx| max|w - zw|; the bias may take the rest of int32, and not 1 more."""
    room = 2**31 - 1 - 18 * 255 * (128 if zw == 0 else 255)
    for sign in (-1, 1):
        bias = np.array([0, sign * room, 0], np.int32)
        packed = pack_weights(W, zero_point=zw)
        assert conv2d(w=packed, x_zero_point=zx, output=Requantize(MANTISSA, SHIFT, bias=bias)).shape == Y
        with pytest.raises(RangeError, match=f"bias up to {room + 1} could overflow int32"):
            conv2d(w=packed, x_zero_point=zx, output=Requantize(MANTISSA, SHIFT, bias=bias + np.int32(sign)))


@pytest.mark.parametrize("stride", [2**30, 2**31, 2**62, 2**70])
def test_a_stride_beyond_the_image(isa, stride):
    """However long the step, the first window is there."""
    assert conv2d(stride=stride).shape == (2, 1, 1, 3)


def test_a_stride_beyond_the_frame():
    """A frame of 2 * 2^30 pixels is longer than 2^30, but not than the stride: two windows a side, or a refusal."""
    guarded = Guarded((1, 2, 2, 3), np.int32)
    with suppress(ValueError, MemoryError):
        kernels.conv2d(X[:1, ..., :0], W[..., :0], stride=2**31, padding=2**30, out=guarded.array)
        assert not guarded.array.any()
    guarded.check()


HUGE = """
import numpy as np
from refquant import kernels
from refquant.errors import RefquantError

# stride * padded width * channels = 2^64 - 1
x, w = np.ones((1, 1, 1, 65535), np.uint8), np.ones((1, 1, 1, 65535), np.int8)
try:
    print(kernels.conv2d(x, w, stride=42009217, padding=3350208).item())
except (MemoryError, RefquantError):
    print("refused")
"""


def test_a_border_beyond_any_memory():
    """Arithmetic on sizes does not overflow: the result is 0, a sum of padding, or the border is refused."""
    run = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout in ("0\n", "refused\n"), run.stderr
