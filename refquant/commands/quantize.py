"""refquant quantize: calibrate a float model without data and write a quantized one."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ..diffusion.model import load_model
from ..quant.calibrate import Calibration, CalibrationConfig
from ..quant.coverage import COVERAGES, check_bits
from ..quant.methods import METHODS, method
from ..quant.reconstruct import ReconstructionConfig
from ..quant.session import SAMPLINGS, Session
from .common import add_verb, say, setting, write_json
from .method_options import help_text, parse_options


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(
        verbs, "quantize", "Quantize a model after training, without data; a run that is killed goes on where it was.",
        "refquant quantize mnist-unet --method tfmq --weight-bits 4 --iterations 20 --out w4a8.safetensors",
        out="quantized.safetensors",
    )  # fmt: skip
    p.add_argument("model", nargs="?", default="mnist-unet", metavar="MODEL", help="asset name or checkpoint file")
    add_calibration(p)
    p.add_argument("--method", choices=tuple(METHODS), default="nearest", help="what each can be told stands below")
    p.add_argument("--weight-bits", type=int, default=8, metavar="B", help="2 to 8, or 32 for float")
    p.add_argument("--input-bits", type=int, default=8, metavar="B", help="of activations: 2 to 8, or 32 for float")
    p.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE",
        help="of the method, such as fsc=temporal (tfmq); may be repeated; listed below",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write recipe, seconds by phase and peak memory there")
    p.epilog = f"{help_text()}\n\n{p.epilog}"
    p.set_defaults(run=run)


def add_calibration(p: argparse.ArgumentParser) -> None:
    """Add the options that say how much a method may look at and learn; the same for all methods."""
    effort = ReconstructionConfig()
    p.add_argument("--coverage", choices=COVERAGES, default="full", help="what is quantized")
    p.add_argument("--images", type=int, default=64, metavar="N", help="calibration: float trajectories")
    p.add_argument("--steps", type=int, default=50, metavar="K", help="calibration and sampling: DDIM steps")
    p.add_argument("--states", type=int, default=1024, metavar="M", help="network inputs that weights are learned on")
    p.add_argument(
        "--sampling", choices=SAMPLINGS, default=SAMPLINGS[0], help="their time-steps: those that hurt most, or evenly"
    )
    p.add_argument(
        "--iterations", type=int, default=effort.iterations, metavar="I", help="steps of learning for each block"
    )


def session(
    args: argparse.Namespace, calibration: Calibration, weight_bits: int, input_bits: int, state: Path | None = None
) -> Session:
    """Return what the options ask for."""
    return Session(
        calibration,
        weight_bits,
        input_bits,
        coverage=args.coverage,
        reconstruction=ReconstructionConfig(iterations=args.iterations, seed=args.seed),
        states=args.states,
        sampling=args.sampling,
        state=state,
        quiet=args.quiet,
    )


def run(args: argparse.Namespace) -> int:
    """Calibrate, quantize, save."""
    options = parse_options(args.method, args.option)
    check_bits(args.weight_bits, args.input_bits)
    # other noise than samples of the same seed start from
    cfg = CalibrationConfig(images=args.images, steps=args.steps, seed=1_000_003 + args.seed)
    model = load_model(args.model)
    state = args.out.with_name(args.out.name + ".state")
    calibration = Calibration(model, cfg, quiet=args.quiet)
    asked = session(args, calibration, args.weight_bits, args.input_bits, state)
    bits = f"W{args.weight_bits}A{args.input_bits}"
    resumed = ", resuming" if state.exists() else ""
    say(args, f"{model.name}: {bits} {args.method}, {setting()}{resumed}; state in {state}")
    began = time.perf_counter()
    quantized = method(args.method)(asked, **options)
    quantized.save(args.out)
    state.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    ratio = 4 * model.network.parameter_count() / quantized.size_bytes()
    print(f"coverage {quantized.recipe['coverage']}")
    print("seconds " + ", ".join(f"{name} {value:.1f}" for name, value in quantized.seconds.items()))
    print(
        f"{args.out}: {bits} {args.method}, {quantized.size_bytes() / 1e6:.2f} MB "
        f"({ratio:.2f} x smaller than float32), {seconds:.1f} s"
    )
    write_json(
        args.json,
        {
            "recipe": quantized.recipe,
            "seconds": {**quantized.seconds, "all": seconds},
            "bytes": quantized.size_bytes(),
            "peak_memory_bytes": peak_memory(),
        },
    )
    return 0


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
