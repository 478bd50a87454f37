"""The avxvnni kernel on processors without AVX-VNNI: the same source, with the same instruction in its other encoding.

vpdpbusd on 256 bits exists twice: in VEX encoding (AVX-VNNI) and in EVEX encoding (AVX512-VNNI with AVX512-VL). Both
compute the same. Where only the second can be run, the kernel is compiled with it, a textual change of two words, and
takes the place of the first in the table. What this cannot show is that the compiler encodes the first one well.
"""

import signal

import pytest
import vectors

from refquant import kernels

TWIN = (
    ("_mm256_dpbusd_avx_epi32", "_mm256_dpbusd_epi32"),
    ('"avx2,avxvnni"', '"avx2,avx512vl,avx512vnni"'),
)
NEEDS = ("RQ_CPU_AVX2 | RQ_CPU_AVXVNNI", "RQ_CPU_AVX512VNNI")  # has VL


@pytest.fixture(scope="module")
def run(core):
    """A function that runs the vectors on a core whose avxvnni kernel is its twin, or a mutant of it."""
    if "avx512vnni" not in kernels.supported():
        pytest.skip("AVX512-VNNI with VL: not this machine")

    def run(path, *changes):
        other = core.mutate("gemm_avxvnni.c", *TWIN, *changes) | core.mutate("dispatch.c", NEEDS)
        return core.program(vectors.DRIVER, other)(path)

    return run


def test_the_vectors(run, corners):
    path, count = corners
    done = run(path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"checked {count} cases on scalar avx2 avxvnni avx512vnni\n"


MUTANTS = {
    "sums saturate": ("_mm256_dpbusd_epi32", "_mm256_dpbusds_epi32"),
    "group 0 twice": ("b + 64 * g + 32 * h", "b + 32 * h"),
    "both halves of a panel are the first": ("p * RQ_PANEL + 8 * h", "p * RQ_PANEL"),
    "the mask of the last outputs is ignored": ("_mm256_set1_epi32(t->columns - first)", "_mm256_set1_epi32(8)"),
    "the low halves stay in the high ones": ("g ? both : _mm256_slli_epi16(both, 4), top", "both, top"),
    "a logical shift": ("_mm256_srai_epi32(sum, 4)", "_mm256_srli_epi32(sum, 4)"),
    "segments lie together": ("s * t->segment_stride", "s * t->steps * RQ_STEP"),
    "a gap is forgotten": ("b += t->gap;", ""),
    "one step too many": ("end = begin + t->steps * RQ_STEP", "end = begin + (t->steps + 1) * RQ_STEP"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found(run, corners, mutant):
    """A wrong kernel gives a wrong element, or reads where it may not."""
    done = run(corners[0], MUTANTS[mutant])
    assert done.stdout.startswith("avxvnni: case ") or done.returncode == -signal.SIGSEGV, done.stdout + done.stderr
