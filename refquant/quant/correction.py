"""A correction of a quantized model's answers, step by step: eps = (eps^ - mean) / gain.

It changes no weight and costs nothing, and is stored with the model so that every sampler uses it. `methods.ptqd`
measures what it must be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..diffusion.denoiser import NoisePredictor
from ..diffusion.sampling import Images
from ..errors import RangeError, ShapeError


@dataclass(frozen=True, eq=False)
class Correction:
    """What is taken out of the answers of a quantized model, for each of the sampler's S steps, noisiest first.

    Attributes
    ----------
    timesteps : int64 array, (S,)
        t of each step; neighbours may coincide.
    gain : float64 array, (S,)
    mean : float64 array, (S, C)
        For each channel of the images.
    """

    timesteps: NDArray[np.int64]
    gain: NDArray[np.float64]
    mean: NDArray[np.float64]

    def __post_init__(self) -> None:
        steps = (len(self.timesteps),)
        if self.timesteps.shape != steps or self.gain.shape != steps or self.mean.shape[:-1] != steps:
            shapes = [a.shape for a in self.arrays().values()]
            raise ShapeError(f"a correction is timesteps (S,), gain (S,) and mean (S, C) for S steps, got {shapes}.")

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return what a file holds; ``Correction(**arrays)`` is the way back."""
        return {"timesteps": self.timesteps, "gain": self.gain, "mean": self.mean}

    def applied(self, eps: NoisePredictor) -> NoisePredictor:
        """Return the corrected noise predictor; it raises RangeError at a step that was not measured."""

        def predict(x: Images, t: int, step: int, *y: NDArray[np.integer] | None) -> Images:
            steps, channels = self.mean.shape
            if not 0 <= step < steps or self.timesteps[step] != t:
                raise RangeError(
                    f"the noise at step {step}, t = {t} was not measured: the {steps} steps of these statistics are "
                    f"t = {self.timesteps[0]} to {self.timesteps[-1]}. Sample with those, or measure again."
                )
            if x.shape[1] != channels:
                raise ShapeError(f"images {x.shape} have {x.shape[1]} channels, the noise was measured for {channels}.")
            mean = self.mean[step].astype(x.dtype).reshape(1, -1, 1, 1)
            return (eps(x, t, step, *y) - mean) / x.dtype.type(self.gain[step])

        return predict
