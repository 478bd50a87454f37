"""`verify` finds a wrong number, a number beside the result, and says which kernels it has not seen."""

import json
from collections import Counter

import numpy as np
import pytest

from refquant import cli, kernels, threads
from refquant.errors import UnsupportedISA
from refquant.kernels import _verify
from refquant.kernels._verify import Case

FEW = (
    Case((3, 5), (17, 5)),
    Case((2, 5, 4, 8), (18, 3, 3, 8), 1, 1, (9, None), bits=4),
    Case((40, 600), (50, 600), threads=2),
)


@pytest.fixture
def few(monkeypatch):
    """Three cases instead of 600."""
    monkeypatch.setattr(_verify, "cases", lambda: iter(FEW))
    return monkeypatch


def test_all_kernels_of_this_machine_are_equal(capsys, tmp_path):
    assert cli.main(["verify", "--json", str(tmp_path / "v.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    here, built = kernels.supported(), kernels.available()
    assert lines[-1].startswith(f"checked {len(here)} of {len(built)} kernels ({', '.join(here)}")
    assert [line.split()[0] for line in lines[2 : 2 + len(here)]] == list(here)
    assert all(line.endswith("equal") for line in lines[2 : 2 + len(here)])
    found = json.loads((tmp_path / "v.json").read_text())
    assert found["ok"] and [k["name"] for k in found["kernels"]] == list(here)
    assert {k["results"] for k in found["kernels"]} == {3 * len(list(_verify.cases()))}


def test_cases_cover_what_the_module_promises():
    cases = list(_verify.cases())
    assert len(set(map(str, cases))) == len(cases)  # a name finds its case
    for attribute, least in (("bits", 2), ("layout", 3), ("fill", 2), ("threads", 4), ("stride", 2), ("padding", 3)):
        seen = Counter(getattr(case, attribute) for case in cases)
        assert len(seen) >= least and min(seen.values()) >= 6, (attribute, seen)
    assert {zx for zx, _ in (case.zero_points for case in cases)} >= {0, 1, 128, 255}
    assert max(case.w[1] for case in cases) == 131071  # the longest sum that zero points allow


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_sums_come_close_to_the_end_of_int32(bits):
    case = next(c for c in _verify.cases() if c.fill == "largest" and c.bits == bits and c.zero_points == (0, 0))
    sums = _verify._Problem(case, np.random.default_rng(0)).want["int32"]
    assert abs(sums.astype(np.int64)).max() == 65793 * 255 * (128 if bits == 8 else 8)


def test_numbers_depend_on_the_seed_only():
    a, b, c = (_verify._Problem(FEW[1], np.random.default_rng([seed, 1])).want["uint8"] for seed in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def broken(compute, isa, damage):
    """Wrap gemm or conv2d: on one kernel, `damage` changes the result."""

    def wrapper(*arguments, out, **options):
        compute(*arguments, out=out, **options)
        if kernels.active() == isa:
            damage(out)
        return out

    return wrapper


def test_a_wrong_number_is_found_and_named(few, capsys, tmp_path):
    isa = kernels.supported()[-1]

    def damage(out):
        out[-1, -1, 2, 7] ^= 1

    few.setattr(_verify, "conv2d", broken(_verify.conv2d, isa, lambda out: out.dtype == np.int32 and damage(out)))
    found = kernels.verify()
    assert not found.ok
    results = {c.name: c.results for c in found.checked}
    assert results == {name: 6 if name == isa else 9 for name in kernels.supported()}  # it stops at its second case
    difference = found.checked[-1].difference
    assert difference.index == (1, 4, 2, 7) and difference.got == difference.want ^ 1
    assert all(word in difference.case for word in ("conv2d x (2, 5, 4, 8)", "4 bits", "int32"))
    assert cli.main(["verify", "--json", str(tmp_path / "v.json")]) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT" in out and f"{isa}: {difference}" in out
    assert out.splitlines()[-1].startswith("checked")
    assert json.loads((tmp_path / "v.json").read_text())["kernels"][-1]["difference"]["index"] == [1, 4, 2, 7]


@pytest.mark.parametrize("place, index", [(_verify.GUARD - 1, -1), (-_verify.GUARD, 51)])
def test_a_number_beside_the_result_is_found(few, place, index):
    def damage(out):
        out.base[place] = 0

    few.setattr(_verify, "gemm", broken(_verify.gemm, "ref", damage))
    checked = {c.name: c.difference for c in kernels.verify().checked}
    assert checked["ref"].index == (index,) and checked["ref"].want == 77
    assert all(difference is None for name, difference in checked.items() if name != "ref")


def test_equal_floats_of_other_bits_are_different(few):
    few.setattr(_verify, "cases", lambda: iter([Case((1, 1), (1, 1))]))
    problem = _verify._Problem(FEW[0], np.random.default_rng(0))
    problem.want["float32"][0, 0] = 0.0
    few.setattr(_verify, "gemm", lambda *_, out, **__: np.copyto(out, problem.want[out.dtype.name]))
    assert problem.first_difference() is None
    few.setattr(_verify, "gemm", lambda *_, out, **__: np.copyto(out, np.negative(problem.want[out.dtype.name])))
    problem.stages = {"float32": problem.stages["float32"]}
    problem.want["float32"][...] = 0.0
    assert problem.first_difference().index == (0, 0)  # -0.0 is not 0.0


def test_a_kernel_for_another_machine_is_named(few):
    few.setattr(_verify, "available", lambda: (*kernels.supported(), "sse9"))
    text = str(kernels.verify())
    assert text == f"checked {len(kernels.supported())} of {len(kernels.supported()) + 1} kernels " \
        f"({', '.join(kernels.supported())}, sse9: not this machine)"  # fmt: skip


def test_one_kernel_alone(few, capsys):
    before = kernels.active()
    try:
        assert cli.main(["verify", "--isa", "ref", "--quiet"]) == 0
    finally:
        kernels.use(before)
    assert "checked 1 of" in capsys.readouterr().out
    assert kernels.verify(["ref"]).skipped.items() >= {n: "not asked for" for n in kernels.supported()[1:]}.items()


def test_an_unknown_kernel_is_refused_before_any_work(few):
    few.setattr(_verify, "cases", lambda: pytest.fail("computed something"))
    with pytest.raises(UnsupportedISA, match="'sse9'"):
        kernels.verify(["ref", "sse9"])


def test_kernel_and_threads_are_left_as_they_were(few):
    before = kernels.active(), threads._threads
    kernels.verify()
    assert (kernels.active(), threads._threads) == before
