"""The operations of a transformer's program; see `program` for the others.

Tokens are the pixels of a small image, (h, w, D), so that a linear layer is a convolution with a 1 x 1 window. What
depends on the time-step and the class alone, the modulations of all blocks, is one row of a table, known before
sampling; operations after that take their columns of it.

    Condition       the row of each image's class, at this step
    Constant        the same numbers for every image: positions
    Modulated       float tokens -> codes: layer norm, then times 1 + gamma, plus beta
    Parts           float q, k, v side by side -> codes, each with its quantizer
    HeadScores      codes of q and k -> float: q kᵀ for each head
    Regions         float scores -> codes of two regions: softmax
    HeadMix         codes of probabilities and v -> float, heads side by side; two regions in one accumulator
    Gelu            float -> codes
    Signs           float -> codes of either sign: GELU
    SignedLinear    codes of one sign -> float: int32 sums, then scale, bias and what the other sign gave
    Gated           x + gate h
    Unpatchify      features of a token to the pixels of its patch
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..kernels import Dequantize, PackedWeights
from ..quant.affine import QParams
from ..quant.mrq_sign import SignSplit
from ..quant.mrq_softmax import SoftmaxRegions

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Condition:
    """out = table[step, class of the image]; table (S, K + 1, C), its last row a step "no class"."""

    out: int
    table: Float32


@dataclass(frozen=True, eq=False)
class Constant:
    """out = numbers, for every image."""

    out: int
    numbers: Float32


@dataclass(frozen=True, eq=False)
class Modulated:
    """out = codes of layer_norm(x) (1 + gamma) + beta; gamma and beta begin at these columns of the condition."""

    x: int
    condition: int
    out: int
    quantizers: tuple[QParams, ...]
    gamma: int
    beta: int
    eps: float


@dataclass(frozen=True, eq=False)
class Parts:
    """out = codes of x (h, w, P D), each of P parts with its own quantizers."""

    x: int
    out: int
    quantizers: tuple[tuple[QParams, ...], ...]


@dataclass(frozen=True, eq=False)
class HeadScores:
    """out[h, i, j] = scale * sum over c of (q[i, h, c] - zq) (k[j, h, c] - zk); x holds q, k and v side by side."""

    x: int
    out: int
    q_params: tuple[QParams, ...]
    k_params: tuple[QParams, ...]


@dataclass(frozen=True, eq=False)
class Regions:
    """out = codes of the softmax over the last axis, in two regions."""

    x: int
    out: int
    grids: tuple[SoftmaxRegions, ...]


@dataclass(frozen=True, eq=False)
class HeadMix:
    """out[i, h, c] = scale * sum over j of p[h, i, j] (v[j, h, c] - zv); x holds q, k and v side by side."""

    p: int
    x: int
    out: int
    p_params: tuple[QParams | SoftmaxRegions, ...]
    v_params: tuple[QParams, ...]


@dataclass(frozen=True, eq=False)
class Gelu:
    """out = codes of GELU(x)."""

    x: int
    out: int
    quantizers: tuple[QParams, ...]


@dataclass(frozen=True, eq=False)
class Signs:
    """out (h, w, 2 F) = codes of GELU(x) (h, w, F): of what is not below 0, then of what is."""

    x: int
    out: int
    grids: tuple[SignSplit, ...]


@dataclass(frozen=True, eq=False)
class SignedLinear:
    """out = sums of one half of x (h, w, 2 F) * scale + bias + residual; plane 0: not below 0."""

    x: int
    out: int
    name: str
    plane: int
    weights: PackedWeights
    outputs: tuple[Dequantize, ...]
    residual: int | None = None


@dataclass(frozen=True, eq=False)
class Gated:
    """out = x + gate y; the gate begins at this column of the condition."""

    x: int
    y: int
    condition: int
    out: int
    gate: int


@dataclass(frozen=True, eq=False)
class Unpatchify:
    """out (h p, w p, C) = features (h, w, p p C) of each token in their places."""

    x: int
    out: int


TokenOperation = (
    Condition | Constant | Modulated | Parts | HeadScores | Regions | HeadMix | Gelu | Signs | SignedLinear | Gated
    | Unpatchify
)  # fmt: skip
TOKEN_INTEGER = (HeadScores, HeadMix, SignedLinear)
