"""The verbs that tell of a quantized model: what runs in integers, and the same for other runtimes."""

import json
import sys

import pytest
import toys

from refquant import cli
from refquant.deploy import lower
from refquant.deploy.inventory import inventory
from refquant.deploy.plan import plan
from refquant.nn.layers import Conv2d
from refquant.quant.calibrate import Calibration
from refquant.quant.methods import METHODS


@pytest.fixture(scope="module")
def files(calibration, tmp_path_factory):
    """Quantized models by name: all in integers, with tables, with float layers; and their float model."""
    folder = tmp_path_factory.mktemp("models")
    transformer = Calibration(toys.tiny_dit(), toys.CALIBRATION)
    made = {
        "dit": METHODS["nearest"](toys.tiny_session(transformer, weight_bits=4)),
        "whole": METHODS["nearest"](toys.tiny_session(calibration, weight_bits=4)),
        "tables": METHODS["tfmq"](toys.tiny_session(calibration, weight_bits=4), tiar_iterations=2),
        "partly": METHODS["nearest"](toys.tiny_session(calibration, coverage="layers")),
    }
    for name, model in made.items():
        model.save(folder / f"{name}.safetensors")
    calibration.model.save(folder / "float.safetensors")
    return made, folder


@pytest.fixture
def run(files, capsys, monkeypatch):
    """Run a verb in the folder of the models: exit code, output, errors."""
    monkeypatch.chdir(files[1])

    def call(*arguments):
        code = cli.main([*map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_info_says_what_runs_in_integers(run, files):
    model = files[0]["whole"]
    code, out, _ = run("info", "whole.safetensors", "--json", "i.json")
    assert code == 0
    found = json.loads((files[1] / "i.json").read_text())["integers"]
    program = lower(model)
    entries = inventory(program)
    assert [op["name"] for op in found["operations"]] == [entry.name for entry in entries]
    assert found["weight_bytes"] == sum(e.weight_bytes for e in entries)
    assert found["buffer_bytes"] == plan(program, 1)[1]
    lines = out.splitlines()
    kinds = {entry.what: [e for e in entries if e.what == entry.what] for entry in entries}
    heads = ("in integers", "float islands")
    integers, floats = (next(i for i, line in enumerate(lines) if line.startswith(head)) for head in heads)
    for what, group in kinds.items():
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{what}  "))
        assert lines[at].removeprefix(what).split()[0] == str(len(group))
        assert (integers < at < floats) == group[0].integer
    assert "  group norm, to codes: 4 q" in lines  # and k's and v's: their ranges agree
    assert len(lines) < 60 and max(len(line) for line in lines[integers:]) <= 120


def test_info_lists_every_layer_where_asked(run, files):
    code, out, _ = run("info", "whole.safetensors", "--layers")
    assert code == 0
    first = {line.split("  ")[0] for line in out.splitlines()}
    assert {entry.name for entry in inventory(lower(files[0]["whole"]))} <= first


def test_info_says_why_a_model_does_not_run_in_integers(run, files):
    code, out, _ = run("info", "partly.safetensors", "--json", "i.json")
    assert code == 0 and "runs in integers:      no. " in out and "product.q has no integer form" in out
    assert json.loads((files[1] / "i.json").read_text())["integers"] is None


def test_export_without_onnx_names_the_remedy(run, monkeypatch, files):
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, out, err = run("export", "whole.safetensors", "--onnx", "x.onnx", "--quiet")
    assert code == 2 and out == "" and "pip install refquant[onnx]" in err
    assert not (files[1] / "x.onnx").exists()


def test_export_refuses_what_it_cannot_do_before_any_work(run):
    code, out, err = run("export", "float.safetensors", "--onnx", "x.onnx")
    assert code == 2 and out == "" and "holds a unet" in err and "Quantize it first" in err
    code, out, err = run("export", "whole.safetensors", "--onnx", "no/such/x.onnx")
    assert code == 2 and out == "" and "there is no folder no/such" in err


def test_export_writes_a_network_and_says_what_runtimes_make_of_it(run, files):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    remarks = {
        ("whole",): "ONNX Runtime multiplies integers with --round-results only",
        ("whole", "--round-results"): None,
        ("tables",): "scales depend on the step",
        ("tables", "--step", "1", "--round-results"): None,
        ("partly",): "weights have zero points of their own: OpenVINO",
    }
    for (name, *options), remark in remarks.items():
        code, out, _ = run("export", f"{name}.safetensors", "--onnx", "x.onnx", *options)
        assert code == 0
        network = onnx.load(files[1] / "x.onnx")
        onnx.checker.check_model(network, full_check=True)
        convolutions = sum(isinstance(layer.layer, Conv2d) for layer in files[0][name].layers.values())
        inputs = "x -> eps" if "--step" in options else "x, step -> eps"
        first, second, *rest = out.splitlines()
        assert first.endswith(f"ONNX opset 21, {inputs}")
        assert second == f"{convolutions} of {convolutions} convolutions multiply codes by codes"
        assert rest == [] if remark is None else remark in rest[-1]
        assert any(n.name.endswith(".result") for n in network.graph.node) == ("--round-results" in options)
    code, out, _ = run("export", "dit.safetensors", "--onnx", "x.onnx")
    first, second = out.splitlines()
    assert code == 0 and first.endswith("x, y, step -> eps")
    assert second == "14 of 14 matrix products multiply codes by codes"
    code, out, err = run("export", "dit.safetensors", "--onnx", "x.onnx", "--round-results")
    assert code == 2 and out == "" and "--round-results is for convolutions" in err
    code, out, err = run("export", "whole.safetensors", "--onnx", "x.onnx", "--step", 4)
    assert code == 2 and "step is 4" in err and "from 0 (the noisiest) to 3" in err
