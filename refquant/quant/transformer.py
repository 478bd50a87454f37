"""What the methods for diffusion transformers need to know of a DiT: whose output is whose input.

Where a linear layer's input comes from something that is linear in each channel, its channels can be balanced for
nothing (see `balance`); in a DiT that is

    layer                   its input                           folded into
    blocks.i.attn.qkv       LN(x) (1 + gamma_1) + beta_1        adaLN's rows of beta_1 and gamma_1
    blocks.i.attn.proj      P V                                 V's rows of qkv
    blocks.i.mlp.fc1        LN(x) (1 + gamma_2) + beta_2        adaLN's rows of beta_2 and gamma_2
    final_layer.linear      LN(x) (1 + gamma) + beta            the final adaLN's rows

and fc2, behind GELU, is not among them.

Errors: `ShapeError` from methods that are asked for another network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..diffusion.model import DiffusionModel
from ..errors import ShapeError, UnknownNameError
from ..nn.dit import DiT, DiTConfig
from ..threads import parallel_map
from . import balance
from .calibrate import record
from .record import Trajectories
from .session import check_finite
from .wrap import wrap

Float64 = NDArray[np.float64]

PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # the linear layers of a block that see tokens


@dataclass(frozen=True)
class Source:
    """Rows of a linear layer that a balance is folded into; `scale` are those that come as 1 + gamma, if any."""

    layer: str
    rows: slice
    scale: slice | None = None


def require(model: DiffusionModel, method: str) -> DiT:
    """The model's network, or a ShapeError that says what the method is made for; its weights must be finite."""
    if not isinstance(model.network, DiT):
        raise ShapeError(
            f"{method} is made for diffusion transformers (adaLN, attention, GELU); {model.name} is a "
            f"{type(model.network).__name__}. Choose a method for it: nearest, brecq, qdiffusion, tfmq, ..."
        )
    check_finite(model)
    return model.network


def token_layers(cfg: DiTConfig) -> list[str]:
    """The four linear layers of every block, in order of execution."""
    return [f"blocks.{i}.{part}" for i in range(cfg.depth) for part in PARTS]


def sources(cfg: DiTConfig) -> dict[str, Source]:
    """Every layer whose input can be balanced, in order of execution, and where that is folded into."""
    d = cfg.width

    def part(i: int) -> slice:
        return slice(i * d, (i + 1) * d)

    found: dict[str, Source] = {}
    for i in range(cfg.depth):
        block = f"blocks.{i}"
        found[f"{block}.attn.qkv"] = Source(f"{block}.adaLN_modulation.1", part(0), part(1))
        found[f"{block}.attn.proj"] = Source(f"{block}.attn.qkv", part(2))
        found[f"{block}.mlp.fc1"] = Source(f"{block}.adaLN_modulation.1", part(3), part(4))
    found["final_layer.linear"] = Source("final_layer.adaLN_modulation.1", part(0), part(1))
    return found


def stages(cfg: DiTConfig) -> list[list[str]]:
    """The layers of `sources` in the order in which balances are to be found.

    The balance of proj changes rows of qkv, and with them what its columns look like: proj comes first, and the balance
    of qkv is found on the weights that are then there.

    Parameters
    ----------
    cfg : DiTConfig

    Returns
    -------
    list of list of str
    """
    found = sources(cfg)
    first = [name for name, source in found.items() if source.layer in found]
    return [first, [name for name in found if name not in first]]


def balanced(model: DiffusionModel, factors: Mapping[str, Float64]) -> DiffusionModel:
    """A model that computes the same, with the inputs of these layers multiplied by factors (K,).

    Parameters
    ----------
    model : DiffusionModel
        Of a DiT; it is not changed.
    factors : mapping of str to float64 array, (K,)
        By layer, of those in `sources`.

    Returns
    -------
    DiffusionModel
        Its answers are those of `model` up to float32 rounding.
    """
    network, places = copy.deepcopy(model.network), sources(model.network.cfg)
    p = dict(network.named_parameters())
    for name, b in factors.items():
        if name not in places:
            raise UnknownNameError(
                f"nothing linear makes the input of {name!r}; these can be balanced: {', '.join(places)}."
            )
        p[f"{name}.weight"].data = balance.fold_columns(p[f"{name}.weight"].data, b)
        source = places[name]
        weight, bias = p[f"{source.layer}.weight"], p[f"{source.layer}.bias"]
        if source.scale is None:
            weight.data, bias.data = balance.fold_rows(weight.data, bias.data, source.rows, b)
        else:
            weight.data, bias.data = balance.fold_modulation(weight.data, bias.data, source.rows, source.scale, b)
    return replace(model, network=network)


def input_saliences(
    model: DiffusionModel, trajectories: Trajectories, steps: Sequence[int], names: Sequence[str]
) -> dict[str, Float64]:
    """max |x_j| of the inputs of these layers at each of these steps of the sampler, (T, K)."""
    network, wanted = wrap(model.network)[0], {f"{name}.input": name for name in names}

    def run(step: int) -> dict[str, Float64]:
        seen = record(network, trajectories.at([step]))
        return {wanted[n]: balance.salience(x) for n, x in seen if n in wanted}

    found = parallel_map(run, steps)
    return {name: np.stack([one[name] for one in found]) for name in names}


def weight_salience(weight: NDArray[np.float32]) -> Float64:
    """max |w_oj| over outputs: (O, K) -> (K,)."""
    return balance.salience(weight)
