"""Pictures: which pixel goes where, the same bytes every time, and figures that say what they show."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from refquant import viz
from refquant.errors import RangeError, RefquantError, ShapeError

values = st.floats(-1.5, 1.5, width=32)


@st.composite
def batches(draw: st.DrawFn) -> np.ndarray:
    n, c, h, w = (draw(s) for s in (st.integers(1, 7), st.sampled_from([1, 3]), *[st.integers(1, 4)] * 2))
    return draw(hnp.arrays(np.float32, (n, c, h, w), elements=values))


def pictures(n: int = 4, c: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (n, c, 8, 8)).astype(np.float32)


# --- grids --------------------------------------------------------------------------------------------


@given(batches(), st.integers(1, 8), st.integers(0, 3), st.integers(1, 3))
def test_every_pixel_of_a_grid(images, columns, pad, scale):
    """Undo the tiling by its definition: each tile is its image, and all the rest is white."""
    n, _, h, w = images.shape
    grid = viz.image_grid(images, columns, pad, scale)
    rows = -(-n // columns)
    assert grid.dtype == np.uint8
    assert grid.shape == (rows * (h * scale + pad) + pad, columns * (w * scale + pad) + pad, 3)
    rest = np.ones(grid.shape, dtype=bool)
    for i in range(n):
        top, left = pad + i // columns * (h * scale + pad), pad + i % columns * (w * scale + pad)
        tile = np.s_[top : top + h * scale, left : left + w * scale]
        rest[tile] = False
        for dy in range(scale):
            for dx in range(scale):
                got = grid[tile][dy::scale, dx::scale]
                np.testing.assert_array_equal(got, viz.image_grid(images[i : i + 1], 1, 0))
    assert (grid[rest] == 255).all()


@given(hnp.arrays(np.float32, (1, 1, 1, 8), elements=values))
def test_codes_are_exact_rationals_rounded_to_even(images):
    got = viz.image_grid(images, 1, 0)
    for x, code in zip(images.ravel(), got[0], strict=True):
        exact = (min(max(Fraction(float(x)), Fraction(-1)), Fraction(1)) + 1) * Fraction(255, 2)
        # the float64 product is one rounding away from the exact one, so only near ties may differ
        if abs(exact - round(exact)) < Fraction(1, 2) - Fraction(1, 10**12) or x == 0:
            assert (code == round(exact)).all()


def test_ends_middle_and_channels():
    grey = viz.image_grid(np.array([-9.0, -1, 0, 1, 9]).reshape(1, 1, 1, 5), 1, 0)
    np.testing.assert_array_equal(grey[0], np.repeat([0, 0, 128, 255, 255], 3).reshape(5, 3))  # 127.5 to even
    colour = viz.image_grid(np.array([-1.0, 0, 1]).reshape(1, 3, 1, 1), 1, 0)
    assert colour.ravel().tolist() == [0, 128, 255]


@pytest.mark.parametrize(("n", "shape"), [(1, (1, 1)), (3, (2, 2)), (4, (2, 2)), (5, (2, 3)), (10, (3, 4))])
def test_default_grid_is_nearly_square(n, shape):
    assert viz.image_grid(np.zeros((n, 1, 1, 1)), pad=0).shape[:2] == shape


@pytest.mark.parametrize("function", [viz.image_grid, lambda x: viz.labelled_rows([("a", x)]),
                                      lambda x: viz.difference_images(x, x)])  # fmt: skip
def test_what_is_no_batch_of_images(function):
    for images in (
        np.float32(1),
        np.zeros((8, 8)),
        np.zeros((0, 1, 8, 8)),
        np.zeros((1, 2, 8, 8)),
        np.zeros((1, 1, 0, 8)),
    ):
        with pytest.raises(ShapeError, match="wanted floats"):
            function(images)
    with pytest.raises(ShapeError, match="uint8"):
        function(np.zeros((1, 1, 8, 8), np.uint8))
    for bad in (np.nan, np.inf):
        with pytest.raises(RangeError, match="NaN or infinity"):
            function(np.full((1, 1, 8, 8), bad))


def test_grid_options_out_of_range():
    for options in ({"columns": 0}, {"pad": -1}, {"scale": 0}):
        with pytest.raises(RangeError, match="columns from 1, pad from 0, scale from 1"):
            viz.image_grid(pictures(), **options)


# --- differences --------------------------------------------------------------------------------------


def test_difference_colours():
    x = np.zeros((1, 1, 1, 4))
    y = np.array([0.0, 0.25, -0.25, 2.0]).reshape(1, 1, 1, 4)
    equal, brighter, darker, much = viz.image_grid(viz.difference_images(y, x, gain=4), 1, 0)[0].astype(int)
    assert equal.tolist() == [255, 255, 255]
    assert brighter[0] > brighter[1] and brighter[0] > brighter[2]
    assert darker[2] > darker[0]
    assert much.tolist() == [178, 27, 43]  # clipped to the full colour


@given(batches(), st.floats(0.1, 100))
def test_differences_are_pictures(images, gain):
    got = viz.difference_images(images, images[::-1], gain)
    assert got.shape == (len(images), 3, *images.shape[2:])
    assert (np.abs(got) <= 1).all()
    assert (viz.difference_images(images, images, gain) == 1).all()


def test_difference_errors():
    with pytest.raises(ShapeError, match="the same twice"):
        viz.difference_images(pictures(3), pictures(4))
    for gain in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(RangeError, match="gain"):
            viz.difference_images(pictures(), pictures(), gain)


# --- labelled rows ------------------------------------------------------------------------------------


def test_rows_hold_their_images_and_labels():
    """Each row's grid is in the picture, below the one before; left of it is ink, all borders are white."""
    a, b = pictures(4), -pictures(4)
    picture = viz.labelled_rows([("float32", a), ("W4A8 nearest\nPSNR 20 dB", b)], scale=2)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    corners = []
    for images in (a, b):
        grid = viz.image_grid(images, 4, 4, 2)
        h, w = grid.shape[:2]
        found = [
            (y, x)
            for y in range(picture.shape[0] - h + 1)
            for x in range(picture.shape[1] - w + 1)
            if (picture[y + 4, x + 4 : x + w] == grid[4, 4:]).all()
            and (picture[y : y + h, x : x + w] == grid).all()
        ]
        assert len(found) == 1
        corners += found
        (y, x) = found[0]
        assert (picture[y : y + h, :x] < 128).any()
    assert corners[0][1] == corners[1][1] and corners[0][0] < corners[1][0]
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all()


def test_rows_wrap_mix_channels_and_repeat():
    grey, colour = pictures(4), pictures(4, 3)
    rows = [("grey", grey), ("colour", colour), ("difference", viz.difference_images(grey, -grey))]
    long, short = viz.labelled_rows(rows), viz.labelled_rows(rows, columns=2)
    assert short.shape[0] > long.shape[0] and short.shape[1] < long.shape[1]
    np.testing.assert_array_equal(viz.labelled_rows(rows), long)


def test_a_longer_label_makes_room_for_itself():
    short, long = (viz.labelled_rows([(label, pictures())]) for label in ("W8", "W8A8 reconstructed"))
    np.testing.assert_array_equal(short[:, -80:], long[:, -80:])
    assert long.shape[1] > short.shape[1]


def test_row_errors():
    with pytest.raises(ShapeError, match="no rows"):
        viz.labelled_rows([])
    with pytest.raises(ShapeError, match=r"\(4, 4\), \(8, 8\)"):
        viz.labelled_rows([("a", pictures()), ("b", np.zeros((4, 1, 4, 4)))])


# --- PNG files ----------------------------------------------------------------------------------------

keys = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=79)


@given(st.dictionaries(keys, st.text(st.characters(exclude_characters="\0", codec="utf-8")), max_size=4))
def test_png_round_trip(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "round.png"
    grid = viz.image_grid(pictures())
    viz.save_png(path, grid, text)
    assert viz.read_png_text(path) == text
    first = path.read_bytes()
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture), grid)
    viz.save_png(path, grid, dict(reversed(text.items())))
    assert path.read_bytes() == first


def test_png_values_and_grey(tmp_path):
    viz.save_png(tmp_path / "g.png", np.eye(5, dtype=np.uint8), {"seed": 42, "eta": 0.5})
    assert viz.read_png_text(tmp_path / "g.png") == {"seed": "42", "eta": "0.5"}


def test_png_errors(tmp_path):
    grid = viz.image_grid(pictures())
    for array in (grid.astype(float), grid[..., :2], grid[:0], grid[0, 0], grid[None]):
        with pytest.raises(ShapeError, match="wanted uint8"):
            viz.save_png(tmp_path / "a.png", array, {})
    for key in ("", "x" * 80, "α", " a", "a\n"):
        with pytest.raises(RangeError, match="cannot be a key"):
            viz.save_png(tmp_path / "a.png", grid, {key: 1})
    with pytest.raises(RefquantError, match="Make the folder first"):
        viz.save_png(tmp_path / "no" / "a.png", grid, {})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    viz.save_png(path, viz.image_grid(pictures()), {"seed": 1})

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RefquantError, match="Free some space"):
        viz.save_png(path, viz.image_grid(pictures()), {"seed": 2})
    assert viz.read_png_text(path) == {"seed": "1"} and list(tmp_path.iterdir()) == [path]


def test_reading_what_is_no_png(tmp_path):
    with pytest.raises(RefquantError, match="no such file"):
        viz.read_png_text(tmp_path / "nothing.png")
    path = tmp_path / "a.png"
    viz.save_png(path, viz.image_grid(pictures()), {"seed": 1})
    good = path.read_bytes()
    for bad in (b"", b"GIF89a" + good, good[:20], good[:60], good[:-40]):
        path.write_bytes(bad)
        with pytest.raises(RefquantError, match="no PNG picture"):
            viz.read_png_text(path)


# --- plots --------------------------------------------------------------------------------------------


def draw(figure) -> None:
    figure.canvas.draw()  # the layout, the labels and the log axis are only tried when drawn


def test_plot_loss():
    losses = 1 / np.arange(1, 201)
    figure = viz.plot_loss(np.arange(200) * 10, losses)
    draw(figure)
    (axes,) = figure.axes
    raw, mean = axes.lines
    np.testing.assert_array_equal(raw.get_ydata(), losses)
    np.testing.assert_allclose(mean.get_ydata()[0], losses[:10].mean())
    np.testing.assert_allclose(mean.get_ydata()[-1], losses[-10:].mean())
    assert len(mean.get_xdata()) == 191 and mean.get_xdata()[0] == 50  # centred
    assert axes.get_yscale() == "log" and axes.get_xlabel() and axes.get_ylabel()
    assert viz.plot_loss([0, 1], [1.0, 2.0]).axes[0].get_yscale() == "linear"
    draw(viz.plot_loss([0], [0.0]))


def test_plot_per_step_error():
    errors = {f"W{b}A8": np.concatenate([[0.0], 4.0**-b * np.arange(1, 20)]) for b in range(1, 9)}
    figure = viz.plot_per_step_error(errors)
    draw(figure)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(errors)
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == len(errors)  # no two methods look the same
    for line, want in zip(axes.lines, errors.values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata()[1:], want[1:])
        assert np.isnan(line.get_ydata()[0]) and line.get_xdata()[0] == 1
    draw(viz.plot_per_step_error({"float32": np.zeros(3)}))


def test_plot_errors():
    with pytest.raises(ShapeError, match="3 steps and 2 losses"):
        viz.plot_loss([1, 2, 3], [1.0, 2.0])
    with pytest.raises(RangeError, match="'losses' is nan at index 1"):
        viz.plot_loss([1, 2], [1.0, np.nan])
    with pytest.raises(ShapeError, match="at least one method"):
        viz.plot_per_step_error({})
    with pytest.raises(ShapeError, match="'a': 2, 'b': 3"):
        viz.plot_per_step_error({"a": [1.0, 2.0], "b": [1.0, 2.0, 3.0]})
    with pytest.raises(ShapeError, match=r"'a' has shape \(0,\)"):
        viz.plot_per_step_error({"a": []})


def test_plots_leave_pyplot_alone():
    """matplotlib is not imported with the module, and no plot opens a window or registers with pyplot."""
    code = (
        "import sys; from refquant import viz; assert 'matplotlib' not in sys.modules; "
        "viz.plot_loss([0, 1], [1.0, 2.0]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(viz.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)
