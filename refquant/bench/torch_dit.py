"""The same diffusion transformer in PyTorch, with the same weights: the peer of the float benchmarks.

Functional, as `torch_unet`; attention is PyTorch's own, which is its fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..nn.dit import LN_EPS, DiT, DiTConfig, timestep_embedding
from .torch_unet import compiled_with_constants


class TorchDiT:
    """Weights by name, and the forward pass."""

    def __init__(self, cfg: DiTConfig, weights: dict[str, torch.Tensor]) -> None:
        self.cfg, self.w = cfg, weights

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def modulated(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.cfg.width,), eps=LN_EPS) * (1 + scale[:, None]) + shift[:, None]

    def attend(self, name: str, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        together = self.linear(f"{name}.qkv", x).reshape(n, tokens, 3, self.cfg.heads, -1)
        mixed = F.scaled_dot_product_attention(*together.permute(2, 0, 3, 1, 4).unbind(0))
        return self.linear(f"{name}.proj", mixed.transpose(1, 2).reshape(n, tokens, width))

    def block(self, name: str, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.linear(f"{name}.adaLN_modulation.1", c).chunk(6, 1)
        x = x + gate_1[:, None] * self.attend(f"{name}.attn", self.modulated(x, shift_1, scale_1))
        h = F.gelu(self.linear(f"{name}.mlp.fc1", self.modulated(x, shift_2, scale_2)), approximate="tanh")
        return x + gate_2[:, None] * self.linear(f"{name}.mlp.fc2", h)

    def __call__(self, x: torch.Tensor, sinusoid: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """x (N, C, H, W), sinusoid (N, 256), y (N,) of a conditional network -> (N, C, H, W)."""
        cfg, side = self.cfg, self.cfg.image_size // self.cfg.patch
        c = self.linear("t_embedder.mlp.2", F.silu(self.linear("t_embedder.mlp.0", sinusoid)))
        if y is not None:
            c = c + F.embedding(y, self.w["y_embedder.embedding_table.weight"])
        c = F.silu(c)  # all modulations begin with it
        h = F.conv2d(x, self.w["x_embedder.proj.weight"], self.w["x_embedder.proj.bias"], cfg.patch)
        h = h.flatten(2).transpose(1, 2) + self.w["positions"]
        for i in range(cfg.depth):
            h = self.block(f"blocks.{i}", h, c)
        shift, scale = self.linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
        h = self.linear("final_layer.linear", self.modulated(h, shift, scale))
        h = h.reshape(len(x), side, side, cfg.patch, cfg.patch, -1).permute(0, 5, 1, 3, 2, 4)
        return h.reshape(len(x), -1, cfg.image_size, cfg.image_size)[:, : cfg.image_channels]


def build(model: DiT, threads: int) -> TorchDiT:
    """Copy a network: the patches' OHWI weight becomes OIHW."""
    torch.set_num_threads(threads)
    weights = {name: torch.tensor(array) for name, array in model.state_dict().items()}
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].permute(0, 3, 1, 2).contiguous()
    weights["positions"] = torch.tensor(model.positions)
    return TorchDiT(model.cfg, weights)


def forward(
    peer: TorchDiT, x: np.ndarray, t: Any, y: np.ndarray | None, *, compiled: bool = False
) -> Callable[[], torch.Tensor]:
    """Return a forward pass without a graph."""
    steps = np.broadcast_to(np.asarray(t), (len(x),))
    inputs = [torch.tensor(x), torch.tensor(timestep_embedding(steps))] + ([] if y is None else [torch.tensor(y)])
    network: Any = compiled_with_constants(peer) if compiled else peer

    def run() -> torch.Tensor:
        with torch.no_grad():
            return network(*inputs)

    return run
