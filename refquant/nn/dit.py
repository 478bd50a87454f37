"""The diffusion transformer, DiT, with adaLN-Zero (Peebles & Xie 2023, arXiv 2212.09748), configured.

    x -> p x p patches, each through one linear layer -> tokens (N, L, D), + fixed positions
    t -> sinusoid -> Linear -> SiLU -> Linear,  + row y of the class table = c (N, D)
    blocks: (β₁, γ₁, α₁, β₂, γ₂, α₂) = Linear(SiLU(c)), then
            x = x + α₁ attention(LN(x) (1 + γ₁) + β₁)
            x = x + α₂ MLP(LN(x) (1 + γ₂) + β₂)
    final:  Linear(LN(x) (1 + γ) + β) -> p² numbers a channel and token -> the patches in their places

The layers that make β, γ and α start at zero ("adaLN-Zero"): every block is the identity at first, and the
answer is 0. What depends on t and y alone, from the sinusoid to β, γ and α, is the counterpart of a UNet's
temporal features; it *multiplies* all tokens.

Conditional networks know K classes, 0 to K - 1, and one more id, K, for "no class": in training a class is
replaced by it with probability 0.1, so that one network predicts with and without (see
`refquant.diffusion.guidance`).

Parameter names are those of the published code and checkpoints (facebookresearch/DiT, models.py:145-235), one to
one: ``blocks.0.attn.qkv.weight``. Only ``x_embedder.proj.weight`` has another order, (D, p, p, C) here and
(D, C, p, p) there, and ``pos_embed``, which is stored there though it is not learned, is computed here.

Shapes: x (N, H, W, C) float, t (N,) and y (N,) integers, result like x, or with 2 C channels where variances are
learned, too (noise first). H = W must be divisible by p.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, ops, tokenops
from ..errors import CheckpointError, RangeError, ShapeError
from .layers import AttentionProduct, Conv2d, Embedding, Linear, SiLU
from .module import Module, Parameter

Rng = np.random.Generator

FREQUENCIES = 256  # width of the sinusoid of t, whatever the network's
LN_EPS = 1e-6


@dataclass(frozen=True)
class DiTConfig:
    """What a DiT is built from.

    Attributes
    ----------
    image_size, image_channels : int
        Square images (or latents) of this size.
    patch : int
        Side of the square that becomes one token.
    width, depth, heads : int
        Features of a token (D), blocks, heads of each attention.
    mlp_ratio : int
        Hidden features of the MLP in units of `width`.
    classes : int
        K; 0 makes an unconditional network.
    class_dropout : float
        Probability, in training, that a class is replaced by "no class".
    learn_sigma : bool
        Twice the output channels: the noise and the interpolation of its variance (Nichol & Dhariwal 2021).
    """

    image_size: int
    image_channels: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: int = 4
    classes: int = 0
    class_dropout: float = 0.1
    learn_sigma: bool = False

    kind: ClassVar[str] = "dit"

    def __post_init__(self) -> None:
        for name in ("image_size", "image_channels", "patch", "width", "depth", "heads", "mlp_ratio"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise RangeError(f"DiTConfig: {name} is {value!r}; a whole number from 1 is needed.")
        if self.image_size % self.patch:
            raise RangeError(f"DiTConfig: patches of {self.patch} do not tile an image of {self.image_size} pixels.")
        if self.width % 4 or self.width % self.heads:
            raise RangeError(
                f"DiTConfig: width is {self.width}; positions need a multiple of 4, and {self.heads} heads must "
                "divide it."
            )
        if not isinstance(self.classes, int) or self.classes < 0:
            raise RangeError(f"DiTConfig: classes is {self.classes!r}; a whole number from 0 is needed.")
        if not 0 < self.class_dropout < 1:
            raise RangeError(f"DiTConfig: class_dropout is {self.class_dropout}; it must be above 0 and below 1.")

    @property
    def tokens(self) -> int:
        """L, the number of patches."""
        return (self.image_size // self.patch) ** 2

    @property
    def output_channels(self) -> int:
        """Channels of the answer: those of the image, twice where variances are learned."""
        return self.image_channels * (2 if self.learn_sigma else 1)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> DiTConfig:
        """Build from `to_json`'s result; raise CheckpointError if fields are missing or unknown."""
        try:
            return cls(**fields)
        except (TypeError, RangeError) as error:
            raise CheckpointError(f"not the configuration of a DiT: {error}.") from None


def parameter_shapes(cfg: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all learned arrays, in order, without building the network.

    DiT-XL/2 has 674,834,720 learned numbers; with the 294,912 fixed ones of its ``pos_embed``, which a published
    checkpoint holds as well, they are the 675,129,632 that its authors count.

    Parameters
    ----------
    cfg : DiTConfig

    Returns
    -------
    dict of str to tuple of int
    """
    d, p, hidden = cfg.width, cfg.patch, cfg.mlp_ratio * cfg.width

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (d, p, p, cfg.image_channels),
        "x_embedder.proj.bias": (d,),
        **linear("t_embedder.mlp.0", FREQUENCIES, d),
        **linear("t_embedder.mlp.2", d, d),
    }
    if cfg.classes:
        shapes["y_embedder.embedding_table.weight"] = (cfg.classes + 1, d)
    for i in range(cfg.depth):
        shapes |= {
            **linear(f"blocks.{i}.attn.qkv", d, 3 * d),
            **linear(f"blocks.{i}.attn.proj", d, d),
            **linear(f"blocks.{i}.mlp.fc1", d, hidden),
            **linear(f"blocks.{i}.mlp.fc2", hidden, d),
            **linear(f"blocks.{i}.adaLN_modulation.1", d, 6 * d),
        }
    return {
        **shapes,
        **linear("final_layer.linear", d, p * p * cfg.output_channels),
        **linear("final_layer.adaLN_modulation.1", d, 2 * d),
    }


# ---------------------------------------------------------------- what is computed and not learned


def timestep_embedding(t: NDArray[np.integer]) -> NDArray[np.float32]:
    """Sinusoids of the time-step: t (N,) -> (N, 256), ``[cos(t f_j) | sin(t f_j)]``, f_j = 10000^(-j / 128).

    Not the UNet's: there the sines come first and the last frequency is 1/10000; here it is not reached.

    Parameters
    ----------
    t : int array, (N,)

    Returns
    -------
    float32 array, (N, 256)
    """
    half = FREQUENCIES // 2
    frequency = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000) / half))
    angle = np.asarray(t).astype(np.float32)[:, None] * frequency
    return np.concatenate((np.cos(angle), np.sin(angle)), axis=1)


def position_embedding(width: int, side: int) -> NDArray[np.float32]:
    """Fixed positions of side x side tokens, row by row: (side², width).

    The first half of the features tells the column, the second half the row, each as ``[sin(u f_j) | cos(u f_j)]``
    with f_j = 10000^(-j / (width/4)). float64 until the end, as the original.

    Parameters
    ----------
    width : int
        Features of a token, a multiple of 4.
    side : int

    Returns
    -------
    float32 array, (side², width)
    """
    frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(side * side), side)
    parts = [f(u[:, None] * frequency) for u in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """Put patches in their places: tokens (N, h², p² C) -> (N, h p, h p, C); features by row, column, channel."""
    n, length, features = tokens.shape
    side = int(np.sqrt(length))
    channels = features // patch**2
    patches = ops.reshape(tokens, (n, side, side, patch, patch, channels))
    return ops.reshape(ops.transpose(patches, (0, 1, 3, 2, 4, 5)), (n, side * patch, side * patch, channels))


# ---------------------------------------------------------------- the network


def _zero(layer: Linear) -> Linear:
    layer.weight = Parameter(np.zeros(layer.weight.shape, np.float32))
    return layer


def _normal(rng: Rng, layer: Linear) -> Linear:
    layer.weight = Parameter(0.02 * rng.standard_normal(layer.weight.shape, dtype=np.float32))
    return layer


class PatchEmbedder(Module):
    """Cut into patches, one linear layer for all: a convolution whose stride is its window."""

    def __init__(self, rng: Rng, cfg: DiTConfig) -> None:
        p, c = cfg.patch, cfg.image_channels
        self.proj = Conv2d(rng, c, cfg.width, kernel=p, stride=p, pads=(0, 0, 0, 0))
        # initialised as the linear layer it is, not by a convolution's fans
        self.proj.weight = Parameter(Linear(rng, p * p * c, cfg.width).weight.data.reshape(-1, p, p, c))

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, H, W, C) -> (N, L, D)."""
        y = self.proj(x)
        return ops.reshape(y, (y.shape[0], -1, y.shape[-1]))


class TimestepEmbedder(Module):
    """The two linear layers over the sinusoid."""

    def __init__(self, rng: Rng, width: int) -> None:
        first, second = Linear(rng, FREQUENCIES, width), Linear(rng, width, width)
        self.mlp = [_normal(rng, first), SiLU(), _normal(rng, second)]

    def __call__(self, t: NDArray[np.integer]) -> Tensor:
        """t (N,) -> (N, D)."""
        first, silu, second = self.mlp
        return second(silu(first(Tensor(timestep_embedding(t)))))


class LabelEmbedder(Module):
    """One vector for each class, and the last for "no class"."""

    def __init__(self, rng: Rng, classes: int, width: int) -> None:
        self.embedding_table = Embedding(rng, classes + 1, width, std=0.02)

    def __call__(self, y: NDArray[np.integer]) -> Tensor:
        """y (N,) -> (N, D)."""
        return self.embedding_table(y)


class Modulation(Module):
    """Linear(SiLU(c)) cut into `parts` vectors (N, D); all 0 at first. Named as the list it is in the original."""

    def __init__(self, rng: Rng, width: int, parts: int) -> None:
        self.adaLN_modulation = [SiLU(), _zero(Linear(rng, width, parts * width))]
        self.parts = parts

    def modulation(self, c: Tensor) -> list[Tensor]:
        """c (N, D) -> shift, scale (and gate, for each branch), all (N, D)."""
        silu, linear = self.adaLN_modulation
        together = linear(silu(c))
        d = c.shape[-1]
        return [ops.channels(together, i * d, (i + 1) * d) for i in range(self.parts)]


class Attention(Module):
    """Self-attention of all tokens with `heads` heads; q, k and v come out of one linear layer."""

    def __init__(self, rng: Rng, width: int, heads: int) -> None:
        self.heads = heads
        self.qkv = Linear(rng, width, 3 * width)
        self.product = AttentionProduct()
        self.proj = Linear(rng, width, width)

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, L, D), same shape out."""
        together = self.qkv(x)
        q, k, v = (tokenops.split_heads(together, part=i, parts=3, heads=self.heads) for i in range(3))
        return self.proj(tokenops.merge_heads(self.product(q, k, v), heads=self.heads))


class MLP(Module):
    """Linear, GELU, Linear, on each token."""

    def __init__(self, rng: Rng, width: int, hidden: int) -> None:
        self.fc1 = Linear(rng, width, hidden)
        self.fc2 = Linear(rng, hidden, width)

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, L, D), same shape out."""
        return self.fc2(tokenops.gelu(self.fc1(x)))


class DiTBlock(Modulation):
    """Attention and MLP, each behind its modulated normalisation and its gate."""

    def __init__(self, rng: Rng, cfg: DiTConfig) -> None:
        self.attn = Attention(rng, cfg.width, cfg.heads)
        self.mlp = MLP(rng, cfg.width, cfg.mlp_ratio * cfg.width)
        super().__init__(rng, cfg.width, parts=6)

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N, L, D), c (N, D) *before* its SiLU; same shape as x."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(c)
        h = tokenops.modulate(tokenops.layer_norm(x, eps=LN_EPS), shift_1, scale_1)
        x = tokenops.gated_add(x, gate_1, self.attn(h))
        h = tokenops.modulate(tokenops.layer_norm(x, eps=LN_EPS), shift_2, scale_2)
        return tokenops.gated_add(x, gate_2, self.mlp(h))


class FinalLayer(Modulation):
    """Modulated normalisation, then a linear layer to the pixels of a patch; answers 0 at first."""

    def __init__(self, rng: Rng, cfg: DiTConfig) -> None:
        self.linear = _zero(Linear(rng, cfg.width, cfg.patch**2 * cfg.output_channels))
        super().__init__(rng, cfg.width, parts=2)

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N, L, D), c (N, D) -> (N, L, p² C)."""
        shift, scale = self.modulation(c)
        return self.linear(tokenops.modulate(tokenops.layer_norm(x, eps=LN_EPS), shift, scale))


class DiT(Module):
    """The noise predictor eps(x_t, t, y).

    Parameters
    ----------
    cfg : DiTConfig
    rng : numpy.random.Generator
        For the initial weights.
    """

    def __init__(self, cfg: DiTConfig, rng: Rng) -> None:
        self.cfg = cfg
        self.x_embedder = PatchEmbedder(rng, cfg)
        self.t_embedder = TimestepEmbedder(rng, cfg.width)
        if cfg.classes:
            self.y_embedder = LabelEmbedder(rng, cfg.classes, cfg.width)
        self.positions = position_embedding(cfg.width, cfg.image_size // cfg.patch)
        self.blocks = [DiTBlock(rng, cfg) for _ in range(cfg.depth)]
        self.final_layer = FinalLayer(rng, cfg)

    def __call__(
        self,
        x: Tensor,
        t: NDArray[np.integer],
        rng: Rng | None = None,
        *,
        y: NDArray[np.integer] | None = None,
    ) -> Tensor:
        """Predict the noise in x.

        Parameters
        ----------
        x : Tensor, (N, H, W, C)
        t : integer array, (N,)
            Time-step of each image, 0 = one step of noise.
        rng : Generator, optional
            Given in training: classes are dropped, and which is drawn from it.
        y : integer array, (N,), optional
            Class of each image, K for none. Without it, none has a class.

        Returns
        -------
        Tensor, (N, H, W, C), or (N, H, W, 2 C) where variances are learned
        """
        cfg = self.cfg
        want = (cfg.image_size, cfg.image_size, cfg.image_channels)
        if x.ndim != 4 or x.shape[1:] != want or np.shape(t) != x.shape[:1]:
            raise ShapeError(
                f"DiT: wants x (N, {want[0]}, {want[1]}, {want[2]}) and t (N,), got x {x.shape}, t {np.shape(t)}."
            )
        c = self._condition(t, y, rng)
        h = ops.add(self.x_embedder(x), self.positions.astype(x.dtype, copy=False))
        for block in self.blocks:
            h = block(h, c)
        return unpatchify(self.final_layer(h, c), cfg.patch)

    def _condition(self, t: NDArray[np.integer], y: NDArray[np.integer] | None, rng: Rng | None) -> Tensor:
        """c (N, D) of time-steps and classes."""
        none = self.cfg.classes
        if not none:
            if y is not None:
                raise RangeError("DiT: this network is unconditional; it takes no classes.")
            return self.t_embedder(t)
        y = np.full(len(t), none) if y is None else np.asarray(y)
        if y.shape != np.shape(t) or y.dtype.kind not in "iu" or y.min() < 0 or y.max() > none:
            raise RangeError(f"DiT: y must be (N,) = {np.shape(t)} integers from 0 to {none} (no class), got {y!r}.")
        if rng is not None:
            y = np.where(rng.random(len(y)) < self.cfg.class_dropout, none, y)
        return ops.add(self.t_embedder(t), self.y_embedder(y))
