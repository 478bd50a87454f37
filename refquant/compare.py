"""One quantized model beside its float original, in all numbers of the comparison table.

`measure` samples from the same noise as the float model, for several seeds, and looks at the temporal features on
the way. What it gives is a plain dict, fit for JSON; `table` and `plots` make what people look at from such dicts.

    psnr_db             to the float images, for each seed: 10 log10(4 / mean squared error over all images); the few
                        images that turn into other digits decide it
    psnr_median_db      of the median image, for each seed: what most images look like
    frechet             on the shipped classifier's features, for each seed; not the Inception FID
    recognised          share of the images in which that classifier sees a digit, with confidence above 0.9, for each
                        seed; of a conditional model, the digit that was requested
    per_step_mse        error of x after each step of the sampler, (S,), mean over the seeds
    feature_squared     squared error of the temporal features, summed over channels and blocks: mean over all t,
                        over the t that the calibration visited, over the others, and the worst t
    feature_cosine      smallest over blocks at each t: mean over t, and the worst
    bytes               codes, scales, tables and what stays float
    bit_operations      of one call of the network for one image

Temporal features of a conditional transformer, its modulations, depend on the class as well: their errors are taken
over every t with every class and with none, for guidance asks for none, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .deploy.runtime import integer_denoiser
from .diffusion.ddim import ddim_sample
from .diffusion.denoiser import NoisePredictor
from .diffusion.guidance import ClassPredictor
from .diffusion.model import DiffusionModel
from .diffusion.sampling import Callback, Images
from .evaluate import Judge, Request, Run, per_step_error, sample_run
from .metrics import mean_and_spread, per_image_psnr, psnr
from .quant.cost import bit_operations
from .quant.quantized import QuantizedModel
from .quant.temporal import every_condition, feature_errors, features, quantized_features

PIECE = 1024  # conditions whose features are compared at a time: 11,000 of mnist-dit have 160 MB

HEADER = (
    "method",
    "bits",
    "PSNR dB", "median dB",
    "Frechet", "recognised %",
    "feature error", "worst error", "worst cosine",
    "MB",
    "GBOP",
    "seconds",
    "peak MB",
)


@dataclass(frozen=True, eq=False)
class Reference:
    """The float model's own images, one run a seed, and its temporal features."""

    model: DiffusionModel
    runs: dict[int, Run]
    steps: int
    judge: Judge
    request: Request | None = None

    @classmethod
    def draw(
        cls,
        model: DiffusionModel,
        count: int,
        seeds: Sequence[int],
        steps: int,
        on_step: Callback | None = None,
        request: Request | None = None,
    ) -> Reference:
        """Sample the float model `count` times for each seed, with DDIM of `steps` steps, for what is requested."""
        found = cls(model, {}, steps, Judge(), request)
        eps = model.denoiser()
        found.runs.update({seed: found.sample(eps, count, seed, on_step) for seed in seeds})
        return found

    def sample(self, eps: NoisePredictor | ClassPredictor, count: int, seed: int, on_step: Callback | None) -> Run:
        """Sample with this predictor as the float model was sampled."""
        sampler = partial(ddim_sample, steps=self.steps)
        return sample_run(eps, self.model, count, sampler, seed=seed, request=self.request, on_step=on_step)

    def row(self) -> dict[str, Any]:
        """The float model's own numbers."""
        return {
            "method": "float32",
            "bits": "W32A32",
            "frechet": [self.judge.frechet(run.images) for run in self.runs.values()],
            "recognised": [self.judge.recognised(run.images, self.request) for run in self.runs.values()],
            "bytes": 4 * self.model.network.parameter_count(),
        }


def measure(
    quantized: QuantizedModel, reference: Reference, on_step: Callback | None = None, engine: str = "fake"
) -> tuple[dict[str, Any], Images]:
    """All numbers of one quantized model, simulated or in integers (`engine`), and its images of the first seed."""
    eps = quantized.denoiser() if engine == "fake" else integer_denoiser(quantized, engine)
    decibel, median, distance, recognised, errors, shown = [], [], [], [], [], None
    for seed, wanted in reference.runs.items():
        made = reference.sample(eps, len(wanted.images), seed, on_step)
        decibel.append(psnr(made.images, wanted.images))
        median.append(float(np.median(per_image_psnr(made.images, wanted.images))))
        distance.append(reference.judge.frechet(made.images))
        recognised.append(reference.judge.recognised(made.images, reference.request))
        errors.append(per_step_error(made, wanted))
        shown = made.images if shown is None else shown
    recipe = quantized.recipe
    row = {
        "method": recipe["method"],
        "bits": f"W{recipe['weight_bits']}A{recipe['input_bits']}",
        "options": recipe["options"],
        "coverage": recipe["coverage"],
        "psnr_db": decibel,
        "psnr_median_db": median,
        "frechet": distance,
        "recognised": recognised,
        "per_step_mse": np.mean(errors, axis=0).tolist(),
        "bytes": quantized.size_bytes(),
        "bit_operations": bit_operations(quantized),
        **temporal_errors(quantized, reference.model),
    }
    return row, shown


def temporal_errors(quantized: QuantizedModel, model: DiffusionModel) -> dict[str, Any]:
    """Errors of the temporal features at all t (and of all classes), and apart at those that the sampler visits."""
    squared, worst, count = [], [], max(1, PIECE // (model.classes + 1))
    for start in range(0, model.schedule.timesteps, count):
        t = np.arange(start, min(start + count, model.schedule.timesteps))
        told = every_condition(t, model.classes)
        found = feature_errors(told[0], quantized_features(quantized, *told), features(model.network, *told))
        squared.append(found.squared.reshape(len(t), -1))  # (t, K + 1)
        worst.append(found.cosine.min(axis=0).reshape(len(t), -1).min(axis=1))
    error, cosine = np.concatenate(squared), np.concatenate(worst)
    visited = np.isin(np.arange(len(error)), quantized.timesteps())
    return {
        "feature_squared": float(error.mean()),
        "feature_squared_visited": float(error[visited].mean()),
        "feature_squared_unseen": float(error[~visited].mean()) if not visited.all() else None,
        "feature_squared_worst": float(error.max()),
        "feature_worst_t": int(error.max(axis=1).argmax()),
        "feature_cosine": float(cosine.mean()),
        "feature_cosine_worst": float(cosine.min()),
        "feature_cosine_by_t": np.round(cosine, 5).tolist(),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table, in the order of `HEADER`; what does not apply is a dash."""
    seconds = row.get("seconds", {})
    return (
        row["method"],
        row["bits"],
        _spread(row.get("psnr_db"), 1),
        _spread(row.get("psnr_median_db"), 1),
        _spread(row.get("frechet"), 1),
        _spread([100 * share for share in row.get("recognised", ())], 0),
        f"{row['feature_squared']:.3f}" if "feature_squared" in row else "-",
        f"{row['feature_squared_worst']:.2f}" if "feature_squared_worst" in row else "-",
        f"{row['feature_cosine_worst']:.4f}" if "feature_cosine_worst" in row else "-",
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['bit_operations'] / 1e9:.2f}" if "bit_operations" in row else "-",
        f"{seconds['all']:.0f}" if "all" in seconds else "-",
        f"{row['peak_memory_bytes'] / 1e6:.0f}" if "peak_memory_bytes" in row else "-",
    )


def markdown(rows: Sequence[dict[str, Any]], caption: str) -> str:
    """The table as Markdown, with its caption, and the seconds of each phase beneath."""
    lines = [caption, "", "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += ["", "Seconds by phase:", ""]
    for row in rows:
        if row.get("seconds"):
            phases = ", ".join(f"{k} {v:.1f}" for k, v in row["seconds"].items() if k != "all")
            lines.append(f"- {row['method']} {row['bits']}: {phases}")
    covered = sorted({row["coverage"] for row in rows if "coverage" in row})
    return "\n".join([*lines, "", *(f"Coverage {text}." for text in covered), ""])


def _spread(values: Sequence[float] | None, digits: int) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    mean, std = mean_and_spread(list(values))
    return f"{mean:.{digits}f} ± {std:.{digits}f}"
