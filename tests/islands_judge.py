"""The judge of the float islands, and their operands: extended precision, guarded results, corner-heavy inputs.

The judge is neither NumPy's float64 nor C: `exact_...` computes in extended precision. Where a machine has none,
np.longdouble is float64, and the bounds (2e-6 of a step, 0.6 ulp of float32) still leave room for it.
"""

import dataclasses

import numpy as np
from guards import Guarded
from hypothesis import strategies as st

from refquant import kernels
from refquant.quant import affine

ULP, STEP = 0.6, 2e-6  # the bounds of refquant/ref/islands.py
CANCELLED = 2.0**-36  # of |gamma| + |beta|
L = np.longdouble


def exact_silu(z):
    with np.errstate(over="ignore", under="ignore"):
        return z / (1 + np.exp(-z))


def exact_group_norm(case):
    n, h, w, c = case.x.shape
    d = case.x.astype(L).reshape(n, h * w, case.groups, -1)
    d = d - d[:, :1, :, :1]
    d = d - d.mean(axis=(1, 3), keepdims=True)
    z = d / np.sqrt(np.square(d).mean(axis=(1, 3), keepdims=True) + L(case.eps))
    z = z.reshape(case.x.shape) * case.gamma.astype(L) + case.beta.astype(L)
    return exact_silu(z) if case.silu else z


def exact_softmax(scores, factor):
    e = scores.astype(L)
    with np.errstate(under="ignore"):
        e = np.exp((e - e.max(axis=-1, keepdims=True)) * L(factor))
        return e / e.sum(axis=-1, keepdims=True)


def assert_float(got, want, slack=0.0):
    """At most ULP units of the last place of float32 away, and the slack."""
    with np.errstate(over="ignore", under="ignore"):
        ulp = np.spacing(np.abs(want).astype(np.float32)).astype(L)
    fits = np.abs(want) < np.finfo(np.float32).max
    error = np.abs(got.astype(L) - want) - np.asarray(slack, L)
    wrong = fits & ~(error <= ULP * ulp)
    assert not wrong.any(), f"{got[wrong][0]!r} is {(error / ulp)[wrong][0]} ulp from {want[wrong][0]!r}"


def assert_codes(got, want, scale, zero_point=0, bits=8, slack=0.0):
    """The codes of `want`; both where it lies closer than STEP to the middle between two."""
    y, room = want / L(np.float32(scale)), STEP + np.asarray(slack, L) / L(np.float32(scale))
    low, high = (np.clip(np.rint(y + side) + zero_point, 0, 2**bits - 1) for side in (-room, room))
    wrong = (got < low) | (got > high)
    assert not wrong.any(), f"code {got[wrong][0]} of {y[wrong][0]} steps, zero point {zero_point}"


@dataclasses.dataclass
class Norm:
    """Operands of a group norm."""

    x: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    groups: int
    eps: float = 1e-6
    silu: bool = True

    @property
    def slack(self):
        """SiLU's slope is below 1.1."""
        return 1.1 * CANCELLED * (np.abs(self.gamma.astype(L)) + np.abs(self.beta.astype(L)))

    def run(self, **options):
        operands = (self.x, self.gamma, self.beta, self.groups)
        return kernels.group_norm_silu_quantize(*operands, eps=self.eps, silu=self.silu, **options)

    def check(self, want, scale=0.02, zero_point=14, bits=8):
        """Both results of the active kernel, in guarded arrays; return their bits."""
        real, codes = Guarded(self.x.shape, np.float32), Guarded(self.x.shape, np.uint8)
        assert_float(self.run(out=real.array), want, self.slack)
        stage = {"scale": scale, "zero_point": zero_point, "bits": bits}
        assert_codes(self.run(out=codes.array, **stage), want, *stage.values(), self.slack)
        real.check()
        codes.check()
        return real.array.tobytes() + codes.array.tobytes()


FILLS = {
    "normal": lambda rng, shape: rng.normal(1, 3, shape),
    "some way from 0": lambda rng, shape: 300 + rng.normal(0, 1, shape),  # float32 is not sure of a code in ten
    "far from 0": lambda rng, shape: 1e4 + rng.normal(0, 1e-2, shape),
    "constant": lambda rng, shape: np.full(shape, rng.choice([0, 1, -0.1, 3e38, 1e-40, 16777217.0])),
    "constant in a channel": lambda rng, shape: np.broadcast_to(rng.normal(0, 1e20, shape[-1]), shape),
    "one outlier": lambda rng, shape: np.where(rng.random(shape) < 2 / np.prod(shape), 1e9, 1.5),
    "one ulp": lambda rng, shape: np.where(rng.random(shape) < 0.5, 1e6, np.nextafter(np.float32(1e6), np.inf)),
    "huge": lambda rng, shape: rng.choice([-3e38, 3e38, 1e38, 0], shape),
    "denormal": lambda rng, shape: rng.choice([1e-45, -1e-40, 0, 1e-42], shape),
    "corners": lambda rng, shape: rng.choice([0, -0.0, 30, -30, 1, -1, 88.8, -104, 1e-8], shape),
}
VECTORS = {
    "ones": lambda rng, c: np.ones(c),
    "zeros": lambda rng, c: np.zeros(c),
    "normal": lambda rng, c: rng.normal(0, 1, c),
    "large": lambda rng, c: rng.choice([30, -30, 700, 1e-3, 0], c),
}


@st.composite
def norms(draw):
    """One pixel, one group, as many groups as channels, and channels that are no multiple of 16."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups, each = draw(st.sampled_from([1, 2, 3, 5, 8, 16])), draw(st.sampled_from([1, 2, 3, 4, 8, 17, 32]))
    sizes = st.sampled_from([1, 2, 3, 5, 7])
    shape = (draw(st.integers(1, 3)), draw(sizes), draw(sizes), groups * each)
    gamma, beta = (VECTORS[draw(st.sampled_from(list(VECTORS)))](rng, shape[3]).astype(np.float32) for _ in range(2))
    x = FILLS[draw(st.sampled_from(list(FILLS)))](rng, shape).astype(np.float32)
    return Norm(x, gamma, beta, groups, draw(st.sampled_from([1e-6, 1e-5, 1e-20, 1.0])), draw(st.booleans()))


STAGES = st.tuples(
    st.sampled_from([0.02, 1e-3, 0.5, 1e-30, 1e30, 2.0**-126]) | st.floats(1e-4, 10),
    st.sampled_from([(0, 8), (14, 8), (255, 8), (3, 4), (15, 4), (1, 2)]),
)


def one_set_of_bits(results):
    """All kernels in C agree; `ref` may differ from them."""
    bits = {isa: b for isa, b in results.items() if isa != "ref"}
    assert len(set(bits.values())) <= 1, f"{list(bits)} differ"


def silu_check(x, scale=0.02, zero_point=14, bits=8):
    real, codes = Guarded(x.shape, np.float32), Guarded(x.shape, np.uint8)
    want, stage = exact_silu(x.astype(L)), {"scale": scale, "zero_point": zero_point, "bits": bits}
    assert_float(kernels.silu_quantize(x, out=real.array), want)
    assert_codes(kernels.silu_quantize(x, out=codes.array, **stage), want, *stage.values())
    real.check()
    codes.check()
    return real.array.tobytes() + codes.array.tobytes()


def softmax_check(scores, factor=1.0, scale=1 / 255, bits=8):
    real, codes = Guarded(scores.shape, np.float32), Guarded(scores.shape, np.uint8)
    want = exact_softmax(scores, factor)
    assert_float(kernels.softmax_quantize(scores, factor=factor, out=real.array), want)
    got = kernels.softmax_quantize(scores, factor=factor, scale=scale, bits=bits, out=codes.array)
    assert_codes(got, want, scale, 0, bits)
    real.check()
    codes.check()
    return real.array.tobytes() + codes.array.tobytes()


def quantize_check(x, scale, zero_point, bits):
    codes = Guarded(x.shape, np.uint8)
    want = affine.quantize(x, affine.QParams(scale, zero_point, affine.QSpec(bits)))
    np.testing.assert_array_equal(kernels.quantize(x, scale, zero_point, bits=bits, out=codes.array), want)
    codes.check()


X, V = np.ones((2, 3, 4, 6), np.float32), np.ones(6, np.float32)
S = np.ones((2, 3, 3), np.float32)


def norm(x=X, gamma=V, beta=V, groups=2, **options):
    return kernels.group_norm_silu_quantize(x, gamma, beta, groups, **options)


def with_number(x, number):
    x = x.copy()
    x.flat[7 % x.size] = number
    return x


NAN, INF = np.nan, np.inf
