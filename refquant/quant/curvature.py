"""How much the network's answer minds an error of a layer's output: the diagonal of a Hessian, estimated by squares.

For a squared error of the answer f, the Hessian with respect to a layer's output z at the float network's own answer is
2 J'J, J = df/dz; there is no other term, since the error is 0 there. Its diagonal needs no Jacobian: for a vector v of
random signs, g = J'v is one backward pass, and E[g g'] = J'J.

    gauss-newton   g = J'v, v_i = +-1            unbiased for the diagonal of J'J; recommended
    fisher         g = d |f - wanted|² / dz      the empirical Fisher of the denoising loss (TQ-DiT eq. 11, 16)
    none           g = 1                         a search for the layer's own error

**Each step of the sampler counts alike** (`evened`). A network that predicts v or eps is most sensitive at the last,
cleanest steps, in which the sampler hardly moves; a search by g² as it is minimises the denoising loss, and with it
clips what the first steps need, which make the image. Mnist-dit at W6A6 (documented effort; median PSNR of 3 times 64
images): 32.2 ± 1.3 dB with g² as it is, 34.2 ± 0.6 with g² evened, which is what it has without a guide, 34.6 ± 0.5.

(What the released codes differentiate instead, and why it is nothing, is told in `guided`.)

A conditional network is asked with the classes of the recorded trajectories, half of them "no class", and never through
the guidance wrapper: that mixes the answers of different elements of a batch.

Shapes: x (n, K) and g (n, O) are rows, tokens of states; each comes with its step of the sampler.
Errors: `UnknownNameError` for another guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, gradients, no_grad, ops
from ..diffusion.model import DiffusionModel
from ..diffusion.sampling import Images
from ..errors import UnknownNameError
from ..nn.module import Module
from ..threads import parallel_map
from .importance import finish, wanted_answer
from .record import States, Trajectories, ask
from .wrap import rebuild, wrap

GUIDES = ("gauss-newton", "fisher", "none")
CHUNK = 8  # states a thread differentiates at a time

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Sample:
    """What passed through one module of the float network.

    Attributes
    ----------
    inputs : tuple of float32 array
        (n, K) of a layer; q, k and v, each (n, L, d), of an attention product.
    g : float32 array, (n, O) or (n, L, d)
        Like the output.
    step : int array, (n,)
        The sampler's step that each row belongs to.
    """

    inputs: tuple[Array, ...]
    g: Array
    step: NDArray[np.int64]


class _Kept(Module):
    """A module that remembers what it was given and what it gave."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.inputs: tuple[Array, ...] = ()
        self.output: Tensor | None = None

    def __call__(self, *arguments: Tensor) -> Tensor:
        self.inputs = tuple(a.data for a in arguments)
        self.output = self.module(*arguments)
        return self.output


def check_guide(guide: str) -> None:
    """UnknownNameError unless there is such a guide."""
    if guide not in GUIDES:
        raise UnknownNameError(f"no guide of a scale search is called {guide!r}. Known: {', '.join(GUIDES)}.")


def samples(
    model: DiffusionModel,
    names: Sequence[str],
    trajectories: Trajectories,
    states: States,
    guide: str = "gauss-newton",
    *,
    tokens: int | None = None,
    seed: int = 0,
) -> dict[str, Sample]:
    """Inputs and gradients of these layers or attention products.

    Parameters
    ----------
    model : DiffusionModel
        The float model.
    names : sequence of str
        Of layers, or of attention products, as `wrap` names them.
    trajectories, states : Trajectories and States
        The states to ask for; the end of each trajectory is what "fisher" takes for the truth.
    guide : {"gauss-newton", "fisher", "none"}
    tokens : int, optional
        Keep so many random tokens of each state, of layers that see tokens (or pixels); None keeps everything.
    seed : int
        Of signs and tokens.

    Returns
    -------
    dict of str to Sample
        By name, rows in the order of the states.
    """
    check_guide(guide)
    x_0 = finish(model, trajectories) if guide == "fisher" else None
    network = wrap(model.network)[0]

    def run(start: int) -> list[Sample]:
        part, rng = states[start : start + CHUNK], np.random.default_rng([seed, start])
        kept: dict[str, _Kept] = {}

        def keep(name: str, module: Module) -> Module | None:
            if name in names:
                kept[name] = _Kept(module)
            return kept.get(name)

        own = rebuild(network, keep)
        if guide == "none":
            with no_grad():
                ask(own, part)
            found = [np.ones(kept[name].output.shape, np.float32) for name in names]
        else:
            loss = _loss(model, ask(own, part), part, x_0, rng)
            found = gradients(loss, [kept[name].output for name in names])
        return [_thinned(kept[n].inputs, g, part, tokens, rng) for n, g in zip(names, found, strict=True)]

    parts = parallel_map(run, range(0, len(states), CHUNK))
    return {name: _joined([part[i] for part in parts]) for i, name in enumerate(names)}


def evened(sample: Sample) -> Sample:
    """The same sample with gradients in units of their root mean square at the same step of the sampler.

    Parameters
    ----------
    sample : Sample

    Returns
    -------
    Sample
        Where a step has no gradient at all, it stays without.
    """
    g = sample.g.copy()
    for step in np.unique(sample.step):
        rows = sample.step == step
        g[rows] /= np.float32(max(np.sqrt(np.square(g[rows], dtype=np.float64).mean()), np.finfo(np.float32).tiny))
    return replace(sample, g=g)


def _loss(
    model: DiffusionModel, answer: Tensor, states: States, x_0: Images | None, rng: np.random.Generator
) -> Tensor:
    """A scalar whose gradient is g: v'f with random signs, or the squared error of the answer."""
    channels = states.x.shape[1]
    if answer.shape[-1] > channels:  # variances, which no sampler here asks for
        answer = ops.channels(answer, 0, channels)
    if x_0 is None:
        signs = rng.integers(0, 2, answer.shape).astype(np.float32) * 2 - 1
        return ops.sum_all(ops.mul(answer, Tensor(signs)))
    wanted = np.ascontiguousarray(wanted_answer(model, states, x_0).transpose(0, 2, 3, 1)).astype(np.float32)
    return ops.scale(ops.mse(answer, wanted), wanted.size)


def _thinned(
    inputs: tuple[Array, ...], g: Array, states: States, tokens: int | None, rng: np.random.Generator
) -> Sample:
    """Some tokens of each state as rows, or all of it."""
    step = np.repeat(states.step, len(g) // len(states))  # an attention product has a row for each head
    if tokens is None or g.ndim == 2:
        return Sample(inputs, g, step)
    x, every = inputs[0].reshape(len(g), -1, inputs[0].shape[-1]), g.reshape(len(g), -1, g.shape[-1])
    count = min(tokens, x.shape[1])
    chosen = rng.permuted(np.tile(np.arange(x.shape[1]), (len(g), 1)), axis=1)[:, :count]
    row = np.arange(len(g))[:, None]
    return Sample(
        (x[row, chosen].reshape(-1, x.shape[-1]),), every[row, chosen].reshape(-1, g.shape[-1]), np.repeat(step, count)
    )


def _joined(parts: Sequence[Sample]) -> Sample:
    inputs = tuple(np.concatenate([p.inputs[i] for p in parts]) for i in range(len(parts[0].inputs)))
    return Sample(inputs, np.concatenate([p.g for p in parts]), np.concatenate([p.step for p in parts]))
