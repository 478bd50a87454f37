"""Integer arithmetic in NumPy, normative: what the C kernels must equal bit for bit.

Nothing here may depend on the C core. Where a kernel and this package differ, the kernel is wrong.
"""

from .conv import check_conv2d, conv2d, conv2d_loops, pad
from .gemm import MAX_K, check_gemm, gemm, gemm_blas, gemm_loops, max_k
from .int4 import pack_int4, unpack_int4

__all__ = [
    "MAX_K",
    "check_conv2d",
    "check_gemm",
    "conv2d",
    "conv2d_loops",
    "gemm",
    "gemm_blas",
    "gemm_loops",
    "max_k",
    "pack_int4",
    "pad",
    "unpack_int4",
]
