"""The integer matrix product that every kernel must reproduce, and the rules for its operands.

    C[m, n] = sum over k of (A[m, k] - za) (B[n, k] - zb[n])        A: uint8, B: int8, C: int32

B holds one row for each output channel, as a linear layer's weight does. za and zb are zero points:
with x = sa (a - za) and w = sb (b - zb), the real product is sa sb C. They default to 0.

The sentence stands here three times. `gemm_loops` is the definition, one product at a time.
`gemm` is the same in int64, where nothing can overflow; it is the reference. `gemm_blas` goes
through float64, which holds every integer up to 2^53 exactly, so BLAS computes integers as long as
each partial sum stays below that: 255 * 255 * K < 2^53, true up to K = 1.3e11. Three ways that agree
bit for bit are a proof of each other, and the third one is fast.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import RangeError, ShapeError

# A product lies in [-255*128, 255*127], so that this many of them fit int32 for any data:
# (2**31 - 1) // (255 * 128). Zero points widen the factors and lower the limit, see `max_k`.
MAX_K = 65793


def max_k(a_zero_point: int = 0, b_zero_point: ArrayLike = 0) -> int:
    """Return the largest K for which the sum fits int32 whatever the data.

    Parameters
    ----------
    a_zero_point : int
        0 to 255.
    b_zero_point : int or ndarray of shape (N,)
        -128 to 127.

    Returns
    -------
    int

    Examples
    --------
    >>> max_k(), max_k(128), max_k(255, -128)
    (65793, 131071, 33025)
    """
    zb = np.asarray(b_zero_point)
    reach_a = max(a_zero_point, 255 - a_zero_point)
    reach_b = int(np.maximum(127 - zb, 128 + zb).max(initial=128))
    return int((2**31 - 1) // (reach_a * reach_b))


def check_array(function: str, name: str, x: object, dtype: type, axes: str) -> None:
    """Refuse an operand that is no array of this dtype and number of axes, such as "(M, K)"."""
    wanted = f"it must be {np.dtype(dtype)}, shape {axes}"
    if not isinstance(x, np.ndarray):
        raise ShapeError(
            f"{function}: {name} is a {type(x).__name__}; {wanted}, as a NumPy array. "
            f"Convert it with np.asarray(..., dtype=np.{np.dtype(dtype)})."
        )
    if x.dtype != dtype or x.ndim != axes.count(",") + 1:
        raise ShapeError(
            f"{function}: {name} has dtype {x.dtype}, shape {x.shape}; {wanted}. "
            "Quantize or reshape it first: nothing is converted silently."
        )


def check_zero_points(function: str, a: object, b: object, outputs: int) -> tuple[int, NDArray[np.int64]]:
    """Return the zero points as an int in 0..255 and an int64 array of shape (outputs,) in -128..127."""
    pair = np.asarray(a), np.asarray(b)
    for name, z, shapes in (("uint8", pair[0], ((),)), ("int8", pair[1], ((), (outputs,)))):
        if z.dtype.kind not in "iu" or z.shape not in shapes:
            raise ShapeError(
                f"{function}: the zero point of the {name} operand has dtype {z.dtype}, shape {z.shape}; it must be "
                f"an integer{' or integers, one for each of the ' + str(outputs) + ' outputs' if shapes[1:] else ''}."
            )
        low, high = (0, 255) if name == "uint8" else (-128, 127)
        if z.size and (z.min() < low or z.max() > high):
            raise RangeError(
                f"{function}: a zero point of the {name} operand is {z}; it must be a code, {low}..{high}."
            )
    return int(pair[0]), np.broadcast_to(pair[1].astype(np.int64), (outputs,))


def check_length(function: str, k: int, a_zero_point: int, b_zero_point: ArrayLike) -> None:
    """Refuse a sum of `k` products that could overflow int32."""
    limit = max_k(a_zero_point, b_zero_point)
    if k > limit:
        raise RangeError(
            f"{function}: K = {k} could overflow int32 for uint8 x int8 with these zero points; the limit is {limit}. "
            "Split K, and add the parts in int64."
        )


def check_gemm(
    a: NDArray[np.uint8], b: NDArray[np.int8], a_zero_point: int = 0, b_zero_point: ArrayLike = 0
) -> tuple[int, int, int]:
    """Refuse operands that have no exact int32 product.

    Parameters
    ----------
    a : ndarray of uint8, shape (M, K)
    b : ndarray of int8, shape (N, K)
    a_zero_point : int
    b_zero_point : int or ndarray of int, shape (N,)

    Returns
    -------
    tuple of int
        M, N, K.

    Raises
    ------
    ShapeError
        An operand is no array of the dtype and the two axes above, or the K differ.
    RangeError
        K is larger than `max_k`, and the sum could overflow int32; or a zero point is no code.
    """
    check_array("gemm", "a", a, np.uint8, "(M, K)")
    check_array("gemm", "b", b, np.int8, "(N, K)")
    (m, k), (n, k_b) = a.shape, b.shape
    if k != k_b:
        raise ShapeError(
            f"gemm: a (M, K) = {a.shape} and b (N, K) = {b.shape} differ in K. "
            "b holds one row for each output; pass b.T if yours holds one column."
        )
    za, zb = check_zero_points("gemm", a_zero_point, b_zero_point, n)
    check_length("gemm", k, za, zb)
    return m, n, k


def gemm(
    a: NDArray[np.uint8], b: NDArray[np.int8], *, a_zero_point: int = 0, b_zero_point: ArrayLike = 0
) -> NDArray[np.int32]:
    """Multiply uint8 rows by int8 rows, exactly: the reference.

    The product is taken in int64, where K <= `max_k` terms cannot overflow, and the bound on K makes the
    way back to int32 lossless. No float is involved and nothing is left to prove.

    Parameters
    ----------
    a : ndarray of uint8, shape (M, K)
    b : ndarray of int8, shape (N, K)
    a_zero_point : int
        Code of a that means 0.
    b_zero_point : int or ndarray of int, shape (N,)
        Code of b that means 0, one for all outputs or one for each.

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
    >>> gemm(a, b, a_zero_point=1, b_zero_point=[0, 2])
    array([[-32515,  31743]], dtype=int32)
    """
    centred = _centred(a, b, a_zero_point, b_zero_point, np.int64)
    return np.asarray(np.matmul(centred[0], centred[1].T), dtype=np.int32)


def gemm_blas(
    a: NDArray[np.uint8], b: NDArray[np.int8], *, a_zero_point: int = 0, b_zero_point: ArrayLike = 0
) -> NDArray[np.int32]:
    """`gemm` through float64 BLAS, equal bit for bit and some 50 times faster (see the module's docstring)."""
    centred = _centred(a, b, a_zero_point, b_zero_point, np.float64)
    return np.asarray(np.matmul(centred[0], centred[1].T), dtype=np.int32)


def gemm_loops(
    a: NDArray[np.uint8], b: NDArray[np.int8], *, a_zero_point: int = 0, b_zero_point: ArrayLike = 0
) -> NDArray[np.int32]:
    """`gemm` as its definition: three loops over Python integers, which have no size to overflow."""
    m, n, k = check_gemm(a, b, a_zero_point, b_zero_point)
    zb = np.broadcast_to(np.asarray(b_zero_point), (n,))
    c = np.zeros((m, n), dtype=np.int32)
    for i in range(m):
        for j in range(n):
            total = 0
            for p in range(k):
                total += (int(a[i, p]) - int(a_zero_point)) * (int(b[j, p]) - int(zb[j]))
            c[i, j] = total
    return c


def _centred(a: Any, b: Any, a_zero_point: int, b_zero_point: ArrayLike, dtype: Any) -> tuple[Any, Any]:
    """Return a - za and b - zb in a wide type."""
    _, n, _ = check_gemm(a, b, a_zero_point, b_zero_point)
    zb = np.broadcast_to(np.asarray(b_zero_point), (n,)).astype(dtype)
    return a.astype(dtype) - int(a_zero_point), b.astype(dtype) - zb[:, None]
