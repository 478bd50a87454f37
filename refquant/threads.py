"""One setting for how many cores refquant uses, and the one way it uses them.

NumPy's elementwise operations run on one core and BLAS on all of them, so a network spends most
of its time with one busy core. Here the batch is cut into chunks instead, each worker thread runs
whole chunks, and BLAS is held to one thread meanwhile. NumPy releases the interpreter lock inside
large operations, so two workers come close to twice the speed.

Chunks are cut by size, never by the number of workers, and results are returned in order: what is
computed does not depend on how many threads there are or on timing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

from threadpoolctl import ThreadpoolController

from .errors import RangeError

T = TypeVar("T")
R = TypeVar("R")

_threads: int | None = None
_controller: ThreadpoolController | None = None
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


def parallel_map(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Apply `function` to every item on the worker threads, results in the order of the items.

    BLAS runs single-threaded inside when there is more than one item; a single item runs in the
    calling thread and may use BLAS' own threads.
    """
    todo = list(items)
    threads = get_threads()
    with _blas_limited_to(threads if len(todo) == 1 else 1):
        if threads == 1 or len(todo) == 1:
            return [function(item) for item in todo]
        return list(_pool(threads).map(function, todo))


def _blas_limited_to(n: int) -> AbstractContextManager[object]:
    global _controller
    if _controller is None:  # finding the loaded BLAS takes milliseconds, setting its limit microseconds
        _controller = ThreadpoolController()
    return _controller.limit(limits=n, user_api="blas")


def _pool(n: int) -> ThreadPoolExecutor:
    if n not in _pools:
        _pools[n] = ThreadPoolExecutor(n, thread_name_prefix="refquant")
    return _pools[n]
