"""CIFAR-10's pickles: read as Python 2 wrote them, and nothing else is executed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refquant.data.cifar import BATCHES, FOLDER, read_cifar10
from refquant.errors import DataError, UnknownNameError

# --- a pickler of Python 2, protocol 2, for the few types of a batch ------------------------------
# Python 3 cannot write such files: its pickles of bytes call _codecs.encode, Python 2 has an opcode for them.


def py2(value: object, module: bytes) -> bytes:
    if isinstance(value, bytes):
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<I", len(value))) + value
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, tuple):
        return b"(" + b"".join(py2(v, module) for v in value) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(py2(v, module) for v in value) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(py2(k, module) + py2(v, module) for k, v in value.items()) + b"u"
    if isinstance(value, np.ndarray):
        code = value.dtype.str[1:].encode()
        order = value.dtype.str[:1].encode()
        dtype = b"cnumpy\ndtype\n" + py2((code, 0, 1), module) + b"R"
        dtype += py2((3, order, None, None, None, -1, -1, 0), module) + b"b"
        fortran = value.flags.f_contiguous and not value.flags.c_contiguous
        state = b"(" + py2(1, module) + py2(value.shape, module) + dtype + py2(fortran, module)
        state += py2(value.tobytes("A"), module) + b"t"
        make = (
            b"c"
            + module
            + b"\n_reconstruct\n(cnumpy\nndarray\n"
            + py2((0,), module)
            + py2(b"b", module)
            + b"tR"
        )
        return make + state + b"b"
    raise TypeError(value)


def py2_pickle(value: object, module: bytes = b"numpy.core.multiarray") -> bytes:
    return b"\x80\x02" + py2(value, module) + b"."


# --- a small CIFAR-10 -----------------------------------------------------------------------------

N = 4  # images a batch; the real ones have 10,000


def batch(seed: int) -> dict[bytes, object]:
    rng = np.random.default_rng(seed)
    return {
        b"batch_label": b"training batch 1 of 5",
        b"labels": rng.integers(0, 10, N).tolist(),
        b"data": rng.integers(0, 256, (N, 3072), np.uint8),
        b"filenames": [b"leptodactylus_pentadactylus_s_000004.png"] * N,
    }


ALL = {name: batch(seed) for seed, name in enumerate([*BATCHES["train"], *BATCHES["test"]])}


def write_archive(path: Path, blobs: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, blob in blobs.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(blob)
            archive.addfile(member, io.BytesIO(blob))
    return path


def write_folder(path: Path, blobs: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, blob in blobs.items():
        (path / name).write_bytes(blob)
    return path


@pytest.fixture(
    params=[b"numpy.core.multiarray", b"numpy._core.multiarray"], ids=["numpy.core", "numpy._core"]
)
def blobs(request) -> dict[str, bytes]:
    return {name: py2_pickle(content, request.param) for name, content in ALL.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(
        tmp_path_factory.mktemp("cifar") / FOLDER,
        {name: py2_pickle(content) for name, content in ALL.items()},
    )


# --- what must work -------------------------------------------------------------------------------


def test_the_test_pickler_writes_what_numpy_understands():
    """The stand-ins are judged by these files, so the files are first judged by NumPy itself."""
    want = ALL["test_batch"]
    got = pickle.loads(py2_pickle(want), encoding="bytes")
    np.testing.assert_array_equal(got.pop(b"data"), want[b"data"])
    assert got == {key: value for key, value in want.items() if key != b"data"}


@pytest.mark.parametrize("write", [write_archive, write_folder])
@pytest.mark.parametrize("order", [1, -1])
def test_both_splits_from_archive_and_folder(tmp_path, blobs, write, order):
    path = write(tmp_path / "cifar-10-python.tar.gz", dict(list(blobs.items())[::order]))
    for split, names in BATCHES.items():
        images, labels = read_cifar10(path, split)
        assert images.dtype == np.uint8 and images.shape == (N * len(names), 3, 32, 32)
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(
            images.reshape(-1, 3072), np.concatenate([ALL[n][b"data"] for n in names])
        )
        np.testing.assert_array_equal(labels, np.concatenate([ALL[n][b"labels"] for n in names]))


def test_rows_are_red_then_green_then_blue(tmp_path):
    red = np.zeros((1, 3, 32, 32), np.uint8)
    red[0, 0, 5, 7] = 200
    content = {b"data": red.reshape(1, 3072), b"labels": [6]}
    images, _ = read_cifar10(write_folder(tmp_path / FOLDER, {"test_batch": py2_pickle(content)}), "test")
    assert np.argwhere(images).tolist() == [[0, 0, 5, 7]]


def test_fortran_order_is_honoured(tmp_path):
    content = {**ALL["test_batch"], b"data": np.asfortranarray(ALL["test_batch"][b"data"])}
    images, _ = read_cifar10(write_folder(tmp_path / FOLDER, {"test_batch": py2_pickle(content)}), "test")
    np.testing.assert_array_equal(images.reshape(N, 3072), content[b"data"])


# --- what must not --------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "attack",
    [lambda p: Call(os.mkdir, p), lambda p: Call(eval, f"open({p!r}, 'w')"), lambda p: Call(np.save, p, 1)],
)
def test_no_function_is_called(tmp_path, attack, protocol):
    trace = tmp_path / "executed.npy"
    blob = pickle.dumps({b"data": attack(str(trace)), b"labels": []}, protocol)
    path = write_folder(tmp_path / FOLDER, {"test_batch": blob})
    with pytest.raises(DataError, match=r"asks for .*; allowed is a pickle with"):
        read_cifar10(path, "test")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        {b"labels": [1]},
        {b"data": np.zeros((1, 3072), np.uint8)},
        {b"data": [1, 2, 3], b"labels": [1]},
        {b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [True]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [b"1"]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": 1},
        {b"data": np.zeros((1, 3072), np.int8), b"labels": [1]},
        {b"data": np.zeros((1, 3072), np.float32), b"labels": [1]},
        [1, 2, 3],
        None,
    ],
)
def test_other_contents_are_refused(tmp_path, content):
    path = write_folder(tmp_path / FOLDER, {"test_batch": py2_pickle(content)})
    with pytest.raises(
        DataError, match=r"test_batch is no batch of CIFAR-10 .*allowed is .*fetch the archive again"
    ):
        read_cifar10(path, "test")


def test_the_real_files_kind_of_array_is_the_only_kind(tmp_path):
    """An object array would be filled by code of NumPy that no data set needs."""
    blob = pickle.dumps({b"data": np.array([None]), b"labels": []}, 2)
    with pytest.raises(DataError):
        read_cifar10(write_folder(tmp_path / FOLDER, {"test_batch": blob}), "test")


@given(data=st.data())
def test_damage_is_a_data_error_or_a_legal_batch(folder, data):
    """Any cut or flipped bit: nothing but a DataError escapes. (What stays legal, the checksum catches.)"""
    path = folder / "test_batch"
    intact = py2_pickle(ALL["test_batch"])
    if data.draw(st.booleans(), label="cut"):
        blob = bytearray(intact[: data.draw(st.integers(0, len(intact) - 1))])
    else:
        blob = bytearray(intact)
        start = intact.index(b"data")  # half of the flips before the 12 KB of pixels, in the interesting part
        at = data.draw(st.one_of(st.integers(0, start + 200), st.integers(0, len(blob) - 1)))
        blob[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(blob)
    try:
        images, labels = read_cifar10(folder, "test")
    except DataError:
        return
    finally:
        path.write_bytes(intact)
    assert images.shape == (len(labels), 3, 32, 32) and images.dtype == np.uint8


def test_missing_and_foreign_files(tmp_path, folder):
    with pytest.raises(
        DataError, match=r"nowhere cannot be read .*allowed is cifar-10-python.tar.gz or the folder"
    ):
        read_cifar10(tmp_path / "nowhere", "train")
    foreign = tmp_path / "foreign.tar.gz"
    foreign.write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match="cannot be read"):
        read_cifar10(foreign, "train")
    part = write_archive(tmp_path / "part.tar.gz", {"data_batch_1": b"", "data_batch_2": b""})
    with pytest.raises(DataError, match="lacks data_batch_3, data_batch_4, data_batch_5; needed for 'train'"):
        read_cifar10(part, "train")
    with pytest.raises(UnknownNameError, match="'valid'; allowed are train, test"):
        read_cifar10(folder, "valid")


def test_a_truncated_archive_is_noticed(tmp_path, blobs):
    whole = write_archive(tmp_path / "whole.tar.gz", blobs).read_bytes()
    for share in (0, 0.01, 0.3, 0.6, 0.9):
        path = tmp_path / "cut.tar.gz"
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError):
            read_cifar10(path, "train" if share < 0.8 else "test")


def test_links_in_an_archive_are_not_followed(tmp_path):
    path = tmp_path / "links.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(f"{FOLDER}/test_batch")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(member)
    with pytest.raises(DataError, match="lacks test_batch"):
        read_cifar10(path, "test")
