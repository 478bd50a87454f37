"""A quantized UNet as an ONNX network; `export` says what that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import LoweringError
from ..nn.layers import GroupNorm
from ..nn.unet import AttentionBlock, Level, ResBlock
from ..quant.affine import QParams
from ..quant.quantized import QuantizedModel
from ..quant.split import SplitConv
from ..quant.temporal import features_by_step
from ..quant.wrap import ActivationQuantizer, QuantAttention, QuantLayer
from .qdq import Writer


class UNetWriter(Writer):
    """Walks through the network as its forward pass does, and writes nodes down instead of computing."""

    def __init__(self, quantized: QuantizedModel, step: int | None, results: Mapping[str, QParams]) -> None:
        super().__init__(quantized, step, results)
        self.size = self.network.cfg.image_size  # of the images where the walk is now
        self.features = features_by_step(quantized)  # (S, 1, C)

    def model(self) -> Any:
        """Write the whole network."""
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
        return self._finished()

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

    # --- one layer ---

    def _conv(self, layer: QuantLayer, x: str, *, rounded: bool = True) -> str:
        """A convolution of its rounded input; `rounded`: and what it gives, where `results` says how."""
        conv, constant = layer.layer, self.graph.constant
        weight = self._weight(layer, lambda w: w.transpose(0, 3, 1, 2), axis=0)
        top, bottom, left, right = conv.pads
        how = {"kernel_shape": conv.weight.shape[1:3], "strides": [conv.stride] * 2, "pads": [top, left, bottom, right]}
        inputs = [self._rounded(layer.input, x), weight, constant(f"{layer.name}.bias", conv.bias.data)]
        y = self.graph.node("Conv", inputs, layer.name, **how)
        return self._result(layer, y) if rounded else y
