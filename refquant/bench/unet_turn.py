"""One turn of the whole-network benchmark: one contender, all cases, in a process of its own (see process.py).

What is timed is one pass from Python with everything prepared: the network loaded and compiled, the input in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from .. import kernels
from ..deploy.runtime import IntegerDenoiser
from ..threads import using_threads
from . import process
from .kernel_turn import settle
from .unet_networks import STEP, Case, Images, T
from .unet_peers import FLOATS, INTEGERS, OURS, OURS_FLOAT, Engine
from .unet_profile import profile

PASSES = 2  # timed ones at least
FLOAT_TOLERANCE = 1e-4  # of answers of order 1, after some 60 layers in float32
INT8_TOLERANCE = 0.2  # see `difference`


@dataclass(frozen=True)
class Task:
    """What is to be timed in one turn; it travels to its process as JSON."""

    contender: str
    cases: tuple[Case, ...]
    threads: int
    isa: str
    seconds: float  # of timed passes, for each case
    first: bool  # round: answers are checked, and ours profiled


def elsewhere(task: Task) -> dict[str, Any]:
    """`measure` in a fresh process."""
    return process.ask(__name__, task.contender, asdict(task))


def measure(task: Task) -> dict[str, Any]:
    """Time one contender on all cases, in this process.

    Returns
    -------
    dict
        By case: "seconds" of the fastest pass, "unfit" (the reason where there is none), "differences" (see
        `difference`), "notes", "profiles"; and "peak_gops" of our kernel.
    """
    found: dict[str, Any] = {key: {} for key in ("seconds", "unfit", "differences", "notes", "profiles")}
    found["peak_gops"] = None
    with using_threads(task.threads), threadpool_limits(task.threads, user_api="blas"), kernels.using(task.isa):
        if task.contender in OURS:
            found["peak_gops"] = kernels.peak_gops(task.isa)
        for case in task.cases:
            try:
                engine = _engine(task.contender, case, task.threads)
                if task.first:
                    apart, allowed = difference(task.contender, case, engine.read(engine.run()))
                    if not apart <= allowed:  # NaN, too
                        raise ValueError(f"its answer differs by {apart:.2g}, and {allowed:g} is allowed")
                    found["differences"][str(case)] = apart
                    found["notes"][str(case)] = engine.note
                settle()
                found["seconds"][str(case)] = fastest(engine.run, task.seconds)
            except Exception as error:  # whatever another library stumbles over on this machine is no reason to stop
                if task.contender in (OURS_FLOAT, *OURS):
                    raise
                found["unfit"][str(case)] = _in_short(error)
                continue
            if task.contender in OURS and task.first:
                found["profiles"][str(case)] = profile(
                    IntegerDenoiser(case.quantized(OURS[task.contender])), case.x, case.y
                )
    return found


def _engine(name: str, case: Case, threads: int) -> Engine:
    if name == OURS_FLOAT:
        predict = case.float_model().denoiser()
        return Engine(lambda: predict(case.x, T, STEP, case.y), np.asarray)
    if name in OURS:
        denoise = IntegerDenoiser(case.quantized(OURS[name]))
        return Engine(lambda: denoise(case.x, T, STEP, case.y), np.asarray)
    return (FLOATS | INTEGERS)[name][1](case, threads)


def difference(name: str, case: Case, got: Images) -> tuple[float, float]:
    """How far an answer lies from the one it should equal, and how far it may.

    float32   the largest difference to our float32 network's answer, in units of its largest number (at least 1)
    int8      the root mean square difference to our integer answer with the same codes of weights, over that of the
              answer. In a network of random weights nothing dampens a code that falls to the other side of an edge,
              and peers round results to 8 bits, too: 0.03 to 0.1 is what rounding does. An error gives 1 and more.
    ours      the same to the float32 network's answer: what quantization did
    """
    if name in FLOATS or name == OURS_FLOAT:
        want = case.expected("float32")
        return float(np.abs(got - want).max()) / max(1.0, float(np.abs(want).max())), FLOAT_TOLERANCE
    want = case.expected("int8" if name in INTEGERS else "float32")
    apart = float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))
    return apart, INT8_TOLERANCE if name in INTEGERS else np.inf


def fastest(run: Callable[[], object], seconds: float) -> float:
    """Return the seconds of the fastest pass: an untimed one that wakes threads, then timed ones for so long."""
    run()
    best, done, began = np.inf, 0, time.perf_counter()
    while done < PASSES or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        run()
        best, done = min(best, time.perf_counter() - start), done + 1
    return best


def _in_short(error: Exception) -> str:
    """Type and beginning: other libraries write pages."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _respond(question: dict[str, Any]) -> dict[str, Any]:
    return measure(Task(**question | {"cases": tuple(Case(**case) for case in question["cases"])}))


if __name__ == "__main__":
    process.answer(_respond)
