"""The UNet of DDPM (Ho et al. 2020, appendix B), configured.

    t -> sinusoid -> Linear -> SiLU -> Linear = temb                       (time MLP, "temb.dense")
    x -> conv_in -> [ResBlock (+ attention)] x n, Downsample, ... -> mid -> [concat skip, ResBlock
      (+ attention)] x (n + 1), Upsample, ... -> GroupNorm -> SiLU -> conv_out = predicted noise

Every ResBlock adds its own projection of SiLU(temb) to its channels: those projections and the
time MLP see nothing but t. TFMQ-DM calls them the temporal information block; `refquant.quant`
finds them here by name.

Module names are those of the PyTorch port of that network (ermongroup/ddim,
``models/diffusion.py``), so published checkpoints map one to one; a convolution's weight is
(O, kh, kw, C) here and (O, C, kh, kw) there.

Shapes: x (N, H, W, C) float, t (N,) integers counted from 0, result like x. H and W must be
divisible by 2^(levels - 1).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, nnops, ops
from ..errors import CheckpointError, RangeError, ShapeError
from .layers import AttentionProduct, Conv2d, Dropout, GroupNorm, Linear
from .module import Module

Rng = np.random.Generator


@dataclass(frozen=True)
class UNetConfig:
    """What a UNet is built from.

    Attributes
    ----------
    image_size, image_channels : int
        Square images of this size.
    channels : int
        Channels of the first level; the time embedding has 4 times as many.
    multipliers : tuple of int
        Channels of each level in units of `channels`; each level halves the resolution.
    blocks : int
        ResBlocks per level on the way down (one more on the way up).
    attention : tuple of int
        Resolutions at which each ResBlock is followed by self-attention.
    groups : int
        Groups of every GroupNorm.
    dropout : float
        Inside ResBlocks, in training only.
    """

    image_size: int
    image_channels: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    groups: int
    dropout: float

    kind: ClassVar[str] = "unet"
    classes: ClassVar[int] = 0  # unconditional
    learn_sigma: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("image_size", "image_channels", "channels", "multipliers", "blocks", "groups"):
            value = getattr(self, name)
            for number in value if name == "multipliers" else (value,):
                if not isinstance(number, int) or number < 1:
                    raise RangeError(f"UNetConfig: {name} is {value!r}; whole numbers from 1 are needed.")
        if not all(isinstance(r, int) for r in self.attention):
            raise RangeError(f"UNetConfig: attention is {self.attention!r}; it must list resolutions.")
        if not self.multipliers or not 0 <= self.dropout < 1:
            raise RangeError("UNetConfig: at least one multiplier, and a dropout of at least 0 and below 1 are needed.")
        if self.channels % 2 or self.channels < 4:
            raise RangeError(f"UNetConfig: channels is {self.channels}; sinusoids need an even number from 4.")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> UNetConfig:
        """Build from `to_json`'s result; raise CheckpointError if fields are missing or unknown."""
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        except (TypeError, AttributeError, RangeError) as error:
            raise CheckpointError(f"not the configuration of a UNet: {error}.") from None


def timestep_embedding(t: NDArray[np.integer], channels: int) -> NDArray[np.float32]:
    """Sinusoids of the time-step: t (N,) -> (N, channels), ``[sin(t f_j) | cos(t f_j)]``.

    f_j = exp(-ln(10000) j / (channels/2 - 1)), as in DDPM (Ho et al.; ddim models/diffusion.py:6-24).

    Parameters
    ----------
    t : int array, (N,)
    channels : int
        Even.

    Returns
    -------
    float32 array, (N, channels)
    """
    half = channels // 2
    # float32 throughout, as the original: the golden values are float32 results
    frequency = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000) / (half - 1)))
    angle = np.asarray(t).astype(np.float32)[:, None] * frequency
    return np.concatenate((np.sin(angle), np.cos(angle)), axis=1)


class ResBlock(Module):
    """h = conv1(SiLU(norm1 x)) + temb_proj(SiLU temb); out = shortcut(x) + conv2(SiLU(norm2 h))."""

    def __init__(self, rng: Rng, inputs: int, outputs: int, temb: int, cfg: UNetConfig) -> None:
        self.norm1 = GroupNorm(inputs, cfg.groups)
        self.conv1 = Conv2d(rng, inputs, outputs)
        self.temb_proj = Linear(rng, temb, outputs)
        self.norm2 = GroupNorm(outputs, cfg.groups)
        self.dropout = Dropout(cfg.dropout)
        self.conv2 = Conv2d(rng, outputs, outputs, gain=0.0)
        if inputs != outputs:
            self.nin_shortcut = Conv2d(rng, inputs, outputs, kernel=1)

    def __call__(self, x: Tensor, temb: Tensor, rng: Rng | None = None) -> Tensor:
        """x (N, H, W, C), temb (N, E) *after* its SiLU, which all blocks share."""
        h = self.conv1(ops.silu(self.norm1(x)))
        h = nnops.add_channels(h, self.temb_proj(temb))
        h = self.conv2(self.dropout(ops.silu(self.norm2(h)), rng))
        return ops.add(self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x, h)


class AttentionBlock(Module):
    """x + proj_out(attention(q, k, v of norm(x))) over all pixels, one head."""

    def __init__(self, rng: Rng, channels: int, cfg: UNetConfig) -> None:
        self.norm = GroupNorm(channels, cfg.groups)
        self.q = Conv2d(rng, channels, channels, kernel=1)
        self.k = Conv2d(rng, channels, channels, kernel=1)
        self.v = Conv2d(rng, channels, channels, kernel=1)
        self.product = AttentionProduct()
        self.proj_out = Conv2d(rng, channels, channels, kernel=1, gain=0.0)

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, H, W, C), same shape out."""
        n, h, w, c = x.shape
        normed = self.norm(x)
        q, k, v = (ops.reshape(layer(normed), (n, h * w, c)) for layer in (self.q, self.k, self.v))
        mixed = ops.reshape(self.product(q, k, v), (n, h, w, c))
        return ops.add(x, self.proj_out(mixed))


class Downsample(Module):
    """Halve the resolution: zero row at the bottom and column at the right, 3x3 convolution of stride 2."""

    def __init__(self, rng: Rng, channels: int) -> None:
        self.conv = Conv2d(rng, channels, channels, stride=2, pads=(0, 1, 0, 1))

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, H, W, C) -> (N, H/2, W/2, C)."""
        return self.conv(x)


class Upsample(Module):
    """Double the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, rng: Rng, channels: int) -> None:
        self.conv = Conv2d(rng, channels, channels)

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, H, W, C) -> (N, 2H, 2W, C)."""
        return self.conv(nnops.upsample_nearest(x))


class Level(Module):
    """The blocks of one resolution; `attn` is empty or has one entry per block."""

    def __init__(self) -> None:
        self.block: list[ResBlock] = []
        self.attn: list[AttentionBlock] = []

    def add(self, rng: Rng, inputs: int, outputs: int, temb: int, cfg: UNetConfig, attend: bool) -> None:
        """Append a ResBlock and, where this resolution has it, its attention."""
        self.block.append(ResBlock(rng, inputs, outputs, temb, cfg))
        if attend:
            self.attn.append(AttentionBlock(rng, outputs, cfg))

    def run(self, i: int, x: Tensor, temb: Tensor, rng: Rng | None) -> Tensor:
        """Apply block `i` and its attention."""
        x = self.block[i](x, temb, rng)
        return self.attn[i](x) if self.attn else x


class TimeMLP(Module):
    """The two linear layers over the sinusoid; named ``temb.dense.0`` and ``temb.dense.1``."""

    def __init__(self, rng: Rng, channels: int) -> None:
        self.channels = channels
        self.dense = [Linear(rng, channels, 4 * channels), Linear(rng, 4 * channels, 4 * channels)]

    def __call__(self, t: NDArray[np.integer]) -> Tensor:
        """t (N,) -> (N, 4 channels)."""
        return self.dense[1](ops.silu(self.dense[0](Tensor(timestep_embedding(t, self.channels)))))


class Middle(Module):
    """ResBlock, attention, ResBlock at the lowest resolution."""

    def __init__(self, rng: Rng, channels: int, temb: int, cfg: UNetConfig) -> None:
        self.block_1 = ResBlock(rng, channels, channels, temb, cfg)
        self.attn_1 = AttentionBlock(rng, channels, cfg)
        self.block_2 = ResBlock(rng, channels, channels, temb, cfg)

    def __call__(self, x: Tensor, temb: Tensor, rng: Rng | None) -> Tensor:
        """Apply the three."""
        return self.block_2(self.attn_1(self.block_1(x, temb, rng)), temb, rng)


class UNet(Module):
    """The noise predictor eps(x_t, t).

    Parameters
    ----------
    cfg : UNetConfig
    rng : numpy.random.Generator
        For the initial weights.
    """

    def __init__(self, cfg: UNetConfig, rng: Rng) -> None:
        if cfg.image_size % 2 ** (len(cfg.multipliers) - 1):
            raise ShapeError(
                f"UNet: image size {cfg.image_size} cannot be halved {len(cfg.multipliers) - 1} times. "
                "Use a multiple of 2^(levels - 1), or fewer multipliers."
            )
        self.cfg = cfg
        ch = cfg.channels
        temb = 4 * ch
        self.temb = TimeMLP(rng, ch)
        self.conv_in = Conv2d(rng, cfg.image_channels, ch)
        last = len(cfg.multipliers) - 1
        here, size, skips = ch, cfg.image_size, [ch]
        self.down: list[Level] = []
        for i, m in enumerate(cfg.multipliers):
            level = Level()
            for _ in range(cfg.blocks):
                level.add(rng, here, ch * m, temb, cfg, size in cfg.attention)
                here = ch * m
                skips.append(here)
            if i < last:
                level.downsample = Downsample(rng, here)
                skips.append(here)
                size //= 2
            self.down.append(level)
        self.mid = Middle(rng, here, temb, cfg)
        up: list[Level] = []
        for i, m in reversed(list(enumerate(cfg.multipliers))):
            level = Level()
            for _ in range(cfg.blocks + 1):
                level.add(rng, here + skips.pop(), ch * m, temb, cfg, size in cfg.attention)
                here = ch * m
            if i > 0:
                level.upsample = Upsample(rng, here)
                size *= 2
            up.append(level)
        self.up = up[::-1]  # up.0 is the full resolution, as down.0 is; run from the last to the first
        self.norm_out = GroupNorm(here, cfg.groups)
        self.conv_out = Conv2d(rng, here, cfg.image_channels, gain=0.0)

    def __call__(self, x: Tensor, t: NDArray[np.integer], rng: Rng | None = None) -> Tensor:
        """Predict the noise in x.

        Parameters
        ----------
        x : Tensor, (N, H, W, C)
        t : integer array, (N,)
            Time-step of each image, 0 = one step of noise.
        rng : Generator, optional
            Given in training: dropout is on and draws from it.

        Returns
        -------
        Tensor, (N, H, W, C)
        """
        cfg = self.cfg
        want = (cfg.image_size, cfg.image_size, cfg.image_channels)
        if x.ndim != 4 or x.shape[1:] != want or np.shape(t) != x.shape[:1]:
            raise ShapeError(
                f"UNet: wants x (N, {want[0]}, {want[1]}, {want[2]}) and t (N,), got x {x.shape}, t {np.shape(t)}."
            )
        temb = ops.silu(self.temb(t))
        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for i in range(cfg.blocks):
                h = level.run(i, h, temb, rng)
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
                skips.append(h)
        h = self.mid(h, temb, rng)
        for level in reversed(self.up):
            for i in range(cfg.blocks + 1):
                h = level.run(i, ops.concat(h, skips.pop()), temb, rng)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(ops.silu(self.norm_out(h)))
