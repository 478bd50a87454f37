"""Do the kernels compute on this machine what the reference computes? An answer in seconds, without a test framework.

The tests of this package draw their cases at random and take minutes; they run where it is developed. This list
is for the machine where it is used: another processor, another compiler. Bugs of such kernels live at the ends of
lanes and tiles, at the ends of the codes and where sums come close to the end of int32, so the list is made of
those. Every case is computed with all three output stages into an array with guards around it: a kernel must
write every element of its result and nothing beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ref
from ..intmath import fixed_point
from ..ref.output import INT32_MAX, Dequantize, Requantize
from ..threads import get_threads, using_threads
from ._conv import conv2d, gemm
from ._dispatch import available, supported, using
from ._weights import PackedWeights, pack_weights

UINT8_CORNERS = np.array([0, 1, 127, 128, 254, 255], np.uint8)
INT8_CORNERS = {8: np.array([-128, -127, -1, 0, 1, 127], np.int8), 4: np.array([-8, -7, -1, 0, 1, 7], np.int8)}
GUARD = 64  # elements on both sides of a result: one 512-bit register of bytes
LOOPS_BELOW = 1500  # multiplications, a millisecond of Python: there the judge is the definition itself

# Around the steps of 4 and 8 bytes and the panels of 16 outputs, and around the tiles of 4 to 12 rows. What takes
# turns has a prime length: two lists of lengths with a common factor would meet in few of their pairs.
DEPTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 129)
OUTPUTS = (1, 7, 8, 15, 16, 17, 31, 32, 33, 48, 49)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 24, 25)
# Of x and of w; None: another one for each output.
ZERO_POINTS: tuple[tuple[int, int | None], ...] = (
    (0, 0), (128, 0), (255, -128), (1, 127), (0, None), (255, 0), (37, None)
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A product (x has two axes) or a convolution (four) of deterministic numbers."""

    x: tuple[int, ...]  # (M, K) or (N, H, W, C)
    w: tuple[int, ...]  # (O, K) or (O, kh, kw, C)
    stride: int = 1
    padding: int = 0
    zero_points: tuple[int, int | None] = (0, 0)  # as in ZERO_POINTS
    bits: int = 8
    fill: str = "mixed"  # "largest": sums of the greatest magnitude
    layout: str = "whole"  # x is "whole", a part of something larger ("apart"), or stored "transposed"
    threads: int = 1

    def __str__(self) -> str:
        """Say everything that sets this case apart."""
        words = [f"{'gemm' if len(self.x) == 2 else 'conv2d'} x {self.x} w {self.w}"]
        if len(self.x) == 4:
            words.append(f"stride {self.stride} padding {self.padding}")
        zx, zw = self.zero_points
        words.append(f"zero points {zx}, {'one for each output' if zw is None else zw}")
        words.append(f"{self.bits} bits, {self.fill} values, x {self.layout}, {self.threads} threads")
        return ", ".join(words)


@dataclass(frozen=True)
class Difference:
    """The first element that is wrong.

    Attributes
    ----------
    case : str
        Operation, shapes and output stage.
    index : tuple of int
        In the result; a single number below 0 or from its size on lies before or behind it in memory.
    got, want : int or float
    """

    case: str
    index: tuple[int, ...]
    got: int | float
    want: int | float

    def __str__(self) -> str:
        """One sentence for a bug report."""
        return f"{self.case}: at {self.index} got {self.got}, want {self.want}"


@dataclass(frozen=True)
class Checked:
    """What became of one kernel: results compared, time they took in seconds, and the first difference."""

    name: str
    results: int
    seconds: float
    difference: Difference | None


@dataclass(frozen=True)
class Verification:
    """The answer for this machine.

    Attributes
    ----------
    checked : tuple of Checked
        Slowest kernel first.
    skipped : dict of str to str
        The other kernels of this build, and why they were not checked.
    """

    checked: tuple[Checked, ...]
    skipped: dict[str, str]

    @property
    def ok(self) -> bool:
        """No kernel differs from the reference."""
        return all(c.difference is None for c in self.checked)

    def __str__(self) -> str:
        """Say which kernels were checked: a skipped one must not look like a correct one."""
        names = [c.name for c in self.checked] + [f"{name}: {why}" for name, why in self.skipped.items()]
        return f"checked {len(self.checked)} of {len(names)} kernels ({', '.join(names)})"


def verify(names: Sequence[str] | None = None, *, seed: int = 42) -> Verification:
    """Compare kernels with `refquant.ref`, bit for bit, on some 600 corner cases with each output stage.

    Like `using`, it concerns the whole process: nothing else should compute meanwhile.

    Parameters
    ----------
    names : sequence of str, optional
        Out of `supported`; by default all of these. "ref" is checked too: packing and the output stages.
    seed : int
        Of the numbers; the shapes are always the same.

    Returns
    -------
    Verification
        A kernel that differs is left alone after its first difference; the others go on.

    Raises
    ------
    UnsupportedISA
        A name that is not `supported`; nothing was computed.
    """
    names = supported() if names is None else tuple(names)
    for name in names:
        with using(name):
            pass
    skipped = {n: "not this machine" for n in available() if n not in supported()}
    skipped |= {n: "not asked for" for n in supported() if n not in names}
    results, seconds = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
    differences: dict[str, Difference] = {}
    for number, case in enumerate(cases()):
        problem = _Problem(case, np.random.default_rng([seed, number]))
        for name in names:
            if name in differences:
                continue
            began = time.perf_counter()
            with using(name), using_threads(case.threads):
                found = problem.first_difference()
            seconds[name] += time.perf_counter() - began
            results[name] += len(problem.stages)
            if found is not None:
                differences[name] = found
    checked = (Checked(n, results[n], seconds[n], differences.get(n)) for n in names)
    return Verification(tuple(checked), skipped)


def cases() -> Iterator[Case]:
    """List the cases, small ones first; what is not multiplied out takes turns."""
    rows, zeros, batch = cycle(ROWS), cycle(ZERO_POINTS), cycle((1, 2, 3))
    for k, o, bits in product(DEPTHS, OUTPUTS, (8, 4)):
        yield Case((next(rows), k), (o, k), bits=bits, zero_points=next(zeros))
    for m, bits in product(range(1, 38), (8, 4)):
        yield Case((m, 20), (33, 20), bits=bits, zero_points=next(zeros))
    width, outputs = cycle((8, 4)), cycle(OUTPUTS)
    for window, stride, padding, c in product(((1, 1), (3, 3), (2, 3), (4, 1)), (1, 2), (0, 1, 2), (1, 3, 8, 17, 32)):
        yield Case((next(batch), 7, 5, c), (next(outputs), *window, c), stride, padding, next(zeros), next(width))
    for zx, zw, bits in product((0, 1, 128, 255), (0, -128, 127, None), (8, 4)):
        yield Case((2, 5, 6, 12), (18, 3, 3, 12), 1, 1, (zx, zw), bits)
    for layout, bits in product(("apart", "transposed"), (8, 4)):
        yield Case((13, 24), (17, 24), zero_points=(9, None), bits=bits, layout=layout)
        for padding in (0, 1):
            yield Case((2, 6, 7, 16), (17, 3, 3, 16), 1, padding, (9, 0), bits, layout=layout)
    for zx, zw, bits in product((0, 128, 255), (0, -128), (8, 4)):
        k = ref.max_k(zx, zw) if bits == 8 else min(ref.max_k(zx, zw), ref.MAX_K)
        yield Case((3, k), (17, k), zero_points=(zx, zw), bits=bits, fill="largest")
    for threads, bits in product(sorted({1, 2, 3, 8, get_threads()}), (8, 4)):  # 3 to 14 million multiplications each
        common: dict[str, Any] = {"bits": bits, "threads": threads}
        yield Case((2, 18, 21, 40), (50, 3, 3, 40), 1, 1, (128, 0), **common)
        yield Case((3, 16, 17, 64), (80, 3, 3, 64), 2, 1, (3, None), **common)
        yield Case((301, 200), (100, 200), zero_points=(200, 0), **common)


class _Problem:
    """The operands of a case, and for each output stage what must come out."""

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case = case
        zx, zw = case.zero_points
        o, k = case.w[0], math.prod(case.w[1:])
        zero = np.full(o, zw) if zw is not None else _mixed(rng, (o,), INT8_CORNERS[8], -128, 127).astype(np.int64)
        self.x, w = self._operands(rng)
        self.packed: PackedWeights = pack_weights(w, bits=case.bits, zero_point=zero)
        self.window: dict[str, Any] = {"stride": case.stride, "padding": case.padding, "x_zero_point": zx}
        as_image = self.x if self.x.ndim == 4 else self.x.reshape(1, -1, 1, k)
        convolve = ref.conv2d_loops if as_image.size * o * math.prod(case.w[1:3]) < LOOPS_BELOW else ref.conv2d
        sums = convolve(as_image, w.reshape(self.packed.shape), w_zero_point=zero, **self.window)
        sums = sums.reshape(sums.shape if self.x.ndim == 4 else (-1, o))
        self.residual = rng.standard_normal(sums.shape, dtype=np.float32) * np.float32(100)
        room = INT32_MAX - k * max(zx, 255 - zx) * self.packed.reach
        self.stages = _stages(rng, o, k, min(room, 1 << 20))
        self.want = {
            name: sums if stage is None else stage.apply(sums, self._residual(stage))
            for name, stage in self.stages.items()
        }

    def _operands(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
        case, corners = self.case, INT8_CORNERS[self.case.bits]
        if case.fill == "largest":
            x, w = np.empty(case.x, np.uint8), np.empty(case.w, np.int8)
            x[0::2], x[1::2] = 255, 0
            w[0::2], w[1::2] = corners[0], corners[-1]
            return x, w
        w = _mixed(rng, case.w, corners, int(corners[0]), int(corners[-1]))
        if case.layout == "apart":  # lines that are cut out of longer ones
            part = tuple(slice(1, -2) if axis in (1, 2) else slice(None) for axis in range(len(case.x)))
            wide = tuple(n + 3 if axis in (1, 2) else n for axis, n in enumerate(case.x))
            return _mixed(rng, wide, UINT8_CORNERS, 0, 255)[part], w
        if case.layout == "transposed":
            return np.ascontiguousarray(_mixed(rng, case.x, UINT8_CORNERS, 0, 255).T).T, w
        return _mixed(rng, case.x, UINT8_CORNERS, 0, 255), w

    def _residual(self, stage: Dequantize | Requantize) -> NDArray[np.float32] | None:
        return self.residual if isinstance(stage, Dequantize) else None

    def first_difference(self) -> Difference | None:
        """Compute with the active kernel, and compare."""
        for name, stage in self.stages.items():
            want = self.want[name]
            around = np.full(want.size + 2 * GUARD, 77, want.dtype)
            expected = around.copy()
            expected[GUARD:-GUARD] = want.ravel()
            options: dict[str, Any] = {"output": stage, "out": around[GUARD:-GUARD].reshape(want.shape)}
            if stage is not None:
                options["residual"] = self._residual(stage)
            if self.x.ndim == 2:
                gemm(self.x, self.packed, a_zero_point=self.case.zero_points[0], **options)
            else:
                conv2d(self.x, self.packed, **self.window, **options)
            wrong = np.flatnonzero(around.view(f"u{want.itemsize}") != expected.view(f"u{want.itemsize}"))
            if wrong.size:
                at = int(wrong[0]) - GUARD
                inside = 0 <= at < want.size
                index = tuple(int(i) for i in np.unravel_index(at, want.shape)) if inside else (at,)
                return Difference(f"{self.case}, {name}", index, around[wrong[0]].item(), expected[wrong[0]].item())
        return None


def _mixed(rng: np.random.Generator, shape: tuple[int, ...], corners: Any, low: int, high: int) -> NDArray[Any]:
    """Half corners, half anything."""
    anything = rng.integers(low, high + 1, shape, corners.dtype)
    return np.where(rng.random(shape) < 0.5, rng.choice(corners, shape), anything)


def _stages(rng: np.random.Generator, o: int, k: int, most_bias: int) -> dict[str, Dequantize | Requantize | None]:
    """The three output stages.

    Among the multipliers are powers of two, which make ties, and those of the shifts 0 and 62.
    """
    size = 2.0 ** (round(math.log2(k) / 2) + 6)  # of a typical sum of k products, over 64
    multiplier = np.where(np.arange(o) % 2 == 0, 1 / size, rng.uniform(0.3, 3, o) / size)
    multiplier[6::8], multiplier[7::8] = 2.0**30, 2.0**-31 - 2.0**-62
    bias = rng.integers(-most_bias, most_bias + 1, o).astype(np.int32)
    qmin, qmax = ((0, 255), (0, 15), (3, 200))[k % 3]
    scale, real_bias = multiplier.astype(np.float32), rng.standard_normal(o, dtype=np.float32)
    return {
        "int32": None,
        "float32": Dequantize(scale, real_bias),
        "uint8": Requantize(*fixed_point(multiplier), int(rng.integers(qmin, qmax + 1)), bias, qmin, qmax),
    }
