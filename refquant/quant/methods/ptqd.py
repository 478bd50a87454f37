"""PTQD (He et al., NeurIPS 2023, arXiv 2305.10657): measure the quantization noise, and take it out in the sampler.

A quantized network answers eps^ = eps + D. Part of the error D is a multiple of the answer itself; the rest
is noise, with a mean and a spread:

    D = k eps + D',    D' uncorrelated with eps,    mean mu of each channel,  standard deviation sigma_q

k, mu and sigma_q are measured once for each step of the sampler, on float trajectories. Sampling then divides
by 1 + k and subtracts mu; and where the sampler adds noise of its own (eta > 0), it adds less of it, because
the network has already added some:

    eps     = (eps^ - mu) / (1 + k)                         sigma_q <- sigma_q / (1 + k)
    c       = |sqrt(1 - ab' - sigma²) - sqrt(ab' (1 - ab) / ab)| sigma_q       what sigma_q becomes in x_{t'}
    sigma'  = sqrt(sigma² - c²), or 0 where c >= sigma

with max(k, 0) for k throughout. No weight changes: it goes on top of any method. With eta = 0 all of it is
a wrapper around the noise predictor, `corrected`, and any sampler takes that.

    paper                               function here                 authors' code (ziplab/PTQD 84a120a)
    eps and D along float trajectories  `measure_noise`               ldm/models/diffusion/ddim.py, collectQuantError
    k: slope of D on eps                `noise_statistics`            quant_scripts/analyze_error.py:36-61
    mu: bias of each channel            `noise_statistics`            quant_scripts/analyze_error.py:10-33
    sigma_q: spread of the residual     `noise_statistics`            quant_scripts/analyze_error.py:63-87
    correlated noise, bias correction   `corrected`                   ldm/models/diffusion/ddim.py:438-463
    variance schedule calibration       `absorb`, `ptqd_ddim_sample`  ldm/models/diffusion/ddim.py:611-666

Where we differ and why.

1. The paper removes the bias of the residual D'; the released code measures that of D, which contains k
   times the channel's mean of eps. ``bias="raw"`` is the released one, and the default; ``bias="residual"``
   is the paper's, and takes a planted k and mu out exactly (where the channels of eps share their mean).
2. Statistics are kept by the index of the sampler's step, 0 at the noisiest. The authors keep mu by the
   ascending index, and k and sigma_q by t, which would mix steps that share a t (quadratic spacing).
3. Sums are float64; theirs are float32.
4. Clipping of the predicted image, which their latent-space sampler does not have, is an option as in
   `refquant.diffusion.ddim`.
5. The paper also chooses bits by step from a signal-to-noise ratio. Not done here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...diffusion.ddim import ddim_sample, ddim_sigma, ddim_step
from ...diffusion.denoiser import NoisePredictor
from ...diffusion.model import DiffusionModel
from ...diffusion.sampling import Callback, Images, NoiseSource, StepState, with_previous
from ...diffusion.schedule import Schedule
from ...errors import RangeError, ShapeError, UnknownNameError
from ..calibrate import CalibrationConfig
from ..correction import Correction
from ..quantized import QuantizedModel
from ..record import calibration_classes

BIASES = ("raw", "residual")

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NoiseStatistics:
    """The quantization noise of a model at each of the sampler's S steps, from the noisiest on.

    Attributes
    ----------
    timesteps : int64 array, (S,)
        t of each step; neighbours may coincide.
    k : float64 array, (S,)
        Correlation with the float model's answer, as measured; negative ones are not corrected.
    mean : float64 array, (S, C)
        Bias of each channel.
    std : float64 array, (S,)
        Spread of the residual, before the division by 1 + k.
    """

    timesteps: NDArray[np.int64]
    k: Float64
    mean: Float64
    std: Float64

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        shapes = {name: np.shape(a) for name, a in self.arrays().items()}
        if not steps or self.mean.ndim != 2 or any(s[0] != steps for s in shapes.values()):
            raise ShapeError(f"noise statistics are (S,), (S,), (S, C) and (S,) for S >= 1 steps, got {shapes}.")
        if not all(np.isfinite(a).all() for a in self.arrays().values()) or (self.std < 0).any():
            raise RangeError("noise statistics contain NaN, infinity or a negative std: measure them again.")

    @property
    def gain(self) -> Float64:
        """1 + max(k, 0), (S,): by how much the correlated part enlarges the answer."""
        return 1 + np.maximum(self.k, 0)

    def correction(self) -> Correction:
        """What a quantized model keeps of this: gain and mean."""
        return Correction(self.timesteps, self.gain, self.mean)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what a checkpoint holds; `from_arrays` is the way back."""
        return {"timesteps": self.timesteps, "k": self.k, "mean": self.mean, "std": self.std}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> NoiseStatistics:
        """Make statistics of the arrays of that name; others are ignored."""
        names = ("timesteps", "k", "mean", "std")
        if missing := [name for name in names if name not in arrays]:
            raise ShapeError(f"noise statistics need the arrays {', '.join(names)}; {', '.join(missing)} is missing.")
        return cls(*(arrays[name] for name in names))


def noise_statistics(eps: Images, error: Images, bias: str = "raw") -> tuple[float, Float64, float]:
    """Measure the noise of one step.

    Parameters
    ----------
    eps : array, (N, C, H, W)
        The float model's answers.
    error : array, (N, C, H, W)
        The quantized model's answers to the same questions, minus those.
    bias : {"raw", "residual"}
        Whose mean is taken: of the error, as released, or of what max(k, 0) leaves of it, as in the paper.

    Returns
    -------
    k : float
        Slope of the least-squares line of error on eps, over all elements; 0 where eps is constant.
    mean : float64 array, (C,)
        Over images and places.
    std : float
        Mean over the images of the standard deviation (n - 1) of ``error - max(k, 0) eps``, all channels of
        an image together.
    """
    if bias not in BIASES:
        raise UnknownNameError(f"PTQD knows no bias {bias!r}. Known: {', '.join(BIASES)}.")
    e, d = np.asarray(eps, dtype=np.float64), np.asarray(error, dtype=np.float64)
    if e.shape != d.shape or e.ndim != 4 or e.size == 0 or e[0].size < 2:
        raise ShapeError(
            f"noise statistics are of two arrays (N, C, H, W) of one shape, with at least one image of at least two "
            f"elements; got {e.shape} and {d.shape}."
        )
    if not (np.isfinite(e).all() and np.isfinite(d).all()):
        raise RangeError("a model's answer contains NaN or infinity: its weights or its scales are damaged.")
    centred = e - e.mean()
    variance = (centred**2).mean()
    k = float((centred * d).mean() / variance) if variance > 0 else 0.0
    residual = d - max(k, 0.0) * e
    mean = (d if bias == "raw" else residual).mean(axis=(0, 2, 3))
    std = residual.reshape(len(e), -1).std(axis=1, ddof=1).mean()
    return k, mean, float(std)


def measure_noise(
    model: DiffusionModel,
    quantized: NoisePredictor,
    cfg: CalibrationConfig,
    *,
    eta: float = 0.0,
    spacing: str = "uniform",
    clip: bool = True,
    bias: str = "raw",
) -> NoiseStatistics:
    """Ask both models at every step of the float model's own trajectories.

    Parameters
    ----------
    model : DiffusionModel
        The float model.
    quantized : NoisePredictor
        Of the quantized one, for example ``QuantizedModel.denoiser()``.
    cfg : CalibrationConfig
        Its images, steps and seed; `every` is not used, for each step has its own noise. The authors take
        1,024 images.
    eta, spacing, clip : float, str, bool
        Of the sampler that will be corrected, see `refquant.diffusion.ddim.ddim_sample`.
    bias : {"raw", "residual"}
        See `noise_statistics`.

    Returns
    -------
    NoiseStatistics
    """
    original, y = model.denoiser(), calibration_classes(model.classes, cfg.images)
    timesteps: list[int] = []
    found: list[tuple[float, Float64, float]] = []

    def both(x: Images, t: int, step: int) -> Images:
        told = () if y is None else (y,)
        e = original(x, t, step, *told)
        timesteps.append(t)
        found.append(noise_statistics(e, quantized(x, t, step, *told) - e, bias))
        return e

    noise = NoiseSource(cfg.seed, cfg.images, model.image_shape)
    ddim_sample(both, noise.draw(), model.schedule, noise, steps=cfg.steps, eta=eta, spacing=spacing, clip=clip)
    k, mean, std = zip(*found, strict=True)
    return NoiseStatistics(np.array(timesteps), np.array(k), np.array(mean), np.array(std))


def corrected(eps: NoisePredictor, statistics: NoiseStatistics) -> NoisePredictor:
    """Take the correlated part and the bias out of a noise predictor: ``(eps^ - mu) / (1 + max(k, 0))``.

    Parameters
    ----------
    eps : NoisePredictor
    statistics : NoiseStatistics
        From `measure_noise`.

    Returns
    -------
    NoisePredictor
        For a sampler that visits the time-steps at which the noise was measured; RangeError from any other.
    """
    return statistics.correction().applied(eps)


def correct(quantized: QuantizedModel, cfg: CalibrationConfig, *, bias: str = "raw") -> QuantizedModel:
    """Return the same quantized model with its answers corrected, whatever method made it.

    Parameters
    ----------
    quantized : QuantizedModel
        Without a correction; its float original must be at hand (made now, not loaded).
    cfg : CalibrationConfig
        Trajectories on which the noise is measured. Their seed should be another than that of the calibration,
        or the noise is measured on what was fitted.
    bias : {"raw", "residual"}

    Returns
    -------
    QuantizedModel
    """
    began = time.perf_counter()
    statistics = measure_noise(quantized.base, quantized.denoiser(), cfg, bias=bias)
    recipe = quantized.recipe
    options = {**recipe["options"], "on": recipe["method"], "bias": bias, "noise": cfg.to_json()}
    seconds = {**quantized.seconds, "noise": time.perf_counter() - began}
    recipe = {**recipe, "method": "ptqd", "options": options}
    return replace(quantized, recipe=recipe, correction=statistics.correction(), seconds=seconds)


def absorb(sigma: float, sigma_q: float, ab: float, ab_after: float) -> float:
    """Standard deviation of the noise still to be added, sigma', once the network's own is counted.

    Parameters
    ----------
    sigma : float
        What DDIM would add, `refquant.diffusion.ddim.ddim_sigma`.
    sigma_q : float
        Standard deviation of the noise in the corrected eps.
    ab, ab_after : float
        alpha_bar at this step and at the one after it.

    Returns
    -------
    float

    Notes
    -----
    eps enters x_{t'} twice, through the image and through the direction. c is the size of both together,
    times sigma_q. The coefficient is the authors', with sigma and not sigma' under its root.
    """
    c = abs(math.sqrt(max(0.0, 1 - ab_after - sigma * sigma)) - math.sqrt(ab_after * (1 - ab) / ab)) * sigma_q
    return math.sqrt(sigma * sigma - c * c) if c < sigma else 0.0


def ptqd_ddim_sample(
    eps: NoisePredictor,
    x: Images,
    schedule: Schedule,
    noise: NoiseSource,
    *,
    statistics: NoiseStatistics,
    eta: float = 0.0,
    clip: bool = True,
    callback: Callback | None = None,
) -> Images:
    """Draw images with DDIM, corrected for the quantization noise, at the steps where that was measured.

    With eta = 0 this is, bit for bit, ``ddim_sample(corrected(eps, statistics), ...)``.

    Parameters
    ----------
    eps : NoisePredictor
        Of the quantized model, as it is.
    x, schedule, noise : array, Schedule, NoiseSource
        See `refquant.diffusion.ddim.ddim_sample`.
    statistics : NoiseStatistics
        Of that model; they also say which time-steps to visit.
    eta, clip, callback : float, bool, callable
        See there. The callback sees the corrected eps.

    Returns
    -------
    float32 array, (N, C, H, W)
    """
    if not 0 <= eta <= 1:
        raise RangeError(f"eta is {eta}; it must lie between 0 (deterministic) and 1 (as noisy as DDPM).")
    if statistics.timesteps.max() >= schedule.timesteps:
        raise RangeError(
            f"the noise was measured up to t = {statistics.timesteps.max()}, but the schedule ends at "
            f"{schedule.timesteps - 1}. Use the statistics of this model."
        )
    predict, residual_std = corrected(eps, statistics), statistics.std / statistics.gain
    alpha_bar, steps = schedule.alpha_bar, len(statistics.timesteps)
    for step, t, after in with_previous(statistics.timesteps.tolist()):
        ab, ab_after = float(alpha_bar[t]), float(alpha_bar[after]) if after >= 0 else 1.0
        e = predict(x, t, step)
        sigma = absorb(ddim_sigma(ab, ab_after, eta), residual_std[step], ab, ab_after)
        x, x_0 = ddim_step(x, e, ab, ab_after, sigma, clip)
        if sigma > 0:
            x = x + np.float32(sigma) * noise.draw()
        if callback is not None:
            callback(StepState(step, steps, t, x, x_0, e))
    return x
