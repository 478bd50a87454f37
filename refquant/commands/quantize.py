"""refquant quantize: calibrate a float model without data and write a quantized one."""

from __future__ import annotations

import argparse
import time
from typing import Any

from ..diffusion.model import load_model
from ..quant.calibrate import CalibrationConfig, observe_inputs
from ..quant.methods.nearest import SEARCHES, quantize_nearest
from .common import add_verb, say, setting


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(
        verbs, "quantize", "Quantize a model after training, without data.",
        "refquant quantize mnist-unet --weight-bits 4 --out w4a8.safetensors", out="quantized.safetensors",
    )  # fmt: skip
    p.add_argument("model", nargs="?", default="mnist-unet", metavar="MODEL", help="asset name or checkpoint file")
    p.add_argument("--method", choices=("nearest",), default="nearest", help="how weights are rounded")
    p.add_argument("--weight-bits", type=int, default=8, metavar="B", help="2 to 8")
    p.add_argument("--input-bits", type=int, default=8, metavar="B", help="2 to 8, of activations")
    p.add_argument("--search", choices=SEARCHES, default="mse", help="how ranges are chosen")
    p.add_argument("--images", type=int, default=32, metavar="N", help="calibration: float trajectories")
    p.add_argument("--steps", type=int, default=50, metavar="K", help="calibration: steps of each")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Calibrate, quantize, save."""
    model = load_model(args.model)
    say(args, f"{model.name}: W{args.weight_bits}A{args.input_bits} {args.method}, {setting()}")
    began = time.perf_counter()
    calibration = CalibrationConfig(images=args.images, steps=args.steps, seed=args.seed)
    quantized = quantize_nearest(
        model, observe_inputs(model, calibration), calibration,
        weight_bits=args.weight_bits, input_bits=args.input_bits, search=args.search,
    )  # fmt: skip
    quantized.save(args.out)
    ratio = 4 * model.network.parameter_count() / quantized.size_bytes()
    print(
        f"{args.out}: W{args.weight_bits}A{args.input_bits} {args.method}, {quantized.size_bytes() / 1e6:.2f} MB "
        f"({ratio:.2f} x smaller than float32), {time.perf_counter() - began:.1f} s"
    )
    return 0
