"""Data sets: `load("mnist")` gives images (N, C, H, W) uint8 and labels (N,) int64.

    idx.py, cifar.py   readers of the published files; strict, and safe with files from strangers
    sources.py         mirrors, checksums, and the folder REFQUANT_DATA
    shapes.py          a procedural data set that needs no file
    dataset.py         the container, and the map between bytes and floats in [-1, 1]

Nothing is downloaded on import, and nothing at all with ``download=False``.
"""

from __future__ import annotations

import os

import numpy as np

from refquant.data.cifar import read_cifar10
from refquant.data.dataset import Dataset, to_float, to_uint8
from refquant.data.idx import read_idx
from refquant.data.shapes import shapes
from refquant.data.sources import SOURCES, fetch
from refquant.errors import UnknownNameError

__all__ = ["Dataset", "fetch", "load", "names", "read_cifar10", "read_idx", "shapes", "to_float", "to_uint8"]

_IDX_PREFIX = {"train": "train", "test": "t10k"}  # how the two parts are called in the names of MNIST's files
_SHAPES = {"train": (60_000, 0), "test": (10_000, 1)}  # number of images and seed: as many as MNIST has


def names() -> tuple[str, ...]:
    """Return the names that `load` knows."""
    return (*SOURCES, "shapes")


def load(
    name: str, split: str = "train", *, root: str | os.PathLike[str] | None = None, download: bool = True
) -> Dataset:
    """Load one part of a data set.

    Parameters
    ----------
    name : str
        One of `names()`: "mnist", "fashion-mnist" (1 x 28 x 28), "cifar10" (3 x 32 x 32), or "shapes"
        (1 x 28 x 28, drawn on the spot).
    split : "train" or "test"
    root : path, optional
        The folder with the files; by default REFQUANT_DATA, else the user's cache folder.
    download : bool
        Whether the network may be asked for what is missing.

    Returns
    -------
    Dataset
        50,000 (cifar10) or 60,000 images for "train", 10,000 for "test".

    Raises
    ------
    UnknownNameError
        If there is no data set or split of that name.
    DataError
        If files are missing, damaged, or cannot be fetched.
    """
    if name not in names():
        raise UnknownNameError(f"unknown data set {name!r}; allowed are {', '.join(names())}; choose one")
    if split not in _IDX_PREFIX:
        raise UnknownNameError(f"unknown split {split!r}; allowed are {', '.join(_IDX_PREFIX)}; choose one")
    if name == "shapes":
        return shapes(*_SHAPES[split])
    files = fetch(name, root, download)
    if name == "cifar10":
        return Dataset(name, *read_cifar10(files["cifar-10-python.tar.gz"], split))
    prefix = _IDX_PREFIX[split]
    images = read_idx(files[f"{prefix}-images-idx3-ubyte.gz"], 3)
    labels = read_idx(files[f"{prefix}-labels-idx1-ubyte.gz"], 1)
    return Dataset(name, images[:, None], labels.astype(np.int64))
