"""The neondot kernel on an emulated AArch64: cross-compiled, and run on vectors that the NumPy reference has made.

The C driver, cross/vectors.c, is also compiled for the machine at hand: it is tested wherever there is a C compiler.
"""

import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from refquant import ref
from refquant.ref import Dequantize, Requantize

ROOT = Path(__file__).resolve().parents[2]
CEXT, DRIVER = ROOT / "cext", Path(__file__).parent / "cross" / "vectors.c"
PACKAGES = "gcc-aarch64-linux-gnu qemu-user-static libc6-dev-arm64-cross"

# Around groups of 4, steps and halves of 8, panels of 16 and pairs of 32; around tiles of 8 and of 12 rows.
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65)
OUTPUTS = (1, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 24, 25, 31, 32, 33, 48, 65)
ROWS = (*range(1, 18), 25)
X_CORNERS = (0, 1, 127, 128, 254, 255)
W_CORNERS = {8: (-128, -127, -1, 0, 1, 127), 4: (-8, -7, -1, 0, 1, 7)}


# ------------------------------------------------------------------ vectors


def draw(rng, shape, corners, dtype):
    """Return corners only, or one corner everywhere, or anything between the outermost ones."""
    match rng.integers(3):
        case 0:
            return rng.choice(corners, shape).astype(dtype)
        case 1:
            return np.full(shape, rng.choice(corners), dtype)
    return rng.integers(min(corners), max(corners) + 1, shape).astype(dtype)


def draw_output(rng, o):
    """Return an output stage or none; with or without a bias."""
    biased = rng.integers(2)
    match rng.integers(3):
        case 0:
            return None
        case 1:
            bias = rng.normal(0, 100, o).astype(np.float32)
            return Dequantize(rng.uniform(1e-4, 1, o).astype(np.float32), bias if biased else None)
    zero_point, low, high = rng.choice([(0, 0, 255), (128, 0, 255), (255, 1, 254), (7, 0, 15)]).tolist()
    mantissa, shift = (rng.integers(*limits, o).astype(np.int32) for limits in ((2**30, 2**31), (28, 46)))
    bias = rng.integers(-(10**5), 10**5, o).astype(np.int32) if biased else None
    return Requantize(mantissa, shift, zero_point, bias, low, high)


def encode(x, w, bits, stride=1, padding=0, zx=0, zw=None, output=None, residual=None):
    """Return a case as vectors.c reads it: the numbers and the arrays of its two enums, the result last."""
    want = ref.conv2d(x, w, stride=stride, padding=padding, x_zero_point=zx, w_zero_point=0 if zw is None else zw)
    kind, limits, arrays = 0, (0, 0, 0), [None] * 6  # bias of integers, scale, bias, residual, mantissa, shift
    if isinstance(output, Dequantize):
        residual = residual.normal(0, 100, want.shape).astype(np.float32) if residual else None
        want = output.apply(want, residual)
        kind, arrays[1:4] = 1, (output.scale, output.bias, residual)
    elif output is not None:
        want = output.apply(want)
        kind, limits = 2, (output.zero_point, output.qmin, output.qmax)
        arrays[0], arrays[4:] = output.bias, (output.mantissa, output.shift)
    numbers = (*x.shape, *w.shape[:3], bits, stride, padding, zx, kind, *limits)
    lengths = (-1 if a is None else a.nbytes for a in (x, w, zw, *arrays, want))
    return np.array(numbers, np.int64).tobytes() + b"".join(
        np.int64(length).tobytes() + (b"" if a is None else a.tobytes())
        for length, a in zip(lengths, (x, w, zw, *arrays, want), strict=True)
    )


def cases():
    """Yield every case: matrix products of all sizes, convolutions of all kinds, the largest sums."""
    rng = np.random.default_rng(27)

    def case(image, o, window, bits, stride, padding, shifted):
        x = draw(rng, image, X_CORNERS, np.uint8)
        w = draw(rng, (o, *window, image[3]), W_CORNERS[bits], np.int8)
        zw = draw(rng, o, W_CORNERS[bits], np.int32) if shifted else None
        zx = int(rng.choice([0, 1, 128, 255]))
        residual = rng if rng.integers(2) else None
        return encode(x, w, bits, stride, padding, zx, zw, draw_output(rng, o), residual)

    for o, rows, bits in itertools.product(OUTPUTS, ROWS, (8, 4)):
        yield case((1, rows, 1, rng.choice(CHANNELS)), o, (1, 1), bits, 1, 0, rng.integers(2))
    windows = ((1, 1), (3, 3), (3, 2))
    for window, stride, padding, bits, shifted in itertools.product(windows, (1, 2), (0, 1, 2), (8, 4), (0, 1)):
        for _ in range(2):
            image = (2, rng.integers(3, 9), rng.integers(3, 9), rng.choice(CHANNELS))
            yield case(image, rng.choice(OUTPUTS), window, bits, stride, padding, shifted)
    for a, b, zx, bits in ((255, -128, 0, 8), (255, 127, 0, 8), (0, -128, 128, 8), (255, -8, 0, 4), (255, 7, 0, 4)):
        k = ref.max_k(zx)
        yield encode(np.full((1, 3, 1, k), a, np.uint8), np.full((9, 1, 1, k), b, np.int8), bits, zx=zx)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Write the file of cases; return its path and their number."""
    records = list(cases())
    path = tmp_path_factory.mktemp("vectors") / "vectors.bin"
    path.write_bytes(np.int64(len(records)).tobytes() + b"".join(records))
    return path, len(records)


# ------------------------------------------------------------------ programs


class Program:
    """The C core and the driver, compiled for one machine."""

    def __init__(self, folder, compiler, *options, emulator=()):
        spec = importlib.util.spec_from_file_location("build_ext", ROOT / "build_ext.py")
        build_ext = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build_ext)
        self._cc = [compiler, *build_ext.FLAGS, "-Werror", "-I", str(CEXT), *options]
        self._emulator, self._folder = emulator, folder
        self._call(*self._cc, "-c", *CEXT.glob("*.c"), DRIVER)
        self._path = self._link(folder / "vectors", folder)

    def run(self, vectors, *emulator_options):
        return self._execute(self._path, vectors, *emulator_options)

    def run_mutant(self, vectors, source, old, new):
        """Replace some text of a kernel's file, compile it, run it."""
        text = (CEXT / source).read_text(encoding="utf-8")
        assert old in text, f"{source} no longer has {old!r}: choose another mutant"
        folder = self._folder / f"mutant of {source}"
        folder.mkdir(exist_ok=True)
        (folder / source).write_text(text.replace(old, new), encoding="utf-8")
        self._call(*self._cc, "-c", folder / source, "-o", folder / f"{source[:-2]}.o")
        return self._execute(self._link(folder / "vectors", folder), vectors)

    def _link(self, target, first):
        objects = {path.name: path for folder in (self._folder, first) for path in folder.glob("*.o")}
        self._call(*self._cc, *objects.values(), "-o", target)
        return target

    def _call(self, *command):
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def _execute(self, program, vectors, *options):
        command = [*self._emulator, *options, program, vectors]
        return subprocess.run(command, cwd=self._folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The program for this machine."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or os.name != "posix":
        pytest.skip("no C compiler for a POSIX system")
    return Program(tmp_path_factory.mktemp("native"), compiler)


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory):
    """The program for AArch64, on an emulator."""
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not (compiler and emulator and links(compiler)):
        pytest.skip(f"no AArch64 compiler, C library or emulator: apt-get install {PACKAGES}")
    return Program(tmp_path_factory.mktemp("aarch64"), compiler, "-static", emulator=(emulator,))


def links(compiler):
    """Tell whether the compiler has a C library to link with."""
    command = [compiler, "-static", "-x", "c", "-", "-o", os.devnull]
    return subprocess.run(command, input="int main(void) { return 0; }", text=True, capture_output=True).returncode == 0


# ------------------------------------------------------------------ tests


def test_the_driver_at_home(native, vectors):
    path, count = vectors
    done = native.run(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"checked {count} cases on scalar")


def test_the_driver_names_a_difference(native, vectors, tmp_path):
    """A wrong bit in the last expected sum: 65793 * 255 * 7, row 2, output 8."""
    path, count = vectors
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    (tmp_path / "wrong.bin").write_bytes(content)
    done = native.run(tmp_path / "wrong.bin")
    assert done.returncode == 1
    assert done.stdout == (
        f"scalar: case {count - 1}, element {2 * 12 + 8}, rows of 9 + 3: got 117440505, want 117440504\n"
    )


def test_the_driver_guards_the_result(native, vectors):
    """A kernel that stores one output too many has written between the rows."""
    done = native.run_mutant(vectors[0], "gemm_scalar.c", "j < t->columns", "j <= t->columns")
    assert (done.returncode, done.stdout[:8]) == (1, "scalar: "), done.stdout + done.stderr


def test_neondot(aarch64, vectors):
    path, count = vectors
    done = aarch64.run(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"checked {count} cases on scalar neondot\n"


def test_a_processor_without_the_instruction(aarch64, vectors):
    """The Cortex-A53 has no sdot: the table says so, and nothing stops."""
    path, count = vectors
    done = aarch64.run(path, "-cpu", "cortex-a53")
    assert (done.returncode, done.stdout) == (0, f"checked {count} cases on scalar\n"), done.stderr


MUTANTS = {
    "a stays unsigned": ("veor_u8(vld1_u8(a), vdup_n_u8(0x80))", "vld1_u8(a)"),
    "the row of zeros is not subtracted": ("vsubq_s32(acc[i][j], acc[rows][j])", "acc[i][j]"),
    "group 0 twice": ("a[i], 1)", "a[i], 0)"),
    "both halves of a panel are the first": ("first % RQ_PANEL * 4", "0"),
    "8 outputs are stored where there are 7": ("columns < OUTPUTS", "columns < OUTPUTS - 1"),
    "the low halves stay in the high ones": ("vandq_s8(both, vdupq_n_s8(-16))", "both"),
    "sums of 4 bits are shifted by 3": ("vshrq_n_s32(sum[j], 4)", "vshrq_n_s32(sum[j], 3)"),
    "segments lie together": ("s * t->segment_stride", "s * t->steps * RQ_STEP"),
    "one step too many": ("end = begin + t->steps * RQ_STEP", "end = begin + (t->steps + 1) * RQ_STEP"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found(aarch64, vectors, mutant):
    """A wrong kernel gives a wrong element, or reads where it may not."""
    done = aarch64.run_mutant(vectors[0], "gemm_neondot.c", *MUTANTS[mutant])
    assert done.stdout.startswith("neondot: ") or done.returncode == -signal.SIGSEGV, done.stdout + done.stderr
