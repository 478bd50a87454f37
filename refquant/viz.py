"""Pictures of samples, and plots of what training and quantization did.

Samples come as floats of shape (N, C, H, W) in [-1, 1], C = 1 (grey) or 3; finished pictures are uint8 of
shape (height, width, 3). Values outside of [-1, 1] are clipped, as samplers overshoot.

- `image_grid`, `difference_images`, `labelled_rows` make pictures; `save_png`, `read_png_text` keep them,
  together with the parameters that made them;
- `plot_loss`, `plot_per_step_error` return a matplotlib Figure and never show it. matplotlib is imported
  when they are called, as it takes longer to import than a picture takes to draw.

Errors: `ShapeError`, `RangeError` (NaN), `RefquantError` (a file that cannot be written or read).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from .errors import RangeError, RefquantError, ShapeError
from .io import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WHITE = 255
INK = (34, 34, 34)
SOFT_INK = (112, 112, 112)

#: Okabe and Ito (2008), https://jfly.uni-koeln.de/color/ : distinct for all common kinds of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")  # a second cue beside the colour, for prints in grey


def image_grid(images: ArrayLike, columns: int | None = None, pad: int = 2, scale: int = 1) -> NDArray[np.uint8]:
    """Tile images, left to right and top to bottom, on white.

    Parameters
    ----------
    images : array_like, (N, C, H, W)
        Floats in [-1, 1], C = 1 or 3. -1 becomes 0 and 1 becomes 255, rounded to the nearest, ties to even.
    columns : int, optional
        Images in a row; by default the grid is as square as can be.
    pad : int
        White pixels between the images and around the grid.
    scale : int
        Each pixel becomes a square of this side, without smoothing.

    Returns
    -------
    uint8 array, (rows * (H * scale + pad) + pad, columns * (W * scale + pad) + pad, 3)

    Examples
    --------
    >>> image_grid(np.zeros((3, 1, 28, 28)), columns=2).shape
    (62, 62, 3)
    """
    tiles = _to_uint8("image_grid", images)
    n, height, width = tiles.shape[0], tiles.shape[1] * scale, tiles.shape[2] * scale
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1 or pad < 0 or scale < 1:
        raise RangeError(
            f"image_grid: given columns={columns}, pad={pad}, scale={scale}; "
            "allowed are columns from 1, pad from 0, scale from 1."
        )
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    rows = math.ceil(n / columns)
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), WHITE, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = pad + i // columns * (height + pad), pad + i % columns * (width + pad)
        grid[top : top + height, left : left + width] = tile
    return grid


def difference_images(images: ArrayLike, reference: ArrayLike, gain: float = 1.0) -> NDArray[np.float64]:
    """Where `images` differ from `reference`: white for equal, red for brighter, blue for darker.

    Parameters
    ----------
    images, reference : array_like, (N, C, H, W)
        The same shape. Colours are averaged, so a difference has one sign per pixel.
    gain : float
        Above 0. A difference of 2 / gain, from black to white for gain 1, has the full colour.

    Returns
    -------
    float64 array, (N, 3, H, W)
        In [-1, 1], to be given to `image_grid` or `labelled_rows`.

    Examples
    --------
    >>> digit, noisy = np.zeros((1, 1, 1, 2)), np.array([[[[0.0, 0.5]]]])
    >>> equal, brighter = difference_images(noisy, digit, gain=4)[0, :, 0].T
    >>> equal.tolist(), [round(c, 2) for c in brighter.tolist()]  # red, green, blue
    ([1.0, 1.0, 1.0], [0.4, -0.79, -0.66])
    """
    a, b = _images("difference_images", images), _images("difference_images", reference)
    if a.shape != b.shape:
        raise ShapeError(f"difference_images: given shapes {a.shape} and {b.shape}, wanted the same twice.")
    if not 0.0 < gain < math.inf:
        raise RangeError(f"difference_images: gain is {gain}, it must be above 0.")
    amount = np.clip((a - b).mean(axis=1, keepdims=True) * (gain / 2), -1.0, 1.0)
    red, blue = (np.array(c).reshape(1, 3, 1, 1) / 127.5 - 1 for c in ((178, 27, 43), (33, 102, 172)))
    return np.asarray(1.0 + np.abs(amount) * (np.where(amount > 0, red, blue) - 1.0))


def labelled_rows(
    rows: Sequence[tuple[str, ArrayLike]], scale: int = 2, columns: int | None = None
) -> NDArray[np.uint8]:
    """One picture with a labelled row of images for each method, images of equal noise above each other.

    Parameters
    ----------
    rows : sequence of (label, images)
        Images (N, C, H, W) as for `image_grid`, H and W the same in all rows. The first line of a label
        is its name; further lines are printed in grey beneath it.
    scale : int
        Magnification of the images.
    columns : int, optional
        Images in a line, by default all; more images than columns wrap within their row.

    Returns
    -------
    uint8 array, (height, width, 3)

    Notes
    -----
    A row of differences is a row like another: ``("difference x4", difference_images(a, b, gain=4))``.
    The font is the one that matplotlib carries, so pictures are equal on all machines.

    Examples
    --------
    >>> noise = np.random.default_rng(0).uniform(-1, 1, (4, 1, 28, 28))
    >>> labelled_rows([("float32", noise), ("W4A8 nearest", noise)]).ndim
    3
    """
    if not rows:
        raise ShapeError("labelled_rows: given no rows, wanted at least one (label, images).")
    batches = [_images("labelled_rows", images) for _, images in rows]
    sizes = {images.shape[2:] for images in batches}
    if len(sizes) > 1:
        raise ShapeError(f"labelled_rows: given images of sizes {sorted(sizes)}, wanted one for all rows.")
    columns = max(len(images) for images in batches) if columns is None else columns
    blocks = [image_grid(images, columns, pad=2 * scale, scale=scale) for images in batches]

    size = max(14, min(blocks[0].shape[0] // 5, 22))
    fonts = [_font(size), _font(round(0.8 * size))]
    lines = [[(text, fonts[min(i, 1)]) for i, text in enumerate(label.split("\n"))] for label, _ in rows]
    margin, gap = size, size // 2
    gutter = max(math.ceil(font.getlength(text)) for label in lines for text, font in label) + size

    height = 2 * margin + sum(len(block) for block in blocks) + gap * (len(blocks) - 1)
    width = margin + gutter + blocks[0].shape[1] + margin
    picture = Image.new("RGB", (width, height), (WHITE, WHITE, WHITE))
    draw = ImageDraw.Draw(picture)
    top = margin
    for label, block in zip(lines, blocks, strict=True):
        picture.paste(Image.fromarray(block), (margin + gutter, top))
        # Lines of 1.4 times the font size, together centred on the row of images.
        middle = top + len(block) / 2 - sum(1.4 * font.size for _, font in label) / 2
        for i, (text, font) in enumerate(label):
            middle += 0.7 * font.size
            draw.text((margin, round(middle)), text, SOFT_INK if i else INK, font, anchor="lm")
            middle += 0.7 * font.size
        top += len(block) + gap
    return np.asarray(picture, dtype=np.uint8)


def save_png(path: str | os.PathLike[str], picture: NDArray[np.uint8], text: Mapping[str, object]) -> None:
    """Write a PNG, with the parameters that made the picture as text chunks.

    Equal arguments give equal bytes (with one version of Pillow); the file is written whole or not at all.

    Parameters
    ----------
    path : path
        The file; one that exists is replaced.
    picture : (H, W, 3) or (H, W) uint8
    text : mapping of str to object
        Values are written as ``str(value)``. Keys have 1 to 79 Latin-1 characters, says the PNG standard.

    Raises
    ------
    RefquantError
        The file cannot be written.
    """
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim < 2 or array.shape[2:] not in ((), (3,)) or 0 in array.shape:
        raise ShapeError(
            f"save_png: given {array.dtype} of shape {array.shape}, wanted uint8 of (H, W, 3) or (H, W). "
            "Make it with `image_grid`."
        )
    chunks = PngImagePlugin.PngInfo()
    for key, value in sorted(text.items()):
        if not (0 < len(key) < 80 and key.isprintable() and key.strip() == key and max(key) <= "\xff"):
            raise RangeError(f"save_png: {key!r} cannot be a key. Use 1 to 79 printable Latin-1 characters.")
        chunks.add_text(key, str(value))
    content = BytesIO()
    Image.fromarray(array).save(content, "PNG", pnginfo=chunks, optimize=True)
    write_atomically(path, [content.getvalue()])


def read_png_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the text chunks of a PNG file.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict of str to str

    Raises
    ------
    RefquantError
        No such file, or no PNG picture.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            assert isinstance(picture, PngImagePlugin.PngImageFile)
            return {key: str(value) for key, value in picture.text.items()}
    except FileNotFoundError as problem:
        raise RefquantError(f"{path}: no such file. Check the path.") from problem
    except (OSError, SyntaxError, ValueError) as problem:  # Pillow says SyntaxError for a broken chunk
        raise RefquantError(f"{path}: is no PNG picture, or damaged ({problem}). Make it again.") from problem


def plot_loss(steps: ArrayLike, losses: ArrayLike) -> Figure:
    """Training loss over steps: each value in grey, their running mean in colour.

    Parameters
    ----------
    steps, losses : array_like, (n,)
        The running mean is centred and spans 1/20 of the n values. A range of more than 1:10 gets a
        logarithmic axis.

    Returns
    -------
    matplotlib.figure.Figure
    """
    x, y = _series("plot_loss", "steps", steps), _series("plot_loss", "losses", losses)
    if x.shape != y.shape:
        raise ShapeError(f"plot_loss: given {len(x)} steps and {len(y)} losses, wanted as many.")
    window = max(1, len(y) // 20)
    sums = np.cumsum(np.concatenate([np.zeros(1), y]))
    mean = (sums[window:] - sums[:-window]) / window
    figure, axes = _axes("training step", "loss (mean squared error of the predicted noise)")
    axes.plot(x, y, color="#B0B0B0", linewidth=0.8, label="each value")
    axes.plot(x[window // 2 :][: len(mean)], mean, color=PALETTE[0], linewidth=2.0, label=f"mean of {window}")
    if y.min() > 0 and y.max() > 10 * y.min():
        axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure


def plot_per_step_error(errors_by_method: Mapping[str, ArrayLike]) -> Figure:
    """Error of each quantization method to the float trajectory, step by step.

    Parameters
    ----------
    errors_by_method : mapping of str to array_like, (K,)
        Mean squared error after each of the K sampling steps, the same K for all methods. The axis is
        logarithmic, where 0 has no place: such steps (the start from equal noise is one) leave a gap.

    Returns
    -------
    matplotlib.figure.Figure
    """
    curves = {name: _series("plot_per_step_error", name, errors) for name, errors in errors_by_method.items()}
    steps = {name: len(errors) for name, errors in curves.items()}
    if len(set(steps.values())) != 1:
        raise ShapeError(
            f"plot_per_step_error: given steps {steps}, "
            "wanted at least one method and the same number of steps for all."
        )
    figure, axes = _axes("sampling step (the first starts from noise)", "mean squared error to float32")
    _curves(axes, {name: (np.arange(1, len(y) + 1), np.where(y > 0, y, np.nan)) for name, y in curves.items()})
    if any((errors > 0).any() for errors in curves.values()):
        axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure


def plot_over_time(curves_by_method: Mapping[str, ArrayLike], quantity: str) -> Figure:
    """A quantity of each method at every time-step t = 0, 1, ...; t = 0 is the clean end.

    Parameters
    ----------
    curves_by_method : mapping of str to array_like, (T,)
    quantity : str
        Label of the axis.

    Returns
    -------
    matplotlib.figure.Figure
    """
    curves = {name: _series("plot_over_time", name, values) for name, values in curves_by_method.items()}
    if not curves:
        raise ShapeError("plot_over_time: given no curves, wanted at least one method.")
    figure, axes = _axes("time-step t (0 is one step of noise)", quantity)
    _curves(axes, {name: (np.arange(len(values)), values) for name, values in curves.items()}, width=1.2)
    axes.legend(frameon=False)
    return figure


def _curves(axes: Axes, curves: Mapping[str, tuple[NDArray, NDArray]], width: float = 2.0) -> None:
    """Draw curves that differ in colour and in dashes."""
    for i, (name, (x, y)) in enumerate(curves.items()):
        style = {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[i % len(DASHES)], "linewidth": width}
        axes.plot(x, y, label=name, **style)


def _images(function: str, images: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(images)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape or x.dtype.kind != "f":
        raise ShapeError(
            f"{function}: given {x.dtype} of shape {x.shape}, wanted floats in [-1, 1] of shape (N, C, H, W) "
            "with C = 1 or 3 and at least one image."
        )
    if not np.isfinite(x).all():
        raise RangeError(f"{function}: an image holds NaN or infinity. Look for the step that made it.")
    return x.astype(np.float64)


def _to_uint8(function: str, images: ArrayLike) -> NDArray[np.uint8]:
    # (N, C, H, W) in [-1, 1] -> (N, H, W, 3) in 0..255; float64 makes the ties exact, rint sends them to even
    x = _images(function, images)
    codes = np.rint((np.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return np.broadcast_to(codes, (len(x), 3, *x.shape[2:])).transpose(0, 2, 3, 1)


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    # The basic layout is in every Pillow; the other engine is not, and places letters differently.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _series(function: str, name: str, values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ShapeError(f"{function}: '{name}' has shape {x.shape}, wanted (n,) with n from 1.")
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise RangeError(f"{function}: '{name}' is {x[bad[0]]} at index {bad[0]}. Plot what comes before it.")
    return x


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    # A Figure of its own and not pyplot's: nothing global to close, no window system needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), dpi=120, layout="constrained")
    axes: Axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes
