"""The MSE search: of 80 shrunk ranges, the one whose rounded values lie nearest to x.

A wide range clips nothing and has a large step; a narrow one rounds finely and clips. The search measures
both errors together, on the data themselves.

Where we differ from the released TFMQ-DM code (``quant/quant_layer.py:38-64``), and why:

1. Its search shrinks the raw [min x, max x]. For a tensor of one sign the zero point then falls outside of
   the codes and 0 is off by as much as the range is away from it. Ours shrinks the widened range, which
   makes min-max the first candidate: the search is never worse than min-max on its own data. On tensors that
   contain both signs the two are equal, code for code. ``mse(..., zero_in_range=False)`` is the released one.
2. Constant tensors, zero or not, make it raise TypeError. Ours return the min-max result.
3. It scores in float32; ours adds the same float32 errors up in float64, so that the winner does not depend
   on the order of a sum. It starts from a best score of 1e10 and returns nothing if no candidate is below it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...intmath import grid_codes
from ..affine import QParams, QSpec
from .ranges import Float64, Rows, affine_map, as_rows, per_spec

SHRINK = 1.0 - np.arange(80) * 0.01  # 1.00, 0.99, ... 0.21: the authors' grid, in their double arithmetic
BLOCK = 1 << 17  # elements scored at a time: about 2 MB of temporaries, whatever the size of the tensor


def mse(x: ArrayLike, spec: QSpec, *, power: float = 2.4, zero_in_range: bool = True) -> QParams:
    """Quantizer for the shrunk range of x that has the smallest mean rounding and clipping error.

    Parameters
    ----------
    x : array_like, any shape
    spec : QSpec
    power : float
        Exponent of the error. 2 is the mean squared error; the authors' 2.4 weighs clipped outliers more.
    zero_in_range : bool
        False gives the released search on the raw range (module docstring, difference 1).

    Returns
    -------
    QParams

    Raises
    ------
    RangeError
        With zero_in_range=False also where the range is so narrow, and so far from 0, that float32 cannot
        hold the codes (abs(zero_point) > 2**23): constants above 0.084. The authors' code raises there too.

    Notes
    -----
    Candidates are r [m, M] for r = 1.00, 0.99, ... 0.21; each is scored by mean abs(x^ - x)**power over
    the tensor, or over each channel by itself, and the first minimum wins. All channels are searched at once.
    Source: TFMQ-DM ``quant/quant_layer.py:38-64``.
    """
    rows = as_rows(x, spec.axis)
    return search(rows, rows.min(axis=1), rows.max(axis=1), spec, power, zero_in_range)


def search(
    rows: Rows,
    lo: NDArray[np.float32],
    hi: NDArray[np.float32],
    spec: QSpec,
    power: float,
    zero_in_range: bool,
) -> QParams:
    """Score the 80 shrunk ranges on rows (C, n) and return, for each row, the first with the least error."""
    low, high = lo.astype(np.float64), hi.astype(np.float64)
    if zero_in_range:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale, zero_point = affine_map(SHRINK[:, None] * low, SHRINK[:, None] * high, spec)  # (80, C)
    error = candidate_errors(rows, scale, zero_point, (spec.qmin, spec.qmax), power)
    best, row = error.argmin(axis=0), np.arange(rows.shape[0])  # argmin takes the first, as "<" does
    return QParams(per_spec(scale[best, row], spec), per_spec(zero_point[best, row], spec), spec)


def candidate_errors(
    rows: Rows,
    scale: NDArray[np.float32],
    zero_point: NDArray[np.int32],
    codes: tuple[int, int],
    power: float,
) -> Float64:
    """Sum of abs(x^ - x)**power of each row under each of its candidates.

    Parameters
    ----------
    rows : float32 array, (C, n)
    scale : float32 array, (K, C)
    zero_point : int32 array, (K, C)
    codes : (int, int)
        The smallest and the largest code.
    power : float

    Returns
    -------
    float64 array, (K, C)
        Sums: the mean over a row has the same minimum.
    """
    error = np.zeros(scale.shape)
    width = max(1, BLOCK // rows.shape[0])
    for start in range(0, rows.shape[1], width):
        block = rows[:, start : start + width]
        for i in range(len(scale)):
            s, z = scale[i, :, None], zero_point[i, :, None]
            distance = grid_codes(block, s, z, *codes)
            distance -= z.astype(np.float32)
            distance *= s
            distance -= block
            error[i] += (np.abs(distance, out=distance).astype(np.float64) ** power).sum(axis=1)
    return error
