"""The container, the map between bytes and floats, and `load`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refquant import data
from refquant.data import Dataset, to_float, to_uint8
from refquant.errors import RangeError, ShapeError, UnknownNameError

REPOSITORY = Path(__file__).parents[3]
MNIST_ROOT = Path(os.environ.get("REFQUANT_DATA") or REPOSITORY.parent / "shared" / "data")

ALL_BYTES = np.arange(256, dtype=np.uint8)


def test_round_trip_is_exact_on_all_256_values():
    x = to_float(ALL_BYTES.reshape(1, 1, 16, 16))
    assert x.dtype == np.float32 and x.shape == (1, 1, 16, 16)
    assert x.min() == -1 and x.max() == 1
    np.testing.assert_array_equal(to_uint8(x).ravel(), ALL_BYTES)


def test_to_float_is_odd_around_the_middle_of_the_range():
    x = to_float(ALL_BYTES)  # v and 255 - v are mirror images, to one rounding of v / 127.5 (at most 2**-24)
    np.testing.assert_allclose(x, -x[::-1], rtol=0, atol=2**-23)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_to_uint8_breaks_ties_to_even_and_clips(dtype):
    x = np.array(
        [-np.inf, -1.5, -1, 0, 1, 1.5, np.inf], dtype
    )  # 0 lies at 127.5, whose even neighbour is 128
    np.testing.assert_array_equal(to_uint8(x), [0, 0, 0, 128, 255, 255, 255])


def test_to_uint8_ties_are_those_of_the_real_numbers():
    ties = (np.arange(0, 255, dtype=np.float64) + 0.5) / 127.5 - 1
    exact = ties[(ties + 1) * 127.5 % 1 == 0.5]
    assert len(exact) > 50
    np.testing.assert_array_equal(to_uint8(exact) % 2, 0)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=8))
def test_to_uint8_picks_the_nearest_of_the_256_values(values):
    x = np.array(values, np.float32)
    grid = ALL_BYTES / 127.5 - 1
    picked = np.abs(grid[to_uint8(x)] - x.astype(np.float64))
    best = np.abs(grid[:, None] - x.astype(np.float64)).min(axis=0)
    np.testing.assert_allclose(picked, best, rtol=0, atol=1e-15)  # float64 rounding of the two distances


def test_wrong_values_are_refused():
    with pytest.raises(ShapeError, match="float32; allowed is uint8"):
        to_float(np.zeros(3, np.float32))
    with pytest.raises(ShapeError, match="uint8; allowed is a float"):
        to_uint8(ALL_BYTES)
    with pytest.raises(RangeError, match="1 of 2 values are NaN"):
        to_uint8(np.array([0.0, np.nan]))


def test_dataset_is_read_only_and_leaves_the_callers_arrays_writable():
    images, labels = np.zeros((2, 1, 3, 3), np.uint8), np.zeros(2, np.int64)
    dataset = Dataset("ours", images, labels)
    assert len(dataset) == 2
    for array in (dataset.images, dataset.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(FrozenInstanceError):
        dataset.name = "theirs"
    images[0] = 1


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            np.zeros((2, 3, 3), np.uint8),
            np.zeros(2, np.int64),
            r"\(2, 3, 3\); allowed is uint8 \(N, C, H, W\)",
        ),
        (np.zeros((2, 1, 3, 3), np.float32), np.zeros(2, np.int64), "images are float32"),
        (np.zeros((2, 1, 3, 3), np.uint8), np.zeros(3, np.int64), r"labels are int64 \(3,\)"),
        (np.zeros((2, 1, 3, 3), np.uint8), np.zeros(2, np.uint8), "labels are uint8"),
    ],
)
def test_dataset_refuses_other_shapes_and_types(images, labels, message):
    with pytest.raises(ShapeError, match=message):
        Dataset("ours", images, labels)


def test_names_and_unknown_names():
    assert data.names() == ("mnist", "fashion-mnist", "cifar10", "shapes")
    with pytest.raises(UnknownNameError, match="'minst'; allowed are mnist, fashion-mnist, cifar10, shapes"):
        data.load("minst")
    with pytest.raises(UnknownNameError, match="'validation'; allowed are train, test"):
        data.load("shapes", "validation")


def test_load_shapes_needs_no_file(monkeypatch):
    monkeypatch.setenv("REFQUANT_DATA", "no such folder")
    train, test = data.load("shapes"), data.load("shapes", "test")
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    assert not np.array_equal(train.images[:10_000], test.images)


@pytest.mark.skipif(not (MNIST_ROOT / "mnist").is_dir(), reason=f"no MNIST in {MNIST_ROOT}")
def test_load_the_real_mnist():
    for split, counts in (  # how many of each digit, as published
        ("train", [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        ("test", [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
    ):
        mnist = data.load("mnist", split, root=MNIST_ROOT, download=False)
        assert mnist.images.shape == (sum(counts), 1, 28, 28)
        np.testing.assert_array_equal(np.bincount(mnist.labels), counts)
    # The test set was loaded last. Its first digit is a 7: ink in the upper bar, none at the lower left.
    assert mnist.labels[0] == 7
    assert mnist.images[0, 0, 7:10].max() > 200 and mnist.images[0, 0, 20:, :8].max() == 0


def test_import_touches_no_network():
    code = (
        "import sys\n"
        "def hook(event, args):\n"
        "    assert not event.startswith(('socket.connect', 'socket.getaddrinfo', 'urllib.Request')), event\n"
        "sys.addaudithook(hook)\n"
        "import refquant.data\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
