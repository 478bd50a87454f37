"""Dynamic quantization: every token finds its own scale and zero point while the network runs.

For each token, or each group of g of its K features,

    m = min(x, 0), M = max(x, 0)      s = (M - m) / (2^k - 1)      z = round(-m / s)      q = clamp(round(x / s) + z)

There is nothing to calibrate and nothing to store; an outlier spoils its own token (or group) only, and a change of
distribution from step to step is followed for nothing. The price is a pass over each input before its product, and a
scale for each row of it. In Q-DiT's ablation it halves the Frechet distance that groups of weights leave (13.8 to 6.6,
arXiv 2406.17343, table 4; 50 tables of static group parameters would be 39 % of the model there).

Differs from Q-DiT: the range is widened to contain 0, as everywhere in this library, so that 0 has a code. There it is
not, but the zero point is clamped to the codes all the same, and a group of one sign is shifted and clipped.

Shapes: x (..., K), its last axis the features of one token; NHWC images have a token a pixel.
Errors: `RangeError` for bits outside of 2..8, `ShapeError` where g does not divide K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError, ShapeError
from .observers.ranges import SCALE_FLOOR

Array = NDArray[Any]


@dataclass(frozen=True)
class PerToken:
    """The grid of k bits that every token, or every group of its features, makes for itself.

    Attributes
    ----------
    bits : int
        k, 2 to 8.
    group : int
        g; 0 is the whole token.

    Examples
    --------
    >>> PerToken(bits=2).fake_quantize(np.float32([[0, 1, 3], [0, 10, 30]]))
    array([[ 0.,  1.,  3.],
           [ 0., 10., 30.]], dtype=float32)
    """

    bits: int
    group: int = 0
    kind: ClassVar[str] = "per-token"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RangeError(f"bits={self.bits!r}: 2 to 8 bits are supported; keep wider tensors in float")
        if self.group < 0:
            raise RangeError(f"group={self.group}: give the features of a group, or 0 for whole tokens")

    def quantize(self, x: Array) -> tuple[Array, Array, Array]:
        """Codes with the scales and zero points that go with them.

        Parameters
        ----------
        x : float array, (..., K)

        Returns
        -------
        codes : integer-valued float array, (R, g)
            A row for each token and group, in their order.
        scale, zero_point : float array, (R, 1)
        """
        rows, dtype = self._rows(x), x.dtype.type
        top = dtype((1 << self.bits) - 1)
        low, high = np.minimum(rows.min(axis=1, keepdims=True), 0), np.maximum(rows.max(axis=1, keepdims=True), 0)
        scale = np.maximum((high - low) / top, dtype(SCALE_FLOOR))
        zero = np.rint(-low / scale)
        return np.clip(np.rint(rows / scale) + zero, 0, top), scale, zero

    def fake_quantize(self, x: Array) -> Array:
        """x rounded to the grids of its tokens; same shape and dtype."""
        codes, scale, zero = self.quantize(x)
        codes -= zero
        codes *= scale
        return codes.reshape(x.shape)

    def inside(self, x: Array) -> NDArray[np.bool_]:
        """Everything: no token clips itself."""
        return np.ones(x.shape, bool)

    def facts(self) -> dict[str, Any]:
        """Bits and group: all there is."""
        return {"bits": self.bits, "group": self.group}

    def arrays(self) -> dict[str, Array]:
        """Nothing is stored."""
        return {}

    def _rows(self, x: Array) -> Array:
        features = x.shape[-1]
        group = self.group or features
        if features % group:
            raise ShapeError(f"groups of {group} do not divide the {features} features of a token; give a divisor")
        return np.ascontiguousarray(x).reshape(-1, group)
