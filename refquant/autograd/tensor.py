"""The tape: an array that remembers how it was made.

A `Tensor` holds ``data`` (a NumPy array), the tensors it was computed from, and one function,
its *vjp* (vector-Jacobian product), that turns the gradient of the loss with respect to the
output into the gradients with respect to those parents. `gradients` walks that graph once,
children before parents. There are no views, no in-place operations and no second derivatives;
an operation is a plain function in ``ops.py`` or ``nnops.py`` whose forward and vjp stand
together, so a reader checks one against the other without turning a page.

Shapes: every gradient has the shape and dtype of the array it belongs to.
Errors: `ShapeError` when a loss is not a scalar, `RefquantError` when it does not depend on
what its gradient is asked for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import RefquantError, ShapeError

Vjp = Callable[[NDArray[Any]], "tuple[NDArray[Any] | None, ...]"]

# Recording is a property of the thread: one worker may sample while another trains.
_state = threading.local()


def is_recording() -> bool:
    """Whether operations of this thread are written to the tape."""
    return getattr(_state, "recording", True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Within this block operations compute values only; no graph is built.

    It holds for the calling thread: enter it inside a function that worker threads run, not around it.
    """
    before = is_recording()
    _state.recording = False
    try:
        yield
    finally:
        _state.recording = before


class Tensor:
    """An array on the tape.

    Parameters
    ----------
    data : array_like
        The value. Floats keep their dtype (float32 in use, float64 for gradient checks).
    parents : tuple of Tensor
        What it was computed from; empty for leaves.
    vjp : callable, optional
        ``vjp(g)`` with ``g`` of the shape of `data` returns one gradient (or None) per parent.
    requires_grad : bool
        For leaves: whether gradients with respect to it are wanted. For results of operations
        it follows from the parents.

    Notes
    -----
    Arrays on the tape must not be changed in place: the vjps read them later.
    """

    __slots__ = ("_parents", "_vjp", "data", "requires_grad")

    def __init__(
        self,
        data: ArrayLike,
        parents: tuple[Tensor, ...] = (),
        vjp: Vjp | None = None,
        *,
        requires_grad: bool = False,
    ) -> None:
        self.data = np.asarray(data)
        if parents and is_recording() and any(p.requires_grad for p in parents):
            self._parents, self._vjp, self.requires_grad = parents, vjp, True
        else:
            self._parents, self._vjp, self.requires_grad = (), None, requires_grad

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the array."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.data.ndim

    def item(self) -> float:
        """Return the value of a one-element tensor as a Python float."""
        return float(self.data.reshape(()))

    def __repr__(self) -> str:
        made = f", from {len(self._parents)}" if self._parents else ""
        return f"Tensor{self.shape}{{{self.dtype}{made}}}"


def as_tensor(x: Tensor | ArrayLike) -> Tensor:
    """Return `x` itself if it is a Tensor, else a constant holding it."""
    return x if isinstance(x, Tensor) else Tensor(x)


#: Every differentiable operation, by name. The gradient tests are parametrised over this table,
#: so an operation without an example input fails the suite by existing.
OPS: dict[str, Callable[..., Tensor]] = {}


def op(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register a differentiable operation, and let its tensor arguments be given as arrays."""
    name = function.__name__
    assert name not in OPS, f"two operations are called {name}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return function(*(as_tensor(a) if isinstance(a, np.ndarray) else a for a in args), **kwargs)

    OPS[name] = call
    return call


def _children_first(root: Tensor) -> list[Tensor]:
    """Order the graph under `root` so that a tensor comes after everything computed from it.

    Counts the children of each tensor, then releases it when the last one has been passed:
    no recursion, so a graph may be deeper than Python's stack.
    """
    children: dict[int, int] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) in children:
            children[id(node)] += 1
            continue
        children[id(node)] = 1
        stack.extend(p for p in node._parents if p.requires_grad)
    order: list[Tensor] = []
    ready = [root]
    while ready:
        node = ready.pop()
        order.append(node)
        for parent in node._parents:
            if not parent.requires_grad:
                continue
            children[id(parent)] -= 1
            if children[id(parent)] == 0:
                ready.append(parent)
    return order


def gradients(loss: Tensor, wrt: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Gradients of a scalar with respect to some of the tensors it was computed from.

    Nothing is stored in the tensors, so several threads may differentiate with respect to the
    same parameters at once.

    Parameters
    ----------
    loss : Tensor
        One element.
    wrt : sequence of Tensor
        Leaves or intermediate results.

    Returns
    -------
    list of ndarray
        One array per entry of `wrt`, of its shape; zeros where `loss` does not depend on it. Not to be
        written into: entries may share memory with each other or with the tape.

    Raises
    ------
    ShapeError
        `loss` has more than one element.
    RefquantError
        `loss` was computed without recording, or from constants only.
    """
    if loss.data.size != 1:
        raise ShapeError(f"gradients: the loss must have one element, it has shape {loss.shape}. Sum it first.")
    if not loss.requires_grad:
        raise RefquantError(
            "gradients: the loss depends on no tensor with requires_grad=True. "
            "Was it computed inside no_grad(), or from arrays only?"
        )
    wanted = {id(t) for t in wrt}
    kept: dict[int, NDArray[Any]] = {}
    pending: dict[int, NDArray[Any]] = {id(loss): np.ones_like(loss.data)}
    for node in _children_first(loss):
        g = pending.pop(id(node), None)
        if g is None:  # every child said None: the loss is constant in this tensor
            continue
        if id(node) in wanted:
            kept[id(node)] = g
        if node._vjp is None:
            continue
        for parent, gp in zip(node._parents, node._vjp(g), strict=True):
            if gp is None or not parent.requires_grad:
                continue
            assert gp.shape == parent.shape, f"vjp returned {gp.shape} for a parent of shape {parent.shape}"
            seen = pending.get(id(parent))
            pending[id(parent)] = gp if seen is None else seen + gp  # never in place: g may be shared
    return [kept.get(id(t), np.zeros_like(t.data)) for t in wrt]
