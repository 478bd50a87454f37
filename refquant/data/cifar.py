"""Read CIFAR-10's "python version": five training batches and one test batch, each a pickle of Python 2.

    cifar-10-python.tar.gz
      cifar-10-batches-py/data_batch_1 .. data_batch_5, test_batch
        {b"data": uint8 (10000, 3072), b"labels": [int] * 10000, ...}    a row is 3 x 32 x 32, red green blue

A pickle is a program: it names functions, and `pickle.load` calls them. The programs in these files name
three: numpy's `_reconstruct`, `ndarray` and `dtype`. The unpickler below knows these three names, replaces
each by a small stand-in that can only make a uint8 array, and refuses every other. So nothing that a file
names is ever imported, let alone called.

Errors: DataError for a file that is missing, damaged, of another kind, or that asks for another function.
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refquant.errors import DataError, UnknownNameError

FOLDER = "cifar-10-batches-py"
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}


class _Dtype:
    """Stands in for numpy.dtype; the only one there is, is unsigned byte."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"array of dtype {code!r}")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which one byte does not have."""


class _Array:
    """Stands in for numpy's _reconstruct: made empty, then given its state by the pickle."""

    values: NDArray[np.uint8]

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, bytes]) -> None:
        _version, shape, dtype, fortran_order, raw = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError(f"array of dtype {dtype!r}")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran_order else "C")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # the same, as NumPy 2 spells it
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct, so it need not be callable
}


class _BatchUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return _ALLOWED[module, name]


def _parse_batch(blob: bytes, origin: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    allowed = "allowed is a pickle with b'data' uint8 (N, 3072) and b'labels', a list of N integers 0 .. 9"
    try:
        batch = _BatchUnpickler(io.BytesIO(blob), encoding="bytes").load()
        images, labels = batch[b"data"].values, batch[b"labels"]
    except Exception as error:  # damage makes a pickle run astray, and so raise nearly anything
        raise DataError(
            f"{origin} is no batch of CIFAR-10 ({type(error).__name__}: {error}); {allowed}; fetch the archive again"
        ) from error
    if (
        not isinstance(labels, list)
        or not all(type(label) is int and 0 <= label <= 9 for label in labels)
        or images.shape != (len(labels), 3072)
    ):
        raise DataError(
            f"{origin} is no batch of CIFAR-10 (data {images.shape}, labels a {type(labels).__name__}"
            f"{' of other things or another length' if isinstance(labels, list) else ''}); {allowed}; "
            "fetch the archive again"
        )
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _blobs(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield (batch name, bytes) for the wanted batches that `path` has; nothing is unpacked to disk."""
    if path.is_dir():
        for name in wanted:
            if (path / name).is_file():
                yield name, (path / name).read_bytes()
        return
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:  # in file order: one pass over the compressed stream, none backwards
            folder, _, name = member.name.rpartition("/")
            if folder == FOLDER and name in wanted and member.isfile():
                file = archive.extractfile(member)
                assert file is not None  # it is a regular file
                yield name, file.read()


def read_cifar10(path: str | os.PathLike[str], split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the training or the test part of CIFAR-10.

    Parameters
    ----------
    path : path
        ``cifar-10-python.tar.gz``, or the folder ``cifar-10-batches-py`` that was extracted from it.
    split : "train" or "test"

    Returns
    -------
    images : (N, 3, 32, 32) uint8
        N is 50,000 or 10,000; channels are red, green, blue.
    labels : (N,) int64
        0 .. 9.

    Raises
    ------
    DataError
        If a batch is missing, damaged, or holds something else than a CIFAR-10 batch.
    UnknownNameError
        If `split` is neither of the two.
    """
    if split not in BATCHES:
        raise UnknownNameError(f"unknown split {split!r}; allowed are {', '.join(BATCHES)}; choose one")
    path = Path(path)
    try:
        blobs = dict(_blobs(path, BATCHES[split]))
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); allowed is cifar-10-python.tar.gz or the folder {FOLDER} "
            "from it; check the path or fetch the archive again"
        ) from error
    if missing := [name for name in BATCHES[split] if name not in blobs]:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; needed for {split!r} are {', '.join(BATCHES[split])}; "
            "fetch the archive again"
        )
    # In the order of the batch numbers, whatever the order in the archive.
    parts = [_parse_batch(blobs[name], f"{path}: {name}") for name in BATCHES[split]]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
