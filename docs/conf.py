"""Sphinx: the tutorials' rendered pages and the docstrings, as a site: ``sphinx-build -W --keep-going docs site``."""

import os
import re
from pathlib import Path

import refquant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

project = "refquant"
author = copyright = "refquant contributors"
release = refquant.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # GitHub's ```math
autodoc_typehints = "none"  # the docstrings say types, and shapes
default_role = "autolink"  # `name` in a docstring is a link if there is such a thing
numpydoc_show_class_members = False  # autodoc shows them
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"refquant {release}"

PAGES = [
    "README.md",
    "CHANGELOG.md",
    "cext/story/README.md",
    "refquant/quant/methods/README.md",
    "tutorials/README.md",
    "tutorials/exercises/README.md",
    "tutorials/exercises/properties/README.md",
]


def copy_pages() -> None:
    """Bring the Markdown of the tree to docs/pages, where Sphinx finds it; links between pages stay as they are.

    What else is linked to is taken from its place in the tree; folders, which a site does not show, lose their link.
    """
    pages = [ROOT / page for page in PAGES] + sorted((ROOT / "tutorials" / "rendered").glob("*.md"))
    copies = {page: HERE / "pages" / page.relative_to(ROOT) for page in pages}

    for page, copy in copies.items():

        def move(link: re.Match[str], page: Path = page, copy: Path = copy) -> str:
            mark, text, target = link.groups()
            place = Path(os.path.normpath(page.parent / target))
            if "://" in target or target.startswith("#") or place in copies:
                return link[0]
            if place.is_dir():
                return text
            return f"{mark}[{text}]({os.path.relpath(place, copy.parent)})"

        code = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)  # where brackets are no links
        text, out, begin = page.read_text(encoding="utf-8"), "", 0
        for block in [*code.finditer(text), None]:
            prose = text[begin : block.start() if block else None]
            out += re.sub(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^()\s]+)\)", move, prose) + (block[0] if block else "")
            begin = block.end() if block else begin
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file() or copy.read_text(encoding="utf-8") != out:  # an unchanged page is not built again
            copy.write_text(out, encoding="utf-8")
    for old in (HERE / "pages").rglob("*.md"):
        if old not in copies.values():
            old.unlink()


def as_written(app, what, name, obj, options, lines) -> None:
    """Show what a docstring indents, tables and formulas in plain text, line for line; and take | for a bar."""
    out, before, literal = [], "", None  # the last line that is not blank; the indentation before a literal block
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        if indent and literal is None and i and not lines[i - 1].strip() and not before.startswith(" "):
            out, literal = [*out, "::", ""], 0
        if literal is None and not line.lstrip().startswith(">>>"):
            parts = line.split("``")
            line = "``".join(part if k % 2 else part.replace("|", r"\|") for k, part in enumerate(parts))
        if line.rstrip().endswith("::"):
            literal = indent
        out.append(line)
        before = line if line.strip() else before
    lines[:] = out


def setup(app) -> None:
    """Sphinx calls this."""
    copy_pages()
    app.connect("autodoc-process-docstring", as_written, priority=400)  # numpydoc comes at 500
