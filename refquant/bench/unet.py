"""A whole pass of a UNet or a transformer, in integers and in float32, beside other libraries: check, then time.

How a time is taken, the same for all contenders: in each round every contender has its turn, in a fresh process of
its own (unet_turn.py), in an order that moves by one from round to round. In a turn it computes all cases (network and
batch), one after the other: an untimed pass, then timed ones for half a second, two at least. The fastest pass of all
rounds counts, because what slows a pass down is what else the machine does; the ratio to the fastest peer is that of
two such passes, its range that of the ratios within each round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import kernels
from ..deploy.inventory import inventory
from ..deploy.lower import lower
from ..errors import RangeError, RefquantError
from ..threads import get_threads
from . import unet_networks, unet_turn
from .kernel_peers import versions
from .unet_networks import Case
from .unet_peers import FLOATS, INTEGERS, OURS, OURS_FLOAT, SLOW_START
from .unet_turn import Task

TURN = 0.5  # seconds of timed passes
NETWORKS, BATCHES, ROUNDS = ("mnist-unet", "ddpm-cifar10", "mnist-dit"), (1, 16), 3


def run(
    networks: Sequence[str],
    batches: Sequence[int],
    rounds: int,
    *,
    engines: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Check all contenders on all networks and batches, then time them.

    Parameters
    ----------
    networks : sequence of str
        Named networks; their weights are random.
    batches : sequence of int
        Images.
    rounds : int
        Times that each contender has its turn.
    engines : sequence of str
        Only contenders whose name contains one of these; none: all.
    seed : int
    progress : function of str
        Told what is done at the moment.

    Returns
    -------
    dict
        "threads", "isa", "peak_gops"; "contenders": versions, None for what is not installed; "cases": for each its
        network, batch, multiplications of an image, by contender "seconds" of each round, "fastest", "differences",
        "notes" and "unfit", "ratios" (see `_ratios`), and "profiles" of ours.

    Raises
    ------
    RangeError
        No rounds, no images, or no contender of such a name.
    RefquantError
        A kernel differs from `scalar`, and nothing was timed; or our own process failed.
    """
    if rounds < 1 or min(batches) < 1:
        raise RangeError(f"bench: batch is {min(batches)} and repeats is {rounds}; both must be at least 1.")
    known: dict[str, str | None] = {name: "" for name in (OURS_FLOAT, *OURS)}
    known |= {name: versions(packages) for name, (packages, _) in (FLOATS | INTEGERS).items()}
    chosen = {name: found for name, found in known.items() if not engines or any(text in name for text in engines)}
    if not chosen:
        raise RangeError(f"bench: no engine's name contains {' or '.join(engines)}. There are: {', '.join(known)}.")
    with tempfile.TemporaryDirectory(prefix="refquant-bench-") as folder:
        for network in networks:
            progress(f"making and checking {network}")
            unet_networks.prepare(Path(folder), network, max(batches), seed)
        cases = tuple(Case(folder, network, batch) for network in networks for batch in batches)
        work = {network: _multiplications(Case(folder, network, 1)) for network in networks}
        found = _turns(cases, [name for name, installed in chosen.items() if installed is not None], rounds, progress)
    for case in cases:
        facts = found["cases"][str(case)]
        facts |= {"network": case.network, "batch": case.batch, "multiplications": work[case.network]}
        facts["fastest"] = {name: min(taken) for name, taken in facts["seconds"].items()}
        facts["ratios"] = _ratios(facts["seconds"])
    return {
        "threads": get_threads(),
        "isa": kernels.active(),
        "peak_gops": found["peak_gops"],
        "contenders": chosen,
        "cases": list(found["cases"].values()),
    }


def _multiplications(case: Case) -> int:
    return sum(entry.multiplications for entry in inventory(lower(case.quantized(8))))


def _turns(
    cases: Sequence[Case], order: list[str], rounds: int, progress: Callable[[str], object]
) -> dict[str, Any]:
    """Give every contender its turns."""
    keys = ("seconds", "differences", "notes", "unfit", "profiles")
    found: dict[str, dict[str, Any]] = {str(case): {key: {} for key in keys} for case in cases}
    peaks: list[float] = []
    for turn in range(rounds):
        for name in list(order):
            if turn > 0 and name in SLOW_START:
                continue
            progress(f"round {turn + 1} of {rounds}: {name}")
            todo = tuple(case for case in cases if name not in found[str(case)]["unfit"])
            seconds = TURN * (rounds if name in SLOW_START else 1)
            task = Task(name, todo, get_threads(), kernels.active(), seconds, first=turn == 0)
            try:
                told = unet_turn.elsewhere(task)
            except RefquantError as failure:
                if name in (OURS_FLOAT, *OURS):
                    raise
                told = {key: {} for key in keys} | {"unfit": {str(c): str(failure) for c in todo}, "peak_gops": None}
            for case in todo:
                here = found[str(case)]
                if str(case) in told["unfit"]:
                    here["unfit"][name] = told["unfit"][str(case)]
                    here["seconds"].pop(name, None)
                    continue
                here["seconds"].setdefault(name, []).append(told["seconds"][str(case)])
                for key in ("differences", "notes", "profiles"):
                    if str(case) in told[key]:
                        here[key][name] = told[key][str(case)]
            if told["peak_gops"] is not None:
                peaks.append(told["peak_gops"])
        order.append(order.pop(0))
    return {"cases": found, "peak_gops": max(peaks, default=None)}


def _ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, dict[str, Any]]]:
    """How many times as fast as the best float32 and the best int8 peer each contender is.

    Returns
    -------
    dict
        {"float32" or "int8": {contender: {"peer", "ratio", "least", "most"}}}; a kind without peers is missing.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, peers in (("float32", FLOATS), ("int8", INTEGERS)):
        rivals = [name for name in seconds if name in peers]
        if not rivals:
            continue
        best = min(rivals, key=lambda name: min(seconds[name]))
        out[kind] = {}
        for name, taken in seconds.items():
            within = [theirs / ours for ours, theirs in zip(taken, seconds[best], strict=False)]
            ratio = min(seconds[best]) / min(taken)
            out[kind][name] = {"peer": best, "ratio": ratio, "least": min(within), "most": max(within)}
    return out
