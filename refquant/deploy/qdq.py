"""What UNets and transformers written down as ONNX have in common: weights, roundings, the noise, the model's facts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._version import __version__
from ..errors import LoweringError
from ..quant.affine import QParams
from ..quant.quantized import QuantizedModel
from ..quant.wrap import ActivationQuantizer, QuantLayer
from .onnx_graph import Graph

Arrange = Callable[[NDArray[Any]], NDArray[Any]]


class Writer:
    """A graph in the making: nodes, appended to in the order of the network's forward pass.

    Parameters
    ----------
    quantized : QuantizedModel
    step : int or None
        Of the sampler, where the graph is for that one alone.
    results : mapping of str to QParams
        By the names of layers: round what they give.
    """

    def __init__(self, quantized: QuantizedModel, step: int | None, results: Mapping[str, QParams]) -> None:
        self.quantized, self.network, self.results = quantized, quantized.network, results
        self.timesteps, self.graph = quantized.timesteps(), Graph(step)
        self.names = {id(module): name for name, module in self.network.named_modules()}

    def _finished(self) -> Any:
        """The model, with what a sampler has to know as its properties."""
        base, cfg = self.quantized.base, self.network.cfg
        alpha_bar = [float(a) for a in base.schedule.alpha_bar[self.timesteps]]
        facts = {
            "refquant": __version__, "model": base.name, "recipe": json.dumps(self.quantized.recipe),
            "timesteps": json.dumps(self.timesteps.tolist()), "alpha_bar": json.dumps(alpha_bar),
        }  # fmt: skip
        if self.graph.step is not None:
            facts["step"] = str(self.graph.step)
        shape = (cfg.image_channels, cfg.image_size, cfg.image_size)
        return self.graph.model(cfg.kind, shape, "refquant", facts, classes=cfg.classes > 0)

    def _noise(self, answer: str) -> None:
        """From the network's answer to ``eps``: of v the noise, and the correction's mean and gain."""
        base, node, correction = self.quantized.base, self.graph.node, self.quantized.correction
        if base.prediction == "v":
            ab = base.schedule.alpha_bar[self.timesteps]
            of_x = self.graph.of_step("sqrt(1 - alpha_bar)", np.sqrt(1 - ab).astype(np.float32))
            of_v = self.graph.of_step("sqrt(alpha_bar)", np.sqrt(ab).astype(np.float32))
            terms = [node("Mul", ["x", of_x], "x.part"), node("Mul", [answer, of_v], "v.part")]
            answer = node("Add", terms, "noise")
        if correction is not None:
            mean = correction.mean.astype(np.float32).reshape(len(correction.mean), 1, -1, 1, 1)
            centred = node("Sub", [answer, self.graph.of_step("correction.mean", mean)], "centred")
            gain = self.graph.of_step("correction.gain", correction.gain.astype(np.float32))
            answer = node("Div", [centred, gain], "corrected")
        node("Identity", [answer], "eps")

    def _weight(self, layer: QuantLayer, arrange: Arrange, axis: int) -> str:
        """A weight in another order of axes, with its outputs along `axis`: float, or codes and what they stand for.

        Codes are stored without their zero point, q - z, where that is a byte, else q and z are.
        """
        if layer.branch is not None:
            raise LoweringError(f"{layer.name} has no QDQ form: it has a low-rank branch beside its codes.")
        q, graph, name = layer.weight_qparams, self.graph, layer.name
        if layer.codes is None or q is None:
            return graph.constant(f"{name}.weight", arrange(layer.layer.weight.data))
        if len(q.scale) != len(layer.codes):
            raise LoweringError(f"{name} has no QDQ form: its weight has scales for groups of inputs.")
        codes = arrange(layer.codes)
        zero = np.expand_dims(q.zero_point, [i for i in range(codes.ndim) if i != axis])
        apart = codes.astype(np.int32) - zero
        inputs = [f"{name}.codes", graph.constant(f"{name}.weight_scale", q.scale)]
        if apart.min() >= -128 and apart.max() <= 127:
            if codes.min() >= -8 and codes.max() <= 7:
                # arithmetic on bytes is not for all runtimes, that on int32 is; and nothing of it is left after loading
                kinds, node = graph.onnx.TensorProto, graph.node
                wide = node("Cast", [graph.int4(f"{name}.int4", codes)], f"{name}.int32", to=kinds.INT32)
                wide = node("Sub", [wide, graph.constant(f"{name}.weight_zero_point", zero)], f"{name}.apart")
                node("Cast", [wide], f"{name}.codes", to=kinds.INT8)
            else:
                graph.constant(f"{name}.codes", apart.astype(np.int8))
        elif q.zero_is_exact:
            graph.constant(f"{name}.codes", codes)
            inputs.append(graph.constant(f"{name}.weight_zero_point", q.zero_point.astype(q.spec.dtype)))
        else:
            raise LoweringError(f"{name} has no QDQ form: a zero point of its weight is no code of 8 bits.")
        return graph.node("DequantizeLinear", inputs, f"{name}.weight", axis=axis)

    def _rounded(self, quantizer: ActivationQuantizer, x: str, where: str = "") -> str:
        """x rounded to the grid of a quantizer, if it has one; `where` tells two roundings of one quantizer apart."""
        q, table = quantizer.qparams, quantizer.table
        if q is None:
            return x
        if not isinstance(q, QParams):
            raise LoweringError(f"{quantizer.name} has no QDQ form: its grid, {q.kind}, is no scale and zero point.")
        scales, zeros = (q.scale[None], q.zero_point[None]) if table is None else (table.scale, table.zero_point)
        return self._pair(quantizer.name, q, scales, zeros, x, where)

    def _result(self, layer: QuantLayer, y: str) -> str:
        """What an integer layer gives, rounded where `results` says how."""
        if layer.name not in self.results or layer.codes is None or layer.input.qparams is None:
            return y
        q = self.results[layer.name]
        return self._pair(f"{layer.name}.result", q, q.scale[None], q.zero_point[None], y, "")

    def _pair(
        self, name: str, q: QParams, scales: NDArray[np.float32], zeros: NDArray[np.int32], x: str, where: str
    ) -> str:
        """QuantizeLinear and DequantizeLinear with the scale and zero point of the step, of (S,) or (1,)."""
        spec, node = q.spec, self.graph.node
        if not ((spec.qmin <= zeros) & (zeros <= spec.qmax)).all():
            raise LoweringError(f"{name} has no QDQ form: a zero point is no code of {spec.bits} bits.")
        of_step = self.graph.of_step
        how = [of_step(f"{name}.scale", scales), of_step(f"{name}.zero_point", zeros.astype(spec.dtype))]
        own = f"{name}.{where}" if where else name
        if spec.bits < 8:  # a byte has more codes than the quantizer: keep x in the reach of its own
            ends = [(end - zeros).astype(np.float32) * scales for end in (spec.qmin, spec.qmax)]
            low, high = (of_step(f"{name}.{e}", a) for e, a in zip(("low", "high"), ends, strict=True))
            x = node("Clip", [x, low, high], f"{own}.clipped")
        codes = node("QuantizeLinear", [x, *how], f"{own}.codes")
        return node("DequantizeLinear", [codes, *how], own)
