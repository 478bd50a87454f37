"""Judge a model by what it draws: against the float model's images, and against real digits.

Three questions, all from the same starting noise:

* how far are the quantized model's images from the float model's (`refquant.metrics.psnr`), and how
  does the difference grow from step to step;
* how far is the cloud of its images from the training set, as a small classifier trained here sees
  it (Frechet distance on that classifier's features; *not* the Inception FID of the literature);
* how many of its images does that classifier recognise with confidence above 0.9, and how many of a
  conditional model's as the class that was requested.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .diffusion.denoiser import NoisePredictor
from .diffusion.guidance import ClassPredictor, Guided
from .diffusion.model import DiffusionModel, load_classifier
from .diffusion.sampling import Callback, Images, NoiseSource, StepState
from .errors import RangeError
from .metrics import FeatureStats, feature_stats, frechet_distance, mse

BATCH = 64  # images sampled at a time: bounds memory, and is part of what "the same bits" means
CONFIDENT = 0.9


@dataclass(frozen=True, eq=False)
class Request:
    """What a conditional model is asked for.

    Attributes
    ----------
    y : int array, (N,)
        Class of each image.
    guidance : float
        Weight w of classifier-free guidance, see `refquant.diffusion.guidance`; 1 is the conditional model.
    """

    y: NDArray[np.integer]
    guidance: float = 1.0


@dataclass(frozen=True, eq=False)
class Run:
    """Images and the path they took.

    Attributes
    ----------
    images : float32 array, (N, C, H, W)
    path : float32 array, (steps, min(N, 64), C, H, W)
        x after every step, of the first batch.
    seconds : float
        Wall-clock time of the sampling.
    """

    images: Images
    path: NDArray[np.float32]
    seconds: float


def sample_run(
    eps: NoisePredictor | ClassPredictor,
    model: DiffusionModel,
    count: int,
    sampler: Callable[..., Images],
    *,
    seed: int,
    request: Request | None = None,
    on_step: Callback | None = None,
) -> Run:
    """Draw `count` images in batches of 64.

    Parameters
    ----------
    eps : NoisePredictor
    model : DiffusionModel
        Whose schedule and image shape are used.
    count : int
    sampler : callable
        With its options bound, such as ``partial(ddim_sample, steps=50)``.
    seed : int
    request : Request, optional
        For a conditional model, whose `eps` must then be a `ClassPredictor`; without it no image has a class.
    on_step : callable, optional
        Follows the progress, batch after batch.

    Returns
    -------
    Run

    Raises
    ------
    RangeError
        The images are not finite.
    """
    began = time.perf_counter()
    images: list[Images] = []
    path: list[Images] = []
    for first in range(0, max(count, 1), BATCH):

        def follow(state: StepState, first: int = first) -> None:
            if first == 0:
                path.append(state.x)
            if on_step is not None:
                on_step(state)

        noise = NoiseSource(seed, min(BATCH, count - first), model.image_shape, first)
        predict = eps
        if request is not None:
            predict = Guided(eps, request.y[first : first + BATCH], model.classes, request.guidance)
        images.append(sampler(predict, noise.draw(), model.schedule, noise, callback=follow))
    together = np.concatenate(images)
    if not np.isfinite(together).all():
        raise RangeError(
            "sampling gave NaN or infinity: the weights are damaged. Take the checkpoint from its source again."
        )
    return Run(together, np.stack(path), time.perf_counter() - began)


def per_step_error(run: Run, reference: Run) -> NDArray[np.float64]:
    """Mean squared difference of x after each step, (steps,), over the first batch of both runs."""
    return np.array([mse(a, b) for a, b in zip(run.path, reference.path, strict=True)])


class Judge:
    """The shipped classifier with the feature statistics of its training set.

    Parameters
    ----------
    name : str
        Asset name or path of a classifier.
    """

    def __init__(self, name: str = "mnist-classifier") -> None:
        self.classifier, reference, self.metadata = load_classifier(name)
        self.reference = FeatureStats(reference["mean"], reference["cov"], int(self.metadata["reference_count"]))

    def frechet(self, images: Images) -> float:
        """Frechet distance of the images' features (N, F) to the training set's, N >= 2."""
        stats = feature_stats(self.classifier.judge(images)[0])
        return frechet_distance(stats.mean, stats.cov, self.reference.mean, self.reference.cov)

    def confident(self, images: Images) -> float:
        """Share of the images whose most probable class has a probability above 0.9."""
        return float(np.mean(self.classifier.judge(images)[1].max(axis=1) > CONFIDENT))

    def obedient(self, images: Images, y: NDArray[np.integer]) -> float:
        """Share of the images (N, C, H, W) whose requested class y (N,) has a probability above 0.9."""
        return float(np.mean(self.classifier.judge(images)[1][np.arange(len(y)), y] > CONFIDENT))

    def recognised(self, images: Images, request: Request | None) -> float:
        """Share of the images (N, C, H, W) that are recognised: as what was requested, or else as anything."""
        return self.confident(images) if request is None else self.obedient(images, request.y)
