"""Arrays between guard words, and the loop over kernels: shared by the tests that call the C core."""

import numpy as np

from refquant import kernels

GUARD = 68  # bytes on each side: not a multiple of a register, so that the array in between is not aligned to one
PATTERN = 0xA5


class Guarded:
    """An array of garbage to be filled; `check` fails where a byte outside of it was written."""

    def __init__(self, shape, dtype):
        self._bytes = np.full(2 * GUARD + int(np.prod(shape)) * np.dtype(dtype).itemsize, PATTERN, np.uint8)
        self.array = self._bytes[GUARD:-GUARD].view(dtype).reshape(shape)

    def check(self):
        for side, words in (("before", self._bytes[:GUARD]), ("behind", self._bytes[-GUARD:])):
            assert (words == PATTERN).all(), f"bytes {np.flatnonzero(words != PATTERN)} {side} the array were written"

    def untouched(self):
        return bool((self._bytes == PATTERN).all())


def every_kernel(ref=True):
    """Run the body of a loop on each kernel that this processor has; `ref` too, or only where there is no other."""
    for isa in kernels.supported() if ref else kernels.supported()[1:] or ("ref",):
        with kernels.using(isa):
            yield isa
