"""refquant train: make a model from a data set; what it writes is what sample and quantize read."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from .. import data
from ..data.dataset import to_float
from ..diffusion.denoiser import PREDICTIONS
from ..diffusion.model import DiffusionModel, load_model, save_classifier
from ..diffusion.schedule import SCHEDULES, schedule
from ..diffusion.train import train
from ..errors import RangeError
from ..metrics import feature_stats, frechet_distance, mean_and_spread
from ..nn.classifier import Classifier, ClassifierConfig, accuracy, train_classifier
from ..nn.fit import FitConfig
from ..nn.networks import CONFIGS, build, config
from .common import add_verb, say, setting

REAL_DRAWS = 10  # random sets of 1,000 real test images that calibrate the Frechet distance
SPECIAL = "classifier"


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(
        verbs, "train", "Train a model on a data set; a run that is killed goes on where it was.",
        "refquant train mnist-unet --data shapes --steps 200 --out shapes-unet.safetensors", out="model.safetensors",
    )  # fmt: skip
    networks = [name for name, cfg in CONFIGS.items() if not cfg.learn_sigma]  # the loss teaches no variances
    p.add_argument("network", nargs="?", default="mnist-unet", choices=(*networks, SPECIAL), help="what to train")
    p.add_argument("--data", default="mnist", metavar="NAME", help=f"one of {', '.join(data.names())}")
    p.add_argument("--schedule", choices=tuple(SCHEDULES), help="noise schedule (default: cosine, or that of --start)")
    p.add_argument(
        "--timesteps", type=int, metavar="T", help="steps of the schedule (default: 1000, or those of --start)"
    )
    p.add_argument("--prediction", choices=PREDICTIONS, help="what the network answers (default: eps, or as --start)")
    p.add_argument("--shift", type=float, default=1.0, metavar="S", help="above 1: draw noisy time-steps more often")
    p.add_argument("--start", metavar="MODEL", help="begin with the weights of this model, trained before")
    p.add_argument("--steps", type=int, default=10000, metavar="K", help="updates of the weights")
    p.add_argument("--batch", type=int, default=64, metavar="B", help="images per update")
    p.add_argument("--rate", type=float, default=1.5e-3, metavar="LR", help="peak learning rate of Adam")
    p.add_argument("--warmup", type=int, default=300, metavar="K", help="steps of linear warm-up")
    p.add_argument("--decay", type=int, default=3000, metavar="K", help="last steps, in which the rate falls to 0")
    p.add_argument("--average", type=float, default=0.999, metavar="D", help="decay of the weights' moving average")
    p.add_argument("--chunk", type=int, default=16, metavar="C", help="images that a thread works on at a time")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, then write the averaged weights to --out; the state of the run lies in OUT.state until then."""
    if args.network == SPECIAL and (args.start is not None or args.shift != 1):
        raise RangeError(f"--start and --shift are for diffusion models; the {SPECIAL} is trained without them.")
    dataset = data.load(args.data, "train")
    cfg = FitConfig(
        steps=args.steps, batch=args.batch, rate=args.rate, warmup=args.warmup, decay=min(args.decay, args.steps),
        average=args.average, seed=args.seed, chunk=args.chunk,
    )  # fmt: skip
    state = args.out.with_name(args.out.name + ".state")
    resumed = state.exists()
    say(
        args, f"{'resuming' if resumed else 'training'} {args.network} on {dataset.name}, {setting()}; state in {state}"
    )
    began = time.perf_counter()
    rng = np.random.default_rng(cfg.seed)
    facts: dict[str, Any] = {"data": dataset.name, "fit": vars(cfg), "images_seen": cfg.steps * cfg.batch}
    if args.network == SPECIAL:
        classifier = Classifier(ClassifierConfig(), rng)
        losses = train_classifier(classifier, dataset, cfg, state=state, quiet=args.quiet)
        test = data.load(args.data, "test")
        features = classifier.judge(to_float(dataset.images))[0]
        stats = feature_stats(features)
        facts |= {"test_accuracy": accuracy(classifier, test), "reference_count": stats.count}
        facts["real_1000_frechet"] = _real_distance(classifier, test, stats.mean, stats.cov)
        save_classifier(args.out, classifier, {"mean": stats.mean, "cov": stats.cov}, facts)
        result = f"test accuracy {facts['test_accuracy']:.4f}"
    else:
        model = _beginning(args, facts | {"shift": args.shift}, rng)
        losses = train(
            model.network, dataset, model.schedule, cfg, prediction=model.prediction, shift=args.shift,
            start=model.metadata.get("start", ""), state=state, quiet=args.quiet,
        )  # fmt: skip
        model.metadata["loss"] = float(losses[-500:].mean())
        model.save(args.out)
        result = f"loss {model.metadata['loss']:.4f}"
    state.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    print(f"{args.out}: {args.network}, {cfg.steps} steps of {cfg.batch} images, {result}, {seconds:.0f} s")
    return 0


def _beginning(args: argparse.Namespace, facts: dict[str, Any], rng: np.random.Generator) -> DiffusionModel:
    """Return the untrained model, or that of --start under its own name, where the options do not say otherwise."""
    cfg = config(args.network)
    if args.start is None:
        noise = schedule(args.schedule or "cosine", 1000 if args.timesteps is None else args.timesteps)
        return DiffusionModel(args.out.stem, build(cfg, rng), noise, args.prediction or "eps", facts)
    base = load_model(args.start)
    if base.network.cfg != cfg:
        raise RangeError(f"--start {args.start} is not a {args.network}: it has {base.network.cfg}, not {cfg}.")
    kept, seen = base.schedule, base.metadata.get("images_seen", 0)
    noise = schedule(args.schedule or kept.name, kept.timesteps if args.timesteps is None else args.timesteps)
    facts |= {"start": base.metadata["data_sha256"], "images_seen": facts["images_seen"] + seen}
    return DiffusionModel(args.out.stem, base.network, noise, args.prediction or base.prediction, facts)


def _real_distance(judge: Classifier, test: data.Dataset, mean: np.ndarray, cov: np.ndarray) -> dict[str, float]:
    """Frechet distance of 1,000 real test images: what a perfect model would reach, with its spread."""
    features = judge.judge(to_float(test.images))[0]
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(REAL_DRAWS):
        s = feature_stats(features[rng.permutation(len(features))[:1000]])
        draws.append(frechet_distance(s.mean, s.cov, mean, cov))
    return mean_and_spread(draws)._asdict()
