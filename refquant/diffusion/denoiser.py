"""From a network on the tape to the function that samplers call.

A sampler knows nothing of networks. It calls ``eps(x, t, step)`` with x (N, C, H, W) float32,
the time-step t (one integer for the whole batch) and the index of the sampler's step, counted
from the noisiest, and gets the predicted noise, shaped like x. `Denoiser` makes such a function of
a network: it turns NCHW into NHWC and back, records no graph, and spreads the batch over the worker
threads in chunks of fixed size.

What a network was trained to predict is its `prediction`:

    eps     the noise, as in DDPM (Ho et al. 2020)
    v       sqrt(ab) eps - sqrt(1 - ab) x_0 (Salimans & Ho 2022, appendix D), from which the noise is
            eps = sqrt(1 - ab) x_t + sqrt(ab) v

At high noise x_t is nearly the noise itself. A network that predicts eps must copy it through all its
layers, and what it copies badly is blown up by 1 / sqrt(ab) in the image; one that predicts v gets the
copy for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, no_grad
from ..errors import UnknownNameError
from ..threads import parallel_map
from .schedule import Schedule

Images = NDArray[np.float32]


class NoisePredictor(Protocol):
    """What a sampler needs: eps(x, t, step) -> noise of the shape of x."""

    def __call__(self, x: Images, t: int, step: int) -> Images:
        """Predict the noise in x (N, C, H, W) at time-step t."""


class Denoiser:
    """A network as a noise predictor.

    Parameters
    ----------
    network : callable
        ``network(Tensor (N, H, W, C), t (N,)) -> Tensor (N, H, W, C)``, such as a `UNet`; further channels of
        the result, which hold variances, are left aside. A conditional one takes ``y=`` (N,), too.
    chunk : int
        Images that one thread works on at a time. Samples may differ in the last bit between chunk
        sizes, because BLAS sums in another order; never between numbers of threads.
    v_of : Schedule, optional
        Given where the network predicts v of this schedule; else it predicts eps.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        chunk: int = 16,
        v_of: Schedule | None = None,
    ) -> None:
        self.network, self.chunk, self.v_of = network, chunk, v_of

    def __call__(self, x: Images, t: int, step: int, y: NDArray[np.integer] | None = None) -> Images:
        """Predict the noise in x (N, C, H, W); of a conditional network, for the classes y (N,), if given."""

        def run(part: slice) -> NDArray[Any]:
            images = x[part]
            classes = {} if y is None else {"y": y[part]}
            with no_grad():
                nhwc = Tensor(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
                out = self.network(nhwc, np.full(len(images), t), **classes).data
                return out[..., : x.shape[1]].transpose(0, 3, 1, 2)

        parts = [slice(i, i + self.chunk) for i in range(0, len(x), self.chunk)]
        out = np.concatenate(parallel_map(run, parts)).astype(x.dtype, copy=False)
        if self.v_of is None:
            return out
        ab = self.v_of.alpha_bar[t]
        return x.dtype.type(np.sqrt(1 - ab)) * x + x.dtype.type(np.sqrt(ab)) * out


PREDICTIONS = ("eps", "v")


def target(prediction: str, schedule: Schedule, x_0: Images, t: NDArray[np.integer], noise: Images) -> Images:
    """What a network of this `prediction` should answer for x_t made of x_0, noise (N, ...) at t (N,)."""
    if prediction == "eps":
        return noise
    if prediction != "v":
        raise UnknownNameError(f"no prediction is called {prediction!r}. Known: {', '.join(PREDICTIONS)}.")
    ab = schedule.alpha_bar[t].reshape(-1, *(1,) * (x_0.ndim - 1))
    return np.sqrt(ab).astype(x_0.dtype) * noise - np.sqrt(1 - ab).astype(x_0.dtype) * x_0
