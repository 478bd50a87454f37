"""Packed weights: nothing is lost, nothing of the source is kept, and what cannot be packed is refused."""

import gc

import numpy as np
import pytest
from asserts import assert_same_integers
from guards import every_kernel
from hypothesis import given
from hypothesis import strategies as st
from strategies import codes, convolutions

from refquant import kernels, ref
from refquant.errors import RangeError, ShapeError
from refquant.kernels import PackedWeights, _weights, pack_weights


@given(convolutions())
def test_unpack_returns_the_codes(case):
    """unpack(pack(w)) = w, for both widths and every layout."""
    packed = pack_weights(case.w, bits=case.bits, zero_point=case.w_zero_point)
    assert packed.shape == case.w.shape and packed.bits == case.bits
    assert packed.unpack().dtype == np.int8
    assert_same_integers(packed.unpack(), case.w)
    assert_same_integers(packed.zero_point, np.broadcast_to(case.w_zero_point, len(case.w)))


@given(st.sampled_from([8, 4]), st.data())
def test_a_matrix_is_a_1x1_window(bits, data):
    """pack(w (O, K)) = pack(w (O, 1, 1, K))."""
    w = data.draw(codes(np.int8, (data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20)))))
    if bits == 4:
        w = (w % 16 - 8).astype(np.int8)
    packed = pack_weights(w, bits=bits)
    assert packed.shape == (len(w), 1, 1, w.shape[1])
    assert_same_integers(packed.unpack()[:, 0, 0], w)


def test_4_bits_take_half_of_the_memory():
    w = np.zeros((32, 3, 3, 64), np.int8)
    assert pack_weights(w).nbytes == w.size == 2 * pack_weights(w, bits=4).nbytes


def test_without_the_extension(monkeypatch):
    """NumPy keeps the codes as they are: another object than the caller's array, though."""
    monkeypatch.setattr(_weights, "lib", None)
    w = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    packed = pack_weights(w, bits=4, zero_point=[1, -1])
    w[...] = 0
    assert_same_integers(packed.unpack()[:, 0, 0], np.arange(-8, 8).reshape(2, 8))
    with kernels.using("ref"):
        got = kernels.gemm(np.full((1, 8), 2, np.uint8), packed)
    assert_same_integers(got, [[2 * (-36 - 8), 2 * (28 + 8)]])


def test_the_source_may_change_and_die(isa):
    """The packed codes, their sums and their zero points are copies."""
    rng = np.random.default_rng(5)
    x, w, zeros = rng.integers(0, 256, (3, 70), np.uint8), rng.integers(-128, 128, (20, 70), np.int8), np.arange(20)
    want = ref.gemm(x, w, a_zero_point=3, b_zero_point=zeros)
    packed = pack_weights(w, zero_point=zeros)
    w[...], zeros[...] = 0, 0
    del w, zeros
    gc.collect()
    assert_same_integers(kernels.gemm(x, packed, a_zero_point=3), want)


def test_temporaries_live_as_long_as_the_call(isa):
    """Operands, weights, stage and residual that nobody else holds; the garbage in between takes freed memory."""
    rng = np.random.default_rng(6)
    x, w = rng.integers(0, 256, (2, 9, 9, 12), np.uint8), rng.integers(-128, 128, (17, 3, 3, 12), np.int8)
    scale, bias = rng.random(17, np.float32), rng.random(17, np.float32)
    want = kernels.Dequantize(scale, bias).apply(ref.conv2d(x, w), np.ones((2, 7, 7, 17), np.float32))
    for _ in range(20):
        got = kernels.conv2d(
            x[:, ::-1].copy()[:, ::-1],
            pack_weights(w.copy(), zero_point=np.zeros(17, int)),
            output=kernels.Dequantize(scale.copy(), bias.copy()),
            residual=np.ones((2, 7, 17, 7), np.float32).transpose(0, 1, 3, 2),
        )
        garbage = [np.full(n, 255, np.uint8) for n in (17 * 4, 17 * 12 * 9, x.size)]
        assert_same_integers(got.view(np.uint32), want.view(np.uint32))
        del garbage


def test_one_object_for_every_kernel():
    """Weights are packed in the same order for all kernels, and do not change when they are used."""
    w = np.random.default_rng(7).integers(-8, 8, (40, 2, 3, 11), np.int8)
    x = np.random.default_rng(8).integers(0, 256, (1, 5, 6, 11), np.uint8)
    packed = pack_weights(w, bits=4, zero_point=3)
    for isa in every_kernel():
        assert_same_integers(kernels.conv2d(x, packed), ref.conv2d(x, w, w_zero_point=3), isa=isa)
        assert_same_integers(packed.unpack(), w)


def test_repr():
    assert repr(pack_weights(np.zeros((16, 1, 1, 8), np.int8))) == "PackedWeights((16, 1, 1, 8), bits=8, 128 bytes)"


def test_weights_without_outputs_have_any_length(isa):
    """No output, hence no sum that could overflow."""
    packed = pack_weights(np.zeros((0, 200000), np.int8))
    assert isinstance(packed, PackedWeights) and packed.shape == (0, 1, 1, 200000)
    assert kernels.gemm(np.zeros((2, 200000), np.uint8), packed).shape == (2, 0)


W = np.zeros((3, 3, 3, 2), np.int8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pack_weights(W, bits=5), RangeError, "bits is 5; kernels exist for 8 and 4"),
        (lambda: pack_weights(W, bits=8.0), RangeError, "bits is 8.0"),
        (lambda: pack_weights(W, bits="8"), RangeError, "bits is '8'"),
        (lambda: pack_weights(W + np.int8(8), bits=4), RangeError, "from 8 to 8; 4 bits hold -8 to 7"),
        (lambda: pack_weights(W - np.int8(9), bits=4), RangeError, "from -9 to -9; 4 bits hold -8 to 7"),
        (lambda: pack_weights(W[0]), ShapeError, r"shape \(3, 3, 2\); it must be int8, shape \(O, kh, kw, C\)"),
        (lambda: pack_weights(W[0, 0, 0]), ShapeError, r"shape \(2,\); it must be int8"),
        (lambda: pack_weights(W.astype(np.uint8)), ShapeError, "dtype uint8.*must be int8"),
        (lambda: pack_weights(W.tolist()), ShapeError, "w is a list; it must be int8"),
        (lambda: pack_weights(W[:, :0]), ShapeError, "empty window"),
        (lambda: pack_weights(W[:, :, :0]), ShapeError, "empty window"),
        (lambda: pack_weights(W, zero_point=128), RangeError, "must be a code, -128..127"),
        (lambda: pack_weights(W, zero_point=[0, 0, -129]), RangeError, "must be a code, -128..127"),
        (lambda: pack_weights(W, zero_point=[0, 0]), ShapeError, "each of the 3 outputs"),
        (lambda: pack_weights(W, zero_point=0.5), ShapeError, "float64"),
        (lambda: pack_weights(np.zeros((1, 131072), np.int8)), RangeError, "K = 131072.*the limit is 131071"),
        (lambda: pack_weights(np.zeros((1, 65794), np.int8), bits=4), RangeError, "K = 65794.*the limit is 65793"),
    ],
)
def test_errors_say_what_is_allowed(call, error, words):
    with pytest.raises(error, match=words):
        call()
