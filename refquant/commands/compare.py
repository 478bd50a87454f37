"""refquant compare: methods times bits on one model, in one table, with plots."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .. import io
from .._version import __version__
from ..compare import HEADER, Reference, cells, markdown, measure
from ..diffusion.model import load_model
from ..errors import RangeError, RefquantError, UnknownNameError
from ..evaluate import BATCH
from ..quant.methods import METHODS, methods_for
from ..quant.quantized import load_quantized
from ..threads import get_threads
from ..viz import labelled_rows, plot_over_time, plot_per_step_error, save_png
from .common import (
    add_classes,
    add_engine,
    add_model,
    add_verb,
    print_table,
    progress,
    requested,
    say,
    setting,
    write_json,
)
from .quantize import add_calibration

SHOWN = 12  # images of each row of the picture

# ``python -c`` with this and a folder is ``python -m refquant`` of the package there: -m would take another one
# that lies in the current folder, such as a source tree without its compiled core.
SAME_PACKAGE = "import sys; sys.path[0] = sys.argv.pop(1); from refquant.cli import main; sys.exit(main())"


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(
        verbs, "compare", "Compare methods of quantization on one model: one table, plots and pictures.",
        "refquant compare --methods nearest,squant --bits W8A8,W4A8 -n 16 --runs 2 --out comparison",
        out="comparison",
    )  # fmt: skip
    add_model(p)
    p.add_argument(
        "--methods", metavar="NAMES",
        help="with options after colons, such as tfmq:fsc=temporal:time_steps=20, or with another coverage, "
        "tqdit:coverage=released; by default all that fit the model",
    )  # fmt: skip
    p.add_argument("--bits", default="W8A8,W4A8", metavar="BITS", help="such as W4A8,W4A32")
    add_calibration(p)
    p.add_argument("-n", type=int, default=64, metavar="N", help="images of each run")
    p.add_argument("--runs", type=int, default=3, metavar="R", help="runs with seeds S, S+1, ...; they give the spread")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too (they are in OUT anyway)")
    add_classes(p)
    add_engine(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Calibrate what is not calibrated yet, sample, and write table, numbers and pictures into the folder --out."""
    if args.n < 2 or args.runs < 1:
        raise RangeError(f"-n is {args.n} and --runs is {args.runs}; at least 2 images and 1 run are needed.")
    bits = [parse_bits(text) for text in args.bits.split(",")]
    model = load_model(args.model)
    named = args.methods.split(",") if args.methods else methods_for(model.network.cfg.kind)
    methods = [parse_method(text) for text in named]
    args.out.mkdir(exist_ok=True)
    request = requested(args, model, args.n)
    say(args, f"{model.name}: {len(methods)} methods at {len(bits)} bit-widths, {setting()}")
    entries = [(m, w, a, calibrated(args, m, w, a)) for w, a in bits for m in methods]

    seeds = range(args.seed, args.seed + args.runs)
    total = (1 + len(entries)) * args.runs * -(-args.n // BATCH) * args.steps
    with progress(total, "sample", args) as bar:
        follow = lambda _: bar.update()  # noqa: E731
        reference = Reference.draw(model, args.n, seeds, args.steps, follow, request)
        rows, pictures = [reference.row()], [("float32", reference.runs[args.seed].images[:SHOWN])]
        for (name, options), _, _, file in entries:
            row, images = measure(load_quantized(str(file)), reference, follow, args.engine)
            notes = json.loads(file.with_suffix(".json").read_text())
            row |= {key: notes[key] for key in ("seconds", "peak_memory_bytes")}
            row["method"] = ":".join([name, *options])
            rows.append(row)
            pictures.append((f"{row['method']} {row['bits']}", images[:SHOWN]))
    print_table(HEADER, [cells(row) for row in rows])
    seen = "digits" if request is None else "requested digits"
    asked = "" if request is None else f"guidance {request.guidance:g}, "
    caption = (
        f"{model.name}, {args.runs} runs of {args.n} images, DDIM {args.steps} steps, {asked}seeds from {args.seed}; "
        f"calibrated on {args.images} trajectories, {args.iterations} iterations a block, {args.states} states by "
        f"{args.sampling}, {get_threads()} threads, refquant {__version__}. Frechet distance on mnist-classifier's "
        f"features, of small samples: compare rows, not papers; recognised are {seen} with confidence above 0.9."
    )
    print(caption)
    facts = {"caption": caption, "rows": rows}
    write_json(args.out / "comparison.json", facts)
    write_json(args.json, facts)
    io.write_atomically(args.out / "comparison.md", [markdown(rows, caption).encode()])
    quantized = {f"{r['method']} {r['bits']}": r for r in rows[1:]}
    save_png(args.out / "pictures.png", labelled_rows(pictures), {"caption": caption})
    if quantized:
        plot_per_step_error({k: r["per_step_mse"] for k, r in quantized.items()}).savefig(args.out / "trajectory.png")
        curves = {k: r["feature_cosine_by_t"] for k, r in quantized.items()}
        plot_over_time(curves, "cosine of the worst temporal feature").savefig(args.out / "features.png")
    print(f"written to {args.out}: comparison.json, comparison.md, pictures.png, trajectory.png, features.png")
    return 0


def parse_bits(text: str) -> tuple[int, int]:
    """W4A8 -> (4, 8)."""
    found = re.fullmatch(r"W(\d+)A(\d+)", text)
    if found is None:
        raise RangeError(f"--bits {text!r} is not like W4A8; 2 to 8 bits are supported, and 32 for float.")
    return int(found[1]), int(found[2])


def parse_method(text: str) -> tuple[str, tuple[str, ...]]:
    """tfmq:fsc=temporal -> ("tfmq", ("fsc=temporal",))."""
    name, *options = text.split(":")
    if name not in METHODS:
        raise UnknownNameError(f"no method is called {name!r}. Known: {', '.join(METHODS)}.")
    return name, tuple(options)


def split_coverage(named: tuple[str, ...], otherwise: str) -> tuple[str, list[str]]:
    """("coverage=released", "fsc=all") -> ("released", ["fsc=all"]); the coverage is no option of a method."""
    own = [text.partition("=")[2] for text in named if text.startswith("coverage=")]
    return (own or [otherwise])[-1], [text for text in named if not text.startswith("coverage=")]


def calibrated(
    args: argparse.Namespace, method: tuple[str, tuple[str, ...]], weight_bits: int, input_bits: int
) -> Path:
    """Return the quantized model's file in the folder --out: made before with the same recipe, or now.

    Each calibration is a process of its own, so that its peak memory is its own.
    """
    name, named = method
    coverage, options = split_coverage(named, args.coverage)
    label = "-".join([name, *(re.sub(r"\W", "_", o) for o in named)])
    file = args.out / f"{label}-W{weight_bits}A{input_bits}.safetensors"
    notes = file.with_suffix(".json")
    asked = [
        "quantize", args.model, "--method", name, "--weight-bits", str(weight_bits), "--input-bits", str(input_bits),
        "--coverage", coverage, "--images", str(args.images), "--steps", str(args.steps),
        "--states", str(args.states), "--sampling", args.sampling, "--iterations", str(args.iterations),
        "--seed", str(args.seed),
        *(part for option in options for part in ("--option", option)),
    ]  # fmt: skip
    identity = {"asked": asked, "model": load_model(args.model).metadata["data_sha256"], "refquant": __version__}
    if file.exists() and notes.exists() and json.loads(notes.read_text()).get("identity") == identity:
        return file
    shared = ["--out", str(file), "--json", str(notes), *(["--quiet"] if args.quiet else [])]
    threads = ["--threads", str(args.threads)] if args.threads else []
    command = [sys.executable, "-c", SAME_PACKAGE, str(Path(__file__).resolve().parents[2]), *asked, *shared, *threads]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE if args.quiet else None, text=True)
    if done.returncode:
        raise RefquantError(f"{name} W{weight_bits}A{input_bits}: {(done.stderr or 'see above').strip()}")
    write_json(notes, {**json.loads(notes.read_text()), "identity": identity})
    return file
