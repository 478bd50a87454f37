"""The integer convolution that every kernel must reproduce.

    y[n, i, j, o] = sum over p, q, c of (x[n, s i + p - t, s j + q - t, c] - zx) (w[o, p, q, c] - zw[o])

x is NHWC uint8, w is OHWI int8, y is int32; s the stride, t the padding. Pixels outside of x have the
code zx: they mean 0, add nothing, and so the border needs no formula of its own. Padding with the
*code* 0 instead is the classical mistake, and a test keeps it.

Twice: seven loops, and one matrix product over unfolded windows (im2col).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import RangeError, ShapeError
from .gemm import check_array, check_length, check_zero_points, gemm_blas


def check_conv2d(
    x: NDArray[np.uint8], w: NDArray[np.int8], stride: int, padding: int, x_zero_point: int, w_zero_point: ArrayLike
) -> tuple[int, int]:
    """Refuse what cannot be convolved exactly.

    Parameters
    ----------
    x : ndarray of uint8, shape (N, H, W, C)
    w : ndarray of int8, shape (O, kh, kw, C)
    stride, padding : int
    x_zero_point : int
    w_zero_point : int or ndarray of int, shape (O,)

    Returns
    -------
    tuple of int
        Height and width of the result.

    Raises
    ------
    ShapeError
        Wrong dtype or axes, channels that differ, or a window larger than the padded image.
    RangeError
        Stride below 1, padding below 0, a zero point that is no code, or a sum that could overflow int32.
    """
    check_array("conv2d", "x", x, np.uint8, "(N, H, W, C)")
    check_array("conv2d", "w", w, np.int8, "(O, kh, kw, C)")
    _, ho, wo, outputs = conv2d_shape(x.shape, w.shape, stride, padding)
    zx, zw = check_zero_points("conv2d", x_zero_point, w_zero_point, outputs)
    check_length("conv2d", w[0].size if outputs else 0, zx, zw)
    return ho, wo


def conv2d_shape(
    x: tuple[int, ...], w: tuple[int, ...], stride: int, padding: int
) -> tuple[int, int, int, int]:
    """Return the shape (N, Ho, Wo, O) that x (N, H, W, C) and w (O, kh, kw, C) give; errors as `check_conv2d`."""
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise RangeError(f"conv2d: {name} is {value!r}; it must be a whole number from {least}.")
    (n, height, width, channels), (outputs, kh, kw, expected) = x, w
    if channels != expected:
        raise ShapeError(
            f"conv2d: weight expects {expected} input channels, input has {channels}.  x {x} NHWC, w {w} OHWI."
        )
    if kh < 1 or kw < 1 or height + 2 * padding < 1 or width + 2 * padding < 1:
        raise ShapeError(f"conv2d: nothing to convolve.  x {x} NHWC, w {w} OHWI, padding {padding}.")
    ho, wo = (height + 2 * padding - kh) // stride + 1, (width + 2 * padding - kw) // stride + 1
    if ho < 1 or wo < 1:
        raise ShapeError(f"conv2d: a {kh}x{kw} window does not fit.  x {x} NHWC, padding {padding}. Pad more.")
    return n, ho, wo, outputs


def conv2d(
    x: NDArray[np.uint8],
    w: NDArray[np.int8],
    *,
    stride: int = 1,
    padding: int = 0,
    x_zero_point: int = 0,
    w_zero_point: ArrayLike = 0,
) -> NDArray[np.int32]:
    """Convolve exactly, by one matrix product over unfolded windows.

    Parameters
    ----------
    x : ndarray of uint8, shape (N, H, W, C)
    w : ndarray of int8, shape (O, kh, kw, C)
    stride : int
        At least 1, the same in both directions.
    padding : int
        Pixels added on all four sides, each of the code `x_zero_point`.
    x_zero_point : int
    w_zero_point : int or ndarray of int, shape (O,)

    Returns
    -------
    ndarray of int32, shape (N, Ho, Wo, O)
        Ho = (H + 2 padding - kh) // stride + 1, Wo likewise.

    Raises
    ------
    ShapeError, RangeError
        See `check_conv2d`.

    Examples
    --------
    >>> x = np.full((1, 2, 2, 1), 7, dtype=np.uint8)
    >>> w = np.ones((1, 3, 3, 1), dtype=np.int8)
    >>> conv2d(x, w, padding=1, x_zero_point=5)[0, :, :, 0]       # each window sees all four pixels: 4 (7 - 5)
    array([[8, 8],
           [8, 8]], dtype=int32)
    """
    ho, wo = check_conv2d(x, w, stride, padding, x_zero_point, w_zero_point)
    n, (o, kh, kw, c) = len(x), w.shape
    windows = np.lib.stride_tricks.sliding_window_view(pad(x, padding, x_zero_point), (kh, kw), axis=(1, 2))
    chosen = windows[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)  # (N, Ho, Wo, kh, kw, C)
    rows = np.ascontiguousarray(chosen).reshape(n * ho * wo, kh * kw * c)
    flat = np.ascontiguousarray(w).reshape(o, kh * kw * c)
    y = gemm_blas(rows, flat, a_zero_point=x_zero_point, b_zero_point=w_zero_point)
    return y.reshape(n, ho, wo, o)


def conv2d_loops(
    x: NDArray[np.uint8],
    w: NDArray[np.int8],
    *,
    stride: int = 1,
    padding: int = 0,
    x_zero_point: int = 0,
    w_zero_point: ArrayLike = 0,
) -> NDArray[np.int32]:
    """`conv2d` as its definition: seven loops over Python integers."""
    ho, wo = check_conv2d(x, w, stride, padding, x_zero_point, w_zero_point)
    zw = np.broadcast_to(np.asarray(w_zero_point), (len(w),))
    _, kh, kw, channels = w.shape
    padded = pad(x, padding, x_zero_point)
    y = np.zeros((len(x), ho, wo, len(w)), dtype=np.int32)
    for n in range(len(x)):
        for i in range(ho):
            for j in range(wo):
                for o in range(len(w)):
                    total = 0
                    for p in range(kh):
                        for q in range(kw):
                            for c in range(channels):
                                pixel = int(padded[n, stride * i + p, stride * j + q, c]) - int(x_zero_point)
                                total += pixel * (int(w[o, p, q, c]) - int(zw[o]))
                    y[n, i, j, o] = total
    return y


def pad(x: NDArray[np.uint8], padding: int, zero_point: int) -> NDArray[np.uint8]:
    """Surround x (N, H, W, C) with `padding` pixels of the code that means 0."""
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return np.pad(x, around, constant_values=zero_point)
