"""refquant compare: the table of methods times bits, from calibrations that are kept."""

import json

import numpy as np
import pytest
from toys import TINY_DIT, tiny_dit, tiny_session

from refquant.cli import main
from refquant.commands.compare import parse_bits, parse_method, split_coverage
from refquant.compare import HEADER, Reference, cells, markdown, temporal_errors
from refquant.diffusion.model import load_model
from refquant.errors import RangeError, UnknownNameError
from refquant.evaluate import Request
from refquant.nn.dit import DiTConfig
from refquant.quant.methods import METHODS
from refquant.quant.temporal import features, quantized_features

SMALL = ["--bits", "W4A8", "-n", "2", "--runs", "2", "--steps", "2", "--images", "2", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One comparison: a method of ranges, and one with a table for every step."""
    out = tmp_path_factory.mktemp("compare") / "found"
    methods = "nearest,tfmq:fsc=temporal:tiar_iterations=2"
    effort = ["--iterations", "1", "--states", "2"]
    assert main(["compare", "--methods", methods, *SMALL, *effort, "--out", str(out)]) == 0
    return out, methods, effort


def test_all_numbers_are_there(folder):
    rows = json.loads((folder[0] / "comparison.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["float32", "nearest", "tfmq:fsc=temporal:tiar_iterations=2"]
    for row in rows[1:]:
        assert all(len(row[key]) == 2 for key in ("psnr_db", "frechet", "recognised", "per_step_mse"))
        # of two images the median is the mean of both: never below what their mean error gives (Jensen)
        assert all(m >= d for m, d in zip(row["psnr_median_db"], row["psnr_db"], strict=True))
        assert len(row["feature_cosine_by_t"]) == 1000 and 0 < row["feature_squared"] <= row["feature_squared_worst"]
        assert row["seconds"]["all"] >= sum(v for k, v in row["seconds"].items() if k != "all")
        assert row["peak_memory_bytes"] > 10e6 and row["coverage"].startswith("full")
    assert rows[1]["bit_operations"] == rows[2]["bit_operations"] < 32 * 32 * 113.5e6 / 20
    for name in ("comparison.md", "pictures.png", "trajectory.png", "features.png"):
        assert (folder[0] / name).stat().st_size > 500


def test_a_calibration_is_made_once(folder):
    out, methods, effort = folder
    made = {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    assert len(made) == 2
    assert main(["compare", "--methods", methods, *SMALL, *effort, "--out", str(out)]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")} == made


def test_table_has_a_cell_for_every_column():
    bare = {"method": "float32", "bits": "W32A32", "bytes": 4_000_000}
    assert len(cells(bare)) == len(HEADER) and cells(bare)[2] == "-"
    text = markdown([bare], "caption")
    assert text.startswith("caption\n") and "| float32 | W32A32 | - |" in text


@pytest.mark.parametrize("text", ["W4", "4/8", "W4A8b", ""])
def test_bits_are_written_like_w4a8(text):
    with pytest.raises(RangeError, match="W4A8"):
        parse_bits(text)
    assert parse_bits("W4A32") == (4, 32)


def test_methods_and_their_options():
    assert parse_method("tfmq:fsc=temporal:time_steps=20") == ("tfmq", ("fsc=temporal", "time_steps=20"))
    with pytest.raises(UnknownNameError, match="nearest"):
        parse_method("no-such")


def test_what_a_calibration_says_is_passed_on(tmp_path, capsys):
    out = str(tmp_path / "found")
    assert main(["compare", "--methods", "nearest:no=1", *SMALL, "--out", out]) == 2
    assert "no such option" in capsys.readouterr().err


def test_another_package_in_the_current_folder_is_not_taken(tmp_path, monkeypatch, capsys):
    """Such as a source tree whose C core is not compiled."""
    (tmp_path / "refquant").mkdir()
    (tmp_path / "refquant" / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--methods", "nearest", *SMALL, "--out", "found"]) == 0
    assert "nearest" in capsys.readouterr().out


# ------------------------------------------------------------------ conditional transformers


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """Path of a transformer of three classes that draws 28x28 pixels, and what comparing on it gives."""
    folder = tmp_path_factory.mktemp("compare")
    path, out = folder / "tiny.safetensors", folder / "found"
    tiny_dit(DiTConfig(28, 1, patch=14, width=8, depth=1, heads=2, classes=3), timesteps=40).save(path)
    methods = "nearest,tqdit:groups=1,tqdit:groups=1:coverage=released,tfmq:tiar_iterations=2"
    effort = ["--iterations", "1", "--states", "4", "--class", "2,0", "--guidance", "2"]
    arguments = ["compare", "--model", str(path), "--methods", methods, *SMALL, *effort, "--out", str(out)]
    assert main(arguments) == 0
    return path, json.loads((out / "comparison.json").read_text())


def test_a_transformer_has_the_same_table(conditional):
    """Requested classes and guidance; each row's own coverage; a chain that is kept in float has no error at all."""
    _, found = conditional
    _, nearest, full, released, tfmq = found["rows"]
    assert "guidance 2," in found["caption"] and "requested digits" in found["caption"]
    assert all(len(row["recognised"]) == 2 and len(cells(row)) == len(HEADER) for row in found["rows"])
    assert full["coverage"].startswith("full") and released["coverage"].startswith("released")
    assert released["method"] == "tqdit:groups=1:coverage=released" and released["options"]["groups"] == 1
    assert released["feature_squared"] == 0 < full["feature_squared"]
    assert released["feature_cosine_worst"] > 0.9999 > nearest["feature_cosine_worst"]
    assert len(tfmq["feature_cosine_by_t"]) == 40 and tfmq["feature_squared_unseen"] > 0
    assert released["bytes"] > full["bytes"] and released["bit_operations"] > full["bit_operations"]


def test_references_draw_what_is_requested(conditional):
    """The images of the request, and others for other classes or guidance."""
    model = load_model(str(conditional[0]))

    def images(y, guidance):
        request = Request(np.array(y), guidance)
        return Reference.draw(model, 2, [5], 3, request=request).runs[5].images

    base = images([0, 1], 1)
    np.testing.assert_array_equal(base, images([0, 1], 1))
    other = images([0, 2], 1)
    np.testing.assert_array_equal(base[0], other[0])
    assert not np.array_equal(base[1], other[1]) and not np.array_equal(base, images([0, 1], 3))


def test_temporal_errors_are_over_every_class(monkeypatch):
    """By the loops, cut into pieces that do not divide T."""
    model = tiny_dit(TINY_DIT)
    quantized = METHODS["nearest"](tiny_session(model, weight_bits=3))
    monkeypatch.setattr("refquant.compare.PIECE", 4 * 7)
    found = temporal_errors(quantized, model)
    squared = np.zeros((20, 4))
    for t in range(20):
        for k in range(4):
            got, want = (f(m, np.array([t]), np.array([k])) for f, m in
                         ((quantized_features, quantized), (features, model.network)))  # fmt: skip
            squared[t, k] = sum(np.square(got[n].astype(float) - want[n]).sum() for n in want)
    visited = np.isin(np.arange(20), quantized.timesteps())
    np.testing.assert_allclose(found["feature_squared"], squared.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["feature_squared_visited"], squared[visited].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["feature_squared_unseen"], squared[~visited].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["feature_squared_worst"], squared.max(), rtol=1e-5)
    assert found["feature_worst_t"] == squared.max(axis=1).argmax() and len(found["feature_cosine_by_t"]) == 20


def test_a_coverage_of_its_own():
    assert split_coverage(("coverage=released", "groups=1"), "full") == ("released", ["groups=1"])
    assert split_coverage(("groups=1",), "full") == ("full", ["groups=1"])
