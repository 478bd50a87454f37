"""The door in C: what Python never sends is refused with the status of refquant.h, and not one byte is written."""

import pytest

from refquant import kernels, ref
from refquant.kernels import _ext

pytestmark = pytest.mark.skipif(_ext.lib is None, reason="the C core is not compiled")
ffi, lib = _ext.ffi, _ext.lib
NULL = None if ffi is None else ffi.NULL
BEYOND = 2**63 - 1

GARBAGE = -7
GUARD = 5  # elements behind the result


def packed_weights(memory, outputs=3, kh=2, kw=2, c=2, bits=8):
    """struct rq_weights of ones; everything it points to is appended to `memory`, which keeps it alive."""
    space = ffi.new("char[]", lib.rq_packed_bytes(outputs, kh, kw, c, bits) + 64)
    panels = space + -int(ffi.cast("intptr_t", space)) % 64
    sums = ffi.new("int32_t[]", (kh + 1) * (kw + 1) * outputs)
    codes = ffi.new("int8_t[]", [1] * (outputs * kh * kw * c))
    assert lib.rq_pack(codes, outputs, kh, kw, c, bits, panels, sums) == lib.RQ_OK
    memory += [space, sums]
    return ffi.new("struct rq_weights *", (outputs, kh, kw, c, bits, panels, sums, NULL))


class Convolution:
    """A good call, x (1, 3, 4, 2) of 2s with zero point 1, w (3, 2, 2, 2) of 1s, y (1, 2, 3, 3), to be spoilt."""

    def __init__(self, kind=0):
        self.memory = [ffi.new("uint8_t[]", [2] * 24), ffi.new("int32_t[]", [GARBAGE] * (18 + GUARD))]
        vectors = [ffi.new("float[]", [1] * 3), ffi.new("int32_t[]", [2**30] * 3), ffi.new("int32_t[]", [30] * 3)]
        self.memory += vectors
        scale, mantissa, shift = vectors
        self.row, self.threads, self.stride, self.padding = 0, 1, 1, 0
        self.x = ffi.new("struct rq_input *", (self.memory[0], 1, 3, 4, 2, 24, 8, 1))
        self.w = packed_weights(self.memory)
        self.y = ffi.new("struct rq_output *", {"kind": kind, "data": self.memory[1], "ld": 3, "scale": scale})
        self.y.mantissa, self.y.shift, self.y.qmax = mantissa, shift, 255

    def change(self, changes):
        """Set fields, named as in C: {"x.h": -1}."""
        for path, value in changes.items():
            *struct, field = path.split(".")
            setattr(getattr(self, struct[0]) if struct else self, field, value)

    def __call__(self):
        return lib.rq_conv2d(self.row, self.threads, self.x, self.w, self.stride, self.padding, self.y)

    @property
    def written(self):
        """The output's memory as int32."""
        return list(self.memory[1])


GOOD = [8] * 18 + [GARBAGE] * GUARD  # 2 * 2 * 2 products of 2 - 1 and 1


@pytest.mark.parametrize("name", kernels.available()[1:])
def test_good(name):
    call = Convolution()
    call.row = _ext.ROWS[name]
    if name in kernels.supported():
        assert (call(), call.written) == (lib.RQ_OK, GOOD)
    else:
        assert (call(), call.written) == (lib.RQ_ERR_KERNEL, [GARBAGE] * (18 + GUARD))


def test_only_the_outputs_of_a_row_are_written():
    """ld = 4 leaves every fourth element alone, and what is behind the last row."""
    call = Convolution()
    call.y.ld = 4
    assert call() == lib.RQ_OK
    assert call.written == [8, 8, 8, GARBAGE] * 5 + [8, 8, 8]


@pytest.mark.parametrize("threads", [-1, 0, 1, 2**31 - 1])
def test_any_number_of_threads(threads):
    call = Convolution()
    call.threads = threads
    assert (call(), call.written) == (lib.RQ_OK, GOOD)


REFUSED = {
    "RQ_ERR_KERNEL": [{"row": -1}, {"row": 1000}, {"row": -(2**31)}],
    "RQ_ERR_NULL": [
        *({name: NULL} for name in ("x", "w", "y", "x.data", "w.panels", "w.sums", "y.data")),
        {"y.kind": 1, "y.scale": NULL},
        {"y.kind": 2, "y.mantissa": NULL},
        {"y.kind": 2, "y.shift": NULL},
    ],
    "RQ_ERR_SIZE": [
        *({name: value} for name in ("x.n", "x.h", "x.w", "x.c") for value in (-1, -(2**63), BEYOND)),
        *({name: value} for name in ("w.outputs", "w.c") for value in (-1, -(2**63))),
        *({name: value} for name in ("w.kh", "w.kw") for value in (0, -1, -(2**63))),
        {"w.outputs": BEYOND},
        {"x.c": 3},
        {"x.h": 1},
        {"x.w": 1},
        {"x.h": 0},
        {"w.kh": 4},
        {"w.kw": 5},
        *({"stride": value} for value in (0, -1, -(2**63))),
        *({"padding": value} for value in (-1, -(2**63), BEYOND)),
        *({"x.line_stride": value} for value in (7, 0, -8, -(2**63))),
        *({"x.image_stride": value} for value in (23, 0, -24, -(2**63))),
        {"x.line_stride": 9},  # three lines of it are more than the image stride says
        *({"y.ld": value} for value in (2, 0, -3, -(2**63))),
        {"y.kind": 1, "residual": 2},
    ],
    "RQ_ERR_RANGE": [
        *({"x.zero_point": value} for value in (-1, 256, -(2**31))),
        *({"w.bits": value} for value in (5, 0, -8, 16)),
        {"x.c": 131072, "w.c": 131072},
        {"x.c": BEYOND, "w.c": BEYOND},
        {"w.kh": 131072},
        {"w.kw": BEYOND},
        {"w.kh": 400, "w.kw": 400},
        *({"y.kind": value} for value in (-1, 3)),
        *({"y.kind": 2, "y.zero_point": value} for value in (-1, 256, -(2**31))),
        {"y.kind": 2, "y.qmin": -1},
        {"y.kind": 2, "y.qmax": 256},
        {"y.kind": 2, "y.qmin": 9, "y.qmax": 8},
        {"y.kind": 2, "shift": 63},
        {"y.kind": 2, "shift": -1},
    ],
}


@pytest.mark.parametrize(("code", "changes"), [(code, changes) for code in REFUSED for changes in REFUSED[code]])
def test_refused(code, changes):
    call, rest = Convolution(), dict(changes)
    if "residual" in rest:  # a good pointer, a bad distance between rows
        call.y.residual, call.y.residual_ld = call.y.scale, rest.pop("residual")
    if "shift" in rest:
        call.memory[4][2] = rest.pop("shift")
    call.change(rest)
    assert (call(), call.written) == (getattr(lib, code), [GARBAGE] * (18 + GUARD))


@pytest.mark.parametrize(
    "changes", [{"x.n": 0}, {"x.n": 0, "x.data": NULL}, {"w.outputs": 0}, {"x.n": 0, "y.data": NULL, "w.panels": NULL}]
)
def test_nothing_to_do(changes):
    """No images or no outputs: fine, and nothing is written; pointers do not matter."""
    call = Convolution()
    call.change(changes)
    assert (call(), call.written) == (lib.RQ_OK, [GARBAGE] * (18 + GUARD))


def test_a_sum_of_nothing():
    """No channels: K = 0, and the bias is the result; there is nothing to point to."""
    call = Convolution()
    call.w = packed_weights(call.memory, c=0)
    call.memory.append(ffi.new("int32_t[]", [5, 6, 7]))
    call.change({"x.c": 0, "x.data": NULL, "w.panels": NULL, "y.int_bias": call.memory[-1]})
    assert (call(), call.written) == (lib.RQ_OK, [5, 6, 7] * 6 + [GARBAGE] * GUARD)


SHAPE = (3, 2, 2, 2, 8)  # of `packed_weights`, and bits
NO_SHAPE = [
    ((-1, 2, 2, 2, 8), "RQ_ERR_SIZE"),
    ((2**31, 2, 2, 2, 8), "RQ_ERR_SIZE"),
    ((3, 0, 2, 2, 8), "RQ_ERR_SIZE"),
    ((3, 2, -1, 2, 8), "RQ_ERR_SIZE"),
    ((3, 2, 2, -1, 8), "RQ_ERR_SIZE"),
    ((3, 2, 2, 2, 5), "RQ_ERR_RANGE"),
    ((3, 2, 2, 2, 0), "RQ_ERR_RANGE"),
    ((1, 1, 1, 131072, 8), "RQ_ERR_RANGE"),
    ((1, 1, 1, 65794, 4), "RQ_ERR_RANGE"),
    ((1, 2**40, 2**40, 1, 8), "RQ_ERR_RANGE"),
    ((1, BEYOND, BEYOND, BEYOND, 8), "RQ_ERR_RANGE"),
]


@pytest.mark.parametrize(("shape", "code"), NO_SHAPE)
def test_weights_that_cannot_be_packed(shape, code):
    panels, sums, codes = ffi.new("int8_t[]", [GARBAGE] * 64), ffi.new("int32_t[]", [GARBAGE] * 3), ffi.new("int8_t[8]")
    assert lib.rq_packed_bytes(*shape) == getattr(lib, code)
    assert lib.rq_pack(codes, *shape, panels, sums) == getattr(lib, code)
    assert list(panels) == [GARBAGE] * 64 and list(sums) == [GARBAGE] * 3


@pytest.mark.parametrize("missing", ["codes", "panels", "sums"])
def test_packing_from_and_to_nowhere(missing):
    size = lib.rq_packed_bytes(*SHAPE)
    assert size == 2 * 1 * 8 * 16  # kh segments of one step of 8 for one panel of 16
    memory = {
        "codes": ffi.new("int8_t[]", 24),
        "panels": ffi.new("int8_t[]", [GARBAGE] * size),
        "sums": ffi.new("int32_t[]", [GARBAGE] * 27),
    }
    given = memory | {missing: NULL}
    assert lib.rq_pack(given["codes"], *SHAPE, given["panels"], given["sums"]) == lib.RQ_ERR_NULL
    assert list(memory["panels"]) == [GARBAGE] * size and list(memory["sums"]) == [GARBAGE] * 27


def test_a_code_that_4_bits_do_not_hold():
    """rq_pack refuses it: cut to 4 bits it would be another code, and its sum a third one."""
    for code in (8, -9, 127):
        codes, panels, sums = ffi.new("int8_t[]", [code]), ffi.new("int8_t[]", 64), ffi.new("int32_t[]", 4)
        assert lib.rq_pack(codes, 1, 1, 1, 1, 4, panels, sums) == lib.RQ_ERR_RANGE


def test_the_peak_is_measured_on_rows_of_this_processor():
    """rq_peak counts the multiplications it did; a row it cannot run is a status."""
    for name, row in _ext.ROWS.items():
        got = lib.rq_peak(row, 1)
        assert got >= 0 if name in kernels.supported() else got == lib.RQ_ERR_KERNEL
    assert lib.rq_peak(-1, 1) == lib.rq_peak(1000, 1) == lib.RQ_ERR_KERNEL


def test_bounds_are_those_of_the_reference():
    assert lib.RQ_MAX_K_INT4 == ref.MAX_K
    assert lib.RQ_MAX_K == ref.max_k(128)
