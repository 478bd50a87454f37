"""Temporal features: what every ResBlock is told about the time-step, and how quantization changes it.

    e      = sinusoid(t)
    u      = Linear1(SiLU(Linear0(e)))                     the time MLP, h(t) in TFMQ-DM
    emb_i  = Linear_i(SiLU(u))                             ResBlock i's projection, g_i(h(t))

A diffusion transformer has the same thing under other names, with the class in it where there are classes:

    u      = Linear2(SiLU(Linear0(e))) + row y of the class table
    emb_i  = Linear_i(SiLU(u))                             block i's modulation: shifts, scales and gates

Nothing here sees the image, so a model of T time-steps has T temporal features and no more (T times K + 1 with K
classes and "no class"). A rounded feature that
comes close to that of *another* time-step tells a block to denoise for the wrong amount of noise (TFMQ-DM section
3.1). `feature_errors` measures it over all t:

    squared[t] = sum_i |emb^_i(t) - emb_i(t)|²              the sum that TIAR minimises
    cosine[i, t] of emb^_i(t) and emb_i(t)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, no_grad, ops
from ..errors import ShapeError
from ..nn.dit import DiT, Modulation
from ..nn.module import Module
from ..nn.networks import Network
from ..nn.unet import ResBlock
from .observers import from_range
from .quantized import QuantizedModel
from .wrap import activation_quantizers, watched

Float64 = NDArray[np.float64]


class TemporalBlock:
    """The time MLP and all projections of a (wrapped) network, to be run without the rest of it.

    Attributes
    ----------
    mlp : Module
        t (N,) -> (N, E).
    table : Module or None
        y (N,) -> (N, E), in a conditional network.
    projections : dict of str to Module
        By the layer's name, in order of registration.
    """

    def __init__(self, network: Network) -> None:
        self.mlp: Module = network.t_embedder if isinstance(network, DiT) else network.temb
        self.table: Module | None = getattr(network, "y_embedder", None)
        self.projections = {
            f"{name}.{layer}": projection
            for name, module in network.named_modules()
            for layer, projection in _projection(module).items()
        }
        if not self.projections:
            raise ShapeError("this network has no projection of a time embedding: it has no temporal features.")

    def __call__(self, t: NDArray[np.integer], y: NDArray[np.integer] | None = None) -> list[Tensor]:
        """The features of time-steps t (N,) and classes y (N,), or none: a tensor (N, C_i) for each projection."""
        u = self.mlp(t)
        if self.table is not None:
            none = len(self.table.embedding_table.weight.data) - 1
            u = ops.add(u, self.table(np.full(len(t), none) if y is None else y))
        shared = ops.silu(u)
        return [projection(shared) for projection in self.projections.values()]

    def joined(self, t: NDArray[np.integer], y: NDArray[np.integer] | None = None) -> Tensor:
        """All features side by side, (N, sum of C_i)."""
        first, *others = self(t, y)
        for other in others:
            first = ops.concat(first, other)
        return first


def _projection(module: Module) -> dict[str, Module]:
    if isinstance(module, ResBlock):
        return {"temb_proj": module.temb_proj}
    return {"adaLN_modulation.1": module.adaLN_modulation[1]} if isinstance(module, Modulation) else {}


def every_condition(
    t: NDArray[np.integer], classes: int
) -> tuple[NDArray[np.integer], NDArray[np.int64] | None]:
    """All that temporal layers can be told at time-steps t: t (N (K+1),) and y, "no class" last; just t if K is 0."""
    if not classes:
        return t, None
    return np.repeat(t, classes + 1), np.tile(np.arange(classes + 1), len(t))


def features(
    network: Network, t: NDArray[np.integer], y: NDArray[np.integer] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Temporal features (N, C_i) of time-steps t (N,) and classes y (N,), or none, by the projection's name."""
    block = TemporalBlock(network)
    with no_grad():
        return {name: z.data for name, z in zip(block.projections, block(t, y), strict=True)}


def features_by_step(model: QuantizedModel) -> dict[str, NDArray[np.float32]]:
    """Temporal features (S, K + 1, C_i) of all S steps of the sampler, each with its tables in force, and classes."""
    rows: list[dict[str, NDArray[np.float32]]] = []
    for step, t in enumerate(model.timesteps()):
        model.at_step(step)
        rows.append(features(model.network, *every_condition(np.array([t]), model.network.cfg.classes)))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True, eq=False)
class FeatureErrors:
    """How far temporal features are from the float ones.

    Attributes
    ----------
    t : int array, (T,)
    squared : float64 array, (T,)
        Squared error, summed over channels and projections.
    cosine : float64 array, (P, T)
        For each of the P projections.
    """

    t: NDArray[np.int64]
    squared: Float64
    cosine: Float64


def feature_errors(
    t: NDArray[np.int64], got: dict[str, NDArray[np.float32]], want: dict[str, NDArray[np.float32]]
) -> FeatureErrors:
    """Compare features (T, C_i) with the float network's, projection by projection."""
    pairs = [(got[name].astype(np.float64), want[name].astype(np.float64)) for name in want]
    squared = sum(np.square(a - b).sum(axis=1) for a, b in pairs)
    cosine = np.array([(a * b).sum(1) / np.maximum(_norm(a) * _norm(b), np.finfo(float).tiny) for a, b in pairs])
    return FeatureErrors(t, np.asarray(squared), cosine)


def _norm(x: Float64) -> Float64:
    return np.asarray(np.sqrt(np.square(x).sum(axis=1)))


def quantized_features(
    model: QuantizedModel, t: NDArray[np.int64], y: NDArray[np.integer] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Temporal features (N, C_i) of a quantized model, with its tables where its sampler visits t.

    At any other t an activation with a table takes the exact range of that t, over all classes, which is what finite
    set calibration would store for a sampler that visits it. Cached features exist at visited t only: elsewhere the
    nearest is given.

    Parameters
    ----------
    model : QuantizedModel
    t : int64 array, (N,)
    y : int array, (N,), optional
        Classes; without them, none.

    Returns
    -------
    dict of str to float32 array, (N, C_i)
        By the projection's name.
    """
    block = TemporalBlock(model.network)
    modules = [block.mlp, *block.projections.values()]
    cached = {model.layers[name].input.name for name in model.features}  # these layers are not run
    stepped = {n: q for m in modules for n, q in activation_quantizers(m).items() if q.table and n not in cached}
    if not stepped and not model.features:
        return features(model.network, t, y)
    visited, distinct = model.timesteps(), np.unique(t)
    ranges = _exact_ranges(model.network, distinct)
    out: dict[str, NDArray[np.float32]] = {}
    for i, now in enumerate(distinct):
        step = int(np.abs(visited - now).argmin())
        model.at_step(step)
        if visited[step] != now:
            for name, quantizer in stepped.items():
                lo, hi = (end[i] for end in ranges[name])
                quantizer.qparams = from_range(lo, hi, quantizer.table.spec)
        here = np.flatnonzero(t == now)
        for name, rows in features(model.network, t[here], None if y is None else y[here]).items():
            out.setdefault(name, np.empty((len(t), rows.shape[1]), np.float32))[here] = rows
    return out


def _exact_ranges(network: Network, t: NDArray[np.int64]) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Smallest and largest input of each temporal activation at each of t (N,), of all classes, in float."""
    seen: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def note(name: str, x: NDArray[np.float32]) -> None:
        rows = x.reshape(len(t), -1)  # all conditions of a time-step lie side by side
        seen[name] = (rows.min(axis=1), rows.max(axis=1))

    own = watched(network, note)
    for quantizer in activation_quantizers(own).values():
        quantizer.set(None)
    features(own, *every_condition(t, network.cfg.classes))
    return seen
