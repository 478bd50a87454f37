"""Exercise 3. An integer convolution that pads the image with zeros.

The float convolution pads with 0, so this one does, too. On images whose codes have the zero point 0, which is what
comes out of a ReLU, it is right to the last bit.

Task: write a property that holds for `refquant.ref.conv2d` and fails here. Think of an image of which you know the
result without computing anything. After page 02.
"""

import numpy as np

from refquant import ref


def conv2d(x, w, *, padding, x_zero_point):
    # x: (N, H, W, C) uint8, w: (O, 3, 3, C) int8 -> (N, H, W, O) int32
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.int32) - x_zero_point, w.shape[1:3], axis=(1, 2))
    return np.einsum("nijcpq,opqc->nijo", windows, w.astype(np.int32))


def authors_test(implementation):
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 256, (2, 8, 8, 4), dtype=np.uint8), rng.integers(-128, 128, (5, 3, 3, 4)).astype(np.int8)
    wanted = ref.conv2d(x, w, padding=1, x_zero_point=0)
    np.testing.assert_array_equal(implementation(x, w, padding=1, x_zero_point=0), wanted)


def my_property(implementation):
    """Yours: raise AssertionError where `implementation(x, w, padding=..., x_zero_point=...)` breaks a law."""


if __name__ == "__main__":
    from verdict import verdict

    authors_test(conv2d)
    print("the author's test passes")
    verdict(my_property, conv2d, ref.conv2d)
