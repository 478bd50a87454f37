"""The kernel benchmark checks before it times, compares like with like, and says who is not there."""

import importlib.util
import json

import numpy as np
import pytest

from refquant import cli, kernels
from refquant.bench import kernel_peers, kernel_turn
from refquant.bench import kernels as bench
from refquant.bench.kernel_peers import Engine
from refquant.bench.kernel_problems import SHAPES, Problem, Shape
from refquant.bench.kernel_turn import OURS, Task
from refquant.errors import RangeError, RefquantError

TINY = (Shape(1, 8, 16, 4, 3), Shape(2, 4, 17, 3, 1))
ISA = kernels.supported()[-1]


@pytest.fixture
def tiny(monkeypatch):
    """Two small shapes, turns of a millisecond in this process, and NumPy as the only peer."""
    monkeypatch.setattr(bench, "SHAPES", TINY)
    monkeypatch.setattr(bench, "TURN", 0.001)
    monkeypatch.setattr(kernel_turn, "elsewhere", kernel_turn.measure)
    monkeypatch.setattr(kernel_peers, "CONVOLUTIONS", {})
    return monkeypatch


@pytest.fixture
def with_peer(tiny):
    """Add a peer that computes in NumPy what the others compute."""

    def same(p, threads):
        return Engine(lambda: p.requantize.apply(p.sums(p.w)), lambda y: y)

    tiny.setattr(kernel_peers, "CONVOLUTIONS", {"same": (("numpy",), same)})
    return tiny


def run(**options):
    return bench.run(TINY, 3, **{"isas": [ISA], **options})


def test_shapes_are_those_of_the_networks():
    assert str(SHAPES[0]) == "1,128->128,32x32,3" and SHAPES[0].operations == 2 * 1024 * 128 * 128 * 9
    assert len(set(map(str, SHAPES))) == len(SHAPES)


@pytest.mark.parametrize("options, kinds", [
    ({}, ["int32", "uint8"]), ({"int4": True}, ["w4 uint8", "uint8"]),
    ({"gemm": True}, ["int32", "uint8"]), ({"gemm": True, "int4": True}, ["w4 int32", "int32"]),
])  # fmt: skip
def test_every_contender_has_a_time_for_every_round(tiny, options, kinds):
    found = run(**options)
    assert [r["name"] for r in found["shapes"]] == ["1,8->16,4x4,3", "2,4->17,3x3,1"]
    for row in found["shapes"]:
        assert list(row["seconds"]) == [*(f"{ISA} {kind}" for kind in kinds), "numpy float32"]
        assert all(len(s) == 3 and min(s) > 0 for s in row["seconds"].values())
        for name, seconds in row["seconds"].items():
            assert row["gops"][name] == pytest.approx(row["operations"] / np.median(seconds) / 1e9)
        compared = {f"{ISA} {kind}" for kind in kinds if kind.endswith("int32")} if options.get("gemm") else set()
        assert set(row["ratios"]) == compared  # a float32 convolution is no rival of an integer one


def test_ratios_are_those_of_codes(with_peer):
    """Of the medians, in the range of those within a round."""
    for row in run()["shapes"]:
        ours, theirs = (np.array(row["seconds"][name]) for name in (f"{ISA} uint8", "same"))
        assert row["best_peer"] == "same" and list(row["ratios"]) == [f"{ISA} uint8"]
        assert row["ratios"][f"{ISA} uint8"] == {
            "median": pytest.approx(np.median(theirs) / np.median(ours)),
            "least": pytest.approx(min(theirs / ours)),
            "most": pytest.approx(max(theirs / ours)),
        }


def test_slow_kernels_are_timed_once(with_peer):
    row = run(isas=["ref"])["shapes"][0]
    assert len(row["seconds"]["ref int32"]) == 1 and len(row["ratios"]["ref uint8"]) == 3


def test_a_broken_kernel_stops_it_before_any_time(tiny, capsys):
    compute = kernels.conv2d

    def broken(x, *arguments, out, **options):
        compute(x, *arguments, out=out, **options)
        if x.shape[0] == 2:  # the last shape: the ones before must not have been timed
            out[1, 2, 0, 16] ^= 1

    tiny.setattr(kernels, "conv2d", broken)
    tiny.setattr(kernel_turn, "elsewhere", lambda task: pytest.fail("timed"))
    with pytest.raises(RefquantError, match=r"differs .* 2,4->17,3x3,1 int32 in 1 of 306 .*\(1, 2, 0, 16\).*verify"):
        run()
    assert cli.main(["bench", "kernels", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Nothing was timed" in err


def test_a_peer_that_is_not_installed_has_a_row(tiny, capsys, tmp_path):
    tiny.setattr(kernel_peers, "CONVOLUTIONS", {"other": (("no-such-package",), None)})
    path = tmp_path / "b.json"
    assert cli.main(["bench", "kernels", "--repeats", "2", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert any(line.startswith("other:") and "not installed" in line for line in lines)
    assert "No peer computes the same here" in out and "round 2 of 2: numpy float32" in err
    found = json.loads(path.read_text())
    assert found["peers"] == {"other": None, "numpy float32": f"numpy {np.__version__}"}
    assert found["what"] == "kernels" and found["repeats"] == 2 and len(found["shapes"]) == 2


@pytest.mark.parametrize("make, reason", [
    (lambda p, threads: Engine(lambda: np.zeros((*p.x.shape[:3], p.shape.o), np.uint8), lambda y: y), "differs"),
    (lambda p, threads: 1 / 0, "ZeroDivisionError"),
])  # fmt: skip
def test_a_peer_that_is_wrong_or_fails_is_not_timed(tiny, capsys, make, reason):
    tiny.setattr(kernel_peers, "CONVOLUTIONS", {"other": (("numpy",), make)})
    for row in run()["shapes"]:
        assert "other" not in row["seconds"] and reason in row["unfit"]["other"]
    assert cli.main(["bench", "kernels", "--repeats", "1", "--quiet"]) == 0
    assert "other, 1,8->16,4x4,3: not timed" in capsys.readouterr().out


def test_a_turn_has_a_process_of_its_own(tmp_path, monkeypatch):
    """It finds what the same turn finds here; neither prints of other libraries nor a folder of that name spoil it."""
    (tmp_path / "refquant").mkdir()
    monkeypatch.chdir(tmp_path)
    for contender, columns in ((OURS, [f"{ISA} int32", f"{ISA} uint8"]), ("numpy float32", ["numpy float32"])):
        task = Task(contender, TINY, (ISA,), 2, False, False, 0, 0, 0.001, first=True)
        for found in (kernel_turn.elsewhere(task), kernel_turn.measure(task)):
            assert list(found["seconds"]) == [str(shape) for shape in TINY] and found["unfit"] == {}
            assert all(list(row) == columns and min(row.values()) > 0 for row in found["seconds"].values())
            assert list(found["peak_gops"]) == ([ISA] if contender == OURS else [])


def test_a_process_that_fails_says_why():
    task = Task(OURS, TINY, ("no kernel",), 1, False, False, 0, 0, 0.001, first=True)
    with pytest.raises(RefquantError, match="process of refquant ended with status 1: .*UnsupportedISA: 'no kernel'"):
        kernel_turn.elsewhere(task)


def test_what_a_failed_process_means(tiny):
    """A peer's is the reason for its absence, ours ends the benchmark."""

    def fails(contender):
        def elsewhere(task):
            if task.contender == contender:
                raise RefquantError(f"bench: the process of {contender} ended")
            return kernel_turn.measure(task)

        return elsewhere

    tiny.setattr(kernel_turn, "elsewhere", fails("numpy float32"))
    for row in run()["shapes"]:
        assert "numpy float32" not in row["seconds"] and "ended" in row["unfit"]["numpy float32"]
    tiny.setattr(kernel_turn, "elsewhere", fails(OURS))
    with pytest.raises(RefquantError, match="ended"):
        run()


def test_tables(with_peer, capsys):
    assert cli.main(["bench", "kernels", "--repeats", "2", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    first, second = (i for i, line in enumerate(lines) if line.startswith("shape "))
    assert f"{ISA} int32" in lines[first] and f"{ISA} uint8" in lines[first]
    assert lines[second].split()[-5:] == ["same", "numpy", "float32", "ratio", "range"]
    for start in (first, second):
        assert [line.split()[0] for line in lines[start + 2 : start + 4]] == [str(s) for s in TINY]
    assert lines[-1].startswith(f"{ISA} uint8: geometric mean ")
    if ISA not in bench.SLOW:
        assert "%)" in lines[first + 2] and f"{ISA} " in next(line for line in lines if line.startswith("peaks: "))


def test_shapes_are_chosen_by_their_names():
    assert bench.chosen_shapes([], False) == SHAPES
    chosen = bench.chosen_shapes(["4x4", "16x16,1"], False)
    assert [str(s) for s in chosen] == ["1,256->256,4x4,3", "1,256->256,16x16,1"]
    assert len(bench.chosen_shapes(["512->512"], True)) == 2
    with pytest.raises(RangeError, match="contains 512->512. There are: 1,128->128"):
        bench.chosen_shapes(["512->512"], False)


def test_numbers_out_of_range(tiny, capsys):
    for option, words in (("--repeats", "repeats is 0"), ("--zero-point", "zero point is 256"), ("--shapes", "name")):
        value = {"--repeats": "0", "--zero-point": "256", "--shapes": "nothing"}[option]
        assert cli.main(["bench", "kernels", "--quiet", option, value]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("zero_point", [0, 77])
@pytest.mark.parametrize("name", [*kernel_peers.CONVOLUTIONS, *kernel_peers.FLOATS])
def test_installed_peers_compute_the_same(name, zero_point):
    packages, make = (kernel_peers.CONVOLUTIONS | kernel_peers.FLOATS)[name]
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")
    for shape in (*TINY, Shape(2, 32, 48, 7, 3)):
        kernel_turn.peer(Problem(shape, zero_point, False, 3), name, 2, check=True)


def test_the_float_product_is_the_integer_one():
    kernel_turn.peer(Problem(Shape(1, 64, 16, 8, 3), 9, True, 0), "numpy float32", 2, check=True)
