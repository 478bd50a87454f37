"""What one call of a network costs in bit operations: multiplications times the bits of both factors.

A multiplication of a w-bit weight by an a-bit activation counts w * a; in float, 32 * 32. The unit is the one of
the quantization papers; it says how much silicon works, not how long it takes (`refquant bench` does).
"""

from __future__ import annotations

import math

import numpy as np

from ..autograd import Tensor, no_grad
from ..nn.layers import Conv2d
from .affine import QParams
from .coverage import FLOAT
from .grids import Grid
from .quantized import QuantizedModel
from .wrap import QuantAttention, QuantLayer, activation_quantizers, watched


def bit_operations(model: QuantizedModel) -> int:
    """Bit operations of one call of the network for one image; layers with cached outputs cost nothing."""
    cfg, shapes = model.base.network.cfg, {}
    image = Tensor(np.zeros((1, cfg.image_size, cfg.image_size, cfg.image_channels), np.float32))
    with no_grad():
        watched(model.network, lambda name, x: shapes.__setitem__(name, x.shape))(image, np.array([0]))
    quantizers, total = activation_quantizers(model.network), 0
    for name, module in model.network.named_modules():
        if isinstance(module, QuantLayer) and name not in model.features:
            total += (
                _multiplications(module, shapes[module.input.name])
                * _bits(module.weight_qparams)
                * _bits(module.input.qparams)
            )
            if module.branch is not None:  # in float, at every place
                places = _multiplications(module, shapes[module.input.name]) // math.prod(module.layer.weight.shape)
                total += places * sum(part.size for part in module.branch) * FLOAT * FLOAT
        elif isinstance(module, QuantAttention):
            parts = [_bits(quantizers[f"{name}.{part}"].qparams) for part in ("q", "k", "v", "probs")]
            heads, tokens, channels = shapes[f"{name}.q"]
            total += heads * tokens * tokens * channels * (parts[0] * parts[1] + parts[2] * parts[3])
    return total


def _multiplications(module: QuantLayer, shape: tuple[int, ...]) -> int:
    """Of one layer for an input of this shape (1, ..., C)."""
    layer = module.layer
    places = int(np.prod(shape[1:-1])) // (layer.stride**2 if isinstance(layer, Conv2d) else 1)
    return places * layer.weight.data.size


def _bits(quantizer: QParams | Grid | None) -> int:
    if quantizer is None:
        return FLOAT
    return quantizer.spec.bits if isinstance(quantizer, QParams) else quantizer.bits
