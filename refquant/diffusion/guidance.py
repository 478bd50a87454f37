"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): away from "no class", towards the class.

    eps = eps(x_t, t, none) + w (eps(x_t, t, y) - eps(x_t, t, none))

w = 0 forgets the class, w = 1 is the conditional model, w > 1 exaggerates: images that are more surely of their
class, and less varied. (Ho & Salimans call w - 1 the strength.) Both halves are evaluated in one batch of 2 N
images; for w = 0 and w = 1 one of them has no weight and is not evaluated.

Where the network predicts v nothing changes: eps is affine in v, and the weights 1 - w and w have the sum 1.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import RangeError
from .sampling import Images


class ClassPredictor(Protocol):
    """A noise predictor that can be told classes, such as a `Denoiser` of a conditional network."""

    def __call__(self, x: Images, t: int, step: int, y: NDArray[np.integer] | None = None) -> Images:
        """Predict the noise in x (N, C, H, W) at time-step t, of images of the classes y (N,)."""


class Guided:
    """A noise predictor for samplers, guided to one class per image.

    Parameters
    ----------
    predict : ClassPredictor
    y : int array, (N,)
        Class of each image of the batch.
    classes : int
        K of the network, whose id K means "no class".
    weight : float
        w above, at least 0.
    """

    def __init__(self, predict: ClassPredictor, y: NDArray[np.integer], classes: int, weight: float = 1.0) -> None:
        if not 0 <= weight < np.inf:
            raise RangeError(f"guidance is {weight}; it must be at least 0 (1 is the conditional model).")
        self.predict, self.y, self.weight = predict, y, weight
        self.none = np.full(len(y), classes)

    def __call__(self, x: Images, t: int, step: int) -> Images:
        """Predict the noise in x (N, C, H, W)."""
        if self.weight in (0, 1):
            return self.predict(x, t, step, self.y if self.weight == 1 else self.none)
        both = self.predict(np.concatenate((x, x)), t, step, np.concatenate((self.y, self.none)))
        with_class, without = both[: len(x)], both[len(x) :]
        return without + x.dtype.type(self.weight) * (with_class - without)
