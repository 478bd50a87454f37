"""A small digit classifier, the judge whose features serve the Frechet distance.

    conv 3x3 -> ReLU -> max-pool   (three times, 28 -> 14 -> 7, the last without pooling)
    -> Linear -> ReLU = features -> dropout -> Linear = logits

Shapes: x (N, H, W, C) float in [-1, 1] with H and W divisible by 4; features (N, F); logits (N, K).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, nnops, no_grad, ops
from ..autograd.ops import softmax_array
from ..data.dataset import Dataset, to_float
from ..errors import CheckpointError, ShapeError
from ..threads import parallel_map
from .fit import FitConfig, epoch_order, fit
from .layers import Conv2d, Dropout, Linear
from .module import Module


@dataclass(frozen=True)
class ClassifierConfig:
    """Image size and channels, channels of the three convolutions, features and classes."""

    image_size: int = 28
    image_channels: int = 1
    channels: tuple[int, int, int] = (16, 32, 64)
    features: int = 64
    classes: int = 10
    dropout: float = 0.3

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ClassifierConfig:
        """Build from `to_json`'s result; raise CheckpointError if fields are missing or unknown."""
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        except TypeError as error:
            raise CheckpointError(f"not the configuration of a classifier: {error}.") from None


class Classifier(Module):
    """The network above; see the module's docstring."""

    def __init__(self, cfg: ClassifierConfig, rng: np.random.Generator) -> None:
        self.cfg = cfg
        widths = (cfg.image_channels, *cfg.channels)
        self.conv = [Conv2d(rng, a, b, gain=2.0) for a, b in zip(widths, widths[1:], strict=False)]
        self.hidden = Linear(rng, (cfg.image_size // 4) ** 2 * cfg.channels[-1], cfg.features, gain=2.0)
        self.dropout = Dropout(cfg.dropout)
        self.out = Linear(rng, cfg.features, cfg.classes)

    def features(self, x: Tensor) -> Tensor:
        """x (N, H, W, C) -> (N, F), after the ReLU."""
        want = (self.cfg.image_size, self.cfg.image_size, self.cfg.image_channels)
        if x.shape[1:] != want:
            raise ShapeError(f"classifier: wants images (N, H, W, C) with (H, W, C) = {want}, got {x.shape}.")
        for i, conv in enumerate(self.conv):
            x = ops.relu(conv(x))
            x = nnops.max_pool(x) if i < 2 else x
        return ops.relu(self.hidden(ops.reshape(x, (x.shape[0], -1))))

    def __call__(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """x (N, H, W, C) -> logits (N, K); dropout only where a generator is given."""
        return self.out(self.dropout(self.features(x), rng))

    def judge(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Features (N, F) and class probabilities (N, K) of images (N, C, H, W) in [-1, 1]."""

        def run(part: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
            with no_grad():
                f = self.features(Tensor(np.ascontiguousarray(part.transpose(0, 2, 3, 1))))
                return f.data, softmax_array(self.out(f).data)

        parts = parallel_map(run, [images[i : i + 250] for i in range(0, len(images), 250)])
        return np.concatenate([f for f, _ in parts]), np.concatenate([p for _, p in parts])


@dataclass(frozen=True)
class LabelledChunk:
    """Part of a batch: x (N, H, W, C), labels (N,), and a generator for dropout."""

    x: NDArray[np.float32]
    labels: NDArray[np.int64]
    rng: np.random.Generator

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.labels)


def labelled_chunks(data: Dataset, cfg: FitConfig, step: int) -> list[LabelledChunk]:
    """Build the batch of one step, each image moved by up to 2 pixels; a function of (seed, step) alone."""
    index = epoch_order(len(data.images), cfg, step)
    x = to_float(data.images[index]).transpose(0, 2, 3, 1)
    n, h, w, _ = x.shape
    dy, dx = np.random.default_rng([cfg.seed, 2, step]).integers(0, 5, (2, n))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)
    moved = np.stack([p[i : i + h, j : j + w] for p, i, j in zip(padded, dy, dx, strict=True)])
    return [
        LabelledChunk(moved[i : i + cfg.chunk], data.labels[index[i : i + cfg.chunk]],
                      np.random.default_rng([cfg.seed, 3, step, i]))
        for i in range(0, n, cfg.chunk)
    ]  # fmt: skip


def train_classifier(
    model: Classifier, data: Dataset, cfg: FitConfig, *, state: Path | None = None, quiet: bool = False
) -> NDArray[np.float32]:
    """Train `model` in place with the cross-entropy; returns the loss curve. See `refquant.nn.fit.fit`."""
    return fit(
        model,
        lambda step: labelled_chunks(data, cfg, step),
        lambda chunk: nnops.cross_entropy(model(Tensor(chunk.x), chunk.rng), chunk.labels),
        cfg,
        state=state,
        recipe={"network": model.cfg.to_json(), "data": data.name},
        quiet=quiet,
        label="classifier",
    )


def accuracy(model: Classifier, data: Dataset) -> float:
    """Share of the images whose most probable class is their label."""
    _, p = model.judge(to_float(data.images))
    return float(np.mean(p.argmax(axis=1) == data.labels))
