"""Integer arithmetic in NumPy, normative: what the C kernels must equal bit for bit.

Nothing here may depend on the C core. Where a kernel and this package differ, the kernel is wrong.
"""

from .conv import check_conv2d, conv2d, conv2d_loops, conv2d_shape, pad
from .gemm import MAX_K, check_array, check_gemm, check_zero_points, gemm, gemm_blas, gemm_loops, max_k
from .int4 import pack_int4, unpack_int4
from .output import Dequantize, Requantize

__all__ = [
    "MAX_K",
    "Dequantize",
    "Requantize",
    "check_array",
    "check_conv2d",
    "check_gemm",
    "check_zero_points",
    "conv2d",
    "conv2d_loops",
    "conv2d_shape",
    "gemm",
    "gemm_blas",
    "gemm_loops",
    "max_k",
    "pack_int4",
    "pad",
    "unpack_int4",
]
