"""Block reconstruction in PyTorch, as one would write it down: the peer of `bench.reconstruct`.

Soft weights on the autograd tape, the block's forward pass (`bench.torch_unet`), the squared error summed over
channels, the rounding term after the warm-up, Adam. In PyTorch's default layout and in channels-last.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..quant.adaround import GAMMA, ZETA, beta_schedule, initial_alpha, rounding_is_active
from ..quant.reconstruct import ReconstructionConfig
from ..quant.session import Run
from ..quant.units import Unit
from .torch_unet import LAYOUTS, build

Engine = Callable[[ReconstructionConfig], np.ndarray]


def engine(job: Run, unit: Unit, inputs: tuple[np.ndarray, ...], target: np.ndarray, threads: int) -> dict[str, Engine]:
    """One engine for each memory layout; each runs ``cfg.iterations`` and returns the losses."""
    return {name: _engine(job, unit, inputs, target, threads, layout) for name, layout in LAYOUTS.items()}


def _engine(
    job: Run, unit: Unit, inputs: tuple[np.ndarray, ...], target: np.ndarray, threads: int, layout: object
) -> Engine:
    peer = build(job.model.network, layout, threads)
    peer.w = {name: tensor.detach() for name, tensor in peer.w.items()}
    place = lambda a: _nchw(a, layout)  # noqa: E731
    x, y = [place(a) for a in inputs], place(target)
    forward = peer.block if len(x) == 2 else peer.attend

    def go(cfg: ReconstructionConfig) -> np.ndarray:
        alphas, constants = {}, {}
        for layer in unit.layers:
            q, w = layer.weight_qparams, job.weight(layer.name)
            scale = q.scale.reshape(-1, *[1] * (w.ndim - 1))
            zero = q.zero_point.reshape(scale.shape).astype(np.float32)
            arrays = (np.floor(w / scale) + zero, *(np.broadcast_to(a, w.shape) for a in (scale, zero)))
            constants[layer.name] = [*map(place, arrays), q.spec.qmin, q.spec.qmax]
            alphas[layer.name] = place(initial_alpha(w, q)).requires_grad_(True)
        optimizer = torch.optim.Adam(list(alphas.values()), lr=cfg.rate)
        losses = []
        for k in range(1, cfg.iterations + 1):
            chosen = np.random.default_rng([cfg.seed, k]).permutation(len(target))[: cfg.batch]
            index = torch.from_numpy(chosen)
            optimizer.zero_grad()
            rounding = torch.zeros(())
            beta = beta_schedule(k, cfg.iterations, cfg.warmup)
            active = rounding_is_active(k, cfg.iterations, cfg.warmup)
            for name, alpha in alphas.items():
                floor, scale, zero, low, high = constants[name]
                h = torch.clamp(torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)
                peer.w[f"{name}.weight"] = (torch.clamp(floor + h, low, high) - zero) * scale
                if active:
                    rounding = rounding + (1 - (2 * h - 1).abs().pow(beta)).sum()
            error = forward(unit.name, *(a[index] for a in x)) - y[index]
            loss = error.square().sum(dim=1).mean()
            (loss + cfg.rounding_weight * rounding).backward()
            optimizer.step()
            losses.append(loss.item())
        return np.array(losses, np.float32)

    return go


def _nchw(array: np.ndarray, layout: object) -> torch.Tensor:
    tensor = torch.tensor(np.ascontiguousarray(array))
    return tensor.permute(0, 3, 1, 2).contiguous(memory_format=layout) if tensor.ndim == 4 else tensor
