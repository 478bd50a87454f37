"""Group-wise weights: a scale and zero point for every g inputs of an output channel, not for all K.

A large weight widens the step of its g neighbours only. The cost is K/g scales and zero points a channel: with 4-bit
weights, float32 scales and zero points of a byte, 40/g bits more for each weight. Q-DiT (arXiv 2406.17343) cuts weights
and activations of a layer in the same groups, so that an integer sum runs over one group and is scaled once.

A weight (O, ...) with K numbers a channel is cut into rows (O K/g, g), channel by channel, in the order of memory;
each row is a "channel" of its `QParams` (axis 0). So a `QParams` with more rows than the weight has output channels is
a group-wise one, and `as_rows` undoes the difference.

Errors: `ShapeError` where g does not divide K, or the rows of a quantizer do not divide the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError
from .affine import QParams, QSpec

Array = NDArray[Any]
Observer = Callable[[Array, QSpec], QParams]


def check_group(inputs: int, group: int) -> int:
    """`group`, or all inputs for 0; ShapeError unless it divides their number."""
    size = group or inputs
    if size < 1 or inputs % size:
        raise ShapeError(f"groups of {size} do not divide {inputs} inputs; give a divisor, or 0 for no groups")
    return size


def group_rows(w: Array, group: int) -> Array:
    """Weight (O, ...) as rows (O K/g, g)."""
    size = check_group(int(np.prod(w.shape[1:])), group)
    return w.reshape(-1, size)


def group_qparams(observer: Observer, w: Array, spec: QSpec, group: int) -> QParams:
    """The quantizer of a weight in groups of `group` inputs, each by `observer` (such as `observers.minmax`)."""
    return observer(group_rows(w, group), spec)


def as_rows(w: Array, qparams: QParams) -> Array:
    """A weight, or its codes, (O, ...) with a row for each scale of `qparams`; as it is where that is so already."""
    if qparams.spec.axis != 0 or qparams.scale.size == len(w):
        return w
    rows = qparams.scale.size
    if rows % len(w) or w.size % rows:
        raise ShapeError(f"{rows} scales for a weight of shape {w.shape}: give one for each output channel or group")
    return w.reshape(rows, -1)
