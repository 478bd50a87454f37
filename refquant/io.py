"""Checkpoints: named arrays and what is known about them, in one safetensors file.

A file is what the safetensors format says, so any safetensors reader opens it::

    8 bytes   n, the length of the header, little endian
    n bytes   JSON: {"__metadata__": {key: string}, tensor name: {dtype, shape, data_offsets}, ...}
    the rest  the arrays, C order, little endian, back to back

Two SHA-256 sums in the metadata make damage visible. ``data_sha256`` covers the arrays, and
``header_sha256`` covers the first 8 + n bytes, in which its own 64 digits count as zeros. The header holds
``data_sha256``, so ``header_sha256`` vouches for every bit of the file and serves as its name in a log.
It is the one thing that no later format version may change: a reader must be able to tell a damaged file
from a newer one.

Shapes: any, including () and arrays without elements.
Dtypes: float16, float32, float64, int8, int32, int64, uint8, uint64, bool.
Errors: `CheckpointError`, for all that can be wrong with a file or with what is to be saved.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from ._version import __version__
from .errors import CheckpointError, RefquantError

FORMAT_VERSION = 1

#: Metadata keys that describe the file and not its content; `save` writes them itself.
RESERVED = ("format", "format_version", "refquant_version", "data_sha256", "header_sha256")

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "uint64": "U64",
           "int32": "I32", "uint8": "U8", "int8": "I8", "bool": "BOOL"}  # fmt: skip
_READ_BY = {"unet": "refquant sample", "dit": "refquant sample", "classifier": "refquant evaluate",
            "quantized": "refquant sample", "train-state": "refquant train",
            "quantize-state": "refquant quantize"}  # fmt: skip
_MAGIC = {b"PK\x03\x04": "a zip archive (.npz or PyTorch)", b"\x80": "a pickle",
          b"\x93NUMPY": "a NumPy .npy file", b"GGUF": "a GGUF file", b"\x89PNG": "a PNG picture"}  # fmt: skip
_REMEDY = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free some space or choose another folder."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Choose a folder that you may write to."),
    errno.ENOENT: "Make the folder first.",
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What `load` returns.

    Attributes
    ----------
    path : Path
        The file it was read from.
    kind : str
        What the content is, e.g. "unet", "classifier", "quantized", "train-state".
    tensors : dict of str to ndarray
        The arrays, writable, sorted by name.
    metadata : dict of str to object
        What `save` was given, and the keys of `RESERVED`.
    """

    path: Path
    kind: str
    tensors: dict[str, NDArray[Any]]
    metadata: dict[str, Any]


def save(path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint: the whole of it, or nothing.

    Equal content gives equal bytes. A reader sees the old file or the new one, never a part of either,
    also when two processes save at once (the last one wins) or when one is killed.

    Parameters
    ----------
    path : path
        The file; one that exists is replaced.
    tensors : mapping of str to ndarray
        Arrays of the dtypes listed above, of any shape, without NaN and infinity.
    metadata : mapping of str to object
        Values that JSON can hold (tuples come back as lists, keys of nested dicts as strings).
        "kind" must be there and be a string. Keys of `RESERVED` are ignored, so the metadata of a
        loaded checkpoint can be given back.

    Raises
    ------
    CheckpointError
        The content cannot be stored or the file cannot be written. A file that was at `path` is unchanged.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/tiny.safetensors", {"w": np.eye(2)}, {"kind": "unet", "steps": 3})
    ...     tiny = load(folder + "/tiny.safetensors", kind="unet")
    >>> tiny.tensors["w"].tolist(), tiny.metadata["steps"]
    ([[1.0, 0.0], [0.0, 1.0]], 3)
    """
    for name, array in tensors.items():
        _check_storable(path, name, array)
    facts = {key: _encode(path, key, value) for key, value in metadata.items() if key not in RESERVED}
    if not isinstance(metadata.get("kind"), str):
        raise CheckpointError(f"{path}: metadata has no 'kind'. Add one, such as 'unet' or 'train-state'.")

    # Wide dtypes first: every array then starts at a multiple of its item size, so readers may map the file.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    chunks, entries, end, digest = [], {}, 0, hashlib.sha256()
    for name in order:
        array = np.asarray(tensors[name], order="C", dtype=tensors[name].dtype.newbyteorder("<"))
        chunk = array.reshape(-1).view(np.uint8).data  # its bytes, not copied
        digest.update(chunk)
        entries[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape,
                         "data_offsets": [end, end + array.nbytes]}  # fmt: skip
        chunks.append(chunk)
        end += array.nbytes
    facts |= {"format": "refquant", "format_version": str(FORMAT_VERSION), "refquant_version": __version__,
              "data_sha256": digest.hexdigest(), "header_sha256": "0" * 64}  # fmt: skip
    write_atomically(path, [_seal(path, facts, entries), *chunks], error=CheckpointError)


def load(path: str | os.PathLike[str], *, kind: str | None = None) -> Checkpoint:
    """Read a checkpoint and check every bit of it.

    Parameters
    ----------
    path : path
        A file that `save` wrote.
    kind : str, optional
        The kind that the caller can use; any other is an error. None accepts all.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        The file is missing, foreign, truncated, damaged, of a newer format, of another kind, or holds
        NaN or infinity.
    """
    with _open(path) as file:
        metadata, start = _read_header(file, path)
        if kind is not None and metadata["kind"] != kind:
            reader = _READ_BY.get(metadata["kind"], "refquant info")
            raise CheckpointError(
                f"{path}: is a checkpoint of kind '{metadata['kind']}', wanted is '{kind}'. "
                f"Give one of kind '{kind}'; this one is for `{reader}`."
            )
        file.seek(0)
        content = file.read()
    if hashlib.sha256(memoryview(content)[start:]).hexdigest() != metadata["data_sha256"]:
        raise _damaged(path, "its arrays do not match their checksum")
    try:
        tensors = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError) as problem:
        # The checksums are right and the layout is not: written by something else than `save`.
        raise _damaged(path, str(problem)) from problem
    for name, array in tensors.items():
        _check_storable(path, name, array)
    return Checkpoint(Path(path), metadata["kind"], dict(sorted(tensors.items())), metadata)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what is known about a checkpoint without reading its arrays.

    Format, version, header checksum and file length are checked as by `load`; the arrays are not.

    Parameters
    ----------
    path : path
        A file that `save` wrote.

    Returns
    -------
    dict
        Of plain JSON values, "kind" among them.

    Raises
    ------
    CheckpointError
        The file is missing, foreign, truncated, of a newer format, or its header is damaged.
    """
    with _open(path) as file:
        return _read_header(file, path)[0]


def write_atomically(
    path: str | os.PathLike[str],
    chunks: Iterable[bytes | memoryview],
    *,
    error: type[RefquantError] = RefquantError,
) -> None:
    """Write `chunks` one after another as the new content of `path`, or leave everything as it was.

    The bytes go to a temporary file of a unique name in the same folder (a rename is atomic only within
    one file system), are forced to the disk, and take the name `path` at the end.

    Parameters
    ----------
    path : path
    chunks : iterable of bytes
    error : type
        What is raised if the file cannot be written.

    Raises
    ------
    RefquantError
        Or the given `error`: the file could not be written. The temporary file is gone.
    """
    target = Path(path)
    temporary = target.parent / f".refquant-{uuid.uuid4().hex}.tmp"
    try:
        try:
            with open(temporary, "xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:  # Ctrl-C must not leave the temporary file either
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as problem:
        remedy = _REMEDY.get(problem.errno or 0, "Choose another file name.")
        raise error(
            f"{target}: not written, {problem.strerror or problem}. {remedy} What was there before is unchanged."
        ) from problem


def _check_storable(path: object, name: str, array: NDArray[Any]) -> None:
    """Refuse what could not be read back, with the tensor's name."""
    if not isinstance(name, str) or name == "__metadata__":
        raise CheckpointError(f"{path}: {name!r} cannot name a tensor. Use any string but '__metadata__'.")
    if not isinstance(array, np.ndarray) or array.dtype.name not in _DTYPES:
        what = f"has dtype {array.dtype}" if isinstance(array, np.ndarray) else f"is a {type(array).__name__}"
        raise CheckpointError(
            f"{path}: tensor '{name}' {what}; allowed are NumPy arrays of {', '.join(_DTYPES)}. Convert it first."
        )
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise CheckpointError(
            f"{path}: tensor '{name}' holds NaN or infinity in {bad} of {array.size} places; only finite "
            "numbers are allowed. Go back to an earlier checkpoint, or train with a smaller learning rate."
        )


def _encode(path: object, key: object, value: object) -> str:
    try:
        if not isinstance(key, str):
            raise TypeError(f"a key must be a string, not {type(key).__name__}")
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as problem:
        raise CheckpointError(
            f"{path}: metadata {key!r} cannot be stored: {problem}. Use finite numbers, strings, bools, "
            "None, and lists and dicts of these."
        ) from problem


def _seal(path: object, facts: dict[str, str], entries: dict[str, Any]) -> bytes:
    """Length and header, with the checksum of both put in its place."""
    header = {"__metadata__": dict(sorted(facts.items())), **entries}
    try:
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as problem:
        raise CheckpointError(f"{path}: a name is no valid Unicode: {problem}. Rename it.") from problem
    raw += b" " * (-len(raw) % 8)  # the arrays start aligned
    raw = len(raw).to_bytes(8, "little") + raw
    return raw.replace(_sum_field("0" * 64), _sum_field(hashlib.sha256(raw).hexdigest()), 1)


def _sum_field(digits: str) -> bytes:
    # Inside a JSON string its quotes would be escaped, so this occurs once in a header.
    return f'"header_sha256":"{digits}"'.encode("utf-8", "replace")


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file. Check the path, or make a checkpoint with `refquant train`.")
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise CheckpointError(f"{path}: is a folder or a device, not a file. Give a .safetensors file.")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as problem:
        raise CheckpointError(f"{path}: cannot be read, {problem.strerror}. Check its permissions.") from problem


def _damaged(path: object, how: str) -> CheckpointError:
    return CheckpointError(f"{path}: is damaged, {how}. Copy or download it again, or make it anew.")


def _foreign(path: object, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: is {what}; only safetensors files written by refquant can be read. "
        "Make one with `refquant train` or name a shipped model."
    )


def _read_header(file: BinaryIO, path: object) -> tuple[dict[str, Any], int]:
    """Metadata of the open file, and where its arrays begin; everything but the arrays is checked."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if length > size - 8:
        start = prefix + file.read(1)
        for magic, what in _MAGIC.items():
            if start.startswith(magic):
                raise _foreign(path, what)
        if size < 9 or start.endswith(b"{"):
            raise _damaged(path, f"it ends after {size} bytes, within its header")
        raise _foreign(path, "no safetensors file")
    raw = prefix + file.read(length)
    try:
        header = json.loads(raw[8:].decode("utf-8"))
        facts = header.pop("__metadata__", {})
        mark, digits = facts.get("format"), facts.get("header_sha256")
    except (ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise _foreign(path, "no safetensors file, or one with a damaged header") from problem
    if mark != "refquant":
        raise _foreign(path, f"a safetensors file with the format mark {mark!r}, not 'refquant'")
    blank = raw.replace(_sum_field(str(digits)), _sum_field("0" * 64), 1)
    if hashlib.sha256(blank).hexdigest() != digits:
        raise _damaged(path, "its header does not match its checksum")
    try:
        version = int(facts["format_version"])
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: has format {version}, this refquant reads {FORMAT_VERSION}. Upgrade: pip install -U refquant"
            )
        metadata = {key: text if key in RESERVED else json.loads(text) for key, text in facts.items()}
        metadata["format_version"] = version
        end = len(raw) + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        valid = isinstance(metadata["kind"], str) and "data_sha256" in metadata
    except (ValueError, TypeError, KeyError, IndexError) as problem:
        raise _damaged(path, f"its header lacks something ({problem!r})") from problem
    if not valid:
        raise _damaged(path, "its header lacks its kind or the checksum of its arrays")
    if size != end:
        raise _damaged(path, f"it has {size} bytes where its header announces {end}")
    return metadata, len(raw)
