"""The command line: what each verb prints and writes, exit codes, and one clear line for every bad input."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from toys import TINY, tiny_model

import refquant.commands.demo
import refquant.commands.train
from refquant import cli, io, kernels
from refquant.diffusion.model import asset_names
from refquant.nn.dit import DiTConfig
from refquant.nn.networks import CONFIGS
from refquant.nn.unet import UNetConfig
from refquant.viz import read_png_text

shipped = pytest.mark.skipif(
    not {"mnist-unet", "mnist-classifier"} <= set(asset_names()), reason="no checkpoints in refquant/assets"
)


@pytest.fixture
def tiny(tmp_path):
    """Path of a tiny float model with random weights."""
    path = tmp_path / "tiny.safetensors"
    tiny_model().save(path)
    return path


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder; return exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def refused(result, *words):
    """Exit code 2, nothing on stdout, one line on stderr with these words and no traceback."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("refquant ")]
    assert code == 2 and out == "" and "Traceback" not in err
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0], lines[0]
    return True


def test_help_of_every_verb_ends_with_an_example_that_parses(run):
    for verb in cli.VERBS:
        name = verb.__name__.rsplit(".", 1)[1]
        code, out, _ = run(name, "--help")
        assert code == 0
        example = out.rstrip().splitlines()[-1].split()
        assert example[:2] == ["refquant", name]
        cli.parser().parse_args(example[1:])


def test_shared_options_mean_the_same(run):
    for name in ("demo", "sample", "train", "quantize", "evaluate", "bench"):
        _, out, _ = run(name, "--help")
        for option in ("--seed", "--threads", "--isa", "--quiet", "--debug"):
            assert option in out, (name, option)


def test_sample_is_reproducible_and_its_seed_matters(run, tiny):
    for name, seed in (("a.npy", 1), ("b.npy", 1), ("c.npy", 2)):
        code, out, _ = run("sample", tiny, "-n", 3, "--steps", 4, "--seed", seed, "--out", name)
        assert code == 0 and name in out
    a, b, c = (np.load(f"{x}.npy") for x in "abc")
    assert a.shape == (3, 1, 8, 8) and a.dtype == np.float32 and abs(a).max() <= 1
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_sample_writes_its_parameters_into_the_picture(run, tiny):
    run("sample", tiny, "-n", 2, "--steps", 3, "--eta", 0.5, "--seed", 9, "--out", "grid.png")
    text = read_png_text("grid.png")
    assert text["seed"] == "9" and text["steps"] == "3" and text["eta"] == "0.5" and "tiny" in text["model"]


def test_sample_ddpm_takes_all_steps(run, tiny):
    code, out, _ = run("sample", tiny, "-n", 1, "--sampler", "ddpm", "--variance", "beta", "--out", "x.npy")
    assert code == 0 and "ddpm 20 steps" in out


def test_quantize_then_sample_and_info(run, tiny):
    common = ("--images", 2, "--steps", 4)
    assert run("quantize", tiny, "--weight-bits", 4, "--out", "q.safetensors", *common)[0] == 0
    code, out, _ = run("info", "q.safetensors")
    assert code == 0 and '"weight_bits": 4' in out and '"method": "nearest"' in out
    assert run("sample", "q.safetensors", "-n", 2, "--steps", 4, "--out", "q.npy")[0] == 0
    run("sample", tiny, "-n", 2, "--steps", 4, "--out", "f.npy")
    assert not np.array_equal(np.load("q.npy"), np.load("f.npy"))
    assert refused(run("quantize", "q.safetensors", *common), "quantized", "unet")


def test_train_writes_what_sample_reads(run):
    options = ("--data", "shapes", "--steps", 2, "--batch", 4, "--chunk", 2, "--out", "m.safetensors")
    code, out, _ = run("train", "mnist-unet", *options)
    assert code == 0 and "2 steps of 4 images" in out
    assert not os.path.exists("m.safetensors.state")  # finished: the state is of no more use
    assert run("sample", "m.safetensors", "-n", 1, "--steps", 1, "--out", "m.npy")[0] == 0
    code, out, _ = run("info", "m.safetensors", "--json", "m.json")
    assert code == 0 and json.loads(Path("m.json").read_text())["data"] == "shapes"


@pytest.fixture
def small(monkeypatch):
    """The name of a network that learns in no time, of images as large as the shapes."""
    monkeypatch.setitem(CONFIGS, "small", UNetConfig(28, 1, 8, (1,), 1, (), 4, 0.0))
    return "small"


def test_train_goes_on_from_another_model(run, small, monkeypatch):
    """--start brings weights, schedule and prediction along, and is remembered by the checksum of its arrays."""
    options = ("--data", "shapes", "--batch", 4, "--chunk", 2)
    first = ("--steps", 2, "--schedule", "linear", "--timesteps", 50, "--prediction", "v", "--out", "a.safetensors")
    assert run("train", small, *options, *first)[0] == 0
    told, original = [], refquant.commands.train.train
    monkeypatch.setattr(
        refquant.commands.train, "train", lambda *a, **k: (told.append((k["start"], k["shift"])), original(*a, **k))[1]
    )
    again = ("--steps", 3, "--rate", 1e-9, "--shift", 3, "--start", "a.safetensors", "--out", "b.safetensors")
    assert run("train", small, *options, *again)[0] == 0
    a, b = io.load("a.safetensors"), io.load("b.safetensors")
    for name, array in a.tensors.items():
        np.testing.assert_allclose(b.tensors[name], array, atol=1e-7)  # three steps of 1e-9
    facts = b.metadata
    assert facts["start"] == a.metadata["data_sha256"] and told == [(facts["start"], 3.0)]
    assert (facts["schedule"], facts["timesteps"], facts["prediction"], facts["shift"]) == ("linear", 50, "v", 3.0)
    assert facts["images_seen"] == 4 * 2 + 4 * 3 and "start" not in a.metadata
    other = ("--steps", 1, "--start", "a.safetensors", "--prediction", "eps", "--out", "c.safetensors")
    assert run("train", small, *options, *other)[0] == 0
    assert io.load("c.safetensors").metadata["prediction"] == "eps"


def test_train_refuses_to_start_from_another_network(run, small, tiny):
    assert refused(run("train", small, "--data", "shapes", "--start", tiny), "is not a small", "it has")
    assert refused(run("train", small, "--data", "shapes", "--start", "no-such-model"), "no-such-model")


@pytest.fixture
def dit(run, monkeypatch):
    """Path of a conditional model, trained for two steps, whose classes differ afterwards."""
    monkeypatch.setitem(CONFIGS, "small-dit", DiTConfig(28, 1, patch=14, width=8, depth=1, heads=2, classes=5))
    options = ("--data", "shapes", "--steps", 2, "--batch", 4, "--prediction", "v", "--out", "dit.safetensors")
    assert run("train", "small-dit", *options)[0] == 0
    found = io.load("dit.safetensors")
    rng = np.random.default_rng(0)
    noisy = {k: a + rng.standard_normal(a.shape).astype(np.float32) for k, a in found.tensors.items()}
    io.save("dit.safetensors", noisy, found.metadata)
    return "dit.safetensors"


def test_classes_are_asked_for(run, dit):
    """--class in turn for the images, by default all in turn; --guidance changes the images of a class."""

    def draw(*options):
        code, _, _ = run("sample", dit, "-n", 6, "--steps", 2, "--out", "x.npy", *options)
        assert code == 0
        return np.load("x.npy")

    all_classes, two, one = draw(), draw("--class", "0,4"), draw("--class", "4")
    same = [[i for i in range(6) if np.allclose(a[i], b[i], atol=1e-4)] for a, b in ((all_classes, two), (two, one))]
    assert same == [[0], [1, 3, 5]]  # 0,1,2,3,4,0 beside 0,4,0,4,0,4 beside 4,4,4,4,4,4
    np.testing.assert_array_equal(draw("--class", "4", "--guidance", 1), one)
    assert np.abs(draw("--class", "4", "--guidance", 3) - one).max() > 1e-3
    np.testing.assert_array_equal(draw("--class", "4", "--guidance", 0), draw("--class", "1", "--guidance", 0))
    run("sample", dit, "-n", 1, "--steps", 2, "--class", 3, "--guidance", 2.5, "--out", "x.png")
    text = read_png_text("x.png")
    assert (text["classes"], text["guidance"]) == ("[3]", "2.5")


def test_classes_that_cannot_be_asked_for(run, tiny, dit):
    for options in (("--class", 1), ("--guidance", 2)):
        assert refused(run("sample", tiny, *options), "unconditional", "--class", "--guidance")
    assert refused(run("sample", dit, "--class", "0,5"), "classes 0 to 4")
    assert refused(run("sample", dit, "--guidance", -1), "guidance is -1", "at least 0")
    code, out, err = run("sample", dit, "--class", "seven")
    assert code == 2 and out == "" and "not a list of whole numbers" in err


@pytest.mark.skipif("mnist-classifier" not in asset_names(), reason="no classifier in refquant/assets")
def test_evaluate_counts_what_was_requested(run, dit, tiny):
    arguments = ("-n", 3, "--runs", 2, "--steps", 2, "--guidance", 2, "--reference", dit, "--json", "e.json")
    code, out, _ = run("evaluate", dit, *arguments)
    assert code == 0 and "sees the digit that was requested, with confidence above 0.9" in out and "guidance 2" in out
    found = json.loads(Path("e.json").read_text())
    pairs = zip(found["recognised"], found["recognised as any"], strict=True)
    assert len(found["recognised"]) == 2 and all(asked <= seen for asked, seen in pairs)
    assert found["guidance"] == 2 and found["psnr_db"] == [float("inf")] * 2
    assert refused(run("evaluate", dit, "-n", 2, "--reference", tiny), "knows 0 classes", "5")


def test_info_describes_the_installation(run):
    code, out, _ = run("info")
    assert code == 0 and "numpy" in out and "blas" in out and "kernel in use" in out


@shipped
def test_demo_prints_a_table_and_writes_a_picture(run, monkeypatch):
    """With less calibration than it has by default."""
    monkeypatch.setattr(refquant.commands.demo, "IMAGES", 2)
    monkeypatch.setattr(refquant.commands.demo, "STATES", 2)
    options = ("-n", 2, "--steps", 2, "--iterations", 1, "--out", "d.png", "--json", "d.json")
    code, out, _ = run("demo", *options)
    assert code == 0
    rows = json.loads(Path("d.json").read_text())["rows"]
    assert [r["bits"] for r in rows] == ["W32A32", "W8A8", "W4A8", "W4A8", "W4A8"]
    assert [r["method"] for r in rows] == ["float32", "nearest", "nearest", "brecq", "tfmq"]
    sizes = [r["size_mb"] for r in rows]
    assert sizes[0] > 3.5 * sizes[1] and sizes[1] > 1.6 * sizes[2]
    assert rows[1]["psnr_db"] > rows[2]["psnr_db"] > 0
    assert all(r["bits"] in out for r in rows) and read_png_text("d.png")["steps"] == "2"
    assert ("computed in integers" in out) == (kernels.active() != "ref")


@shipped
def test_demo_of_a_transformer(run, dit, monkeypatch):
    """Its own methods, in integers where there is a C core."""
    monkeypatch.setattr(refquant.commands.demo, "IMAGES", 4)
    monkeypatch.setattr(refquant.commands.demo, "STATES", 40)
    options = ("-n", 3, "--steps", 10, "--iterations", 1, "--guidance", 1.5, "--out", "d.png", "--json", "d.json")
    code, out, _ = run("demo", "--model", dit, *options)
    assert code == 0 and "requested digit, guidance 1.5" in out
    assert ("computed in integers" in out) == (kernels.active() != "ref")
    rows = json.loads(Path("d.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["float32", "nearest", "nearest", "tqdit", "tfmq"]
    assert all(0 <= r["recognised"] <= 1 for r in rows) and read_png_text("d.png")["model"] == "dit"
    assert refused(run("demo", dit, "--class", 5), "classes 0 to 4")


def test_a_model_is_given_by_place_or_by_name():
    parse = cli.parser().parse_args
    for verb in ("compare", "demo"):
        asked = [[verb], [verb, "a"], [verb, "--model", "b"]]
        assert [parse(words).model for words in asked] == ["mnist-unet", "a", "b"]


@shipped
def test_evaluate_prints_spreads(run):
    arguments = ("-n", 3, "--runs", 2, "--steps", 2, "--reference", "mnist-unet", "--json", "e.json")
    code, out, _ = run("evaluate", "mnist-unet", *arguments)
    assert code == 0 and "±" in out and "not the Inception FID" in out
    found = json.loads(Path("e.json").read_text())
    assert len(found["frechet"]) == len(found["recognised"]) == 2 and found["recognised as any"] == []
    assert found["psnr_db"] == [float("inf")] * 2 and "sees a digit, with" in out


# ---------------------------------------------------------------- bad input


def test_unknown_names(run, tmp_path):
    assert refused(run("sample", "no-such-model"), "no-such-model", "refquant train")
    assert refused(run("sample", tmp_path), "no model or file")
    assert refused(run("train", "--data", "no-such-data"), "no-such-data", "mnist")
    assert refused(run("info", "--isa", "no-such-isa"), "no-such-isa", "ref")
    assert "invalid choice" in run("train", "dit-xl-2")[2]  # it learns variances, which is not taught
    for arguments in (("train", "no-such-network"), ("quantize", "--method", "no-such-method"), ("no-such-verb",)):
        code, out, err = run(*arguments)  # argparse lists the choices itself
        assert code == 2 and out == "" and "Traceback" not in err and "no-such" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("-n", 0), ("number of images is 0", "at least 1")),
        (("--steps", 0), ("steps is 0", "1 to 20")),
        (("--steps", 21), ("steps is 21", "1 to 20")),
        (("--eta", 1.5), ("eta is 1.5",)),
        (("--threads", 0), ("threads is 0",)),
        (("--seed", -1), ("--seed is -1",)),
        (("--out", "x.jpg"), (".png", ".npy")),
        (("--out", "missing/x.png"), ("no folder", "missing")),
    ],
)
def test_numbers_and_paths_out_of_range(run, tiny, arguments, words):
    assert refused(run("sample", tiny, *arguments), *words)


@pytest.mark.parametrize(
    "option, value",
    [
        ("--steps", 0),
        ("--batch", 0),
        ("--rate", 0),
        ("--warmup", -1),
        ("--decay", -1),
        ("--average", 1),
        ("--shift", 0),
        ("--shift", -3),
    ],
)
def test_recipes_that_cannot_train(run, option, value):
    assert refused(run("train", "--data", "shapes", option, value), f"{option[2:]} is {value}", "it must be")
    assert not list(Path().glob("model.*"))


def test_bits_out_of_range(run, tiny):
    assert refused(
        run("quantize", tiny, "--weight-bits", 1, "--images", 1, "--steps", 1), "weight bits are 1", "2 to 8"
    )
    assert refused(run("quantize", tiny, "--input-bits", 9, "--images", 1, "--steps", 1), "input bits are 9", "2 to 8")


def test_quantize_refuses_before_it_says_what_it_does(run, tiny):
    """One line on standard error, as everywhere."""
    for arguments in (("--weight-bits", 9), ("--images", 0), ("--states", 0), ("--iterations", -1)):
        code, out, err = run("quantize", tiny, *arguments)
        assert code == 2 and out == "" and err.count("\n") == 1, err


def test_quantize_says_which_phase_runs(run, tiny):
    """Where standard error is no terminal, too; nothing with --quiet."""
    common = ("--images", 2, "--steps", 4, "--out", "q.safetensors")
    _, _, err = run("quantize", tiny, *common)
    remarks = ["nearest: weights", "nearest: activations", "recording 2 trajectories of 4 steps"]
    assert err.splitlines()[1:] == remarks
    assert run("quantize", tiny, *common, "--quiet")[2] == ""


def test_info_shows_what_a_method_looked_at(run, tiny):
    common = ("--images", 2, "--steps", 4, "--states", 3, "--iterations", 1, "--out", "q.safetensors")
    for name, shown in (("nearest", []), ("ptq4dm", ["states"]), ("brecq", ["states", "sampling", "iterations"])):
        assert run("quantize", tiny, "--method", name, *common)[0] == 0
        out = run("info", "q.safetensors")[1]
        assert [word for word in ("states", "sampling", "iterations") if f'"{word}"' in out] == shown


def test_damaged_checkpoints(run, tiny):
    whole = tiny.read_bytes()
    flipped = bytearray(whole)
    flipped[-7] ^= 4
    for content in (whole[: len(whole) // 2], bytes(flipped), b"", b"\x80\x04\x95 pickle", b"PK\x03\x04 zip"):
        tiny.write_bytes(content)
        for verb in ("sample", "quantize", "info"):
            if verb == "info" and content == bytes(flipped):
                continue  # reads the header only, which is whole
            assert refused(run(verb, tiny), "tiny.safetensors")


def test_weights_that_do_not_fit_the_configuration(run, tiny):
    found = io.load(tiny)
    for network in ({**TINY.to_json(), "channels": 16}, {**TINY.to_json(), "blocks": 2}, {"channels": 8}):
        io.save(tiny, found.tensors, {**found.metadata, "network": network})
        assert refused(run("sample", tiny))


def test_nan_weights_are_named(run, tiny, monkeypatch):
    found = io.load(tiny)
    found.tensors["conv_in.bias"][0] = np.nan
    with monkeypatch.context() as patch:
        patch.setattr(io, "_check_storable", lambda *_: None)  # a file that another program wrote
        io.save(tiny, found.tensors, found.metadata)
    assert refused(run("sample", tiny), "conv_in.bias", "NaN")


def test_missing_data_folder(run, monkeypatch, tmp_path):
    monkeypatch.setenv("REFQUANT_DATA", str(tmp_path / "nowhere"))
    assert refused(run("train", "mnist-unet", "--data", "mnist"), "nowhere")


def test_full_disk_leaves_nothing_half_written(run, tiny, monkeypatch, tmp_path):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "old.npy").write_bytes(b"old")
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(os, "fsync", full)
    for arguments in (
        ("sample", tiny, "-n", 1, "--steps", 1, "--out", "old.npy"),
        ("sample", tiny, "-n", 1, "--steps", 1, "--out", "new.png"),
        ("quantize", tiny, "--images", 1, "--steps", 1, "--out", "q.safetensors"),
        ("train", "--data", "shapes", "--steps", 1, "--batch", 2, "--out", "m.safetensors"),
    ):
        assert refused(run(*arguments), "No space left")
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "old.npy").read_bytes() == b"old"


def test_a_classifier_draws_nothing(run):
    if "mnist-classifier" not in asset_names():
        pytest.skip("no classifier in refquant/assets")
    assert refused(run("sample", "mnist-classifier"), "classifier")


def test_debug_shows_the_traceback(tiny):
    with pytest.raises(Exception, match="no-such-model"):
        cli.main(["sample", "no-such-model", "--debug"])
