"""Choosing a kernel: the default, by name, by block, by environment; and every refusal."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refquant import kernels
from refquant.errors import UnsupportedISA
from refquant.kernels import _dispatch, _ext

A = np.array([[255, 1, 0]], dtype=np.uint8)
B = np.array([[-128, 2, 3]], dtype=np.int8)


@pytest.fixture
def undecided(monkeypatch):
    """No kernel chosen yet, as after import, and no REFQUANT_ISA."""
    monkeypatch.setattr(_dispatch, "_active", None)
    monkeypatch.delenv("REFQUANT_ISA", raising=False)
    return monkeypatch


@pytest.fixture
def without_extension(undecided):
    """Make this process look as if nothing had been compiled."""
    undecided.setattr(_dispatch, "lib", None)
    undecided.setattr(_dispatch, "ROWS", {})
    return undecided


@pytest.fixture
def unusable_avx2(undecided):
    """Pretend that a kernel `avx2` is compiled in and that this processor lacks what it needs."""

    class Table:
        @staticmethod
        def rq_cpu_features():
            return 0

        @staticmethod
        def rq_kernel_needs(row):
            return {0: 0, 1: 1}[row]

    undecided.setattr(_dispatch, "lib", Table)
    undecided.setattr(_dispatch, "ROWS", {"scalar": 0, "avx2": 1})


def test_ref_is_always_first_and_supported_is_a_part_of_available():
    assert kernels.available()[0] == kernels.supported()[0] == "ref"
    assert [name for name in kernels.available() if name in kernels.supported()] == list(kernels.supported())


@pytest.mark.skipif(os.environ.get("REFQUANT_REQUIRE_EXT", "") in ("", "0"), reason="extension not required")
def test_the_extension_is_there_where_it_is_required():
    assert "scalar" in kernels.supported()


def test_default_is_the_fastest_supported(undecided):
    assert kernels.active() == kernels.supported()[-1]


def test_environment_chooses(undecided):
    undecided.setenv("REFQUANT_ISA", "ref")
    assert kernels.active() == "ref"


def test_environment_is_obeyed_or_refused(undecided):
    undecided.setenv("REFQUANT_ISA", "AVX2")  # names are exact
    with pytest.raises(UnsupportedISA, match=r"'AVX2' \(REFQUANT_ISA\).*Usable here: ref"):
        kernels.gemm(A, B)


def test_use_stays_and_an_unknown_name_changes_nothing(undecided):
    kernels.use("ref")
    with pytest.raises(UnsupportedISA, match="'sse9'.*Usable here: ref"):
        kernels.use("sse9")
    assert kernels.active() == "ref"


def test_using_restores_also_after_an_error(undecided):
    before = kernels.active()
    with pytest.raises(ZeroDivisionError), kernels.using("ref"):
        assert kernels.active() == "ref"
        raise ZeroDivisionError
    assert kernels.active() == before


def test_using_leaves_an_open_choice_open(undecided):
    with kernels.using("ref"):
        pass
    undecided.setenv("REFQUANT_ISA", "ref")
    assert kernels.active() == "ref"  # the environment is still asked


def test_compiled_but_not_for_this_processor(unusable_avx2):
    assert kernels.available() == ("ref", "scalar", "avx2")
    assert kernels.supported() == ("ref", "scalar")
    with pytest.raises(UnsupportedISA, match="'avx2' is compiled in but this CPU cannot run it"):
        kernels.use("avx2")


def test_everything_works_without_the_extension(without_extension):
    assert kernels.available() == kernels.supported() == ("ref",)
    assert kernels.build_info()["compiled"] is False
    np.testing.assert_array_equal(kernels.gemm(A, B), [[-32638]])
    with pytest.raises(UnsupportedISA, match="'scalar': no kernel is compiled in; install a C compiler"):
        kernels.use("scalar")


def test_a_stale_module_is_refused(tmp_path):
    """A compiled module with another interface number stops the import with the remedy."""
    code = (
        "import sys, types\n"
        "core = types.ModuleType('refquant.kernels._core')\n"
        "core.ffi, core.lib = None, types.SimpleNamespace(rq_abi_version=lambda: 0)\n"
        "sys.modules[core.__name__] = core\n"
        "import refquant.kernels\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_root())
    assert run.returncode == 1
    assert "has interface 0, this refquant needs" in run.stderr and "python build_ext.py" in run.stderr


def _root():
    return Path(kernels.__file__).parents[2]


needs_extension = pytest.mark.skipif(_ext.lib is None, reason="the C core is not compiled")


@needs_extension
def test_build_info():
    info = kernels.build_info()
    assert info["compiled"] is True
    assert info["abi_version"] == _ext.lib.RQ_ABI_VERSION == _ext.ABI_VERSION
    assert info["compiler"] and "march" not in info["flags"]


@needs_extension
def test_table_refuses_rows_it_does_not_have():
    for row in (-1, _ext.lib.rq_kernel_count()):
        assert _ext.lib.rq_kernel_name(row) == _ext.ffi.NULL
        assert _ext.lib.rq_kernel_needs(row) == 2**32 - 1


@needs_extension
@pytest.mark.skipif(platform.system() != "Linux", reason="compares with /proc/cpuinfo")
def test_cpu_features_are_those_of_the_operating_system():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = {
        "avx2": "avx2" in flags,
        "avxvnni": "avx_vnni" in flags,
        "avx512vnni": flags >= {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"},
        "neondot": "asimddp" in flags,
    }
    assert set(kernels.build_info()["cpu_features"]) == {name for name, there in expected.items() if there}
