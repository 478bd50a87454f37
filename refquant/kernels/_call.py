"""One place where the C core is called, so that the calls of a thread can be kept and made again.

A network computes the same layers on the same memory at every step. What a door of this package does first, checking
operands and finding pointers, costs 3 to 9 microseconds a call and would come to the same result; so

    with recording() as calls:          # everything is computed as ever
        conv2d(x, w, out=y)
        softmax_quantize(y, out=p)
    repeat(calls)                       # and again, on what x holds now: 0.5 microseconds a call

The recorded calls hold the arrays that they read and write. They run the kernel, and as many threads, as were active
when they were recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from ..errors import ShapeError
from ._ext import lib

_own = threading.local()


class Call:
    """A function of the C core (or any that returns 0) with its arguments, and what they point to.

    Parameters
    ----------
    name : str
        Of the operation, for messages.
    function : callable
        Returns a status.
    arguments : tuple
    kept : object
        What has to stay alive beside the arguments.
    explain : callable, optional
        Raises the error behind the status "out of range", for which it looks at the operands again.
    """

    __slots__ = ("arguments", "explain", "function", "kept", "name")

    def __init__(
        self,
        name: str,
        function: Callable[..., int],
        arguments: tuple[Any, ...],
        kept: object = None,
        explain: Callable[[], None] | None = None,
    ) -> None:
        self.name, self.function, self.arguments, self.kept, self.explain = name, function, arguments, kept, explain

    def __call__(self) -> None:
        """Run; raise where the status is not 0."""
        status = self.function(*self.arguments)
        if status:
            self.failed(status)

    def failed(self, status: int) -> None:
        """Raise the error that a status stands for."""
        if status == lib.RQ_ERR_RANGE and self.explain is not None:
            self.explain()
        if status == lib.RQ_ERR_MEMORY:
            raise MemoryError(f"{self.name}: no memory for the scratch space of a thread.")
        raise AssertionError(f"{self.name}: the C core returned {status} for checked arguments")


def call(
    name: str,
    function: Callable[..., int],
    *arguments: Any,
    kept: object = None,
    explain: Callable[[], None] | None = None,
) -> None:
    """Run a function of the C core, and keep the call where this thread is recording; for parameters see `Call`."""
    made = Call(name, function, arguments, kept, explain)
    made()
    if is_recording():
        _own.calls.append(made)


def fill(name: str, function: Callable[[], None]) -> None:
    """Run a NumPy function that fills an array, and keep it where this thread is recording."""

    def done() -> int:
        function()
        return 0

    call(name, done)


def is_recording() -> bool:
    """Tell whether this thread keeps its calls: operands must then be read where they are, not from a copy."""
    return getattr(_own, "calls", None) is not None


def refuse_copy(x: NDArray[Any]) -> None:
    """Refuse to record a call whose operand would be read from a copy."""
    if is_recording():
        raise ShapeError(f"operand {x.dtype} {x.shape} would be copied: a recorded call cannot read it in place.")


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Keep the calls that this thread makes inside a `with` block, in the list that it gives.

    Operands must then lie in memory as the kernels read them, and `out` be given, or a repetition would read a copy and
    fill an array that nobody has: where one would have to be copied, a `ShapeError` says so.
    """
    before = getattr(_own, "calls", None)
    calls: list[Call] = []
    _own.calls = calls
    try:
        yield calls
    finally:
        _own.calls = before


def repeat(calls: Sequence[Call]) -> None:
    """Make recorded calls again, in order."""
    for made in calls:
        status = made.function(*made.arguments)  # a call less a call
        if status:
            made.failed(status)
