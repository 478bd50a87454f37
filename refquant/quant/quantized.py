"""A quantized model: the float model's frame, integer weights, and the quantizers of its activations.

One safetensors file of kind "quantized" holds it:

    <layer>.codes                             weight codes minus qmin, uint8 (O, K), or two to a byte where bits <= 4
    <layer>.weight_scale, .weight_zero_point  (O,) float32 and int32
    <quantizer>.scale, .zero_point            () float32 and int32, or (S,): one for each step of the sampler
    <quantizer>.shift, or .positive           () or (S,) where the quantizer is a grid of another kind (see `grids`)
    <layer>.branch.left, .right               (O, r) and (r, K) float32: the low-rank part of a weight
    <layer>.feature.codes, .scale, .zero_point  (S, C) uint8, (S,), (S,): outputs known beforehand (temporal cache)
    correction.timesteps, .gain, .mean        (S,), (S,), (S, C) where answers are corrected
    <layer>.bias, <norm>.weight, <norm>.bias  float32

with K = kh * kw * C, and the recipe (method, bits, calibration, seeds) in the metadata.

Fake quantization only: a layer computes in float32 with weights and inputs that lie on the grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import io
from ..diffusion.denoiser import NoisePredictor
from ..diffusion.model import DiffusionModel, find, frame
from ..diffusion.sampling import Images, timestep_sequence
from ..errors import CheckpointError, RangeError
from ..nn.networks import Network
from ..ref import pack_int4, unpack_int4
from .affine import QParams, QSpec, dequantize
from .correction import Correction
from .grids import Grid, GridTable, described, from_file
from .observers import StepTable
from .split import is_split, split_shortcuts
from .wrap import ActivationQuantizer, QuantLayer, activation_quantizers, wrap


@dataclass(frozen=True, eq=False)
class FeatureCache:
    """Quantized outputs of a layer that sees the time-step alone, for each of the sampler's steps.

    Attributes
    ----------
    codes : uint8 array, (S, C)
    table : StepTable
    """

    codes: NDArray[np.uint8]
    table: StepTable

    def row(self, step: int) -> NDArray[np.float32]:
        """The output (C,) at this step."""
        return dequantize(self.codes[step], self.table[step])


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A diffusion model with quantizers on its layers.

    Attributes
    ----------
    base : DiffusionModel
        Its network is the float original (or, after loading, a frame whose wrapped weights are not used).
    network : UNet or DiT
        The wrapped copy that computes with quantized weights and inputs.
    layers : dict of str to QuantLayer
        By name.
    recipe : dict
        Method, bits, calibration and seeds: everything needed to make it again.
    features : dict of str to FeatureCache
        By layer name, for layers that are not run any more.
    correction : Correction, optional
    seconds : dict of str to float
        What each phase of the calibration took. Not in the file: equal recipes give equal bytes.
    """

    base: DiffusionModel
    network: Network
    layers: dict[str, QuantLayer]
    recipe: dict[str, Any]
    features: dict[str, FeatureCache] = field(default_factory=dict)
    correction: Correction | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def denoiser(self) -> NoisePredictor:
        """Return the noise predictor for samplers, which must take the steps that tables were made for.

        Not to be called from two threads at once where there are tables: the step in force belongs to the model.

        Returns
        -------
        NoisePredictor
        """
        predict = self.base.denoiser(self.network)

        visited = self.timesteps() if self.has_tables() else None

        def eps(x: Images, t: int, step: int, y: NDArray[np.integer] | None = None) -> Images:
            if visited is not None:
                if not 0 <= step < len(visited) or visited[step] != t:
                    raise RangeError(
                        f"step {step}, t = {t} has no row in this model's tables: they are for a sampler of "
                        f"{len(visited)} steps, t = {visited[0]} to {visited[-1]}. Sample with as many steps."
                    )
                self.at_step(step)
            return predict(x, t, step, y)

        return eps if self.correction is None else self.correction.applied(eps)

    def has_tables(self) -> bool:
        """Tell whether anything depends on the sampler's step."""
        return bool(self.features) or any(q.table is not None for q in self.quantizers().values())

    def at_step(self, step: int) -> None:
        """Put all tables at this step of the sampler, 0 the noisiest."""
        for quantizer in self.quantizers().values():
            quantizer.at_step(step)
        for name, cache in self.features.items():
            self.layers[name].row = cache.row(step)

    def timesteps(self) -> NDArray[np.int64]:
        """Time-steps of the sampler that the model was calibrated for, noisiest first."""
        steps = self.recipe["calibration"]["steps"]
        return np.array(timestep_sequence(self.base.schedule.timesteps, steps, "uniform"))

    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """All activation quantizers by name, whether set or not."""
        return self._quantizers

    @cached_property
    def _quantizers(self) -> dict[str, ActivationQuantizer]:
        # a walk through the tree takes 0.4 ms, at every step; whether a quantizer holds a table may still change
        return activation_quantizers(self.network)

    def float_parameters(self) -> dict[str, np.ndarray]:
        """Return what stays float32: normalisations, biases, and weights without a quantizer."""
        dropped = {f"{name}.weight" for name, layer in self.layers.items() if layer.codes is not None}
        dropped |= {f"{name}.{part}" for name in self.features for part in ("weight", "bias")}
        return {k: v for k, v in self.base.network.state_dict().items() if k not in dropped}

    def tensors(self) -> dict[str, np.ndarray]:
        """Return all arrays of the file."""
        return dict(self._arrays())

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Names and arrays of the file, each made when it is asked for."""
        yield from self.float_parameters().items()
        for name, layer in self.layers.items():
            w = layer.weight_qparams
            if layer.codes is not None and w is not None and name not in self.features:
                codes = (layer.codes.astype(np.int16) - w.spec.qmin).astype(np.uint8).reshape(len(layer.codes), -1)
                yield f"{name}.codes", pack_int4(codes) if w.spec.bits <= 4 else codes
                yield f"{name}.weight_scale", w.scale
                yield f"{name}.weight_zero_point", w.zero_point
        for name, quantizer in self._used().items():
            q = quantizer.table or quantizer.qparams
            arrays = {"scale": q.scale, "zero_point": q.zero_point} if isinstance(q, QParams) else q.arrays()
            yield from ((f"{name}.{key}", value) for key, value in arrays.items())
        for name, layer in self.layers.items():
            if layer.branch is not None:
                yield from zip((f"{name}.branch.left", f"{name}.branch.right"), layer.branch, strict=True)
        for name, cache in self.features.items():
            yield f"{name}.feature.codes", cache.codes
            yield from ((f"{name}.feature.{key}", value) for key, value in cache.table.arrays().items())
        if self.correction is not None:
            yield from ((f"correction.{key}", value) for key, value in self.correction.arrays().items())

    def size_bytes(self) -> int:
        """Count the bytes of all arrays in the file: what the weights and tables take."""
        return sum(array.nbytes for _, array in self._arrays())

    def save(self, path: Path) -> None:
        """Write the file (see `refquant.io.save` for the errors)."""
        specs = {
            "weights": {
                name: asdict(layer.weight_qparams.spec)
                for name, layer in self.layers.items()
                if layer.weight_qparams is not None and name not in self.features
            },
            "activations": {n: _described(q.table or q.qparams) for n, q in self._used().items()},
            "features": {name: asdict(cache.table.spec) for name, cache in self.features.items()},
        }
        base = self.base
        facts = {
            "kind": "quantized",
            "model": base.name,
            "network": base.network.cfg.to_json(),
            "network_kind": base.network.cfg.kind,
            "schedule": base.schedule.name,
            "timesteps": base.schedule.timesteps,
            "prediction": base.prediction,
            "split": is_split(base.network),
            "recipe": self.recipe,
            "specs": specs,
        }
        io.save(path, self.tensors(), facts)

    def _used(self) -> dict[str, ActivationQuantizer]:
        """Quantizers that are set and reached; those of layers with known outputs are not."""
        idle = {self.layers[name].input.name for name in self.features}
        return {n: q for n, q in self.quantizers().items() if q.qparams is not None and n not in idle}


def load_quantized(name: str) -> QuantizedModel:
    """Load a file that `QuantizedModel.save` wrote; raises CheckpointError where anything does not fit."""
    found = io.load(find(name), kind="quantized")
    facts, tensors = found.metadata, dict(found.tensors)
    try:
        base = frame(facts["model"], facts, facts.get("network_kind", "unet"))  # of old, all were UNets
        if facts["split"]:
            base = split_shortcuts(base)
        shapes = {key: p.shape for key, p in base.network.named_parameters()}
        specs = {group: {k: v if "kind" in v else QSpec(**v) for k, v in facts["specs"][group].items()}
                 for group in facts["specs"]}  # fmt: skip
        codes = {layer: _pop_codes(tensors, layer, spec, shapes[f"{layer}.weight"])
                 for layer, spec in specs["weights"].items()}  # fmt: skip
        inputs = {key: _pop_quantizer(tensors, key, spec) for key, spec in specs["activations"].items()}
        features = {}
        for layer, spec in specs["features"].items():
            rows = tensors.pop(f"{layer}.feature.codes")
            table = _pop_quantizer(tensors, f"{layer}.feature", spec)
            if not isinstance(table, StepTable) or rows.shape != (len(table), shapes[f"{layer}.weight"][0]):
                raise ValueError(f"{layer}.feature has codes {rows.shape}")
            if rows.dtype != np.uint8 or rows.max() > spec.qmax:
                raise ValueError(f"{layer}.feature has codes that are not those of {spec.bits} bits")
            features[layer] = FeatureCache(rows, table)
        steps = facts["recipe"]["calibration"]["steps"]
        stepped = (StepTable, GridTable)
        tables = [q for q in inputs.values() if isinstance(q, stepped)] + [f.table for f in features.values()]
        branches = {layer: [tensors.pop(f"{layer}.branch.{side}") for side in ("left", "right")]
                    for layer in codes if f"{layer}.branch.left" in tensors}  # fmt: skip
        if any(len(table) != steps for table in tables):
            raise ValueError(f"tables of {sorted({len(t) for t in tables})} steps for a sampler of {steps}")
        noted = {k.removeprefix("correction."): tensors.pop(k) for k in list(tensors) if k.startswith("correction.")}
        correction = Correction(**noted) if noted else None
        # what is not stored is not used either
        unused = {f"{layer}.weight" for layer in codes} | {
            f"{f}.{part}" for f in features for part in ("weight", "bias")
        }
        if extra := sorted(tensors.keys() & unused):
            raise ValueError(f"{extra[0]} is there twice, in float and quantized")
        base.network.load_state_dict(tensors, unused)
        network, layers = wrap(base.network)
        for layer, (integers, w) in codes.items():
            layers[layer].set_codes(integers, w)
            if layer in branches:
                layers[layer].branch = _checked_branch(branches[layer], shapes[f"{layer}.weight"])
        quantizers = activation_quantizers(network)
        for key, quantizer in inputs.items():
            quantizers[key].set(quantizer)
        return QuantizedModel(base, network, layers, facts["recipe"], features, correction)
    except (KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(
            f"{found.path}: its layers and their quantizers do not fit together ({problem}). "
            "Make it again with `refquant quantize`."
        ) from problem


def _pop_codes(
    tensors: dict[str, NDArray[Any]], layer: str, spec: QSpec, shape: tuple[int, ...]
) -> tuple[NDArray[np.integer], QParams]:
    w = QParams(tensors.pop(f"{layer}.weight_scale"), tensors.pop(f"{layer}.weight_zero_point"), spec)
    stored = tensors.pop(f"{layer}.codes")
    flat = unpack_int4(stored, int(np.prod(shape[1:]))) if spec.bits <= 4 else stored
    if stored.ndim != 2 or stored.dtype != np.uint8 or flat.max() > spec.qmax - spec.qmin:
        raise ValueError(f"{layer} has codes that are not those of {spec.bits} bits")
    return (flat.reshape(shape).astype(np.int16) + spec.qmin).astype(spec.dtype), w


def _described(quantizer: QParams | StepTable | Grid | GridTable) -> dict[str, Any]:
    return asdict(quantizer.spec) if isinstance(quantizer, (QParams, StepTable)) else described(quantizer)


def _checked_branch(branch: list[NDArray[Any]], shape: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
    left, right = branch
    if left.shape[1:] != right.shape[:1] or (len(left), *right.shape[1:]) != shape:
        raise ValueError(f"a branch of {left.shape} and {right.shape} beside a weight {shape}")
    return left, right


def _pop_quantizer(
    tensors: dict[str, NDArray[Any]], name: str, spec: QSpec | dict[str, Any]
) -> QParams | StepTable | Grid | GridTable:
    if isinstance(spec, dict):
        own = [key for key in tensors if key.rpartition(".")[0] == name]
        return from_file(spec, {key.rpartition(".")[2]: tensors.pop(key) for key in own})
    scale, zero_point = tensors.pop(f"{name}.scale"), tensors.pop(f"{name}.zero_point")
    return StepTable(scale, zero_point, spec) if scale.ndim else QParams(scale, zero_point, spec)
