"""Which time-steps and which activations matter: PSNR importance of steps, and the diagonal of Fisher's matrix.

Steps. A quantized network used at one step of the sampler only, with the float network before and after it, moves
the final image a little; how much is the step's importance:

    MSE_k = mean |image with step k quantized - float image|²       PSNR_k = -10 log10(MSE_k / 4)  for images in [-1, 1]
    w_k   = (1 - floor) MSE_k / sum MSE + floor / S                 every step keeps a chance to be seen

Activations. How much the denoising loss minds an error of a unit's output y, to second order, is e' H e; Fisher's
matrix stands for the Hessian H, and its diagonal is g² with g = d loss / d y:

    loss = mean |network(x_t, t) - what it should answer|²          x_t on a float trajectory, x_0 its own end

so that no data set is needed here either. Source: the talk "Diffusion Models Quantization" (X. Li), which states the
ideas and gives no formulas; these are ours. BRECQ (arXiv 2102.05426) has the Fisher loss for classifiers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, gradients, ops
from ..diffusion.ddim import ddim_step
from ..diffusion.denoiser import NoisePredictor, target
from ..diffusion.model import DiffusionModel
from ..diffusion.sampling import Images, with_previous
from ..errors import RangeError
from ..nn.module import Module
from ..nn.unet import UNet
from ..threads import parallel_map
from .calibrate import CHUNK
from .record import States, Trajectories
from .wrap import rebuild

Float64 = NDArray[np.float64]


def step_errors(
    model: DiffusionModel, quantized: NoisePredictor, trajectories: Trajectories, images: int = 8
) -> tuple[Float64, Images]:
    """Mean squared error of the final image when one step is quantized, for each of the S steps.

    Returns
    -------
    float64 array, (S,)
    float32 array, (images, C, H, W)
        The float images, which are the ends of the trajectories.
    """
    images = min(images, trajectories.x.shape[1])
    end = finish(model, model.denoiser(), trajectories, trajectories.steps - 1, images)
    error = np.empty(trajectories.steps)
    for k in range(trajectories.steps):

        def once(x: Images, t: int, step: int, k: int = k) -> Images:
            return (quantized if step == k else model.denoiser())(x, t, step)

        error[k] = np.mean((finish(model, once, trajectories, k, images).astype(np.float64) - end) ** 2)
    return error, end


def finish(
    model: DiffusionModel, eps: NoisePredictor, trajectories: Trajectories, step: int, images: int | None = None
) -> Images:
    """Go on with recorded trajectories from this step to the image, by DDIM with `eps`."""
    x, alpha_bar = trajectories.x[step, :images], model.schedule.alpha_bar
    for k, t, after in list(with_previous(trajectories.t.tolist()))[step:]:
        ab, ab_after = float(alpha_bar[t]), float(alpha_bar[after]) if after >= 0 else 1.0
        x, _ = ddim_step(x, eps(x, t, k), ab, ab_after, 0.0, True)
    return x


def step_weights(errors: Float64, floor: float = 0.1) -> Float64:
    """Relative frequency of each step in the calibration, (S,): by its error, with a uniform share of `floor`.

    Where no step has an error (nothing is quantized, or everything exact) all are alike.
    """
    if not 0 <= floor <= 1 or not np.isfinite(errors).all() or (errors < 0).any():
        raise RangeError(f"step_weights: floor is {floor} and must lie in [0, 1]; errors must be finite and from 0.")
    total = errors.sum()
    share = errors / total if total > 0 else np.full(len(errors), 1 / len(errors))
    return (1 - floor) * share + floor / len(errors)


class _Kept(Module):
    """A module that remembers the tensor it gave, so that a loss can be differentiated with respect to it."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.output: Tensor | None = None

    def __call__(self, *arguments: Tensor) -> Tensor:
        self.output = self.module(*arguments)
        return self.output


def fisher(model: DiffusionModel, units: Sequence[str], states: States, x_0: Images) -> dict[str, NDArray[np.float32]]:
    """Gradient of the denoising loss at each unit's output in the float network, scaled to a mean square of 1.

    Parameters
    ----------
    model : DiffusionModel
    units : sequence of str
        Names of modules.
    states : States
    x_0 : float32 array, (N, C, H, W)
        Ends of the trajectories that `states.image` counts.

    Returns
    -------
    dict of str to float32 array, (M, ...)
        Shaped like the unit's outputs; ones where the loss does not depend on the unit.
    """

    def differentiate(start: int) -> list[NDArray[np.float32]]:
        part = states[start : start + CHUNK]
        kept: dict[str, _Kept] = {}

        def keep(name: str, module: Module) -> Module | None:
            if name in units:
                kept[name] = _Kept(module)
            return kept.get(name)

        network: UNet = rebuild(model.network, keep)
        ab = model.schedule.alpha_bar[part.t].reshape(-1, 1, 1, 1)
        clean = x_0[part.image]
        noise = ((part.x - np.sqrt(ab) * clean) / np.sqrt(1 - ab)).astype(np.float32)
        wanted = target(model.prediction, model.schedule, clean, part.t, noise)
        answer = network(Tensor(np.ascontiguousarray(part.x.transpose(0, 2, 3, 1))), part.t)
        # a mean over the chunk would weigh the states of a short one more
        loss = ops.scale(ops.mse(answer, np.ascontiguousarray(wanted.transpose(0, 2, 3, 1))), len(part))
        return gradients(loss, [kept[name].output for name in units])

    found = parallel_map(differentiate, range(0, len(states), CHUNK))
    out = {}
    for i, name in enumerate(units):
        g = np.concatenate([part[i] for part in found])
        size = np.sqrt(np.mean(np.square(g, dtype=np.float64)))
        out[name] = (g / size).astype(np.float32) if size > 0 else np.ones_like(g)
    return out
