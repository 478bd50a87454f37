"""refquant evaluate: how good are a model's images, over several seeds."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..diffusion.ddim import ddim_sample
from ..diffusion.model import load_model
from ..errors import RangeError
from ..evaluate import BATCH, CONFIDENT, Judge, per_step_error, sample_run
from ..metrics import mean_and_spread, psnr
from .common import (
    add_classes,
    add_engine,
    add_verb,
    open_model,
    print_table,
    progress,
    requested,
    say,
    setting,
    write_json,
)


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(
        verbs, "evaluate", "Judge a model's images: Frechet distance, recognised share, PSNR to the float model.",
        "refquant evaluate mnist-unet -n 200 --runs 2 --steps 20",
    )  # fmt: skip
    p.add_argument("model", nargs="?", default="mnist-unet", metavar="MODEL", help="asset name or checkpoint file")
    p.add_argument("-n", type=int, default=1000, metavar="N", help="images of each run")
    p.add_argument(
        "--runs", type=int, default=3, metavar="R", help="runs, with seeds S, S+1, ...; they give the spread"
    )
    p.add_argument("--steps", type=int, default=50, metavar="K", help="DDIM steps")
    p.add_argument("--eta", type=float, default=0.0, metavar="E", help="noise of ddim: 0 none, 1 as much as ddpm")
    p.add_argument("--reference", metavar="MODEL", help="float model to compare with, from the same noise (PSNR)")
    p.add_argument("--judge", default="mnist-classifier", metavar="MODEL", help="classifier whose features are used")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    add_classes(p)
    add_engine(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sample `--runs` times and print one row with spreads."""
    if args.n < 2 or args.runs < 1:
        raise RangeError(f"-n is {args.n} and --runs is {args.runs}; at least 2 images and 1 run are needed.")
    judge = Judge(args.judge)
    opened = open_model(args.model, args.engine)
    reference = load_model(args.reference) if args.reference else None
    if reference is not None and reference.classes != opened.base.classes:
        raise RangeError(
            f"--reference {args.reference} knows {reference.classes} classes, {args.model} {opened.base.classes}."
        )
    request = requested(args, opened.base, args.n)
    say(args, f"{opened.description}, {setting()}")
    errors: list[np.ndarray] = []
    names = ("frechet", "recognised", "recognised as any", "psnr_db", "seconds")
    numbers: dict[str, list[float]] = {name: [] for name in names}
    batches = -(-args.n // BATCH)
    sampler = partial(ddim_sample, steps=args.steps, eta=args.eta)
    with progress(args.runs * args.steps * batches * (2 if reference else 1), "evaluate", args) as bar:
        for seed in range(args.seed, args.seed + args.runs):
            follow = lambda _: bar.update()  # noqa: E731
            made = sample_run(opened.eps, opened.base, args.n, sampler, seed=seed, request=request, on_step=follow)
            numbers["frechet"].append(judge.frechet(made.images))
            numbers["recognised"].append(judge.recognised(made.images, request))
            if request is not None:
                numbers["recognised as any"].append(judge.confident(made.images))
            numbers["seconds"].append(made.seconds)
            if reference is not None:
                eps = reference.denoiser()
                wanted = sample_run(eps, reference, args.n, sampler, seed=seed, request=request, on_step=follow)
                numbers["psnr_db"].append(psnr(made.images, wanted.images))
                errors.append(per_step_error(made, wanted))
    rows = [(key, _with_spread(values)) for key, values in numbers.items() if values]
    steps = np.mean(errors, axis=0).tolist() if errors else []  # mean over runs of the error after each step
    rows += [
        (f"mse after step {k + 1}", f"{steps[k]:.2e}") for k in sorted({0, len(steps) // 2, len(steps) - 1}) if steps
    ]
    how = f"DDIM {args.steps} steps, eta {args.eta:g}"
    if request is not None:
        how += f", guidance {request.guidance:g}"
    print(f"{opened.description}: {args.runs} runs of {args.n} images, {how}, seeds from {args.seed}")
    print_table(("measure", "mean ± std"), rows)
    real = judge.metadata["real_1000_frechet"]
    print(f"frechet: on the features of {args.judge}, not the Inception FID; ", end="")
    print(f"1,000 real test images have {real['mean']:.2f} ± {real['std']:.2f}")
    what = "a digit" if request is None else "the digit that was requested"
    print(f"recognised: share of the images in which {args.judge} sees {what}, with confidence above {CONFIDENT}")
    names = ("n", "runs", "steps", "eta", "seed", "judge", "reference", "classes", "guidance")
    setup = {name: getattr(args, name) for name in names}
    found = {"model": opened.description, "real_1000_frechet": real, "per_step_mse": steps, **numbers}
    write_json(args.json, {**setup, **found})
    return 0


def _with_spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    if not np.isfinite(values).all():  # a PSNR of two equal runs
        return str(values[0])
    mean, std = mean_and_spread(values)
    return f"{mean:.3f} ± {std:.3f}"
