"""refquant tutorials: list them, open a rendered page, run one, hand out a script or a notebook."""

from __future__ import annotations

import argparse
import json
import runpy
import webbrowser
from pathlib import Path
from typing import Any

from ..errors import RefquantError
from ..io import write_atomically
from ..tutorials import Tutorial, find, notebook, telling, tutorials
from .common import add_verb


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(
        verbs, "tutorials", "List the tutorials; open one, run it, or copy it to work on.",
        "refquant tutorials 01 --copy . --notebook", seed=False,
    )  # fmt: skip
    p.add_argument("name", nargs="?", metavar="NAME",
                   help="number or name of one of them; with --run, also a script of yours")  # fmt: skip
    p.add_argument("--open", action="store_true", help="open its page, with outputs and figures, in a viewer")
    p.add_argument("--run", type=Path, dest="figures", metavar="DIR",
                   help="run it without a screen, and write its figures there as PNG")  # fmt: skip
    p.add_argument("--copy", type=Path, metavar="DIR", help="copy its script there")
    p.add_argument("--notebook", action="store_true", help="with --copy: as a Jupyter notebook")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the list, or what one of them is and where; then open or copy it."""
    if args.name is None:
        if args.open or args.copy or args.figures or args.notebook:
            raise RefquantError("say which tutorial: `refquant tutorials` lists them, as in `refquant tutorials 00`.")
        for tutorial in tutorials():
            print(f"{tutorial.number}  {tutorial.title} ({tutorial.seconds} s)\n    {tutorial.summary}")
        print("\nRead one: refquant tutorials 00 --open. Work on one: refquant tutorials 00 --copy . [--notebook]")
        print("Run one without a screen, its figures as files: refquant tutorials 00 --run .")
        return 0
    if args.notebook and args.copy is None:
        raise RefquantError("--notebook needs a folder to write to: add --copy DIR.")
    if args.figures is not None and not args.figures.is_dir():
        raise RefquantError(f"{args.figures}: there is no such folder. Make it first, or choose another --run.")
    if args.name.endswith(".py"):
        return _run_own(Path(args.name), args)
    tutorial = find(args.name)
    made = None if args.copy is None else copy(tutorial, args.copy, as_notebook=args.notebook)
    if args.open and not (tutorial.page.is_file() and webbrowser.open(tutorial.page.as_uri())):
        raise RefquantError(f"no viewer could be started. Open this file by hand: {tutorial.page}.")
    print(f"{tutorial.number} {tutorial.title}: {tutorial.summary}")
    for what, path in (("script", tutorial.path), ("page", tutorial.page), ("copy", made)):
        if path is not None and path.is_file():
            print(f"{what + ':':<8}{path}")
    if args.figures is not None:
        execute(tutorial.path, args.figures)
    return 0


def _run_own(script: Path, args: argparse.Namespace) -> int:
    """Run a copy that its reader has changed: a claim that holds no longer is told, and the script goes on."""
    if args.figures is None or args.copy or args.open:
        raise RefquantError(f"{script}: a script of yours can be run, with --run DIR, not opened or copied.")
    if not script.is_file():
        raise RefquantError(f"{script}: there is no such file. `refquant tutorials 11 --copy .` makes one to change.")
    execute(script, args.figures, tell=True)
    return 0


def execute(script: Path, place: Path, *, tell: bool = False) -> None:
    """Run a script; what it would show in windows is written into a folder, NN_name_1.png and so on.

    Parameters
    ----------
    script : Path
    place : Path
        An existing folder; figures of an earlier run of this script are removed from it first.
    tell : bool
        Print claims that do not hold, instead of ending at the first.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for old in place.glob(f"{script.stem}_*.png"):
        if old.stem.removeprefix(f"{script.stem}_").isdecimal():
            old.unlink()
    made = 0

    def save() -> None:
        nonlocal made
        for number in plt.get_fignums():
            made += 1
            path = place / f"{script.stem}_{made}.png"
            plt.figure(number).savefig(path)
            print(f"figure: {path}")
        plt.close("all")

    show, plt.show = plt.show, save
    try:
        if tell:
            exec(telling(script), {"__name__": "__main__", "__file__": str(script)})
        else:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        plt.show = show


def copy(tutorial: Tutorial, place: Path, *, as_notebook: bool) -> Path:
    """Write the script, or a notebook made of it, into a folder; an existing file is never overwritten.

    Parameters
    ----------
    tutorial : Tutorial
    place : Path
        An existing folder.
    as_notebook : bool

    Returns
    -------
    Path
        Of the new file.

    Raises
    ------
    RefquantError
        The folder does not exist, or holds such a file already.
    """
    if not place.is_dir():
        raise RefquantError(f"{place}: there is no such folder. Make it first, or choose another --copy.")
    target = place / (tutorial.path.stem + (".ipynb" if as_notebook else ".py"))
    if target.exists():
        raise RefquantError(f"{target} exists, maybe with your work in it. Move it away, or choose another folder.")
    text = tutorial.path.read_text(encoding="utf-8")
    if as_notebook:
        text = json.dumps(notebook(text), indent=1, ensure_ascii=False) + "\n"
    write_atomically(target, [text.encode()])
    return target
