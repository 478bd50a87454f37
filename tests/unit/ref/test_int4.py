"""Packing two 4-bit codes in a byte loses nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from refquant.errors import RangeError, ShapeError
from refquant.ref.int4 import pack_int4, unpack_int4


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9), elements={"max_value": 15})
)
def test_round_trip(codes):
    """unpack(pack(q)) = q, and K codes take ceil(K/2) bytes."""
    packed = pack_int4(codes)
    assert packed.shape == (*codes.shape[:-1], (codes.shape[-1] + 1) // 2)
    np.testing.assert_array_equal(unpack_int4(packed, codes.shape[-1]), codes)


def test_order_of_the_halves():
    """Code 2i is the low half of byte i."""
    assert pack_int4(np.array([[1, 2], [15, 0]], np.uint8)).tolist() == [[0x21], [0x0F]]


def test_errors():
    with pytest.raises(RangeError, match="16"):
        pack_int4(np.array([16], np.uint8))
    with pytest.raises(ShapeError, match="int8"):
        pack_int4(np.array([1], np.int8))
    with pytest.raises(ShapeError, match="5 codes"):
        unpack_int4(np.zeros(2, np.uint8), 5)
