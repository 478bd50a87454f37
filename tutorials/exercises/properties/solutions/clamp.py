"""Solution 2. The law: inside the range of the codes, the error is at most half a step.

In the tests: `error_is_half_a_step` and `outside_saturates` (tests/laws.py), with the mutant `clamp_before_zero_point`
(tests/property/test_affine_mutants.py).

With a zero point of 128 and codes from 0 to 255, all negative numbers are clamped to 0 before the zero point is added:
codes 0 to 127 are never used, and -1 means 0. With a zero point of 0 the order does not matter; hence the author's
luck with symmetric weights. The last operation must be the one that limits.
"""

import runpy
import sys
from pathlib import Path

import numpy as np

from refquant import intmath

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from verdict import verdict

exercise = runpy.run_path(str(HERE.parent / "clamp.py"))


def error_is_half_a_step(implementation):
    """|x - s (q - z)| <= s / 2 for s (qmin - z) <= x <= s (qmax - z), for any z; the slack is for float32."""
    for low, high in ((0, 255), (-128, 127), (0, 15)):
        for z in (low, low + 1, (low + high) // 2, high):
            scale, zero_point = np.float32(0.5), np.int32(z)
            x = np.linspace(scale * (low - z), scale * (high - z), 1001, dtype=np.float32)
            error = np.abs(x - scale * (implementation(x, scale, zero_point, low, high).astype(np.float32) - z))
            worst = error.argmax()
            assert error[worst] <= scale * 0.501, (
                f"zero point {z}, codes {low} to {high}: x = {x[worst]:.2f} is represented with an error of "
                f"{error[worst] / scale:.1f} steps"
            )


if __name__ == "__main__":
    exercise["authors_test"](exercise["quantize_codes"])
    assert verdict(error_is_half_a_step, exercise["quantize_codes"], intmath.quantize_codes)
