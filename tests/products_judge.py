"""What products of codes with codes must give; shared by the tests of the kernels and of their mutants."""

import numpy as np


def bits_of(x):
    return x.view(np.uint32)


def in_integers(a, b, transpose_b=False, a_zero_point=0, b_zero_point=0, scale=1.0, regions=None):
    """The definition in int64, one sum for both regions."""
    left = a.astype(np.int64) - a_zero_point
    if regions is not None:
        bits, shift = regions
        half = 1 << (bits - 1)
        left = np.where(a >= half, (left - half) << shift, left)
    right = b.astype(np.int64) - b_zero_point
    sums = np.matmul(left, right.swapaxes(-1, -2) if transpose_b else right)
    return sums.astype(np.float32) * np.float32(scale)
