"""Calibration without data: noise pushed through the float model shows which values activations take.

The float sampler runs once, exactly as it will be used, and everything its network is called with is kept. All
methods feed on that one recording: no image of a data set is needed, because the sampler's own trajectory *is* the
distribution that the quantized network will meet (PTQ4DM, Q-Diffusion, TFMQ-DM section 4).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..autograd import no_grad
from ..diffusion.model import DiffusionModel
from ..diffusion.sampling import Images
from ..errors import RangeError
from ..nn.networks import Network
from ..threads import parallel_map
from .observers import RangeObserver
from .progress import bar, remark
from .record import States, Trajectories, ask, record_trajectories
from .wrap import activation_quantizers, watched, wrap

# Values kept per quantizer for the mse search. 80 candidates on 16,384 values take 80 ms, and the
# error of a candidate is then known to 1 %, less than neighbouring candidates of the grid differ.
SAMPLE_SIZE = 16384

CHUNK = 16  # states a worker thread records at a time

Seen = list[tuple[str, Images]]


@dataclass(frozen=True)
class CalibrationConfig:
    """Which float trajectories are recorded.

    Attributes
    ----------
    images : int
        Trajectories.
    steps : int
        DDIM steps of each (eta 0, uniform spacing): those of the sampler that will be used.
    every : int
        One range for all time-steps looks at every so many steps, beginning with the first.
    seed : int
        Of the starting noise; kept apart from the noise that samples are drawn from.
    """

    images: int = 64
    steps: int = 50
    every: int = 5
    seed: int = 1_000_003

    def __post_init__(self) -> None:
        for name in ("images", "steps", "every"):
            if getattr(self, name) < 1:
                raise RangeError(f"calibration: {name} is {getattr(self, name)}; it must be at least 1.")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


class Calibration:
    """One recording of a float model, made when it is first needed and then shared.

    Parameters
    ----------
    model : DiffusionModel
    cfg : CalibrationConfig
    quiet : bool
        Say nothing of the recording on standard error.
    """

    def __init__(self, model: DiffusionModel, cfg: CalibrationConfig, *, quiet: bool = True) -> None:
        self.model, self.cfg, self.quiet = model, cfg, quiet

    @cached_property
    def trajectories(self) -> Trajectories:
        """What the float network was called with."""
        cfg = self.cfg
        remark(f"recording {cfg.images} trajectories of {cfg.steps} steps", self.quiet)
        with bar(cfg.steps, "recording", self.quiet) as done:
            return record_trajectories(self.model, cfg.images, cfg.steps, cfg.seed, on_step=done.update)

    @cached_property
    def inputs(self) -> dict[str, RangeObserver]:
        """What every activation quantizer would see of the float network, by its name, over all time-steps."""
        return self.observed(self.model.network)

    def observed(self, network: Network) -> dict[str, RangeObserver]:
        """The same of another float network that computes the same, and has other layers (split shortcuts)."""
        states = self.trajectories.at(range(0, self.trajectories.steps, self.cfg.every))
        return observe(wrap(network)[0], states, self.cfg.seed)


def observe(network: Network, states: States, seed: int) -> dict[str, RangeObserver]:
    """Push states through a wrapped network and collect what each activation quantizer sees.

    Parameters
    ----------
    network : UNet or DiT
        Wrapped.
    states : States
    seed : int
        Of the samples that observers keep.

    Returns
    -------
    dict of str to RangeObserver
        By the quantizer's name.

    Notes
    -----
    The worker threads record chunks of the states; the observers see them afterwards, in order, so that
    what they keep does not depend on timing.
    """
    names = activation_quantizers(network)
    observers = {name: RangeObserver(sample_size=SAMPLE_SIZE, seed=seed + i) for i, name in enumerate(names)}
    wave = 4 * CHUNK  # bounds memory: what a wave records is held until the observers have seen it
    for start in range(0, len(states), wave):
        stop = min(start + wave, len(states))
        chunks = [states[i : min(i + CHUNK, stop)] for i in range(start, stop, CHUNK)]
        for seen in parallel_map(lambda part: record(network, part), chunks):
            for name, value in seen:
                observers[name].update(value)
    return observers


def record(network: Network, states: States) -> Seen:
    """List every activation quantizer's name and input, in order of execution, for one call of the network."""
    seen: Seen = []
    own = watched(network, lambda name, value: seen.append((name, value)))
    with no_grad():
        ask(own, states)
    return seen
