"""Every kernel's convolution is the reference's, bit for bit: any size, layout, width, zero point, output stage."""

import numpy as np
import pytest
from asserts import assert_same_integers
from guards import Guarded, every_kernel
from hypothesis import given
from hypothesis import strategies as st
from strategies import convolutions, dequantizers, noise, requantizers, strided
from vectors import BESIDE_TIES

from refquant import kernels, ref
from refquant.kernels import Requantize, pack_weights


def operand(case, packed):
    """The weights and what goes with them as keywords: packed, or as codes."""
    if packed or case.bits == 4:
        return pack_weights(case.w, bits=case.bits, zero_point=case.w_zero_point), case.options
    return case.w, case.all_options


@given(convolutions(), st.booleans(), st.booleans())
def test_sums(case, packed, own_out):
    """conv2d = ref.conv2d; what is given is left as it was, what is around `out` too."""
    want = ref.conv2d(case.x, case.w, **case.all_options)
    x, w = case.x.copy(), case.w.copy()
    weights, options = operand(case, packed)
    for isa in every_kernel():
        guarded = Guarded(want.shape, np.int32) if own_out else None
        got = kernels.conv2d(case.x, weights, out=guarded and guarded.array, **options)
        assert got.dtype == np.int32
        assert_same_integers(got, want, isa=isa)
        if guarded:
            assert got is guarded.array
            guarded.check()
    assert_same_integers(case.x, x)
    assert_same_integers(case.w, w)


@given(st.data(), convolutions())
def test_dequantized(data, case):
    """float32(sum) * scale + bias + residual: the bits of NumPy, signs of zero and subnormals included."""
    sums = ref.conv2d(case.x, case.w, **case.all_options)
    output = data.draw(dequantizers(len(case.w)))
    residual = data.draw(st.none() | noise(np.int32, sums.shape).flatmap(lambda r: strided(r.astype(np.float32))))
    weights, options = operand(case, packed=True)
    with np.errstate(over="ignore"):
        want = output.apply(sums, residual)
        for isa in every_kernel():
            guarded = Guarded(want.shape, np.float32)
            got = kernels.conv2d(case.x, weights, output=output, residual=residual, out=guarded.array, **options)
            assert_same_integers(got.view(np.uint32), want.view(np.uint32), isa=isa)
            guarded.check()


@given(st.data(), convolutions())
def test_requantized(data, case):
    """Codes, by multiplications of integers; any multiplier, bias and range of codes."""
    output = data.draw(requantizers(len(case.w), case.w[0].size if len(case.w) else 0))
    want = output.apply(ref.conv2d(case.x, case.w, **case.all_options))
    weights, options = operand(case, packed=True)
    for isa in every_kernel():
        guarded = Guarded(want.shape, np.uint8)
        got = kernels.conv2d(case.x, weights, output=output, out=guarded.array, **options)
        assert_same_integers(got, want, isa=isa)
        guarded.check()


def test_a_product_beside_a_tie(isa):
    """62 bits, rounded once: to 53 bits first, as a float64 product is, it would be a tie and go the other way."""
    sums, mantissa, shift, codes = np.array(BESIDE_TIES * 9, np.int32).T.copy()
    for zero_point, sign, want in ((0, 1, codes), (255, -1, 255 - codes)):
        output = Requantize(mantissa, shift, zero_point, sign * sums)
        got = kernels.gemm(np.zeros((2, 1), np.uint8), np.zeros((27, 1), np.int8), output=output)
        assert_same_integers(got, np.stack([want, want]))


@given(convolutions(most_k=50, sizes=(1, 2, 3)))
def test_the_seven_loops(case):
    """conv2d = the definition in Python's own integers."""
    want = ref.conv2d_loops(case.x, case.w, **case.all_options)
    weights, options = operand(case, packed=True)
    for isa in every_kernel():
        assert_same_integers(kernels.conv2d(case.x, weights, **options), want, isa=isa)


LAYOUTS = {
    "lines apart": lambda x: np.pad(x, ((0, 0), (0, 0), (2, 3), (0, 0)))[:, :, 2 : 2 + x.shape[2]],
    "images apart": lambda x: np.pad(x, ((0, 0), (1, 2), (0, 0), (0, 0)))[:, 1 : 1 + x.shape[1]],
    "one image of several": lambda x: np.pad(x, ((1, 1), (0, 0), (0, 2), (0, 0)))[1 : 1 + len(x), :, : x.shape[2]],
    "images reversed": lambda x: x[::-1].copy()[::-1],
    "lines reversed": lambda x: x[:, ::-1].copy()[:, ::-1],
    "pixels reversed": lambda x: x[:, :, ::-1].copy()[:, :, ::-1],
    "channels reversed": lambda x: x[..., ::-1].copy()[..., ::-1],
    "every other line": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "every other pixel": lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
    "every other channel": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
    "NCHW seen as NHWC": lambda x: np.ascontiguousarray(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
    "one line repeated": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "one image repeated": lambda x: np.broadcast_to(x[:1], x.shape),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "unaligned": lambda x: np.frombuffer(b"." + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
    "a subclass": lambda x: x.view(np.recarray),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 6, 8), (1, 5, 6, 8), (3, 4, 3, 3), (1, 3, 4, 1), (1, 3, 1, 7)])
@pytest.mark.parametrize("padding", [0, 1])
def test_layouts(layout, shape, padding):
    """The values count, not how they lie in memory; with 8 channels and no padding they are read in place."""
    rng = np.random.default_rng(1)
    x = LAYOUTS[layout](rng.integers(0, 256, shape, np.uint8))
    w = rng.integers(-128, 128, (5, 2, 1, shape[3]), np.int8)
    want = ref.conv2d(x, w, padding=padding, x_zero_point=9)
    for isa in every_kernel():
        assert_same_integers(kernels.conv2d(x, w, padding=padding, x_zero_point=9), want, isa=isa)


@pytest.mark.parametrize("padding", [0, 1])
def test_an_image_with_a_new_axis(isa, padding):
    """One image cut out of a larger one and given an axis of length 1, whose stride means nothing: NumPy says 0."""
    large = np.arange(6 * 9 * 8, dtype=np.uint8).reshape(6, 9, 8)
    x, w = large[:, 1:6][None], np.ones((1, 3, 3, 8), np.int8)
    assert_same_integers(kernels.conv2d(x, w, padding=padding), ref.conv2d(x, w, padding=padding))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_of_the_network(isa, bits):
    """64 to 96 channels, 33 x 29 pixels, 3 x 3: many units, panels and tiles; the last of each is a rest."""
    rng = np.random.default_rng(2)
    x = rng.integers(0, 256, (1, 33, 29, 64), np.uint8)
    w = rng.integers(-8, 8, (96, 3, 3, 64), np.int8) if bits == 4 else rng.integers(-128, 128, (96, 3, 3, 64), np.int8)
    zw = rng.integers(-3, 4, 96)
    for zero_point in (0, zw):
        packed = pack_weights(w, bits=bits, zero_point=zero_point)
        got = kernels.conv2d(x, packed, padding=1, x_zero_point=7)
        want = ref.conv2d(x, w, padding=1, x_zero_point=7, w_zero_point=zero_point)
        assert_same_integers(got, want)


def test_an_image_larger_than_a_unit(isa):
    """Lines of 200 KB: a slab holds one line of the result, and the sums over the window go across."""
    rng = np.random.default_rng(3)
    x = rng.integers(0, 256, (2, 4, 2000, 101), np.uint8)
    w = rng.integers(-128, 128, (2, 3, 3, 101), np.int8)
    options = {"stride": 2, "padding": 1, "x_zero_point": 200, "w_zero_point": [0, -5]}
    assert_same_integers(kernels.conv2d(x, w, **options), ref.conv2d(x, w, **options))


@pytest.mark.parametrize(("x_value", "w_value"), [(0, -128), (0, 127), (255, -128), (255, 127)])
@pytest.mark.parametrize(("k", "zx", "zw"), [(65793, 0, 0), (131071, 128, 0), (33025, 255, -128)])
def test_the_longest_sums(isa, k, zx, zw, x_value, w_value):
    """All codes at their ends, K at its bound: the sum comes close to the end of int32, the way there may pass it."""
    assert k == ref.max_k(zx, zw)
    x, w = np.full((1, 1, 1, k), x_value, np.uint8), np.full((17, 1, 1, k), w_value, np.int8)
    got = kernels.conv2d(x, pack_weights(w, zero_point=zw), x_zero_point=zx)
    assert_same_integers(got, np.full((1, 1, 1, 17), k * (x_value - zx) * (w_value - zw)))


@pytest.mark.parametrize("w_value", [-8, 7])
def test_the_longest_sums_of_4_bits(isa, w_value):
    """16 times the code is summed: K = 65793 still fits."""
    x, w = np.full((1, 1, 1, ref.MAX_K), 255, np.uint8), np.full((17, 1, 1, ref.MAX_K), w_value, np.int8)
    assert_same_integers(kernels.conv2d(x, pack_weights(w, bits=4)), np.full((1, 1, 1, 17), ref.MAX_K * 255 * w_value))
