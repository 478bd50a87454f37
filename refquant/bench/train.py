"""One update in training a UNet: here and in PyTorch eager.

The networks have the same weights, and before anything is timed their outputs must agree to 1e-4;
a time of a wrong answer is no time. Engines take turns in every round, so that a machine that is
busy for a while slows all of them, and the best round of each counts. PyTorch runs in its default
layout and in channels-last, which is the faster one on most CPUs.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import numpy as np

from ..autograd import Tensor, ops
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import cosine
from ..diffusion.train import NoisyChunk
from ..errors import RangeError, RefquantError
from ..nn.fit import FitConfig, Updater
from ..nn.unet import UNet
from ..threads import get_threads
from .unet_networks import random_unet

TOLERANCE = 1e-4  # of outputs of order 1, after some 60 layers in float32


def run(network: str, batch: int, repeats: int, seed: int) -> dict[str, float]:
    """Return seconds of one update of each engine, by name.

    Parameters
    ----------
    network : str
        A named UNet; weights are random, those that start at zero too.
    batch, repeats, seed : int
    """
    if batch < 1 or repeats < 1:
        raise RangeError(f"bench: batch is {batch} and repeats is {repeats}; both must be at least 1.")
    model, rng = random_unet(network, seed), np.random.default_rng([seed, 1])
    cfg = model.cfg
    x = rng.standard_normal((batch, cfg.image_channels, cfg.image_size, cfg.image_size), dtype=np.float32)
    t = rng.integers(0, 1000, batch)
    engines: dict[str, Callable[[], object]] = {"refquant": _our_update(model, x, t)}
    if importlib.util.find_spec("torch") is not None:
        from . import torch_unet

        outputs = Denoiser(model)(x, 500, 0)
        for name, layout in torch_unet.LAYOUTS.items():
            peer = torch_unet.build(model, layout, get_threads())
            difference = float(np.abs(torch_unet.forward(peer, x, 500, layout)().numpy() - outputs).max())
            if difference > TOLERANCE * max(1.0, float(np.abs(outputs).max())):
                raise RefquantError(f"bench: {name} and refquant differ by {difference:.2g}; nothing was timed.")
            engines[name] = torch_unet.update(peer, x, t, layout)
    best = dict.fromkeys(engines, np.inf)
    for _ in range(repeats + 1):  # one round of warming up counts too: the minimum ignores it
        for name, engine in engines.items():
            began = time.perf_counter()
            engine()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def _our_update(model: UNet, x: np.ndarray, t: np.ndarray) -> Callable[[], object]:
    """One update as `refquant train` does it: noise, gradients by chunks, clipping, Adam, average."""
    cfg = FitConfig(steps=10**6, batch=len(x))
    schedule = cosine()
    x_0 = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    updater = Updater(model, cfg)
    parts = -(-len(x) // cfg.chunk)
    counter = iter(range(10**6))

    def update() -> None:
        rng = np.random.default_rng(0)
        noise = rng.standard_normal(x_0.shape, dtype=np.float32)
        x_t = schedule.q_sample(x_0, t, noise)
        chunks = [NoisyChunk(x_t[i::parts], noise[i::parts], t[i::parts], rng) for i in range(parts)]
        updater.step(chunks, lambda c: ops.mse(model(Tensor(c.x_t), c.t, None), c.target), next(counter))

    return update
