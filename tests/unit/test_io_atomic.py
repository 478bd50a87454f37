"""A save writes the whole file or changes nothing: full disks, kills, Ctrl-C, and several writers."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from refquant import io
from refquant.errors import CheckpointError, RefquantError

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and resource limits")


def tiny(path: Path, steps: int = 3) -> Path:
    io.save(path, {"w": np.arange(6.0).reshape(2, 3)}, {"kind": "unet", "steps": steps})
    return path


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Free some space"), (errno.EACCES, "may write"), (errno.EIO, "another")],
)
def test_failure_keeps_the_old_file(tmp_path, monkeypatch, function, number, remedy):
    path = tiny(tmp_path / "m")
    old = path.read_bytes()

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(CheckpointError, match=remedy) as caught:
        tiny(path, steps=4)
    assert os.strerror(number) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == old and leftovers(tmp_path) == []


def test_ctrl_c_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path, remedy in [
        (tmp_path / "no" / "folder", "Make the folder first"),
        (tmp_path, "Choose another file name"),
        (tmp_path / "file" / "m", "Choose another file name"),
    ]:
        with pytest.raises(CheckpointError, match=remedy):
            tiny(path)
    assert leftovers(tmp_path) == [] and leftovers(tmp_path.parent) == []


def test_other_writers_get_their_own_error(tmp_path):
    with pytest.raises(RefquantError, match="Make the folder first") as caught:
        io.write_atomically(tmp_path / "no" / "folder", [b"x"])
    assert type(caught.value) is RefquantError


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    root = Path(io.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", "import sys, os, numpy as np\nfrom refquant import io\n" + code]
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@posix
def test_full_disk(tmp_path):
    """A real one, as far as the process can tell: the kernel refuses bytes beyond 64 KiB."""
    path = tiny(tmp_path / "m")
    old = path.read_bytes()
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try: io.save(sys.argv[1], {'w': np.ones(10**6)}, {'kind': 'unet'})\n"
        "except io.CheckpointError as e: print(e)\n"
    )
    out, err = run(code, path).communicate(timeout=60)
    assert "Free some space" in out and err == ""
    assert path.read_bytes() == old and leftovers(tmp_path) == []


@posix
def test_kill_during_save_keeps_the_old_file(tmp_path):
    path = tiny(tmp_path / "m")
    old = path.read_bytes()
    code = (
        "import time\n"
        "os.fsync = lambda _: (print('written', flush=True), time.sleep(60))\n"
        "io.save(sys.argv[1], {'w': np.ones(10**5)}, {'kind': 'unet'})\n"
    )
    with run(code, path) as child:
        assert child.stdout.readline() == "written\n"
        child.send_signal(signal.SIGKILL)
    assert path.read_bytes() == old
    tiny(path, steps=5)  # what the killed process left behind is in nobody's way
    assert io.load(path).metadata["steps"] == 5


def test_two_processes_save_and_readers_see_whole_files(tmp_path):
    path = tiny(tmp_path / "m")
    code = (
        "for i in range(40):\n"
        "    io.save(sys.argv[1], {'w': np.full(20000, i, np.float32)}, {'kind': 'unet', 'i': i})\n"
    )
    children = [run(code, path) for _ in range(2)]
    deadline = time.monotonic() + 60
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        got = io.load(path)
        assert "i" not in got.metadata or (got.tensors["w"] == got.metadata["i"]).all()
    for child in children:
        assert child.communicate(timeout=60) == ("", "") and child.returncode == 0
    assert io.load(path).metadata["i"] == 39 and leftovers(tmp_path) == []
