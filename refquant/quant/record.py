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

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, no_grad
from ..diffusion.ddim import ddim_sample
from ..diffusion.model import DiffusionModel
from ..diffusion.sampling import Images, NoiseSource
from ..errors import RangeError, UnknownNameError
from ..nn.module import Module
from ..nn.networks import Network
from ..threads import parallel_map
from .wrap import rebuild

Outputs = dict[str, NDArray[np.float32]]  # of modules, by name

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


def record_trajectories(
    model: DiffusionModel, images: int, steps: int, seed: int, *, on_step: Callable[[], object] = lambda: None
) -> Trajectories:
    """Run the float DDIM sampler (eta 0, uniform spacing) and keep all that its network sees; tell of each step."""
    eps, seen_x, seen_t = model.denoiser(), [], []
    y = calibration_classes(model.classes, images)

    def watched(x: Images, t: int, step: int) -> Images:
        seen_x.append(x)
        seen_t.append(t)
        answer = eps(x, t, step, y)
        on_step()
        return answer

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


class Walk:
    """States on their way through a network, which stop at one unit after another.

    One pass for each of U units is half of U whole passes, and took longer than learning with 300 iterations. A walk
    goes on from where it is: what a unit has given is kept as long as a unit further on takes it (the skips of a UNet,
    mostly), and not computed again.

    Parameters
    ----------
    network : UNet or DiT
        Float, or wrapped with float activations.
    units : sequence of str
        Modules to stop at; none inside of another.
    states : States

    Raises
    ------
    UnknownNameError
        A pass of the network does not call a module of such a name.

    Notes
    -----
    Between two calls only units may change that have not been passed: that of the first call and those after it.
    """

    def __init__(self, network: Network, units: Sequence[str], states: States) -> None:
        self.network, self.states = network, states
        self._example = _outputs(network, units, states[:1])
        if missing := [name for name in units if name not in self._example]:
            raise UnknownNameError(f"no module called {missing[0]!r} is run. Known units: {', '.join(self._example)}.")
        self._takers = _takers(network, self._example, states[:1])
        self._kept: list[Outputs] = [{} for _ in range(0, len(states), CHUNK)]  # of each chunk

    def inputs(self, unit: str) -> tuple[NDArray[np.float32], ...]:
        """Arrays (M, ...) that the unit gets from the network, one for each tensor argument."""
        parts = self._reach(unit, lambda module, given: [a.data for a in given if isinstance(a, Tensor)])
        return tuple(np.concatenate(found) for found in zip(*parts, strict=True))

    def output(self, unit: str) -> NDArray[np.float32]:
        """Array (M, ...) that the unit gives."""
        return np.concatenate(self._reach(unit, lambda module, given: module(*given).data))

    def _reach(self, unit: str, look: Callable[[Module, tuple[Any, ...]], Any]) -> list[Any]:
        """Run up to the unit, and `look` at it and its arguments, for each chunk of the states."""
        order = list(self._example)
        before, onward = order[: order.index(unit)], set(order[order.index(unit) :])
        live = {name for name in before if self._takers[name] & onward}
        running: set[str] = set()  # what is to be kept now, and, found backwards, what that is made of
        for name in reversed(before):
            if name not in self._kept[0] and (name in live or self._takers[name] & running):
                running.add(name)

        def run(chunk: int) -> Any:
            part, kept, found = self.states[chunk * CHUNK : (chunk + 1) * CHUNK], self._kept[chunk], []

            def replaced(name: str, module: Module) -> Module | None:
                if name in running:
                    return _Replaced(lambda *given: kept.setdefault(name, module(*given).data))
                if name in before:  # where nothing is kept, nobody looks
                    nothing = np.broadcast_to(np.float32(np.nan), (len(part), *self._example[name].shape[1:]))
                    return _Replaced(lambda *given: kept.get(name, nothing))
                return _Replaced(lambda *given: stop(module, given)) if name == unit else None

            def stop(module: Module, given: tuple[Any, ...]) -> NDArray[np.float32]:
                found.append(look(module, given))
                raise _Done

            with suppress(_Done), no_grad():  # each thread has modules of its own, and shares the parameters
                ask(rebuild(self.network, replaced), part)
            for name in kept.keys() - live:
                del kept[name]
            return found[0]

        return parallel_map(run, range(len(self._kept)))


class _Done(Exception):
    """Raised when all that was asked for has been seen: the rest of the forward pass is not needed."""


class _Replaced(Module):
    """A module that gives the array which a function of its arguments gives."""

    def __init__(self, act: Callable[..., NDArray[np.float32]]) -> None:
        self.act = act

    def __call__(self, *arguments: Any) -> Tensor:
        """Pass the call on."""
        return Tensor(self.act(*arguments))


def _outputs(network: Network, units: Sequence[str], states: States) -> Outputs:
    """What each unit gives, in the order in which they run."""
    found: Outputs = {}

    def noted(name: str, module: Module) -> Module | None:
        return _Replaced(lambda *given: found.setdefault(name, module(*given).data)) if name in units else None

    with no_grad():
        ask(rebuild(network, noted), states)
    return found


def _takers(network: Network, outputs: Outputs, states: States) -> dict[str, set[str]]:
    """Which units take what each unit gives, directly or through operations between them: those it poisons.

    All units give what they gave, but one gives NaN.
    """
    found: dict[str, set[str]] = {name: set() for name in outputs}
    for one, poisoned in found.items():

        def given(name: str, module: Module, one: str = one, poisoned: set[str] = poisoned) -> Module | None:
            if name not in outputs:
                return None

            def act(*arguments: Any) -> NDArray[np.float32]:
                if any(np.isnan(a.data).any() for a in arguments if isinstance(a, Tensor)):
                    poisoned.add(name)
                return np.full_like(outputs[name], np.nan) if name == one else outputs[name]

            return _Replaced(act)

        with no_grad():
            ask(rebuild(network, given), states)
    return found


def unit_inputs(network: Network, unit: str, states: States) -> tuple[NDArray[np.float32], ...]:
    """Arrays (M, ...) that the module called `unit` gets from the network, one for each tensor argument."""
    return Walk(network, [unit], states).inputs(unit)


def unit_output(network: Network, unit: str, states: States) -> NDArray[np.float32]:
    """Array (M, ...) that the module called `unit` gives."""
    return Walk(network, [unit], states).output(unit)
