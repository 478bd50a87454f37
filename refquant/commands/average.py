"""refquant average: the mean of the weights of several models that were trained one from the other."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from ..diffusion.model import DiffusionModel, load_model
from ..errors import RefquantError
from .common import add_verb


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(
        verbs, "average", "Average the weights of models that were trained one from the other.",
        "refquant average mnist-unet mnist-unet --out averaged.safetensors", seed=False, out="averaged.safetensors",
    )  # fmt: skip
    p.add_argument("models", nargs="+", metavar="MODEL", help="asset names or checkpoint files, two or more")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write a model whose weights are the mean of the given ones."""
    averaged = average([load_model(name) for name in args.models], args.out.stem)
    averaged.save(args.out)
    print(f"{args.out}: the mean of {len(args.models)} models")
    return 0


def average(models: list[DiffusionModel], name: str) -> DiffusionModel:
    """Return a model with the mean of the models' weights.

    Notes
    -----
    Fine-tuned models lie in one basin, and their mean lies deeper in it than each of them (Wortsman et al. 2022,
    "Model soups", arXiv 2203.05482). The moving average of one run does the same over a shorter stretch.

    Raises
    ------
    RefquantError
        There are fewer than two, or their networks, schedules or predictions differ.
    """
    if len(models) < 2:
        raise RefquantError(f"average: {len(models)} model is given; give two or more.")
    first = models[0]
    for other in models[1:]:
        for what in ("network", "schedule", "timesteps", "prediction"):
            if other.metadata.get(what) != first.metadata.get(what):
                raise RefquantError(
                    f"average: {other.name} and {first.name} differ in {what}: {other.metadata.get(what)} and "
                    f"{first.metadata.get(what)}. Average models that were trained one from the other."
                )
    share = 1 / len(models)
    for parameters in zip(*(model.network.parameters() for model in models), strict=True):
        parameters[0].data = sum(share * p.data.astype(np.float64) for p in parameters).astype(np.float32)
    kept = ("data", "fit", "shift", "start", "images_seen", "loss", "data_sha256")
    sources = [{key: model.metadata[key] for key in kept if key in model.metadata} for model in models]
    facts = {
        "data": first.metadata.get("data"),
        "mean_of": sources,
        "images_seen": max(source.get("images_seen", 0) for source in sources),
    }
    return DiffusionModel(name, first.network, first.schedule, first.prediction, facts)
