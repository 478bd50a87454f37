"""The renderer: a page shows what the script prints and draws, and is stale as soon as one of them changes."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

RENDER = Path(__file__).resolve().parents[2] / "tutorials" / "render.py"

spec = importlib.util.spec_from_file_location("render", RENDER)
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)

SCRIPT = """# %% [markdown]
# # 41 A page
#
# A formula: $x^2$.

# %%
import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt


@dataclass
class Pair:
    a: int


x = Pair(6)
print(x.a * 7)
print("progress", file=sys.stderr)

# %% Figure: A line [of `x`].
plt.plot([0, x.a])
plt.show()

# %%
y = 1
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "41_page.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "rendered").mkdir()
    return tmp_path


def test_page_holds_prose_code_output_and_figure(place, capsys):
    source = place / "41_page.py"
    text, images = render.page(source, render.execute(source), "*made*")
    assert text.startswith(f"{render.head(source)}\n\n# 41 A page\n\nA formula: $x^2$.\n\n```python\nimport sys\n")
    assert "\nprint(\"progress\", file=sys.stderr)\n```\n\n```text\n42\n```\n\n```python\nplt.plot" in text
    assert "```\n\n![A line of x.](41_page_1.png)\n\n*A line [of `x`].*\n\n```python\ny = 1\n```\n\n---\n" in text
    assert "progress" in capsys.readouterr().err
    assert list(images) == ["41_page_1.png"]
    with Image.open(io.BytesIO(images["41_page_1.png"])) as picture:
        assert picture.format == "PNG" and picture.width > 300 and len(picture.getcolors()) > 2


def test_failed_claim_stops_it_and_shows_the_line(place):
    source = place / "41_page.py"
    source.write_text(SCRIPT + "\n# %%\nassert y == 2\n", encoding="utf-8")
    with pytest.raises(AssertionError) as caught:
        render.execute(source)
    assert caught.traceback[-1].lineno + 1 == len(source.read_text(encoding="utf-8").splitlines())


def test_figure_needs_a_caption(place):
    source = place / "41_page.py"
    source.write_text(SCRIPT.replace("# %% Figure: A line [of `x`].", "# %%"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"41_page.py, line 23: a figure needs a caption"):
        render.page(source, render.execute(source), "")


def test_check_notices_every_kind_of_staleness(place):
    source, out = place / "41_page.py", place / "rendered"
    assert render.check(place) == ["41_page.md is missing"]
    render.render(source)
    assert render.check(place) == []
    (out / "old.png").write_bytes(b"")
    assert render.check(place) == ["old.png belongs to no tutorial"]
    (out / "old.png").unlink()
    (out / "41_page_1.png").rename(out / "41_page_2.png")
    assert render.check(place) == ["41_page_1.png is missing", "41_page_2.png belongs to no tutorial"]
    render.render(source)  # removes what an earlier version of the page left
    assert render.check(place) == []
    source.write_text(SCRIPT + "# a comment\n", encoding="utf-8")
    assert render.check(place) == ["41_page.md is older than its script"]


def test_check_needs_the_standard_library_only():
    """-S leaves site-packages out, -I the folder and the environment."""
    done = subprocess.run([sys.executable, "-S", "-I", str(RENDER), "--check"], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 1)  # stale pages are another test's business
    assert done.stdout
