"""The integer kernels beside other libraries: check first, then time, all in one run.

How a time is taken, the same for all contenders:

* They take turns in rounds, in an order that moves by one in each round. A turn is untimed calls for some 10 ms,
  then as many timed ones as fill 20 ms; the time of a call is their mean. The median of the rounds counts.
* A contender's idle threads must not take cores from the next one: the pools of BLAS, OpenMP and ONNX Runtime spin
  for 10 to 100 ms after their last task before they sleep. So each turn begins by waiting until this process uses
  no processor time.
* A ratio is taken within a round, of neighbours in time, and the median of the rounds' ratios counts; a machine
  that is slow for a while slows both sides.

A call goes through Python on all sides, and costs 3 to 25 microseconds there: much of a 4x4 image, little of others.
The machine must be idle otherwise. Where it is not, engines that wait for all their threads at a barrier (PyTorch,
BLAS) seem up to 100 times slower than they are, and the range of the ratios shows it; `--threads 1` suffers less.
"""

from __future__ import annotations

import math
import statistics
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from .. import kernels
from ..errors import RangeError, RefquantError
from ..threads import get_threads
from . import kernel_peers
from .kernel_peers import Unfit
from .kernel_problems import BEYOND_CACHE, SHAPES, Problem, Shape

TURN = 0.02  # seconds of timed calls
QUIET = 0.01  # seconds without work after which a pool counts as asleep
SLOW = ("ref", "scalar")  # timed in the first round only, by one call: up to a second for the largest shape


@dataclass
class Contender:
    """Something to be timed: its call, and seconds of one call in each round."""

    run: Callable[[], object]
    isa: str | None = None  # kernel to be active; None: a peer
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Make its kernel the active one."""
        with nullcontext() if self.isa is None else kernels.using(self.isa):
            yield

    def turn(self) -> None:
        """Add the time of one round."""
        with self.chosen():
            if self.isa in SLOW:
                if not self.seconds:
                    self.seconds.append(timeit.timeit(self.run, number=1))
                return
            settle()
            number = 1
            while (took := timeit.timeit(self.run, number=number)) < TURN / 4:  # wakes threads, fills caches
                number *= 2
            number = math.ceil(number * TURN / took)
            self.seconds.append(timeit.timeit(self.run, number=number) / number)


def settle() -> None:
    """Wait until all threads of this process sleep, at most half a second."""
    for _ in range(50):
        used = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - used < QUIET / 10:
            return


def run(
    shapes: Sequence[Shape],
    rounds: int,
    *,
    isas: Sequence[str],
    int4: bool = False,
    gemm: bool = False,
    zero_point: int = 0,
    seed: int = 0,
    progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Check all shapes on all kernels, then time them beside the peers that are installed.

    Parameters
    ----------
    shapes : sequence of Shape
    rounds : int
        Times that each contender has its turn.
    isas : sequence of str
        Kernels, out of `kernels.supported()`.
    int4 : bool
        Weights of 4 bits and of 8, to what the peers give; otherwise weights of 8 bits, to int32 and to uint8.
    gemm : bool
        As matrix products of the same size, beside NumPy in float32, instead of convolutions.
    zero_point : int
        Of the activations. 0 suits oneDNN best; it is free here.
    seed : int
    progress : function of str
        Told what is done at the moment.

    Returns
    -------
    dict
        "peers": versions, None for what is not installed; "peak_gops" of each kernel; "shapes": for each its name,
        operations, seconds of each round and median GOP/s of each contender, and ratios to the best peer.

    Raises
    ------
    RangeError
        No rounds, or a zero point that is no code.
    RefquantError
        A kernel differs from the reference; nothing was timed.
    """
    if rounds < 1:
        raise RangeError(f"bench: repeats is {rounds}; it must be at least 1.")
    if not 0 <= zero_point <= 255:
        raise RangeError(f"bench: the zero point is {zero_point}; it must be a code, 0 to 255.")
    problems = [Problem(shape, zero_point, gemm, seed) for shape in shapes]
    ours = []
    for problem in problems:
        progress(f"checking {problem.shape}")
        ours.append(_ours(problem, isas, int4))
    peers = {name: kernel_peers.versions(packages) for name, (packages, _) in _peers(gemm).items()}
    peaks: dict[str, list[float]] = {}
    result = []
    with threadpool_limits(get_threads(), user_api="blas"):
        for problem, contenders in zip(problems, ours, strict=True):
            progress(f"timing {problem.shape}")
            others, unfit = _others(problem, [name for name, installed in peers.items() if installed])
            for isa in isas:
                settle()
                peak = kernels.peak_gops(isa)
                peaks.setdefault(isa, []).extend([] if peak is None else [peak])
            _time(contenders | others, rounds)
            result.append(_facts(problem, contenders, others) | {"unfit": unfit})
    return {
        "threads": get_threads(),
        "zero_point": zero_point,
        "peers": peers,
        "peak_gops": {isa: max(values) for isa, values in peaks.items() if values},
        "shapes": result,
    }


def chosen_shapes(texts: Sequence[str], int4: bool) -> tuple[Shape, ...]:
    """Return the shapes whose name contains one of the texts (none: all), in the order of the list."""
    known = SHAPES + (BEYOND_CACHE if int4 else ())
    found = tuple(s for s in known if not texts or any(text in str(s) for text in texts))
    if not found:
        names = "  ".join(map(str, known))
        raise RangeError(f"bench: no shape's name contains {' or '.join(texts)}. There are: {names}")
    return found


def _ours(p: Problem, isas: Sequence[str], int4: bool) -> dict[str, Contender]:
    """Our contenders by name, after their results were compared with the reference."""
    if int4:
        like, stage = ("int32", None) if p.gemm else ("uint8", p.requantize)
        kinds = ((f"w4 {like}", p.w4, 4, stage), (like, p.w, 8, stage))
    else:
        kinds = (("int32", p.w, 8, None), ("uint8", p.w, 8, p.requantize))
    variants = []
    for kind, w, bits, stage in kinds:
        sums = p.sums(w)
        variants.append((kind, kernels.pack_weights(w, bits=bits), stage, sums if stage is None else stage.apply(sums)))
    contenders = {}
    for isa, (kind, packed, stage, want) in product(isas, variants):
        out = np.empty_like(want)
        contender = Contender(_call(p, packed, stage, out), isa)
        with contender.chosen():
            contender.run()
        wrong = np.argwhere(out != want)
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise RefquantError(
                f"bench: {isa} differs from the reference for {p.shape} {kind} in {len(wrong)} of {want.size} "
                f"numbers, first at {at}: {out[at]} for {want[at]}. Nothing was timed; see `refquant verify`."
            )
        contenders[f"{isa} {kind}"] = contender
    return contenders


def _call(p: Problem, w: kernels.PackedWeights, stage: Any, out: np.ndarray) -> Callable[[], object]:
    if p.gemm:
        return lambda: kernels.gemm(p.x, w, a_zero_point=p.zero_point, output=stage, out=out)
    return lambda: kernels.conv2d(p.x, w, padding=p.padding, x_zero_point=p.zero_point, output=stage, out=out)


def _peers(gemm: bool) -> dict[str, Any]:
    return kernel_peers.FLOATS if gemm else kernel_peers.CONVOLUTIONS | kernel_peers.FLOATS


def _others(p: Problem, names: Sequence[str]) -> tuple[dict[str, Contender], dict[str, str]]:
    """The peers that compute this problem, and why the others do not.

    Codes may differ by one: peers scale sums by a float32 where `Requantize` has 31 bits. Sums in float32 are
    exact as long as they stay below 2^24, which is 30 deviations away.
    """
    contenders, unfit = {}, {}
    sums = p.sums(p.w)
    for name in names:
        try:
            engine = _peers(p.gemm)[name][1](p, get_threads())
            got = engine.read(engine.run())
            want = sums if got.dtype == np.float32 else p.requantize.apply(sums)
            difference = int(np.abs(got.astype(np.float64) - want).max())
            if difference > 1:
                raise Unfit(f"it differs from the reference by up to {difference}")
        except Unfit as reason:
            unfit[name] = str(reason)
        except Exception as error:  # whatever another library stumbles over on this machine is no reason to stop
            unfit[name] = f"{type(error).__name__}: {error}"
        else:
            contenders[name] = Contender(engine.run)
    return contenders, unfit


def _time(contenders: dict[str, Contender], rounds: int) -> None:
    order = list(contenders.values())
    for _ in range(rounds):
        for contender in order:
            contender.turn()
        order.append(order.pop(0))


def _facts(p: Problem, ours: dict[str, Contender], others: dict[str, Contender]) -> dict[str, Any]:
    """What is reported of one shape."""
    everything = ours | others
    median = {name: statistics.median(c.seconds) for name, c in everything.items()}
    facts = {
        "name": str(p.shape),
        "operations": p.shape.operations,
        "seconds": {name: c.seconds for name, c in everything.items()},
        "gops": {name: p.shape.operations / t / 1e9 for name, t in median.items()},
        "best_peer": None,
        "ratios": {},
    }
    # Like with like: uint8 codes beside uint8 codes; a float32 product beside int32 sums, four bytes each.
    rivals = [name for name in others if p.gemm or name not in kernel_peers.FLOATS]
    if rivals:
        best = min(rivals, key=median.__getitem__)
        facts["best_peer"] = best
        for name, contender in ours.items():
            if name.endswith("int32" if p.gemm else "uint8"):
                ratios = [t / s for s, t in zip(contender.seconds, others[best].seconds, strict=False)]
                facts["ratios"][name] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return facts
