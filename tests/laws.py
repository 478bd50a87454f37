"""The laws of quantization as plain functions of one case; each raises AssertionError where it is broken.

``tests/property`` runs them on drawn cases; ``test_affine_mutants.py`` there runs the same functions on wrong
arithmetic and demands that they fail. A law that no mutant can break is decoration.

A case of the affine laws is (x, qparams) as drawn by ``strategies.affine_cases``.
"""

from fractions import Fraction

import numpy as np
from asserts import assert_same_integers
from strategies import along

from refquant import intmath
from refquant.quant.affine import QParams, QSpec, dequantize, fake_quantize, quantize


def zero_is_exact(case):
    """dq(q(0)) = 0, and q(0) = zero_point."""
    x, q = case
    zeros = np.zeros_like(x)
    scale, zero_point = along(q, x.ndim)
    assert_same_integers(quantize(zeros, q), np.broadcast_to(zero_point, x.shape), scale=scale)
    np.testing.assert_array_equal(fake_quantize(zeros, q), 0)


def codes_are_the_exact_ones(case):
    """q(x) = clamp(round_half_even(fl(x / s)) + z, qmin, qmax), rational after the one division."""
    x, q = case
    scale, zero_point = (np.broadcast_to(p, x.shape) for p in along(q, x.ndim))
    with np.errstate(over="ignore"):
        quotient = x / scale.astype(np.float32)
    want = np.empty(x.shape, dtype=np.int64)
    for i in np.ndindex(x.shape):
        # an infinite quotient saturates; 10**9 stands for it
        real = 10**9 * int(np.sign(x[i])) if np.isinf(quotient[i]) else round(Fraction(float(quotient[i])))
        want[i] = min(max(real + int(zero_point[i]), q.spec.qmin), q.spec.qmax)
    got = quantize(x, q)
    assert got.dtype == q.spec.dtype
    assert_same_integers(got, want, x=x, scale=scale, zero_point=zero_point)


def error_is_half_a_step(case):
    """|x - dq(q(x))| <= s (1/2 + 2**-15) for s (qmin - z) <= x <= s (qmax - z).

    The 2**-15: |x / s| <= 255, and division and product are each off by at most 2**-24 of that, in steps.
    """
    x, q = case
    scale, zero_point = along(q, x.ndim)
    lo, hi = scale * (q.spec.qmin - zero_point), scale * (q.spec.qmax - zero_point)
    inside = np.clip(x, lo, hi).astype(np.float32)
    error = np.abs(inside.astype(np.float64) - fake_quantize(inside, q))
    assert (error <= scale * (0.5 + 2.0**-15)).all(), (error / scale).max()


def outside_saturates(case):
    """x >= s (qmax - z) gives qmax, x <= s (qmin - z) gives qmin; also for +-inf."""
    x, q = case
    scale, zero_point = along(q, x.ndim)
    for code, sign in ((q.spec.qmax, 1), (q.spec.qmin, -1)):
        edge = np.broadcast_to(scale * (code - zero_point), x.shape)
        for far in (edge, edge + sign * np.abs(x), np.full(x.shape, sign * np.inf)):
            far = far.astype(np.float32)
            assert_same_integers(quantize(far, q), np.full(x.shape, code), x=far, scale=scale)


def monotone(case):
    """x <= y implies q(x) <= q(y)."""
    x, q = case
    y = np.maximum(x, np.flip(x, axis=None if q.spec.axis is None else _others(x, q)))
    assert (quantize(x, q).astype(int) <= quantize(y, q).astype(int)).all()


def idempotent(case):
    """fq(fq(x)) = fq(x), and q(dq(c)) = c for every code c."""
    x, q = case
    once = fake_quantize(x, q)
    np.testing.assert_array_equal(fake_quantize(once, q), once)
    codes = quantize(x, q)
    assert_same_integers(quantize(dequantize(codes, q), q), codes, x=x)


def codes_stay_in_range(case):
    """qmin <= q(x) <= qmax."""
    x, q = case
    codes = quantize(x, q).astype(int)
    assert q.spec.qmin <= codes.min() and codes.max() <= q.spec.qmax


def scaling_by_powers_of_two(case):
    """q(2**k x; 2**k s) = q(x; s), as long as all numbers stay normal."""
    x, q = case
    x = np.where(np.abs(x) < 1e-20, np.float32(0), x)
    for k in (-20, -1, 1, 20):
        scaled = QParams(np.ldexp(q.scale, k), q.zero_point, q.spec)
        assert_same_integers(quantize(np.ldexp(x, k), scaled), quantize(x, q), x=x, k=k)


def channels_are_a_stack_of_tensors(case):
    """q(x)[c] = q(x[c]) with channel c's own scale and zero point."""
    x, q = case
    alone = QSpec(q.spec.bits, q.spec.signed, q.spec.symmetric)
    parts = [
        quantize(part, QParams(s, z, alone))
        for part, s, z in zip(np.moveaxis(x, q.spec.axis, 0), q.scale, q.zero_point, strict=True)
    ]
    assert_same_integers(quantize(x, q), np.stack(parts, axis=q.spec.axis), x=x)


def signed_codes_are_unsigned_ones_moved(case):
    """Asymmetric: q_signed(x; z - L/2) = q_unsigned(x; z) - L/2, as z is added after rounding."""
    x, q = case
    half = 1 << (q.spec.bits - 1)
    zero = q.zero_point.astype(int) - q.spec.qmin
    unsigned = QParams(q.scale, zero, QSpec(q.spec.bits, signed=False, axis=q.spec.axis))
    signed = QParams(q.scale, zero - half, QSpec(q.spec.bits, signed=True, axis=q.spec.axis))
    assert_same_integers(quantize(x, signed).astype(int), quantize(x, unsigned).astype(int) - half, x=x)


def requantize_is_exact(case):
    """rq(a) = clamp(round_half_even(a M / 2**n) + z, qmin, qmax), in rational arithmetic.

    Case: (a, M, n, z, spec) as drawn by ``strategies.requantize_cases``.
    """
    acc, mantissa, shift, zero_point, spec = case
    want = [
        min(max(round(Fraction(int(a) * int(m), 2 ** int(n))) + zero_point, spec.qmin), spec.qmax)
        for a, m, n in zip(acc, mantissa, shift, strict=True)
    ]
    got = intmath.requantize(acc, mantissa, shift, zero_point, spec.qmin, spec.qmax)
    assert got.dtype == spec.dtype
    assert_same_integers(got, want, acc=acc, mantissa=mantissa, shift=shift, zero_point=zero_point)


def _others(x, q):
    """All axes but the channel axis: values may only be compared within their channel."""
    return tuple(a for a in range(x.ndim) if a != q.spec.axis % x.ndim)
