"""The battery of the batched products must notice mistakes: products.c with one change each, compiled and run."""

import numpy as np
import pytest
from guards import Guarded
from products_judge import in_integers

from refquant import kernels
from refquant.kernels import _ext, _products

pytestmark = pytest.mark.skipif(_ext.lib is None, reason="the C core is not compiled")


def battery():
    """Fixed cases for the active kernel: one for each mistake that has been thought of."""
    rng = np.random.default_rng(0)
    for (m, n, k), regions in (((13, 37, 49), None), ((13, 37, 49), (8, 5)), ((6, 16, 8), None), ((1, 3, 5), (4, 2))):
        a = rng.integers(0, 256 if regions is None else 1 << regions[0], (2, 3, m, k), np.uint8)
        for transpose in (False, True):
            b = rng.integers(0, 256, (2, 3, n, k) if transpose else (2, 3, k, n), np.uint8)
            for zeros in ((0, 0), (0, 128), (200 if regions is None else 0, 31)):
                options = dict(zip(("a_zero_point", "b_zero_point"), zeros, strict=True))
                options |= {"transpose_b": transpose, "regions": regions, "scale": 0.37}
                want = in_integers(a, b, **options)
                guarded = Guarded(want.shape, np.float32)
                kernels.products(a, b, **options, out=guarded.array)
                np.testing.assert_array_equal(guarded.array, want)
                guarded.check()


MUTANTS = {  # name: (text, text instead)
    "the flag is not looked at": ("word >> flag & ones", "0 * (word >> flag & ones)"),
    "the flag stays in the magnitude": ("(word ^ coarse << flag)", "word"),
    "the shift is forgotten": ("(coarse + o) << shift", "(coarse + o)"),
    "the coarse region is forgotten": ("*sum += *(const four *)(coarse + o) << shift;", ";"),
    "the coarse codes stay in the fine plane": ("word &= ~(coarse * 255);", ";"),
    "the sum of the coarse codes is not shifted": ("(coarse, k) << j->p->region_shift", "(coarse, k)"),
    "all heads have the b of the first": ("product != *loaded", "*loaded < 0"),
    "all heads have the a of the first": ("a = matrix(&p->a, image, head)", "a = matrix(&p->a, image, 0)"),
    "all images have the b of the first": ("matrix(&p->b, image, head)", "matrix(&p->b, 0, head)"),
    "the result of another head": ("head * p->y_head_stride", "0 * p->y_head_stride"),
    "za is forgotten": ("(j->kernel->offset - j->za)", "(j->kernel->offset)"),
    "K za zb is forgotten": ("* factor + constant)", "* factor + 0 * constant)"),
    "zb is forgotten": ("less[i] *= (uint32_t)j->zb;", "less[i] = 0;"),
    "the last codes of a row are lost": ("memcpy(four, b + i, (size_t)(k - i));", ";"),
    "the last rows of b are lost": ("i < k; i += 4) {\n        const", "i + 3 < k; i += 4) {\n        const"),
    "b is read transposed in either case": ("if (j->p->b_transposed)", "if (1)"),
    "a row of a is one too short": ("memcpy(row, a, (size_t)k);", "memcpy(row, a, (size_t)k - 1);"),
    "one output too many": ("rq_min(j->p->n - first, RQ_TILE_WIDTH)", "rq_min(j->p->n + 1 - first, RQ_TILE_WIDTH)"),
    "the last tile of rows is skipped": ("i < tiles; i++", "i < tiles - (tiles > 1); i++"),
}  # fmt: skip


@pytest.fixture
def run_mutant(library, monkeypatch):
    def run(*change):
        ffi, lib = library.open("products.c", *([change] if change else []))
        monkeypatch.setattr(_products, "ffi", ffi)
        monkeypatch.setattr(_products, "lib", lib)
        with kernels.using("scalar"):
            battery()

    return run


def test_the_battery_passes(isa):
    battery()


def test_without_a_change_the_battery_passes(run_mutant):
    run_mutant()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_battery_kills(run_mutant, name):
    with pytest.raises(AssertionError):
        run_mutant(*MUTANTS[name])
