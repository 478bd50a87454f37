"""DDIM (Song et al. 2021): the same network, fewer steps, noise only where asked.

Eq. 12 with ab = alpha_bar_t, ab' = alpha_bar of the step after it:

    x_0^    = (x_t - sqrt(1 - ab) eps) / sqrt(ab)
    sigma   = eta sqrt((1 - ab') / (1 - ab)) sqrt(1 - ab / ab')                 (eq. 16)
    x_{t'}  = sqrt(ab') x_0^ + sqrt(1 - ab' - sigma²) eps + sigma z

eta = 0 is deterministic; eta = 1 with all T steps is DDPM with the posterior variance.
"""

from __future__ import annotations

import numpy as np

from ..errors import RangeError
from .ddpm import predict_x_0
from .denoiser import NoisePredictor
from .sampling import Callback, Images, NoiseSource, StepState, timestep_sequence, with_previous
from .schedule import Schedule


def ddim_sample(
    eps: NoisePredictor,
    x: Images,
    schedule: Schedule,
    noise: NoiseSource,
    *,
    steps: int = 50,
    eta: float = 0.0,
    spacing: str = "uniform",
    clip: bool = True,
    callback: Callback | None = None,
) -> Images:
    """Draw images with `steps` steps of DDIM.

    Parameters
    ----------
    eps : NoisePredictor
    x : float32 array, (N, C, H, W)
        Standard normal noise, usually ``noise.draw()``.
    schedule : Schedule
    noise : NoiseSource
        Drawn from only where eta > 0.
    steps : int
        Steps to take, 1 to T.
    eta : float
        0 (deterministic) to 1 (as noisy as DDPM).
    spacing : {"uniform", "quadratic"}
        See `timestep_sequence`.
    clip : bool
        Clip the predicted image to [-1, 1] at each step. The direction towards x_t is then
        recomputed from the clipped image, so that x_{t'} stays on the schedule.
    callback : callable, optional
        Receives a `StepState` after each step.

    Returns
    -------
    float32 array, (N, C, H, W)
    """
    if not 0 <= eta <= 1:
        raise RangeError(f"eta is {eta}; it must lie between 0 (deterministic) and 1 (as noisy as DDPM).")
    alpha_bar = schedule.alpha_bar
    for step, t, after in with_previous(timestep_sequence(schedule.timesteps, steps, spacing)):
        ab, ab_after = alpha_bar[t], alpha_bar[after] if after >= 0 else 1.0
        e = eps(x, t, step)
        sigma = ddim_sigma(ab, ab_after, eta)
        x, x_0 = ddim_step(x, e, ab, ab_after, sigma, clip)
        if sigma > 0:
            x = x + np.float32(sigma) * noise.draw()
        if callback is not None:
            callback(StepState(step, steps, t, x, x_0, e))
    return x


def ddim_step(x: Images, eps: Images, ab: float, ab_after: float, sigma: float, clip: bool) -> tuple[Images, Images]:
    """One step (eq. 12) with any sigma: x_{t'} before its noise, and the predicted clean image."""
    x_0 = predict_x_0(x, eps, ab, clip)
    direction = (x - np.float32(np.sqrt(ab)) * x_0) / np.float32(np.sqrt(1 - ab)) if clip else eps
    return np.float32(np.sqrt(ab_after)) * x_0 + np.float32(np.sqrt(1 - ab_after - sigma**2)) * direction, x_0


def ddim_sigma(ab: float, ab_after: float, eta: float) -> float:
    """Standard deviation of the noise added between two time-steps, eq. 16; 0 on the way to the clean image."""
    return float(eta * np.sqrt((1 - ab_after) / (1 - ab)) * np.sqrt(max(0.0, 1 - ab / ab_after)))
