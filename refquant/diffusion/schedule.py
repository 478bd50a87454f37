"""Noise schedules: how much of the image is left after t + 1 steps of noise.

Everything is float64 until a sampler or the loss needs a number: 1 - alpha_bar at the clean end
of the cosine schedule is 4e-5, and float32 products over 1,000 steps would lose three of its
digits.

Convention: t is counted from 0 and ``t = 0`` is one step of noise; the paper's t is ours + 1, and
its alpha_bar_0 = 1 ("no noise") is what `alpha_bar_at` returns for t = -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError, UnknownNameError

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """The forward process q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I).

    Attributes
    ----------
    name : str
    betas : float64 array, (T,)
        Variance added at each step, in (0, 1).
    """

    name: str
    betas: Float64

    def __post_init__(self) -> None:
        if self.betas.dtype != np.float64 or self.betas.ndim != 1 or len(self.betas) == 0:
            raise RangeError("Schedule: betas must be a float64 vector with at least one step.")
        if not (np.all(self.betas > 0) and np.all(self.betas < 1)):
            raise RangeError(
                f"Schedule {self.name}: betas must lie in (0, 1), got {self.betas.min()}..{self.betas.max()}."
            )

    @property
    def timesteps(self) -> int:
        """T, the number of steps of the forward process."""
        return len(self.betas)

    @property
    def alpha_bar(self) -> Float64:
        """(T,), the product of 1 - beta up to and including each step; decreasing."""
        return np.cumprod(1 - self.betas)

    def alpha_bar_at(self, t: int) -> float:
        """alpha_bar of step t, and 1 for t = -1 (the clean image)."""
        return 1.0 if t == -1 else float(self.alpha_bar[t])

    def posterior_variance(self, t: int) -> float:
        """Variance of q(x_{t-1} | x_t, x_0), DDPM eq. 7: beta_t (1 - ab_{t-1}) / (1 - ab_t); 0 at t = 0."""
        return float(self.betas[t] * (1 - self.alpha_bar_at(t - 1)) / (1 - self.alpha_bar_at(t)))

    def q_sample(
        self, x_0: NDArray[np.float32], t: NDArray[np.integer], noise: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) noise (DDPM eq. 4); x_0, noise (N, ...), t (N,)."""
        ab = self.alpha_bar[t].reshape(-1, *(1,) * (x_0.ndim - 1))
        return np.sqrt(ab).astype(x_0.dtype) * x_0 + np.sqrt(1 - ab).astype(x_0.dtype) * noise


def linear(timesteps: int = 1000) -> Schedule:
    """Betas from 1e-4 to 0.02 (Ho et al. 2020, section 4), scaled by 1000/T for other T as in improved-diffusion."""
    _check(timesteps)
    factor = 1000 / timesteps
    betas = np.linspace(1e-4 * factor, 0.02 * factor, timesteps, dtype=np.float64)
    return Schedule("linear", np.minimum(betas, 0.999))


def cosine(timesteps: int = 1000) -> Schedule:
    """alpha_bar = cos²((t/T + s)/(1 + s) · π/2), s = 0.008, betas at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    _check(timesteps)
    u = np.arange(timesteps + 1, dtype=np.float64) / timesteps
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return Schedule("cosine", np.minimum(1 - f[1:] / f[:-1], 0.999))


SCHEDULES = {"linear": linear, "cosine": cosine}


def schedule(name: str, timesteps: int = 1000) -> Schedule:
    """Return a schedule by name; published schedules may be added here, never changed."""
    if name not in SCHEDULES:
        raise UnknownNameError(f"no noise schedule is called {name!r}. Known: {', '.join(SCHEDULES)}.")
    return SCHEDULES[name](timesteps)


def _check(timesteps: int) -> None:
    if timesteps < 1:
        raise RangeError(f"timesteps is {timesteps}; a schedule has at least one step.")
