"""refquant sample: draw images with a float or quantized model."""

from __future__ import annotations

import argparse
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np

from .. import io
from .._version import __version__
from ..diffusion.ddim import ddim_sample
from ..diffusion.ddpm import VARIANCES, ddpm_sample
from ..errors import RefquantError
from ..evaluate import BATCH, sample_run
from ..viz import image_grid, save_png
from .common import add_classes, add_engine, add_verb, open_model, progress, requested, say, setting


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(
        verbs, "sample", "Draw images with a model.",
        "refquant sample mnist-unet -n 16 --steps 50 --seed 7 --out digits.png", out="samples.png",
    )  # fmt: skip
    p.add_argument("model", nargs="?", default="mnist-unet", metavar="MODEL", help="asset name or checkpoint file")
    p.add_argument("-n", type=int, default=16, metavar="N", help="number of images")
    p.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim", help="ddpm takes all steps of the schedule")
    p.add_argument("--steps", type=int, default=50, metavar="K", help="steps of ddim")
    p.add_argument("--eta", type=float, default=0.0, metavar="E", help="noise of ddim: 0 none, 1 as much as ddpm")
    p.add_argument("--spacing", choices=("uniform", "quadratic"), default="uniform", help="time-steps of ddim")
    p.add_argument("--variance", choices=VARIANCES, default="posterior", help="noise of ddpm")
    add_classes(p)
    add_engine(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw, and write a picture grid (.png) or raw float32 (N, C, H, W) in [-1, 1] (.npy)."""
    if args.out.suffix not in (".png", ".npy"):
        raise RefquantError(f"{args.out}: --out ends in .png (a picture grid) or .npy (raw float32), nothing else.")
    opened = open_model(args.model, args.engine)
    base = opened.base
    say(args, f"{opened.description}, {setting()}")
    request = requested(args, base, args.n)
    steps = args.steps if args.sampler == "ddim" else base.schedule.timesteps
    sampler = (
        partial(ddim_sample, steps=steps, eta=args.eta, spacing=args.spacing)
        if args.sampler == "ddim"
        else partial(ddpm_sample, variance=args.variance)
    )
    with progress(-(-args.n // BATCH) * steps, "sample", args) as bar:
        made = sample_run(
            opened.eps, base, args.n, sampler, seed=args.seed, request=request, on_step=lambda _: bar.update()
        )
    images = np.clip(made.images, -1, 1)
    facts = {
        "model": opened.description, "n": args.n, "sampler": args.sampler, "steps": steps, "seed": args.seed,
        "refquant": __version__,
    }  # fmt: skip
    facts |= {"eta": args.eta, "spacing": args.spacing} if args.sampler == "ddim" else {"variance": args.variance}
    if request is not None:
        facts |= {"classes": args.classes or list(range(base.classes)), "guidance": request.guidance}
    if args.out.suffix == ".png":
        save_png(args.out, image_grid(images, scale=2), facts)
    else:
        buffer = BytesIO()
        np.save(buffer, images.astype(np.float32))
        io.write_atomically(args.out, [buffer.getvalue()])
    print(f"{args.out}: {args.n} images, {args.sampler} {steps} steps, seed {args.seed}, {made.seconds:.1f} s")
    return 0
