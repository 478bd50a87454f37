"""Run tutorials and write their pages: Markdown with outputs and figures, in tutorials/rendered/.

    python tutorials/render.py              all of them
    python tutorials/render.py 03 07        these
    python tutorials/render.py --check      are the pages those of the scripts? (standard library only)

The cells of a script run one after the other in one namespace, as the script itself would run: what a page shows is
what ``python tutorials/03_....py`` prints. Standard output becomes a block of text, and every figure of pyplot that is
open at the end of a cell becomes a PNG. Standard error, hence progress bars, is not part of a page. The first line of a
page holds the SHA-256 of its script. The list of tutorials in README.md is brought up to date, too.
"""

import argparse
import contextlib
import hashlib
import io
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
IMAGE = re.compile(r"^!\[.*\]\((\S+\.png)\)$", re.MULTILINE)


def head(source: Path) -> str:
    """Return the first line of the page of this script."""
    return f"<!-- made from tutorials/{source.name}, sha256 {hashlib.sha256(source.read_bytes()).hexdigest()} -->"


def check(place: Path = HERE) -> list[str]:
    """List what is stale, missing or left over among the rendered pages."""
    problems, wanted = [], set()
    for source in sorted(place.glob("[0-9][0-9]_*.py")):
        page = place / "rendered" / f"{source.stem}.md"
        if not page.is_file():
            problems.append(f"{page.name} is missing")
            continue
        text = page.read_text(encoding="utf-8")
        images = IMAGE.findall(text)
        wanted |= {page.name, *images}
        if text.partition("\n")[0] != head(source):
            problems.append(f"{page.name} is older than its script")
        problems += [f"{image} is missing" for image in images if not (page.parent / image).is_file()]
    left = {path.name for path in (place / "rendered").glob("*")} - wanted
    return problems + [f"{name} belongs to no tutorial" for name in sorted(left)]


def execute(source: Path) -> list[tuple[object, str, list[bytes]]]:
    """Run a script cell by cell; return (cell, what it printed, its figures as PNG) of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from refquant.tutorials import cells

    namespace = {"__name__": "__main__", "__file__": str(source)}
    done = []
    for cell in cells(source.read_text(encoding="utf-8")):
        printed, figures = io.StringIO(), []
        if not cell.markdown:
            # blank lines in front, so that a traceback shows the line of the file
            code = compile("\n" * (cell.line - 1) + cell.text + "\n", str(source), "exec")
            try:
                with contextlib.redirect_stdout(printed):
                    exec(code, namespace)
            except BaseException:
                print(printed.getvalue(), end="", file=sys.stderr)  # what led to a failed claim
                raise
            for number in plt.get_fignums():
                figures.append(png(plt.figure(number)))
            plt.close("all")
        done.append((cell, printed.getvalue(), figures))
    return done


def png(figure) -> bytes:
    """Draw a figure with at most 256 colours, which takes a third of the bytes."""
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png")
    picture = Image.open(full).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def page(source: Path, done, remark: str) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of executed cells, and the files of its figures."""
    parts, images = [head(source)], {}
    for cell, printed, figures in done:
        parts.append(cell.text if cell.markdown else f"```python\n{cell.text}\n```")
        if printed.strip():
            lines = [line.rstrip() for line in printed.rstrip().splitlines()]
            parts.append("```text\n" + "\n".join(lines) + "\n```")
        caption = cell.title.removeprefix("Figure: ")
        if figures and caption == cell.title:
            raise SystemExit(f"{source.name}, line {cell.line}: a figure needs a caption, '# %% Figure: ...'")
        for figure in figures:
            name = f"{source.stem}_{len(images) + 1}.png"
            images[name] = figure
            alt = caption.translate(str.maketrans("", "", "[]$*`"))
            parts += [f"![{alt}]({name})", f"*{caption}*"]
    links = f"[All tutorials](../README.md) · [the script of this page](../{source.name})"
    return "\n\n".join([*parts, "---", links, remark]) + "\n", images


def machine() -> str:
    """Describe where a page was made."""
    import numpy as np

    from refquant import kernels
    from refquant.threads import get_threads

    cpu = platform.machine()
    with contextlib.suppress(OSError, AttributeError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{cpu}, {get_threads()} threads, kernel {kernels.active()}, NumPy {np.__version__}"


def render(source: Path) -> None:
    """Run one script and write its page and figures."""
    began, cpu = time.perf_counter(), time.process_time()
    done = execute(source)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    text, images = page(source, done, f"*Made in {seconds:.0f} s on {machine()}.*")
    out = source.parent / "rendered"
    out.mkdir(exist_ok=True)
    for old in out.glob(f"{source.stem}_*.png"):
        old.unlink()
    for name, content in images.items():
        (out / name).write_bytes(content)
    (out / f"{source.stem}.md").write_text(text, encoding="utf-8")
    sizes = ", ".join(f"{len(content) / 1000:.0f}" for content in images.values())
    print(f"{source.stem}: {seconds:.1f} s, {cpu:.1f} s of all cores; figures of {sizes or 'no'} kB", flush=True)


def write_index() -> None:
    """Bring the list of tutorials in README.md up to date."""
    from refquant.tutorials import tutorials

    rows = ["| | tutorial | what happens | seconds |", "|---|---|---|---:|"]
    for t in tutorials(HERE):
        rows.append(f"| {t.number} | [{t.title}](rendered/{t.path.stem}.md) | {t.summary} | {t.seconds} |")
    table = "\n".join(rows)
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition("<!-- list -->\n")
    _, end, after = rest.partition("<!-- end of list -->\n")
    if not end:
        raise SystemExit("README.md must hold the marks <!-- list --> and <!-- end of list -->")
    readme.write_text(f"{before}{begin}{table}\n{end}{after}", encoding="utf-8")


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="numbers or names of tutorials (default: all)")
    parser.add_argument("--check", action="store_true", help="run nothing; are the pages those of the scripts?")
    args = parser.parse_args()
    if args.check:
        problems = check()
        print("\n".join(problems) or "all pages are fresh")
        return 1 if problems else 0
    every = sorted(HERE.glob("[0-9][0-9]_*.py"))
    chosen = [s for s in every if not args.names or any(s.stem.startswith(name) for name in args.names)]
    if not chosen:
        parser.error(f"no tutorial is called {' or '.join(args.names)}")
    if len(chosen) == 1:
        render(chosen[0])
        write_index()
        return 0
    # each in a process of its own, as a reader runs it
    return max(subprocess.run([sys.executable, os.fspath(HERE / "render.py"), s.stem]).returncode for s in chosen)


if __name__ == "__main__":
    sys.exit(main())
