"""From a calibrated model to a program of integer operations.

Fake quantization computes s_w (q_w - z_w) times s_x (q_x - z_x) in float32; the integer form takes the same codes and
leaves both scales to the end:

    y[o] = s_x s_w[o] * sum (q_x - z_x) (q_w - z_w[o])  + bias[o] + residual

Nothing is approximated here: a layer's integer sums are exact, and what float32 rounds differently is the one product
and the additions after them. What is known before sampling is computed now: the temporal features of every step
become part of the bias of the convolution before them, so the time MLP and the projections are gone.

A program is made for the steps of one sampler, because tables have one row a step and features one value.

Errors: `LoweringError` with the layer's name and the reason where something has no integer form: a float weight or
input, a zero point that is no code, a sum that could overflow int32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import LoweringError
from ..nn.dit import DiT
from ..nn.layers import Conv2d, GroupNorm
from ..nn.unet import AttentionBlock, Level, ResBlock
from ..quant.quantized import QuantizedModel
from ..quant.split import SplitConv
from ..quant.temporal import features_by_step
from ..quant.wrap import ActivationQuantizer, QuantAttention, QuantLayer
from .lower_dit import TransformerLowering
from .lowering import Lowering, scales_of
from .program import (
    Concat,
    Convolve,
    Encode,
    Mix,
    Norm,
    Pad,
    Probabilities,
    Program,
    Scores,
    Upsample,
)


def lower(model: QuantizedModel) -> Program:
    """Lower a quantized model for the sampler that it was calibrated for.

    Parameters
    ----------
    model : QuantizedModel
        All layers and attention products quantized (coverage "full"), or a `LoweringError` names the first that is
        not.

    Returns
    -------
    Program
    """
    if isinstance(model.network, DiT):
        return TransformerLowering(model).program()
    return _UNetLowering(model).program()


class _UNetLowering(Lowering):
    """Walks through the network as its forward pass does, and writes down operations instead of computing."""

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__(model)
        self.rows = {name: rows[:, 0] for name, rows in features_by_step(model).items()}  # (S, C_i)
        self.encoded: dict[tuple[Any, ...], int] = {}

    def program(self) -> Program:
        net, cfg = self.network, self.network.cfg
        x = self._value("input", (cfg.image_size, cfg.image_size, cfg.image_channels))
        h = self._layer(net.conv_in, x)
        skips = [h]
        for level in net.down:
            for i in range(cfg.blocks):
                h = self._level(level, i, h)
                skips.append(h)
            if hasattr(level, "downsample"):
                h = self._layer(level.downsample.conv, h)
                skips.append(h)
        h = self._block(net.mid.block_2, self._attend(net.mid.attn_1, self._block(net.mid.block_1, h)))
        for level in reversed(net.up):
            for i in range(cfg.blocks + 1):
                h = self._level(level, i, self._concat(h, skips.pop()))
            if hasattr(level, "upsample"):
                h = self._layer(level.upsample.conv, h, upsample=True)
        self._layer(net.conv_out, h, norm=net.norm_out, silu=True)
        return Program(tuple(self.values), tuple(self.operations), self.timesteps)

    # --- parts of the network ---

    def _level(self, level: Level, i: int, x: int) -> int:
        h = self._block(level.block[i], x)
        return self._attend(level.attn[i], h) if level.attn else h

    def _block(self, block: ResBlock, x: int) -> int:
        """conv1 takes the temporal feature into its bias, conv2 the shortcut as its residual."""
        row = self.rows[f"{self.names[id(block)]}.temb_proj"]
        h = self._layer(block.conv1, x, norm=block.norm1, silu=True, rows=row)
        shortcut = x
        if isinstance(getattr(block, "nin_shortcut", None), SplitConv):
            shortcut = self._split(block.nin_shortcut, x)
        elif hasattr(block, "nin_shortcut"):
            shortcut = self._layer(block.nin_shortcut, x)
        return self._layer(block.conv2, h, norm=block.norm2, silu=True, residual=shortcut)

    def _split(self, conv: SplitConv, x: int) -> int:
        """The two parts of a concatenation go their own ways; the second adds the first."""
        concat = next(o for o in self.operations if isinstance(o, Concat) and o.out == x)
        first = self._layer(conv.part[0], concat.x)
        return self._layer(conv.part[1], concat.y, residual=first)

    def _attend(self, block: AttentionBlock, x: int) -> int:
        h, w, c = self.values[x].shape
        product, tokens = block.product, h * w
        if not isinstance(product, QuantAttention):
            raise LoweringError(f"{self.names[id(block)]}: its attention product is not wrapped.")
        floats = {part: self._layer(getattr(block, part), x, norm=block.norm) for part in "qkv"}
        codes = {}
        for part, value in floats.items():
            codes[part] = self._encode(getattr(product, part), value, shape=(tokens, c))
        q, k, v, p = (self._params(quantizer) for quantizer in product.quantizers())
        self._check_length(product.q.name, c), self._check_length(product.probs.name, tokens)
        scores = self._value(f"{product.q.name}.scores", (tokens, tokens))
        self.operations.append(Scores(codes["q"], codes["k"], scores, q, k))
        probs = self._value(product.probs.name, (tokens, tokens), codes=True)
        self.operations.append(Probabilities(scores, probs, p))
        mixed = self._value(f"{product.v.name}.mixed", (h, w, c))
        self.operations.append(Mix(probs, codes["v"], mixed, p, v))
        return self._layer(block.proj_out, mixed, residual=x)

    def _concat(self, x: int, y: int) -> int:
        (h, w, a), (_, _, b) = self.values[x].shape, self.values[y].shape
        out = self._value(f"concat {self.values[x].name}", (h, w, a + b))
        self.operations.append(Concat(x, y, out))
        return out

    # --- one layer ---

    def _layer(
        self, layer: QuantLayer, x: int, *, norm: GroupNorm | None = None, silu: bool = False,
        rows: NDArray[np.float32] | None = None, residual: int | None = None, upsample: bool = False,
    ) -> int:  # fmt: skip
        """Encode the input of a convolution, and convolve."""
        packed, conv = self._packed(layer), layer.layer
        assert isinstance(conv, Conv2d)
        quantizers = self._params(layer.input)
        codes = self._encode(layer.input, x, norm, silu)
        if upsample:
            h, w, c = self.values[codes].shape
            wide = self._value(f"{layer.name}.upsampled", (2 * h, 2 * w, c), codes=True)
            self.operations.append(Upsample(codes, wide))
            codes = wide
        biases = conv.bias.data[None] if rows is None else conv.bias.data + rows
        outputs = self._outputs(layer, scales_of(quantizers), biases)
        zero_points = tuple(int(q.zero_point) for q in quantizers)
        padding = conv.pads[0]
        if len(set(conv.pads)) > 1:
            codes, padding = self._pad(codes, conv.pads, zero_points), 0
        h, w, _ = self.values[codes].shape
        kernel = layer.codes.shape[1]
        size = ((n + 2 * padding - kernel) // conv.stride + 1 for n in (h, w))
        out = self._value(layer.name, (*size, len(layer.codes)))
        self.operations.append(
            Convolve(codes, out, layer.name, packed, zero_points, outputs, conv.stride, padding, residual)
        )
        return out

    def _pad(self, x: int, pads: tuple[int, int, int, int], zero_points: tuple[int, ...]) -> int:
        (h, w, c), (top, bottom, left, right) = self.values[x].shape, pads
        out = self._value(f"{self.values[x].name}.padded", (h + top + bottom, w + left + right, c), codes=True)
        self.operations.append(Pad(x, out, pads, zero_points))
        return out

    def _encode(
        self, quantizer: ActivationQuantizer, x: int, norm: GroupNorm | None = None, silu: bool = False,
        shape: tuple[int, ...] | None = None,
    ) -> int:  # fmt: skip
        """Codes of x; where the same ones are there already, those: q, k and v mostly find one range of their input."""
        shape, found = shape or self.values[x].shape, self._params(quantizer)
        key = (x, shape, id(norm), silu, tuple((float(q.scale), int(q.zero_point), q.spec.bits) for q in found))
        if key not in self.encoded:
            self.encoded[key] = self._value(quantizer.name, shape, codes=True)
            fused = None if norm is None else Norm(norm.weight.data, norm.bias.data, norm.groups, norm.eps)
            self.operations.append(Encode(x, self.encoded[key], found, fused, silu))
        return self.encoded[key]

