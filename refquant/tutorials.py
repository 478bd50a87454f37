"""The tutorials as files: where they lie, what a page says of itself, and a notebook made of one.

A tutorial is a Python script in cells, the "percent format" that many editors know:

    # %% [markdown]
    # # 05 A title                      a cell of prose: every line begins with "# "
    # %%
    print(1 + 1)                        a cell of code
    # %% Figure: what it shows          a cell of code with a caption for its figure

In a source tree they lie in ``tutorials/``, in an installed package in ``refquant/assets/tutorials/``, each with
its rendered page (Markdown with outputs and figures) in ``rendered/``.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from .errors import RefquantError, UnknownNameError

_MARK = re.compile(r"# %%(?: (?P<title>[^\[].*)| (?P<markdown>\[markdown\]))?")
_HEAD = re.compile(
    r"# (?P<number>\d\d) (?P<title>.+)\n\n"
    r"\*(?P<summary>.+)\*\n\n"
    r"\*\*Run time\*\*: (?P<seconds>\d+) s on two cores\. \*\*Before this\*\*: (?P<before>.+(?:\n.+)*)\.\n"
)


@dataclass(frozen=True)
class Cell:
    """A piece of a tutorial.

    Attributes
    ----------
    markdown : bool
        Prose, without its leading "# ", or else code.
    title : str
        What follows the mark on its line: empty, or "Figure: ..." with a caption.
    text : str
        Without blank lines at either end.
    line : int
        Line of the file at which the text begins, from 1.
    """

    markdown: bool
    title: str
    text: str
    line: int


@dataclass(frozen=True)
class Tutorial:
    """A tutorial and what its first cell says.

    Attributes
    ----------
    path : Path
        Of the script, NN_name.py.
    number : str
        Two digits.
    title, summary, before : str
        The heading, the sentence beneath, and what to read first.
    seconds : int
        Run time on two cores.
    """

    path: Path
    number: str
    title: str
    summary: str
    before: str
    seconds: int

    @property
    def page(self) -> Path:
        """The rendered page."""
        return self.path.parent / "rendered" / f"{self.path.stem}.md"


def folder() -> Path:
    """Return the folder of the tutorials.

    Returns
    -------
    Path

    Raises
    ------
    RefquantError
        The package was put together without them.
    """
    package = Path(__file__).resolve().parent
    # in this order: beside an installed package anything may be called tutorials
    for place in (package / "assets" / "tutorials", package.parent / "tutorials"):
        if any(place.glob("[0-9][0-9]_*.py")):
            return place
    raise RefquantError("this copy of refquant has no tutorials; install it from a wheel or from a source tree.")


def tutorials(place: Path | None = None) -> list[Tutorial]:
    """List all tutorials, in order.

    Parameters
    ----------
    place : Path, optional
        Another folder than `folder`.

    Returns
    -------
    list of Tutorial
    """
    return [read(path) for path in sorted((place or folder()).glob("[0-9][0-9]_*.py"))]


def find(name: str) -> Tutorial:
    """Return the tutorial of this number or name.

    Parameters
    ----------
    name : str
        Such as ``3``, ``03`` or ``03_simd_one_isa_at_a_time``.

    Returns
    -------
    Tutorial

    Raises
    ------
    UnknownNameError
        There is none; the message lists all.
    """
    there = tutorials()
    for tutorial in there:
        if name in (tutorial.path.stem, tutorial.number, str(int(tutorial.number))):
            return tutorial
    raise UnknownNameError(f"no tutorial is called {name!r}. There are: {', '.join(t.path.stem for t in there)}.")


def read(path: Path) -> Tutorial:
    """Read what the first cell of a tutorial says.

    Parameters
    ----------
    path : Path

    Returns
    -------
    Tutorial

    Raises
    ------
    RefquantError
        The first cell does not have the form that all tutorials share.
    """
    first = cells(path.read_text(encoding="utf-8"))[0]
    head = _HEAD.match(first.text + "\n")
    if head is None or head["number"] != path.stem[:2]:
        raise RefquantError(
            f"{path.name}: the first cell must begin with '# {path.stem[:2]} Title', a sentence in *italics*, and "
            "'**Run time**: 20 s on two cores. **Before this**: nothing.', a blank line between each."
        )
    return Tutorial(path, head["number"], head["title"], head["summary"], head["before"], int(head["seconds"]))


def cells(text: str) -> list[Cell]:
    r"""Split a script into its cells.

    Parameters
    ----------
    text : str
        In percent format; what stands before the first mark must be blank.

    Returns
    -------
    list of Cell

    Raises
    ------
    RefquantError
        Text before the first mark, or a line of prose that does not begin with "# ".

    Examples
    --------
    >>> [(c.markdown, c.title, c.text) for c in cells("# %% [markdown]\n# Two:\n\n# %% Figure: no\nprint(2)\n")]
    [(True, '', 'Two:'), (False, 'Figure: no', 'print(2)')]
    """
    lines = text.splitlines()
    marks = [(i, mark) for i, line in enumerate(lines) if (mark := _MARK.fullmatch(line))]
    if not marks or any(line.strip() for line in lines[: marks[0][0]]):
        raise RefquantError("a tutorial begins with a cell: put '# %% [markdown]' on its first line.")
    ends = [i for i, _ in marks[1:]] + [len(lines)]
    return [_cell(mark, lines[i + 1 : end], i + 2) for (i, mark), end in zip(marks, ends, strict=True)]


def _cell(mark: re.Match[str], lines: list[str], first: int) -> Cell:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    while lines and not lines[0].strip():
        lines, first = lines[1:], first + 1
    markdown = mark["markdown"] is not None
    if markdown:
        for i, line in enumerate(lines):
            if line != "#" and not line.startswith("# "):
                raise RefquantError(f"line {first + i}: prose begins with '# ' on every line, not {line!r}.")
        lines = [line[2:] for line in lines]
    return Cell(markdown, mark["title"] or "", "\n".join(lines), first)


def notebook(text: str) -> dict[str, Any]:
    """Make a Jupyter notebook of a tutorial's script.

    Parameters
    ----------
    text : str
        In percent format, see `cells`.

    Returns
    -------
    dict
        To be written as JSON: notebook format 4.5, cells without outputs.
    """
    found: list[dict[str, Any]] = []
    for i, cell in enumerate(cells(text)):
        common = {"id": f"cell-{i}", "metadata": {}}
        source = cell.text if not cell.title else f"# {cell.title}\n{cell.text}"
        if cell.markdown:
            found.append({"cell_type": "markdown", **common, "source": source})
        else:
            found.append({"cell_type": "code", **common, "source": source, "execution_count": None, "outputs": []})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": found, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


class _Told(ast.NodeTransformer):
    """Every assert, and every call of np.testing, in a try of its own that prints what failed."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        return self._told(node)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        is_test = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith("np.testing.")
        return self._told(node) if is_test else node

    def _told(self, node: ast.stmt) -> ast.stmt:
        claim = (ast.get_source_segment(self.text, node) or "").splitlines()[0]
        said = f"claim no longer holds, {self.name} line {node.lineno}: {claim}"
        handler = ast.parse(f"try:\n    pass\nexcept AssertionError:\n    print({said!r})").body[0]
        assert isinstance(handler, ast.Try)
        handler.body = [node]
        for part in ast.walk(handler):
            if "lineno" in part._attributes and part is not node:
                ast.copy_location(part, node)
        return handler


def telling(script: Path) -> CodeType:
    """A script that goes on where a claim of it fails, and prints which: what a reader who changes it wants.

    Parameters
    ----------
    script : Path

    Returns
    -------
    code

    Raises
    ------
    RefquantError
        It is no Python.
    """
    text = script.read_text(encoding="utf-8")
    try:
        tree = _Told(script.name, text).visit(ast.parse(text))
    except SyntaxError as error:
        raise RefquantError(f"{script}, line {error.lineno}: {error.msg}. Undo the change there.") from None
    return compile(ast.fix_missing_locations(tree), str(script), "exec")
