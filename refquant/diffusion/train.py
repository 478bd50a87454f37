"""Training a noise predictor: DDPM's simple loss (Ho et al. 2020, eq. 14).

    L = E_{t, x_0, eps} || eps - eps_theta(sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps, t) ||²

or the same with v in the place of eps (see `denoiser`). An error in v weighs the time-steps otherwise:
||v - v_theta||² = ||eps - eps_theta||² / ab_t, so that the noisy steps, where the shape of the image is
decided, count as much as the clean ones, where it is polished.

One deviation: the time-steps of a batch are stratified, one uniform draw from each of B equal
parts of [0, T). Each t is still uniform, and the batch's loss varies less, because it always
holds easy and hard time-steps in equal parts.

`shift` draws noisy time-steps more often (Esser et al. 2024, eq. 23): u uniform in [0, 1) becomes
t / T = s u / (1 + (s - 1) u), whose density is s at the noisy end and 1/s at the clean one; s = 1 is uniform.
It pays where the image's shape is what a briefly trained network gets wrong: real images noised to
t = 780 of 1,000 come back as real ones, so that all of the error is made in the noisiest fifth.

A conditional network is told the class of each image, and drops some of them itself (see `refquant.nn.dit`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, ops
from ..data.dataset import Dataset, to_float
from ..errors import RangeError, ShapeError
from ..nn.fit import FitConfig, epoch_order, fit
from ..nn.networks import Network
from .denoiser import target
from .schedule import Schedule


@dataclass(frozen=True)
class NoisyChunk:
    """Part of a batch: x_t and target (N, H, W, C), t (N,), a generator for dropout, and classes y (N,) or None."""

    x_t: NDArray[np.float32]
    target: NDArray[np.float32]
    t: NDArray[np.int64]
    rng: np.random.Generator
    y: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.t)


def noisy_chunks(
    images: NDArray[np.uint8],
    schedule: Schedule,
    cfg: FitConfig,
    step: int,
    prediction: str = "eps",
    shift: float = 1.0,
    labels: NDArray[np.int64] | None = None,
) -> list[NoisyChunk]:
    """Build the batch of one step from images (N, C, H, W) uint8, labels (N,); a function of (seed, step) alone."""
    index = epoch_order(len(images), cfg, step)
    x_0 = np.ascontiguousarray(to_float(images[index]).transpose(0, 2, 3, 1))
    rng = np.random.default_rng([cfg.seed, 2, step])
    noise = rng.standard_normal(x_0.shape, dtype=np.float32)
    # one draw per stratum; images are in random order already, so which image gets which t is random too
    u = (np.arange(cfg.batch) + rng.random(cfg.batch)) / cfg.batch
    t = (shift * u / (1 + (shift - 1) * u) * schedule.timesteps).astype(np.int64)
    t = np.minimum(t, schedule.timesteps - 1)
    x_t = schedule.q_sample(x_0, t, noise)
    wanted = target(prediction, schedule, x_0, t, noise)
    y = None if labels is None else labels[index]
    # interleave, so that every chunk holds time-steps from the whole range
    parts = -(-cfg.batch // cfg.chunk)
    return [
        NoisyChunk(
            x_t[i::parts], wanted[i::parts], t[i::parts], np.random.default_rng([cfg.seed, 3, step, i]),
            None if y is None else y[i::parts],
        )
        for i in range(parts)
    ]  # fmt: skip


def train(
    model: Network,
    data: Dataset,
    schedule: Schedule,
    cfg: FitConfig,
    *,
    prediction: str = "eps",
    shift: float = 1.0,
    start: str = "",
    state: Path | None = None,
    save_seconds: float = 60.0,
    quiet: bool = False,
) -> NDArray[np.float32]:
    """Train `model` in place with the loss above, leave the averaged weights in it, return the loss curve.

    `shift` > 0 prefers noisy time-steps (see above). `start` names the weights that the model brought along, so
    that a state file is refused by a run that began elsewhere; empty for fresh ones. See
    `refquant.nn.fit.fit` for `state`, `save_seconds` and `quiet`.

    Parameters
    ----------
    model : UNet or DiT
    data : Dataset
    schedule : Schedule
    cfg : FitConfig
    prediction : {"eps", "v"}
        What the network learns to answer.
    shift : float
        Above 1 prefers noisy time-steps (module docstring).
    start : str
        Names the weights that the model brought along, so that a state file is refused by a run that began
        elsewhere; empty for fresh ones.
    state : Path, optional
    save_seconds : float
    quiet : bool
        These three as for `refquant.nn.fit.fit`.

    Returns
    -------
    float32 array, (steps,)
        The loss of each step.
    """
    if not 0 < shift < np.inf:
        raise RangeError(f"shift is {shift}; it must be above 0 (1 is uniform, 3 prefers noisy time-steps).")
    net = model.cfg
    want = (net.image_channels, net.image_size, net.image_size)
    if data.images.shape[1:] != want:
        raise ShapeError(
            f"the network draws images (C, H, W) = {want}, the data set {data.name!r} has {data.images.shape[1:]}. "
            "Choose a data set or a network that fits."
        )
    if net.learn_sigma:
        raise RangeError("this network answers variances, too, which the loss here does not teach: learn_sigma=False.")
    if net.classes and data.labels.max() >= net.classes:
        raise RangeError(
            f"the network knows {net.classes} classes, the data set {data.name!r} has {data.labels.max() + 1}. "
            "Choose a data set or a network that fits."
        )
    labels = data.labels if net.classes else None

    def loss(chunk: NoisyChunk) -> Tensor:
        classes = {} if chunk.y is None else {"y": chunk.y}
        return ops.mse(model(Tensor(chunk.x_t), chunk.t, chunk.rng, **classes), chunk.target)

    return fit(
        model,
        lambda step: noisy_chunks(data.images, schedule, cfg, step, prediction, shift, labels),
        loss,
        cfg,
        state=state,
        recipe={
            "network": net.to_json(),
            "data": data.name,
            "data_sha256": hashlib.sha256(np.ascontiguousarray(data.images)).hexdigest(),
            "schedule": schedule.name,
            "timesteps": schedule.timesteps,
            "prediction": prediction,
            "shift": shift,
            "start": start,
            **({} if labels is None else {"labels_sha256": hashlib.sha256(labels.tobytes()).hexdigest()}),
        },
        save_seconds=save_seconds,
        quiet=quiet,
    )
