"""The thread team: its size changes nothing, several callers do not meet, and it survives a fork."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from asserts import assert_same_integers
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import convolutions

from refquant import kernels, ref
from refquant.kernels import Requantize, _ext, pack_weights
from refquant.threads import using_threads

needs_extension = pytest.mark.skipif(_ext.lib is None, reason="the C core is not compiled")

# A team is called from a million multiplications on (ALONE_BELOW in conv.c): x, w, stride, padding.
LARGE = {
    "many lines": ((1, 33, 29, 64), (96, 3, 3, 64), 1, 1),
    "many images": ((9, 8, 8, 32), (32, 3, 3, 32), 2, 1),
    "many outputs": ((1, 4, 4, 64), (700, 3, 3, 64), 1, 0),
    "one pixel": ((1, 3, 3, 128), (1000, 3, 3, 128), 1, 0),
    "a product": ((1, 301, 1, 72), (100, 1, 1, 72), 1, 0),
    "one output": ((2, 65, 70, 127), (1, 3, 3, 127), 1, 2),
}


def random_case(name, seed=0):
    x, w, stride, padding = LARGE[name]
    rng = np.random.default_rng(seed)
    options = {"stride": stride, "padding": padding, "x_zero_point": 77}
    zw = rng.integers(-2, 3, w[0])
    return rng.integers(0, 256, x, np.uint8), rng.integers(-128, 128, w, np.int8), zw, options


@pytest.mark.parametrize("name", LARGE)
def test_the_number_of_threads_does_not_matter(isa, name):
    """Also more threads than cores, than units and than a byte counts."""
    x, w, zw, options = random_case(name)
    want = ref.conv2d(x, w, w_zero_point=zw, **options)
    packed = pack_weights(w, zero_point=zw)
    for threads in (1, 2, 3, 7, 300):
        with using_threads(threads):
            assert_same_integers(kernels.conv2d(x, packed, **options), want, threads=threads)


@given(convolutions(), st.sampled_from([2, 3, 7]))
@settings(max_examples=25)
def test_small_ones_ask_for_threads_too(case, threads):
    """Below a million multiplications the caller is alone, whatever is asked for."""
    packed = pack_weights(case.w, bits=case.bits, zero_point=case.w_zero_point)
    with using_threads(threads):
        want = ref.conv2d(case.x, case.w, **case.all_options)
        assert_same_integers(kernels.conv2d(case.x, packed, **case.options), want)


@pytest.mark.parametrize("threads", [1, 3])
def test_several_callers_at_once(threads):
    """Eight Python threads with different operands: one gets the team, the others work alone, all are right."""
    cases = [random_case(name, seed) for seed, name in enumerate([*LARGE, *LARGE][:8])]
    want = [ref.conv2d(x, w, w_zero_point=zw, **options) for x, w, zw, options in cases]
    packed = [pack_weights(w, zero_point=zw) for _, w, zw, _ in cases]
    stages = [Requantize(np.full(len(w), 2**30, np.int32), np.full(len(w), 46, np.int32), 100) for _, w, _, _ in cases]

    def call(i):
        x, _, _, options = cases[i % 8]
        codes = kernels.conv2d(x, packed[i % 8], output=stages[i % 8], **options)
        return codes, kernels.conv2d(x, packed[i % 8], **options)

    with using_threads(threads), ThreadPoolExecutor(8) as pool:
        for i, (codes, sums) in enumerate(pool.map(call, range(80))):
            assert_same_integers(sums, want[i % 8], case=i)
            assert_same_integers(codes, stages[i % 8].apply(want[i % 8]), case=i)


FORK = """
import os, sys, threading
import numpy as np
from refquant import kernels
from refquant.threads import set_threads

rng = np.random.default_rng(0)
x = rng.integers(0, 256, (1, 20, 20, 64), np.uint8)
w = kernels.pack_weights(rng.integers(-128, 128, (64, 3, 3, 64), np.int8))
set_threads(3)
with kernels.using("ref"):
    want = kernels.conv2d(x, w, padding=1)

def right(times):
    return all((kernels.conv2d(x, w, padding=1) == want).all() for _ in range(times))

def in_a_child(times=5):
    child = os.fork()
    if child == 0:
        os._exit(0 if right(times) else 1)
    return os.waitpid(child, 0)[1]

assert right(5)                                        # the team is there
assert in_a_child() == 0                               # a child begins its own
assert right(5)                                        # and the parent's still works
busy = [threading.Thread(target=right, args=(200,)) for _ in range(2)]
for thread in busy:
    thread.start()
assert [in_a_child() for _ in range(10)] == [0] * 10   # also while another thread has the team
for thread in busy:
    thread.join()
child = os.fork()
if child == 0:
    os._exit(0 if right(2) and in_a_child() == 0 else 1)  # a child of a child
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork():
    """A deadlock would not fail but hang: hence a process of its own, and a limit of time."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]  # Python warns of fork with threads
    root = Path(kernels.__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert (run.returncode, run.stdout, run.stderr) == (0, "fine\n", "")
