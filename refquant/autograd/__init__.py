"""A small tape over NumPy: coarse operations, each beside its derivative."""

from . import nnops, ops, tokenops
from .gradcheck import GradientError, check_gradients
from .tensor import OPS, Tensor, as_tensor, gradients, is_recording, no_grad

__all__ = [
    "OPS",
    "GradientError",
    "Tensor",
    "as_tensor",
    "check_gradients",
    "gradients",
    "is_recording",
    "nnops",
    "no_grad",
    "ops",
    "tokenops",
]
