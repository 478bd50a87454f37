"""Integer convolution and matrix product on the active kernel: the last place where wrong input is stopped.

C believes the pointers, strides and sizes it is given, hence everything is checked here. A matrix product is
a convolution whose image is one pixel wide: one row, one pixel.

A network calls a layer many times with the same shapes. What depends on those alone, most checks among them, is kept
beside the packed weights as a `_Plan`; a call then has to look at its arrays only, and costs 5 microseconds, not 9.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import ref
from ..errors import RangeError, ShapeError
from ..ref.output import INT32_MAX, Dequantize, Requantize
from ..threads import get_threads
from ._call import call, fill, refuse_copy
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
    plan = b.plan
    if plan is None or not plan.serves("gemm", a, 1, 0, a_zero_point, output):
        b.plan = plan = _Plan("gemm", a, b, (len(a), b.shape[0]), 1, 0, a_zero_point, output)
    return _run(plan, a.reshape(1, len(a), 1, a.shape[1]), a, b, residual, out)


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
    plan = w.plan
    if plan is None or not plan.serves("conv2d", x, stride, padding, x_zero_point, output):
        shape = ref.conv2d_shape(x.shape, w.shape, stride, padding)
        if 2 * padding + max(x.shape[1:3]) > LONGEST:
            raise RangeError(
                f"conv2d: padding is {padding}; at most {LONGEST} pixels are possible, x {x.shape} included."
            )
        w.plan = plan = _Plan("conv2d", x, w, shape, int(stride), int(padding), x_zero_point, output)
    return _run(plan, x, x, w, residual, out)


class _Plan:
    """What shapes, weights and output stage decide: the result's shape, and the structs for C without their arrays."""

    def __init__(
        self,
        name: str,
        x: Codes,
        w: PackedWeights,
        shape: tuple[int, ...],
        stride: int,
        padding: int,
        zx: int,
        output: Output | None,
    ) -> None:
        if output is not None and not isinstance(output, (Dequantize, Requantize)):
            raise ShapeError(f"{name}: output is a {type(output).__name__}; pass a Dequantize or Requantize, or none.")
        if output is not None and output.outputs != shape[-1]:
            raise ShapeError(f"{name}: the output stage is for {output.outputs} outputs, the weights have {shape[-1]}.")
        if type(zx) is not int or not 0 <= zx <= 255:
            zx, _ = ref.check_zero_points(name, zx, 0, 0)
        self.name, self.shape, self.output, self.zx = name, shape, output, zx
        self.dtype: np.dtype[Any] = np.dtype(np.int32 if output is None else output.dtype)
        self.key = (name, x.shape, stride, padding, zx)
        self.stride = min(stride, LONGEST)  # no image is longer: the second window is outside in any case
        self.padding = padding
        self.arrays = [] if output is None else [a for a in vars(output).values() if isinstance(a, np.ndarray)]
        self.own_arrays = all(a.flags.owndata for a in self.arrays)
        _, kh, kw, c = w.shape
        self.multiplications = math.prod(shape) * kh * kw * c
        bias = 0 if output is None else output.largest_bias
        if self.multiplications and kh * kw * c * max(zx, 255 - zx) * w.reach + bias > INT32_MAX:
            raise RangeError(
                f"{name}: K = {kh * kw * c} with these zero points and a bias up to {bias} could overflow int32. "
                "Split K, and add the parts in int64."
            )
        if lib is None:
            return
        n, h, width, _ = x.shape if x.ndim == 4 else (1, len(x), 1, c)
        self.input = ffi.new(_INPUT, (ffi.NULL, n, h, width, c, h * width * c, width * c, zx))
        self.result = ffi.new(_OUTPUT, {"kind": _KINDS[type(output)], "ld": shape[-1]} | _stage(output))

    def serves(self, name: str, x: Codes, stride: int, padding: int, zx: int, output: Output | None) -> bool:
        """Tell whether a call is like the one that this plan was made for; if not sure, say no."""
        return (
            self.output is output
            and self.key == (name, x.shape, stride, padding, zx)
            and type(stride) is type(padding) is type(zx) is int  # 1.0 and True are equal to 1
        )


def _target(plan: _Plan, x: Codes, residual: Any, out: Any) -> NDArray[Any]:
    """Return the array to be filled, new or the caller's; refuse an `out` or `residual` that does not fit."""
    name, shape = plan.name, plan.shape
    if residual is not None:
        if type(plan.output) is not Dequantize:
            raise ShapeError(f"{name}: a residual can be added to float32 results only. Pass output=Dequantize(...).")
        if not isinstance(residual, np.ndarray) or residual.dtype != np.float32 or residual.shape != shape:
            raise ShapeError(f"{name}: residual is {_kind(residual)}; it must be float32, shape {shape}.")
    if out is None:
        return np.empty(shape, plan.dtype)
    if not isinstance(out, np.ndarray) or out.dtype != plan.dtype or out.shape != shape:
        raise ShapeError(f"{name}: out is {_kind(out)}; it must be {plan.dtype}, shape {shape}.")
    flags = out.flags
    if not flags.carray:
        raise ShapeError(f"{name}: out must be writeable, aligned and C-contiguous. Pass another array, or none.")
    if plan.own_arrays and residual is None and flags.owndata and x.flags.owndata:
        return out  # memory of their own, all of them: it cannot overlap
    if any(a is not None and np.may_share_memory(out, a) for a in (x, residual, *plan.arrays)):
        raise ShapeError(f"{name}: out overlaps an operand, which is read while out is written. Pass another array.")
    return out


def _kind(x: Any) -> str:
    return f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"


def _run(
    plan: _Plan, x: Codes, given: Codes, w: PackedWeights, residual: NDArray[np.float32] | None, target: Any
) -> NDArray[Any]:
    """Fill and return target by the active kernel; x (N, H, W, C) is the caller's array `given`, or a view of it."""
    out = _target(plan, given, residual, target)
    if out.size == 0:
        return out
    isa = active()
    if isa == "ref":

        def compute() -> None:
            acc = ref.conv2d(
                x, w.unpack(), stride=plan.stride, padding=plan.padding, x_zero_point=plan.zx,
                w_zero_point=w.zero_point,
            ).reshape(plan.shape)  # fmt: skip
            out[...] = acc if plan.output is None else plan.output.apply(acc, residual)

        fill(plan.name, compute)
        return out
    source, result = ffi.new(_INPUT, plan.input[0]), ffi.new(_OUTPUT, plan.result[0])
    if not x.flags.c_contiguous:
        x = _readable(x)
    if x.flags.c_contiguous:
        pixels = ffi.from_buffer(_BYTES, x)
    else:  # from_buffer refuses lines that lie apart, and is five times faster than this
        pixels, (image, line, *_) = ffi.cast("uint8_t *", x.ctypes.data), x.strides
        source.line_stride = line
        source.image_stride = image if len(x) > 1 else x.shape[1] * line  # of one image, NumPy may say anything
    filled, added = ffi.from_buffer(out), None
    source.data, result.data = pixels, filled
    if residual is not None:
        if not residual.flags.c_contiguous:
            refuse_copy(residual)
        added = ffi.from_buffer(_FLOATS, np.ascontiguousarray(residual))
        result.residual, result.residual_ld = added, plan.shape[-1]
    threads = get_threads() if plan.multiplications >= lib.RQ_ALONE_BELOW else 1
    call(
        plan.name, lib.rq_conv2d, ROWS[isa], threads, source, w.c, plan.stride, plan.padding, result,
        kept=(x, pixels, filled, added, w, plan),
    )  # fmt: skip
    return out


def _readable(x: Codes) -> Codes:
    """Return x, or a copy, with pixels of a line together, and lines and images one after the other."""
    n, h, width, c = x.shape
    image, line, pixel, channel = x.strides
    together = (channel == 1 or c == 1) and (pixel == c or width == 1)
    if together and line >= width * c and (n == 1 or image >= (h - 1) * line + width * c):
        return x
    refuse_copy(x)
    return np.ascontiguousarray(x)


def _stage(output: Output | None) -> dict[str, Any]:
    """Return the fields of struct rq_output that the output stage fills. The plan keeps the arrays."""
    view = ffi.from_buffer
    fields: dict[str, Any] = {}
    if isinstance(output, Dequantize):
        fields["scale"] = view(_FLOATS, output.scale)
        if output.bias is not None:
            fields["bias"] = view(_FLOATS, output.bias)
    elif isinstance(output, Requantize):
        fields |= {"mantissa": view(_INTS, output.mantissa), "shift": view(_INTS, output.shift)}
        fields |= {"zero_point": output.zero_point, "qmin": output.qmin, "qmax": output.qmax}
        if output.bias is not None:
            fields["int_bias"] = view(_INTS, output.bias)
    return fields
