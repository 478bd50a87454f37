"""Every tutorial keeps the common form: sections, imports, links, names, claims, figures, a fresh page.

That they run is a step of its own in CI, with nothing but the package installed: it would double the time of the
suite. Each rule is a function from a script to a list of what is wrong; the last test breaks every rule once.
"""

import ast
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from refquant.errors import RefquantError
from refquant.tutorials import cells, read

FOLDER = Path(__file__).resolve().parents[2] / "tutorials"
PAGES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
SECTIONS = [
    "What you'll do",
    "What you'll learn",
    "What you'll need",
    "Equations and functions",
    "Where this differs from the authors' code",
    "On your own",
]
ALLOWED = {"refquant", "numpy", "matplotlib", *sys.stdlib_module_names}
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAME = re.compile(r"`(refquant(?:\.\w+)+)`")

spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)


def prose(source):
    return "\n\n".join(cell.text for cell in cells(source.read_text(encoding="utf-8")) if cell.markdown)


def head(source):
    try:
        tutorial = read(source)
    except RefquantError as error:
        return [str(error)]
    return [] if tutorial.seconds <= 60 else [f"takes {tutorial.seconds} s; 60 are allowed"]


def sections(source):
    """All of them, in order; the last one is the end of the page."""
    found = re.findall(r"^## (.*)$", prose(source), re.MULTILINE)
    common = [name for name in found if name in SECTIONS]
    return [] if common == SECTIONS and found[-1] == SECTIONS[-1] else [f"sections {common}, not {SECTIONS}"]


def imports(source):
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return [f"imports {name}" for name in sorted(found - ALLOWED)]


def links(source):
    """A page that another author has yet to render counts once its script is there."""
    wrong = []
    for target in LINK.findall(prose(source)):
        path = (source.parent / "rendered" / target.partition("#")[0]).resolve()
        script = path.parent.parent / f"{path.stem}.py"
        if not target.startswith(("https://", "#")) and not path.exists() and not script.is_file():
            wrong.append(f"links to {target}, which is not there")
    return wrong


def names(source):
    """Every `refquant.module.name` in the prose exists."""
    wrong = []
    for name in sorted(set(NAME.findall(prose(source)))):
        parts, found = name.split("."), None
        for cut in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:cut]))
            except ModuleNotFoundError:
                continue
            for attribute in parts[cut:]:
                found = getattr(found, attribute, None)
            break
        if found is None:
            wrong.append(f"names `{name}`, which does not exist")
    return wrong


def claims(source):
    count = sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
    return [] if count >= 3 else [f"asserts {count} claims; 3 are the least"]


def math(source):
    """What GitHub's Markdown eats before it looks for formulas."""
    eaten = re.findall(r"\$[^$\n]*\\[^a-zA-Z\s$][^$\n]*\$", re.sub(r"`[^`\n]*`", "", prose(source)))
    return [f"formula {formula}: GitHub drops a backslash before a punctuation mark" for formula in eaten]


def figures(source):
    """At least one; each with an alternative text, at most 800 pixels wide and 80 kB."""
    page = source.parent / "rendered" / f"{source.stem}.md"
    images = render.IMAGE.findall(page.read_text(encoding="utf-8")) if page.is_file() else []
    wrong = [] if images else ["no figure"]
    for name in images:
        file = page.parent / name
        if file.is_file():
            with Image.open(file) as picture:
                width = picture.width
            if width > 800 or file.stat().st_size > 80_000:
                wrong.append(f"{name}: {width} pixels wide, {file.stat().st_size} bytes")
    return wrong


def quotes(source):
    """Lines of C are quoted from the core, not from memory."""
    core = {line.strip() for path in FOLDER.parent.glob("cext/*.c") for line in path.read_text().splitlines()}
    blocks = re.findall(r"^```c\n(.*?)^```$", prose(source), re.MULTILINE | re.DOTALL)
    return [f"quotes {line!r}, which is not in cext" for block in blocks for line in block.splitlines()
            if line.strip() not in core]  # fmt: skip


def lines(source):
    """Up to 120 characters, but for what cannot be wrapped: rows of tables, and captions."""
    numbered = enumerate(source.read_text(encoding="utf-8").splitlines(), 1)
    return [f"line {i} has {len(line)} characters" for i, line in numbered
            if len(line) > 120 and not line.startswith(("# |", "# %% Figure: "))]  # fmt: skip


RULES = (head, sections, imports, links, names, claims, math, figures, quotes, lines)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("source", PAGES, ids=lambda source: source.stem)
def test_page(source, rule):
    assert rule(source) == []


def test_rendered_pages_are_fresh():
    assert render.check() == [], "python tutorials/render.py NAME makes a page again"


def test_index_lists_every_tutorial_with_its_time():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d\d) \| \[(.+?)\]\(rendered/(\w+)\.md\) \|.*\| (\d+) \|$", index, re.MULTILINE)
    there = [read(path) for path in PAGES]
    assert listed == [(t.number, t.title, t.path.stem, str(t.seconds)) for t in there]
    for target in LINK.findall(index):
        assert target.startswith("https://") or (FOLDER / target.partition("#")[0]).exists(), target


BROKEN = """# %% [markdown]
# # 42 Another number
#
# No sentence in italics. See [the missing](99_missing.md), `refquant.intmath.nothing` and $\\{1\\}$.
#
# ```c
# sum -= 1;
# ```
#
# ## On your own

# %%
import torch

assert torch
# """ + "x" * 120


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules_find_what_is_wrong(rule, tmp_path):
    source = tmp_path / "41_broken.py"
    source.write_text(BROKEN, encoding="utf-8")
    assert len(rule(source)) == 1
