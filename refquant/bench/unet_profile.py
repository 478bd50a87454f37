"""Where the time of an integer network goes, by kind of operation."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..deploy.runtime import IntegerDenoiser
from ..errors import RefquantError
from .unet_networks import STEP, Images

PASSES, SECONDS = 5, 1.0  # at least so many passes, and for so long


def profile(denoise: IntegerDenoiser, x: Images, y: NDArray[np.integer] | None = None) -> dict[str, Any]:
    """Time every operation, the least of some passes: what else the machine does hits one or the other of them.

    What is timed are the recorded calls of the step, one for each operation, as a sampler makes them.

    Parameters
    ----------
    denoise : IntegerDenoiser
    x : float32 array, (N, C, H, W)
    y : int array, (N,), optional
        Classes, of a conditional network.

    Returns
    -------
    dict
        "seconds", the sum of all; "kinds": {name of the operation: {"seconds", "operations"}}, the slowest first;
        "operations": the seconds of each, in order of execution, and "names" of what they write.
    """
    operations, values = denoise.program.operations, denoise.program.values
    nhwc = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    denoise.executor(nhwc, STEP, y=y)
    read, calls = denoise.executor.recorded(len(x), STEP)
    if len(calls) != len(operations):
        raise RefquantError(f"a step is {len(calls)} recorded calls, the program has {len(operations)} operations.")
    least, done, began = np.full(len(operations), np.inf), 0, time.perf_counter()
    while done < PASSES or time.perf_counter() - began < SECONDS:
        read[...] = nhwc  # later values take its place
        times = [time.perf_counter()]
        for call in calls:
            call()
            times.append(time.perf_counter())
        least, done = np.minimum(least, np.diff(times)), done + 1
    kinds: dict[str, dict[str, Any]] = {}
    for operation, taken in zip(operations, least.tolist(), strict=True):
        kind = kinds.setdefault(type(operation).__name__, {"seconds": 0.0, "operations": 0})
        kind["seconds"], kind["operations"] = kind["seconds"] + taken, kind["operations"] + 1
    names = [values[operation.out].name for operation in operations]
    slowest_first = dict(sorted(kinds.items(), key=lambda item: -item[1]["seconds"]))
    return {"seconds": sum(least.tolist()), "kinds": slowest_first, "operations": least.tolist(), "names": names}
