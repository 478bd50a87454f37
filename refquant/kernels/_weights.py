"""Weights in the order in which the kernels read them: packed once, used in every call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import ref
from ..errors import RangeError, ShapeError
from ._ext import ffi, lib

ALIGNMENT = 64  # bytes, of a panel: one 512-bit register
PANEL, STEP = 16, 8  # RQ_PANEL and RQ_STEP of cext/impl.h


class PackedWeights:
    """Weights of a convolution or linear layer, as `pack_weights` makes them; immutable.

    Attributes
    ----------
    shape : tuple of int
        (O, kh, kw, C) of the codes; a matrix (O, K) has become (O, 1, 1, K).
    bits : int
        8 or 4.
    zero_point : int64 array, (O,)
        Code that means 0.
    nbytes : int
        Memory of the packed codes.
    """

    def __init__(self, codes: NDArray[np.int8], bits: int, zero_point: NDArray[np.int64]) -> None:
        self.shape: tuple[int, int, int, int] = codes.shape
        self.bits = bits
        self.zero_point = zero_point
        self.reach = int(np.maximum(127 - zero_point, 128 + zero_point).max(initial=128))  # of |w - zw|
        self._codes, self.c = None, None
        self.plan: Any = None  # of the last call with these weights, see _conv.py
        if lib is None:
            self._codes = codes.copy()  # NumPy has no use for another order
            self.nbytes = codes.nbytes * bits // 8
            return
        self.nbytes = lib.rq_packed_bytes(*codes.shape, bits)
        space = np.empty(self.nbytes + ALIGNMENT, np.uint8)
        start = -space.ctypes.data % ALIGNMENT
        self._panels = space[start : start + self.nbytes]
        o, kh, kw, _ = codes.shape
        self._sums = np.empty((kh + 1, kw + 1, o) if o else 0, np.int32)
        self._zero_points = zero_point.astype(np.int32)
        codes = np.ascontiguousarray(codes)
        panels, sums = ffi.cast("void *", self._panels.ctypes.data), ffi.from_buffer("int32_t[]", self._sums)
        status = lib.rq_pack(ffi.from_buffer("int8_t[]", codes), *codes.shape, bits, panels, sums)
        assert status == lib.RQ_OK, f"rq_pack returned {status} for checked arguments"
        zeros = ffi.from_buffer("int32_t[]", self._zero_points) if zero_point.any() else ffi.NULL
        self._alive = (sums, zeros)
        self.c = ffi.new("struct rq_weights *", (*codes.shape, bits, panels, sums, zeros))

    def unpack(self) -> NDArray[np.int8]:
        """Return the codes (O, kh, kw, C)."""
        if self._codes is not None:
            return self._codes
        o, kh, kw, c = self.shape
        panels, steps = -(-o // PANEL), -(-kw * c // STEP)
        if self.bits == 8:
            groups = self._panels.view(np.int8).reshape(panels, kh, steps, 2, PANEL, 4)
        else:
            both = self._panels.reshape(panels, kh, steps, 1, PANEL, 4)
            groups = np.concatenate((both << np.uint8(4), both), axis=3).view(np.int8) >> 4
        codes = groups.transpose(0, 4, 1, 2, 3, 5).reshape(panels * PANEL, kh, steps * STEP)
        return np.ascontiguousarray(codes[:o, :, : kw * c]).reshape(self.shape)

    def __repr__(self) -> str:
        """Say shape and width."""
        return f"PackedWeights({self.shape}, bits={self.bits}, {self.nbytes} bytes)"


def pack_weights(w: NDArray[np.int8], *, bits: int = 8, zero_point: ArrayLike = 0) -> PackedWeights:
    """Bring weight codes into the order of the kernels.

    Parameters
    ----------
    w : int8 array, (O, kh, kw, C) or (O, K)
        Of a convolution, or of a linear layer.
    bits : {8, 4}
        With 4, codes from -8 to 7 take half a byte each, and are widened in the registers.
    zero_point : int or integers, (O,)
        Code that means 0, for all outputs or for each.

    Returns
    -------
    PackedWeights
        To be passed to `gemm` or `conv2d` in the place of the weights.

    Raises
    ------
    ShapeError
        Wrong dtype or number of axes, or an empty window.
    RangeError
        Codes that do not fit `bits`, zero points that are no codes, or K beyond what int32 sums allow.

    Examples
    --------
    >>> w = pack_weights(np.array([[1, -8, 7]], np.int8), bits=4)
    >>> w.unpack()[0, 0, 0].tolist()
    [1, -8, 7]
    """
    matrix = isinstance(w, np.ndarray) and w.ndim == 2
    ref.check_array("pack_weights", "w", w, np.int8, "(O, K)" if matrix else "(O, kh, kw, C)")
    if type(bits) is not int or bits not in (8, 4):
        raise RangeError(f"pack_weights: bits is {bits!r}; kernels exist for 8 and 4.")
    if matrix:
        w = w.reshape(len(w), 1, 1, w.shape[1])
    if min(w.shape[1:3]) < 1:
        raise ShapeError(f"pack_weights: w {w.shape} OHWI has an empty window.")
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if bits == 4 and w.size and (w.min() < low or w.max() > high):
        raise RangeError(f"pack_weights: codes run from {w.min()} to {w.max()}; {bits} bits hold {low} to {high}.")
    _, zeros = ref.check_zero_points("pack_weights", 0, zero_point, len(w))
    k, limit = w[0].size if len(w) else 0, ref.MAX_K if bits == 4 else 131071
    if k > limit:
        raise RangeError(f"pack_weights: K = {k} could overflow int32; the limit is {limit}. Split K.")
    return PackedWeights(w, bits, zeros)


def as_packed(w: Any, zero_point: ArrayLike) -> PackedWeights:
    """Return w itself if it is packed (its own zero points count), else pack it."""
    if isinstance(w, PackedWeights):
        if type(zero_point) is not int or zero_point != 0:
            raise RangeError("packed weights carry their zero points. Give zero_point to pack_weights instead.")
        return w
    return pack_weights(w, zero_point=zero_point)
