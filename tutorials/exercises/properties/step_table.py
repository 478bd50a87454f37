"""Exercise 5. Finite set calibration: a range for each step of the sampler, kept under the time-step t.

A sampler tells the network the time-step, so what is more natural than to look the range up by it? With evenly spaced
steps every table comes out right.

Task: write a property that holds for `ByStep`, which is the library's table, and fails here. Which samplers does
`refquant.diffusion.sampling.timestep_sequence` know? Print what they visit. After page 11.
"""

import numpy as np

from refquant.diffusion.sampling import timestep_sequence
from refquant.quant.affine import QSpec
from refquant.quant.observers import StepRanges, minmax


class ByTimestep:
    """Ranges of an activation, recorded while the float sampler runs and looked up while the quantized one does."""

    def __init__(self, timesteps):
        self.timesteps, self.seen = timesteps, {}

    def record(self, step, x):
        t = self.timesteps[step]
        low, high = self.seen.get(t, (np.inf, -np.inf))
        self.seen[t] = min(low, x.min()), max(high, x.max())

    def lookup(self, step):
        return minmax(np.array(self.seen[self.timesteps[step]], np.float32), QSpec(8))


class ByStep:
    """The library's table behind the same two calls."""

    def __init__(self, timesteps):
        self.ranges = StepRanges(len(timesteps))

    def record(self, step, x):
        self.ranges.update(step, x)

    def lookup(self, step):
        return self.ranges.table(QSpec(8))[step]


def authors_test(implementation):
    timesteps = timestep_sequence(1000, 50, "uniform")
    table, rng = implementation(timesteps), np.random.default_rng(0)
    seen = [rng.standard_normal(8).astype(np.float32) for _ in timesteps]
    for step, x in enumerate(seen):
        table.record(step, x)
    for step, x in enumerate(seen):
        assert table.lookup(step).scale == minmax(x, QSpec(8)).scale


def my_property(implementation):
    """Yours: raise AssertionError where `implementation(timesteps)` breaks a law."""


if __name__ == "__main__":
    from verdict import verdict

    authors_test(ByTimestep)
    print("the author's test passes")
    verdict(my_property, ByTimestep, ByStep)
