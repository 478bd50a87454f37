"""Exercise 2. Codes for real numbers: round, clamp, add the zero point.

The three operations are all there. For the symmetric weights that its author had, every code is right, saturated ones
included.

Task: write a property that holds for `refquant.intmath.quantize_codes` and fails here. What may differ is said by the
order of the operations; what must *never* differ, whatever the zero point, is said by what codes are for. After
page 01.
"""

import numpy as np

from refquant import intmath


def quantize_codes(x, scale, zero_point, qmin, qmax):
    clamped = np.clip(np.rint(x / scale), qmin, qmax)
    return np.clip(clamped + zero_point, qmin, qmax).astype(np.uint8 if qmin >= 0 else np.int8)


def authors_test(implementation):
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    scale, zero_point = np.float32(0.0234), np.int32(0)
    wanted = intmath.quantize_codes(x, scale, zero_point, -128, 127)
    np.testing.assert_array_equal(implementation(x, scale, zero_point, -128, 127), wanted)
    assert wanted.min() == -128 and wanted.max() == 127  # both ends were reached


def my_property(implementation):
    """Yours: raise AssertionError where `implementation(x, scale, zero_point, qmin, qmax)` breaks a law."""


if __name__ == "__main__":
    from verdict import verdict

    authors_test(quantize_codes)
    print("the author's test passes")
    verdict(my_property, quantize_codes, intmath.quantize_codes)
