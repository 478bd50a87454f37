"""The procedural data set: exact by seed, independent of n, and really those shapes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refquant.data.shapes import CLASSES, shapes
from refquant.errors import RangeError


@given(st.integers(1, 600), st.integers(0, 2**32), st.integers(8, 33))
def test_a_shorter_set_is_the_beginning_of_a_longer_one(n, seed, size):
    long, short = shapes(600, seed, size), shapes(n, seed, size)
    assert short.images.shape == (n, 1, size, size)
    np.testing.assert_array_equal(short.images, long.images[:n])
    np.testing.assert_array_equal(short.labels, long.labels[:n])


def test_the_bits_are_the_same_everywhere():
    """Made with NumPy 2.4; only exactly rounded operations are used, so that no machine may differ."""
    data = shapes(500, seed=3)
    digest = hashlib.sha256(data.images.tobytes() + data.labels.astype("<i8").tobytes()).hexdigest()
    assert digest == "d13f1de0baed0cc503862eb5f5053734b251ccb7ff99902886136582102c7299"


def test_seeds_differ_and_classes_are_balanced():
    data = shapes(10_000, seed=0)
    assert not np.array_equal(data.images[:10], shapes(10, seed=1).images)
    counts = np.bincount(data.labels, minlength=len(CLASSES))
    assert np.all(np.abs(counts - 2000) < 5 * 40)  # binomial: standard deviation 40


@pytest.mark.parametrize("size", [8, 28, 64])
def test_shapes_are_grey_on_black_inside_of_the_image(size):
    images = shapes(500, seed=4, size=size).images[:, 0]
    grey = 128 + 127 * np.random.default_rng(4).random((500, 5))[:, 4]
    brightest = images.max(axis=(1, 2))
    assert (brightest <= grey + 0.5).all()
    assert (brightest > grey * (0.5 if size == 8 else 0.99)).all()  # at 8, a ring is thinner than a pixel
    # Shapes keep half a pixel of distance to the image's edge, so cover at most half of a border pixel.
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    assert (border.max(axis=1) <= grey / 2 + 0.5).all()


def test_area_is_that_of_the_shape():
    """Sum of the covered shares = area of the shape, whose formula knows nothing of distances."""
    size, n = 64, 400
    u = np.random.default_rng(5).random((n, 5))
    r = size * (0.2 + 0.2 * u[:, 1])
    grey = 128 + 127 * u[:, 4]
    data = shapes(n, seed=5, size=size)
    area = data.images.sum(axis=(1, 2, 3)) / grey
    per_r2 = {
        "disc": np.pi,
        "square": 4 * 0.7**2,
        "triangle": 3 * np.sqrt(3) / 4,
        "ring": np.pi * (1 - 0.5**2),
        "cross": 4 * 0.6 - 0.6**2,
    }
    expected = np.array([per_r2[CLASSES[k]] for k in data.labels]) * r**2
    # The rule is exact for straight edges along the grid and in the mean for others; corners cost the rest.
    np.testing.assert_allclose(area, expected, rtol=0.02)


@pytest.mark.parametrize(("n", "seed", "size"), [(0, 0, 28), (-1, 0, 28), (1, -1, 28), (1, 0, 7)])
def test_impossible_requests_are_refused(n, seed, size):
    with pytest.raises(RangeError, match="allowed is"):
        shapes(n, seed, size)
