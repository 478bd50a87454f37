"""Integer convolution and matrix product on the active kernel: the last place where wrong input is stopped.

C believes the pointers, strides and sizes it is given, hence everything is checked here. A matrix product is
a convolution whose image is one pixel wide: one row, one pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import ref
from ..errors import RangeError, ShapeError
from ..ref.output import INT32_MAX, Dequantize, Requantize
from ..threads import get_threads
from ._dispatch import active
from ._ext import ROWS, ffi, lib
from ._weights import PackedWeights, as_packed

Codes = NDArray[np.uint8]
Output = Dequantize | Requantize

LONGEST = 1 << 30  # MOST_SIZE of cext/conv.c

_UINT8 = np.dtype(np.uint8)
if lib is not None:
    _INPUT, _OUTPUT = ffi.typeof("struct rq_input *"), ffi.typeof("struct rq_output *")
    _BYTES, _FLOATS, _INTS = (ffi.typeof(kind) for kind in ("uint8_t[]", "float[]", "int32_t[]"))
    _KINDS = {type(None): lib.RQ_INT32, Dequantize: lib.RQ_FLOAT32, Requantize: lib.RQ_UINT8}


def gemm(
    a: Codes,
    b: NDArray[np.int8] | PackedWeights,
    *,
    a_zero_point: int = 0,
    b_zero_point: ArrayLike = 0,
    output: Output | None = None,
    residual: NDArray[np.float32] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Multiply uint8 rows by int8 rows, exactly: sum over k of (A[m, k] - za) (B[n, k] - zb[n]).

    Parameters
    ----------
    a : uint8 array, (M, K)
        Read in place if its rows are contiguous and lie one after the other, apart or not; else copied.
    b : int8 array, (N, K), or PackedWeights
        One row for each column of the result. What is used more than once should be packed once.
    a_zero_point : int
        0 to 255.
    b_zero_point : int or integers, (N,)
        -128 to 127; packed weights carry their own.
    output : Dequantize or Requantize, optional
        What becomes of the sums; by default they are the result.
    residual : float32 array, (M, N), optional
        Added to what `Dequantize` gives.
    out : array, (M, N), optional
        Filled and returned: C-contiguous, int32, float32 or uint8 as `output` makes it, overlapping no operand.

    Returns
    -------
    array, (M, N)
        int32, float32 or uint8; the same bits whichever kernel is active.

    Raises
    ------
    ShapeError
        Wrong dtype, wrong number of axes, or K differs between a and b.
    RangeError
        A sum could overflow int32 (see `refquant.ref.max_k`), or a zero point is no code.
    UnsupportedISA
        The environment variable REFQUANT_ISA asks for a kernel that cannot be run here.
    """
    if isinstance(b, PackedWeights):
        as_packed(b, b_zero_point)
        ref.check_array("gemm", "a", a, np.uint8, "(M, K)")
        if b.shape[1:] != (1, 1, a.shape[1]):
            raise ShapeError(f"gemm: a (M, K) = {a.shape} and packed weights (O, kh, kw, C) = {b.shape} differ in K.")
    else:
        ref.check_gemm(a, b, a_zero_point, b_zero_point)
        b = as_packed(b, b_zero_point)
    (m, k), n = a.shape, b.shape[0]
    if m == 0:
        return _target("gemm", (0, n), output, out, a, residual)
    out = _target("gemm", (m, n), output, out, a, residual)
    rows = None if residual is None else residual.reshape(1, m, 1, n)
    _run("gemm", a.reshape(1, m, 1, k), b, 1, 0, a_zero_point, output, rows, out.reshape(1, m, 1, n))
    return out


def conv2d(
    x: Codes,
    w: NDArray[np.int8] | PackedWeights,
    *,
    stride: int = 1,
    padding: int = 0,
    x_zero_point: int = 0,
    w_zero_point: ArrayLike = 0,
    output: Output | None = None,
    residual: NDArray[np.float32] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Convolve exactly: sum over window and channels of (x - zx) (w - zw); see `refquant.ref.conv2d`.

    Parameters
    ----------
    x : uint8 array, (N, H, W, C)
        Read in place if lines and images lie one after the other, apart or not; any other layout is copied.
    w : int8 array, (O, kh, kw, C), or PackedWeights
        What is used more than once should be packed once.
    stride, padding : int
        The same in both directions; pixels outside of x have the code `x_zero_point`.
    x_zero_point : int
        0 to 255.
    w_zero_point : int or integers, (O,)
        -128 to 127; packed weights carry their own.
    output : Dequantize or Requantize, optional
        What becomes of the sums; by default they are the result.
    residual : float32 array, (N, Ho, Wo, O), optional
        Added to what `Dequantize` gives.
    out : array, (N, Ho, Wo, O), optional
        Filled and returned: C-contiguous, int32, float32 or uint8 as `output` makes it, overlapping no operand.

    Returns
    -------
    array, (N, Ho, Wo, O)
        int32, float32 or uint8; the same bits whichever kernel is active.

    Raises
    ------
    ShapeError
        Wrong dtype or axes, channels that differ, or a window larger than the padded image.
    RangeError
        Stride or padding out of range, a zero point that is no code, or a sum that could overflow int32.
    UnsupportedISA
        The environment variable REFQUANT_ISA asks for a kernel that cannot be run here.
    """
    if isinstance(w, PackedWeights):
        as_packed(w, w_zero_point)
        if type(x) is not np.ndarray or x.dtype is not _UINT8 or x.ndim != 4:
            ref.check_array("conv2d", "x", x, np.uint8, "(N, H, W, C)")
    else:
        ref.check_conv2d(x, w, stride, padding, x_zero_point, w_zero_point)
        w = as_packed(w, w_zero_point)
    shape = ref.conv2d_shape(x.shape, w.shape, stride, padding)
    if 2 * padding + max(x.shape[1:3]) > LONGEST:
        raise RangeError(f"conv2d: padding is {padding}; at most {LONGEST} pixels are possible, x {x.shape} included.")
    out = _target("conv2d", shape, output, out, x, residual)
    _run("conv2d", x, w, int(stride), int(padding), x_zero_point, output, residual, out)
    return out


def _target(
    name: str, shape: tuple[int, ...], output: Output | None, out: Any, x: Codes, residual: Any
) -> NDArray[Any]:
    """Return the array to be filled, new or the caller's; refuse an `out` or `residual` that does not fit."""
    if output is not None and not isinstance(output, (Dequantize, Requantize)):
        raise ShapeError(f"{name}: output is a {type(output).__name__}; pass a Dequantize or Requantize, or none.")
    dtype = np.int32 if output is None else output.dtype
    if output is not None and output.outputs != shape[-1]:
        raise ShapeError(f"{name}: the output stage is for {output.outputs} outputs, the weights have {shape[-1]}.")
    if residual is not None:
        if type(output) is not Dequantize:
            raise ShapeError(f"{name}: a residual can be added to float32 results only. Pass output=Dequantize(...).")
        if not isinstance(residual, np.ndarray) or residual.dtype != np.float32 or residual.shape != shape:
            raise ShapeError(f"{name}: residual is {_kind(residual)}; it must be float32, shape {shape}.")
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray) or out.dtype != dtype or out.shape != shape:
        raise ShapeError(f"{name}: out is {_kind(out)}; it must be {np.dtype(dtype)}, shape {shape}.")
    if not (out.flags.c_contiguous and out.flags.writeable and out.flags.aligned):
        raise ShapeError(f"{name}: out must be writeable, aligned and C-contiguous. Pass another array, or none.")
    operands = (x, residual, *(() if output is None else vars(output).values()))
    if any(isinstance(a, np.ndarray) and np.may_share_memory(out, a) for a in operands):
        raise ShapeError(f"{name}: out overlaps an operand, which is read while out is written. Pass another array.")
    return out


def _kind(x: Any) -> str:
    return f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"


def _run(
    name: str,
    x: Codes,
    w: PackedWeights,
    stride: int,
    padding: int,
    zx: int,
    output: Output | None,
    residual: NDArray[np.float32] | None,
    out: NDArray[Any],
) -> None:
    """Fill out (N, Ho, Wo, O) by the active kernel. What is left to check: the zero point and the size of the sum."""
    _, kh, kw, c = w.shape
    if type(zx) is not int or not 0 <= zx <= 255:
        zx, _ = ref.check_zero_points(name, zx, 0, 0)
    if out.size == 0:
        return
    bias = 0 if output is None else output.largest_bias
    if kh * kw * c * max(zx, 255 - zx) * w.reach + bias > INT32_MAX:
        raise RangeError(
            f"{name}: K = {kh * kw * c} with these zero points and a bias up to {bias} could overflow int32. "
            "Split K, and add the parts in int64."
        )
    stride = min(stride, LONGEST)  # no image is longer: the second window is outside in any case
    isa = active()
    if isa == "ref":
        acc = ref.conv2d(x, w.unpack(), stride=stride, padding=padding, x_zero_point=zx, w_zero_point=w.zero_point)
        out[...] = acc if output is None else output.apply(acc, residual)
        return
    if not x.flags.c_contiguous:
        x = _readable(x)
    n, h, width, _ = x.shape
    if x.flags.c_contiguous:
        data, line, image = ffi.from_buffer(_BYTES, x), width * c, h * width * c
    else:  # from_buffer refuses lines that lie apart, and is five times faster than this
        data, line = ffi.cast("uint8_t *", x.ctypes.data), x.strides[1]
        image = x.strides[0] if n > 1 else h * line  # of one image, NumPy may say anything
    source = ffi.new(_INPUT, (data, n, h, width, c, image, line, zx))
    residual = None if residual is None else np.ascontiguousarray(residual)
    target = ffi.new(_OUTPUT, _stage(output, residual, out))
    threads = get_threads() if out.size * kh * kw * c >= lib.RQ_ALONE_BELOW else 1
    status = lib.rq_conv2d(ROWS[isa], threads, source, w.c, stride, padding, target)
    if status == lib.RQ_ERR_MEMORY:
        raise MemoryError(f"{name}: no memory for the scratch space of x {x.shape}, w {w.shape}.")
    assert status == lib.RQ_OK, f"rq_conv2d returned {status} for checked arguments"


def _readable(x: Codes) -> Codes:
    """Return x, or a copy, with pixels of a line together, and lines and images one after the other."""
    n, h, width, c = x.shape
    image, line, pixel, channel = x.strides
    together = (channel == 1 or c == 1) and (pixel == c or width == 1)
    if together and line >= width * c and (n == 1 or image >= (h - 1) * line + width * c):
        return x
    return np.ascontiguousarray(x)


def _stage(output: Output | None, residual: NDArray[np.float32] | None, out: NDArray[Any]) -> dict[str, Any]:
    """Return the fields of struct rq_output; the arrays outlive the call in the caller's hands."""
    view, o = ffi.from_buffer, out.shape[3]
    fields: dict[str, Any] = {"kind": _KINDS[type(output)], "data": view(out), "ld": o}
    if isinstance(output, Dequantize):
        fields["scale"] = view(_FLOATS, output.scale)
        if output.bias is not None:
            fields["bias"] = view(_FLOATS, output.bias)
        if residual is not None:
            fields |= {"residual": view(_FLOATS, residual), "residual_ld": o}
    elif isinstance(output, Requantize):
        fields |= {"mantissa": view(_INTS, output.mantissa), "shift": view(_INTS, output.shift)}
        fields |= {"zero_point": output.zero_point, "qmin": output.qmin, "qmax": output.qmax}
        if output.bias is not None:
            fields["int_bias"] = view(_INTS, output.bias)
    return fields
