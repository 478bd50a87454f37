"""The neondot kernel on an emulated AArch64: cross-compiled, and run on vectors that the NumPy reference has made.

The C driver, cross/vectors.c, is also compiled for the machine at hand: it is tested wherever there is a C compiler.
"""

import os
import shutil
import signal
import subprocess

import pytest
import vectors
from cbuild import Core
from vectors import DRIVER

PACKAGES = "gcc-aarch64-linux-gnu qemu-user-static libc6-dev-arm64-cross"


@pytest.fixture(scope="module")
def corners(tmp_path_factory):
    """The file of cases, and their number."""
    path = tmp_path_factory.mktemp("vectors") / "corners.bin"
    return path, vectors.write(path, vectors.cases())


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory):
    """The core for AArch64, on an emulator."""
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not (compiler and emulator and links(compiler)):
        pytest.skip(f"no AArch64 compiler, C library or emulator: apt-get install {PACKAGES}")
    return Core(tmp_path_factory.mktemp("aarch64"), compiler, "-static", emulator=(emulator,))


def links(compiler):
    """Tell whether the compiler has a C library to link with."""
    command = [compiler, "-static", "-x", "c", "-", "-o", os.devnull]
    return subprocess.run(command, input="int main(void) { return 0; }", text=True, capture_output=True).returncode == 0


# ------------------------------------------------------------------ tests


def test_the_driver_at_home(core, corners):
    path, count = corners
    done = core.program(DRIVER)(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"checked {count} cases on scalar")


def test_the_driver_names_a_difference(core, corners, tmp_path):
    """A wrong bit in the last expected sum: 65793 * 255 * 7, row 2, output 8."""
    path, count = corners
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    (tmp_path / "wrong.bin").write_bytes(content)
    done = core.program(DRIVER)(tmp_path / "wrong.bin")
    assert done.returncode == 1
    assert done.stdout == (
        f"scalar: case {count - 1}, element {2 * 12 + 8}, rows of 9 + 3: got 117440505, want 117440504\n"
    )


def test_the_driver_guards_the_result(core, corners):
    """A kernel that stores one output too many has written between the rows."""
    done = core.program(DRIVER, core.mutate("gemm_scalar.c", ("j < t->columns", "j <= t->columns")))(corners[0])
    assert (done.returncode, done.stdout[:8]) == (1, "scalar: "), done.stdout + done.stderr


def test_neondot(aarch64, corners):
    path, count = corners
    done = aarch64.program(DRIVER)(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"checked {count} cases on scalar neondot\n"


def test_a_processor_without_the_instruction(aarch64, corners):
    """The Cortex-A53 has no sdot: the table says so, and nothing stops."""
    path, count = corners
    done = aarch64.program(DRIVER)(path, emulator_options=("-cpu", "cortex-a53"))
    assert (done.returncode, done.stdout) == (0, f"checked {count} cases on scalar\n"), done.stderr


MUTANTS = {
    "a stays unsigned": ("gemm_neondot.c", "veor_u8(vld1_u8(a), vdup_n_u8(0x80))", "vld1_u8(a)"),
    "what sdot has subtracted is not added": ("dispatch.c", "RQ_CPU_NEONDOT, 8, 128", "RQ_CPU_NEONDOT, 8, 0"),
    "group 0 twice": ("gemm_neondot.c", "a[i], 1)", "a[i], 0)"),
    "both halves of a panel are the first": ("gemm_neondot.c", "first % RQ_PANEL * 4", "0"),
    "8 outputs are stored where there are 7": ("gemm_neondot.c", "columns < OUTPUTS", "columns < OUTPUTS - 1"),
    "the low halves stay in the high ones": ("gemm_neondot.c", "vandq_s8(both, vdupq_n_s8(-16))", "both"),
    "sums of 4 bits are shifted by 3": ("gemm_neondot.c", "vshrq_n_s32(acc[i][j], 4)", "vshrq_n_s32(acc[i][j], 3)"),
    "segments lie together": ("gemm_neondot.c", "s * t->segment_stride", "s * t->steps * RQ_STEP"),
    "one step too many": (
        "gemm_neondot.c", "end = begin + t->steps * RQ_STEP", "end = begin + (t->steps + 1) * RQ_STEP",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found(aarch64, corners, mutant):
    """A wrong kernel gives a wrong element, or reads where it may not."""
    file, *change = MUTANTS[mutant]
    done = aarch64.program(DRIVER, aarch64.mutate(file, change))(corners[0])
    assert done.stdout.startswith("neondot: ") or done.returncode == -signal.SIGSEGV, done.stdout + done.stderr
