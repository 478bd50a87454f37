"""Checkpoints: what goes in comes out, and anything that is not what went in is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refquant import io
from refquant.errors import CheckpointError

DTYPES = ["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint64", "bool"]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Finite arrays of every dtype and byte order, 0-d, empty, transposed and reversed ones too."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES))).newbyteorder(draw(st.sampled_from("<>")))
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    shape = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    array = draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(dtype, **finite)))
    array = np.asarray(array)
    return array.T[::-1] if array.ndim and draw(st.booleans()) else array


tensor_dicts = st.dictionaries(st.text(max_size=8), arrays(), max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
keys = st.text().filter(lambda key: key not in (*io.RESERVED, "kind"))
metadatas = st.dictionaries(keys, json_values, max_size=4)


def tiny(path: Path, **metadata: object) -> Path:
    tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([-7, 7], dtype=np.int8)}
    io.save(path, tensors, {"kind": "unet", "steps": 3, **metadata})
    return path


def sealed(facts: dict[str, str], entries: dict[str, object], data: bytes = b"") -> bytes:
    """A file with right checksums around any header: the format, written a second time."""
    facts = {"format": "refquant", "format_version": "1", "kind": '"unet"', **facts}
    facts |= {"data_sha256": hashlib.sha256(data).hexdigest(), "header_sha256": "0" * 64}
    raw = json.dumps({"__metadata__": facts, **entries}, separators=(",", ":")).encode()
    raw = len(raw).to_bytes(8, "little") + raw
    return raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode()) + data


# --- what goes in comes out ---------------------------------------------------------------------------


@given(tensors=tensor_dicts, metadata=metadatas)
def test_round_trip_same_bits(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    io.save(path, tensors, {"kind": "any", **metadata})
    got = io.load(path, kind="any")
    assert list(got.tensors) == sorted(tensors)
    for name, want in tensors.items():
        have = got.tensors[name]
        assert have.dtype == want.dtype.newbyteorder("=") and have.shape == want.shape
        # by bytes: tells -0.0 from 0.0
        assert have.tobytes() == want.astype(want.dtype.newbyteorder("=")).tobytes()
        assert have.flags.writeable and have.flags.c_contiguous
    assert {key: got.metadata[key] for key in metadata} == metadata
    assert got.kind == "any" and got.path == path
    assert io.read_metadata(path) == got.metadata


@given(tensors=tensor_dicts, metadata=metadatas)
def test_equal_content_gives_equal_bytes(tmp_path_factory, tensors, metadata):
    a, b = (tmp_path_factory.getbasetemp() / f"{x}.safetensors" for x in "ab")
    io.save(a, tensors, {"kind": "k", **metadata})
    io.save(b, dict(reversed(tensors.items())), {**dict(reversed(metadata.items())), "kind": "k"})
    assert a.read_bytes() == b.read_bytes()


def test_loaded_content_can_be_saved_again(tmp_path):
    first = tiny(tmp_path / "a")
    got = io.load(first)
    io.save(tmp_path / "b", got.tensors, got.metadata)
    assert (tmp_path / "b").read_bytes() == first.read_bytes()


@given(tensors=tensor_dicts)
def test_any_safetensors_reader_opens_it(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "other.safetensors"
    io.save(path, tensors, {"kind": "k"})
    other = safetensors.numpy.load_file(path)
    assert sorted(other) == sorted(tensors)
    for name, want in tensors.items():
        np.testing.assert_array_equal(other[name], want)


def test_metadata_facts(tmp_path):
    facts = io.read_metadata(tiny(tmp_path / "m", multipliers=(1, 2, 4)))
    assert (facts["format"], facts["format_version"], facts["kind"]) == ("refquant", 1, "unet")
    assert facts["multipliers"] == [1, 2, 4] and facts["refquant_version"]
    assert len(facts["header_sha256"]) == 64


def test_arrays_start_aligned(tmp_path):
    path = tmp_path / "m"
    io.save(path, {"a": np.ones(3, np.uint8), "z": np.ones(3), "m": np.ones(1, np.float16)}, {"kind": "k"})
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for name, size in (("a", 1), ("m", 2), ("z", 8)):
        assert (start + header[name]["data_offsets"][0]) % size == 0


# --- damage -------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_seen(tmp_path):
    path = tiny(tmp_path / "m", note="é \u0000 ☃")
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            io.load(path)
        if bit // 8 < start:
            with pytest.raises(CheckpointError):
                io.read_metadata(path)


def test_every_truncation_and_any_appendix_is_seen(tmp_path):
    path = tiny(tmp_path / "m")
    good = path.read_bytes()
    for bad in [*(good[:length] for length in range(len(good))), good + b"\0", good + good]:
        path.write_bytes(bad)
        for read in (io.load, io.read_metadata):
            with pytest.raises(CheckpointError, match="m: is "):
                read(path)


@given(start=st.integers(0, 10**6), junk=st.binary(min_size=1, max_size=40))
def test_overwritten_bytes_are_seen(tmp_path_factory, start, junk):
    path = tiny(tmp_path_factory.getbasetemp() / "junk.safetensors")
    good = path.read_bytes()
    bad = bytearray(good)
    bad[start % len(good) : start % len(good) + len(junk)] = junk
    path.write_bytes(bad)
    if bytes(bad) != good:
        with pytest.raises(CheckpointError):
            io.load(path)


@given(st.binary(max_size=200))
def test_garbage_is_refused(tmp_path_factory, garbage):
    path = tmp_path_factory.getbasetemp() / "garbage"
    path.write_bytes(garbage)
    for read in (io.load, io.read_metadata):
        with pytest.raises(CheckpointError):
            read(path)


@pytest.mark.parametrize("header", ["[]", "3", '"x"', "null", "{}", '{"__metadata__":[]}', "[" * 9000,
                                    '{"__metadata__":{"format":"refquant","header_sha256":"\\ud800"}}',
                                    '{"__metadata__":{"format":["refquant"]}}', "1" * 5000])  # fmt: skip
def test_odd_headers_are_refused(tmp_path, header):
    path = tmp_path / "m"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(CheckpointError):
        io.load(path)


@pytest.mark.parametrize(
    ("entries", "data"),
    [
        ({"w": 3}, b""),
        ({"w": {"dtype": "F32", "shape": [1]}}, b""),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": []}}, b""),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]}}, b""),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 4]}}, b"\0" * 4),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        ({"w": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        ({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        ({"w": {"dtype": "U16", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
    ],
)
def test_forged_layouts_are_refused(tmp_path, entries, data):
    """The checksums are right, so only the layout can tell."""
    path = tmp_path / "m"
    path.write_bytes(sealed({}, entries, data))
    with pytest.raises(CheckpointError):
        io.load(path)


@pytest.mark.parametrize("facts", [{"kind": "3"}, {"kind": "unet"}, {"format_version": "one"}, {"note": "{"}])
def test_forged_metadata_is_refused(tmp_path, facts):
    (tmp_path / "m").write_bytes(sealed(facts, {}))
    with pytest.raises(CheckpointError, match="damaged"):
        io.load(tmp_path / "m")


def test_the_second_writer_is_right(tmp_path):
    """The forgeries above are refused for what they forge: with nothing forged the file loads."""
    (tmp_path / "m").write_bytes(
        sealed({}, {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4)
    )
    assert io.load(tmp_path / "m").tensors["w"] == 0


# --- files that are something else --------------------------------------------------------------------


def test_missing_folder_and_device(tmp_path):
    for read in (io.load, io.read_metadata):
        with pytest.raises(CheckpointError, match="no such file"):
            read(tmp_path / "nothing")
        with pytest.raises(CheckpointError, match="no such file"):
            read("x" * 5000)
        with pytest.raises(CheckpointError, match="not a file"):
            read(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="not a file"):
            io.load(tmp_path / "pipe")


def test_foreign_files_are_named(tmp_path):
    import pickle

    path = tmp_path / "m"
    np.savez(tmp_path / "z.npz", a=np.ones(9))
    np.save(tmp_path / "a.npy", np.ones(9))
    for content, what in [
        (pickle.dumps({"w": [1.0] * 99}), "a pickle"),
        ((tmp_path / "z.npz").read_bytes(), "a zip archive"),
        ((tmp_path / "a.npy").read_bytes(), "a NumPy .npy file"),
        (safetensors.numpy.save({"w": np.ones(3)}), "format mark None"),
        (safetensors.numpy.save({"w": np.ones(3)}, {"format": "pt"}), "format mark 'pt'"),
    ]:
        path.write_bytes(content)
        for read in (io.load, io.read_metadata):
            with pytest.raises(CheckpointError, match=what):
                read(path)


def test_newer_format_asks_for_an_upgrade(tmp_path):
    (tmp_path / "m").write_bytes(sealed({"format_version": "2"}, {}))
    for read in (io.load, io.read_metadata):
        with pytest.raises(CheckpointError, match="has format 2, this refquant reads 1. Upgrade"):
            read(tmp_path / "m")


def test_kind(tmp_path):
    path = tmp_path / "m"
    io.save(path, {}, {"kind": "train-state"})
    assert io.load(path).kind == io.load(path, kind="train-state").kind == "train-state"
    with pytest.raises(CheckpointError, match="kind 'train-state', wanted is 'unet'.*`refquant train`"):
        io.load(path, kind="unet")
    io.save(path, {}, {"kind": "something"})
    with pytest.raises(CheckpointError, match="`refquant info`"):
        io.load(path, kind="unet")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_not_finite_is_refused_on_both_ways(tmp_path, value, dtype):
    path = tiny(tmp_path / "m")
    old = path.read_bytes()
    weights = np.array([1, value, 2], dtype=dtype)
    with pytest.raises(CheckpointError, match="tensor 'mid.w' holds NaN or infinity in 1 of 3"):
        io.save(path, {"mid.w": weights}, {"kind": "unet"})
    assert path.read_bytes() == old
    entry = {"dtype": {2: "F16", 4: "F32", 8: "F64"}[weights.itemsize], "shape": [3]}
    entry["data_offsets"] = [0, weights.nbytes]
    path.write_bytes(sealed({}, {"mid.w": entry}, weights.tobytes()))
    with pytest.raises(CheckpointError, match="tensor 'mid.w' holds NaN or infinity in 1 of 3"):
        io.load(path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "what"),
    [
        ({"w": np.ones(2, complex)}, {}, "has dtype complex128"),
        ({"w": np.array(["a"])}, {}, "has dtype <U1"),
        ({"w": np.array([object()])}, {}, "has dtype object"),
        ({"w": np.ones(2, np.uint16)}, {}, "has dtype uint16"),
        ({"w": [1.0]}, {}, "is a list"),
        ({"w": np.float32(1)}, {}, "is a float32"),
        ({3: np.ones(2)}, {}, "cannot name a tensor"),
        ({"__metadata__": np.ones(2)}, {}, "cannot name a tensor"),
        ({"\ud800": np.ones(2)}, {}, "Unicode"),
        ({}, {"kind": None}, "no 'kind'"),
        ({}, {"loss": float("nan")}, "'loss' cannot be stored"),
        ({}, {"n": np.int64(3)}, "'n' cannot be stored"),
        ({}, {"a": {1, 2}}, "'a' cannot be stored"),
        ({}, {7: 1}, "7 cannot be stored"),
    ],
)
def test_what_cannot_be_stored(tmp_path, tensors, metadata, what):
    with pytest.raises(CheckpointError, match=what):
        io.save(tmp_path / "m", tensors, {"kind": "unet", **metadata})
    assert list(tmp_path.iterdir()) == []
