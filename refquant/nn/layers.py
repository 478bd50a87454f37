"""Layers: a parameter or two around one operation of the tape, with their initialisation.

Activations are NHWC. Initialisation is variance scaling, uniform, by the average of fan-in and
fan-out, as in the code of Ho et al. 2020 (`nn.py:default_init`); a layer whose output is added to
a residual starts at zero there, so the network starts as the identity on that path.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, nnops, ops, tokenops
from ..errors import ShapeError
from .module import Module, Parameter


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], gain: float) -> NDArray[np.float32]:
    receptive = int(np.prod(shape[1:-1]))
    fan_average = receptive * (shape[0] + shape[-1]) / 2
    bound = np.sqrt(3 * max(gain, 1e-10) / fan_average)
    return rng.uniform(-bound, bound, shape).astype(np.float32, copy=False)


class Linear(Module):
    """(..., C) -> (..., O); weight (O, C), bias (O,). Applied to NHWC it is a 1x1 convolution."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int, gain: float = 1.0) -> None:
        self.weight = Parameter(_uniform(rng, (outputs, inputs), gain))
        self.bias = Parameter(np.zeros(outputs, np.float32))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return nnops.linear(x, self.weight, self.bias)


class Conv2d(Module):
    """(N, H, W, C) -> (N, Ho, Wo, O); weight (O, k, k, C), bias (O,).

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws the initial weights.
    inputs, outputs : int
        Channels, C and O.
    kernel, stride : int
    pads : tuple of int, optional
        (top, bottom, left, right); by default the size is kept at stride 1.
    gain : float
        Scale of the initial weights; 0 makes the layer answer 0.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        pads: tuple[int, int, int, int] | None = None,
        gain: float = 1.0,
    ) -> None:
        self.weight = Parameter(_uniform(rng, (outputs, kernel, kernel, inputs), gain))
        self.bias = Parameter(np.zeros(outputs, np.float32))
        self.stride = stride
        self.pads = (kernel // 2,) * 4 if pads is None else pads

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if self.weight.shape[1:3] == (1, 1) and self.stride == 1:  # a matrix product, nothing to unfold
            matrix = ops.reshape(self.weight, (self.weight.shape[0], -1))
            return nnops.linear(x, matrix, self.bias)
        return nnops.conv2d(x, self.weight, self.bias, self.stride, self.pads)


class GroupNorm(Module):
    """Group normalisation over NHWC with learned scale and shift, both (C,)."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-6) -> None:
        if channels % groups:
            raise ShapeError(
                f"GroupNorm: {channels} channels do not divide into {groups} groups. Choose groups that divide "
                "every level's channels."
            )
        self.weight = Parameter(np.ones(channels, np.float32))
        self.bias = Parameter(np.zeros(channels, np.float32))
        self.groups, self.eps = groups, eps

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return nnops.group_norm(x, self.weight, self.bias, self.groups, self.eps)


class AttentionProduct(Module):
    """softmax(q kᵀ / sqrt(C)) v, without parameters; a module so that it has a name where others put quantizers."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (N, L, C) -> (N, L, C)."""
        return nnops.attention(q, k, v)


class SiLU(Module):
    """x σ(x), without parameters; a module so that the layers after it in a list count as they do in PyTorch."""

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the function."""
        return ops.silu(x)


class Embedding(Module):
    """A table of vectors: integers (N,) in [0, K) -> (N, D); weight (K, D), normal with deviation `std` at first."""

    def __init__(self, rng: np.random.Generator, rows: int, width: int, std: float) -> None:
        self.weight = Parameter(rng.standard_normal((rows, width), dtype=np.float32) * np.float32(std))

    def __call__(self, index: NDArray[np.integer]) -> Tensor:
        """Take the rows."""
        return tokenops.embedding(self.weight, index)


class Dropout(Module):
    """Drops with probability `rate` where a generator is given, and is the identity where none is.

    Training hands a generator down the network; evaluation and sampling do not, so dropout cannot
    be left on by accident.

    Parameters
    ----------
    rate : float
        Probability that a value is dropped.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, x: Tensor, rng: np.random.Generator | None) -> Tensor:
        """Apply the layer."""
        return x if rng is None or self.rate == 0 else nnops.dropout(x, self.rate, rng)
