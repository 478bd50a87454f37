"""Two 4-bit codes in a byte: how W4 weights lie on disk and in memory.

Along the last axis, code 2i is the low half of byte i and code 2i + 1 the high half; an odd length
leaves the last high half 0. Codes are unsigned here (0..15); a signed code q is stored as q + 8.

Shapes: codes (..., K) uint8 <-> packed (..., ceil(K / 2)) uint8.
Errors: `RangeError` for codes above 15, `ShapeError` where the packed length does not fit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError, ShapeError


def pack_int4(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack codes (..., K) in 0..15 into (..., ceil(K / 2)) bytes.

    Parameters
    ----------
    codes : ndarray of uint8, shape (..., K)
        In 0..15.

    Returns
    -------
    ndarray of uint8, shape (..., ceil(K / 2))
        The first of two codes is in the low half of a byte.

    Examples
    --------
    >>> pack_int4(np.array([1, 2, 15], np.uint8)).tolist()
    [33, 15]
    """
    if codes.dtype != np.uint8 or codes.ndim == 0:
        raise ShapeError(f"pack_int4: wants uint8 codes (..., K), got {codes.dtype} {codes.shape}.")
    if codes.size and codes.max() > 15:
        raise RangeError(f"pack_int4: a code is {codes.max()}; 4 bits hold 0 to 15.")
    low, high = codes[..., 0::2], codes[..., 1::2]
    packed = low.copy()
    packed[..., : high.shape[-1]] |= high << np.uint8(4)
    return packed


def unpack_int4(packed: NDArray[np.uint8], length: int) -> NDArray[np.uint8]:
    """Unpack bytes (..., ceil(length / 2)) into codes (..., length) in 0..15.

    Parameters
    ----------
    packed : ndarray of uint8, shape (..., ceil(length / 2))
    length : int
        K of the codes.

    Returns
    -------
    ndarray of uint8, shape (..., length)
        In 0..15.

    Examples
    --------
    >>> unpack_int4(np.array([33, 15], np.uint8), 3).tolist()
    [1, 2, 15]
    """
    if packed.dtype != np.uint8 or packed.ndim == 0 or packed.shape[-1] != (length + 1) // 2:
        raise ShapeError(
            f"unpack_int4: {length} codes lie in uint8 (..., {(length + 1) // 2}), got {packed.dtype} {packed.shape}."
        )
    codes = np.empty((*packed.shape[:-1], length), np.uint8)
    codes[..., 0::2] = packed & np.uint8(15)
    codes[..., 1::2] = (packed >> np.uint8(4))[..., : length // 2]
    return codes
