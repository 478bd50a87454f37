"""The loop over instruction sets, and the C core compiled by hand."""

import os
import shutil

import pytest
import vectors
from cbuild import Core, Library

from refquant import kernels


@pytest.fixture(params=kernels.available())
def isa(request):
    """Run the test on one kernel of this build; skip, visibly, one that this processor cannot run."""
    if request.param not in kernels.supported():
        pytest.skip(f"{request.param}: not this machine")
    with kernels.using(request.param):
        yield request.param


@pytest.fixture(scope="session")
def compiler():
    """A C compiler for this machine."""
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None or os.name != "posix":
        pytest.skip("no C compiler for a POSIX system")
    return found


@pytest.fixture(scope="session")
def core(tmp_path_factory, compiler):
    """The C core, to be linked with programs."""
    return Core(tmp_path_factory.mktemp("core"), compiler, "-O0")


@pytest.fixture(scope="session")
def library(tmp_path_factory, compiler):
    """The C core as a library to be opened with mistakes in it."""
    pytest.importorskip("cffi")
    return Library(tmp_path_factory.mktemp("library"), compiler)


@pytest.fixture(scope="session")
def corners(tmp_path_factory):
    """The vector set, a file for programs of `core`, and the number of its cases."""
    path = tmp_path_factory.mktemp("vectors") / "corners.bin"
    return path, vectors.write(path, [*vectors.cases(), *vectors.ties(), *vectors.sums_that_overflow_on_the_way()])
