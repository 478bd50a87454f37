"""Fetching: where it looks, what it trusts, and what it says when there is nothing.

No test asks the internet: the mirrors are replaced by folders (file://) and by a server on this machine.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import os
import socket
import stat
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refquant import data
from refquant.data import sources
from refquant.data.sources import Checksum, Item, Source, fetch
from refquant.errors import DataError, UnknownNameError


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


# A data set of three images and three labels a split, in MNIST's own file names.
RNG = np.random.default_rng(0)
FILES = {
    f"{part}-{kind}-ubyte": idx_bytes(
        RNG.integers(0, 10, (3, 4, 4) if kind.startswith("images") else 3, np.uint8)
    )
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
}
FIRST = "train-images-idx3-ubyte"


def put(folder: Path, packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in FILES.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(blob) if packed else blob)
    return folder


def small_mnist(*mirrors: str) -> Source:
    items = tuple(sources._mnist(name.removesuffix("-ubyte"), sha256(blob)) for name, blob in FILES.items())
    return Source(mirrors, items)


@pytest.fixture
def mirror(tmp_path) -> Path:
    return put(tmp_path / "mirror")


@pytest.fixture
def mnist(monkeypatch, mirror):
    """Call with mirror URLs to make them those of "mnist"; without, it is the good one."""
    monkeypatch.delenv("REFQUANT_DATA", raising=False)

    def use(*mirrors: str) -> None:
        monkeypatch.setitem(sources.SOURCES, "mnist", small_mnist(*(mirrors or [mirror.as_uri() + "/"])))

    use()
    return use


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- finding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("below", ["mnist", "."])
def test_files_are_found_in_both_places_and_forms(mnist, root, below, packed):
    put(root / below, packed)
    for split in ("train", "test"):
        loaded = data.load("mnist", split, root=root, download=False)
        assert loaded.images.shape == (3, 1, 4, 4)
        part = {"train": "train", "test": "t10k"}[split]
        assert idx_bytes(loaded.images[:, 0]) == FILES[f"{part}-images-idx3-ubyte"]
        assert idx_bytes(loaded.labels.astype(np.uint8)) == FILES[f"{part}-labels-idx1-ubyte"]


def test_the_variable_is_the_root_and_an_argument_wins(mnist, root, tmp_path, monkeypatch):
    other = put(tmp_path / "other")
    put(root / "mnist")
    monkeypatch.setenv("REFQUANT_DATA", str(root))
    assert {p.parent for p in fetch("mnist", download=False).values()} == {root / "mnist"}
    assert {p.parent for p in fetch("mnist", other, download=False).values()} == {other}


def test_the_variable_is_the_only_root(mnist, root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put(tmp_path / "cache" / "refquant" / "mnist")
    monkeypatch.setattr(sys, "platform", "linux")
    assert len(fetch("mnist", download=False)) == 4
    monkeypatch.setenv("REFQUANT_DATA", str(root))
    with pytest.raises(DataError):
        fetch("mnist", download=False)


def test_a_read_only_root_works(mnist, root, monkeypatch):
    put(root / "mnist")
    folders = [root / "mnist", root]
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    # An administrator may write in spite of these bits, so writing itself is forbidden too.
    monkeypatch.setattr(sources, "_download", lambda *_: pytest.fail("asked to write"))
    try:
        assert len(data.load("mnist", root=root)) == 3
    finally:
        for folder in folders[::-1]:
            folder.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, ".cache/refquant"),
        ("linux", {"XDG_CACHE_HOME": "{home}/xdg"}, "xdg/refquant"),
        ("linux", {"XDG_CACHE_HOME": "relative/is/ignored"}, ".cache/refquant"),
        ("darwin", {"XDG_CACHE_HOME": "{home}/xdg"}, "Library/Caches/refquant"),
        ("win32", {"LOCALAPPDATA": "{home}/Local"}, "Local/refquant"),
        ("win32", {}, "AppData/Local/refquant"),
    ],
)
def test_cache_folder_follows_the_platform(tmp_path, monkeypatch, platform, variables, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    assert sources.cache_folder() == tmp_path / expected


def test_without_a_home_the_remedy_is_the_variable(mnist, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(DataError, match=r"no cache folder .*set REFQUANT_DATA"):
        fetch("mnist")


def test_an_extracted_folder_stands_in_for_its_archive(root, monkeypatch):
    md5 = {name: Checksum("md5", hashlib.md5(name.encode()).hexdigest()) for name in ("one", "two")}
    item = Item({"archive.tar.gz": {".": Checksum("sha256", "0" * 64)}, "folder": md5})
    monkeypatch.setitem(sources.SOURCES, "cifar10", Source((), (item,)))
    (root / "folder").mkdir()
    (root / "folder" / "one").write_text("one")
    with pytest.raises(DataError, match="two: no such file"):
        fetch("cifar10", root)
    (root / "folder" / "two").write_text("two")
    assert fetch("cifar10", root) == {"archive.tar.gz": root / "folder"}


# --- downloading ----------------------------------------------------------------------------------


def test_download_then_cache(mnist, root, mirror):
    found = fetch("mnist", root)
    assert sorted(found) == everything_below(mirror)
    assert everything_below(root) == [f"mnist/{name}" for name in sorted(found)]  # and no temporary file
    for path in mirror.iterdir():
        path.unlink()
    assert fetch("mnist", root) == found


def test_download_over_http_from_the_second_mirror(mnist, root, mirror):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(mirror.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/"
        mnist(base + "gone/", base + "mirror/")
        assert len(data.load("mnist", "test", root=root)) == 3
        server.shutdown()


def test_a_connection_that_breaks_off_leaves_nothing(mnist, root):
    class Breaks(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(gzip.compress(FILES[FIRST])[:20])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaks) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mnist(f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(DataError, match=r"127\.0\.0\.1"):
            fetch("mnist", root)
        server.shutdown()
    assert everything_below(root) == []


def test_a_mirror_with_other_bytes_is_passed_over(mnist, root, mirror, tmp_path):
    bad = put(tmp_path / "bad")
    (bad / f"{FIRST}.gz").write_bytes(gzip.compress(FILES[FIRST][:-1] + b"\xff"))
    mnist(bad.as_uri() + "/", mirror.as_uri() + "/")
    found = fetch("mnist", root)
    assert gzip.decompress(found[f"{FIRST}.gz"].read_bytes()) == FILES[FIRST]
    mnist(bad.as_uri() + "/")
    found[f"{FIRST}.gz"].unlink()
    with pytest.raises(DataError, match="wrong sha256"):
        fetch("mnist", root)
    assert f"mnist/{FIRST}.gz" not in everything_below(root)


def test_an_interrupt_leaves_no_temporary_file(mnist, root, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources.shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("mnist", root)
    assert everything_below(root) == []


def test_offline_is_one_error_that_lists_what_was_tried(mnist, root, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", offline)
    mnist("http://one.invalid/", "http://two.invalid/")
    with pytest.raises(DataError) as caught:
        fetch("mnist", root)
    message = str(caught.value)
    for part in (
        f"lacks {FIRST}.gz",
        str(root / "mnist" / f"{FIRST}.gz") + ": no such file",
        str(root / FIRST) + ": no such file",
        f"http://one.invalid/{FIRST}.gz: <urlopen error Network is unreachable>",
        f"http://two.invalid/{FIRST}.gz",
        f"put {FIRST}.gz into {root / 'mnist'}",
        "set REFQUANT_DATA",
    ):
        assert part in message
    assert "\n" not in message and everything_below(root) == []


def test_download_false_asks_no_mirror(mnist, root, monkeypatch):
    monkeypatch.setattr(sources.urllib.request, "urlopen", lambda *_a, **_k: pytest.fail("asked a mirror"))
    with pytest.raises(DataError, match="or allow the download"):
        fetch("mnist", root, download=False)
    assert list(root.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_before_any_download(mnist, root, monkeypatch):
    (root / "mnist").write_text("a file where the folder should be")
    monkeypatch.setattr(sources.urllib.request, "urlopen", lambda *_a, **_k: pytest.fail("asked a mirror"))
    with pytest.raises(DataError, match=r"mnist: cannot be written .*set REFQUANT_DATA"):
        fetch("mnist", root)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without space")
def test_a_full_disk_is_a_data_error(mnist, root, monkeypatch):
    def copy_to_full_disk(response, _file, _block):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(response.read())

    monkeypatch.setattr(sources.shutil, "copyfileobj", copy_to_full_disk)
    with pytest.raises(DataError, match="No space left"):
        fetch("mnist", root)
    assert everything_below(root) == []


# --- damage ---------------------------------------------------------------------------------------


def test_a_damaged_file_is_neither_used_nor_overwritten(mnist, root):
    target = put(root / "mnist") / f"{FIRST}.gz"
    target.write_bytes(b"precious")
    with pytest.raises(DataError, match=r"cannot be read .*delete .* to have it fetched again"):
        fetch("mnist", root)
    assert target.read_bytes() == b"precious"
    target.unlink()
    assert len(fetch("mnist", root)) == 4


def test_files_of_another_data_set_in_the_root_are_passed_over(mnist, root):
    """MNIST and Fashion-MNIST share their file names; only the checksum tells them apart."""
    for name in FILES:
        (root / f"{name}.gz").write_bytes(gzip.compress(b"fashion"))
    assert {path.parent for path in fetch("mnist", root).values()} == {root / "mnist"}


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    return put(tmp_path_factory.mktemp("intact") / "mnist", packed=False).parent


@given(data=st.data())
def test_any_flipped_bit_or_cut_of_a_file_is_caught(intact, data):
    name = data.draw(st.sampled_from(sorted(FILES)))
    path, blob = intact / "mnist" / name, bytearray(FILES[name])
    if data.draw(st.booleans(), label="cut"):
        del blob[data.draw(st.integers(0, len(blob) - 1)) :]
    else:
        blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(blob)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "mnist", small_mnist())
        try:
            with pytest.raises(DataError, match="wrong sha256"):
                fetch("mnist", intact, download=False)
        finally:
            path.write_bytes(FILES[name])
        assert len(fetch("mnist", intact, download=False)) == 4


# --- bad requests, and the table itself -----------------------------------------------------------


def test_unknown_names_and_missing_roots(mnist, tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="'imagenet'; allowed are mnist, fashion-mnist, cifar10"):
        fetch("imagenet")
    missing = tmp_path / "missing"
    with pytest.raises(DataError, match=r"root is .*missing.*create it"):
        fetch("mnist", missing)
    monkeypatch.setenv("REFQUANT_DATA", str(missing))
    with pytest.raises(DataError, match=r"REFQUANT_DATA is .*missing.*create it or correct REFQUANT_DATA"):
        fetch("mnist")
    assert not missing.exists()


def test_an_empty_variable_is_an_unset_one(mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("REFQUANT_DATA", "")
    monkeypatch.setattr(sources, "cache_folder", lambda: tmp_path / "cache")
    assert {path.parent for path in fetch("mnist").values()} == {tmp_path / "cache" / "mnist"}


def test_every_data_set_has_mirrors_and_well_formed_checksums():
    for source in sources.SOURCES.values():
        assert len(source.mirrors) >= 2
        assert all(url.startswith(("https://", "http://")) and url.endswith("/") for url in source.mirrors)
        for item in source.items:
            checksums = [checksum for form in item.forms.values() for checksum in form.values()]
            assert list(item.forms[item.download]) == ["."]
            for checksum in checksums:
                assert len(bytes.fromhex(checksum.digest)) == hashlib.new(checksum.algorithm).digest_size
