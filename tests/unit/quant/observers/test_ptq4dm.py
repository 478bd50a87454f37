"""PTQ4DM's searches by hand."""

import numpy as np
import pytest

from refquant.errors import RangeError
from refquant.quant.affine import QSpec
from refquant.quant.observers import ptq4dm

FOUR = QSpec(bits=4)


@pytest.mark.parametrize(
    ("x", "symmetric", "scale", "zero_point"),
    [
        (np.arange(16.0), True, 1.0, 0),  # one sign: [0, 15] has no error at all
        (-np.arange(16.0), True, 1.0, 15),
        (np.arange(-5.0, 11.0), False, 1.0, 5),  # 2-D finds the zero point
        (np.zeros(3), True, 1e-8, 0),
        (np.zeros(3), False, 1e-8, 0),
        (np.full(3, 7.5), False, 0.5, 0),
    ],
)
def test_by_hand(x, symmetric, scale, zero_point):
    q = ptq4dm.search(x, FOUR, symmetric=symmetric)
    np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
    assert q.zero_point == zero_point
    signed = ptq4dm.search(x, QSpec(bits=4, signed=True), symmetric=symmetric)
    assert (signed.scale, signed.zero_point) == (q.scale, zero_point - 8)


def test_symmetric_ranges_keep_a_zero_point():
    x = np.linspace(-3, 3, 50)
    lo, hi = ptq4dm.search_range(x, FOUR)
    assert lo == -hi and hi <= 3
    assert ptq4dm.search(x, FOUR).zero_point in (7, 8)  # the tie 7.5, on codes 0 .. 15
    with pytest.raises(RangeError, match="have a zero point"):
        ptq4dm.search(x, QSpec(bits=4, symmetric=True))


def test_the_sign_is_that_of_the_tensor_not_of_its_channels():
    x = np.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    lo, hi = ptq4dm.search_range(x, QSpec(bits=4, axis=0))
    np.testing.assert_array_equal(lo, -hi)
    assert (ptq4dm.one_side(x), ptq4dm.one_side(x[0]), ptq4dm.one_side(x[1])) == ("no", "pos", "neg")


def test_blocks_do_not_change_the_search(monkeypatch):
    x = np.random.default_rng(0).standard_t(3, 500)
    whole = ptq4dm.search(x, FOUR, symmetric=False)
    monkeypatch.setattr(ptq4dm, "BLOCK", 1)
    cut = ptq4dm.search(x, FOUR, symmetric=False)
    assert (cut.scale, cut.zero_point) == (whole.scale, whole.zero_point)


@pytest.mark.parametrize(("lo", "hi"), [(1.0, 0.0), (np.nan, 1.0), (0.0, np.inf)])
def test_from_search_range_refuses(lo, hi):
    with pytest.raises(RangeError, match="two finite ends"):
        ptq4dm.from_search_range(lo, hi, FOUR)
