"""A quantized model: the float model's frame, integer weights, and the quantizers of its activations.

One safetensors file of kind "quantized" holds it:

    <layer>.codes             weight codes minus qmin, uint8 (O, K), or two to a byte where bits <= 4
    <layer>.weight_scale, .weight_zero_point     (O,) float32 and int32
    <layer>.input_scale, .input_zero_point       () float32 and int32
    <layer>.bias, <norm>.weight, <norm>.bias     float32

with K = kh * kw * C, and the recipe (method, bits, calibration, seeds) in the metadata.

Fake quantization only: a layer computes in float32 with weights and inputs that lie on the grid.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import io
from ..diffusion.denoiser import Denoiser
from ..diffusion.model import DiffusionModel, find, frame
from ..errors import CheckpointError
from ..nn.unet import UNet
from ..ref import pack_int4, unpack_int4
from .affine import QParams, QSpec
from .wrap import QuantLayer, wrap


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A diffusion model with quantizers on its layers.

    Attributes
    ----------
    base : DiffusionModel
        Its network is the float original (or, after loading, a frame whose wrapped weights are not used).
    network : UNet
        The wrapped copy that computes with quantized weights and inputs.
    layers : dict of str to QuantLayer
        By name.
    recipe : dict
        Method, bits, calibration and seeds: everything needed to make it again.
    """

    base: DiffusionModel
    network: UNet
    layers: dict[str, QuantLayer]
    recipe: dict[str, Any]

    def denoiser(self) -> Denoiser:
        """Return the noise predictor for samplers."""
        return self.base.denoiser(self.network)

    def float_parameters(self) -> dict[str, np.ndarray]:
        """Return what stays float32: normalisations, biases, and weights without a quantizer."""
        quantized = {f"{name}.weight" for name, layer in self.layers.items() if layer.codes is not None}
        return {k: v for k, v in self.base.network.state_dict().items() if k not in quantized}

    def tensors(self) -> dict[str, np.ndarray]:
        """Return all arrays of the file."""
        out = self.float_parameters()
        for name, layer in self.layers.items():
            w, x = layer.weight_qparams, layer.input_qparams
            if layer.codes is not None and w is not None:
                codes = (layer.codes.astype(np.int16) - w.spec.qmin).astype(np.uint8).reshape(len(layer.codes), -1)
                out[f"{name}.codes"] = pack_int4(codes) if w.spec.bits <= 4 else codes
                out[f"{name}.weight_scale"], out[f"{name}.weight_zero_point"] = w.scale, w.zero_point
            if x is not None:
                out[f"{name}.input_scale"], out[f"{name}.input_zero_point"] = x.scale, x.zero_point
        return out

    def size_bytes(self) -> int:
        """Count the bytes of all arrays in the file: what the weights and tables take."""
        return sum(a.nbytes for a in self.tensors().values())

    def save(self, path: Path) -> None:
        """Write the file (see `refquant.io.save` for the errors)."""
        specs = {
            name: {
                "weight": asdict(layer.weight_qparams.spec) if layer.weight_qparams else None,
                "input": asdict(layer.input_qparams.spec) if layer.input_qparams else None,
            }
            for name, layer in self.layers.items()
        }
        base = self.base
        facts = {
            "kind": "quantized",
            "model": base.name,
            "network": base.network.cfg.to_json(),
            "schedule": base.schedule.name,
            "timesteps": base.schedule.timesteps,
            "prediction": base.prediction,
            "recipe": self.recipe,
            "specs": specs,
        }
        io.save(path, self.tensors(), facts)


def load_quantized(name: str) -> QuantizedModel:
    """Load a file that `QuantizedModel.save` wrote; raises CheckpointError where anything does not fit."""
    found = io.load(find(name), kind="quantized")
    facts, tensors = found.metadata, dict(found.tensors)
    try:
        base = frame(facts["model"], facts)
        _, unquantized = wrap(base.network)
        codes: dict[str, tuple[np.ndarray, QParams]] = {}
        inputs: dict[str, QParams] = {}
        for layer, spec in facts["specs"].items():
            shape = unquantized[layer].layer.weight.shape
            if spec["weight"] is not None:
                w = QParams(tensors.pop(f"{layer}.weight_scale"), tensors.pop(f"{layer}.weight_zero_point"),
                            QSpec(**spec["weight"]))  # fmt: skip
                stored = tensors.pop(f"{layer}.codes")
                flat = unpack_int4(stored, int(np.prod(shape[1:]))) if w.spec.bits <= 4 else stored
                integers = (flat.reshape(shape).astype(np.int16) + w.spec.qmin).astype(w.spec.dtype)
                codes[layer] = integers, w
                tensors[f"{layer}.weight"] = np.zeros(shape, np.float32)  # the frame's own weight is not used
            if spec["input"] is not None:
                inputs[layer] = QParams(tensors.pop(f"{layer}.input_scale"), tensors.pop(f"{layer}.input_zero_point"),
                                        QSpec(**spec["input"]))  # fmt: skip
    except (KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(
            f"{found.path}: its layers and their quantizers do not fit together ({problem}). "
            "Make it again with `refquant quantize`."
        ) from problem
    base.network.load_state_dict(tensors)
    network, layers = wrap(base.network)
    for name_, (integers, w) in codes.items():
        layers[name_].set_codes(integers, w)
    for name_, x in inputs.items():
        layers[name_].input_qparams = x
    return QuantizedModel(base, network, layers, facts["recipe"])
