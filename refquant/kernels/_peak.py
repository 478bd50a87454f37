"""The most that this machine's integer units give: what a kernel's speed is a share of."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from ..threads import get_threads
from ._ext import ROWS, lib

SECONDS = 0.01  # of one measurement: longer than the start of a thread by a factor of 100
ATTEMPTS = 3


def peak_gops(name: str) -> float | None:
    """Measure the multiplying instruction of a kernel on registers alone, on all threads at once.

    Parameters
    ----------
    name : str
        Out of `supported`.

    Returns
    -------
    float or None
        10^9 operations in a second, a multiplication and its addition being two; None for "ref" and "scalar",
        which have no such instruction.
    """
    one_round = 0 if name not in ROWS else int(lib.rq_peak(ROWS[name], 1))
    if one_round == 0:
        return None

    def rate(rounds: int) -> float:
        began = time.perf_counter()
        multiplications = int(lib.rq_peak(ROWS[name], rounds))
        return multiplications / (time.perf_counter() - began)

    threads, rounds = get_threads(), int(SECONDS * rate(1000) / one_round) + 1
    with ThreadPoolExecutor(threads) as pool:
        return max(2e-9 * sum(pool.map(rate, [rounds] * threads)) for _ in range(ATTEMPTS))
