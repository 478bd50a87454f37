"""What the kernel benchmark computes: convolutions of diffusion UNets, or the same as matrix products.

Shapes are those of the CIFAR-10 network of DDPM (128 and 256 channels at 32 to 4 pixels, one image), of small
networks in batches, and two whose 8-bit weights, 2.4 MB, do not fit the second cache, for 4-bit weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .. import ref
from ..intmath import fixed_point
from ..kernels import Requantize


@dataclass(frozen=True)
class Shape:
    """x (n, size, size, c), w (o, k, k, c), stride 1, padding k // 2: the result has the size of x."""

    n: int
    c: int
    o: int
    size: int
    k: int

    def __str__(self) -> str:
        """Return the name, as in a table."""
        return f"{self.n},{self.c}->{self.o},{self.size}x{self.size},{self.k}"

    @property
    def operations(self) -> int:
        """Two for each multiplication and addition."""
        return 2 * self.n * self.size**2 * self.k**2 * self.c * self.o


SHAPES = (
    Shape(1, 128, 128, 32, 3),
    Shape(1, 256, 256, 16, 3),
    Shape(1, 256, 256, 8, 3),
    Shape(1, 256, 256, 4, 3),
    Shape(1, 512, 256, 16, 3),
    Shape(1, 256, 128, 32, 3),
    Shape(1, 256, 256, 16, 1),
    Shape(16, 32, 32, 32, 3),
    Shape(16, 64, 64, 16, 3),
    Shape(16, 128, 128, 8, 3),
    Shape(8, 128, 128, 32, 3),
)
BEYOND_CACHE = (Shape(1, 512, 512, 8, 3), Shape(1, 512, 512, 16, 3))


class Problem:
    """Operands of one shape, and what must come out.

    Weights lie in -64..63. Kernels without a dot-product instruction may add pairs of products in saturating
    16 bits (PyTorch's FBGEMM, ONNX Runtime); with 255 * 64 * 2 = 32640 they too are exact, and their time is
    that of a right answer. Ours are exact for all codes, which `refquant verify` checks.

    Parameters
    ----------
    shape : Shape
    zero_point : int
        Of x, 0 to 255.
    gemm : bool
        The matrix product of the same size: x (n size size, k k c), w (o, k k c).
    seed : int
    """

    def __init__(self, shape: Shape, zero_point: int, gemm: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        pixels, depth = (shape.n, shape.size, shape.size), shape.k**2 * shape.c
        self.shape, self.gemm, self.zero_point, self.y_zero_point = shape, gemm, zero_point, 128
        self.padding = shape.k // 2
        x = (int(np.prod(pixels)), depth) if gemm else (*pixels, shape.c)
        w = (shape.o, depth) if gemm else (shape.o, shape.k, shape.k, shape.c)
        self.x: NDArray[np.uint8] = rng.integers(0, 256, x, np.uint8)
        self.w: NDArray[np.int8] = rng.integers(-64, 64, w, np.int8)
        self.x_scale = 0.02
        self.w_scale: NDArray[np.float32] = rng.uniform(0.005, 0.015, shape.o).astype(np.float32)
        size = float(np.sqrt(depth * np.square(np.arange(256.0) - zero_point).mean())) * 37  # of a typical sum
        self.y_scale = float(np.float32(self.x_scale * 0.01 * size * 6 / 255))  # 6 deviations fill the codes
        multiplier = self.x_scale * self.w_scale.astype(np.float64) / self.y_scale
        self.requantize = Requantize(*fixed_point(multiplier), self.y_zero_point)

    @cached_property
    def w4(self) -> NDArray[np.int8]:
        """Weights of 4 bits."""
        return self.w >> 3

    def sums(self, w: NDArray[np.int8]) -> NDArray[np.int32]:
        """Return the int32 result, from the reference."""
        if self.gemm:
            return ref.gemm_blas(self.x, w, a_zero_point=self.zero_point)
        return ref.conv2d(self.x, w, padding=self.padding, x_zero_point=self.zero_point)
