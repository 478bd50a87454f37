"""One turn of the kernel benchmark: one contender, all shapes, in a process of its own.

A process of its own, because thread pools of different libraries disturb each other: members of one still spin when
the next one begins, and within one process that changed the time of a call by a factor of 2. A fresh one in each
round, because where the system puts code and arrays in memory is a matter of luck, worth some percent, and the rounds
shall have different luck. All contenders have the same number of threads; none is bound to a core.

What is timed is one call from Python with everything prepared: weights packed, sessions compiled, arrays bound. Such a
call costs 3 to 25 microseconds in Python itself, much of a 4x4 image and little of others.
"""

from __future__ import annotations

import math
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from .. import kernels
from ..errors import RefquantError
from ..threads import using_threads
from . import kernel_peers, process
from .kernel_peers import Engine, Unfit
from .kernel_problems import Problem, Shape

OURS = "refquant"
BATCHES = 5  # of timed calls; the median of their means counts, so that an interruption spoils one of them
QUIET = 0.01  # seconds without work after which a pool counts as asleep
SLOW = ("ref", "scalar")  # timed in the first round only, by one call: up to a second for the largest shape


@dataclass(frozen=True)
class Task:
    """What is to be timed in one turn; it travels to its process as JSON."""

    contender: str  # OURS or the name of a peer
    shapes: tuple[Shape, ...]
    isas: tuple[str, ...]  # kernels, of ours
    threads: int
    int4: bool
    gemm: bool
    zero_point: int
    seed: int
    seconds: float  # of timed calls, for each shape
    first: bool  # round: peers are checked, slow kernels timed

    def problem(self, shape: Shape) -> Problem:
        """Return the operands of one shape: the same in every process."""
        return Problem(shape, self.zero_point, self.gemm, self.seed)


def elsewhere(task: Task) -> dict[str, Any]:
    """`measure` in a fresh process."""
    return process.ask(__name__, task.contender, asdict(task))


def measure(task: Task) -> dict[str, Any]:
    """Time one contender on all shapes, in this process.

    Returns
    -------
    dict
        "seconds" {shape: {column: seconds of a call}}, "unfit" {shape: reason}, "peak_gops" {kernel: GOP/s}.
    """
    found: dict[str, Any] = {"seconds": {}, "unfit": {}, "peak_gops": {}}
    with using_threads(task.threads), threadpool_limits(task.threads, user_api="blas"):
        if task.contender == OURS:
            for isa in task.isas:
                found["peak_gops"][isa] = kernels.peak_gops(isa)
            settle()
        for shape in task.shapes:
            problem, seconds = task.problem(shape), found["seconds"].setdefault(str(shape), {})
            if task.contender == OURS:
                for way in ours(problem, task.isas, task.int4):
                    with kernels.using(way.isa):
                        if way.isa not in SLOW:
                            seconds[way.column] = seconds_of(way.run, task.seconds)
                        elif task.first:
                            seconds[way.column] = timeit.timeit(way.run, number=1)
                continue
            try:
                engine = peer(problem, task.contender, task.threads, check=task.first)
            except Unfit as reason:
                found["unfit"][str(shape)] = str(reason)
            except Exception as error:  # whatever another library stumbles over on this machine is no reason to stop
                found["unfit"][str(shape)] = f"{type(error).__name__}: {error}"
            else:
                settle()
                seconds[task.contender] = seconds_of(engine.run, task.seconds)
    return found


def seconds_of(run: Callable[[], object], seconds: float) -> float:
    """Return the seconds of a call: untimed ones that wake threads and fill caches, then BATCHES of timed ones."""
    number = 1
    while (took := timeit.timeit(run, number=number)) < seconds / 4:
        number *= 2
    number = math.ceil(number * seconds / took / BATCHES)
    return statistics.median(timeit.repeat(run, repeat=BATCHES, number=number)) / number


def settle() -> None:
    """Wait until all threads of this process sleep, at most half a second: what was computed for a check used BLAS."""
    for _ in range(50):
        used = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - used < QUIET / 10:
            return


class Way(NamedTuple):
    """One of our ways of computing a problem."""

    column: str  # kernel and kind of the result, as in the table
    isa: str
    run: Callable[[], object]
    out: NDArray[Any]  # what run fills
    wanted: Callable[[], NDArray[Any]]  # what must then be in there


def ours(p: Problem, isas: Sequence[str], int4: bool) -> list[Way]:
    """Return our ways, of one kernel after the other."""
    if int4:
        like, stage = ("int32", None) if p.gemm else ("uint8", p.requantize)
        kinds = ((f"w4 {like}", p.w4, 4, stage), (like, p.w, 8, stage))
    else:
        kinds = (("int32", p.w, 8, None), ("uint8", p.w, 8, p.requantize))
    packed = [(kind, w, kernels.pack_weights(w, bits=bits), stage) for kind, w, bits, stage in kinds]
    ways = []
    for isa, (kind, w, weights, stage) in product(isas, packed):
        out = np.empty((*p.x.shape[:-1], p.shape.o), np.int32 if stage is None else stage.dtype)
        ways.append(Way(f"{isa} {kind}", isa, _call(p, weights, stage, out), out, partial(_wanted, p, w, stage)))
    return ways


def _call(p: Problem, w: kernels.PackedWeights, stage: Any, out: NDArray[Any]) -> Callable[[], object]:
    if p.gemm:
        return lambda: kernels.gemm(p.x, w, a_zero_point=p.zero_point, output=stage, out=out)
    return lambda: kernels.conv2d(p.x, w, padding=p.padding, x_zero_point=p.zero_point, output=stage, out=out)


def _wanted(p: Problem, w: NDArray[np.int8], stage: Any) -> NDArray[Any]:
    return p.sums(w) if stage is None else stage.apply(p.sums(w))


def check_ours(p: Problem, isas: Sequence[str], int4: bool) -> None:
    """Compare our results with the reference.

    Raises
    ------
    RefquantError
        They differ.
    """
    for way in ours(p, isas, int4):
        with kernels.using(way.isa):
            way.run()
        want = way.wanted()
        wrong = np.argwhere(way.out != want)
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise RefquantError(
                f"bench: {way.isa} differs from the reference for {p.shape} {way.column.removeprefix(way.isa)[1:]} in "
                f"{len(wrong)} of {want.size} numbers, first at {at}: {way.out[at]} for {want[at]}. "
                "Nothing was timed; see `refquant verify`."
            )


def peers(gemm: bool) -> dict[str, Any]:
    """Return the peers for convolutions, or for matrix products: the packages and the function of each."""
    return kernel_peers.FLOATS if gemm else kernel_peers.CONVOLUTIONS | kernel_peers.FLOATS


def peer(p: Problem, name: str, threads: int, *, check: bool) -> Engine:
    """Return a peer, prepared and checked.

    Codes may differ by one: peers scale sums by a float32 where `Requantize` has 31 bits. Sums in float32 are
    exact as long as they stay below 2^24, which is 30 deviations away.

    Raises
    ------
    Unfit
        It cannot compute this, or computes something else.
    """
    engine: Engine = peers(p.gemm)[name][1](p, threads)
    if check:
        got, sums = engine.read(engine.run()), p.sums(p.w)
        want = sums if got.dtype == np.float32 else p.requantize.apply(sums)
        difference = int(np.abs(got.astype(np.float64) - want).max())
        if difference > 1:
            raise Unfit(f"it differs from the reference by up to {difference}")
    return engine


def _respond(question: dict[str, Any]) -> dict[str, Any]:
    shapes = tuple(Shape(**shape) for shape in question["shapes"])
    return measure(Task(**question | {"shapes": shapes, "isas": tuple(question["isas"])}))


if __name__ == "__main__":
    process.answer(_respond)
