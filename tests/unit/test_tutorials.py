"""Tutorials as files: cells, headers, notebooks, the verb, and their place in an installed package."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import refquant.commands.tutorials
from refquant import cli, tutorials
from refquant.errors import RefquantError, UnknownNameError

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """# %% [markdown]
# # 07 A title
#
# *A sentence.*
#
# **Run time**: 20 s on two cores. **Before this**: [05](05_a.md) and
# [06](06_b.md).
#
# ## A section

# %%
x = 1

# %% no mark inside of a string or comment: '# %%'
y = 2  # %%


# %% Figure: a caption with [brackets], $x$ and: colons
z = "é"
"""


def test_cells():
    found = tutorials.cells(SCRIPT)
    assert [(c.markdown, c.title, c.line) for c in found] == [
        (True, "", 2),
        (False, "", 12),
        (False, "no mark inside of a string or comment: '# %%'", 15),
        (False, "Figure: a caption with [brackets], $x$ and: colons", 19),
    ]
    assert found[0].text.startswith("# 07 A title\n\n*A sentence.*\n") and found[0].text.endswith("## A section")
    assert found[2].text == "y = 2  # %%"
    lines = SCRIPT.splitlines()
    assert all(lines[c.line - 1].removeprefix("# ") == c.text.splitlines()[0] for c in found)


@pytest.mark.parametrize("text", ["", "x = 1\n# %%\n", "# %% [markdown]\nno comment\n", "# %% [markdown]\n#no blank\n"])
def test_what_is_no_tutorial(text):
    with pytest.raises(RefquantError):
        tutorials.cells(text)


def test_header(tmp_path):
    path = tmp_path / "07_name.py"
    path.write_text(SCRIPT, encoding="utf-8")
    found = tutorials.read(path)
    assert (found.number, found.title, found.summary, found.seconds) == ("07", "A title", "A sentence.", 20)
    assert found.before == "[05](05_a.md) and\n[06](06_b.md)"
    assert found.page == tmp_path / "rendered" / "07_name.md"


@pytest.mark.parametrize("old, new", [("# 07", "# 08"), ("*A", "A"), ("20 s", "some s"), ("Run time", "Time")])
def test_bad_header(tmp_path, old, new):
    path = tmp_path / "07_name.py"
    path.write_text(SCRIPT.replace(old, new), encoding="utf-8")
    with pytest.raises(RefquantError, match=r"07_name\.py: the first cell must begin"):
        tutorials.read(path)


def test_find():
    first = tutorials.find("00")
    assert first == tutorials.find("0") == tutorials.find("00_first_picture") == tutorials.tutorials()[0]
    with pytest.raises(UnknownNameError, match="'99'.*00_first_picture"):
        tutorials.find("99")


def test_notebook():
    """Structure by the notebook format's rules; the code, together, is that of the script."""
    made = tutorials.notebook(SCRIPT)
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    assert [c["cell_type"] for c in made["cells"]] == ["markdown", "code", "code", "code"]
    assert len({c["id"] for c in made["cells"]}) == 4
    for cell in made["cells"]:
        extra = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | extra
    namespace = {}
    exec("\n".join(c["source"] for c in made["cells"] if c["cell_type"] == "code"), namespace)
    assert (namespace["x"], namespace["y"], namespace["z"]) == (1, 2, "é")
    assert made["cells"][3]["source"].startswith("# Figure: a caption with")


# --- the verb ---


def call(capsys, *arguments):
    code = cli.main(["tutorials", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_list(capsys):
    code, out, err = call(capsys)
    assert code == 0 and err == ""
    for tutorial in tutorials.tutorials():
        assert f"{tutorial.number}  {tutorial.title} ({tutorial.seconds} s)\n    {tutorial.summary}\n" in out


def test_copy(capsys, tmp_path):
    code, out, _ = call(capsys, "00", "--copy", tmp_path)
    script = tmp_path / "00_first_picture.py"
    assert code == 0 and str(script) in out
    assert script.read_bytes() == tutorials.find("00").path.read_bytes()

    code, out, _ = call(capsys, "0", "--copy", tmp_path, "--notebook")
    made = tmp_path / "00_first_picture.ipynb"
    assert code == 0 and str(made) in out
    assert json.loads(made.read_text(encoding="utf-8")) == tutorials.notebook(script.read_text(encoding="utf-8"))

    script.write_text("my work", encoding="utf-8")
    code, out, err = call(capsys, "00", "--copy", tmp_path)
    assert (code, out) == (2, "") and "exists" in err and script.read_text(encoding="utf-8") == "my work"


def test_open(capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(refquant.commands.tutorials.webbrowser, "open", lambda url: opened.append(url) or True)
    code, _, _ = call(capsys, "00", "--open")
    assert code == 0 and opened == [tutorials.find("00").page.as_uri()]
    monkeypatch.setattr(refquant.commands.tutorials.webbrowser, "open", lambda url: False)
    code, out, err = call(capsys, "00", "--open")
    assert (code, out) == (2, "") and str(tutorials.find("00").page) in err


def test_run_writes_figures(capsys, monkeypatch, tmp_path):
    """All that is open when the script shows, and what it prints is printed."""
    script = tmp_path / "07_name.py"
    shown = "plt.figure(); plt.figure(); plt.show(); plt.figure(); plt.show(); print('done')"
    script.write_text(f"{SCRIPT}\nimport matplotlib.pyplot as plt\n{shown}\n", encoding="utf-8")
    monkeypatch.setattr(refquant.commands.tutorials, "find", lambda name: tutorials.read(script))
    by_number, own = call(capsys, "07", "--run", tmp_path), call(capsys, script, "--run", tmp_path)
    code, out, _ = own
    assert by_number[1].endswith(out)  # which first says what it runs
    made = [tmp_path / f"07_name_{i}.png" for i in (1, 2, 3)]
    assert code == 0 and out.splitlines()[-4:] == [*(f"figure: {path}" for path in made), "done"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made) and len(list(tmp_path.glob("*.png"))) == 3


CHANGED = """\
import numpy as np
for i in range(2):
    assert i == 0, "the second time"
np.testing.assert_array_equal([1],
                              [2])
print("the end")
"""


def test_a_changed_script_tells_which_claims_fail(capsys, tmp_path):
    """And goes on; figures of an earlier run, and only those, are gone."""
    script = tmp_path / "mine.py"
    script.write_text(CHANGED, encoding="utf-8")
    old = [tmp_path / f"{name}.png" for name in ("mine_1", "mine_12", "mine_x", "mine", "other_1")]
    for path in old:
        path.touch()
    code, out, _ = call(capsys, script, "--run", tmp_path)
    assert code == 0 and out.splitlines() == [
        'claim no longer holds, mine.py line 3: assert i == 0, "the second time"',
        "claim no longer holds, mine.py line 4: np.testing.assert_array_equal([1],",
        "the end",
    ]
    assert [path.exists() for path in old] == [False, False, True, True, True]


def test_a_script_that_is_no_python(capsys, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("x = 1\nx = = 2\n", encoding="utf-8")
    code, out, err = call(capsys, script, "--run", tmp_path)
    assert (code, out) == (2, "") and "mine.py, line 2: invalid syntax" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, word",
    [(["99"], "99"), (["--open"], "which"), (["00", "--notebook"], "--copy"), (["00", "--copy", "none"], "none"),
     (["00", "--run", "none"], "none"), (["--run", "."], "which"), (["mine.py"], "--run"),
     (["mine.py", "--run", "."], "no such file"), (["mine.py", "--run", ".", "--copy", "."], "copied")],
)
def test_bad_usage(capsys, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "") and word in err and err.count("\n") == 1


# --- an installed package ---


def test_installed_package_finds_its_own(tmp_path):
    """Not a folder called tutorials beside it, which belongs to somebody else."""
    for name in ("__init__.py", "_version.py", "errors.py", "tutorials.py"):
        target = tmp_path / "refquant" / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((ROOT / "refquant" / name).read_bytes())
    for folder in (tmp_path / "tutorials", tmp_path / "refquant" / "assets" / "tutorials"):
        folder.mkdir(parents=True)
        (folder / "07_name.py").write_text(SCRIPT, encoding="utf-8")
    code = "import refquant.tutorials as t; print(t.folder())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "refquant" / "assets" / "tutorials"


def test_wheel_holds_scripts_pages_and_figures(tmp_path):
    """Built without a compiler, which is faster; the files are the same."""
    pytest.importorskip("hatchling")
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "CC": "false", "REFQUANT_REQUIRE_EXT": "0"},
    )  # fmt: skip
    names = set(zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist())
    for tutorial in tutorials.tutorials():
        for path in (tutorial.path, *tutorial.page.parent.glob(f"{tutorial.path.stem}*")):
            assert f"refquant/assets/{path.relative_to(ROOT).as_posix()}" in names
    assert "refquant/assets/tutorial.mplstyle" in names
    assert not [name for name in names if name.endswith("render.py")]
