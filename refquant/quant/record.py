"""Record what happens inside a float or quantized network: trajectories, and inputs and outputs of units.

Calibration is free of data: noise pushed through the float sampler meets the very states that the quantized
network will meet. One set of trajectories is recorded and feeds every method; the released TFMQ-DM code draws
new ones for every step, T (T + 1) / 2 network calls a sample instead of T (``quant/data_generate.py``).

A conditional model is recorded as it is, with a class for every second trajectory and "no class" for the others, since
classifier-free guidance asks for both. Guidance itself is no part of the recording: it mixes two answers, and the
network that is quantized never sees the mixture.

Shapes: states are public images (N, C, H, W); inputs and outputs of units are what the network passes on,
channels last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, no_grad
from ..diffusion.ddim import ddim_sample
from ..diffusion.model import DiffusionModel
from ..diffusion.sampling import Images, NoiseSource
from ..errors import RangeError
from ..nn.module import Module
from ..nn.networks import Network
from ..threads import parallel_map
from .wrap import rebuild

CHUNK = 16  # states a worker thread pushes through the network at a time


@dataclass(frozen=True, eq=False)
class Trajectories:
    """What the network is called with while the float sampler runs.

    Attributes
    ----------
    x : float32 array, (S, N, C, H, W)
        Inputs of the network at each of the S steps of the sampler, noisiest first.
    t : int array, (S,)
        Their time-steps.
    y : int array, (N,), or None
        Class of each trajectory of a conditional model.
    """

    x: Images
    t: NDArray[np.int64]
    y: NDArray[np.int64] | None = None

    @property
    def steps(self) -> int:
        """S."""
        return len(self.t)

    def at(self, steps: Iterable[int]) -> States:
        """All states of these steps of the sampler, step after step."""
        index, n = np.fromiter(steps, np.int64), self.x.shape[1]
        step, image = np.repeat(index, n), np.tile(np.arange(n), len(index))
        return States(self.x[index].reshape(-1, *self.x.shape[2:]), self.t[step], step, image, self.classes(image))

    def told(self, first: int, count: int) -> tuple[NDArray[np.int64], ...]:
        """What a noise predictor is told beside x, t and step, for the `first` trajectories over and over."""
        return () if self.y is None else (np.resize(self.y[:first], count),)

    def classes(self, image: NDArray[np.integer]) -> NDArray[np.int64] | None:
        """Class of each of these trajectories, if there are classes."""
        return None if self.y is None else self.y[image]


@dataclass(frozen=True, eq=False)
class States:
    """Single inputs of the network, picked out of trajectories.

    Attributes
    ----------
    x : float32 array, (M, C, H, W)
    t, step, image : int arrays, (M,)
        Time-step, index of the sampler's step, and which trajectory.
    y : int array, (M,), or None
        Class, of a conditional model.
    """

    x: Images
    t: NDArray[np.int64]
    step: NDArray[np.int64]
    image: NDArray[np.int64]
    y: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, part: slice | NDArray[np.integer]) -> States:
        y = None if self.y is None else self.y[part]
        return States(self.x[part], self.t[part], self.step[part], self.image[part], y)


def ask(network: Network, states: States) -> Tensor:
    """Call a network with these states: its answer (M, H, W, C)."""
    x = Tensor(np.ascontiguousarray(states.x.transpose(0, 2, 3, 1)))
    return network(x, states.t) if states.y is None else network(x, states.t, y=states.y)


def calibration_classes(classes: int, images: int) -> NDArray[np.int64] | None:
    """The class of each recorded trajectory: 0, none, 1, none, ..., over and over; None without classes.

    "No class", with the id K, is half of them: classifier-free guidance asks for it as often as for a class.

    Parameters
    ----------
    classes : int
        K; 0 for a model without classes.
    images : int

    Returns
    -------
    int64 array, (images,), or None
    """
    if not classes:
        return None
    index = np.arange(images)
    return np.where(index % 2 == 0, index // 2 % classes, classes)


def record_trajectories(model: DiffusionModel, images: int, steps: int, seed: int) -> Trajectories:
    """Run the float DDIM sampler (eta 0, uniform spacing) and keep all that its network sees."""
    eps, seen_x, seen_t = model.denoiser(), [], []
    y = calibration_classes(model.classes, images)

    def watched(x: Images, t: int, step: int) -> Images:
        seen_x.append(x)
        seen_t.append(t)
        return eps(x, t, step, y)

    noise = NoiseSource(seed, images, model.image_shape)
    ddim_sample(watched, noise.draw(), model.schedule, noise, steps=steps)
    return Trajectories(np.stack(seen_x), np.array(seen_t), y)


def pick(trajectories: Trajectories, count: int, seed: int, weights: Sequence[float] | None = None) -> States:
    """Pick `count` states without repetition: the step by `weights`, the image evenly.

    Parameters
    ----------
    trajectories : Trajectories
    count : int
        At most S N.
    seed : int
    weights : sequence of float, (S,), optional
        Relative frequency of each step, none negative; all steps alike by default. A step that runs out of
        states gives its share to the others.

    Returns
    -------
    States
    """
    s, n = trajectories.x.shape[:2]
    share = np.ones(s) if weights is None else np.asarray(weights, np.float64)
    if share.shape != (s,) or not ((share >= 0) & (share < 1e300)).all() or share.sum() == 0:  # sums stay finite
        raise RangeError(f"pick: weights must be {s} numbers from 0, one for each step, and not all 0.")
    if not 1 <= count <= int((share > 0).sum()) * n:
        raise RangeError(
            f"pick: {count} states of {int((share > 0).sum()) * n} with a positive weight. Record more images."
        )
    # Evenly spaced points on the cumulated weights: every step gets its share up to one state.
    taken = np.zeros(s, np.int64)
    while taken.sum() < count:
        room = np.where(taken < n, share, 0)
        edges = np.cumsum(room) / room.sum() * (count - taken.sum())
        taken = np.minimum(n, taken + np.diff(np.floor(edges + 0.5).astype(np.int64), prepend=0))
    rng = np.random.default_rng(seed)
    step = np.repeat(np.arange(s), taken)
    image = np.concatenate([rng.permutation(n)[:k] for k in taken])
    return States(trajectories.x[step, image], trajectories.t[step], step, image, trajectories.classes(image))


class _Done(Exception):
    """Raised by a probe when all that was asked for has been seen: the rest of the forward pass is not needed."""


class Probe(Module):
    """A module that keeps the arrays it is called with, and gives."""

    def __init__(self, module: Module, stop_before: bool) -> None:
        self.module, self.stop_before = module, stop_before
        self.inputs: tuple[NDArray[Any], ...] = ()
        self.output: NDArray[Any] | None = None

    def __call__(self, *arguments: Any) -> Tensor:
        """Pass the call on."""
        self.inputs = tuple(a.data for a in arguments if isinstance(a, Tensor))
        if self.stop_before:
            raise _Done
        result = self.module(*arguments)
        self.output = result.data
        raise _Done


def unit_inputs(network: Network, unit: str, states: States) -> tuple[NDArray[np.float32], ...]:
    """Arrays (M, ...) that the module called `unit` gets from the network, one for each tensor argument."""
    parts = _probe(network, unit, states, stop_before=True)
    return tuple(np.concatenate([p.inputs[i] for p in parts]) for i in range(len(parts[0].inputs)))


def unit_output(network: Network, unit: str, states: States) -> NDArray[np.float32]:
    """Array (M, ...) that the module called `unit` gives."""
    return np.concatenate([p.output for p in _probe(network, unit, states, stop_before=False) if p.output is not None])


def _probe(network: Network, unit: str, states: States, stop_before: bool) -> list[Probe]:
    def run(start: int) -> Probe:
        found: list[Probe] = []

        def probed(name: str, module: Module) -> Module | None:
            if name != unit:
                return None
            found.append(Probe(module, stop_before))
            return found[0]

        own = rebuild(network, probed)  # each thread has probes of its own, and shares the parameters
        try:
            with no_grad():
                ask(own, states[start : start + CHUNK])
        except _Done:
            pass
        return found[0]

    return parallel_map(run, range(0, len(states), CHUNK))
