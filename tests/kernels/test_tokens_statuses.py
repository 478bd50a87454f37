"""The C functions of a transformer, misused: a status, and nothing is read or written."""

import numpy as np
import pytest

from refquant.kernels import _ext

pytestmark = pytest.mark.skipif(_ext.lib is None, reason="the C core is not compiled")
lib, ffi = _ext.lib, _ext.ffi

if lib is not None:
    NULL, FLOATS, CODES = ffi.NULL, ffi.new("float[]", 64), ffi.new("uint8_t[]", 64)
    OK, SIZE, RANGE, NONE, KERNEL = lib.RQ_OK, lib.RQ_ERR_SIZE, lib.RQ_ERR_RANGE, lib.RQ_ERR_NULL, lib.RQ_ERR_KERNEL
    PARTS = ffi.new("struct rq_part[]", [(1.0, 0, 255), (1.0, 300, 255)])
    BIG = 1 << 62


def changed(values, at, value):
    return [*values[:at], value, *values[at + 1 :]]


def misuse(function, good, bad):
    """`good` arguments are fine; each (place, value, status) of `bad` is not."""
    call = getattr(lib, function)
    assert call(*good) == OK
    for at, value, status in bad:
        assert call(*changed(good, at, value)) == status, (function, at, value)
    assert call(*changed(good, 0, -1)) == call(*changed(good, 0, 99)) == KERNEL


def test_layer_norm():
    good = [0, 1, FLOATS, 1, 2, 8, FLOATS, FLOATS, 8, 1e-6, lib.RQ_UINT8, 1.0, 0, 255, CODES]
    misuse("rq_layer_norm", good, [
        (2, NULL, NONE), (6, NULL, NONE), (7, NULL, NONE), (14, NULL, NONE), (3, -1, SIZE), (4, BIG, SIZE),
        (5, -1, SIZE), (8, 7, SIZE), (8, BIG, SIZE), (9, 0.0, RANGE), (9, np.nan, RANGE), (10, 7, RANGE),
        (11, 0.0, RANGE),
        (12, 256, RANGE), (13, 0, RANGE),
    ])  # fmt: skip


def test_gated_add():
    out = ffi.new("float[]", 64)
    good = [0, 1, FLOATS, FLOATS, 8, FLOATS, 1, 2, 8, out]
    misuse("rq_gated_add", good, [
        (2, NULL, NONE), (3, NULL, NONE), (5, NULL, NONE), (9, NULL, NONE), (4, 7, SIZE), (6, -1, SIZE), (7, BIG, SIZE),
    ])  # fmt: skip


def test_gelu():
    good = [0, 1, FLOATS, 16, lib.RQ_UINT8, 1.0, 0, 255, CODES]
    misuse("rq_gelu", good, [
        (2, NULL, NONE), (8, NULL, NONE), (3, -1, SIZE), (3, BIG, SIZE), (4, lib.RQ_INT32, RANGE), (5, -1.0, RANGE),
        (6, -1, RANGE), (7, 256, RANGE),
    ])  # fmt: skip
    good = [0, 1, FLOATS, 2, 8, 1.0, 1.0, 127, CODES]
    misuse("rq_gelu_signs", good, [
        (2, NULL, NONE), (8, NULL, NONE), (3, -1, SIZE), (4, BIG, SIZE), (5, 0.0, RANGE), (6, np.nan, RANGE),
        (7, 0, RANGE), (7, 256, RANGE),
    ])  # fmt: skip


def test_quantize_parts():
    good = [0, 1, FLOATS, 2, 1, 8, PARTS, CODES]
    misuse("rq_quantize_parts", good, [
        (2, NULL, NONE), (6, NULL, NONE), (7, NULL, NONE), (3, -1, SIZE), (4, 0, SIZE), (4, 65, SIZE), (5, BIG, SIZE),
        (4, 2, RANGE),
    ])  # fmt: skip


def test_softmax_regions():
    good = [0, 1, FLOATS, 1.0, 2, 8, 8, 3, CODES]
    misuse("rq_softmax_regions", good, [
        (2, NULL, NONE), (8, NULL, NONE), (4, -1, SIZE), (5, BIG, SIZE), (3, 0.0, RANGE), (6, 2, RANGE), (6, 9, RANGE),
        (7, 8, RANGE), (7, -1, RANGE),
    ])  # fmt: skip


def problem(**given):
    matrices = {"data": CODES, "image_stride": 16, "head_stride": 16, "row_stride": 4, "zero_point": 0}
    a, b = ({**matrices, **given.pop(name, {})} for name in "ab")
    sizes = {"images": 1, "heads": 1, "m": 4, "n": 4, "k": 4, "scale": 1.0, "y": ffi.new("float[]", 16)}
    strides = {"y_image_stride": 16, "y_head_stride": 16, "y_row_stride": 4}
    fields = {**sizes, **strides, "a": a, "b": b, **given}
    return fields["y"], ffi.new("struct rq_products *", fields)


def test_products():
    kept, good = problem()
    misuse("rq_products", [0, 1, good], [(2, NULL, NONE)])
    for given, status in (
        ({"m": -1}, SIZE), ({"n": BIG}, SIZE), ({"images": BIG}, SIZE), ({"a": {"row_stride": 3}}, SIZE),
        ({"b": {"row_stride": 3}}, SIZE), ({"b": {"head_stride": -1}}, SIZE), ({"a": {"image_stride": BIG}}, SIZE),
        ({"y_row_stride": 3}, SIZE), ({"y_head_stride": -1}, SIZE), ({"a": {"zero_point": 256}}, RANGE),
        ({"b": {"zero_point": -1}}, RANGE), ({"region_bits": 1}, RANGE), ({"region_bits": 9}, RANGE),
        ({"region_bits": 8, "region_shift": 8}, RANGE), ({"region_bits": 8, "a": {"zero_point": 1}}, RANGE),
        ({"k": lib.RQ_MAX_K + 1, "a": {"row_stride": 1 << 20}}, RANGE), ({"y": NULL}, NONE),
        ({"a": {"data": NULL}}, NONE), ({"b": {"data": NULL}}, NONE),
        ({"images": 0, "y": NULL}, OK), ({"k": 0, "a": {"data": NULL}}, OK),
    ):  # fmt: skip
        kept, bad = problem(**given)
        assert lib.rq_products(0, 1, bad) == status, given
    assert kept is not None
