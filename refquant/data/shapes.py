"""A data set without files: white-to-grey discs, squares, triangles, rings and crosses on black.

For tests, for a first training run, and for everybody without a network. Each shape is a signed distance d
from a pixel's centre (in pixels; negative inside, zero on the edge), and the covered share of the pixel is
taken as clip(1/2 - d, 0, 1): an edge through the centre covers half. That is anti-aliasing in one line.

Exact by seed: image i is made from row i of one table of uniform numbers, so it does not depend on how many
images are asked for; and only + - * sqrt, min and max are used, which round alike on every IEEE 754 machine.

Errors: RangeError for a number of images, size or seed that cannot be.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refquant.data.dataset import Dataset
from refquant.errors import RangeError

CLASSES = ("disc", "square", "triangle", "ring", "cross")
SMALLEST = 8  # pixels; below this the five classes look alike
Floats = NDArray[np.float32]
_CHUNK = 256  # images at a time: the temporaries (0.8 MB each at 28 x 28) stay in the cache


def _distance(kind: str, dx: Floats, dy: Floats, r: Floats) -> Floats:
    """Signed distance to a shape of outer radius r around the origin; dx points right, dy down."""
    ax, ay = np.abs(dx), np.abs(dy)
    d: Floats
    if kind == "disc":
        d = np.sqrt(dx * dx + dy * dy) - r
    elif kind == "square":
        d = np.maximum(ax, ay) - r * 0.7
    elif kind == "triangle":  # tip at (0, -r); the normals of its edges are (0, 1) and (+-sqrt(3), -1) / 2
        d = np.maximum(dy, ax * 0.8660254 - dy * 0.5) - r * 0.5
    elif kind == "ring":  # the points within r/4 of a circle of radius 3r/4
        d = np.abs(np.sqrt(dx * dx + dy * dy) - r * 0.75) - r * 0.25
    else:  # cross: the union of a lying and a standing bar of half-width w
        w = r * 0.3
        d = np.minimum(np.maximum(ax - r, ay - w), np.maximum(ax - w, ay - r))
    return d


def shapes(n: int, seed: int, size: int = 28) -> Dataset:
    """Draw `n` random shapes.

    Parameters
    ----------
    n : int
        How many; at least 1.
    seed : int
        At least 0. The first images of a longer set are the images of a shorter one.
    size : int
        Height and width in pixels; at least 8.

    Returns
    -------
    Dataset
        images (n, 1, size, size) uint8; labels index `CLASSES`. Each shape lies wholly inside of its image,
        has an outer radius of 0.2 to 0.4 of its size, and a grey value of 128 to 255.

    Raises
    ------
    RangeError
        If `n`, `seed` or `size` is smaller than the above.

    Examples
    --------
    >>> data = shapes(3, seed=0)
    >>> data.images.shape, [CLASSES[k] for k in data.labels]
    ((3, 1, 28, 28), ['ring', 'cross', 'cross'])
    """
    for what, value, least in (("n", n, 1), ("seed", seed, 0), ("size", size, SMALLEST)):
        if value < least:
            raise RangeError(f"shapes: {what} is {value}; allowed is {least} or more; choose a larger one")

    # Five numbers in [0, 1) an image, row after row of one stream: row i is the same for every n > i.
    u = np.random.default_rng(seed).random((n, 5))
    labels = (u[:, 0] * len(CLASSES)).astype(np.int64)
    r = size * (0.2 + 0.2 * u[:, 1])
    margin = r + 0.5  # a blurred edge is half a pixel wider than the shape
    cx = margin + (size - 2 * margin) * u[:, 2]
    cy = margin + (size - 2 * margin) * u[:, 3]
    grey = 128 + 127 * u[:, 4]

    # (n,) float64 -> (n, 1, 1) float32; the pixel grid is float32 as well
    r32, cx32, cy32, grey32 = (v.astype(np.float32)[:, None, None] for v in (r, cx, cy, grey))
    centres = np.arange(size, dtype=np.float32) + np.float32(0.5)
    images = np.empty((n, 1, size, size), np.uint8)
    for k, kind in enumerate(CLASSES):
        members = np.flatnonzero(labels == k)
        for at in range(0, len(members), _CHUNK):
            i = members[at : at + _CHUNK]
            d = _distance(kind, centres - cx32[i], centres[:, None] - cy32[i], r32[i])
            images[i, 0] = np.rint(np.clip(0.5 - d, 0, 1) * grey32[i])
    return Dataset("shapes", images, labels)
