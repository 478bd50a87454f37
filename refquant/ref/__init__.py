"""Integer arithmetic in NumPy, normative: what the C kernels must equal bit for bit.

Nothing here is fast and nothing here may depend on the C core. Where a kernel and this
package differ, the kernel is wrong.
"""

from .gemm import MAX_K, check_gemm, gemm

__all__ = ["MAX_K", "check_gemm", "gemm"]
