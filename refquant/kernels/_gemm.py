"""The integer matrix product on the active kernel: the last place where wrong input is stopped.

C believes the pointers and strides it is given, hence everything is checked here.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ref
from ._dispatch import active
from ._ext import ROWS, ffi, lib


def gemm(a: NDArray[np.uint8], b: NDArray[np.int8]) -> NDArray[np.int32]:
    """Multiply uint8 rows by int8 rows, exactly: C[m, n] = sum over k of A[m, k] B[n, k].

    Parameters
    ----------
    a : ndarray of uint8, shape (M, K)
    b : ndarray of int8, shape (N, K)
        One row for each column of the result. Each operand is read in place if its rows are
        contiguous and lie one after the other, apart or not; any other layout is copied.

    Returns
    -------
    ndarray of int32, shape (M, N)
        New and C-contiguous; the same bits whichever kernel is active.

    Raises
    ------
    ShapeError
        Wrong dtype, wrong number of axes, or K differs between a and b.
    RangeError
        K is larger than `refquant.ref.MAX_K`, and the sum could overflow int32.
    UnsupportedISA
        The environment variable REFQUANT_ISA asks for a kernel that cannot be run here.
    """
    m, n, k = ref.check_gemm(a, b)
    isa = active()
    if isa == "ref":
        return ref.gemm(a, b)
    a, lda = _readable_rows(a)
    b, ldb = _readable_rows(b)
    c = np.empty((m, n), dtype=np.int32)
    pa, pb, pc = _address("uint8_t *", a), _address("int8_t *", b), _address("int32_t *", c)
    status = lib.rq_gemm_u8s8s32(ROWS[isa], m, n, k, pa, lda, pb, ldb, pc, n)
    assert status == lib.RQ_OK, f"rq_gemm_u8s8s32 returned {status} for checked arguments"
    return c


def _readable_rows(x: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """Return x, or a copy that C can read, and the elements (= bytes) from one row to the next."""
    width = x.shape[1]
    if not x.flags.c_contiguous:
        if x.strides[1] == 1 and x.strides[0] >= width:
            return x, x.strides[0]
        x = np.ascontiguousarray(x)
    return x, width


def _address(pointer: str, x: NDArray[Any]) -> Any:
    # ffi.from_buffer refuses rows that lie apart, and x.ctypes costs a microsecond more.
    return ffi.cast(pointer, x.__array_interface__["data"][0])
