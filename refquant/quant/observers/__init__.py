"""Observers: from the values of a tensor to the scale and zero point of its quantizer.

From one tensor, ``f(x, spec) -> QParams``:

    minmax        the whole range of x: nothing is clipped                           `ranges`
    percentile    all but a small share of the values at either end                  `ranges`
    mse           the range, of 80 shrunk ones, whose rounded values are nearest     `search`
    kl, histogram the range that keeps the histogram, or a share of its mass         `histograms`
    from_range    a range that is known already                                      `ranges`

Over many batches, ``update(x)`` and then ``minmax(spec)``:

    RangeObserver the exact range, and a sample of the values for the searches       `batches`
    RunningRange  a moving average of the batches' ranges                            `running`
    StepRanges    a range for every step of the sampler, and their `StepTable`       `steps`
    TimeGroups    the same for groups of steps                                       `time_groups`

The range searches of two baselines, as released: `observers.ptq4dm`, `observers.qdiffusion`.

x is any array_like of finite numbers, taken as float32; results are ``QParams`` with scale and zero_point of
shape () or, if ``spec.axis`` is an int, (C,). Errors: ``RangeError`` for NaN, infinities (a range has two
finite ends) and empty tensors; ``ShapeError`` where x has no such axis.

All ranges are widened to contain 0, so real 0 always has a code of its own: zero padding, ReLU and
masked values stay exact. All-zero tensors, and all others whose step would be smaller, get scale 1e-8; a
constant c becomes the range [min(c, 0), max(c, 0)] and is represented exactly up to rounding. What a
released search does instead is said where it can be asked for.
"""

from .batches import RangeObserver
from .histograms import histogram, kl
from .ranges import from_range, minmax, percentile
from .running import RunningRange
from .search import SHRINK, mse
from .steps import StepRanges, StepTable
from .time_groups import TimeGroups

__all__ = [
    "SHRINK",
    "RangeObserver",
    "RunningRange",
    "StepRanges",
    "StepTable",
    "TimeGroups",
    "from_range",
    "histogram",
    "kl",
    "minmax",
    "mse",
    "percentile",
]
