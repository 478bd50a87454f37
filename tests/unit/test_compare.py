"""refquant compare: the table of methods times bits, from calibrations that are kept."""

import json

import pytest

from refquant.cli import main
from refquant.commands.compare import parse_bits, parse_method
from refquant.compare import HEADER, cells, markdown
from refquant.errors import RangeError, UnknownNameError

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
        assert len(row["psnr_db"]) == len(row["frechet"]) == 2 and len(row["per_step_mse"]) == 2
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
