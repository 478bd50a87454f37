"""Cases for C programs, which have no NumPy to ask: operands and results in a file for kernels/cross/vectors.c."""

import itertools
from pathlib import Path

import numpy as np

from refquant import ref
from refquant.ref import Dequantize, Requantize

DRIVER = Path(__file__).parent / "kernels" / "cross" / "vectors.c"

# Around groups of 4, steps and halves of 8, panels of 16 and pairs of 32; around tiles of 8 and of 12 rows.
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65)
OUTPUTS = (1, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 24, 25, 31, 32, 33, 48, 65)
ROWS = (*range(1, 18), 25)
X_CORNERS = (0, 1, 127, 128, 254, 255)
W_CORNERS = {8: (-128, -127, -1, 0, 1, 127), 4: (-8, -7, -1, 0, 1, 7)}


def draw(rng, shape, corners, dtype):
    """Return corners only, or one corner everywhere, or anything between the outermost ones."""
    match rng.integers(3):
        case 0:
            return rng.choice(corners, shape).astype(dtype)
        case 1:
            return np.full(shape, rng.choice(corners), dtype)
    return rng.integers(min(corners), max(corners) + 1, shape).astype(dtype)


def draw_output(rng, o):
    """Return an output stage or none; with or without a bias."""
    biased = rng.integers(2)
    match rng.integers(3):
        case 0:
            return None
        case 1:
            bias = rng.normal(0, 100, o).astype(np.float32)
            return Dequantize(rng.uniform(1e-4, 1, o).astype(np.float32), bias if biased else None)
    zero_point, low, high = rng.choice([(0, 0, 255), (128, 0, 255), (255, 1, 254), (7, 0, 15)]).tolist()
    mantissa, shift = (rng.integers(*limits, o).astype(np.int32) for limits in ((2**30, 2**31), (28, 46)))
    bias = rng.integers(-(10**5), 10**5, o).astype(np.int32) if biased else None
    return Requantize(mantissa, shift, zero_point, bias, low, high)


def encode(x, w, bits, stride=1, padding=0, zx=0, zw=None, output=None, residual=None):
    """Return a case as vectors.c reads it: the numbers and the arrays of its two enums, the result last."""
    want = ref.conv2d(x, w, stride=stride, padding=padding, x_zero_point=zx, w_zero_point=0 if zw is None else zw)
    kind, limits, arrays = 0, (0, 0, 0), [None] * 6  # bias of integers, scale, bias, residual, mantissa, shift
    if isinstance(output, Dequantize):
        residual = residual.normal(0, 100, want.shape).astype(np.float32) if residual else None
        want = output.apply(want, residual)
        kind, arrays[1:4] = 1, (output.scale, output.bias, residual)
    elif output is not None:
        want = output.apply(want)
        kind, limits = 2, (output.zero_point, output.qmin, output.qmax)
        arrays[0], arrays[4:] = output.bias, (output.mantissa, output.shift)
    numbers = (*x.shape, *w.shape[:3], bits, stride, padding, zx, kind, *limits)
    lengths = (-1 if a is None else a.nbytes for a in (x, w, zw, *arrays, want))
    return np.array(numbers, np.int64).tobytes() + b"".join(
        np.int64(length).tobytes() + (b"" if a is None else a.tobytes())
        for length, a in zip(lengths, (x, w, zw, *arrays, want), strict=True)
    )


def cases():
    """Yield every case: matrix products of all sizes, convolutions of all kinds, the largest sums."""
    rng = np.random.default_rng(27)

    def case(image, o, window, bits, stride, padding, shifted):
        x = draw(rng, image, X_CORNERS, np.uint8)
        w = draw(rng, (o, *window, image[3]), W_CORNERS[bits], np.int8)
        zw = draw(rng, o, W_CORNERS[bits], np.int32) if shifted else None
        zx = int(rng.choice([0, 1, 128, 255]))
        residual = rng if rng.integers(2) else None
        return encode(x, w, bits, stride, padding, zx, zw, draw_output(rng, o), residual)

    for o, rows, bits in itertools.product(OUTPUTS, ROWS, (8, 4)):
        yield case((1, rows, 1, rng.choice(CHANNELS)), o, (1, 1), bits, 1, 0, rng.integers(2))
    windows = ((1, 1), (3, 3), (3, 2))
    for window, stride, padding, bits, shifted in itertools.product(windows, (1, 2), (0, 1, 2), (8, 4), (0, 1)):
        for _ in range(2):
            image = (2, rng.integers(3, 9), rng.integers(3, 9), rng.choice(CHANNELS))
            yield case(image, rng.choice(OUTPUTS), window, bits, stride, padding, shifted)
    # around blocks of 768 k, with the end of a segment inside of one, or of a window that hangs over the border
    for k, bits in itertools.product((767, 768, 769, 776, 1537), (8, 4)):
        yield case((1, rng.integers(1, 8), 1, k), rng.choice(OUTPUTS), (1, 1), bits, 1, 0, 0)
    for channels, bits in itertools.product((96, 264), (8, 4)):
        yield case((1, 4, 4, channels), rng.choice(OUTPUTS), (3, 3), bits, 1, 1, rng.integers(2))
    for a, b, zx, bits in ((255, -128, 0, 8), (255, 127, 0, 8), (0, -128, 128, 8), (255, -8, 0, 4), (255, 7, 0, 4)):
        k = ref.max_k(zx)
        yield encode(np.full((1, 3, 1, k), a, np.uint8), np.full((9, 1, 1, k), b, np.int8), bits, zx=zx)


def sums_that_overflow_on_the_way():
    """Yield cases with the zero point 128 in which sum xw passes the end of int32, and sum (x - 128) w does not."""
    for a, b in ((255, 127), (255, -128)):
        yield encode(np.full((1, 3, 1, 131071), a, np.uint8), np.full((9, 1, 1, 131071), b, np.int8), 8, zx=128)


#: Sum, mantissa, shift, code: sum * mantissa / 2^shift is some 2^-46 beside a tie, and the tie itself in 53 bits.
BESIDE_TIES = (
    (754928516, 1422794991, 52, 239),
    (1586878696, 1211836195, 53, 213),
    (1296728249, 1205147703, 53, 173),
)


def ties():
    """Yield sums over 2, over 4 and over 1024, among them those in the middle between two codes; and BESIDE_TIES."""
    x, w = np.ones((1, 13, 1, 1), np.uint8), np.zeros((33, 1, 1, 1), np.int8)
    for low, shift in itertools.product((-9, -8720), (31, 32, 40)):
        sums = np.arange(low, low + 33, dtype=np.int32)  # all of them the bias
        mantissa, shifts = np.full(33, 2**30, np.int32), np.full(33, shift, np.int32)
        yield encode(x, w, 8, output=Requantize(mantissa, shifts, 128, sums))
    sums, mantissa, shifts, _ = np.array(BESIDE_TIES * 11, np.int32).T.copy()
    for zero_point, sign in ((0, 1), (255, -1)):
        yield encode(x, w, 8, output=Requantize(mantissa, shifts, zero_point, sign * sums))


def like_a_network():
    """Yield products as they occur: SiLU of normal numbers, from minimum to maximum; normal weights, symmetric."""
    rng = np.random.default_rng(28)
    for k in (16, 64, 576) * 20:
        x, w = rng.standard_normal((1, 100, 1, k)), rng.standard_normal((64, 1, 1, k))
        x /= 1 + np.exp(-x)
        codes = np.rint((x - x.min()) * (255 / np.ptp(x))).astype(np.uint8)
        weights = np.rint(w * (127 / np.abs(w).max())).astype(np.int8)
        yield encode(codes, weights, 8, zx=round(-x.min() * 255 / np.ptp(x)))


def write(path, cases):
    """Write a file of cases; return their number."""
    records = list(cases)
    path.write_bytes(np.int64(len(records)).tobytes() + b"".join(records))
    return len(records)
