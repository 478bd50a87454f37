"""Calibration without data: noise pushed through the float model shows which values activations take.

The float sampler runs once, exactly as it will be used; at every few steps each layer's input is
recorded by an observer. No image of a data set is needed, because the sampler's own trajectory *is* the
distribution that the quantized network will meet (PTQ4DM, Q-Diffusion, TFMQ-DM section 4).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..diffusion.ddim import ddim_sample
from ..diffusion.model import DiffusionModel
from ..diffusion.sampling import Images, NoiseSource
from ..errors import RangeError
from ..threads import parallel_map
from .observers import RangeObserver
from .wrap import wrap

# Values kept per layer for the mse search. 80 candidates on 16,384 values take 80 ms a layer, and the
# error of a candidate is then known to 1 %, less than neighbouring candidates of the grid differ.
SAMPLE_SIZE = 16384

CHUNK = 8  # images a worker thread records at a time


@dataclass(frozen=True)
class CalibrationConfig:
    """Which float trajectories are recorded.

    Attributes
    ----------
    images : int
        Trajectories.
    steps : int
        DDIM steps of each (eta 0, uniform spacing).
    every : int
        Record at every so many steps, beginning with the first; uniform in the sampler's step index.
    seed : int
        Of the starting noise; kept apart from the noise that samples are drawn from.
    """

    images: int = 32
    steps: int = 50
    every: int = 5
    seed: int = 1_000_003

    def __post_init__(self) -> None:
        for name in ("images", "steps", "every"):
            if getattr(self, name) < 1:
                raise RangeError(f"calibration: {name} is {getattr(self, name)}; it must be at least 1.")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def observe_inputs(model: DiffusionModel, cfg: CalibrationConfig) -> dict[str, RangeObserver]:
    """Run the float sampler and watch the input of every convolution and linear layer.

    Returns
    -------
    dict of str to RangeObserver
        By layer name. Ask one for ``minmax(spec)`` or ``mse(spec)``.

    Notes
    -----
    The worker threads record chunks of the batch; the observers see them afterwards, in order, so that
    what they keep does not depend on timing.
    """
    _, layers = wrap(model.network)
    observers = {name: RangeObserver(sample_size=SAMPLE_SIZE, seed=cfg.seed + i) for i, name in enumerate(layers)}

    def eps(x: Images, t: int, step: int) -> Images:
        recordings = parallel_map(
            lambda part: _record(model, part, t, step % cfg.every == 0),
            [x[i : i + CHUNK] for i in range(0, len(x), CHUNK)],
        )
        for _, seen in recordings:
            for name, value in seen:
                observers[name].update(value)
        return np.concatenate([e for e, _ in recordings])

    noise = NoiseSource(cfg.seed, cfg.images, model.image_shape)
    ddim_sample(eps, noise.draw(), model.schedule, noise, steps=cfg.steps)
    return observers


def _record(model: DiffusionModel, x: Images, t: int, watch: bool) -> tuple[Images, list[tuple[str, Images]]]:
    """Predict the noise in one chunk and, if asked, list every layer's name and input in order of execution."""
    network, layers = wrap(model.network)
    seen: list[tuple[str, Images]] = []
    if watch:
        for layer in layers.values():
            layer.watcher = lambda name, value: seen.append((name, value))
    return model.denoiser(network, chunk=len(x))(x, t, 0), seen
