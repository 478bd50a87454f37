"""refquant demo: the main job. Float and quantized digits from the same noise, a table and a picture."""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from .._version import __version__
from ..deploy.runtime import integer_denoiser
from ..diffusion.ddim import ddim_sample
from ..diffusion.denoiser import NoisePredictor
from ..diffusion.guidance import ClassPredictor
from ..diffusion.model import load_model
from ..errors import LoweringError, RangeError
from ..evaluate import BATCH, Judge, Run, sample_run
from ..metrics import per_image_psnr, psnr
from ..quant.calibrate import Calibration, CalibrationConfig
from ..quant.methods import method
from ..quant.quantized import QuantizedModel
from ..quant.reconstruct import ReconstructionConfig
from ..quant.session import Session
from ..viz import difference_images, labelled_rows, save_png
from .common import add_classes, add_model, add_verb, print_table, progress, requested, say, setting, write_json

ROWS = {  # by kind of network: method, bits of weights, of activations
    "unet": (("nearest", 8, 8), ("nearest", 4, 8), ("brecq", 4, 8), ("tfmq", 4, 8)),
    "dit": (("nearest", 8, 8), ("nearest", 4, 8), ("tqdit", 4, 8), ("tfmq", 4, 8)),
}
IMAGES, STATES = 32, 256  # of the calibration: half of the defaults of `refquant quantize`
SHOWN = 12  # images of each row of the picture


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(
        verbs, "demo", "Draw digits in float and quantized, from the same noise: a table and a picture.",
        "refquant demo --seed 7 --out demo.png", out="refquant-demo.png",
    )  # fmt: skip
    add_model(p)
    p.add_argument("-n", type=int, default=64, metavar="N", help="images per method")
    p.add_argument("--steps", type=int, default=25, metavar="K", help="DDIM steps")
    p.add_argument("--iterations", type=int, default=60, metavar="I", help="steps of learning for each block")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    add_classes(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sample in float, then with each quantized model; print the table and write the picture."""
    if args.n < 2:
        raise RangeError(f"-n is {args.n}; the table needs at least 2 images.")
    model, judge = load_model(args.model), Judge()
    request = requested(args, model, args.n)
    asked = "" if request is None else f"guidance {request.guidance:g}, "
    say(args, f"{model.name}: {args.n} images, DDIM {args.steps} steps, {asked}seed {args.seed}, {setting()}")

    sampler = partial(ddim_sample, steps=args.steps)

    def draw(label: str, eps: NoisePredictor | ClassPredictor) -> Run:
        with progress(-(-args.n // BATCH) * args.steps, label, args) as bar:
            return sample_run(
                eps, model, args.n, sampler, seed=args.seed, request=request, on_step=lambda _: bar.update()
            )

    reference = draw("float32", model.denoiser())
    rows: list[dict[str, Any]] = []

    def judge_row(name: str, bits: str, size: int, run: Run) -> None:
        rows.append({
            "method": name, "bits": bits, "size_mb": size / 1e6, "psnr_db": psnr(run.images, reference.images),
            "psnr_median_db": float(np.median(per_image_psnr(run.images, reference.images))),
            "frechet": judge.frechet(run.images), "recognised": judge.recognised(run.images, request),
            "seconds": run.seconds, "calibration_seconds": 0.0,
        })  # fmt: skip

    judge_row("float32", "W32A32", 4 * model.network.parameter_count(), reference)
    pictures = [("float32", reference.images[:SHOWN])]
    calibration = Calibration(model, CalibrationConfig(images=IMAGES, steps=args.steps), quiet=args.quiet)
    learning = ReconstructionConfig(iterations=args.iterations, seed=args.seed)
    states = min(STATES, IMAGES * args.steps)
    simulated: dict[str, str] = {}  # why, by row
    for name, weight_bits, input_bits in ROWS[model.network.cfg.kind]:
        began = time.perf_counter()
        session = Session(
            calibration, weight_bits, input_bits, reconstruction=learning, states=states, quiet=args.quiet
        )
        quantized = method(name)(session)
        bits = f"W{weight_bits}A{input_bits}"
        say(args, f"{bits} {name}: calibrated without data in {time.perf_counter() - began:.1f} s")
        eps, why = predictor(quantized)
        if why:
            simulated[f"{name} {bits}"] = why
        made = draw(f"{bits} {name}", eps)
        judge_row(name, bits, quantized.size_bytes(), made)
        rows[-1]["calibration_seconds"] = time.perf_counter() - began - made.seconds
        pictures.append((f"{bits} {name}\n{rows[-1]['psnr_db']:.1f} dB", made.images[:SHOWN]))
        pictures.append(("difference", difference_images(made.images[:SHOWN], reference.images[:SHOWN])))

    facts = {
        "model": model.name, "n": args.n, "steps": args.steps, "seed": args.seed, "iterations": args.iterations,
        "rows": ", ".join(f"{r['method']} {r['bits']}" for r in rows), "kernel": kernels.active(),
        "refquant": __version__,
    }  # fmt: skip
    save_png(args.out, labelled_rows(pictures), facts)
    table = [
        (r["method"], r["bits"], f"{r['size_mb']:.2f}", decibel(r["psnr_db"]), decibel(r["psnr_median_db"]),
         f"{r['frechet']:.1f}", f"{100 * r['recognised']:.0f} %", f"{r['calibration_seconds']:.1f}",
         f"{r['seconds']:.1f}")
        for r in rows
    ]  # fmt: skip
    header = ("method", "bits", "MB", "PSNR dB", "median dB", "Frechet*", "recognised", "calibration s", "sampling s")
    print_table(header, table)
    print(f"* small sample of {args.n}, on the features of mnist-classifier: compare rows, not papers.")
    if request is not None:
        print(f"Recognised are images of the requested digit, guidance {request.guidance:g}.")
    if len(simulated) < len(rows) - 1:
        print(f"Quantized rows are computed in integers, by the C core's kernel {kernels.active()}.")
    if simulated:
        which = "Quantized rows" if len(simulated) == len(rows) - 1 else ", ".join(simulated)
        print(
            f"{which}: simulated in float32, and their seconds are not those of integers. "
            + " ".join(dict.fromkeys(simulated.values()))
        )
    print(f"picture: {args.out}")
    for r in rows:  # JSON has no infinity
        for key in ("psnr_db", "psnr_median_db"):
            r[key] = None if math.isinf(r[key]) else r[key]
    write_json(args.json, {**facts, "rows": rows})
    return 0


def decibel(number: float) -> str:
    """One digit; the float row's infinity is a dash."""
    return "-" if math.isinf(number) else f"{number:.1f}"


def predictor(quantized: QuantizedModel) -> tuple[NoisePredictor | ClassPredictor, str]:
    """The model in integers on the C core; or simulated in float32, and why."""
    if kernels.active() == "ref":  # in NumPy, integer products are ten times slower than float ones
        return quantized.denoiser(), "There is no C core."
    try:
        return integer_denoiser(quantized, "c"), ""
    except LoweringError as error:
        return quantized.denoiser(), str(error)
