"""The integer kernels beside other libraries: check first, then time.

How a time is taken, the same for all contenders:

* In each round every contender has its turn, in a fresh process of its own (kernel_turn.py), in an order that moves by
  one from round to round. In a turn it computes all shapes, one after the other: untimed calls for some 12 ms, then
  timed ones for 50 ms; the time of the turn is the median of five batches of them.
* What counts is the median of the rounds. The ratio is that of two medians, ours and the fastest peer's; its range is
  that of the ratios within each round.

The machine must be idle otherwise. Where it is not, engines that wait for all their threads at a barrier (PyTorch,
BLAS) seem up to 100 times slower than they are, and the range of the ratios shows it; `--threads 1` suffers less.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RangeError, RefquantError
from ..threads import get_threads
from . import kernel_peers, kernel_turn
from .kernel_problems import BEYOND_CACHE, SHAPES, Problem, Shape
from .kernel_turn import OURS, SLOW, Task

__all__ = ["SHAPES", "SLOW", "chosen_shapes", "run"]

TURN = 0.05  # seconds of timed calls


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
        operations, seconds of each round and median GOP/s of each contender, ratios to the best peer, and "unfit",
        why peers are missing.

    Raises
    ------
    RangeError
        No rounds, or a zero point that is no code.
    RefquantError
        A kernel differs from the reference, and nothing was timed; or our own process failed.
    """
    if rounds < 1:
        raise RangeError(f"bench: repeats is {rounds}; it must be at least 1.")
    if not 0 <= zero_point <= 255:
        raise RangeError(f"bench: the zero point is {zero_point}; it must be a code, 0 to 255.")
    for shape in shapes:
        progress(f"checking {shape}")
        kernel_turn.check_ours(Problem(shape, zero_point, gemm, seed), isas, int4)
    peers = {name: kernel_peers.versions(packages) for name, (packages, _) in kernel_turn.peers(gemm).items()}
    order = [OURS, *(name for name, installed in peers.items() if installed)]
    seconds: dict[Shape, dict[str, list[float]]] = {shape: {} for shape in shapes}
    unfit: dict[Shape, dict[str, str]] = {shape: {} for shape in shapes}
    peaks: dict[str, float] = {}
    for turn in range(rounds):
        for name in order:
            progress(f"round {turn + 1} of {rounds}: {name}")
            todo = tuple(shape for shape in shapes if name not in unfit[shape])
            task = Task(name, todo, tuple(isas), get_threads(), int4, gemm, zero_point, seed, TURN, first=turn == 0)
            try:
                found = kernel_turn.elsewhere(task)
            except RefquantError as failure:
                if name == OURS:
                    raise
                found = {"seconds": {}, "unfit": {str(shape): str(failure) for shape in todo}, "peak_gops": {}}
            for shape in todo:
                for column, taken in found["seconds"].get(str(shape), {}).items():
                    seconds[shape].setdefault(column, []).append(taken)
                if str(shape) in found["unfit"]:
                    unfit[shape][name] = found["unfit"][str(shape)]
                    seconds[shape].pop(name, None)
            for isa, peak in found["peak_gops"].items():
                if peak is not None:
                    peaks[isa] = max(peak, peaks.get(isa, 0.0))
        order.append(order.pop(0))
    return {
        "threads": get_threads(),
        "zero_point": zero_point,
        "peers": peers,
        "peak_gops": peaks,
        "shapes": [_facts(shape, seconds[shape], list(peers), gemm) | {"unfit": unfit[shape]} for shape in shapes],
    }


def chosen_shapes(texts: Sequence[str], int4: bool) -> tuple[Shape, ...]:
    """Return the shapes whose name contains one of the texts (none: all), in the order of the list."""
    known = SHAPES + (BEYOND_CACHE if int4 else ())
    found = tuple(s for s in known if not texts or any(text in str(s) for text in texts))
    if not found:
        names = "  ".join(map(str, known))
        raise RangeError(f"bench: no shape's name contains {' or '.join(texts)}. There are: {names}")
    return found


def _facts(shape: Shape, seconds: dict[str, list[float]], peers: list[str], gemm: bool) -> dict[str, Any]:
    """What is reported of one shape: ours first, then the peers."""
    mine = [column for column in seconds if column not in peers]
    others = [name for name in peers if name in seconds]
    median = {name: statistics.median(seconds[name]) for name in (*mine, *others)}
    facts: dict[str, Any] = {
        "name": str(shape),
        "operations": shape.operations,
        "seconds": {name: seconds[name] for name in median},
        "gops": {name: shape.operations / t / 1e9 for name, t in median.items()},
        "best_peer": None,
        "ratios": {},
    }
    # Like with like: uint8 codes beside uint8 codes; a float32 product beside int32 sums, four bytes each.
    rivals = [name for name in others if gemm or name not in kernel_peers.FLOATS]
    if rivals:
        best = min(rivals, key=median.__getitem__)
        facts["best_peer"] = best
        for name in mine:
            if name.endswith("int32" if gemm else "uint8"):
                within = [t / s for s, t in zip(seconds[name], seconds[best], strict=False)]
                ratio = {"median": median[best] / median[name], "least": min(within), "most": max(within)}
                facts["ratios"][name] = ratio
    return facts
