"""A quantized diffusion transformer as an ONNX network; `export` says what that is.

Tokens stay (N, L, D) all the way: a linear layer is a matrix product, the patches' embedding one like the others.

    modulations   a table (S, K + 1, C) for each block, of which ``step`` and ``y`` choose a row; scales as 1 + gamma
    x_embedder    patches side by side -> product, + fixed positions
    attention     q, k and v cut out of one product, heads before tokens -> q kᵀ / sqrt(d) -> softmax -> times v

Everything is rounded where it is rounded here. Activations of the image, of q, k and v are rounded right before their
products; rounding does not care for the order of elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import LoweringError
from ..nn.dit import LN_EPS, DiTBlock, Modulation
from ..quant.affine import QParams
from ..quant.quantized import QuantizedModel
from ..quant.temporal import features_by_step
from ..quant.wrap import QuantAttention, QuantLayer
from .qdq import Writer


class TransformerWriter(Writer):
    """Walks through a DiT as its forward pass does, and writes nodes down instead of computing."""

    def __init__(self, quantized: QuantizedModel, step: int | None, results: Mapping[str, QParams]) -> None:
        super().__init__(quantized, step, results)
        cfg = self.network.cfg
        self.side, self.width = cfg.image_size // cfg.patch, cfg.width
        self.features = features_by_step(quantized)  # (S, K + 1, C)

    def model(self) -> Any:
        """Write the whole network."""
        net, cfg, node = self.network, self.network.cfg, self.graph.node
        h = self._linear(net.x_embedder.proj, self._patches("x"))
        h = node("Add", [h, self.graph.constant("positions", net.positions)], "x_embedder")
        for block in net.blocks:
            h = self._block(block, h)
        final = net.final_layer
        shift, scale = self._modulation(final, ("shift", "scale"))
        h = self._linear(final.linear, self._modulated(f"{self.names[id(final)]}.modulated", h, shift, scale))
        answer = self._unpatchified(h)
        if cfg.output_channels != cfg.image_channels:  # further channels hold variances
            ends = [self._numbers(0), self._numbers(cfg.image_channels), self._numbers(1)]
            answer = node("Slice", [answer, *ends], "noise channels")
        self._noise(answer)
        return self._finished()

    # --- parts of the network ---

    def _block(self, block: DiTBlock, x: str) -> str:
        name, node = self.names[id(block)], self.graph.node
        parts = ("shift_1", "scale_1", "gate_1", "shift_2", "scale_2", "gate_2")
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self._modulation(block, parts)
        h = self._linear(block.attn.qkv, self._modulated(f"{name}.modulated_1", x, shift_1, scale_1))
        h = self._linear(block.attn.proj, self._attend(block, h))
        x = node("Add", [x, node("Mul", [h, gate_1], f"{name}.gated_1")], f"{name}.attended")
        h = self._linear(block.mlp.fc1, self._modulated(f"{name}.modulated_2", x, shift_2, scale_2))
        h = self._linear(block.mlp.fc2, node("Gelu", [h], f"{name}.gelu", approximate="tanh"))
        return node("Add", [x, node("Mul", [h, gate_2], f"{name}.gated_2")], name)

    def _modulation(self, module: Modulation, parts: tuple[str, ...]) -> list[str]:
        """Each part (N, 1, D), or (1, 1, D) of an unconditional network; scales with their 1."""
        name, node = self.names[id(module)], self.graph.node
        rows = self.features[f"{name}.adaLN_modulation.1"].copy()
        for i, part in enumerate(parts):
            if part.startswith("scale"):
                rows[..., i * self.width : (i + 1) * self.width] += 1
        of_step = self.graph.of_step(f"{name}.modulations", rows[:, :, None])  # (K + 1, 1, C)
        if self.network.cfg.classes:
            of_step = node("Gather", [of_step, "y"], f"{name}.modulation", axis=0)
        return self.graph.parts(of_step, [f"{name}.{part}" for part in parts], axis=2)

    def _modulated(self, name: str, x: str, shift: str, scale: str) -> str:
        node, ones = self.graph.node, self.graph.constant("ones", np.ones(self.width, np.float32))
        y = node("LayerNormalization", [x, ones], f"{name}.normalised", axis=-1, epsilon=LN_EPS)
        return node("Add", [node("Mul", [y, scale], f"{name}.scaled"), shift], name)

    def _attend(self, block: DiTBlock, x: str) -> str:
        attn, product, node = block.attn, block.attn.product, self.graph.node
        name, heads = f"{self.names[id(block)]}.attn", block.attn.heads
        if not isinstance(product, QuantAttention):
            raise LoweringError(f"{name}: its attention product is not wrapped.")
        d = self.width // heads
        apart = node("Reshape", [x, self._numbers(0, self.side**2, 3, heads, d)], f"{name}.apart")
        apart = node("Transpose", [apart], f"{name}.heads", perm=[2, 0, 3, 1, 4])  # (3, N, heads, L, d)
        axis = self._numbers(0)
        q, k, v = (node("Squeeze", [one, axis], f"{name}.{part}")
                   for part, one in zip("qkv", self.graph.parts(apart, [f"{name}.{part}.cut" for part in "qkv"], 0),
                                        strict=True))  # fmt: skip
        k = node("Transpose", [k], f"{name}.k.transposed", perm=[0, 1, 3, 2])
        q, k, v = (self._rounded(*pair) for pair in ((product.q, q), (product.k, k), (product.v, v)))
        scores = node("MatMul", [q, k], f"{name}.product")
        factor = self.graph.constant(f"{name}.factor", np.float32(1 / np.sqrt(d)))
        scores = node("Mul", [scores, factor], f"{name}.scores")
        probs = self._rounded(product.probs, node("Softmax", [scores], f"{name}.softmax", axis=-1))
        mixed = node("Transpose", [node("MatMul", [probs, v], f"{name}.mixed")], f"{name}.tokens", perm=[0, 2, 1, 3])
        return node("Reshape", [mixed, self._numbers(0, self.side**2, self.width)], attn.proj.name + ".x")

    def _patches(self, x: str) -> str:
        """Images (N, C, H, W) -> (N, L, p p C): rows, columns and channels of each patch side by side."""
        cfg, node = self.network.cfg, self.graph.node
        p, c = cfg.patch, cfg.image_channels
        x = node("Reshape", [x, self._numbers(0, c, self.side, p, self.side, p)], "patches.apart")
        x = node("Transpose", [x], "patches.ordered", perm=[0, 2, 4, 3, 5, 1])
        return node("Reshape", [x, self._numbers(0, self.side**2, p * p * c)], "patches")

    def _unpatchified(self, h: str) -> str:
        """Tokens (N, L, p p C) -> images (N, C, H, W)."""
        cfg, node = self.network.cfg, self.graph.node
        p, c = cfg.patch, cfg.output_channels
        h = node("Reshape", [h, self._numbers(0, self.side, self.side, p, p, c)], "pixels.apart")
        h = node("Transpose", [h], "pixels.ordered", perm=[0, 5, 1, 3, 2, 4])
        return node("Reshape", [h, self._numbers(0, c, cfg.image_size, cfg.image_size)], "pixels")

    def _linear(self, layer: QuantLayer, x: str) -> str:
        """A linear layer of tokens (N, L, K), its input rounded; and what it gives, where `results` says how."""
        weight = self._weight(layer, lambda w: w.reshape(len(w), -1).T, axis=1)
        y = self.graph.node("MatMul", [self._rounded(layer.input, x), weight], f"{layer.name}.product")
        # a bias (O,) and the product would become one Gemm in ONNX Runtime, which then multiplies floats
        bias = self.graph.constant(f"{layer.name}.bias", layer.layer.bias.data[None, None])
        y = self.graph.node("Add", [y, bias], layer.name)
        return self._result(layer, y)

    def _numbers(self, *numbers: int) -> str:
        """A constant of whole numbers: shapes, for Reshape (0 keeps N), axes, ends."""
        return self.graph.constant(" ".join(map(str, numbers)), np.array(numbers))
