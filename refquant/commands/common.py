"""What the verbs share: options that mean the same everywhere, models by name, tables, progress.

Results go to standard output, progress and remarks to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import io, kernels
from .._version import __version__
from ..deploy.runtime import ENGINES, integer_denoiser
from ..diffusion.denoiser import NoisePredictor
from ..diffusion.model import DiffusionModel, find, load_model
from ..errors import CheckpointError, RangeError, RefquantError
from ..evaluate import Request
from ..nn.networks import KINDS
from ..quant.quantized import load_quantized
from ..threads import get_threads, set_threads

SEED = 42


def add_verb(
    verbs: Any, name: str, summary: str, example: str, *, seed: bool = True, out: str | None = None
) -> argparse.ArgumentParser:
    """Add a verb with the options that all share; `out` is the default of --out (None: no such option)."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=HelpFormatter,
    )
    group = parser.add_argument_group("options that mean the same everywhere")
    if seed:
        group.add_argument("--seed", type=int, default=SEED, metavar="S", help="fixes everything random")
    group.add_argument("--threads", type=int, metavar="N", help="worker threads (default: all cores)")
    group.add_argument("--isa", metavar="NAME", help="instruction set of the integer kernels (default: the fastest)")
    if out is not None:
        group.add_argument("--out", type=Path, default=Path(out), metavar="FILE", help="where the result is written")
    group.add_argument("--quiet", action="store_true", help="no progress on standard error")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and keep the line breaks of the example."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)", "(default: False)" and "(default: [])" say nothing
        if action.default in (None, False, []) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def apply_common(args: argparse.Namespace) -> None:
    """Set threads and instruction set as the options say; raise before any work if they cannot be obeyed."""
    if getattr(args, "seed", 0) < 0:
        raise RangeError(f"--seed is {args.seed}; it must be at least 0.")
    set_threads(args.threads)
    if args.isa is not None:
        kernels.use(args.isa)
    if getattr(args, "out", None) is not None and not args.out.parent.is_dir():
        raise RefquantError(
            f"{args.out}: there is no folder {args.out.parent}. Make it first, or choose another --out."
        )


@dataclass(frozen=True, eq=False)
class Opened:
    """A model ready to sample: the float model or frame, its noise predictor, what it is, and its size."""

    base: DiffusionModel
    eps: NoisePredictor
    description: str
    size_bytes: int


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add --engine, for quantized models."""
    parser.add_argument(
        "--engine", choices=("fake", *ENGINES), default="fake",
        help="how a quantized model computes: simulated in float32, in integers on NumPy, in integers on the C core",
    )  # fmt: skip


def open_model(name: str, engine: str = "fake") -> Opened:
    """Open a float or quantized model by asset name or path; `engine` is for quantized ones."""
    path = find(name)
    kind = io.read_metadata(path)["kind"]
    if kind == "quantized":
        model = load_quantized(name)
        r = model.recipe
        label = f"{model.base.name} W{r['weight_bits']}A{r['input_bits']} {r['method']}"
        if engine == "fake":
            return Opened(model.base, model.denoiser(), label, model.size_bytes())
        return Opened(model.base, integer_denoiser(model, engine), f"{label}, engine {engine}", model.size_bytes())
    if kind not in KINDS:
        raise CheckpointError(
            f"{path}: holds a {kind}, which draws nothing. Give a float ({', '.join(KINDS)}) or a quantized model."
        )
    if engine != "fake":
        raise RefquantError(f"{name} is a float model: --engine {engine} runs quantized ones. Quantize it first.")
    base = load_model(name)
    return Opened(base, base.denoiser(), f"{base.name} float32", 4 * base.network.parameter_count())


def add_model(parser: argparse.ArgumentParser, default: str = "mnist-unet") -> None:
    """Add the model, by its place or by --model."""
    parser.add_argument(
        "place", nargs="?", metavar="MODEL", action=_Place, default=argparse.SUPPRESS,
        help=f"asset name or checkpoint file (default: {default})",
    )  # fmt: skip
    parser.add_argument("--model", default=default, metavar="MODEL", help="the same")


class _Place(argparse.Action):
    """Put a positional argument where the option --model puts its own, if it is there."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.model = values


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Add --class and --guidance, for conditional models."""
    group = parser.add_argument_group("conditional models")
    group.add_argument(
        "--class", dest="classes", type=_integers, metavar="K,...",
        help="classes of the images, taken in turn (default: all classes in turn)",
    )  # fmt: skip
    group.add_argument(
        "--guidance", type=float, metavar="W",
        help="classifier-free guidance: 0 forgets the class, 1 conditional, above exaggerates (default: 1)",
    )  # fmt: skip


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 7 or 0,1,2") from None


def requested(args: argparse.Namespace, model: DiffusionModel, count: int) -> Request | None:
    """Return what --class and --guidance ask a conditional model for; None of an unconditional one."""
    if not model.classes:
        if args.classes is not None or args.guidance is not None:
            raise RangeError(f"{model.name} is unconditional: it knows neither --class nor --guidance.")
        return None
    chosen = range(model.classes) if args.classes is None else args.classes
    if not all(0 <= k < model.classes for k in chosen):
        raise RangeError(f"--class is {chosen}; {model.name} knows the classes 0 to {model.classes - 1}.")
    return Request(np.resize(np.array(chosen), count), 1.0 if args.guidance is None else args.guidance)


def progress(total: int, label: str, args: argparse.Namespace) -> tqdm[Any]:
    """Return a progress bar on standard error; silent with --quiet and where that is no terminal."""
    return tqdm(
        total=total, desc=label, unit="step", disable=True if args.quiet else None, file=sys.stderr, leave=False
    )


def say(args: argparse.Namespace, text: str) -> None:
    """Print a remark to standard error, unless --quiet."""
    if not args.quiet:
        print(text, file=sys.stderr)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns of equal width; the first is aligned left, the others right."""
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * w for w in widths], *rows):
        cells = [
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write `result` with the version, if a path was given."""
    if path is not None:
        text = json.dumps({"refquant": __version__, **result}, indent=1, sort_keys=True) + "\n"
        io.write_atomically(path, [text.encode()])


def setting() -> str:
    """Return version, threads and kernel in a few words, for the head of an output."""
    return f"refquant {__version__}, {get_threads()} threads, integer kernels: {kernels.active()}"
