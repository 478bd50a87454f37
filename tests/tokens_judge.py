"""The judge of the islands of a transformer: extended precision, guarded results, corner-heavy inputs.

As `islands_judge`, whose bounds it shares.
"""

import dataclasses

import numpy as np
from guards import Guarded
from hypothesis import strategies as st
from islands_judge import FILLS, STEP, VECTORS, L, assert_codes, assert_float, exact_softmax

from refquant import kernels

CANCELLED = 2.0**-40  # of |1 + gamma| + |beta|


@dataclasses.dataclass
class TokenNorm:
    """Operands of a modulated layer norm."""

    x: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    eps: float = 1e-6

    def exact(self):
        d = self.x.astype(L)
        d = d - d[:, :, :1]
        d = d - d.mean(axis=2, keepdims=True)
        z = d / np.sqrt(np.square(d).mean(axis=2, keepdims=True) + L(self.eps))
        return z * (1 + self.gamma.astype(L))[:, None] + self.beta.astype(L)[:, None]

    def run(self, **options):
        return kernels.layer_norm_modulate_quantize(self.x, self.gamma, self.beta, eps=self.eps, **options)

    def check(self, want, scale=0.02, zero_point=14, bits=8):
        """Both results of the active kernel, in guarded arrays; return their bits."""
        slack = CANCELLED * (np.abs(1 + self.gamma.astype(L)) + np.abs(self.beta.astype(L)))[:, None]
        slack = np.broadcast_to(slack, want.shape)
        real, codes = Guarded(self.x.shape, np.float32), Guarded(self.x.shape, np.uint8)
        assert_float(self.run(out=real.array), want, slack)
        stage = {"scale": scale, "zero_point": zero_point, "bits": bits}
        assert_codes(self.run(out=codes.array, **stage), want, *stage.values(), slack)
        real.check()
        codes.check()
        return real.array.tobytes() + codes.array.tobytes()


@st.composite
def token_norms(draw):
    """One token, tokens beyond a unit of work, features that are no multiple of 16."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, tokens = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5, 31, 32, 33]))
    d = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 48, 50, 96]))
    gamma, beta = (VECTORS[draw(st.sampled_from(list(VECTORS)))](rng, n * d).astype(np.float32) for _ in range(2))
    x = FILLS[draw(st.sampled_from(list(FILLS)))](rng, (n, tokens, d)).astype(np.float32)
    eps = draw(st.sampled_from([1e-6, 1e-5, 1e-20, 1.0]))
    return TokenNorm(x, gamma.reshape(n, d), beta.reshape(n, d), eps)


def exact_gelu(x):
    x = x.astype(L)
    with np.errstate(over="ignore", under="ignore"):
        return x / (1 + np.exp(-2 * np.sqrt(2 / L(np.pi)) * (x + L("0.044715") * x * x * x)))


def gelu_check(x, scale=0.02, zero_point=14, bits=8):
    real, codes = Guarded(x.shape, np.float32), Guarded(x.shape, np.uint8)
    want, stage = exact_gelu(x), {"scale": scale, "zero_point": zero_point, "bits": bits}
    assert_float(kernels.gelu_quantize(x, out=real.array), want)
    assert_codes(kernels.gelu_quantize(x, out=codes.array, **stage), want, *stage.values())
    real.check()
    codes.check()
    return real.array.tobytes() + codes.array.tobytes()


def signs_check(x, positive=0.02, negative=0.0014, bits=8):
    """Each plane has the codes of its sign, and 0 for the other."""
    codes, want = Guarded((*x.shape[:-1], 2 * x.shape[-1]), np.uint8), exact_gelu(x)
    kernels.gelu_quantize_signs(x, positive, negative, bits=bits, out=codes.array)
    up, down = np.split(codes.array, 2, axis=-1)
    assert_codes(up, np.maximum(want, 0), positive, 0, bits - 1)
    assert_codes(down, np.maximum(-want, 0), negative, 0, bits - 1)
    codes.check()
    return codes.array.tobytes()


def at_edges(step, low, high):
    """float32 x beside those in low .. high, where GELU grows, at which |GELU| / step is k + 1/2, k = 0 ... 126."""
    edges = (np.arange(127) + 0.5) * step * (1 if high > 0 else -1)
    low, high = np.full(127, low), np.full(127, high)
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        above = exact_gelu(middle).astype(np.float64) > edges
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    x = low.astype(np.float32)
    return np.concatenate([x, np.nextafter(x, np.float32(-9)), np.nextafter(x, np.float32(9)), np.float32([0, 0, 0])])


def gelu_codes_are_scalars(steps):
    """The active kernel against scalar, which computes in double, where GELU lies on the edge of two codes.

    Not `ref`, which has codes of its own there.
    """
    if kernels.active() == "ref":
        return
    rng = np.random.default_rng(0)
    for _ in range(steps):
        scale, negative = (np.float32(rng.uniform(a, b)) for a, b in ((0.01, 0.06), (0.0007, 0.00133)))
        x = np.concatenate([at_edges(scale, 0, 9), at_edges(negative, -0.75, 0), at_edges(scale / 2, 0, 9)])
        by_isa = []
        for isa in (kernels.active(), "scalar"):
            with kernels.using(isa):
                by_isa.append(kernels.gelu_quantize(x, scale=float(scale), zero_point=60))
                by_isa.append(kernels.gelu_quantize_signs(x, float(scale), float(negative)))
        np.testing.assert_array_equal(by_isa[0], by_isa[2])
        np.testing.assert_array_equal(by_isa[1], by_isa[3])


def lines_at(shares, length, rng):
    """Lines of scores whose softmax has this share at one place, and the two float32 beside that score."""
    at, row = np.arange(len(shares)) % length, np.arange(len(shares))
    scores = rng.normal(0, 2, (len(shares), length)).astype(np.float32)
    others = np.exp(scores.astype(np.float64))
    others[row, at] = 0
    exact = np.log(shares / (1 - shares) * others.sum(axis=1)).astype(np.float32)
    lines = np.stack([scores] * 3)
    lines[:, row, at] = exact, np.nextafter(exact, np.float32(-99)), np.nextafter(exact, np.float32(99))
    return lines.reshape(-1, length)


def softmax_codes_are_scalars(rounds):
    """As above, for softmax in steps of one size and in two regions: on edges, and where the regions meet."""
    if kernels.active() == "ref":
        return
    rng, k = np.random.default_rng(0), np.arange(127) + 0.5
    for round_ in range(rounds):
        for length in (5, 16, 49, 200):
            shift = round_ % 5 + 1
            fine, coarse = k / 127 / 2**shift, k / 127
            shares = np.concatenate([fine, coarse[coarse >= 2.0**-shift], np.full(20, 2.0**-shift)])
            lines, plain = lines_at(shares, length, rng), lines_at((np.arange(255) + 0.5) / 255, length, rng)
            by_isa = []
            for isa in (kernels.active(), "scalar"):
                with kernels.using(isa):
                    codes, whole = (Guarded(x.shape, np.uint8) for x in (lines, plain))
                    kernels.softmax_quantize_regions(lines, bits=8, shift=shift, out=codes.array)
                    kernels.softmax_quantize(plain, scale=1 / 255, out=whole.array)
                    codes.check()
                    whole.check()
                    by_isa.append((codes.array, whole.array))
            np.testing.assert_array_equal(by_isa[0][0], by_isa[1][0])
            np.testing.assert_array_equal(by_isa[0][1], by_isa[1][1])


def regions_check(scores, factor=1.0, bits=8, shift=4):
    """The codes of the exact probabilities, or those of probabilities that lie STEP of a fine step to either side."""
    p, flag = exact_softmax(scores, factor), 1 << (bits - 1)
    coarse = L(np.float32(1 / (flag - 1)))
    fine = coarse * L(2.0) ** -shift
    codes = Guarded(scores.shape, np.uint8)
    kernels.softmax_quantize_regions(scores, factor=factor, bits=bits, shift=shift, out=codes.array)
    allowed = np.zeros(scores.shape, bool)
    for side in (-STEP, 0, STEP):
        moved = p * (1 + L(1e-8) * np.sign(side)) + side * fine  # in the coarse region, relative errors are more steps
        large = moved >= L(2.0) ** -shift
        q = np.clip(np.rint(np.where(large, moved / coarse, moved / fine)), 0, flag - 1)
        allowed |= codes.array == q + np.where(large, flag, 0)
    assert allowed.all(), f"code {codes.array[~allowed][0]} of the probability {p[~allowed][0]}"
    codes.check()
    return codes.array.tobytes()
