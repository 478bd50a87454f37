"""Shortcut splitting: two quantizers for the two parts of a concatenated tensor (Q-Diffusion, arXiv 2302.04304).

On the up path of a UNet a block's input is concat(h, skip): h was made a layer ago, skip on the way down. Where
their ranges differ, one scale for both leaves the narrower part a few codes: in the golden case
``split.conv1x1`` its range is a twentieth, and the output's squared error 39 times that with two scales.
So each part gets a quantizer of its own, and so does the weight's share of each part:

    x^ = concat(q_0(x[..., :c]), q_1(x[..., c:]))       c = channels of h, the last axis of x
    w^ = concat(p_0(w[..., :c]), p_1(w[..., c:]))       the last axis of w (O, kh, kw, C)
    y  = conv(x^, w^) + b

The output is that of two convolutions with one scale each, added up: an integer kernel runs them one by one. So
`split_shortcuts` makes two layers of such a layer, and everything that handles layers handles them, too.

Source: q-diffusion ``qdiff/quant_layer.py`` (``QuantModule.forward``), TFMQ-DM ``quant/quant_layer.py:310-340``.
Only the 1x1 shortcut is split. The 3x3 convolution beside it sees the concatenation after a group
normalisation, which has made the ranges alike.

Errors: ``ShapeError`` where the split leaves one of the parts empty.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, ops
from ..diffusion.model import DiffusionModel
from ..errors import ShapeError
from ..nn.layers import Conv2d
from ..nn.module import Module, Parameter
from ..nn.unet import ResBlock, UNet
from .affine import QParams, fake_quantize
from .wrap import rebuild

Parts = tuple[QParams, QParams]


class SplitConv(Module):
    """A 1x1 convolution of concat(h, skip) as the sum of two, one for each part; the first one has the bias."""

    def __init__(self, conv: Conv2d, channels: int) -> None:
        w = conv.weight.data
        self.channels = channels
        self.part = [_like(conv, part, bias) for part, bias in zip(_parts(w, channels), (1, 0), strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply both parts to x (N, H, W, C) and add."""
        first, second = self.part
        h, skip = ops.split(x, self.channels)
        return ops.add(first(h), second(skip))


def split_shortcuts(model: DiffusionModel) -> DiffusionModel:
    """Return a model that computes the same, up to float sums, with the shortcuts of its up path split in two."""
    network, at = model.network, {}
    if not isinstance(network, UNet):  # a transformer joins no two tensors
        return model
    here = network.mid.block_2.conv2.weight.shape[0]
    for i in reversed(range(len(network.up))):
        for j, block in enumerate(network.up[i].block):
            at[f"up.{i}.block.{j}.nin_shortcut"] = here
            here = block.conv2.weight.shape[0]

    def split(name: str, node: Module) -> Module | None:
        return SplitConv(node, at[name]) if name in at and isinstance(node, Conv2d) else None

    return replace(model, network=rebuild(network, split))


def is_split(network: Module) -> bool:
    """Tell whether `split_shortcuts` made this network."""
    blocks = [m for _, m in network.named_modules() if isinstance(m, ResBlock)]
    return any(isinstance(getattr(block, "nin_shortcut", None), SplitConv) for block in blocks)


def _like(conv: Conv2d, weight: NDArray[Any], bias: int) -> Conv2d:
    twin = copy.copy(conv)
    twin.weight = Parameter(np.ascontiguousarray(weight))
    twin.bias = Parameter(conv.bias.data * np.float32(bias))
    return twin


def observe_split(x: NDArray[Any], channels: int, observer: Callable[[NDArray[Any]], QParams]) -> Parts:
    """The quantizers that `observer` gives for ``x[..., :channels]`` and ``x[..., channels:]``, each by itself.

    Parameters
    ----------
    x : array, (..., C)
    channels : int
        Of the first part.
    observer : callable
        Gives the quantizer of a part.

    Returns
    -------
    Two QParams

    Examples
    --------
    >>> from refquant.quant.affine import QSpec
    >>> from refquant.quant.observers import minmax
    >>> h, skip = observe_split(np.array([[-75.0, 75.0, 0.0, 0.75]]), 2, lambda part: minmax(part, QSpec(bits=4)))
    >>> float(h.scale), float(skip.scale)
    (10.0, 0.05000000074505806)
    """
    first, second = _parts(x, channels)
    return observer(first), observer(second)


def fake_quantize_split(x: NDArray[Any], channels: int, qparams: Parts) -> NDArray[np.float32]:
    """Round ``x[..., :channels]`` by the first of the quantizers and ``x[..., channels:]`` by the second.

    Parameters
    ----------
    x : array, (..., C)
        An activation (N, H, W, C), or a weight (O, kh, kw, C) or (O, C) with quantizers of axis 0.
    channels : int
        0 < channels < C.
    qparams : (QParams, QParams)

    Returns
    -------
    float32 array, (..., C)
        With two equal quantizers it is ``fake_quantize(x, qparams[0])``.
    """
    parts = [fake_quantize(part, q) for part, q in zip(_parts(x, channels), qparams, strict=True)]
    return np.concatenate(parts, axis=-1)


def _parts(x: NDArray[Any], channels: int) -> tuple[NDArray[Any], NDArray[Any]]:
    if x.ndim < 1 or not 0 < channels < x.shape[-1]:
        raise ShapeError(
            f"split of shape {x.shape} at channel {channels}: both parts need a channel; give 1 to C - 1 for the last "
            "axis, or do not split"
        )
    return x[..., :channels], x[..., channels:]
