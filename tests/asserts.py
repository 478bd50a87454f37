"""Assertions whose failure message is the bug report: where, what came, what should have come, from what."""

import numpy as np


def assert_same_integers(got, want, **inputs):
    """Fail unless two integer arrays have the same shape and the same values.

    dtypes may differ in width, not in kind: a float result is a failure even if its values are right. Inputs
    that broadcast to the shape of the result are shown at the first differing index, others by their shape.
    """
    got, want = np.asarray(got), np.asarray(want)
    for name, array in (("got", got), ("want", want)):
        if not np.issubdtype(array.dtype, np.integer):
            raise AssertionError(f"{name} is {array.dtype}, not an integer array")
    if got.shape != want.shape:
        raise AssertionError(f"shape: got {got.shape}, want {want.shape}")
    different = got != want
    if not different.any():
        return
    index = tuple(int(i) for i in np.argwhere(different)[0])
    lines = [
        f"{np.count_nonzero(different)} of {got.size} integers differ, first at index {index}:",
        f"  got  = {got[index]} ({got.dtype})",
        f"  want = {want[index]} ({want.dtype})",
    ]
    for name, value in inputs.items():
        value = np.asarray(value)
        try:
            lines.append(f"  {name} = {np.broadcast_to(value, got.shape)[index]!r}")
        except ValueError:
            lines.append(f"  {name}: shape {value.shape}, {value.dtype}")
    raise AssertionError("\n".join(lines))
