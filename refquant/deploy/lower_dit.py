"""From a calibrated diffusion transformer to a program of integer operations; `lower` says what lowering is.

    modulations   depend on t and y alone: computed here for every step and class, with the quantizers of its layers
    x_embedder    a convolution; the fixed positions are its residual
    block         LN, modulation -> codes -> qkv -> codes of q, k, v -> scores of all heads -> softmax -> codes
                  -> mix -> codes -> proj -> x + gate proj
                  LN, modulation -> codes -> fc1 -> GELU -> codes -> fc2 -> x + gate fc2
    final_layer   LN, modulation -> codes -> linear -> pixels

MRQ. Probabilities of two regions are one operand of one product (`HeadMix`). GELU of two signs has two unrelated steps:
two products of the same weights, the second of which adds the first,

    y = (s- s_w) * sum (x-) (w - z_w)  +  [ (s+ s_w) * sum (x+) (w - z_w)  +  bias ]        x- counts downwards: -s-

Errors: `LoweringError` with the layer's name and the reason where something has no integer form here: a float weight,
groups of weights, a low-rank branch, scales that every token makes for itself.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..errors import LoweringError
from ..nn.dit import LN_EPS, DiTBlock, Modulation
from ..quant.affine import QParams
from ..quant.grids import Grid
from ..quant.mrq_sign import SignSplit
from ..quant.mrq_softmax import SoftmaxRegions
from ..quant.quantized import QuantizedModel
from ..quant.temporal import features_by_step
from ..quant.wrap import ActivationQuantizer, QuantAttention, QuantLayer
from .lowering import Lowering, scales_of
from .program import Convolve, Encode, Probabilities, Program
from .program_dit import (
    Condition,
    Constant,
    Gated,
    Gelu,
    HeadMix,
    HeadScores,
    Modulated,
    Parts,
    Regions,
    SignedLinear,
    Signs,
    Unpatchify,
)


class TransformerLowering(Lowering):
    """Walks through a DiT as its forward pass does, and writes down operations instead of computing."""

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__(model)
        cfg = self.network.cfg
        self.side, self.width = cfg.image_size // cfg.patch, cfg.width

    def program(self) -> Program:
        """Lower the whole network."""
        net, cfg = self.network, self.network.cfg
        x = self._value("input", (cfg.image_size, cfg.image_size, cfg.image_channels))
        table = self._modulations()
        self.condition = self._value("condition", (table.shape[-1],))
        self.operations.append(Condition(self.condition, table))
        positions = self._value("positions", (self.side, self.side, self.width))
        self.operations.append(Constant(positions, net.positions.reshape(self.side, self.side, -1)))
        h = self._linear(net.x_embedder.proj, self._encode(net.x_embedder.proj.input, x), residual=positions)
        for block in net.blocks:
            h = self._block(block, h)
        final = net.final_layer
        column = self.columns[self.names[id(final)]]
        h = self._linear(final.linear, self._modulated(final.linear.input, h, beta=column, gamma=column + self.width))
        image = self._value("output", (cfg.image_size, cfg.image_size, cfg.output_channels))
        self.operations.append(Unpatchify(h, image))
        return Program(tuple(self.values), tuple(self.operations), self.timesteps, cfg.classes)

    def _modulations(self) -> NDArray[np.float32]:
        """All modulations side by side, (S, K + 1, C): of every step, with its tables in force, and class."""
        found = features_by_step(self.model)
        self.columns, column = {}, 0
        for name, part in found.items():
            self.columns[name.removesuffix(".adaLN_modulation.1")] = column
            column += part.shape[-1]
        return np.concatenate(list(found.values()), axis=-1)

    # --- parts of the network ---

    def _block(self, block: DiTBlock, x: int) -> int:
        beta_1, gamma_1, gate_1, beta_2, gamma_2, gate_2 = self._columns_of(block)
        attn, mlp = block.attn, block.mlp
        h = self._linear(attn.qkv, self._modulated(attn.qkv.input, x, beta=beta_1, gamma=gamma_1))
        h = self._attend(attn.product, attn.heads, h)
        x = self._gated(x, self._linear(attn.proj, self._encode(attn.proj.input, h)), gate_1)
        h = self._linear(mlp.fc1, self._modulated(mlp.fc1.input, x, beta=beta_2, gamma=gamma_2))
        return self._gated(x, self._behind_gelu(mlp.fc2, h), gate_2)

    def _columns_of(self, module: Modulation) -> list[int]:
        first = self.columns[self.names[id(module)]]
        return [first + i * self.width for i in range(module.parts)]

    def _attend(self, product: QuantAttention, heads: int, x: int) -> int:
        tokens, d = self.side**2, self.width // heads
        q, k, v = (self._params(quantizer) for quantizer in (product.q, product.k, product.v))
        probs = self._quantizers(product.probs)
        self._check_length(product.q.name, d), self._check_length(product.probs.name, tokens)
        name = product.probs.name.removesuffix(".probs")
        codes = self._value(f"{name}.qkv", self.values[x].shape, codes=True)
        self.operations.append(Parts(x, codes, (q, k, v)))
        scores = self._value(f"{name}.scores", (heads, tokens, tokens))
        self.operations.append(HeadScores(codes, scores, q, k))
        p = self._value(product.probs.name, (heads, tokens, tokens), codes=True)
        if isinstance(probs[0], SoftmaxRegions):
            self.operations.append(Regions(scores, p, _all(SoftmaxRegions, probs, product.probs)))
        else:
            self.operations.append(Probabilities(scores, p, self._params(product.probs)))
        mixed = self._value(f"{name}.mixed", (self.side, self.side, self.width))
        self.operations.append(HeadMix(p, codes, mixed, probs, v))
        return mixed

    def _behind_gelu(self, layer: QuantLayer, x: int) -> int:
        """fc2: GELU in its encoder."""
        quantizers, shape = self._quantizers(layer.input), self.values[x].shape
        if not isinstance(quantizers[0], SignSplit):
            codes = self._value(layer.input.name, shape, codes=True)
            self.operations.append(Gelu(x, codes, self._params(layer.input)))
            return self._linear(layer, codes)
        grids, weights = _all(SignSplit, quantizers, layer.input), self._packed(layer)
        codes = self._value(layer.input.name, (*shape[:2], 2 * shape[2]), codes=True)
        self.operations.append(Signs(x, codes, grids))
        up, down = (np.array([getattr(g, sign) for g in grids], np.float32) for sign in ("positive", "negative"))
        first = self._value(f"{layer.name}.positive", (*shape[:2], len(layer.codes)))
        outputs = self._outputs(layer, up, layer.layer.bias.data[None])
        self.operations.append(SignedLinear(codes, first, layer.name, 0, weights, outputs))
        out = self._value(layer.name, (*shape[:2], len(layer.codes)))
        outputs = self._outputs(layer, -down, None)
        self.operations.append(SignedLinear(codes, out, layer.name, 1, weights, outputs, residual=first))
        return out

    # --- one operation ---

    def _encode(self, quantizer: ActivationQuantizer, x: int) -> int:
        found = self._params(quantizer)
        out = self._value(quantizer.name, self.values[x].shape, codes=True)
        self.operations.append(Encode(x, out, found))
        return out

    def _modulated(self, quantizer: ActivationQuantizer, x: int, *, beta: int, gamma: int) -> int:
        found = self._params(quantizer)
        out = self._value(quantizer.name, self.values[x].shape, codes=True)
        self.operations.append(Modulated(x, self.condition, out, found, gamma, beta, LN_EPS))
        return out

    def _linear(self, layer: QuantLayer, codes: int, residual: int | None = None) -> int:
        """A linear layer, or the convolution whose stride is its window, of codes."""
        packed, quantizers = self._packed(layer), self._params(layer.input)
        outputs = self._outputs(layer, scales_of(quantizers), layer.layer.bias.data[None])
        stride = getattr(layer.layer, "stride", 1)
        h, w, _ = self.values[codes].shape
        out = self._value(layer.name, (h // stride, w // stride, len(layer.codes)))
        zero_points = tuple(int(q.zero_point) for q in quantizers)
        self.operations.append(Convolve(codes, out, layer.name, packed, zero_points, outputs, stride, 0, residual))
        return out

    def _gated(self, x: int, h: int, gate: int) -> int:
        out = self._value(f"{self.values[h].name}.gated", self.values[x].shape)
        self.operations.append(Gated(x, h, self.condition, out, gate))
        return out


def _all(kind: type, found: tuple[QParams | Grid, ...], quantizer: ActivationQuantizer) -> tuple:
    """Return grids of one kind."""
    if not all(isinstance(grid, kind) for grid in found):
        raise LoweringError(f"{quantizer.name} has no integer form: its steps have codes of different kinds.")
    return found


def accumulator_scale(p: QParams | SoftmaxRegions, v: QParams) -> np.float32:
    """Scale of the sums of probabilities times v."""
    return np.float32((p.fine if isinstance(p, SoftmaxRegions) else p.scale) * v.scale)


def score_scale(q: QParams, k: QParams, d: int) -> np.float32:
    """Scale of the sums of q times k, with attention's 1 / sqrt(d)."""
    return np.float32(q.scale * k.scale * np.float32(1 / math.sqrt(d)))
