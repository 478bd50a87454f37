"""Put quantizers on a network's layers by name, without editing the network.

`wrap` returns a copy of a module tree in which every convolution and linear layer is replaced by a
`QuantLayer` around it. The copy shares the float parameters of the original and adds what a layer
needs to pretend to be an integer one: quantized weights, and a quantizer on its input. The network
itself never learns of it, so any model built of `refquant.nn.layers` can be quantized.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor
from ..errors import ShapeError
from ..nn.layers import Conv2d, Linear
from ..nn.module import Module, Parameter
from .affine import QParams, dequantize, quantize
from .fakequant import fake_quant

M = TypeVar("M", bound=Module)

#: Called with (layer name, input array) when a layer runs; how calibration watches a network.
Watcher = Callable[[str, NDArray[np.float32]], None]


class QuantLayer(Module):
    """A layer whose weight and input pass through their quantizers, where they have one.

    Attributes
    ----------
    name : str
        The layer's full name in the network.
    layer : Conv2d or Linear
        A copy that shares the bias; its weight is replaced when `quantize_weight` is called.
    weight_qparams, input_qparams : QParams or None
        None means float.
    codes : int8 array or None
        The weight's integer codes, of the weight's shape.
    watcher : callable or None
        Sees every input *before* it is quantized.
    """

    def __init__(self, name: str, layer: Conv2d | Linear) -> None:
        self.name = name
        self.layer = copy.copy(layer)
        self.weight_qparams: QParams | None = None
        self.input_qparams: QParams | None = None
        self.codes: NDArray[np.integer] | None = None
        self.watcher: Watcher | None = None

    def quantize_weight(self, qparams: QParams) -> None:
        """Round the weight to the nearest codes of `qparams` and compute with those from now on."""
        self.set_codes(quantize(self.layer.weight.data, qparams), qparams)

    def set_codes(self, codes: NDArray[np.integer], qparams: QParams) -> None:
        """Compute with the weight that `codes` stand for, however they were rounded."""
        if codes.shape != self.layer.weight.shape:
            raise ShapeError(f"{self.name}: codes {codes.shape} for a weight of shape {self.layer.weight.shape}.")
        self.codes, self.weight_qparams = codes, qparams
        self.layer.weight = Parameter(dequantize(codes, qparams))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer to its (quantized) input."""
        if self.watcher is not None:
            self.watcher(self.name, x.data)
        if self.input_qparams is not None:
            x = fake_quant(x, self.input_qparams)
        return self.layer(x)


def wrap(module: M) -> tuple[M, dict[str, QuantLayer]]:
    """Copy a network with every Conv2d and Linear wrapped.

    Returns
    -------
    network : the same type as `module`
        Computes the same values until quantizers are set. Other parameters are shared.
    layers : dict of str to QuantLayer
        By full name, in the order of `module.named_modules`.
    """
    layers: dict[str, QuantLayer] = {}

    def wrapped(name: str, node: Module) -> Module | None:
        if not isinstance(node, (Conv2d, Linear)):
            return None
        layers[name] = QuantLayer(name, node)
        return layers[name]

    return rebuild(module, wrapped), layers


def rebuild(module: M, replace: Callable[[str, Module], Module | None]) -> M:
    """Copy a module tree, with other modules in the places where `replace(full name, module)` gives one.

    The copy has module objects of its own and shares every parameter. What is replaced is not descended into.
    """

    def visit(node: object, name: str) -> object:
        if isinstance(node, list):
            return [visit(child, f"{name}.{i}") for i, child in enumerate(node)]
        if not isinstance(node, Module):
            return node
        other = replace(name, node)
        if other is not None:
            return other
        twin = copy.copy(node)
        for attribute, value in vars(node).items():
            setattr(twin, attribute, visit(value, f"{name}.{attribute}" if name else attribute))
        return twin

    copied = visit(module, "")
    assert isinstance(copied, type(module))
    return copied
