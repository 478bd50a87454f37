"""What lowering a UNet and a transformer have in common: values, operations, and the integer form of one layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import LoweringError
from ..kernels import Dequantize, PackedWeights, pack_weights
from ..quant.affine import QParams
from ..quant.grids import Grid
from ..quant.quantized import QuantizedModel
from ..quant.wrap import ActivationQuantizer, QuantLayer
from ..ref import max_k
from .program import Operation, Value


class Lowering:
    """A program in the making: values and operations, appended to in the order of the network's forward pass.

    Parameters
    ----------
    model : QuantizedModel
    """

    def __init__(self, model: QuantizedModel) -> None:
        self.model, self.network = model, model.network
        self.timesteps = model.timesteps()
        self.names = {id(module): name for name, module in self.network.named_modules()}
        self.values: list[Value] = []
        self.operations: list[Operation] = []

    def _value(self, name: str, shape: tuple[int, ...], codes: bool = False) -> int:
        self.values.append(Value(name, shape, codes))
        return len(self.values) - 1

    def _quantizers(self, quantizer: ActivationQuantizer) -> tuple[QParams | Grid, ...]:
        """One for all steps, or one for each."""
        if quantizer.qparams is None:
            raise LoweringError(f"{quantizer.name} has no integer form: it is float. Quantize it (coverage full).")
        if quantizer.table is None:
            return (quantizer.qparams,)
        return tuple(quantizer.table[step] for step in range(len(self.timesteps)))

    def _params(self, quantizer: ActivationQuantizer) -> tuple[QParams, ...]:
        """The same, of plain scales and zero points."""
        found = self._quantizers(quantizer)
        for q in found:
            if not isinstance(q, QParams):
                raise LoweringError(f"{quantizer.name} has no integer form here: its codes are of kind {q.kind}.")
            if not q.zero_is_exact:
                raise LoweringError(f"{quantizer.name} has no integer form: its zero point is no code.")
        return found

    def _packed(self, layer: QuantLayer) -> PackedWeights:
        """The codes of a layer's weight, a linear layer's as a 1 x 1 window."""
        w = layer.weight_qparams
        if w is None or layer.codes is None:
            raise LoweringError(f"{layer.name} has no integer form: its weight is float. Quantize it (coverage full).")
        if layer.branch is not None:
            raise LoweringError(f"{layer.name} has no integer form: a low-rank part of its weight is float.")
        if w.scale.size not in (1, len(layer.codes)):
            raise LoweringError(
                f"{layer.name} has no integer form: its weight has {w.scale.size} scales for {len(layer.codes)} "
                "outputs, and a sum is scaled once. Quantize without groups."
            )
        self._check_length(layer.name, layer.codes[0].size)
        if not w.zero_is_exact:
            raise LoweringError(f"{layer.name} has no integer form: a zero point of its weight is no code.")
        codes = layer.codes.astype(np.int8)
        return pack_weights(codes, bits=4 if w.spec.bits <= 4 else 8, zero_point=w.zero_point)

    def _outputs(
        self, layer: QuantLayer, scales: NDArray[np.float32], biases: NDArray[np.float32] | None
    ) -> tuple[Dequantize, ...]:
        """What becomes of a layer's sums: input scales (S,) and biases (S, O) of all steps, or one of them for all."""
        w = layer.weight_qparams
        assert w is not None
        of_outputs = np.broadcast_to(w.scale, len(layer.codes))
        steps = max(len(scales), 1 if biases is None else len(biases))
        return tuple(
            Dequantize(
                (scales[s % len(scales)] * of_outputs).astype(np.float32),
                None if biases is None else np.ascontiguousarray(biases[s % len(biases)]),
            )
            for s in range(steps)
        )

    def _check_length(self, name: str, k: int) -> None:
        if k > max_k():
            raise LoweringError(f"{name} has no integer form: {k} products could overflow int32; {max_k()} are safe.")


def scales_of(quantizers: tuple[QParams, ...]) -> NDArray[np.float32]:
    """The scale of each step."""
    return np.array([q.scale for q in quantizers], np.float32)
