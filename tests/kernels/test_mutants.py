"""Wrong C that the vectors must notice: a slip in one file, compiled, linked with the rest, and run.

A property suite that cannot fail is decoration. Each mutant is a mistake that a careful person could make, and the
core as it is must pass the same vectors. (tests/property/test_affine_mutants.py does this for the arithmetic.)
"""

import signal
from pathlib import Path

import pytest
import vectors

from refquant import kernels

MADDUBS = Path(__file__).parent / "mutants" / "gemm_maddubs.c"

# name: (kernel that must be there, file, text, text instead)
MUTANTS = {
    "the border is the code 0": ("scalar", "slab.c", "const int zx = x->zero_point;", "const int zx = 0;"),
    "windows move by pixels, not by strides": ("scalar", "slab.c", "(k * j->stride + part.q0)", "(k + part.q0)"),
    "a byte too many is read": ("scalar", "conv.c", "padding > 0 || j.layout.length % RQ_STEP != 0", "padding > 0"),
    "the last step is forgotten": ("scalar", "conv.c", ".steps = steps,", ".steps = j->layout.length / RQ_STEP,"),
    "segments lie together": ("scalar", "conv.c", "= b->line_bytes,", "= 0 * b->line_bytes + j->layout.length,"),
    "a gap is forgotten": ("scalar", "conv.c", "t.gap = (steps - t.steps) * step_bytes", "t.gap = 0"),
    "a corner is subtracted twice": ("scalar", "conv.c", " + corner[3][o]", ""),
    "sums over windows of x are forgotten": ("scalar", "conv.c", "j.sums_pixels = w->zero_points[o] != 0", ";"),
    "every second column of windows is summed one on": (
        "scalar", "slab.c", "b->column_sums + k * j->stride, kw", "b->column_sums + k * j->stride + k % 2, kw",
    ),
    "windows of stride 2 are summed at every line": (
        "scalar", "slab.c", "pixels + i * j->stride * width", "pixels + i * width",
    ),
    "eight bytes at the end are summed twice": ("scalar", "sums.c", "        i += 8;\n", ""),
    "the last columns are not summed": ("scalar", "sums.c", "for (; k < count; k++)", "for (; k < count - 1; k++)"),
    "the last term is forgotten": ("scalar", "sums.c", "sum += next;", "sum += i + 1 < terms ? next : 0 * next;"),
    "K zx zw is forgotten": ("scalar", "conv.c", "+ k * zx * zw", "+ 0 * k * zx * zw"),
    "the bias is forgotten": ("scalar", "conv.c", "(bias - (zx", "(0 * bias - (zx"),
    "other lines have the pixels of the first": (
        "scalar", "slab.c", "first == b->first && lines == b->lines", "b->lines > 0",
    ),
    "the next image has the pixels of the first": (
        "scalar", "slab.c", "if (is_inside)\n", "if (is_inside && !framed)\n",
    ),
    "all images have the result of the first": ("scalar", "slab.c", "+ n * j->ho * j->wo * b->y.ld *", "+ 0 *"),
    "all images have the residual of the first": ("scalar", "slab.c", "n * j->ho * j->wo * b->y.residual_ld", "0"),
    "one code of output 15 is lost": ("scalar", "pack.c", "k < l.length; k++", "k < l.length - (o % 16 == 15); k++"),
    "codes of 4 bits are unsigned": ("scalar", "gemm_scalar.c", "half < 8 ? half : half - 16", "half"),
    "one output too many is stored": ("scalar", "gemm_scalar.c", "j < t->columns", "j <= t->columns"),
    "ties are rounded up": ("scalar", "output.c", "- 1 + ((p >> shift) & 1)", ""),
    "one rounding for product and bias": (
        "scalar", "output.c", "value += y->bias[first + j]",
        "value = (float)((double)sums[i * RQ_TILE_WIDTH + j] * y->scale[first + j] + y->bias[first + j])",
    ),
    "avx2: the low halves keep their neighbours": (
        "avx2", "gemm_avx2.c", "_mm256_srai_epi16(_mm256_slli_epi16(code, 12), 8)", "_mm256_slli_epi16(code, 4)",
    ),
    "avx2: the mask of the last outputs is ignored": (
        "avx2", "gemm_avx2.c", "_mm256_set1_epi32(t->columns - first)", "_mm256_set1_epi32(8)",
    ),
    "avx2: sums are lost between blocks": (
        "avx2", "gemm_avx2.c", "first_block = 0;", ";",
    ),
    "avx2: a block goes on over a gap": ("avx2", "gemm_avx2.c", "if (t->gap)\n                break;", ""),
    "zero points of the first outputs for all": (
        "scalar", "conv.c", "j->w->zero_points + first, columns", "j->w->zero_points, columns",
    ),
    "avx2: row sums of the first row for all": (
        "avx2", "output_avx2.c", "_mm256_set1_epi32(row_sums[i])", "_mm256_set1_epi32(row_sums[0])",
    ),
    "avx2: a logical shift": ("avx2", "gemm_avx2.c", "_mm256_srai_epi32(sum, 4)", "_mm256_srli_epi32(sum, 4)"),
    "avx512vnni: vpdpbusds": ("avx512vnni", "gemm_avx512vnni.c", "_mm512_dpbusd_epi32(", "_mm512_dpbusds_epi32("),
    "avx512vnni: the mask of the last panel is ignored": (
        "avx512vnni", "gemm_avx512vnni.c", "columns >= RQ_PANEL ? 0xffff :", "1 ? 0xffff :",
    ),
    "avx512vnni: a logical shift": (
        "avx512vnni", "gemm_avx512vnni.c", "_mm512_srai_epi32(acc[i][j], 4)", "_mm512_srli_epi32(acc[i][j], 4)",
    ),
    "avx512: outputs 0 to 7 and 8 to 15 exchanged": (
        "avx512vnni", "output_avx512.c", "q[0], q[1], 0x88", "q[1], q[0], 0x88",
    ),
    "avx512: two roundings": (
        "avx512vnni", "output_avx512.c",
        "_mm512_fmadd_pd(sum, m[i], integers)", "_mm512_add_pd(_mm512_mul_pd(sum, m[i]), integers)",
    ),
    "avx512: of two rows the first is stored twice": (
        "avx512vnni", "output_avx512.c", "i + 1 < rows ? sum + RQ_TILE_WIDTH : sum", "sum",
    ),
    "avx512: words of two rows in the order of packing": (
        "avx512vnni", "output_avx512.c", "_mm512_permutexvar_epi16(order, two)", "(0 ? order : two)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Data as they occur."""
    path = tmp_path_factory.mktemp("vectors") / "network.bin"
    return path, vectors.write(path, vectors.like_a_network())


def needs(isa):
    if isa not in kernels.supported():
        pytest.skip(f"{isa}: not this machine")


def test_the_core_as_it_is(core, corners, network):
    """No vector is wrong: what fails below is the mutant."""
    for path, count in (corners, network):
        done = core.program(vectors.DRIVER)(path)
        names = " ".join(kernels.supported()[1:])
        assert (done.returncode, done.stdout) == (0, f"checked {count} cases on {names}\n"), done.stderr


@pytest.mark.parametrize("name", MUTANTS)
def test_the_vectors_kill(core, corners, name):
    isa, file, *change = MUTANTS[name]
    needs(isa)
    done = core.program(vectors.DRIVER, core.mutate(file, change))(corners[0])
    wrong, out_of_bounds = done.returncode == 1 and ": case " in done.stdout, done.returncode == -signal.SIGSEGV
    assert wrong or out_of_bounds, done.stdout + done.stderr


def test_maddubs_is_found_by_corners_and_not_by_a_network(core, corners, network):
    """Saturation needs two large neighbours: the vectors have them, SiLU of normal numbers times normal weights not."""
    needs("avx2")
    run = core.program(vectors.DRIVER, core.replace("gemm_avx2.c", MADDUBS))
    assert run(network[0]).returncode == 0
    done = run(corners[0])
    assert (done.returncode, done.stdout[:11]) == (1, "avx2: case "), done.stdout + done.stderr
