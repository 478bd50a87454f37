"""Solution 5. The law: what was recorded at step k is looked up at step k, for every schedule.

In the tests: `test_steps_keep_their_ranges` (tests/property/test_step_tables.py), with this mutant in
`test_a_table_indexed_by_t_is_caught_on_the_quadratic_schedule`.

The quadratic schedule, int(linspace(0, sqrt(800), 100)²), visits some time-steps more than once, so that 100 steps
share fewer entries. It goes unnoticed easily: between equal t, DDIM stands still, and the ranges are alike. With running
averages, or samplers that remember earlier steps, they are not. The index of a table over steps is the step.
"""

import runpy
import sys
from pathlib import Path

import numpy as np

from refquant.diffusion.sampling import timestep_sequence
from refquant.quant.affine import QSpec
from refquant.quant.observers import minmax

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from verdict import verdict

exercise = runpy.run_path(str(HERE.parent / "step_table.py"))


def steps_keep_their_ranges(implementation):
    """lookup(k) = minmax(x_k) after record(k, x_k) for all k, on uniform and quadratic schedules."""
    for spacing in ("uniform", "quadratic"):
        timesteps = timestep_sequence(1000, 100, spacing)
        table, rng = implementation(timesteps), np.random.default_rng(0)
        seen = [rng.standard_normal(8).astype(np.float32) for _ in timesteps]
        for step, x in enumerate(seen):
            table.record(step, x)
        wrong = [k for k, x in enumerate(seen) if table.lookup(k).scale != minmax(x, QSpec(8)).scale]
        assert not wrong, (
            f"{spacing}: steps {wrong} have the range of another step; they are at t = {[timesteps[k] for k in wrong]}"
        )


if __name__ == "__main__":
    exercise["authors_test"](exercise["ByTimestep"])
    assert verdict(steps_keep_their_ranges, exercise["ByTimestep"], exercise["ByStep"])
