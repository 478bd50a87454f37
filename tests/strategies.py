"""What the property tests draw: arrays full of corners, not of bell curves.

Random reals almost never hit a tie, an edge of the codes or a subnormal; quantization bugs live nowhere else.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refquant.intmath import fixed_point
from refquant.quant.affine import QParams, QSpec
from refquant.ref import Dequantize, Requantize

TINY = float(np.finfo(np.float32).tiny)  # 2**-126, the smallest normal
LIMIT = float(np.float32(1e30))  # far above any tensor; the span of two such numbers still fits float32
CORNERS = [0.0, -0.0, *np.float32([0.5, -0.5, 1.5, 2.5, 1, -1, 127.5, 255, 2**-149, -TINY, 1e-8]).tolist()]

int32s = st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 2**30, -(2**30), 127, -128]) | st.integers(
    -(2**31), 2**31 - 1
)  # int32 accumulators
mantissas = st.sampled_from([2**30, 2**31 - 1, 2**30 + 1, 3 * 2**29]) | st.integers(2**30, 2**31 - 1)
shifts = st.sampled_from([0, 30, 31, 32, 38, 62]) | st.integers(0, 62)
shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)


def floats32(limit=LIMIT):
    """Finite float32 numbers in [-limit, limit]: corners, subnormals, and the rest."""
    return st.sampled_from([*CORNERS, limit, -limit]) | st.floats(-limit, limit, width=32)


@st.composite
def tensors(draw, shape=shapes, limit=LIMIT):
    """Finite float32 arrays: mixed, constant, of one sign, or with one outlier; in any memory layout."""
    x = draw(hnp.arrays(np.float32, shape, elements=floats32(limit)))
    match draw(st.sampled_from(["mixed", "constant", "positive", "negative", "outlier"])):
        case "constant":
            x = np.full_like(x, x.flat[0])
        case "positive":
            x = np.abs(x)
        case "negative":
            x = -np.abs(x)
        case "outlier":
            x = np.clip(x, -1, 1)
            x.flat[-1] = min(1e4, limit)
    return draw(layouts(x))


@st.composite
def layouts(draw, x):
    """The same values behind other strides: transposed, reversed, every second element, Fortran order."""
    match draw(st.sampled_from(["C", "F", "reversed", "strided", "transposed"])):
        case "F":
            return np.asfortranarray(x)
        case "reversed":
            return np.flip(np.flip(x).copy())
        case "strided":
            wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, dtype=x.dtype)
            wide[..., ::2] = x
            return wide[..., ::2]
        case "transposed":
            return np.ascontiguousarray(x.T).T
    return np.ascontiguousarray(x)


@st.composite
def qspecs(draw, axis=None):
    """All bits and all four kinds of codes."""
    return QSpec(draw(st.integers(2, 8)), draw(st.booleans()), draw(st.booleans()), axis)


@st.composite
def qparams(draw, channels=None, axis=None, zero_in_range=True):
    """Quantizers, per tensor or with ``channels`` along ``axis``; 0 has a code if zero_in_range."""
    spec = draw(qspecs(axis))
    scales = st.sampled_from([2.0**-20, 0.125, 0.5, 1.0, 3.0, 1e-8, 1e3]) | st.floats(
        float(np.float32(1e-8)), float(np.float32(1e6)), width=32
    )
    if spec.symmetric:
        zeros = st.just(0)
    elif zero_in_range:
        zeros = st.sampled_from([spec.qmin, spec.qmax, spec.qmin + 1]) | st.integers(spec.qmin, spec.qmax)
    else:
        zeros = st.sampled_from([-1000, 1000, 2**23, -(2**23)]) | st.integers(-512, 512)
    if axis is None:
        return QParams(draw(scales), draw(zeros), spec)
    several = {"min_size": channels, "max_size": channels}
    return QParams(draw(st.lists(scales, **several)), draw(st.lists(zeros, **several)), spec)


@st.composite
def affine_cases(draw, per_channel=(False, True), zero_in_range=True):
    """(x, qparams), x made for that quantizer: codes, ties between codes, both ends, anything else."""
    shape = draw(shapes)
    axis = draw(st.integers(0, len(shape) - 1)) if draw(st.sampled_from(per_channel)) else None
    q = draw(qparams(None if axis is None else shape[axis], axis, zero_in_range))
    scale, zero = along(q, len(shape))
    halves = draw(hnp.arrays(np.int32, shape, elements=st.integers(2 * q.spec.qmin - 4, 2 * q.spec.qmax + 4)))
    on_grid = (scale * (halves / 2 - zero)).astype(np.float32)  # odd halves are ties
    anything = draw(hnp.arrays(np.float32, shape, elements=floats32()))
    x = np.where(draw(hnp.arrays(bool, shape)), anything, on_grid)
    return draw(layouts(x)), q


@st.composite
def requantize_cases(draw):
    """(acc, mantissa, shift, zero_point, spec): arrays of one length, products near ties and at both ends."""
    rows = draw(st.lists(st.tuples(int32s, mantissas, shifts), min_size=1, max_size=8))
    spec = draw(qspecs())
    acc, mantissa, shift = np.array(rows, dtype=np.int64).T.astype(np.int32)
    return acc, mantissa, shift, draw(st.integers(spec.qmin, spec.qmax)), spec


def along(q, ndim):
    """scale (float64) and zero_point (int64) of q, shaped to broadcast over an array of ndim axes."""
    shape = [1] * ndim
    if q.spec.axis is not None:
        shape[q.spec.axis] = -1
    return q.scale.astype(np.float64).reshape(shape), q.zero_point.astype(np.int64).reshape(shape)


# ---------------------------------------------------------------- integer kernels

#: Lengths around the widths of registers: where a tail is handled, or forgotten.
LANE_EDGES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130)


def codes(dtype, shape):
    """Arrays of bytes, half of whose elements are the corners at which sums saturate or signs flip."""
    info = np.iinfo(dtype)
    corners = [info.min, info.min + 1, -1, 0, 1, 127, 128, 254, info.max - 1, info.max]
    legal = sorted({c for c in corners if info.min <= c <= info.max})
    element = st.sampled_from(legal) | st.integers(int(info.min), int(info.max))
    return hnp.arrays(dtype, shape, elements=element)


@st.composite
def strided(draw, array):
    """The same values in another layout: C order, Fortran order, every second element, or reversed."""
    kind = draw(st.sampled_from(["c", "fortran", "gaps", "offset", "reversed"]))
    if kind == "fortran":
        return np.asfortranarray(array)
    if kind == "gaps":
        wide = np.zeros(tuple(2 * n for n in array.shape), array.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    elif kind == "offset":
        wide = np.zeros(tuple(n + 3 for n in array.shape), array.dtype)
        view = wide[tuple(slice(1, 1 + n) for n in array.shape)]
    elif kind == "reversed":
        wide = np.zeros(array.shape, array.dtype)
        view = wide[..., ::-1]
    else:
        return array
    view[...] = array
    return view


#: kh, kw: the 1x1 of a matrix product, the usual 3x3, unequal sides, and one that reaches over the padding.
WINDOWS = ((1, 1), (3, 3), (1, 3), (3, 2), (5, 5))


@st.composite
def noise(draw, dtype, shape, low=None, high=None):
    """Arrays too large to be drawn element by element: from a drawn seed, half of them corners."""
    info = np.iinfo(dtype)
    low, high = info.min if low is None else low, info.max if high is None else high
    corners = [low, low + 1, high - 1, high, *(c for c in (-1, 0, 1, 127, 128) if low <= c <= high)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mixed = np.where(rng.random(shape) < 0.5, rng.choice(corners, shape), rng.integers(low, high + 1, shape))
    return mixed.astype(dtype)


@dataclass(frozen=True)
class Convolution:
    """Operands of kernels.conv2d: activations, weight codes with their width and zero points, and the rest."""

    x: np.ndarray
    w: np.ndarray
    bits: int
    w_zero_point: int | np.ndarray
    options: dict  # stride, padding, x_zero_point

    @property
    def all_options(self):
        """The keywords of ref.conv2d."""
        return self.options | {"w_zero_point": self.w_zero_point}


@st.composite
def convolutions(draw, windows=WINDOWS, bits=(8, 4), paddings=(0, 1, 2, 3), most_k=600, sizes=(0, *LANE_EDGES)):
    """Convolutions with channels and outputs at the edges of registers, empty ones among them."""
    (kh, kw), padding = draw(st.sampled_from(windows)), draw(st.sampled_from(paddings))
    h, width = (draw(st.integers(max(0, k - 2 * padding), max(0, k - 2 * padding) + 6)) for k in (kh, kw))
    if padding == 0:
        h, width = max(h, 1), max(width, 1)
    n, o = draw(st.sampled_from([1, 2, 3, 1, 2, 3, 0])), draw(st.sampled_from(sizes))
    c = draw(st.sampled_from([c for c in sizes if kh * kw * c <= most_k]))
    wide = draw(st.sampled_from(bits))
    x = draw(noise(np.uint8, (n, h, width, c)))
    w = draw(noise(np.int8, (o, kh, kw, c), -(1 << (wide - 1)), (1 << (wide - 1)) - 1))
    zeros = st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255)
    options = {"stride": draw(st.integers(1, 3)), "padding": padding, "x_zero_point": draw(zeros)}
    return Convolution(draw(strided(x)), draw(strided(w)), wide, draw(weight_zero_points(o)), options)


def weight_zero_points(outputs):
    """None at all, one for all outputs, or one for each."""
    return st.just(0) | st.sampled_from([-128, 127]) | noise(np.int8, (outputs,))


@st.composite
def dequantizers(draw, outputs):
    """Scales and biases of all sizes and signs; every product with a sum of 32 bits is finite or inf, never NaN."""
    scale = draw(hnp.arrays(np.float32, outputs, elements=floats32()))
    return Dequantize(scale, draw(st.none() | hnp.arrays(np.float32, outputs, elements=floats32())))


@st.composite
def requantizers(draw, outputs, k):
    """Multipliers that spread sums of `k` products over the codes, and any others; biases to the end of int32."""
    usual = fixed_point(np.full(outputs, draw(st.floats(0.01, 100)) / (255 * 128 * max(k, 1))))
    anything = tuple(draw(hnp.arrays(np.int32, outputs, elements=e)) for e in (mantissas, shifts))
    chosen = draw(hnp.arrays(bool, outputs))
    mantissa, shift = (np.where(chosen, a, u).astype(np.int32) for a, u in zip(anything, usual, strict=True))
    room = 2**31 - 1 - k * 255 * 255  # whatever the zero points
    bias = draw(st.none() | noise(np.int32, (outputs,), -room, room) | noise(np.int32, (outputs,), -9 * k, 9 * k))
    qmin, qmax = draw(st.sampled_from([(0, 255), (0, 1), (254, 255), (3, 200)]))
    return Requantize(mantissa, shift, draw(st.sampled_from([0, 1, 128, 255])), bias, qmin, qmax)
