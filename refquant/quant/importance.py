"""Which time-steps and which activations matter: PSNR importance of steps, and the diagonal of Fisher's matrix.

Steps. A quantized network used at one step of the sampler only, with the float network before and after it, moves
the final image a little; how much is the step's importance:

    MSE_k = mean |image with step k quantized - float image|²       PSNR_k = -10 log10(MSE_k / 4)  for images in [-1, 1]
    w_k   = (1 - floor) sqrt(MSE_k) / sum sqrt(MSE) + floor / S     every step keeps a chance to be seen

Activations. How much the denoising loss minds an error of a unit's output y, to second order, is e' H e; Fisher's
matrix stands for the Hessian H, and its diagonal is g² with g = d loss / d y:

    loss = mean |network(x_t, t) - what it should answer|²          x_t on a float trajectory, x_0 its own end

so that no data set is needed here either. Source: the talk "Diffusion Models Quantization" (X. Li), which states the
ideas and gives no formulas; these are ours. BRECQ (arXiv 2102.05426) has the Fisher loss for classifiers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, gradients, ops
from ..diffusion.ddim import ddim_step
from ..diffusion.denoiser import NoisePredictor, target
from ..diffusion.model import DiffusionModel
from ..diffusion.sampling import Images, with_previous
from ..errors import RangeError
from ..nn.module import Module
from ..nn.networks import Network
from ..threads import parallel_map
from .calibrate import CHUNK
from .record import States, Trajectories, ask
from .wrap import rebuild

Float64 = NDArray[np.float64]


def step_errors(
    model: DiffusionModel, quantized: NoisePredictor, trajectories: Trajectories, images: int = 16, every: int = 1
) -> Float64:
    """Mean squared error of the final image when one step is quantized, for each of the S steps.

    Parameters
    ----------
    model : DiffusionModel
    quantized : NoisePredictor
    trajectories : Trajectories
        Of the float model.
    images : int
        Of the trajectories, at most.
    every : int
        One step in so many is tried, and the last; errors of steps between are on straight lines.

    Returns
    -------
    float64 array, (S,)

    Notes
    -----
    One walk down the sampler carries all runs: at a step that is tried, the recorded state takes the quantized step
    and joins those that took it earlier. They all go on with the float network.
    """
    n = min(images, trajectories.x.shape[1])
    tried = sorted({*range(0, trajectories.steps, every), trajectories.steps - 1})
    float_eps, runs = model.denoiser(), trajectories.x[0, :0]  # (runs x n, C, H, W)
    for k, t, ab, ab_after in _steps(model, trajectories):
        if len(runs):
            runs, _ = ddim_step(runs, float_eps(runs, t, k, *trajectories.told(n, len(runs))), ab, ab_after, 0.0, True)
        if k in tried:
            x = trajectories.x[k, :n]
            eps = quantized(x, t, k, *trajectories.told(n, n))
            runs = np.concatenate((runs, ddim_step(x, eps, ab, ab_after, 0.0, True)[0]))
    end = finish(model, trajectories)[:n]
    off = runs.reshape(len(tried), -1).astype(np.float64) - end.reshape(1, -1)
    return np.interp(np.arange(trajectories.steps), tried, np.square(off).mean(axis=1))


def finish(model: DiffusionModel, trajectories: Trajectories) -> Images:
    """Take the last step of the trajectories: the float model's images (N, C, H, W)."""
    k, t, ab, ab_after = list(_steps(model, trajectories))[-1]
    x, n = trajectories.x[k], trajectories.x.shape[1]
    return ddim_step(x, model.denoiser()(x, t, k, *trajectories.told(n, n)), ab, ab_after, 0.0, True)[0]


def _steps(model: DiffusionModel, trajectories: Trajectories) -> Iterator[tuple[int, int, float, float]]:
    """The step's index, its time-step, and alpha_bar before and after it."""
    alpha_bar = model.schedule.alpha_bar
    for k, t, after in with_previous(trajectories.t.tolist()):
        yield k, t, float(alpha_bar[t]), float(alpha_bar[after]) if after >= 0 else 1.0


def step_weights(errors: Float64, floor: float = 0.1) -> Float64:
    """How often each step is drawn, (S,): like the root of its error, with a uniform share of `floor`.

    An error that falls as 1 / n with the n states of its step makes a sum of MSE_k / n_k, and of a given number of
    states that is least for n_k like sqrt(MSE_k) (Neyman's allocation). Where no step has an error (nothing is
    quantized, or everything exact) all are alike.

    Parameters
    ----------
    errors : float64 array, (S,)
    floor : float
        0 to 1, the share that is spread evenly.

    Returns
    -------
    float64 array, (S,)
        Of sum 1.
    """
    if not 0 <= floor <= 1 or not np.isfinite(errors).all() or (errors < 0).any():
        raise RangeError(f"step_weights: floor is {floor} and must lie in [0, 1]; errors must be finite and from 0.")
    root = np.sqrt(errors)
    share = root / root.sum() if root.sum() > 0 else np.full(len(errors), 1 / len(errors))
    return (1 - floor) * share + floor / len(errors)


class _Kept(Module):
    """A module that remembers the tensor it gave, so that a loss can be differentiated with respect to it."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.output: Tensor | None = None

    def __call__(self, *arguments: Tensor) -> Tensor:
        self.output = self.module(*arguments)
        return self.output


def wanted_answer(model: DiffusionModel, states: States, x_0: Images) -> Images:
    """What the network should say of these states (M, C, H, W), were the ends x_0 of their trajectories the truth."""
    ab = model.schedule.alpha_bar[states.t].reshape(-1, 1, 1, 1)
    clean = x_0[states.image]
    noise = ((states.x - np.sqrt(ab) * clean) / np.sqrt(1 - ab)).astype(np.float32)
    return target(model.prediction, model.schedule, clean, states.t, noise)


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

        network: Network = rebuild(model.network, keep)
        wanted = wanted_answer(model, part, x_0)
        answer = ask(network, part)
        # a mean over the chunk would weigh the states of a short one more
        loss = ops.scale(ops.mse(answer, np.ascontiguousarray(wanted.transpose(0, 2, 3, 1))), len(part))
        return gradients(loss, [kept[name].output for name in units])

    found = parallel_map(differentiate, range(0, len(states), CHUNK))
    out = {}
    for name in units:
        g = np.concatenate([part.pop(0) for part in found])  # the pieces go, or all units would be here twice
        size = np.sqrt(np.mean(np.square(g, dtype=np.float64)))
        out[name] = np.divide(g, size, out=g, casting="same_kind") if size > 0 else np.ones_like(g)
    return out
