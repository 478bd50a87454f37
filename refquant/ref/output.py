"""What becomes of the int32 sums of a product: float32 again, or codes for the next integer layer.

    Dequantize     y = float32(acc) * scale[o] + bias[o] + residual       one rounding per operation
    Requantize     q = saturate(round((acc + bias[o]) * m[o]) + zero_point)         no float anywhere

Both are the last stage of `kernels.gemm` and `kernels.conv2d`, done there while the sums are in the
first cache; `apply` is the normative NumPy sentence, which the C core equals bit for bit.

Shapes: acc (..., O) int32; every parameter (O,), one for each output.
Errors: `ShapeError`, `RangeError` when they are made, before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError, ShapeError
from ..intmath import MANTISSA_END, MANTISSA_MIN, SHIFT_MAX, requantize

INT32_MAX = 2**31 - 1


def _vector(owner: str, name: str, x: Any, dtype: type, outputs: int | None = None) -> None:
    if not isinstance(x, np.ndarray) or x.dtype != dtype or x.ndim != 1 or outputs not in (None, len(x)):
        have = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        length = "O" if outputs is None else outputs
        raise ShapeError(f"{owner}: {name} is {have}; it must be {np.dtype(dtype)}, shape ({length},).")
    if not (x.flags.c_contiguous and x.flags.aligned):
        raise ShapeError(f"{owner}: {name} has gaps between its elements. Pass np.ascontiguousarray({name}).")


@dataclass(frozen=True, eq=False)
class Dequantize:
    """Back to real numbers: what the next layer wants where it computes in float.

    Attributes
    ----------
    scale : float32 array, (O,)
        scale of x times scale of w.
    bias : float32 array, (O,), optional
    """

    scale: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    dtype: type = field(default=np.float32, init=False, repr=False)

    def __post_init__(self) -> None:
        _vector("Dequantize", "scale", self.scale, np.float32)
        if self.bias is not None:
            _vector("Dequantize", "bias", self.bias, np.float32, len(self.scale))

    @property
    def outputs(self) -> int:
        """O."""
        return len(self.scale)

    @property
    def largest_bias(self) -> int:
        """What is added to the int32 sums: nothing."""
        return 0

    def apply(self, acc: NDArray[np.int32], residual: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Scale sums (..., O), add the bias, add the residual of the same shape."""
        y = acc.astype(np.float32) * self.scale
        if self.bias is not None:
            y += self.bias
        if residual is not None:
            y += residual
        return y


@dataclass(frozen=True, eq=False)
class Requantize:
    """Straight to the codes of the next layer, in integers only (see `refquant.intmath.requantize`).

    Attributes
    ----------
    mantissa, shift : int32 array, (O,)
        From `refquant.intmath.fixed_point` of scale_x * scale_w / scale_y.
    zero_point : int
        The code that means 0 in the result, 0 to 255.
    bias : int32 array, (O,), optional
        In units of scale_x * scale_w. acc + bias must fit int32; `kernels` and `ref` check it from K.
    qmin, qmax : int
        Codes of the result, within 0 to 255.
    """

    mantissa: NDArray[np.int32]
    shift: NDArray[np.int32]
    zero_point: int = 0
    bias: NDArray[np.int32] | None = None
    qmin: int = 0
    qmax: int = 255
    dtype: type = field(default=np.uint8, init=False, repr=False)
    largest_bias: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        _vector("Requantize", "mantissa", self.mantissa, np.int32)
        _vector("Requantize", "shift", self.shift, np.int32, len(self.mantissa))
        for name, low, high in (("mantissa", MANTISSA_MIN, MANTISSA_END - 1), ("shift", 0, SHIFT_MAX)):
            x = getattr(self, name)
            if x.size and (x.min() < low or x.max() > high):
                raise RangeError(
                    f"Requantize: {name} runs from {x.min()} to {x.max()}; it must lie in {low}..{high}. "
                    "Make both with intmath.fixed_point."
                )
        numbers = (self.qmin, self.qmax, self.zero_point)
        whole = all(isinstance(number, (int, np.integer)) for number in numbers)
        if not whole or not 0 <= self.qmin < self.qmax <= 255 or not 0 <= self.zero_point <= 255:
            raise RangeError(
                f"Requantize: codes {self.qmin}..{self.qmax}, zero point {self.zero_point}; whole numbers are needed, "
                "0 <= qmin < qmax <= 255 and a zero point in 0..255."
            )
        if self.bias is not None:
            _vector("Requantize", "bias", self.bias, np.int32, len(self.mantissa))
            object.__setattr__(self, "largest_bias", int(np.abs(self.bias.astype(np.int64)).max(initial=0)))

    @property
    def outputs(self) -> int:
        """O."""
        return len(self.mantissa)

    def apply(self, acc: NDArray[np.int32], residual: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
        """Turn sums (..., O) into codes; there is no residual among codes of different scales."""
        if residual is not None:
            raise ShapeError("Requantize: a residual can be added to float32 results only. Use Dequantize.")
        if self.bias is not None:
            acc = acc + self.bias
        return requantize(acc, self.mantissa, self.shift, self.zero_point, self.qmin, self.qmax).astype(np.uint8)
