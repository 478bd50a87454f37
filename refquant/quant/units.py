"""Which parts of a network are reconstructed together, and which layers see nothing but the time-step.

A unit is a block (ResBlock, attention, transformer block) or a single layer outside of all blocks; BRECQ (Li et al.
2021) found blocks to be the right grain. Their order is that of execution. The released TFMQ-DM code goes by
registration instead, in which DDPM's up path comes in reverse (`order="registration"` repeats that).

The temporal layers are found by what they do, not by name: a layer whose input stays the same when the image
changes sees t alone. Such layers take as many inputs as there are time-steps, a finite set; TFMQ-DM calls them
the Temporal Information Block. In a conditional transformer they see the class as well: time-steps times classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..autograd import Tensor, no_grad
from ..errors import ShapeError, UnknownNameError
from ..nn.dit import DiTBlock, FinalLayer
from ..nn.module import Module
from ..nn.networks import Network
from ..nn.unet import AttentionBlock, ResBlock
from .wrap import QuantLayer, watched, wrap

BLOCKS = (ResBlock, AttentionBlock, DiTBlock, FinalLayer)
ORDERS = ("execution", "registration")


@dataclass(frozen=True, eq=False)
class Unit:
    """One part of a wrapped network.

    Attributes
    ----------
    name : str
        Of the module, such as "down.0.block.0".
    module : Module
        Its forward pass is what is reconstructed.
    layers : tuple of QuantLayer
        Whose rounding is learned with it.
    """

    name: str
    module: Module
    layers: tuple[QuantLayer, ...]


def find_units(
    network: Network, layers: dict[str, QuantLayer], *, without: frozenset[str] = frozenset(), order: str = "execution"
) -> list[Unit]:
    """Cut a wrapped network into units.

    Parameters
    ----------
    network, layers : UNet or DiT, dict of str to QuantLayer
        From `refquant.quant.wrap.wrap`.
    without : frozenset of str
        Layers that are reconstructed elsewhere; a block that holds one computes with it and leaves it alone.
    order : {"execution", "registration"}

    Returns
    -------
    list of Unit
        Every layer but those of `without` is in exactly one.
    """
    if order not in ORDERS:
        raise UnknownNameError(f"no order of units is called {order!r}. Known: {', '.join(ORDERS)}.")
    blocks = {name: module for name, module in network.named_modules() if isinstance(module, BLOCKS)}
    owner = {name: next((b for b in blocks if name.startswith(b + ".")), name) for name in layers}
    names = layers if order == "registration" else _execution_order(network)
    units: dict[str, list[QuantLayer]] = {}
    for name in names:
        if name not in without:
            units.setdefault(owner[name], []).append(layers[name])
    return [Unit(name, blocks.get(name, found[0]), tuple(found)) for name, found in units.items()]


def temporal_layers(network: Network) -> list[str]:
    """Names of the layers of a float network whose input does not depend on the image, in order of execution.

    Parameters
    ----------
    network : UNet or DiT

    Returns
    -------
    list of str

    Raises
    ------
    ShapeError
        There is none: the network has no time embedding.
    """
    wrapped = wrap(network)[0]
    first, second = (_inputs(wrapped, seed) for seed in (0, 1))
    found = [name for (name, a), (_, b) in zip(first, second, strict=True) if np.array_equal(a, b)]
    if not found:
        raise ShapeError(
            "this network has no layer that sees the time-step alone; methods that maintain temporal features "
            "have nothing to do here. Choose another method."
        )
    return found


def _execution_order(network: Network) -> list[str]:
    """Names of the layers of a wrapped network in the order in which they run."""
    return [name for name, _ in _inputs(network, seed=0)]


def _inputs(network: Network, seed: int) -> list[tuple[str, np.ndarray]]:
    """Every layer's name and input, in order of execution, for one random image; t is the same for every seed."""
    cfg, seen = network.cfg, []

    def see(name: str, value: np.ndarray) -> None:
        layer, _, part = name.rpartition(".")
        if part == "input":
            seen.append((layer, value))

    shape = (1, cfg.image_size, cfg.image_size, cfg.image_channels)
    with no_grad():
        image = Tensor(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
        watched(network, see)(image, np.array([1]))
    return seen
