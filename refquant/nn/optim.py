"""Adam, gradient clipping, learning-rate schedule and exponential moving average.

All of them see the network as one long float32 vector: `flatten` makes every parameter a view
into it, so that an update of 1.5 million weights is a dozen NumPy calls instead of a dozen per
layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .module import Module

Vector = NDArray[np.float32]


def flatten(module: Module) -> Vector:
    """Move all parameters into one vector and make each a view of its part; return the vector."""
    parameters = module.parameters()
    flat = np.concatenate([p.data.reshape(-1) for p in parameters])
    split(flat, module)
    return flat


def split(flat: Vector, module: Module) -> None:
    """Make every parameter of `module` a view of its part of `flat`, in the order of `flatten`."""
    start = 0
    for p in module.parameters():
        p.data = flat[start : start + p.data.size].reshape(p.shape)
        start += p.data.size


def clip_norm(gradient: Vector, limit: float) -> float:
    """Scale `gradient` in place so that its Euclidean norm is at most `limit`; return the norm before."""
    norm = float(np.sqrt(np.dot(gradient, gradient)))
    if norm > limit:
        gradient *= np.float32(limit / norm)
    return norm


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: int) -> float:
    """Up linearly over `warmup` steps, flat at `peak`, down linearly to 0 over the last `decay` of `steps`.

    The flat part is the same for every length of run, so a run can be made longer or shorter while it lasts.

    Parameters
    ----------
    step, steps : int
        Where the run is, from 0, and how long it is.
    peak : float
    warmup, decay : int
        Steps.

    Returns
    -------
    float
    """
    up = (step + 1) / warmup if step < warmup else 1.0
    down = (steps - step) / decay if steps - step < decay else 1.0
    return peak * min(up, down)


@dataclass
class Adam:
    """Adam (Kingma & Ba 2015) on one vector, updated in place.

    Attributes
    ----------
    m, v : float32 array, (P,)
        Running mean of the gradient and of its square.
    """

    m: Vector
    v: Vector
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    @classmethod
    def zeros(cls, size: int) -> Adam:
        """Start with empty moments."""
        return cls(np.zeros(size, np.float32), np.zeros(size, np.float32))

    def update(self, weights: Vector, gradient: Vector, rate: float, step: int) -> None:
        """One step (`step` counts from 0); overwrites `gradient`, which serves as scratch."""
        self.m *= self.beta1
        self.m += np.float32(1 - self.beta1) * gradient
        np.square(gradient, out=gradient)
        gradient *= 1 - self.beta2
        self.v *= self.beta2
        self.v += gradient
        # weights -= rate * (m / c1) / (sqrt(v / c2) + eps), with the corrections folded into scalars
        c1, c2 = 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (step + 1)
        np.sqrt(self.v, out=gradient)
        gradient *= np.float32(1 / np.sqrt(c2))
        gradient += self.eps
        np.divide(self.m, gradient, out=gradient)
        gradient *= rate / c1
        weights -= gradient


def update_average(average: Vector, weights: Vector, decay: float, step: int) -> None:
    """Exponential moving average in place; the decay warms up as (1 + step)/(10 + step) so the start is forgotten."""
    d = min(decay, (1 + step) / (10 + step))
    average *= d
    average += np.float32(1 - d) * weights
