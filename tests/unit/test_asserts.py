"""The helper that judges the others is judged here."""

import numpy as np
import pytest
from asserts import assert_same_integers


def test_equal_values_of_different_width_pass():
    assert_same_integers(np.array([1, 2], np.uint8), np.array([1, 2], np.int64))


def test_empty_arrays_pass():
    assert_same_integers(np.zeros((0, 3), np.int8), np.zeros((0, 3), np.int8))


def test_message_names_index_values_and_inputs_there():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    got, want = np.arange(6).reshape(2, 3), np.array([[0, 1, 2], [3, 9, 9]])
    with pytest.raises(AssertionError) as caught:
        assert_same_integers(got, want, x=x, scale=np.float32(0.5), table=np.zeros(7))
    message = str(caught.value)
    assert "2 of 6 integers differ, first at index (1, 1)" in message
    assert "got  = 4" in message
    assert "want = 9" in message
    assert "x = np.float32(4.0)" in message or "x = 4.0" in message  # NumPy 2, NumPy 1
    assert "scale = " in message
    assert "table: shape (7,), float64" in message


def test_shapes_are_compared_not_broadcast():
    with pytest.raises(AssertionError, match=r"shape: got \(1,\), want \(2,\)"):
        assert_same_integers([3], [3, 3])


@pytest.mark.parametrize(("got", "want"), [([1.0], [1]), ([1], [1.0])])
def test_floats_are_no_integers(got, want):
    with pytest.raises(AssertionError, match="not an integer array"):
        assert_same_integers(got, want)
