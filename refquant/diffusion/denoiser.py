"""From a network on the tape to the function that samplers call.

A sampler knows nothing of networks. It calls ``eps(x, t, step)`` with x (N, C, H, W) float32,
the time-step t (one integer for the whole batch) and the index of the sampler's step, counted
from the noisiest, and gets the predicted noise, shaped like x. `Denoiser` makes such a function of
a UNet: it turns NCHW into NHWC and back, records no graph, and spreads the batch over the worker
threads in chunks of fixed size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, no_grad
from ..threads import parallel_map

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
        ``network(Tensor (N, H, W, C), t (N,)) -> Tensor (N, H, W, C)``, such as a `UNet`.
    chunk : int
        Images that one thread works on at a time. Samples may differ in the last bit between chunk
        sizes, because BLAS sums in another order; never between numbers of threads.
    """

    def __init__(self, network: Callable[[Tensor, NDArray[np.integer]], Tensor], chunk: int = 16) -> None:
        self.network, self.chunk = network, chunk

    def __call__(self, x: Images, t: int, step: int) -> Images:
        """Predict the noise in x (N, C, H, W)."""

        def run(part: NDArray[Any]) -> NDArray[Any]:
            with no_grad():
                nhwc = Tensor(np.ascontiguousarray(part.transpose(0, 2, 3, 1)))
                return self.network(nhwc, np.full(len(part), t)).data.transpose(0, 3, 1, 2)

        parts = [x[i : i + self.chunk] for i in range(0, len(x), self.chunk)]
        return np.concatenate(parallel_map(run, parts)).astype(x.dtype, copy=False)
