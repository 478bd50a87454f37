"""Put quantizers on a network's layers by name, without editing the network.

`wrap` returns a copy of a module tree in which every convolution and linear layer is replaced by a
`QuantLayer` around it, and every attention product by a `QuantAttention`. The copy shares the float parameters
of the original and adds what a layer needs to pretend to be an integer one: quantized weights, and an
`ActivationQuantizer` on each input. The network itself never learns of it, so any model built of
`refquant.nn.layers` can be quantized.

Names: a layer's input quantizer is ``<layer>.input``; those of an attention product are ``<product>.q``, ``.k``,
``.v`` and ``.probs``. `activation_quantizers` lists them all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, nnops, ops
from ..errors import ShapeError
from ..nn.layers import AttentionProduct, Conv2d, Linear
from ..nn.module import Module, Parameter
from .affine import QParams, dequantize, quantize
from .fakequant import fake_quant
from .grids import Grid, GridTable
from .groupwise import as_rows
from .lsq import lsq
from .observers import StepTable

M = TypeVar("M", bound=Module)

#: Called with (quantizer name, array) when a value passes; how calibration watches a network.
Watcher = Callable[[str, NDArray[np.float32]], None]


class ActivationQuantizer:
    """Rounds what flows through it, once it is told how; until then it lets everything pass.

    Attributes
    ----------
    name : str
    qparams : QParams, Grid or None
        In force now; None means float.
    table : StepTable, GridTable or None
        One quantizer for each step of the sampler; `at_step` puts one of them in force.
    learned : Tensor or None
        While a step size is learned (see `refquant.quant.learn_steps`), the leaf that replaces the scale.
    watcher : callable or None
        Sees every value *before* it is quantized.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.qparams: QParams | Grid | None = None
        self.table: StepTable | GridTable | None = None
        self.learned: Tensor | None = None
        self.watcher: Watcher | None = None

    def set(self, quantizer: QParams | Grid | StepTable | GridTable | None) -> None:
        """Use one quantizer for all steps, or a table (its first step is in force), or none."""
        stepped = isinstance(quantizer, (StepTable, GridTable))
        self.table = quantizer if stepped else None
        self.qparams = quantizer[0] if stepped else quantizer

    def at_step(self, step: int) -> None:
        """Put the quantizer of this step of the sampler in force, if there is a table."""
        if self.table is not None:
            self.qparams = self.table[step]

    def __call__(self, x: Tensor) -> Tensor:
        if self.watcher is not None:
            self.watcher(self.name, x.data)
        if self.qparams is None:
            return x
        if self.learned is not None:
            return lsq(x, self.learned, self.qparams.zero_point, self.qparams.spec)
        return fake_quant(x, self.qparams)


class CodedWeight(Parameter):
    """The float32 weight that codes stand for, made when somebody asks for it: an integer network never does.

    Parameters
    ----------
    codes : int array
    qparams : QParams
    """

    __slots__ = ("_codes", "_floats", "_qparams")

    def __init__(self, codes: NDArray[np.integer], qparams: QParams) -> None:
        self._codes, self._qparams, self._floats = codes, qparams, None
        super().__init__(codes)

    @property
    def data(self) -> NDArray[np.float32]:  # type: ignore[override]
        """The codes, dequantized."""
        if self._floats is None:
            self._floats = dequantize(as_rows(self._codes, self._qparams), self._qparams).reshape(self._codes.shape)
        return self._floats

    @data.setter
    def data(self, value: NDArray[np.float32]) -> None:
        self._floats = None if value is self._codes else value

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the codes."""
        return self._codes.shape


class QuantLayer(Module):
    """A layer whose weight and input pass through their quantizers, where they have one.

    Attributes
    ----------
    name : str
        The layer's full name in the network.
    layer : Conv2d or Linear
        A copy that shares the bias; its weight is replaced when `quantize_weight` is called.
    input : ActivationQuantizer
    weight_qparams : QParams or None
        None means float. With more scales than output channels they belong to groups of inputs (`groupwise`).
    codes : int8 array or None
        The weight's integer codes, of the weight's shape.
    branch : (float32 array (O, r), float32 array (r, K)) or None
        A low-rank part of the weight that stays float and takes the float input (see `low_rank`).
    row : float32 array, (C,), or None
        The layer's output where that is known beforehand (see `refquant.quant.temporal`): nothing is computed.
    """

    def __init__(self, name: str, layer: Conv2d | Linear) -> None:
        self.name = name
        self.layer = copy.copy(layer)
        self.input = ActivationQuantizer(f"{name}.input")
        self.weight_qparams: QParams | None = None
        self.codes: NDArray[np.integer] | None = None
        self.branch: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        self.row: NDArray[np.float32] | None = None

    def quantize_weight(self, qparams: QParams) -> None:
        """Round the weight to the nearest codes of `qparams` and compute with those from now on."""
        weight = self.layer.weight.data
        self.set_codes(quantize(as_rows(weight, qparams), qparams).reshape(weight.shape), qparams)

    def set_codes(self, codes: NDArray[np.integer], qparams: QParams) -> None:
        """Compute with the weight that `codes` stand for, however they were rounded."""
        if codes.shape != self.layer.weight.shape:
            raise ShapeError(f"{self.name}: codes {codes.shape} for a weight of shape {self.layer.weight.shape}.")
        self.codes, self.weight_qparams = codes, qparams
        self.layer.weight = CodedWeight(codes, qparams)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer to its (quantized) input."""
        if self.row is not None:
            return Tensor(np.broadcast_to(self.row, (len(x.data), self.row.size)))
        if self.branch is None:
            return self.layer(self.input(x))
        left, right = (Parameter(part) for part in self.branch)
        thin = nnops.linear(x, right, np.zeros(len(right.data), x.dtype))
        return ops.add(self.layer(self.input(x)), nnops.linear(thin, left, np.zeros(len(left.data), x.dtype)))


class QuantAttention(Module):
    """The two products of attention with quantized operands: q kᵀ, and softmax times v.

    The probabilities lie in [0, 1] and many are nearly 0, so their quantizer has its zero point pinned to 0
    (``QSpec(8, signed=False, symmetric=True)``); q, k and v are asymmetric like other activations.

    Parameters
    ----------
    name : str
        Of the product in the network.
    product : AttentionProduct
        The float one.
    """

    def __init__(self, name: str, product: AttentionProduct) -> None:
        self.product = product
        self.q, self.k, self.v, self.probs = (
            ActivationQuantizer(f"{name}.{part}") for part in ("q", "k", "v", "probs")
        )

    def quantizers(self) -> tuple[ActivationQuantizer, ...]:
        """The four, in order of use."""
        return self.q, self.k, self.v, self.probs

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (N, L, C) -> (N, L, C)."""
        if all(part.qparams is None and part.watcher is None for part in self.quantizers()):
            return self.product(q, k, v)
        q, k, v = self.q(q), self.k(k), self.v(v)
        scores = ops.scale(ops.matmul(q, ops.transpose(k, (0, 2, 1))), 1 / np.sqrt(q.shape[-1]))
        return ops.matmul(self.probs(ops.softmax(scores)), v)


def wrap(module: M) -> tuple[M, dict[str, QuantLayer]]:
    """Copy a network with every Conv2d, Linear and attention product wrapped.

    Parameters
    ----------
    module : Module
        Of floats; it stays as it is.

    Returns
    -------
    network : the same type as `module`
        Computes the same values until quantizers are set. Other parameters are shared.
    layers : dict of str to QuantLayer
        By full name, in the order of `module.named_modules`.
    """
    layers: dict[str, QuantLayer] = {}

    def wrapped(name: str, node: Module) -> Module | None:
        if isinstance(node, AttentionProduct):
            return QuantAttention(name, node)
        if not isinstance(node, (Conv2d, Linear)):
            return None
        layers[name] = QuantLayer(name, node)
        return layers[name]

    return rebuild(module, wrapped), layers


def activation_quantizers(network: Module) -> dict[str, ActivationQuantizer]:
    """All activation quantizers of a wrapped network, by name."""
    found: dict[str, ActivationQuantizer] = {}
    for _, module in network.named_modules():
        if isinstance(module, QuantLayer):
            found[module.input.name] = module.input
        elif isinstance(module, QuantAttention):
            found |= {part.name: part for part in module.quantizers()}
    return found


def watched(network: M, watcher: Watcher) -> M:
    """Return a copy of a wrapped network with the same weights and quantizers, all of whose quantizers tell `watcher`.

    For one worker thread: others may use the original, or copies of their own, at the same time.

    Parameters
    ----------
    network : Module
        Wrapped.
    watcher : callable
        Is given the name of a quantizer and its input.

    Returns
    -------
    Module, of the same type
    """

    def own(_: str, node: Module) -> Module | None:
        if not isinstance(node, (QuantLayer, QuantAttention)):
            return None
        twin = copy.copy(node)
        for attribute, value in vars(node).items():
            if isinstance(value, ActivationQuantizer):
                part = copy.copy(value)
                part.watcher = watcher
                setattr(twin, attribute, part)
        return twin

    return rebuild(network, own)


def rebuild(module: M, replace: Callable[[str, Module], Module | None]) -> M:
    """Copy a module tree, with other modules in the places where `replace(full name, module)` gives one.

    The copy has module objects of its own and shares every parameter. What is replaced is not descended into.

    Parameters
    ----------
    module : Module
    replace : callable
        Gives a module or None.

    Returns
    -------
    Module, of the same type
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
