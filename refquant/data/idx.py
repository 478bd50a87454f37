"""Read IDX files, the format of MNIST and Fashion-MNIST.

The whole format, all integers big-endian:

    byte 0, 1   0 0
    byte 2      type of the items; 8 = unsigned byte, the only one these data sets use
    byte 3      number of dimensions d
    d x 4       the dimensions, uint32
    rest        the items, last dimension fastest

The reader is strict: the caller says how many dimensions there must be, no dimension is zero and the
length fits to the byte. It follows that a flip of any header bit is noticed. (A flipped item is a legal
item; that is what the checksums of `sources.py` are for.)

Errors: DataError for everything that is not such a file.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refquant.errors import DataError


def read_idx(path: str | os.PathLike[str], ndim: int) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes.

    Parameters
    ----------
    path : path
        The file; decompressed on the way if its name ends in ``.gz``.
    ndim : int
        Number of dimensions: 3 for images (N, H, W), 1 for labels (N,).

    Returns
    -------
    uint8 array of `ndim` dimensions, read-only

    Raises
    ------
    DataError
        If the file is missing, truncated, too long or something else than IDX.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            blob = file.read()
    except (OSError, EOFError, zlib.error) as error:  # the last two: gzip data cut short, or damaged
        raise DataError(
            f"{path} cannot be read ({error}); allowed is an IDX file, plain or .gz; "
            "check the path or fetch the file again"
        ) from error

    magic = bytes([0, 0, 8, ndim])
    start = 4 + 4 * ndim
    if blob[:4] != magic or len(blob) < start:
        raise DataError(
            f"{path} is not the IDX file asked for: it starts with {blob[:4].hex(' ') or 'nothing'} and "
            f"holds {len(blob)} bytes; allowed is {magic.hex(' ')} ({ndim} dimensions of unsigned bytes) "
            f"in a header of {start} bytes; check the name or fetch the file again"
        )
    shape = tuple(int(n) for n in np.frombuffer(blob, ">u4", count=ndim, offset=4))
    if len(blob) - start != math.prod(shape) or 0 in shape:
        raise DataError(
            f"{path} is damaged: its header announces {shape}, its body holds {len(blob) - start} bytes; "
            f"allowed are dimensions above zero and a body of exactly their product, {math.prod(shape)}; "
            "fetch the file again"
        )
    return np.frombuffer(blob, np.uint8, offset=start).reshape(shape)
