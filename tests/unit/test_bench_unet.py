"""The whole-network benchmark checks before it times, compares like with like, and says who is not there."""

import importlib.util
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toys

from refquant import cli, kernels
from refquant.bench import process, unet, unet_networks, unet_peers, unet_profile, unet_turn
from refquant.bench.kernel_peers import Unfit
from refquant.bench.unet_networks import STEP, Case, T
from refquant.bench.unet_peers import OURS, OURS_FLOAT, Engine
from refquant.bench.unet_profile import profile
from refquant.bench.unet_turn import Task
from refquant.deploy.runtime import IntegerDenoiser
from refquant.diffusion.model import DiffusionModel
from refquant.diffusion.schedule import cosine
from refquant.errors import RangeError, RefquantError
from refquant.nn.networks import CONFIGS

NAMES = [OURS_FLOAT, *OURS]


def peers(patch, floats=(), integers=()):
    """Put other peers in the place of the installed ones: {name: what it makes of a case}."""
    for kind, given in (("FLOATS", floats), ("INTEGERS", integers)):
        table = {name: (("numpy",), make) for name, make in dict(given).items()}
        for module in (unet, unet_turn):
            patch.setattr(module, kind, table)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The files of the tiny network, for three images."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "tiny", toys.TINY)
        patch.setitem(CONFIGS, "tiny-dit", toys.TINY_DIT)
        unet_networks.prepare(folder, "tiny", 3, 5)
        unet_networks.prepare(folder, "tiny-dit", 3, 5)
    return Case(str(folder), "tiny", 2)


@pytest.fixture(scope="module")
def transformer(prepared):
    """The same of a conditional transformer."""
    return Case(prepared.folder, "tiny-dit", 2)


@pytest.fixture
def tiny(monkeypatch, prepared):
    """A network of no size that is there already, turns of no time in this process, and no peers."""
    monkeypatch.setitem(CONFIGS, "tiny", toys.TINY)
    monkeypatch.setattr(unet, "TURN", 0.0)
    monkeypatch.setattr(unet_profile, "SECONDS", 0.0)
    monkeypatch.setattr(unet_turn, "elsewhere", unet_turn.measure)
    monkeypatch.setattr(unet_networks, "prepare", lambda folder, network, images, seed: shutil.copytree(
        Path(prepared.folder) / network, Path(folder) / network))  # fmt: skip
    peers(monkeypatch)
    return monkeypatch


def right(name):
    """A peer that gives the expected answer."""
    return lambda case, threads: Engine(lambda: case.expected(name), np.asarray, "a note")


def run(rounds=2, batches=(1, 2), **options):
    return unet.run(["tiny"], batches, rounds, **options)


def test_every_contender_has_a_time_for_every_round(tiny):
    found = run()
    assert [(c["network"], c["batch"]) for c in found["cases"]] == [("tiny", 1), ("tiny", 2)]
    for case in found["cases"]:
        assert list(case["seconds"]) == NAMES and all(len(s) == 2 and min(s) > 0 for s in case["seconds"].values())
        assert case["fastest"] == {name: min(s) for name, s in case["seconds"].items()}
        assert case["ratios"] == {} and case["unfit"] == {} and set(case["profiles"]) == set(OURS)
    assert len({case["multiplications"] for case in found["cases"]}) == 1  # of one image
    assert (found["peak_gops"] is None) == (kernels.active() in ("ref", "scalar"))


def test_ratios_are_those_to_the_fastest_peer_of_a_kind(tiny):
    slow = lambda case, threads: Engine(lambda: (sum(range(300_000)), case.expected("float32"))[1], np.asarray)  # noqa: E731
    peers(tiny, {"slow": slow, "quick": right("float32")}, {"coded": right("int8")})
    for case in run(rounds=3)["cases"]:
        assert set(case["ratios"]) == {"float32", "int8"}
        for kind, best in (("float32", "quick"), ("int8", "coded")):
            for name, ratio in case["ratios"][kind].items():
                within = np.array(case["seconds"][best]) / case["seconds"][name]
                assert ratio["peer"] == best
                assert ratio["ratio"] == pytest.approx(case["fastest"][best] / case["fastest"][name])
                assert (ratio["least"], ratio["most"]) == pytest.approx((within.min(), within.max()))
        assert case["ratios"]["float32"]["quick"]["ratio"] == 1
        assert case["notes"]["coded"] == "a note"


def spoiled(name, spoil):
    """A peer whose answer is not quite the expected one."""
    return lambda case, threads: Engine(lambda: spoil(case.expected(name).copy()), np.asarray)


WRONG = [
    ("float32", lambda y: y + 3e-4 * max(1, np.abs(y).max())), ("float32", lambda y: y * np.nan),
    ("int8", lambda y: y * 1.3), ("int8", lambda y: y[..., ::-1].copy()), ("int8", lambda y: y * np.nan),
]  # fmt: skip


def test_a_wrong_answer_is_not_timed(tiny, capsys):
    wrong = [{f"wrong {i}": spoiled(kind, spoil) for i, (kind, spoil) in enumerate(WRONG) if kind == which}
             for which in ("float32", "int8")]  # fmt: skip
    peers(tiny, {**wrong[0], "right": right("float32")}, wrong[1])
    for case in run(engines=["wrong", "right"])["cases"]:
        assert list(case["seconds"]) == ["right"] and len(case["seconds"]["right"]) == 2
        assert len(case["unfit"]) == 5 and all("is allowed" in reason for reason in case["unfit"].values())
    options = ("--network", "tiny", "--batch", "1", "--repeats", "1", "--engines", "wrong 0", "--quiet")
    assert cli.main(["bench", "unet", *options]) == 0
    assert "wrong 0, tiny, batch 1: not timed, ValueError: its answer differs by" in capsys.readouterr().out


def test_answers_within_rounding_are_timed(tiny):
    """Float sums in another order, and codes that fell to the other side of an edge."""
    peers(tiny, {"float": spoiled("float32", lambda y: y * 1.00001)}, {"codes": spoiled("int8", lambda y: y * 1.1)})
    for case in run(rounds=1)["cases"]:
        assert case["unfit"] == {}
        assert case["differences"]["codes"] == pytest.approx(0.1, rel=1e-3)
        assert 0 < case["differences"]["float"] < 1e-4 and case["differences"][OURS_FLOAT] < 1e-5
        assert 0 < case["differences"]["refquant W8A8"] < case["differences"]["refquant W4A8"] < 1


def test_a_broken_kernel_stops_it_before_any_time(monkeypatch, capsys):
    compute = kernels.products

    def broken(*arguments, out, **options):
        compute(*arguments, out=out, **options)
        if kernels.active() != "scalar":
            out[0, 0, 0] += 0.5

    monkeypatch.setitem(CONFIGS, "tiny", toys.TINY)
    monkeypatch.setattr(kernels, "products", broken)
    monkeypatch.setattr(unet_turn, "elsewhere", lambda task: pytest.fail("timed"))
    assert cli.main(["bench", "unet", "--network", "tiny", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "differs from scalar in" in err and "of tiny. Nothing was timed" in err


def test_a_peer_that_fails_is_not_timed_and_ours_ends_it(tiny):
    def dies(task):
        if task.contender in ("dead", "refquant W4A8"):
            raise RefquantError(f"the process of {task.contender} ended")
        return unet_turn.measure(task)

    peers(tiny, {"dead": right("float32"), "stumbles": lambda case, threads: 1 / 0})
    tiny.setattr(unet_turn, "elsewhere", dies)
    for case in run(engines=["float32", "dead", "stumbles", "W8"])["cases"]:
        assert "ended" in case["unfit"]["dead"] and "ZeroDivisionError" in case["unfit"]["stumbles"]
        assert set(case["seconds"]) == {OURS_FLOAT, "refquant W8A8"}
    with pytest.raises(RefquantError, match="W4A8 ended"):
        run()


def test_what_compiles_for_minutes_has_one_long_turn(tiny):
    """Others have a turn in every round, in an order that moves by one."""
    seen = []

    def listening(task):
        seen.append((task.contender, task.seconds, task.first))
        return unet_turn.measure(task)

    peers(tiny, {"slow": right("float32")})
    tiny.setattr(unet, "TURN", 0.001)
    tiny.setattr(unet, "SLOW_START", ("slow",))
    tiny.setattr(unet_turn, "elsewhere", listening)
    case = run(rounds=3, batches=[1], engines=["slow", "W8A8", "W4A8"])["cases"][0]
    assert [name for name, _, _ in seen] == [
        "refquant W8A8", "refquant W4A8", "slow", "refquant W4A8", "refquant W8A8", "refquant W8A8", "refquant W4A8"
    ]  # fmt: skip
    assert [s for name, s, _ in seen if name == "slow"] == [0.003]
    assert [first for _, _, first in seen] == [True] * 3 + [False] * 4
    assert len(case["seconds"]["slow"]) == 1 and len(case["seconds"]["refquant W8A8"]) == 3


def test_the_fastest_pass_counts():
    times = iter([0.03, 0.0, 0.02, 0.0, 0.01])  # the first one is not timed
    assert unet_turn.fastest(lambda: time.sleep(next(times)), 0.0) < 0.01
    assert next(times) == 0.0  # two were enough
    count = iter(range(1000))
    unet_turn.fastest(lambda: time.sleep(0.002 + 0 * next(count)), 0.05)
    assert 10 <= next(count) <= 27


def test_a_turn_has_a_process_of_its_own(prepared, transformer):
    """It finds what the same turn finds here."""
    for name in NAMES:
        task = Task(name, (prepared, transformer), 1, kernels.supported()[-1], 0.0, first=True)
        here, there = unet_turn.measure(task), unet_turn.elsewhere(task)
        assert there["unfit"] == {} and min(there["seconds"].values()) > 0
        assert there["differences"] == here["differences"] and there.keys() == here.keys()
        assert {k: list(v) for k, v in there["profiles"].items()} == {k: list(v) for k, v in here["profiles"].items()}


def test_a_process_that_fails_says_why(prepared):
    task = Task(OURS_FLOAT, (prepared,), 1, "no kernel", 0.0, first=True)
    with pytest.raises(RefquantError, match="process of refquant float32 ended with status 1: .*'no kernel'"):
        unet_turn.elsewhere(task)
    with pytest.raises(RefquantError, match="process of nobody ended"):
        process.ask("refquant.no_such_module", "nobody", {})


def test_networks_are_those_that_are_described(prepared):
    """Ours with the zero points of the method, the twin for the peers without, in the same 8 bits."""
    model = prepared.quantized(8)
    assert any(layer.weight_qparams.zero_point.any() for layer in model.layers.values())
    assert {layer.weight_qparams.spec.bits for layer in prepared.quantized(4).layers.values()} == {4}
    floats = prepared.float_model()
    twin = unet_networks.symmetric(replace(model, base=floats))
    assert not any(layer.weight_qparams.zero_point.any() for layer in twin.layers.values())
    np.testing.assert_array_equal(IntegerDenoiser(twin)(prepared.x, T, STEP), prepared.expected("int8"))
    np.testing.assert_allclose(floats.denoiser()(prepared.x, T, STEP), prepared.expected("float32"), atol=1e-5)
    assert prepared.x.shape == (2, 1, 8, 8)


def test_a_profile_accounts_for_every_operation(prepared, monkeypatch):
    monkeypatch.setattr(unet_profile, "SECONDS", 0.0)
    denoise = IntegerDenoiser(prepared.quantized(8))
    found = profile(denoise, prepared.x)
    assert sum(kind["seconds"] for kind in found["kinds"].values()) == pytest.approx(found["seconds"])
    assert sum(found["operations"]) == pytest.approx(found["seconds"]) and min(found["operations"]) > 0
    assert found["names"] == [denoise.program.values[op.out].name for op in denoise.program.operations]
    counted = {kind: what["operations"] for kind, what in found["kinds"].items()}
    described = denoise.program.describe()
    assert counted == {kind: described[kind] for kind in counted}
    assert sum(counted.values()) == len(denoise.program.operations)
    seconds = [kind["seconds"] for kind in found["kinds"].values()]
    assert seconds == sorted(seconds, reverse=True)
    denoise.executor._room(len(prepared.x)).steps[STEP].pop()
    monkeypatch.setattr(denoise.executor, "_record", None)
    with pytest.raises(RefquantError, match=f"{len(found['names']) - 1} recorded calls"):
        profile(denoise, prepared.x)


def test_tables(tiny, capsys, tmp_path):
    peers(tiny, {"a float peer": right("float32")}, {"an int8 peer": right("int8")})
    for module in (unet, unet_turn):
        module.FLOATS["other"] = (("no-such-package",), None)
    path = tmp_path / "b.json"
    options = ["--network", "tiny", "--batch", "1", "3", "--repeats", "2", "--json", str(path)]
    assert cli.main(["bench", "unet", *options]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert max(map(len, lines)) <= 120
    heads = [line for line in lines if line.startswith("tiny, batch")]
    assert len(heads) == 2 and all(h.split()[-5:] == ["range", "x", "int8", "range", "apart"] for h in heads)
    assert sum(line.startswith("refquant W8A8 ") for line in lines) == 2
    assert sum(line.startswith("Convolve ") for line in lines) == 2 == sum(line.startswith("all ") for line in lines)
    assert any(line.startswith("other: not installed") for line in lines)
    assert lines[lines.index(f"an int8 peer: numpy {np.__version__}") + 1] == "  tiny: a note"
    assert "making and checking tiny" in err and "round 2 of 2: an int8 peer" in err
    found = json.loads(path.read_text())
    assert found["what"] == "unet" and found["repeats"] == 2 and found["contenders"]["other"] is None
    assert [case["batch"] for case in found["cases"]] == [1, 3]


def test_without_a_peer_there_are_times_of_ours(tiny, capsys):
    assert cli.main(["bench", "unet", "--network", "tiny", "--batch", "1", "--repeats", "1", "--quiet"]) == 0
    head = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny, batch"))
    assert head.split() == ["tiny,", "batch", "1", "ms", "images/s", "apart"]


def test_bad_numbers_and_names(tiny, capsys):
    for option, value, words in (("--batch", "0", "batch is 0"), ("--repeats", "0", "repeats is 0"),
                                 ("--engines", "nobody", "contains nobody")):  # fmt: skip
        assert cli.main(["bench", "unet", "--network", "tiny", "--quiet", option, value]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(RangeError, match="mnist-dit is a dit"):
        unet_networks.random_unet("mnist-dit", 0)


def test_every_layer_of_a_random_network_matters(monkeypatch):
    """Those that start at zero, of a transformer its gates, would hide all that comes before them."""
    monkeypatch.setitem(CONFIGS, "tiny", toys.TINY_DIT)
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8), dtype=np.float32)
    model = DiffusionModel("tiny", unet_networks.random_network("tiny", 0), cosine())
    before = model.denoiser()(x, T, STEP, np.array([0, 3]))
    for name, p in model.network.named_parameters():
        if name.endswith("weight"):
            kept, p.data = p.data, np.zeros_like(p.data)
            apart = model.denoiser()(x, T, STEP, np.array([0, 3])) - before
            assert np.abs(apart).max() > 1e-4 * np.abs(before).max(), name
            p.data = kept


INSTALLED = {name: (packages, make) for name, (packages, make) in (unet_peers.FLOATS | unet_peers.INTEGERS).items()}


COMPILES = (pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning"))  # PyTorch of itself


@pytest.mark.parametrize(("name", "network"), [
    *(pytest.param(name, "tiny", marks=COMPILES if name in unet_peers.SLOW_START else ()) for name in INSTALLED),
    *((name, "tiny-dit") for name in INSTALLED if name not in unet_peers.SLOW_START),
])  # fmt: skip
def test_installed_peers_compute_the_same(name, network, prepared):
    packages, make = INSTALLED[name]
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")
    if name == "OpenVINO int8" and not {"avxvnni", "avx512vnni", "neondot"} & set(kernels.supported()):
        pytest.skip("without a dot product of bytes it adds pairs of products in 16 bits, with saturation")
    for batch in (1, 3) if name not in unet_peers.SLOW_START else (3,):
        case = Case(prepared.folder, network, batch)
        if name == "PyTorch channels-last" and network == "tiny-dit":
            with pytest.raises(Unfit, match="in either layout"):
                make(case, 2)
            continue
        engine = make(case, 2)
        apart, allowed = unet_turn.difference(name, case, engine.read(engine.run()))
        assert apart <= allowed and (apart < 0.1 or name not in unet_peers.INTEGERS)
        if name.endswith("int8"):  # all of them, and no one fell back to floats
            first, of, last = engine.note.split()[:3]
            assert of == "of" and int(first) == int(last) > (15 if network == "tiny" else 9)
        elif engine.note:
            assert engine.note.startswith("0 of")
