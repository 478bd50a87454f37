"""Solution 4. The law: permuting the terms of a sum changes nothing; on data from the corners of the range.

In the tests: `test_permutations` (tests/kernels/test_laws.py); with this very mutant in C,
`test_maddubs_is_found_by_corners_and_not_by_a_network` (tests/kernels/test_mutants.py).

Two products reach 2 x 255 x 127 = 64,770, and 16 bits end at 32,767. It takes two large activations side by side, and
two large weights of one sign. Data like a network's hardly ever have that, until a model is trained that does. Two
lessons: laws need no reference implementation; and the *data* of a test decide what it can find. Uniform bytes would
have found it at once, and bytes from the corners, 0, 1, 127, 128, 254, 255, even sooner.
"""

import runpy
import sys
from pathlib import Path

import numpy as np

from refquant import ref

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from verdict import verdict

exercise = runpy.run_path(str(HERE.parent / "saturation.py"))


def permutations_change_nothing(implementation):
    """gemm(a[:, p], b[:, p]) = gemm(a, b) for any permutation p of k."""
    rng = np.random.default_rng(0)
    for k in (2, 4, 16, 64):
        a = rng.choice(np.array([0, 1, 127, 128, 254, 255], np.uint8), (4, k))
        b = rng.choice(np.array([-128, -127, -1, 0, 1, 127], np.int8), (8, k))
        p = rng.permutation(k)
        one, other = implementation(a, b), implementation(a[:, p], b[:, p])
        where = np.argwhere(one != other)
        assert not len(where), (
            f"K = {k}: {len(where)} of {one.size} sums change with the order of their terms, as "
            f"{one[tuple(where[0])]} to {other[tuple(where[0])]}"
        )


if __name__ == "__main__":
    exercise["authors_test"](exercise["gemm"])
    assert verdict(permutations_change_nothing, exercise["gemm"], ref.gemm)
