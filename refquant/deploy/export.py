"""A quantized model as an ONNX network, for other runtimes: QuantizeLinear and DequantizeLinear around every product.

    eps = graph(x (N, C, H, W), step)           the noise predictor: what a sampler calls, at this step of the sampler

Where this package multiplies integers, the graph holds the pattern that runtimes recognise,

    codes of weights -> DequantizeLinear ------------------------v
    x -> QuantizeLinear -> DequantizeLinear -> Conv (MatMul) -> ...

and everything between the products is float32, as it is here. In exact arithmetic it is the function that
`--engine fake` computes; float sums in another order move codes on the edge of two.

What is known before sampling is computed now, as in `refquant.deploy.lower`: the temporal features of every step are
rows of a table, which ``step`` looks up. So are scales that depend on the step (finite set calibration) and what makes
noise out of v, or corrects it. Runtimes multiply integers only where scales are constant; with scales in tables they
compute in float32, unless `step` says which step the graph is for.

Weights. Runtimes want codes of int8 whose zero is 0. The codes of a weight without their zero point, q - z, are just
that where they fit a byte, as they do up to 7 bits. Up to 4 bits, q is stored in half a byte and z subtracted in the
graph, once, when it is loaded. Asymmetric weights of 8 bits keep their zero points (ONNX Runtime multiplies those in
integers, too; OpenVINO in float32).

Results. ONNX Runtime has an integer convolution for results that are rounded to 8 bits as well. Where `results` gives
their quantizers (`refquant.deploy.results` measures them), they are: a second rounding that this package does without.

Errors: `LoweringError` with the layer's name where something has no such form: zero points that are no codes, grids
that are no scale and zero point, weights with scales for groups of inputs or with a low-rank branch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._version import __version__
from ..errors import LoweringError, RangeError
from ..nn.layers import GroupNorm
from ..nn.unet import AttentionBlock, Level, ResBlock, UNet
from ..quant.affine import QParams
from ..quant.quantized import QuantizedModel
from ..quant.split import SplitConv
from ..quant.temporal import features
from ..quant.wrap import ActivationQuantizer, QuantAttention, QuantLayer
from .onnx_graph import Graph


def export(model: QuantizedModel, *, step: int | None = None, results: Mapping[str, QParams] | None = None) -> Any:
    """Write a quantized model down as an ONNX network.

    Parameters
    ----------
    model : QuantizedModel
        Of a UNet, by any method, with any coverage: what is not quantized is float32 in the graph, too.
    step : int, optional
        Make a graph for this step of the sampler alone, without tables and without the input ``step``.
    results : mapping of str to QParams, optional
        By the names of convolutions: also round what they give.

    Returns
    -------
    onnx.ModelProto
        Its properties hold the sampler's time-steps and their alpha_bar, as JSON lists.

    Raises
    ------
    LoweringError
        Something has no such form; the message names it.
    RangeError
        There is no such step.
    RefquantError
        The package onnx is missing.
    """
    steps = len(model.timesteps())
    if step is not None and not 0 <= step < steps:
        raise RangeError(f"step is {step}; this model's sampler has {steps}, from 0 (the noisiest) to {steps - 1}.")
    if not isinstance(model.network, UNet):
        raise LoweringError(f"{model.base.name} has no QDQ form: it is a {model.base.network.cfg.kind}, not a unet.")
    return _Export(model, step, results or {}).model()


class _Export:
    """Walks through the network as its forward pass does, and writes nodes down instead of computing."""

    def __init__(self, quantized: QuantizedModel, step: int | None, results: Mapping[str, QParams]) -> None:
        self.quantized, self.network, self.results = quantized, quantized.network, results
        self.timesteps, self.graph = quantized.timesteps(), Graph(step)
        self.names = {id(module): name for name, module in self.network.named_modules()}
        self.size = self.network.cfg.image_size  # of the images where the walk is now
        rows: list[dict[str, NDArray[np.float32]]] = []
        for index, t in enumerate(self.timesteps):
            quantized.at_step(index)
            rows.append(features(self.network, np.array([t])))
        self.features = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}  # (S, C)

    def model(self) -> Any:
        net, cfg = self.network, self.network.cfg
        h = self._conv(net.conv_in, "x")
        skips = [h]
        for level in net.down:
            for i in range(cfg.blocks):
                h = self._level(level, i, h, None)
                skips.append(h)
            if hasattr(level, "downsample"):
                h = self._conv(level.downsample.conv, h)
                self.size //= 2
                skips.append(h)
        h = self._block(net.mid.block_2, self._attend(net.mid.attn_1, self._block(net.mid.block_1, h, None)), None)
        for level in reversed(net.up):
            for i in range(cfg.blocks + 1):
                h = self._level(level, i, h, skips.pop())
            if hasattr(level, "upsample"):
                h = self._upsample(level.upsample.conv, h)
        answer = self._conv(net.conv_out, self._norm(net.norm_out, h, silu=True))
        self._noise(answer)
        base, recipe = self.quantized.base, self.quantized.recipe
        alpha_bar = [float(a) for a in base.schedule.alpha_bar[self.timesteps]]
        facts = {
            "refquant": __version__, "model": base.name, "recipe": json.dumps(recipe),
            "timesteps": json.dumps(self.timesteps.tolist()), "alpha_bar": json.dumps(alpha_bar),
        }  # fmt: skip
        if self.graph.step is not None:
            facts["step"] = str(self.graph.step)
        return self.graph.model((cfg.image_channels, cfg.image_size, cfg.image_size), "refquant", facts)

    # --- parts of the network ---

    def _level(self, level: Level, i: int, x: str, skip: str | None) -> str:
        h = self._block(level.block[i], x, skip)
        return self._attend(level.attn[i], h) if level.attn else h

    def _block(self, block: ResBlock, x: str, skip: str | None) -> str:
        """A ResBlock; on the way up of x beside what was skipped."""
        name, node = self.names[id(block)], self.graph.node
        both = x if skip is None else node("Concat", [x, skip], f"{name}.concat", axis=1)
        feature = self.features[f"{name}.temb_proj"]
        h = self._conv(block.conv1, self._norm(block.norm1, both, silu=True))
        row = self.graph.of_step(f"{name}.feature", feature.reshape(len(feature), 1, -1, 1, 1))
        h = self._conv(block.conv2, self._norm(block.norm2, node("Add", [h, row], f"{name}.told"), silu=True))
        shortcut = getattr(block, "nin_shortcut", None)
        if isinstance(shortcut, SplitConv):  # two parts of the concatenation, each with quantizers of its own
            assert skip is not None
            parts = [self._conv(part, part_x) for part, part_x in zip(shortcut.part, (x, skip), strict=True)]
            both = node("Add", parts, f"{name}.nin_shortcut")
        elif shortcut is not None:
            both = self._conv(shortcut, both)
        return node("Add", [both, h], name)

    def _attend(self, block: AttentionBlock, x: str) -> str:
        name, product, node = self.names[id(block)], block.product, self.graph.node
        if not isinstance(product, QuantAttention):
            raise LoweringError(f"{name}: its attention product is not wrapped.")
        channels, tokens = block.q.layer.weight.shape[0], self.size**2
        normed = self._norm(block.norm, x, silu=False)
        flat = self.graph.constant(f"tokens {channels}x{tokens}", np.array([0, channels, tokens]))

        def tokens_of(layer: QuantLayer, quantizer: ActivationQuantizer, transposed: bool) -> str:
            # rounded before it moves, so that codes move, and "again" after it, which changes nothing: runtimes
            # want the pair right behind the convolution and right before the product
            y = self._conv(layer, normed, rounded=quantizer.qparams is None)
            y = node("Reshape", [self._rounded(quantizer, y), flat], f"{layer.name}.tokens")
            if transposed:
                y = node("Transpose", [y], f"{layer.name}.transposed", perm=[0, 2, 1])
            return self._rounded(quantizer, y, "again")

        q, v = tokens_of(block.q, product.q, True), tokens_of(block.v, product.v, True)  # (N, L, C)
        k = tokens_of(block.k, product.k, False)  # (N, C, L)
        factor = self.graph.constant(f"{name}.factor", np.float32(1 / np.sqrt(channels)))
        scores = node("Mul", [node("MatMul", [q, k], f"{name}.product"), factor], f"{name}.scores")
        probs = self._rounded(product.probs, node("Softmax", [scores], f"{name}.softmax", axis=-1))
        mixed = self._rounded(block.proj_out.input, node("MatMul", [probs, v], f"{name}.mixed"), "before")
        shape = self._image_shape(channels)
        image = node("Transpose", [mixed], f"{name}.transposed", perm=[0, 2, 1])
        image = node("Reshape", [image, shape], f"{name}.image")
        return node("Add", [x, self._conv(block.proj_out, image)], name)

    def _upsample(self, conv: QuantLayer, x: str) -> str:
        """Round before pixels are repeated, and once more after it, which changes nothing."""
        twice = self.graph.constant("twice", np.array([1, 1, 2, 2], np.float32))
        inputs = [self._rounded(conv.input, x, "before"), "", twice]
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        wide = self.graph.node("Resize", inputs, f"{conv.name}.upsampled", **how)
        self.size *= 2
        return self._conv(conv, wide)

    def _norm(self, norm: GroupNorm, x: str, *, silu: bool) -> str:
        """Group normalisation by parts that all runtimes fuse: normalised groups, then scale and shift."""
        name, (node, constant) = self.names[id(norm)], (self.graph.node, self.graph.constant)
        channels, groups = norm.weight.data.size, norm.groups
        apart = constant(f"groups {groups}", np.array([0, groups, -1]))
        plain = [constant(f"ones {groups}", np.ones(groups, np.float32)),
                 constant(f"zeros {groups}", np.zeros(groups, np.float32))]  # fmt: skip
        y = node("Reshape", [x, apart], f"{name}.groups")
        y = node("InstanceNormalization", [y, *plain], f"{name}.normalised", epsilon=norm.eps)
        y = node("Reshape", [y, self._image_shape(channels)], f"{name}.image")
        y = node("Mul", [y, constant(f"{name}.weight", norm.weight.data.reshape(1, -1, 1, 1))], f"{name}.scaled")
        y = node("Add", [y, constant(f"{name}.bias", norm.bias.data.reshape(1, -1, 1, 1))], name)
        return node("Mul", [y, node("Sigmoid", [y], f"{name}.sigmoid")], f"{name}.silu") if silu else y

    def _image_shape(self, channels: int) -> str:
        """The shape (N, channels, size, size), for Reshape: 0 keeps N."""
        return self.graph.constant(f"image {channels}x{self.size}", np.array([0, channels, self.size, self.size]))

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

    # --- one layer ---

    def _conv(self, layer: QuantLayer, x: str, *, rounded: bool = True) -> str:
        """A convolution of its rounded input; `rounded`: and what it gives, where `results` says how."""
        conv, constant = layer.layer, self.graph.constant
        if layer.branch is not None:
            raise LoweringError(f"{layer.name} has no QDQ form: it has a low-rank branch beside its codes.")
        quantized = layer.codes is not None and layer.input.qparams is not None
        weight = self._weight(layer) if layer.codes is not None else constant(
            f"{layer.name}.weight", conv.weight.data.transpose(0, 3, 1, 2))  # fmt: skip
        top, bottom, left, right = conv.pads
        how = {"kernel_shape": conv.weight.shape[1:3], "strides": [conv.stride] * 2, "pads": [top, left, bottom, right]}
        inputs = [self._rounded(layer.input, x), weight, constant(f"{layer.name}.bias", conv.bias.data)]
        y = self.graph.node("Conv", inputs, layer.name, **how)
        if rounded and quantized and layer.name in self.results:
            q = self.results[layer.name]
            y = self._pair(f"{layer.name}.result", q, q.scale[None], q.zero_point[None], y, "")
        return y

    def _weight(self, layer: QuantLayer) -> str:
        """The codes (O, C, kh, kw) of a weight, dequantized: q - z where that is a byte, else q and z."""
        q, graph, name = layer.weight_qparams, self.graph, layer.name
        if len(q.scale) != len(layer.codes):
            raise LoweringError(f"{name} has no QDQ form: its weight has scales for groups of inputs.")
        codes, zero = layer.codes.transpose(0, 3, 1, 2), q.zero_point.reshape(-1, 1, 1, 1)
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
        return graph.node("DequantizeLinear", inputs, f"{name}.weight", axis=0)

    def _rounded(self, quantizer: ActivationQuantizer, x: str, where: str = "") -> str:
        """x rounded to the grid of a quantizer, if it has one; `where` tells two roundings of one quantizer apart."""
        q, table = quantizer.qparams, quantizer.table
        if q is None:
            return x
        if not isinstance(q, QParams):
            raise LoweringError(f"{quantizer.name} has no QDQ form: its grid, {q.kind}, is no scale and zero point.")
        scales, zeros = (q.scale[None], q.zero_point[None]) if table is None else (table.scale, table.zero_point)
        return self._pair(quantizer.name, q, scales, zeros, x, where)

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
