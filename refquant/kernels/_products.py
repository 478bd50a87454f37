"""Products of codes with codes on the active kernel: attention for all images and heads in one call.

What is computed stands in `refquant.ref.products`; here operands are checked and handed over, in place wherever the
codes of a row lie together: heads that are side by side in a row are a view (`transpose`), and need no copy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError
from ..ref import products as definition
from ..threads import get_threads
from ._call import call, fill, refuse_copy
from ._dispatch import active
from ._ext import ROWS, ffi, lib

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def products(
    a: Codes,
    b: Codes,
    *,
    transpose_b: bool = False,
    a_zero_point: int = 0,
    b_zero_point: int = 0,
    scale: float = 1.0,
    regions: tuple[int, int] | None = None,
    out: Floats | None = None,
) -> Floats:
    """Multiply matrices of codes, many pairs at a time: scale * (a - za) (b - zb).

    Parameters
    ----------
    a : uint8 array, (..., M, K)
        Up to two axes in front, such as images and heads.
    b : uint8 array, (..., K, N), or (..., N, K) if `transpose_b`
    transpose_b : bool
        The rows of b are columns of the product, as in q kᵀ.
    a_zero_point, b_zero_point : int
        0 to 255.
    scale : float
        Rounded to float32; a positive normal number.
    regions : (int, int), optional
        Bits and shift: codes of a have two regions (see `refquant.ref.products`); a_zero_point is 0.
    out : float32 array, (..., M, N), optional
        Filled and returned. The elements of a row lie together; rows, heads and images may lie apart, overlapping
        neither each other nor an operand.

    Returns
    -------
    float32 array, (..., M, N)
        The same bits whichever kernel is active.

    Raises
    ------
    ShapeError
        Wrong dtype or axes, K or the axes in front differ, or a wrong `out`.
    RangeError
        A zero point that is no code, a wrong scale or region, or sums that could overflow int32.

    Examples
    --------
    >>> a, b = np.uint8([[3, 0]]), np.uint8([[2, 1], [9, 9]])
    >>> products(a, b, a_zero_point=1, b_zero_point=1, scale=0.5)
    array([[-3., -4.]], dtype=float32)
    >>> products(a, b, transpose_b=True)
    array([[ 6., 27.]], dtype=float32)
    """
    shape, scale = definition.check_products(a, b, transpose_b, a_zero_point, b_zero_point, scale, regions)
    out = _target(shape, out, a, b)
    if out.size == 0:
        return out
    isa = active()
    if isa == "ref":
        stated: dict[str, Any] = {
            "transpose_b": transpose_b, "a_zero_point": a_zero_point, "b_zero_point": b_zero_point, "scale": scale,
            "regions": regions,
        }  # fmt: skip
        fill("products", lambda: np.copyto(out, definition.products(a, b, **stated)))
        return out
    a, b = _readable(a), _readable(b)
    problem = product_struct(a, b, out, transpose_b, int(a_zero_point), int(b_zero_point), scale, regions)
    call("products", lib.rq_products, ROWS[isa], get_threads(), problem, kept=(a, b, out))
    return out


def product_struct(
    a: Codes,
    b: Codes,
    out: Floats,
    transpose_b: bool,
    a_zero_point: int,
    b_zero_point: int,
    scale: float,
    regions: tuple[int, int] | None,
) -> Any:
    """Return a struct rq_products; it is valid as long as the arrays live and stay where they are."""
    images, heads = (1, 1, *out.shape)[-4:-2]
    bits, shift = regions or (0, 0)
    return ffi.new(
        "struct rq_products *",
        {
            "images": images, "heads": heads, "m": out.shape[-2], "n": out.shape[-1], "k": a.shape[-1],
            "a": _matrices(a, a_zero_point), "b": _matrices(b, b_zero_point), "b_transposed": transpose_b,
            "region_bits": bits, "region_shift": shift, "scale": scale,
            "y": ffi.cast("float *", out.ctypes.data),
            **dict(zip(("y_image_stride", "y_head_stride", "y_row_stride"), _strides(out), strict=True)),
        },
    )  # fmt: skip


def _matrices(x: Codes, zero_point: int) -> dict[str, Any]:
    names = ("image_stride", "head_stride", "row_stride")
    pointer = ffi.cast("uint8_t *", x.ctypes.data)
    return {"data": pointer, "zero_point": zero_point, **dict(zip(names, _strides(x), strict=True))}


def _strides(x: NDArray[Any]) -> tuple[int, int, int]:
    """Distance from one image, head and row to the next, in elements; of an axis of length 1 NumPy may say anything."""
    found = [0, 0, x.shape[-1]]
    for axis in range(-2, -x.ndim - 1, -1):
        if x.shape[axis] > 1:
            found[axis + 1] = x.strides[axis] // x.itemsize
    return found[0], found[1], found[2]


def _rows_together(x: NDArray[Any]) -> bool:
    """Tell whether rows can be read in place: elements side by side, and strides that only go forward."""
    if not x.size:
        return True
    together = x.shape[-1] == 1 or x.strides[-1] == x.itemsize
    forward = all(s >= 0 and s % x.itemsize == 0 for s, n in zip(x.strides, x.shape, strict=True) if n > 1)
    return together and forward and (x.shape[-2] == 1 or x.strides[-2] >= x.shape[-1] * x.itemsize)


def _readable(x: Codes) -> Codes:
    if _rows_together(x):
        return x
    refuse_copy(x)
    return np.ascontiguousarray(x)


def _target(shape: tuple[int, ...], out: Any, a: Codes, b: Codes) -> Floats:
    """Return the array to be filled, new or the caller's; refuse an `out` that does not fit."""
    if out is None:
        return np.empty(shape, np.float32)
    if not isinstance(out, np.ndarray) or out.dtype != np.float32 or out.shape != shape:
        have = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else f"a {type(out).__name__}"
        raise ShapeError(f"products: out is {have}; it must be float32, shape {shape}.")
    if not (out.flags.writeable and out.flags.aligned and _rows_together(out) and _apart(out)):
        raise ShapeError("products: out must be writeable and aligned, with rows in one piece, no two in one place.")
    if any(np.may_share_memory(out, x) for x in (a, b)):
        raise ShapeError("products: out overlaps an operand, which is read while out is written. Pass another array.")
    return out


def _apart(x: NDArray[Any]) -> bool:
    """Tell whether no two elements share memory, for axes that are nested in each other."""
    reach = x.itemsize
    for stride, n in sorted((s, n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride < reach:
            return False
        reach = stride * n
    return True
