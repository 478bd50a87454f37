"""Modules: a named tree of parameters, and nothing else.

A `Module` finds its parameters and children in its attributes (lists of modules count, their
index becomes part of the name), so names read as the code does: ``down.0.block.1.conv1.weight``.
There is no train/eval switch and no hidden state: what a forward pass needs to know it is told
(see `refquant.nn.layers.Dropout`), so calling a module twice, or from two threads, is harmless.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor
from ..errors import CheckpointError

M = TypeVar("M", bound="Module")


class Parameter(Tensor):
    """A leaf of the tape that belongs to a module and is learned."""

    __slots__ = ()

    def __init__(self, data: NDArray[Any]) -> None:
        super().__init__(data, requires_grad=True)


class Module:
    """Base of every layer and network. Subclasses set attributes and define ``__call__``."""

    def children(self) -> Iterator[tuple[str, Module]]:
        """Yield the direct sub-modules with their attribute names, in order of definition."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", m) for i, m in enumerate(value) if isinstance(m, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """Yield this module and all below it with their full names (the root's is '')."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield every parameter with its full name."""
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    yield (f"{prefix}.{name}" if prefix else name), value

    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of `named_parameters`."""
        return [p for _, p in self.named_parameters()]

    def parameter_count(self) -> int:
        """Count the learned numbers."""
        return sum(p.data.size for p in self.parameters())

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return every parameter's array by name (the arrays themselves, not copies)."""
        return {name: p.data for name, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]], unused: Collection[str] = ()) -> None:
        """Copy arrays into the parameters; names, shapes and kinds must agree exactly.

        Parameters
        ----------
        state : mapping of str to array
            As `state_dict` gives it.
        unused : collection of str
            Parameters that stay as they are, and must not be in `state`.

        Raises
        ------
        CheckpointError
            Naming the first missing, unexpected or misshapen entry. Nothing is changed then.
        """
        own = {name: p for name, p in self.named_parameters() if name not in unused}
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise CheckpointError(
                f"the weights do not fit this network: {len(missing)} missing (first: {missing[:1]}), "
                f"{len(extra)} unexpected (first: {extra[:1]}). Build the network from the file's own configuration."
            )
        for name, p in own.items():
            given = state[name]
            if given.shape != p.shape or given.dtype.kind != "f":
                raise CheckpointError(
                    f"weight {name} has shape {given.shape} and dtype {given.dtype}; the network needs floats of "
                    f"shape {p.shape}. Build the network from the file's own configuration."
                )
        for name, p in own.items():
            p.data = np.array(state[name], dtype=p.dtype, order="C")

    def astype(self: M, dtype: type) -> M:
        """Return a copy of the module with its parameters in another float type (float64 for checks)."""
        other = copy.deepcopy(self)
        for p in other.parameters():
            p.data = p.data.astype(dtype)
        return other
