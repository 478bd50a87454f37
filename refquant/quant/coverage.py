"""Coverage: which weights and activations a quantized model really quantizes, said with every result.

Papers mean different things by "W4A8". TFMQ-DM's released code leaves shortcuts, down-sampling, the first and
the last convolution and both attention products in float, 3.5 to 18 % of the weights; Q-Diffusion quantizes all
of them; PTQ4DM and PTQD keep the first and the last convolution at 8 bits. A comparison is fair where the
coverage is one.

    full      all layers and their inputs at the nominal bits; attention's q, k, v too, its softmax at 8 bits
    layers    the same with attention's products in float
    ends8     full, with at least 8 bits for the first and the last convolution (PTQ4DM, PTQD)
    released  of a UNet, what TFMQ-DM's released code does to its networks (``quant/quant_model.py:49-66,103-120``); of
              a DiT, what TQ-DiT's, PTQ4DiT's and Q-DiT's leave: time-step MLP and modulations float, and the image

Normalisations, SiLU, softmax itself and biases are float in all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import RangeError, UnknownNameError
from ..nn.dit import DiT
from ..nn.networks import Network
from .affine import QSpec
from .wrap import QuantLayer, wrap

COVERAGES = ("full", "layers", "ends8", "released")
FLOAT = 32  # bits that mean "not quantized"
SOFTMAX_BITS = 8


@dataclass(frozen=True)
class Coverage:
    """A policy for one network.

    Attributes
    ----------
    name : str
    float_weights, float_inputs : frozenset of str
        Layers whose weight, or input, stays float.
    eight : frozenset of str
        Layers with at least 8 bits.
    attention : bool
        Quantize the operands of attention's products.
    """

    name: str
    float_weights: frozenset[str] = frozenset()
    float_inputs: frozenset[str] = frozenset()
    eight: frozenset[str] = frozenset()
    attention: bool = True

    def weight_spec(self, layer: str, bits: int) -> QSpec | None:
        """The spec of a layer's weight for nominal `bits`; None means float."""
        if bits == FLOAT or layer in self.float_weights:
            return None
        return QSpec(max(bits, 8) if layer in self.eight else bits, signed=True, symmetric=False, axis=0)

    def input_spec(self, quantizer: str, bits: int) -> QSpec | None:
        """The spec of an activation quantizer, by its name, for nominal `bits`; None means float."""
        layer, _, part = quantizer.rpartition(".")
        if bits == FLOAT:
            return None
        if part == "input":
            if layer in self.float_inputs:
                return None
            return QSpec(max(bits, 8) if layer in self.eight else bits, signed=False, symmetric=False)
        if not self.attention:
            return None
        return QSpec(SOFTMAX_BITS, signed=False, symmetric=True) if part == "probs" else QSpec(bits)

    def describe(self, layers: dict[str, QuantLayer]) -> str:
        """In words, with the share of weights that stays float."""
        total = sum(math.prod(layer.layer.weight.shape) for layer in layers.values())
        kept = sum(math.prod(layer.layer.weight.shape) for name, layer in layers.items() if name in self.float_weights)
        return (
            f"{self.name}: {len(layers) - len(self.float_weights)} of {len(layers)} layers, "
            f"{100 * (1 - kept / total):.1f} % of the weights; {len(layers) - len(self.float_inputs)} inputs; "
            f"attention products {'quantized' if self.attention else 'float'}"
        )


def coverage(name: str, network: Network) -> Coverage:
    """Return the policy of that name for a float network; UnknownNameError lists the names there are."""
    if name not in COVERAGES:
        raise UnknownNameError(f"no coverage is called {name!r}. Known: {', '.join(COVERAGES)}.")
    transformer = isinstance(network, DiT)
    ends = frozenset({"x_embedder.proj", "final_layer.linear"} if transformer else {"conv_in", "conv_out"})
    if name == "full":
        return Coverage(name)
    if name == "layers":
        return Coverage(name, attention=False)
    if name == "ends8":
        return Coverage(name, eight=ends)
    names = list(wrap(network)[1])
    if transformer:
        aside = frozenset(n for n in names if n.startswith("t_embedder.") or ".adaLN_modulation." in n)
        return Coverage(name, aside, aside | {"x_embedder.proj"})
    aside = frozenset(n for n in names if "nin_shortcut" in n or n.endswith("downsample.conv"))
    unwrapped = aside | ends | {"temb.dense.0"}
    first_block = next(n for n in names if n.endswith("conv1"))
    return Coverage(name, unwrapped, unwrapped | {"temb.dense.1", first_block}, attention=False)


def check_bits(weight_bits: int, input_bits: int) -> None:
    """Raise RangeError unless each is 2 to 8, or 32 for float."""
    for what, bits in (("weight", weight_bits), ("input", input_bits)):
        if bits != FLOAT and not 2 <= bits <= 8:
            raise RangeError(f"{what} bits are {bits}; 2 to 8 are supported, and {FLOAT} for float.")
