"""Exercises in finding a property: the author's test misses the slip, the law of the solution catches it."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tutorials" / "exercises" / "properties"
EXERCISES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "verdict")


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a script as a reader does; what it printed."""

    def run(path):
        monkeypatch.syspath_prepend(str(path.parent))  # where Python looks first for what a script imports
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise_hides_its_slip_from_its_author(name, run):
    assert run(FOLDER / f"{name}.py").splitlines() == [
        "the author's test passes",
        "my_property holds for the wrong implementation, too. Which inputs does it never try?",
    ]


@pytest.mark.parametrize("name", EXERCISES)
def test_solution_catches_it_and_spares_the_library(name, run):
    assert " catches it:\n" in run(FOLDER / "solutions" / f"{name}.py")


@pytest.mark.parametrize("name", EXERCISES)
def test_solution_names_a_law_that_exists(name):
    text = (FOLDER / "solutions" / f"{name}.py").read_text(encoding="utf-8")
    there = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in re.findall(r"tests/[\w/]+\.py", text))
    laws = re.search(r"^In the tests: (.+?)\n\n", text, re.MULTILINE | re.DOTALL)[1]
    named = re.findall(r"`(\w+)`", laws)
    assert named and all(f"def {law}(" in there for law in named)


def test_verdict_tells_three_cases_apart(capsys):
    verdict = runpy.run_path(str(FOLDER / "verdict.py"))["verdict"]

    def refuses_all(implementation):
        raise AssertionError("nothing pleases me")

    def refuses_none(implementation):
        pass

    def is_even(implementation):
        assert implementation % 2 == 0

    assert [verdict(law, 3, 2) for law in (refuses_all, refuses_none, is_even)] == [False, False, True]
    printed = capsys.readouterr().out
    for words in ("refuses_all is too strict", "refuses_none holds for the wrong", "is_even catches it"):
        assert words in printed


def test_index_lists_every_exercise():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \d \| \[(\w+)\.py\]", index, re.MULTILINE)) == EXERCISES
    for target in re.findall(r"\]\(([^)]+)\)", index):
        page = (FOLDER / target).resolve()
        script = page.parent.parent / f"{page.stem}.py"  # a page that is yet to be rendered
        assert page.exists() or script.exists(), target
