"""IDX: round trip, and nothing damaged or foreign gets through."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refquant.data.idx import read_idx
from refquant.errors import DataError


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


arrays = st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
    lambda shape: st.binary(min_size=int(np.prod(shape)), max_size=int(np.prod(shape))).map(
        lambda blob: np.frombuffer(blob, np.uint8).reshape(shape)
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("idx")


@given(array=arrays)
def test_round_trip(folder, array):
    for path, pack in ((folder / "a-ubyte", bytes), (folder / "a-ubyte.gz", gzip.compress)):
        path.write_bytes(pack(idx_bytes(array)))
        got = read_idx(path, array.ndim)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, array)


@given(array=arrays, data=st.data())
def test_truncation_at_any_byte_is_noticed(folder, array, data):
    for path, blob in (
        (folder / "t-ubyte", idx_bytes(array)),
        (folder / "t-ubyte.gz", gzip.compress(idx_bytes(array))),
    ):
        path.write_bytes(blob[: data.draw(st.integers(0, len(blob) - 1))])
        with pytest.raises(DataError, match="fetch"):
            read_idx(path, array.ndim)


@given(array=arrays, tail=st.binary(min_size=1, max_size=9))
def test_bytes_too_many_are_noticed(folder, array, tail):
    path = folder / "l-ubyte"
    path.write_bytes(idx_bytes(array) + tail)
    with pytest.raises(DataError, match="body of exactly"):
        read_idx(path, array.ndim)


@given(array=arrays, data=st.data())
def test_any_flipped_bit_of_the_header_is_noticed(folder, array, data):
    path = folder / "h-ubyte"
    blob = bytearray(idx_bytes(array))
    bit = data.draw(st.integers(0, 8 * (4 + 4 * array.ndim) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    path.write_bytes(blob)
    with pytest.raises(DataError):
        read_idx(path, array.ndim)


def test_every_flipped_bit_of_an_image_files_header_is_noticed(tmp_path):
    path = tmp_path / "i-ubyte"
    for bit in range(8 * 16):
        blob = bytearray(idx_bytes(np.zeros((1, 2, 3), np.uint8)))
        blob[bit // 8] ^= 1 << bit % 8
        path.write_bytes(blob)
        with pytest.raises(DataError):
            read_idx(path, 3)


@given(array=arrays, data=st.data())
def test_any_flipped_bit_behind_the_header_of_a_gz_is_noticed(folder, array, data):
    path = folder / "z-ubyte.gz"
    blob = bytearray(gzip.compress(idx_bytes(array)))
    bit = data.draw(
        st.integers(8 * 10, 8 * len(blob) - 1)
    )  # behind gzip's 10 bytes with time stamp and system
    blob[bit // 8] ^= 1 << bit % 8
    path.write_bytes(blob)
    try:
        got = read_idx(path, array.ndim)
    except DataError:
        return
    np.testing.assert_array_equal(got, array)  # a spare bit of the deflate stream: same content


def test_messages_name_the_file_and_the_way_out(tmp_path):
    with pytest.raises(
        DataError, match=r"nowhere-ubyte cannot be read .*allowed is an IDX file.*check the path"
    ):
        read_idx(tmp_path / "nowhere-ubyte", 3)
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path, 3)

    foreign = tmp_path / "page-ubyte"
    foreign.write_text("<html>404</html>")
    with pytest.raises(
        DataError, match=r"starts with 3c 68 74 6d and holds 16 bytes; allowed is 00 00 08 03"
    ):
        read_idx(foreign, 3)
    foreign.rename(tmp_path / "page-ubyte.gz")
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "page-ubyte.gz", 3)

    labels = tmp_path / "labels-ubyte"
    labels.write_bytes(idx_bytes(np.arange(20, dtype=np.uint8)))
    with pytest.raises(DataError, match=r"allowed is 00 00 08 03 \(3 dimensions"):
        read_idx(labels, 3)  # labels where images are expected


def test_a_huge_announced_size_costs_nothing(tmp_path):
    path = tmp_path / "huge-ubyte"
    path.write_bytes(struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3) + b"x")
    with pytest.raises(DataError, match=str((2**32 - 1) ** 3)):
        read_idx(path, 3)


def test_an_empty_file_of_items_is_refused(tmp_path):
    path = tmp_path / "empty-ubyte"
    path.write_bytes(struct.pack(">BBBB3I", 0, 0, 8, 3, 0, 28, 28))
    with pytest.raises(DataError, match="above zero"):
        read_idx(path, 3)
