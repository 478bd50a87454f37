"""Recorded calls: what a thread computed once is computed again, on what its arrays hold then."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from refquant import kernels
from refquant.errors import RangeError, ShapeError

RNG = np.random.default_rng(0)
W = RNG.integers(-128, 128, (5, 3, 3, 4), dtype=np.int8)
ONE = np.ones(4, np.float32)


class Network:
    """Each door once, from x to its answers, in arrays that stay where they are."""

    def __init__(self):
        self.x = RNG.standard_normal((2, 6, 6, 4), dtype=np.float32)
        self.codes = np.empty((2, 6, 6, 4), np.uint8)
        self.normed = np.empty((2, 6, 6, 4), np.uint8)
        self.wide = np.empty((2, 12, 12, 4), np.uint8)
        self.sums = np.empty((2, 6, 6, 5), np.float32)
        self.both = np.empty((2, 6, 6, 9), np.float32)
        self.scores = np.empty((2, 36, 36), np.float32)
        self.shares = np.empty((2, 36, 36), np.uint8)
        self.silu = np.empty((2, 6, 6, 4), np.uint8)
        self.packed = kernels.pack_weights(W)
        self.output = kernels.Dequantize(np.full(5, 0.01, np.float32), np.arange(5, dtype=np.float32))

    def run(self):
        flat = self.codes.reshape(2, 36, 4)
        kernels.quantize(self.x, 0.02, 100, out=self.codes)
        kernels.silu_quantize(self.x, scale=0.02, zero_point=10, out=self.silu)
        kernels.group_norm_silu_quantize(self.x, ONE, ONE, 2, scale=0.02, out=self.normed)
        kernels.upsample_nearest(self.normed, out=self.wide)
        kernels.conv2d(self.normed, self.packed, padding=1, output=self.output, out=self.sums)
        kernels.concat_channels(self.x, self.sums, out=self.both)
        kernels.products(flat, flat, transpose_b=True, scale=1e-4, out=self.scores)
        kernels.softmax_quantize(self.scores, scale=1 / 255, out=self.shares)

    def answers(self):
        return [a.copy() for a in vars(self).values() if isinstance(a, np.ndarray)]


@pytest.mark.parametrize("isa", kernels.supported())
def test_repeating_is_computing_again(isa):
    one, other = Network(), Network()
    with kernels.using(isa):
        with kernels.recording() as calls:
            one.run()
        one.x[...] = other.x
        other.run()
    kernels.repeat(calls)  # outside: the kernel is the recorded one
    for got, want in zip(one.answers(), other.answers(), strict=True):
        np.testing.assert_array_equal(got, want)
    assert len(calls) == 8


def test_only_what_this_thread_does_is_recorded():
    with kernels.recording() as calls, ThreadPoolExecutor(1) as pool:
        pool.submit(Network().run).result()
    Network().run()
    assert calls == []


def test_recordings_nest():
    x = np.ones((1, 2, 2, 1), np.float32)
    with kernels.recording() as outer:
        kernels.upsample_nearest(x)
        with kernels.recording() as inner:
            kernels.upsample_nearest(x)
        kernels.upsample_nearest(x)
    assert (len(outer), len(inner)) == (2, 1)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, c: kernels.quantize(x[:, :, ::2], 0.1),
        lambda x, c: kernels.conv2d(c[:, :, ::2], W),
        lambda x, c: kernels.products(c[0, 0, ::2].T, c[0, 0, ::2]),
    ],
)
def test_what_would_be_copied_cannot_be_recorded(run):
    x, c = np.ones((1, 8, 8, 4), np.float32), np.ones((1, 8, 8, 4), np.uint8)
    with kernels.using("scalar"):
        run(x, c)
        with pytest.raises(ShapeError, match=r"recorded call|in place"), kernels.recording():
            run(x, c)


def test_an_error_when_repeated_is_explained():
    x = np.zeros((1, 2, 2, 1), np.float32)
    with kernels.using("scalar"), kernels.recording() as calls:
        kernels.quantize(x, 0.1)
    x[0, 1, 1] = np.nan
    with pytest.raises(RangeError, match=r"nan at index \(0, 1, 1, 0\)"):
        kernels.repeat(calls)
