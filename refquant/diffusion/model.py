"""A diffusion model as one thing: network, noise schedule, and where they came from.

A model is named by its asset name (``mnist-unet``) or by the path of a checkpoint. Everything a
sampler needs travels in the checkpoint's metadata, so nothing is retyped after training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import io
from ..errors import CheckpointError, UnknownNameError
from ..nn.classifier import Classifier, ClassifierConfig
from ..nn.networks import KINDS, Network, build, config_from_json
from .denoiser import PREDICTIONS, Denoiser
from .schedule import Schedule, schedule

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A noise-predicting network and the schedule it was trained for.

    Attributes
    ----------
    name : str
        Asset name or file stem, for tables and captions.
    network : UNet or DiT
    schedule : Schedule
    prediction : {"eps", "v"}
        What the network was trained to answer, see `denoiser`.
    metadata : dict
        How it was made: data set, training length, seed.
    """

    name: str
    network: Network
    schedule: Schedule
    prediction: str = "eps"
    metadata: dict[str, Any] = field(default_factory=dict)

    def denoiser(self, network: Network | None = None, chunk: int = 16) -> Denoiser:
        """Return the noise predictor for samplers; of another `network` in the place of its own, if given."""
        return Denoiser(network or self.network, chunk, self.schedule if self.prediction == "v" else None)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images it draws."""
        cfg = self.network.cfg
        return cfg.image_channels, cfg.image_size, cfg.image_size

    @property
    def classes(self) -> int:
        """Classes that it can be asked for; 0 where it is unconditional."""
        return self.network.cfg.classes

    def save(self, path: Path) -> None:
        """Write the checkpoint (see `refquant.io.save` for the errors)."""
        facts = {
            **self.metadata,
            "kind": self.network.cfg.kind,
            "network": self.network.cfg.to_json(),
            "schedule": self.schedule.name,
            "timesteps": self.schedule.timesteps,
            "prediction": self.prediction,
            "t_convention": "t counts from 0; t = 0 is one step of noise",
        }
        io.save(path, self.network.state_dict(), facts)


def asset_names() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(p.stem for p in ASSETS.glob("*.safetensors"))


def find(name: str) -> Path:
    """Return the file that a model name or path means.

    Parameters
    ----------
    name : str
        Asset name, or path of a checkpoint.

    Returns
    -------
    Path

    Raises
    ------
    UnknownNameError
        It is neither an asset nor an existing file; the message lists the assets.
    """
    asset = ASSETS / f"{name}.safetensors"
    if asset.is_file():
        return asset
    if Path(name).is_file():
        return Path(name)
    raise UnknownNameError(
        f"no model or file is called {name!r}. Shipped: {', '.join(asset_names()) or 'none'}; or give the path of "
        "a checkpoint that `refquant train` or `refquant quantize` wrote."
    )


def load_model(name: str) -> DiffusionModel:
    """Load a float model by asset name or path (see `find` and `refquant.io.load` for the errors)."""
    path = find(name)
    found = io.load(path)
    if found.kind not in KINDS:
        raise CheckpointError(
            f"{path}: is a checkpoint of kind '{found.kind}', wanted is a float model ({', '.join(KINDS)}). "
            "Give one that `refquant train` wrote."
        )
    return from_checkpoint(found)


def from_checkpoint(found: io.Checkpoint) -> DiffusionModel:
    """Build the model that a loaded checkpoint of a float model describes."""
    facts = found.metadata
    for key in ("network", "schedule", "timesteps"):
        if key not in facts:
            raise CheckpointError(f"{found.path}: its metadata lacks {key!r}; it was not written by refquant train.")
    model = frame(found.path.stem, facts, found.kind)
    model.network.load_state_dict(found.tensors)
    return model


class _Zeros:
    """In the place of a random generator: zeros that take no memory until somebody writes to them."""

    def uniform(self, low: float, high: float, size: tuple[int, ...]) -> NDArray[np.float32]:
        return np.zeros(size, np.float32)

    def standard_normal(self, size: tuple[int, ...], dtype: type = np.float32) -> NDArray[Any]:
        return np.zeros(size, dtype)


def frame(name: str, facts: dict[str, Any], kind: str = "unet") -> DiffusionModel:
    """Build the model that metadata describe, with weights yet to be loaded; `kind` is that of its network."""
    network = build(config_from_json(kind, facts["network"]), _Zeros())  # type: ignore[arg-type]
    prediction = facts.get("prediction", "eps")  # what every checkpoint predicted before it was written down
    if prediction not in PREDICTIONS:
        raise CheckpointError(f"{name}: prediction {prediction!r} is unknown; {', '.join(PREDICTIONS)} are known.")
    return DiffusionModel(name, network, schedule(facts["schedule"], facts["timesteps"]), prediction, facts)


def save_classifier(path: Path, model: Classifier, reference: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write a classifier with the feature statistics of its training set (mean, cov)."""
    tensors = {**model.state_dict(), **{f"reference.{k}": v for k, v in reference.items()}}
    io.save(path, tensors, {**facts, "kind": "classifier", "network": model.cfg.to_json()})


def load_classifier(name: str) -> tuple[Classifier, dict[str, np.ndarray], dict[str, Any]]:
    """Load a classifier: the network, reference statistics (mean (F,), cov (F, F)), and the metadata."""
    found = io.load(find(name), kind="classifier")
    weights = {k: v for k, v in found.tensors.items() if not k.startswith("reference.")}
    model = Classifier(ClassifierConfig.from_json(found.metadata["network"]), np.random.default_rng(0))
    model.load_state_dict(weights)
    reference = {k.removeprefix("reference."): found.tensors[k] for k in found.tensors if k.startswith("reference.")}
    return model, reference, found.metadata
