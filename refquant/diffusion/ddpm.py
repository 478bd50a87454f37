"""Ancestral sampling, Algorithm 2 of DDPM (Ho et al. 2020): all T steps, fresh noise in each.

    x_0^   = (x_t - sqrt(1 - ab_t) eps) / sqrt(ab_t)                         the image it now sees
    mean   = sqrt(ab_{t-1}) beta_t / (1 - ab_t) x_0^ + sqrt(alpha_t) (1 - ab_{t-1}) / (1 - ab_t) x_t   (eq. 7)
    x_{t-1} = mean + sigma_t z,   z = 0 at t = 0

With clipping off, the mean is the paper's (x_t - beta_t eps / sqrt(1 - ab_t)) / sqrt(alpha_t), eq. 11.
"""

from __future__ import annotations

import numpy as np

from ..errors import UnknownNameError
from .denoiser import NoisePredictor
from .sampling import Callback, Images, NoiseSource, StepState
from .schedule import Schedule

VARIANCES = ("posterior", "beta")


def ddpm_sample(
    eps: NoisePredictor,
    x: Images,
    schedule: Schedule,
    noise: NoiseSource,
    *,
    variance: str = "posterior",
    clip: bool = True,
    callback: Callback | None = None,
) -> Images:
    """Draw images with all T steps of the ancestral sampler.

    Parameters
    ----------
    eps : NoisePredictor
    x : float32 array, (N, C, H, W)
        Standard normal noise, usually ``noise.draw()``.
    schedule : Schedule
    noise : NoiseSource
        For the noise of each step.
    variance : {"posterior", "beta"}
        sigma_t² = beta_t (1 - ab_{t-1}) / (1 - ab_t), right for data that is a point, or beta_t, right
        for data that is N(0, I): the two extremes of section 3.2.
    clip : bool
        Clip the predicted image to [-1, 1] at each step, as the authors' code does.
    callback : callable, optional
        Receives a `StepState` after each step.

    Returns
    -------
    float32 array, (N, C, H, W)
    """
    if variance not in VARIANCES:
        raise UnknownNameError(f"no variance is called {variance!r}. Known: {', '.join(VARIANCES)}.")
    T = schedule.timesteps
    alpha_bar = schedule.alpha_bar  # one cumulative product, not one per step
    for step, t in enumerate(range(T - 1, -1, -1)):
        ab, ab_prev, beta = alpha_bar[t], alpha_bar[t - 1] if t > 0 else 1.0, schedule.betas[t]
        e = eps(x, t, step)
        x_0 = predict_x_0(x, e, ab, clip)
        on_x_0 = np.sqrt(ab_prev) * beta / (1 - ab)
        on_x_t = np.sqrt(1 - beta) * (1 - ab_prev) / (1 - ab)
        x = np.float32(on_x_0) * x_0 + np.float32(on_x_t) * x
        if t > 0:
            sigma = np.sqrt(beta if variance == "beta" else beta * (1 - ab_prev) / (1 - ab))
            x = x + np.float32(sigma) * noise.draw()
        if callback is not None:
            callback(StepState(step, T, t, x, x_0, e))
    return x


def predict_x_0(x: Images, eps: Images, alpha_bar: float, clip: bool) -> Images:
    """x_0 = (x_t - sqrt(1 - ab) eps) / sqrt(ab): eq. 4 solved for x_0, clipped to [-1, 1] where asked."""
    x_0 = (x - np.float32(np.sqrt(1 - alpha_bar)) * eps) / np.float32(np.sqrt(alpha_bar))
    return np.clip(x_0, -1, 1) if clip else x_0
