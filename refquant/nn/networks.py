"""The networks there are: every named configuration, and what is built from it.

    mnist-unet      the shipped UNet: 28x28 grey images, 1,333,969 parameters
    ddpm-cifar10    the CIFAR-10 network of Ho et al. 2020: 35,746,307 parameters
    mnist-dit       the shipped diffusion transformer: 28x28 grey images of ten classes, 1,060,816 parameters
    dit-xl-2        DiT-XL/2 of Peebles & Xie 2023, on 32x32 latents of 4 channels: 674,834,720 parameters

A configuration knows the kind of network that it describes; a checkpoint of that kind holds the configuration.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import UnknownNameError
from .dit import DiT, DiTConfig
from .unet import UNet, UNetConfig

Network = UNet | DiT
NetworkConfig = UNetConfig | DiTConfig

CONFIGS: dict[str, NetworkConfig] = {
    "mnist-unet": UNetConfig(28, 1, 16, (1, 2, 6), 1, (7,), 8, 0.0),
    "ddpm-cifar10": UNetConfig(32, 3, 128, (1, 2, 2, 2), 2, (16,), 32, 0.1),
    "mnist-dit": DiTConfig(28, 1, patch=4, width=96, depth=6, heads=3, classes=10),
    "dit-xl-2": DiTConfig(32, 4, patch=2, width=1152, depth=28, heads=16, classes=1000, learn_sigma=True),
}

KINDS: dict[str, tuple[type[NetworkConfig], type[Network]]] = {
    UNetConfig.kind: (UNetConfig, UNet),
    DiTConfig.kind: (DiTConfig, DiT),
}


def config(name: str) -> NetworkConfig:
    """Return the named configuration; UnknownNameError lists the names there are."""
    if name not in CONFIGS:
        raise UnknownNameError(f"no network is called {name!r}. Known: {', '.join(CONFIGS)}.")
    return CONFIGS[name]


def build(cfg: NetworkConfig, rng: np.random.Generator) -> Network:
    """Build the network that `cfg` describes, with initial weights drawn from `rng`."""
    return KINDS[cfg.kind][1](cfg, rng)  # type: ignore[arg-type]  # the pair belongs together


def config_from_json(kind: str, fields: dict[str, Any]) -> NetworkConfig:
    """Build a configuration of this kind from its `to_json`; raise CheckpointError where that does not fit."""
    return KINDS[kind][0].from_json(fields)
