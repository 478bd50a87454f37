"""Exercise 1. Codes for real numbers, with C's `round` in the place of NumPy's `rint`.

Everybody knows how to round. This quantizer agrees with the library on ten thousand random numbers.

Task: write a property that holds for `refquant.intmath.quantize_codes` and fails here. Before you look for a
counterexample: on which numbers can two ways of rounding to the nearest integer differ at all, and how often does a
normal random number hit one of them? After page 01 of the tutorials.
"""

import numpy as np

from refquant import intmath


def quantize_codes(x, scale, zero_point, qmin, qmax):
    v = x / scale
    rounded = np.copysign(np.floor(np.abs(v) + np.float32(0.5)), v)
    return intmath.saturate(rounded + zero_point, qmin, qmax)


def authors_test(implementation):
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    scale, zero_point = np.float32(0.0234), np.int32(131)
    wanted = intmath.quantize_codes(x, scale, zero_point, 0, 255)
    np.testing.assert_array_equal(implementation(x, scale, zero_point, 0, 255), wanted)


def my_property(implementation):
    """Yours: raise AssertionError where `implementation(x, scale, zero_point, qmin, qmax)` breaks a law."""


if __name__ == "__main__":
    from verdict import verdict

    authors_test(quantize_codes)
    print("the author's test passes")
    verdict(my_property, quantize_codes, intmath.quantize_codes)
