"""One range of each activation for every step of the sampler: the tables of finite set calibration.

The network runs on the recorded states of one step after the other, with its weights quantized and its
activations in float, and each activation quantizer's range at that step becomes one row of its `StepTable`.

    exact     the smallest and the largest value of all states
    running   TFMQ-DM's released recipe: an average over batches of 16, which clips (``quant/calibration.py:108-152``)

Layers that see the time-step alone get the same input from every state: one state a step is exact, and all
kinds agree. In a conditional network they see the class, too; then one state a step is shown with every class and none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..autograd import no_grad
from ..errors import UnknownNameError
from ..nn.networks import Network
from ..threads import parallel_map
from .affine import QSpec
from .calibrate import CHUNK
from .observers import RunningRange, StepRanges, StepTable
from .observers.running import released_batches
from .record import States, Trajectories, ask
from .wrap import watched

KINDS = ("exact", "running")

Ranges = dict[str, tuple[np.float32, np.float32]]


def step_tables(
    network: Network,
    trajectories: Trajectories,
    specs: dict[str, QSpec],
    *,
    kind: str = "exact",
    constant: Collection[str] = (),
    seed: int = 0,
) -> dict[str, StepTable]:
    """Make a table for each of these activation quantizers of a wrapped network.

    Parameters
    ----------
    network : UNet or DiT
        Wrapped; quantizers of activations that are set are obeyed while it runs.
    trajectories : Trajectories
        Of the float model.
    specs : dict of str to QSpec
        By the quantizers' names.
    kind : {"exact", "running"}
    constant : collection of str
        Quantizers whose input depends on the time-step (and class) alone. If there are no others, one state a step
        will do.
    seed : int
        Order of the batches ("running").

    Returns
    -------
    dict of str to StepTable
    """
    if kind not in KINDS:
        raise UnknownNameError(f"no range over a step is called {kind!r}. Known: {', '.join(KINDS)}.")
    steps, rng = trajectories.steps, np.random.default_rng(seed)
    images = 1 if set(specs) <= set(constant) else trajectories.x.shape[1]
    classes, told = network.cfg.classes, set(specs) & set(constant)
    moving = set(specs) - told if classes else set(specs)  # of a conditional network the others need all classes
    calls: list[tuple[int, States, Collection[str]]] = []  # (step, the states of one batch, what is looked at)
    for step in range(steps):
        here = trajectories.at([step])
        if classes and told:
            calls.append((step, _every_class(here, classes), told))
        if not moving:
            continue
        if kind == "running" and images > 1:
            batches: list[NDArray[np.intp]] = list(released_batches(images, rng))
        else:
            batches = [np.arange(i, min(i + CHUNK, images)) for i in range(0, images, CHUNK)]
        calls += [(step, here[batch], moving) for batch in batches]
    found = parallel_map(lambda call: _ranges(network, call[1], call[2]), calls)

    exact = {name: StepRanges(steps) for name in specs}
    running = {name: [RunningRange() for _ in range(steps)] for name in specs}
    for (step, *_), ranges in zip(calls, found, strict=True):
        for name, (lo, hi) in ranges.items():
            exact[name].update(step, [lo, hi])
            running[name][step].update_range(lo, hi)
    if kind == "exact":
        return {name: exact[name].table(spec) for name, spec in specs.items()}
    return {name: StepTable.of([r.minmax(spec) for r in running[name]]) for name, spec in specs.items()}


def _every_class(states: States, classes: int) -> States:
    """The first of these states with each class, and with none."""
    same = states[np.zeros(classes + 1, np.intp)]
    return replace(same, y=np.arange(classes + 1))


def _ranges(network: Network, states: States, names: Collection[str]) -> Ranges:
    """Smallest and largest value of each of these quantizers' inputs, taken while they are in the cache."""
    found: Ranges = {}

    def see(name: str, value: NDArray[np.float32]) -> None:
        if name in names:
            found[name] = value.min(), value.max()

    with no_grad():
        ask(watched(network, see), states)
    return found
