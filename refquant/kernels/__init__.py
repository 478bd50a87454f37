"""The C core seen from Python: choose an instruction set, check arguments, call.

    >>> import numpy as np
    >>> from refquant import kernels
    >>> a = np.array([[255, 1, 0]], dtype=np.uint8)        # (M, K)
    >>> b = np.array([[-128, 2, 3]], dtype=np.int8)        # (N, K)
    >>> kernels.gemm(a, b)
    array([[-32638]], dtype=int32)
    >>> with kernels.using("ref"):                         # the same integers from NumPy
    ...     kernels.gemm(a, b)
    array([[-32638]], dtype=int32)

A kernel is named by its instruction set: `ref` is NumPy (refquant.ref) and always there,
`scalar` is plain C, the others are C in wider registers. All of them give the same bits, so
that the choice changes time and nothing else. Unless told otherwise by `use`, `using` or the
environment variable REFQUANT_ISA, the fastest one that this processor can run is used. A
name that cannot be obeyed is an error, never another kernel in silence.
"""

from ..ref.output import Dequantize, Requantize
from ._call import Call, fill, recording, repeat
from ._conv import conv2d, gemm
from ._dispatch import active, available, build_info, supported, use, using
from ._islands import (
    concat_channels,
    group_norm_silu_quantize,
    quantize,
    silu_quantize,
    softmax_quantize,
    upsample_nearest,
)
from ._peak import peak_gops
from ._products import products
from ._tokens import (
    gated_add,
    gelu_quantize,
    gelu_quantize_signs,
    layer_norm_modulate_quantize,
    quantize_parts,
    softmax_quantize_regions,
)
from ._verify import Verification, verify
from ._weights import PackedWeights, pack_weights

__all__ = [
    "Call",
    "Dequantize",
    "PackedWeights",
    "Requantize",
    "Verification",
    "active",
    "available",
    "build_info",
    "concat_channels",
    "conv2d",
    "fill",
    "gated_add",
    "gelu_quantize",
    "gelu_quantize_signs",
    "gemm",
    "group_norm_silu_quantize",
    "layer_norm_modulate_quantize",
    "pack_weights",
    "peak_gops",
    "products",
    "quantize",
    "quantize_parts",
    "recording",
    "repeat",
    "silu_quantize",
    "softmax_quantize",
    "softmax_quantize_regions",
    "supported",
    "upsample_nearest",
    "use",
    "using",
    "verify",
]
