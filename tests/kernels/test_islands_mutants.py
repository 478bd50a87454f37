"""The battery of the float islands must notice mistakes: C texts with one change each, compiled and run."""

import numpy as np
import pytest
from islands_judge import (
    FILLS,
    INF,
    NAN,
    Norm,
    V,
    X,
    exact_group_norm,
    norm,
    quantize_check,
    silu_check,
    softmax_check,
    with_number,
)

from refquant import kernels
from refquant.errors import RangeError
from refquant.kernels import _call, _ext, _islands

needs_extension = pytest.mark.skipif(_ext.lib is None, reason="the C core is not compiled")


def battery():
    """Fixed cases for the active kernel: one for each mistake that has been thought of."""
    rng = np.random.default_rng(0)
    for shape, groups in (((2, 7, 5, 32), 4), ((1, 4, 3, 20), 5), ((1, 3, 3, 5), 1)):
        for fill in FILLS:
            x = FILLS[fill](rng, shape).astype(np.float32)
            gamma, beta = rng.normal(1, 1, (2, shape[3])).astype(np.float32)
            for silu in (True, False):
                case = Norm(x, gamma, beta, groups, silu=silu)
                case.check(exact_group_norm(case))
    flat = Norm(X, 0 * V, np.float32([0.5, 1.5, -0.5, -1.5, 254.5, 2.5]), 2, silu=False)  # ties, exactly
    assert (flat.run(scale=1.0, zero_point=1) == [1, 3, 1, 0, 255, 3]).all()
    silu_check(np.linspace(-120, 40, 20_003, dtype=np.float32))
    silu_check(np.float32([-3e38, -1000, 1000, 3e38]))
    silu_check(np.linspace(0, 5, 20_003, dtype=np.float32), scale=5 / 255, zero_point=0)
    for length in (1, 15, 16, 17, 49):
        softmax_check(rng.normal(0, 4, (3, length)).astype(np.float32))
        softmax_check(rng.integers(10**6, 10**6 + 9000, (3, length)).astype(np.int32), factor=1e-3)
    for scale in (0.1, 0.3):
        quantize_check(((np.arange(-600, 611) / 2) * np.float32(scale)).astype(np.float32), scale, 7, 8)
    for number in (NAN, INF, -INF):
        with pytest.raises(RangeError):
            kernels.silu_quantize(with_number(np.zeros(40, np.float32), number), scale=1)
    with pytest.raises(RangeError):
        kernels.quantize(with_number(np.zeros(40, np.float32), NAN), 1)
    with pytest.raises(RangeError):
        norm(with_number(X, NAN), scale=1)


def test_the_battery_passes(isa):
    battery()


CRUDE = {  # the best polynomial of degree 5: relative error 9.2e-8
    "0x1.6ae7205ce8ab0p-10": "0.0", "-0x1.126780654d164p-7": "-0x1.0fa82096a6082p-7",
    "0x1.5558224ee0bc1p-5": "0x1.573a4f461aad6p-5", "-0x1.555419636bad0p-3": "-0x1.555a6aadc2351p-3",
    "0x1.fffffc1d1712dp-2": "0x1.fffdc54c97b9ap-2", "-0x1.0000008a243f9p+0": "-0x1.fffff62cd8a6bp-1",
}  # fmt: skip
MEAN = "(float)(x[g * (j->c / j->groups)] + mean[g * (j->c / j->groups)])"
MUTANTS = {  # name: (kernel, file, *pairs of text)
    "variance without mean subtraction, in float32": (
        "scalar", "islands_units.c", ("offset[p] = shift[p] + mean[p]", "offset[p] = 0"),
        ("rq_square_root(group[g] + j->number)", f"rq_square_root((float)group[g] - {MEAN} * {MEAN} + j->number)"),
    ),
    "x0 is forgotten where it is large": ("scalar", "islands_units.c", ("tame &= x0 < 4096", "tame &= 1 || x0 < 4096")),
    "no limits where |z| is large": ("scalar", "islands_body.h", ("if (!tame)", "if (0)")),
    "a cruder polynomial": ("scalar", "islands_body.h", *CRUDE.items()),
    "ties are rounded up": (
        "scalar", "islands_scalar.c",
        ("-zero_point : q[i]) + 0x1.8p52", "-zero_point : q[i]) + (0.5 - 0x1p-40) + 0x1.8p52 - 0.0"),
        ("q[i] + 0x1.8p52; /* exact", "(double)(int)(q[i] + 512.5) - 512 + 0x1.8p52; /* exact"),
    ),
    "codes: the zero point is added before rounding": (
        "scalar", "islands_scalar.c", ("-zero_point : q[i]) + 0x1.8p52", "-zero_point : q[i]) + zero_point + 0x1.8p52"),
        ("bits + (uint64_t)zero_point", "bits"),
    ),
    "a product with 1 / scale": (
        "scalar", "islands_body.h", ("/ all_narrow((float)f->unit)", "* all_narrow(1 / (float)f->unit)"),
    ),
    "channels are one block off": (
        "scalar", "islands_body.h", ("p + RQ_BLOCK < f->period", "p + RQ_BLOCK <= f->period"),
    ),
    "the end of the image is not summed": (
        "scalar", "islands_body.h", ("for (int64_t q = p; i < count;", "for (int64_t q = p; 0;"),
    ),
    "a whole block is stored at the end": (
        "scalar", "islands_body.h", ("memcpy(out + i, end, (size_t)(count - i));", "memcpy(out + i, end, RQ_BLOCK);"),
    ),
    "infinities are not seen": ("scalar", "islands_body.h", ("*bad = *bad + (z - z);", ";")),
    "NaN is not seen": ("scalar", "islands_body.h", ("*bad = *bad + q[v];", ";")),
    "the largest score is not subtracted": ("scalar", "islands_body.h", ("all(largest) - load", "all(0.0) - load")),
    "behind the line are scores of 0": ("scalar", "islands_body.h", ("room[i] = nothing;", "room[i] = 0;")),
    "avx2: quarters exchanged": ("avx2", "islands_avx2.c", ("_mm_packs_epi32(q0, q1)", "_mm_packs_epi32(q1, q0)")),
    "avx2: float32 is sure of all codes": ("avx2", "islands_short.h", ("TOLERANCE 0x1.8p-20", "TOLERANCE 0.0")),
    "avx512: float32 is sure of all codes": (
        "avx512vnni", "islands_short.h", ("TOLERANCE 0x1.8p-20", "TOLERANCE 0.0"),
    ),
    "avx512: the power of two is that of double": (
        "avx512vnni", "islands_avx512.c", ("_mm512_castps_si512(t), 23", "_mm512_castps_si512(t), 22"),
    ),
    "avx2: what is below 0 wraps": (
        "avx2", "islands_avx2.c", ("_mm_adds_epi16", "_mm_add_epi16"), ("_mm_packus_epi16(low", "_mm_packs_epi16(low"),
    ),
    "avx512: halves exchanged": (
        "avx512vnni", "islands_avx512.c", ("_mm512_cvtpd_epi32(q[0])", "_mm512_cvtpd_epi32(q[1])"),
    ),
    "avx512: no lower limit": (
        "avx512vnni", "islands_avx512.c", ("_mm512_setzero_si512()", "_mm512_set1_epi32(-1000)"),
    ),
}  # fmt: skip
OWN = {"scalar": "islands_scalar.c", "avx2": "islands_avx2.c", "avx512vnni": "islands_avx512.c"}


@pytest.fixture
def run_mutant(library, monkeypatch):
    """Compile what a change is in, for one kernel, and make the Python face call it."""

    def run(isa, file, *changes):
        if isa not in kernels.supported():
            pytest.skip(f"{isa}: not this machine")
        ffi, lib = library.open(file, *changes, compiled=(file,) if file.endswith(".c") else (OWN[isa],))
        for module in (_islands, _call):
            monkeypatch.setattr(module, "lib", lib)
        monkeypatch.setattr(_islands, "ffi", ffi)
        with kernels.using(isa):
            battery()

    return run


@needs_extension
@pytest.mark.parametrize("isa", OWN)
def test_without_a_change_the_battery_passes(run_mutant, isa):
    run_mutant(isa, "islands.c")


@needs_extension
@pytest.mark.parametrize("name", MUTANTS)
def test_the_battery_kills(run_mutant, name):
    with pytest.raises((AssertionError, RangeError, pytest.fail.Exception)):
        run_mutant(*MUTANTS[name])
