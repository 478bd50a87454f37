"""Products of codes with codes, many at a time: the two products of attention. The definition.

    y[..., m, n] = scale * sum over k of (a[..., m, k] - za) (b[..., k, n] - zb)        a, b: uint8, y: float32

The sum is an integer and exact; it is rounded to float32, and its product with the scale once more. With
``transpose_b`` the rows of b are the columns of the product, as in q kᵀ.

Two regions. ``regions=(bits, shift)`` says that a code of a is a flag (its most significant bit) and bits - 1 bits of
magnitude, and stands for the magnitude, 2^shift times as much where the flag is set (`refquant.quant.mrq_softmax`):

    lo, hi = the magnitudes without and with the flag, 0 elsewhere
    sum over k of lo (b - zb)  +  (sum over k of hi (b - zb)) << shift

one integer, and one scale, that of the fine region.

Shapes: a (..., M, K), b (..., K, N) or (..., N, K); up to two axes in front, the same for both: images and heads.
Errors: `ShapeError` for operands that do not fit, `RangeError` for sums that could overflow int32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError, ShapeError

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Regions = tuple[int, int]  # bits and shift

MOST_BATCH_AXES = 2
TINY, INT32_MAX = float(np.finfo(np.float32).tiny), 2**31 - 1


def check_products(
    a: Any, b: Any, transpose_b: bool, a_zero_point: Any, b_zero_point: Any, scale: Any, regions: Regions | None
) -> tuple[tuple[int, ...], float]:
    """Return the shape of the result and the scale rounded to float32; refuse what has no exact result."""
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or not 2 <= x.ndim <= 2 + MOST_BATCH_AXES:
            have = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
            raise ShapeError(f"products: {name} is {have}; it must be uint8, a matrix behind at most two axes.")
    n, k = (b.shape[-2], b.shape[-1]) if transpose_b else (b.shape[-1], b.shape[-2])
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != k:
        raise ShapeError(
            f"products: a {a.shape} and b {b.shape}{' transposed' if transpose_b else ''} differ in K or in the axes "
            "in front."
        )
    for name, zero in (("a", a_zero_point), ("b", b_zero_point)):
        if not isinstance(zero, (int, np.integer)) or not 0 <= zero <= 255:
            raise RangeError(f"products: the zero point of {name} is {zero!r}; it must be a code, 0..255.")
    rounded = float(np.float32(scale)) if isinstance(scale, (int, float, np.number)) else float("nan")
    if not TINY <= rounded < float("inf"):
        raise RangeError(f"products: scale is {scale!r}; it must be a positive normal float32.")
    reach = max(a_zero_point, 255 - a_zero_point)
    if regions is not None:
        reach = check_regions(regions)
        if a_zero_point != 0:
            raise RangeError(f"products: codes of two regions have the zero point 0; given {a_zero_point}.")
    largest = k * reach * max(b_zero_point, 255 - b_zero_point)
    if largest > INT32_MAX:
        raise RangeError(f"products: K = {k} sums of these codes reach {largest}, beyond int32. Split K.")
    return (*a.shape[:-1], n), rounded


def check_regions(regions: Regions) -> int:
    """Return the largest number that a code stands for; refuse bits outside of 3..8 and shifts outside of 0..bits-1."""
    bits, shift = regions
    if not 3 <= bits <= 8 or not 0 <= shift < bits:
        raise RangeError(f"regions are (bits, shift) = {regions}; give 3 to 8 bits and a shift from 0 to bits - 1.")
    return ((1 << (bits - 1)) - 1) << shift


def products(
    a: Codes,
    b: Codes,
    *,
    transpose_b: bool = False,
    a_zero_point: int = 0,
    b_zero_point: int = 0,
    scale: float = 1.0,
    regions: Regions | None = None,
) -> Floats:
    """Multiply in float64, which holds every integer up to 2^53: BLAS computes with integers (see `refquant.ref.gemm`).

    Parameters are those of `refquant.kernels.products`.
    """
    shape, rounded = check_products(a, b, transpose_b, a_zero_point, b_zero_point, scale, regions)
    right = b.astype(np.float64) - b_zero_point
    if transpose_b:
        right = right.swapaxes(-1, -2)
    if regions is None:
        sums = np.matmul(a.astype(np.float64) - a_zero_point, right).astype(np.int64)
    else:
        bits, shift = regions
        coarse, magnitude = a >> (bits - 1) & 1 == 1, a & ((1 << (bits - 1)) - 1)
        lo, hi = (np.matmul(np.where(region, magnitude, 0.0), right).astype(np.int64) for region in (~coarse, coarse))
        sums = lo + (hi << shift)
    return np.asarray(sums.astype(np.int32).astype(np.float32) * np.float32(rounded)).reshape(shape)
