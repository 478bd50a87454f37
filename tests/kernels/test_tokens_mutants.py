"""The battery of a transformer's islands must notice mistakes: C texts with one change each, compiled and run."""

import numpy as np
import pytest
from guards import Guarded
from islands_judge import FILLS, INF, NAN, with_number
from tokens_judge import (
    TokenNorm,
    gelu_check,
    gelu_codes_are_scalars,
    regions_check,
    signs_check,
    softmax_codes_are_scalars,
)

from refquant import kernels
from refquant.errors import RangeError
from refquant.kernels import _call, _ext, _islands, _tokens

pytestmark = pytest.mark.skipif(_ext.lib is None, reason="the C core is not compiled")


def battery():
    """Fixed cases for the active kernel: one for each mistake that has been thought of."""
    rng = np.random.default_rng(0)
    for shape in ((2, 33, 32), (3, 4, 20), (1, 1, 5)):
        for fill in FILLS.values():
            x = fill(rng, shape).astype(np.float32)
            gamma, beta = rng.normal(0, 1, (2, shape[0], shape[2])).astype(np.float32)
            case = TokenNorm(x, gamma, beta)
            case.check(case.exact())
    gelu_check(np.linspace(-14, 8, 20_003, dtype=np.float32))
    gelu_check(np.float32([-3e38, -1000, 1000, 3e38]))
    gelu_check(np.linspace(0, 5, 20_003, dtype=np.float32), scale=5 / 255, zero_point=0)
    gelu_codes_are_scalars(40)
    softmax_codes_are_scalars(5)
    signs_check(rng.normal(-0.5, 2, (70, 49)).astype(np.float32))
    signs_check(rng.normal(-0.5, 2, (7, 49)).astype(np.float32), 0.003, 0.0003)  # both saturate
    for spread in (0.5, 4):
        regions_check(rng.normal(0, spread, (40, 49)).astype(np.float32))
    regions_check(np.log(np.float32([[0.25, 0.75], [0.2499, 0.7501]])), bits=4, shift=2)
    stages = [(0.1, 3, 8), (0.3, 14, 4), (0.07, 200, 8)]
    x = rng.normal(0, 3, (9, 3 * 17)).astype(np.float32)
    parts = np.split(kernels.quantize_parts(x, stages), 3, axis=1)
    for part, columns, (scale, zero, bits) in zip(parts, np.split(x, 3, axis=1), stages, strict=True):
        np.testing.assert_array_equal(part, kernels.quantize(np.ascontiguousarray(columns), scale, zero, bits=bits))
    for shape in ((3, 40, 21), (2, 1, 16)):
        x, h = rng.normal(0, 1, (2, *shape)).astype(np.float32)
        gate, out = rng.normal(0, 1, (shape[0], shape[2])).astype(np.float32), Guarded(shape, np.float32)
        np.testing.assert_array_equal(kernels.gated_add(x, gate, h, out=out.array), x + gate[:, None] * h)
        out.check()
    zero = np.zeros((2, 1, 20), np.float32)
    for number in (NAN, INF, -INF):
        with pytest.raises(RangeError):
            kernels.gelu_quantize_signs(with_number(zero, number), 1, 1)
        if number != -INF:  # which is a mask
            with pytest.raises(RangeError):
                kernels.softmax_quantize_regions(with_number(zero, number), bits=8, shift=3)
        with pytest.raises(RangeError):
            kernels.gelu_quantize(with_number(zero, number), scale=1)
        with pytest.raises(RangeError):
            kernels.layer_norm_modulate_quantize(with_number(zero, number), zero[:, 0], zero[:, 0], scale=1)
    with pytest.raises(RangeError):
        kernels.layer_norm_modulate_quantize(zero, zero[:, 0], with_number(zero[:, 0], NAN), scale=1)
    line = np.zeros(20, np.uint32)
    line[3] = 0x7FC001FF  # a NaN whose low bits a power of two is made of
    with pytest.raises(RangeError):
        kernels.softmax_quantize_regions(line.view(np.float32), bits=8, shift=3)


BODY, CALLS = "islands_tokens_body.h", "islands_tokens.c"
MUTANTS = {  # name: (file, *pairs of text)
    "x0 is forgotten": (BODY, ("const double x0 = x[0];", "const double x0 = 0;"), ("x[0], mean[t]", "0, mean[t]")),
    "the mean is not subtracted": (BODY, ("term = term - all(mean);", ";")),
    "the end of a token is not summed": (BODY, ("i < d; i++, lane++", "0; i++, lane++")),
    "x0 of another number": (BODY, ("modulate_block(in, x[0],", "modulate_block(in, x[i],")),
    "gamma is not one more": (CALLS, ("(1 + (double)gamma[p])", "((double)gamma[p])")),
    "gamma and beta of the first image": (CALLS, ("beta = j->beta + image * j->stride", "beta = j->beta")),
    "the gate of another image": (CALLS, ("j->gamma + image * j->stride, (const float *)j->other",
                                          "j->gamma, (const float *)j->other")),
    "a unit ends too early": (CALLS, ("*count = rest < TOKENS ? rest : TOKENS", "*count = rest < TOKENS ? 1 : TOKENS")),
    "eps is forgotten": (CALLS, ("variance[t] + j->number", "variance[t] + 1e-300")),
    "NaN in a token is not seen": (CALLS, ("bad += mean[t] - mean[t];", ";")),
    "NaN in a condition is not seen": (CALLS, ("(offset[p] - offset[p])", "0")),
    "the cube of GELU is forgotten": (BODY, (" + all(0.07135481627260025) * (x * x)", "")),
    "GELU by the sigmoid of 1.702 x": (BODY, ("(all(1.5957691216057308) + all(0.07135481627260025) * (x * x))",
                                              "all(1.702)")),
    "infinities are not seen by GELU": (BODY, ("*bad = *bad + (in - in);", ";")),
    "the sign is forgotten": (BODY, ("y[v] * all(-f->ratio)", "y[v] * all(f->ratio)")),
    "both signs have one step": (CALLS, ("(double)positive / (double)negative", "1")),
    "no limit of negative codes": (BODY, ("minus[v] = limited(y[v] * all(-f->ratio), f)",
                                          "minus[v] = y[v] * all(-f->ratio)")),
    "a whole block of negative codes at the end": (BODY, ("memcpy(down + i, other, (size_t)(count - i));",
                                                          "memcpy(down + i, other, RQ_BLOCK);")),
    "the flag is forgotten": ("islands_body.h", (" + all(f->flag), y[v])", ", y[v])")),
    "the coarse step is the fine one": ("islands_body.h", ("limited(y[v] * all(f->ratio), f)", "limited(y[v], f)")),
    "the split is one code off": (CALLS, ("j.f.split = ratio / j.f.unit", "j.f.split = ratio / j.f.unit - 1")),
    "all parts have the first scale": (CALLS, ("parts[p].scale, .zero_point", "parts[0].scale, .zero_point")),
    "all parts have the first zero point": (
        CALLS, (".zero_point = parts[p].zero_point", ".zero_point = parts[0].zero_point"),
    ),
    "all parts have the first limit": (CALLS, (".qmax = parts[p].qmax", ".qmax = parts[0].qmax")),
    "gates in double": (
        BODY, ("load_narrow(x + i) + load_narrow(gate + i) * load_narrow(h + i)",
               "(float)(x[i] + (double)gate[i] * h[i])"),
    ),
}  # fmt: skip
SHORT = {  # of islands_short.h, which wide registers have: pairs of text
    "float32 is sure of all codes": ("TOLERANCE 0x1.8p-20", "TOLERANCE 0.0"),
    "it is of those of negative numbers": ("g->tolerance, size(finer)", "g->tolerance, size(finer - finer)"),
    "the cube is a little off": ("0x1.2444f2p-4f", "0x1.2480p-4f"),
    "infinities and NaN are not seen": ("*bad = *bad + (in - in);", ";"),
    "no end of the exponent": ("end = all_narrow(80.0f)", "end = all_narrow(800.0f)"),
    "no upper limit": ("least_narrow(g->top, y));", "y);"),
    "no limit of negative codes": ("least_narrow(g->top, y * finer)", "y * finer"),
    "negative numbers in positive steps": ("(float)-f->ratio", "(float)-1"),
    "float32 is sure of all shares": ("SLACK 0x1p-24", "SLACK 0.0"),
    "it is sure where regions meet": ("!any_above(close, 0)", "1"),
    "numbers at the end are counted twice": ("RQ_BLOCK - (b - at)", "RQ_BLOCK"),
    "what fills a short line is counted": ("2 * RQ_BLOCK - given", "RQ_BLOCK"),
    "a short line ends with a whole block": ("given < RQ_BLOCK ? end : out + at", "out + at"),
    "no NaN is seen in a line": ("if (sum_of_narrow(odd) != 0)", "if (0)"),
    "the coarse region has no flag": ("whole + all_narrow((float)f->flag)", "whole"),
    "steps of the coarse region are fine": ("least_narrow(limit, y * ratio)", "least_narrow(limit, y)"),
    "the largest score is not subtracted": ("(largest - load_narrow(x", "(all_narrow(0.0f) - load_narrow(x"),
}  # fmt: skip
OWN = {"avx2": "islands_avx2.c", "avx512vnni": "islands_avx512.c"}


@pytest.fixture
def run_mutant(library, monkeypatch):
    def run(file, *changes, isa="scalar"):
        if isa not in kernels.supported():
            pytest.skip(f"{isa}: not this machine")
        compiled = (file,) if file.endswith(".c") else (OWN.get(isa, "islands_scalar.c"),)
        ffi, lib = library.open(file, *changes, compiled=compiled)
        for module in (_tokens, _islands, _call):
            monkeypatch.setattr(module, "lib", lib)
        for module in (_tokens, _islands):
            monkeypatch.setattr(module, "ffi", ffi)
        with kernels.using(isa):
            battery()

    return run


def test_the_battery_passes(isa):
    battery()


@pytest.mark.parametrize("isa", ["scalar", *OWN])
def test_without_a_change_the_battery_passes(run_mutant, isa):
    run_mutant(CALLS, isa=isa)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_battery_kills(run_mutant, name):
    with pytest.raises((AssertionError, RangeError, pytest.fail.Exception)):
        run_mutant(*MUTANTS[name])


@pytest.mark.parametrize("isa", OWN)
@pytest.mark.parametrize("name", SHORT)
def test_the_battery_kills_shorter_ways(run_mutant, name, isa):
    with pytest.raises((AssertionError, RangeError, pytest.fail.Exception)):
        run_mutant("islands_short.h", SHORT[name], isa=isa)
