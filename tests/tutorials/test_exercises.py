"""The exercises that are to be mended: the property fails on the program as it is, and holds for the mended one."""

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "tutorials" / "exercises"
EXERCISES = sorted(path.stem for path in FOLDER.glob("*.py"))
LINE = "# --- the property: leave it as it is ---"

# What to change, and into what. Not printed where a student would stumble over it.
MENDED = {
    "border_means_zero": ("(1, 1), (0, 0)))", "(1, 1), (0, 0)), constant_values=zero_point)"),
    "every_code_is_reached": ("np.float32(scale)), 0, 255) + zero_point", "np.float32(scale)) + zero_point, 0, 255)"),
    "gradients_add_up": ("parent.grad = slope", "parent.grad += slope"),
    "last_step_is_quiet": ("mean + np.sqrt(beta)", "mean + (t > 0) * np.sqrt(beta)"),
    "learning_starts_at_the_float_weight": (
        "np.zeros_like(w)",
        "-np.log((ZETA - GAMMA) / (w / scale - np.floor(w / scale) - GAMMA) - 1)",
    ),
    "sums_are_exact": (".astype(np.int16)", ""),
    "ties_do_not_drift": ("np.floor(x + 0.5)", "np.rint(x)"),
    "zero_has_a_code": ("float(x.min()), float(x.max())", "min(float(x.min()), 0.0), max(float(x.max()), 0.0)"),
}


def test_every_exercise_can_be_mended():
    assert EXERCISES == sorted(MENDED)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a program that is wrong may overflow
@pytest.mark.parametrize("name", EXERCISES)
def test_property_fails_on_the_program_and_holds_when_it_is_mended(name, tmp_path, capsys):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    with pytest.raises(AssertionError, match=r"\w+ \w+"):
        runpy.run_path(str(FOLDER / f"{name}.py"))
    assert "holds" not in capsys.readouterr().out
    program, line, law = text.partition(LINE)
    before, after = MENDED[name]
    assert program.count(before) == 1
    mended = tmp_path / "mended.py"
    mended.write_text(program.replace(before, after) + line + law, encoding="utf-8")
    runpy.run_path(str(mended))
    assert capsys.readouterr().out.startswith("holds: ")


def test_index_lists_every_exercise():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in EXERCISES:
        assert f"]({name}.py)" in index, f"exercises/README.md does not list {name}.py"
    for target in re.findall(r"\]\(([^)]+)\)", index):
        page = (FOLDER / target).resolve()
        script = page.parent.parent / f"{page.stem}.py"  # a page that is yet to be rendered
        assert page.exists() or script.exists(), target
