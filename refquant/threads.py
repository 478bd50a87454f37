"""One setting for how many cores refquant uses, and the one way it uses them.

NumPy's elementwise operations run on one core and BLAS on all of them, so a network spends most
of its time with one busy core. Here the batch is cut into chunks instead, each worker thread runs
whole chunks, and BLAS is held to one thread meanwhile. NumPy releases the interpreter lock inside
large operations, so two workers come close to twice the speed.

Chunks are cut by size, never by the number of workers, and results are returned in order: what is
computed does not depend on how many threads there are or on timing.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

from .errors import RangeError

T = TypeVar("T")
R = TypeVar("R")

_threads: int | None = None
_controller: ThreadpoolController | None = None
_lock = threading.Lock()  # of the four below and the controller
_inside = 0
_limit: Any = None
_worker = threading.local()
_pools: dict[int, ThreadPoolExecutor] = {}


def get_threads() -> int:
    """Return the number of worker threads in use: `set_threads`, else REFQUANT_NUM_THREADS, else the cores."""
    if _threads is not None:
        return _threads
    text = os.environ.get("REFQUANT_NUM_THREADS")
    if text is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise RangeError(f"REFQUANT_NUM_THREADS is {text!r}; it must be a whole number from 1. Unset it or correct it.")
    return int(text)


def set_threads(n: int | None) -> None:
    """Use `n` worker threads from now on (None: back to the default)."""
    global _threads
    if n is not None and n < 1:
        raise RangeError(f"threads is {n}; it must be at least 1.")
    _threads = n


@contextmanager
def using_threads(n: int) -> Iterator[None]:
    """Use `n` worker threads inside a `with` block, in the whole process; then as many as before."""
    before = _threads
    set_threads(n)
    try:
        yield
    finally:
        set_threads(before)


def parallel_map(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Apply `function` to every item on the worker threads, results in the order of the items.

    BLAS runs on one thread meanwhile, also for a single item, so that its sums have one order whatever
    `set_threads` says. A call from inside a worker runs its items one after another.

    Parameters
    ----------
    function : callable
        Of one argument.
    items : iterable

    Returns
    -------
    list
        Of the results, one for each item.
    """
    todo = list(items)
    nested = getattr(_worker, "busy", False)
    with _single_threaded_blas():
        if nested or get_threads() == 1 or len(todo) == 1:
            return [function(item) for item in todo]
        return list(_pool(get_threads()).map(_as_worker, itertools.repeat(function), todo))


def _as_worker(function: Callable[[T], R], item: T) -> R:
    _worker.busy = True
    try:
        return function(item)
    finally:
        _worker.busy = False


@contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """Hold BLAS to one thread while any thread of the process is inside; the last one out restores it.

    OpenBLAS obeys the main thread; asked by another it may keep its threads, which costs time only.
    """
    global _controller, _inside, _limit
    with _lock:
        if _controller is None:  # finding the loaded BLAS takes milliseconds, setting its limit microseconds
            _controller = ThreadpoolController()
        if _inside == 0:
            _limit = _controller.limit(limits=1, user_api="blas")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _limit.restore_original_limits()


def _pool(n: int) -> ThreadPoolExecutor:
    with _lock:
        if n not in _pools:
            _pools[n] = ThreadPoolExecutor(n, thread_name_prefix="refquant")
        return _pools[n]
