"""What the text of the C core promises, and what the compiler made of it."""

import re
import shutil
import subprocess

import pytest
from cbuild import CEXT, build_ext

SOURCES = sorted(CEXT.glob("*.[ch]"))
KERNELS = sorted(CEXT.glob("gemm_*.c"))


def named(path):
    return path.name


def code(path):
    """The text without comments: these may say why an instruction is not used."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_instruction_that_saturates_sums(path):
    """vpmaddubsw saturates at 16 bits, vpdpbusds and vpdpwssds at 32: tests/kernels/mutants shows what that costs."""
    assert not re.findall(r"\w*maddubs\w*|\w*dpbusds\w*|\w*dpwssds\w*", code(path))


@pytest.mark.parametrize("path", KERNELS, ids=named)
def test_a_kernel_is_short_and_begins_with_a_picture_of_its_tile(path):
    """At most 300 lines; the first comment names the file and draws rows of A beside registers of B."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    opening = re.match(rf"/\* {path.name} - .*?\*/", text, flags=re.DOTALL)
    assert opening, "the file does not open with a comment that begins with its name"
    picture = [line for line in opening[0].splitlines() if "[" in line and "]" in line]
    assert len(picture) >= 2 and re.search(r"\ba\d? +(->|\[)|A +\[", "\n".join(picture)), opening[0]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_nothing_prints_or_ends_the_process(path):
    """Errors are statuses."""
    assert not re.findall(r"\b(?:f?printf|puts|perror|abort|exit|assert)\s*\(", code(path))


def test_the_scalar_kernel_is_scalar(compiler, tmp_path):
    """Compiled as the module is, gemm_scalar.c uses no vector register: its time is the time of its sentence."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    target = tmp_path / "gemm_scalar.o"
    subprocess.run([compiler, *build_ext().FLAGS, "-c", CEXT / "gemm_scalar.c", "-o", target], check=True)
    text = subprocess.run([objdump, "-d", target], check=True, capture_output=True, text=True).stdout
    assert "rq_tile_s8_scalar" in text
    assert not re.findall(r".*%[xyz]mm\d+.*|.*\bv\d+\.\d+[bhsd]\b.*", text)
