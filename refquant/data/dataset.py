"""What a data set is, and the one map between its bytes and the numbers a model sees.

A `Dataset` holds bytes, as the files do: images (N, C, H, W) uint8 and labels (N,) int64.
A diffusion model works on floats in [-1, 1] instead, where its noise is centred, so

    to_float:  x = v / 127.5 - 1            0 -> -1,  255 -> 1
    to_uint8:  v = round((x + 1) * 127.5)   ties to even, clipped to 0 .. 255

and `to_uint8(to_float(v)) == v` for each of the 256 values.

Errors: ShapeError for a wrong shape or dtype, RangeError for NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refquant.errors import RangeError, ShapeError


@dataclass(frozen=True, eq=False)  # == on arrays is elementwise, so a generated __eq__ would fail
class Dataset:
    """Labelled images, read-only.

    Attributes
    ----------
    name : str
        Where the images come from, e.g. "mnist".
    images : (N, C, H, W) uint8
    labels : (N,) int64

    Raises
    ------
    ShapeError
        If a shape or dtype differs from the above.
    """

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ShapeError(
                f"data set {self.name!r}: images are {images.dtype} {images.shape}; allowed is uint8 "
                "(N, C, H, W); add the channel axis with images[:, None], convert floats with to_uint8"
            )
        if labels.shape != images.shape[:1] or labels.dtype != np.int64:
            raise ShapeError(
                f"data set {self.name!r}: labels are {labels.dtype} {labels.shape}; allowed is int64 "
                f"({len(images)},), one label an image; use labels.astype(np.int64)"
            )
        # Views, read-only: a data set has many readers, and the caller's own arrays stay as they were.
        for field, array in (("images", images.view()), ("labels", labels.view())):
            array.flags.writeable = False
            object.__setattr__(self, field, array)

    def __len__(self) -> int:
        return len(self.images)


def to_float(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Map bytes to floats in [-1, 1].

    Parameters
    ----------
    images : (N, C, H, W) uint8
        Any other shape works too; the map is elementwise.

    Returns
    -------
    (N, C, H, W) float32
        ``images / 127.5 - 1``; the two ends are exactly -1 and 1.

    Raises
    ------
    ShapeError
        If `images` is not uint8: floats would pass for bytes unnoticed.

    Examples
    --------
    >>> to_float(np.array([0, 51, 255], np.uint8))
    array([-1. , -0.6,  1. ], dtype=float32)
    """
    if images.dtype != np.uint8:
        raise ShapeError(f"to_float: images are {images.dtype}; allowed is uint8; use to_uint8 for floats")
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(x: NDArray[Any]) -> NDArray[np.uint8]:
    """Map floats to bytes: the inverse of `to_float`, for pictures of samples.

    Parameters
    ----------
    x : (N, C, H, W) float
        Values beyond [-1, 1], infinities included, are clipped.

    Returns
    -------
    (N, C, H, W) uint8
        ``round((x + 1) * 127.5)``, ties to even.

    Raises
    ------
    ShapeError
        If `x` is not of a floating dtype.
    RangeError
        If `x` holds NaN, which has no byte.

    Examples
    --------
    >>> to_uint8(np.array([-2.0, -1.0, 0.0, 1.0]))
    array([  0,   0, 128, 255], dtype=uint8)
    """
    if not np.issubdtype(x.dtype, np.floating):
        raise ShapeError(f"to_uint8: x is {x.dtype}; allowed is a float dtype; bytes need no conversion")
    if np.isnan(x).any():
        raise RangeError(
            f"to_uint8: {np.isnan(x).sum()} of {x.size} values are NaN; allowed are numbers; "
            "look for the step of the computation that made them"
        )
    # float64, because float32 would round (x + 1) * 127.5 first and so invent ties.
    return np.rint(np.clip((x.astype(np.float64) + 1) * 127.5, 0, 255)).astype(np.uint8)
