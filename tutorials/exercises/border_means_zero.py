"""Exercise, after tutorial 02: a thin frame appears around every picture.

Property: padding means real 0. A picture of zeros has a convolution of zeros, border included.
"""

import numpy as np

from refquant import ref


def convolve(x, w, zero_point):
    """A 3 x 3 convolution that keeps the size; x: (N, H, W, C) uint8, w: (O, 3, 3, C) int8."""
    framed = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return ref.conv2d(framed, w, padding=0, x_zero_point=zero_point)


# --- the property: leave it as it is ---

rng = np.random.default_rng(0)
w = rng.integers(-128, 128, (2, 3, 3, 4), dtype=np.int8)
for zero_point in (0, 7, 128, 255):
    zeros = np.full((1, 5, 6, 4), zero_point, np.uint8)
    border = convolve(zeros, w, zero_point)
    assert not border.any(), f"padding is not real 0: zero point {zero_point}, first line {border[0, 0, :, 0]}"
    x = rng.integers(0, 256, (1, 5, 6, 4), dtype=np.uint8)
    assert np.array_equal(convolve(x, w, zero_point), ref.conv2d(x, w, padding=1, x_zero_point=zero_point))
print("holds: padding means real 0")
