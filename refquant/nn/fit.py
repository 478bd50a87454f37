"""The training loop, for any network: chunks over threads, Adam, averaging, resume to the same bits.

Each step asks `batch(step)` for chunks of data, lets the worker threads differentiate
`loss(chunk)` for each, and adds the gradients *in the order of the chunks*. Everything random
is derived from (seed, step), nothing from time or from the number of threads; so a run that is
killed and resumed ends with the same bits as one that was not.

Shapes: all parameters travel as one float32 vector (see `refquant.nn.optim`).
Errors: `CheckpointError` when a state file belongs to another run, `RangeError` when the loss or
the gradient is no longer finite (the last good state stays on disk).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from .. import io
from ..autograd import Tensor, gradients
from ..errors import CheckpointError, RangeError
from ..threads import parallel_map
from . import optim
from .module import Module


@dataclass(frozen=True)
class FitConfig:
    """How long and how to train.

    Attributes
    ----------
    steps, batch : int
        Updates, and examples per update.
    rate, warmup, decay : float, int, int
        Learning rate: linear warm-up over `warmup` steps, flat at `rate`, linear to 0 over the last
        `decay` steps. The decay is where most of a diffusion model's last sharpness comes from.
    clip : float
        Largest Euclidean norm of the gradient.
    average : float
        Decay of the exponential moving average of the weights.
    seed : int
        Of initial weights, order of the data, and noise.
    chunk : int
        Examples that one thread works on at a time. Part of the recipe: the order of floating
        point sums depends on it.
    """

    steps: int
    batch: int
    rate: float = 1e-3
    warmup: int = 500
    decay: int = 2000
    clip: float = 1.0
    average: float = 0.999
    seed: int = 0
    chunk: int = 16

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "chunk"):
            if getattr(self, name) < 1:
                raise RangeError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("warmup", "decay", "seed"):
            if getattr(self, name) < 0:
                raise RangeError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        for name in ("rate", "clip"):
            if not 0 < getattr(self, name) < np.inf:
                raise RangeError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 <= self.average < 1:
            raise RangeError(f"average is {self.average}; it must be at least 0 and below 1.")


class Chunk(Protocol):
    """A part of a batch; its length is the number of its examples."""

    def __len__(self) -> int:
        """Count the examples."""


def epoch_order(size: int, cfg: FitConfig, step: int) -> np.ndarray:
    """Indices of the examples of one step: each epoch is a fresh permutation by (seed, epoch)."""
    if size < cfg.batch:
        raise RangeError(f"the data set has {size} examples, fewer than one batch of {cfg.batch}. Use a smaller batch.")
    epoch, i = divmod(step, size // cfg.batch)
    order = np.random.default_rng([cfg.seed, 1, epoch]).permutation(size)
    return order[i * cfg.batch : (i + 1) * cfg.batch]


class Updater:
    """One module's weights as a vector, with everything that an update needs.

    Attributes
    ----------
    weights, average : float32 array, (P,)
        The weights, which the module's parameters are views of, and their moving average.
    vectors : dict of str to float32 array
        All that must be kept to go on later: the two above and Adam's moments.
    """

    def __init__(self, module: Module, cfg: FitConfig) -> None:
        self.cfg = cfg
        self.weights = optim.flatten(module)
        self.average = self.weights.copy()
        self.adam = optim.Adam.zeros(self.weights.size)
        self.vectors = {"weights": self.weights, "average": self.average, "adam_m": self.adam.m, "adam_v": self.adam.v}
        self._gradient = np.empty_like(self.weights)
        self._parameters = module.parameters()

    @np.errstate(over="ignore", invalid="ignore")  # a diverging run is told once, by the RangeError below
    def step(self, chunks: Sequence[Any], loss: Callable[[Any], Tensor], step: int) -> float:
        """Differentiate the chunks on the worker threads, update the weights, return the batch's mean loss."""
        cfg, gradient = self.cfg, self._gradient

        def differentiate(chunk: Chunk) -> tuple[float, list[np.ndarray]]:
            with np.errstate(over="ignore", invalid="ignore"):  # a setting of each thread
                value = loss(chunk)
                return value.item(), gradients(value, self._parameters)

        total, mean = sum(len(c) for c in chunks), 0.0
        gradient[:] = 0
        for chunk, (value, parts) in zip(chunks, parallel_map(differentiate, chunks), strict=True):
            share = len(chunk) / total
            mean += share * value
            start = 0
            for g in parts:
                gradient[start : start + g.size] += np.float32(share) * g.reshape(-1)
                start += g.size
        norm = optim.clip_norm(gradient, cfg.clip)
        if not np.isfinite(mean + norm):
            raise RangeError(
                f"training diverged at step {step}: loss {mean}, gradient norm {norm}. "
                f"Use a lower rate than {cfg.rate}, or a longer warm-up than {cfg.warmup} steps."
            )
        rate = optim.learning_rate(step, cfg.steps, cfg.rate, cfg.warmup, cfg.decay)
        self.adam.update(self.weights, gradient, rate, step)
        optim.update_average(self.average, self.weights, cfg.average, step)
        return mean


def fit(
    module: Module,
    batch: Callable[[int], Sequence[Any]],
    loss: Callable[[Any], Tensor],
    cfg: FitConfig,
    *,
    state: Path | None = None,
    recipe: dict[str, Any] | None = None,
    save_seconds: float = 60.0,
    quiet: bool = False,
    label: str = "train",
) -> np.ndarray:
    """Train `module` in place and leave the *averaged* weights in it.

    Parameters
    ----------
    module : Module
        Changed in place; its parameters become views of one vector.
    batch : callable
        ``batch(step)`` returns chunks, each with a length.
    loss : callable
        ``loss(chunk)`` returns the mean loss over the chunk, on the tape. Called from worker threads.
    cfg : FitConfig
    state : Path, optional
        Where the whole state of the run is kept. If the file exists the run continues from it.
    recipe : dict, optional
        Anything else that defines the run (network, data set, schedule); a state file with another
        recipe is refused.
    save_seconds : float
        Time between two saves of the state.
    quiet : bool
        No progress bar.
    label : str
        In front of the progress bar.

    Returns
    -------
    ndarray, (steps,), float32
        Loss of each step.
    """
    updater = Updater(module, cfg)
    losses: list[float] = []  # of every step
    identity = json.loads(json.dumps({"fit": asdict(cfg), "recipe": recipe or {}}))  # as it will be read back
    first = 0
    if state is not None and state.exists():
        found = _restore(state, identity, updater.vectors)
        first, losses = found.metadata["step"], found.tensors["losses"].tolist()

    def save(step: int) -> None:
        if state is not None:
            curve = {"losses": np.array(losses, np.float32)}
            io.save(state, {**updater.vectors, **curve}, {"kind": "train-state", "step": step, **identity})

    saved = time.monotonic()
    bar = tqdm(
        total=cfg.steps, initial=first, desc=label, unit="step", disable=True if quiet else None, file=sys.stderr
    )
    with bar:
        for step in range(first, cfg.steps):
            losses.append(updater.step(batch(step), loss, step))
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            if time.monotonic() - saved > save_seconds:
                save(step + 1)
                saved = time.monotonic()
    save(cfg.steps)
    updater.weights[:] = updater.average
    return np.array(losses, np.float32)


def _restore(path: Path, identity: dict[str, Any], vectors: dict[str, np.ndarray]) -> io.Checkpoint:
    """Fill the vectors from a state file, after making sure that it is of this very run."""
    found = io.load(path, kind="train-state")
    have, want = found.metadata, identity
    fit_have, fit_want = dict(have.get("fit", {})), dict(want["fit"])
    step, lengths = have.get("step", 0), (fit_have.pop("steps", 0), fit_want.pop("steps"))
    changed = [k for k in fit_want if fit_have.get(k) != fit_want[k]]
    changed += [k for k in want["recipe"] if have.get("recipe", {}).get(k) != want["recipe"][k]]
    # a run may get another length as long as the decay, which depends on it, has begun in neither
    if lengths[0] != lengths[1] and step > min(lengths) - fit_want["decay"]:
        changed.append("steps")
    if changed:
        raise CheckpointError(
            f"{path} belongs to another run ({', '.join(changed)} differ). "
            "Repeat that run's options to resume it, or remove the file to start anew."
        )
    for name, vector in vectors.items():
        if name not in found.tensors or found.tensors[name].shape != vector.shape:
            raise CheckpointError(f"{path}: {name} does not fit this network. Remove the file to start anew.")
        vector[:] = found.tensors[name]
    return found
