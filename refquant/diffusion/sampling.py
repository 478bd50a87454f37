"""What all samplers share: the starting noise, the callback, and the list of time-steps.

A sampler is a plain function ``sampler(eps, x, schedule, ..., callback=None)``: eps is a noise
predictor (`refquant.diffusion.denoiser`), x the starting noise (N, C, H, W), the result the images.
The callback, if given, receives a `StepState` after every step.

Noise of image i is a function of (seed, i) alone. The first 16 images of a run of 1,000 are the
images of a run of 16, and two methods that are given the same seed start from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError, UnknownNameError

Images = NDArray[np.float32]


@dataclass(frozen=True)
class StepState:
    """The state of a sampler after one step.

    Attributes
    ----------
    step, steps : int
        Index of the step, from 0 at the noisiest, and how many there are.
    t : int
        Time-step at which the network was called.
    x : float32 array, (N, C, H, W)
        The image after the step (for the next, less noisy, time-step).
    x_0 : float32 array
        The clean image predicted at this step.
    eps : float32 array
        The noise predicted at this step.
    """

    step: int
    steps: int
    t: int
    x: Images
    x_0: Images
    eps: Images


Callback = Callable[[StepState], None]


class NoiseSource:
    """Gaussian noise for a batch, one independent stream per image.

    Parameters
    ----------
    seed : int
    count : int
        Images in the batch.
    shape : tuple of int
        Shape of one image, (C, H, W).
    first : int
        Index of the first image of the batch, for sampling a long run in parts.
    """

    def __init__(self, seed: int, count: int, shape: tuple[int, ...], first: int = 0) -> None:
        if count < 1:
            raise RangeError(f"the number of images is {count}; it must be at least 1.")
        self.shape = shape
        self._streams = [np.random.default_rng([seed, 4, first + i]) for i in range(count)]

    def draw(self) -> Images:
        """Next (N, C, H, W) of standard normal noise, float32."""
        return np.stack([s.standard_normal(self.shape, dtype=np.float32) for s in self._streams])


def timestep_sequence(timesteps: int, steps: int, spacing: str) -> list[int]:
    """Choose the time-steps that a sampler visits, noisiest first.

    Parameters
    ----------
    timesteps : int
        T of the schedule.
    steps : int
        How many to visit, 1 to T.
    spacing : {"uniform", "quadratic"}
        uniform: 0, c, 2c, ... with c = T // steps (the first `steps` of them).
        quadratic: the integer parts of linspace(0, sqrt(0.8 T), steps)², denser near the image.
        Neighbours may coincide in the quadratic case (100 of 1,000 steps visit 96 different
        ones), which is why tables per step are indexed by the step and not by t.

    Returns
    -------
    list of int, length `steps`

    Notes
    -----
    Both are those of ermongroup/ddim (``runners/diffusion.py``), which the quantization papers use.
    """
    if not 1 <= steps <= timesteps:
        raise RangeError(f"steps is {steps}; the model's schedule allows 1 to {timesteps}.")
    if spacing == "uniform":
        return [i * (timesteps // steps) for i in range(steps)][::-1]
    if spacing == "quadratic":
        return [int(s) for s in np.linspace(0, np.sqrt(timesteps * 0.8), steps) ** 2][::-1]
    raise UnknownNameError(f"no spacing is called {spacing!r}. Known: uniform, quadratic.")


def with_previous(sequence: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (step, t, the t after it), with -1 (the clean image) after the last."""
    yield from zip(range(len(sequence)), sequence, [*sequence[1:], -1], strict=True)
