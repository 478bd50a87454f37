"""Solution 1. The law: codes are those of exact rational arithmetic with ties to even.

In the tests: `codes_are_the_exact_ones` (tests/laws.py), with the mutant `half_away_from_zero`
(tests/property/test_affine_mutants.py).

Two ways of rounding to the nearest differ on ties only, x / scale = k + 1/2. Random floats hardly ever are ties; with a
scale that is a power of two, and x that are multiples of half of it, every second one is. Real data meet ties, too:
pixels are multiples of 1/255, and codes that are divided by 2 are ties half of the time. What is lost: ties away
from zero grow all of them, so the mean of positive codes drifts upwards, and two engines are equal no more.
"""

import runpy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np

from refquant import intmath

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from verdict import verdict

exercise = runpy.run_path(str(HERE.parent / "ties.py"))


def codes_are_the_exact_ones(implementation):
    """clamp(round(x / s) + z), with Python's exact fractions, on multiples of half a step."""
    scale, zero_point = np.float32(0.25), np.int32(128)
    x = np.arange(-40, 41, dtype=np.float32) * scale / 2
    got = implementation(x, scale, zero_point, 0, 255)
    for value, code in zip(x, got, strict=True):
        wanted = min(max(round(Fraction(float(value)) / Fraction(float(scale))) + int(zero_point), 0), 255)
        assert code == wanted, f"x / scale = {value / scale}: code {code}, and {wanted} is right"


if __name__ == "__main__":
    exercise["authors_test"](exercise["quantize_codes"])
    assert verdict(codes_are_the_exact_ones, exercise["quantize_codes"], intmath.quantize_codes)
