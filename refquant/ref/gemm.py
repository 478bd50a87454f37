"""The integer matrix product that every kernel must reproduce, and the rules for its operands.

    C[m, n] = sum over k of A[m, k] B[n, k]        A: uint8, B: int8, C: int32

B holds one row for each output channel, as a linear layer's weight does. Zero points stay
outside: they leave the sum by algebra and would hide the one sentence above.
"""

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError, ShapeError

# A product lies in [-255*128, 255*127], so that this many of them fit int32 for any data:
# (2**31 - 1) // (255 * 128).
MAX_K = 65793


def check_gemm(a: NDArray[np.uint8], b: NDArray[np.int8]) -> tuple[int, int, int]:
    """Refuse operands that have no exact int32 product.

    Parameters
    ----------
    a : ndarray of uint8, shape (M, K)
    b : ndarray of int8, shape (N, K)

    Returns
    -------
    tuple of int
        M, N, K.

    Raises
    ------
    ShapeError
        An operand is no array of the dtype and the two axes above, or the K differ.
    RangeError
        K is larger than `MAX_K`, and the sum could overflow int32.
    """
    for name, x, dtype, axes in (("a", a, np.uint8, "(M, K)"), ("b", b, np.int8, "(N, K)")):
        if not isinstance(x, np.ndarray):
            raise ShapeError(
                f"gemm: {name} is a {type(x).__name__}; it must be a NumPy array of {np.dtype(dtype)}, "
                f"shape {axes}. Convert it with np.asarray(..., dtype=np.{np.dtype(dtype)})."
            )
        if x.dtype != dtype or x.ndim != 2:
            raise ShapeError(
                f"gemm: {name} has dtype {x.dtype}, shape {x.shape}; it must be {np.dtype(dtype)}, "
                f"shape {axes}. Quantize or reshape it first: nothing is converted silently."
            )
    (m, k), (n, k_b) = a.shape, b.shape
    if k != k_b:
        raise ShapeError(
            f"gemm: a (M, K) = {a.shape} and b (N, K) = {b.shape} differ in K. "
            "b holds one row for each output; pass b.T if yours holds one column."
        )
    if k > MAX_K:
        raise RangeError(
            f"gemm: K = {k} could overflow int32 for uint8 x int8; the limit is {MAX_K}. "
            "Split K, and add the parts in int64."
        )
    return m, n, k


def gemm(a: NDArray[np.uint8], b: NDArray[np.int8]) -> NDArray[np.int32]:
    """Multiply uint8 rows by int8 rows, exactly.

    The product is taken in int64, where K <= `MAX_K` terms cannot overflow, and the bound on
    K makes the way back to int32 lossless. No float is involved and nothing is left to prove.

    Parameters
    ----------
    a : ndarray of uint8, shape (M, K)
    b : ndarray of int8, shape (N, K)

    Returns
    -------
    ndarray of int32, shape (M, N)

    Raises
    ------
    ShapeError, RangeError
        See `check_gemm`.

    Examples
    --------
    >>> a = np.array([[255, 1, 0]], dtype=np.uint8)
    >>> b = np.array([[-128, 2, 3], [127, -1, 9]], dtype=np.int8)
    >>> gemm(a, b)
    array([[-32638,  32384]], dtype=int32)
    """
    check_gemm(a, b)
    exact: NDArray[np.int64] = np.matmul(a.astype(np.int64), b.astype(np.int64).T)
    return exact.astype(np.int32)
