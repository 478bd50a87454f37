"""The same UNet in PyTorch, with the same weights: the peer of the float benchmarks.

Written functionally on a dictionary of tensors that carry this package's names, so that there is
no second module tree to keep equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..nn.unet import UNet, UNetConfig, timestep_embedding

LAYOUTS = {"pytorch eager": torch.contiguous_format, "pytorch channels-last": torch.channels_last}


class TorchUNet:
    """Weights by name, and the forward pass."""

    def __init__(self, cfg: UNetConfig, weights: dict[str, torch.Tensor]) -> None:
        self.cfg, self.w = cfg, weights

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], stride, 0 if stride == 2 else weight.shape[-1] // 2)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.cfg.groups, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)

    def block(self, name: str, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = h + self.linear(f"{name}.temb_proj", temb)[:, :, None, None]
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        return (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x) + h

    def attend(self, name: str, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        n = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", n).reshape(b, c, h * w) for part in "qkv")
        p = torch.softmax(q.transpose(1, 2) @ k * c**-0.5, dim=-1)
        return x + self.conv(f"{name}.proj_out", (v @ p.transpose(1, 2)).reshape(b, c, h, w))

    def run(self, name: str, i: int, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        x = self.block(f"{name}.block.{i}", x, temb)
        return self.attend(f"{name}.attn.{i}", x) if f"{name}.attn.{i}.q.weight" in self.w else x

    def __call__(self, x: torch.Tensor, sinusoid: torch.Tensor) -> torch.Tensor:
        """x (N, C, H, W), sinusoid (N, channels) -> (N, C, H, W)."""
        cfg, levels = self.cfg, len(self.cfg.multipliers)
        temb = F.silu(self.linear("temb.dense.1", F.silu(self.linear("temb.dense.0", sinusoid))))
        h = self.conv("conv_in", x)
        skips = [h]
        for level in range(levels):
            for i in range(cfg.blocks):
                h = self.run(f"down.{level}", i, h, temb)
                skips.append(h)
            if level < levels - 1:
                h = self.conv(f"down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
                skips.append(h)
        h = self.block("mid.block_2", self.attend("mid.attn_1", self.block("mid.block_1", h, temb)), temb)
        for level in reversed(range(levels)):
            for i in range(cfg.blocks + 1):
                h = self.run(f"up.{level}", i, torch.cat([h, skips.pop()], dim=1), temb)
            if level > 0:
                h = self.conv(f"up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0))
        return self.conv("conv_out", F.silu(self.norm("norm_out", h)))


def build(model: UNet, layout: Any, threads: int) -> TorchUNet:
    """Copy a network: OHWI weights become OIHW."""
    torch.set_num_threads(threads)
    weights = {}
    for name, array in model.state_dict().items():
        tensor = torch.tensor(array)
        if tensor.ndim == 4:
            tensor = tensor.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        weights[name] = tensor.requires_grad_(True)
    return TorchUNet(model.cfg, weights)


def _inputs(peer: TorchUNet, x: np.ndarray, t: Any, layout: Any) -> tuple[torch.Tensor, torch.Tensor]:
    steps = np.broadcast_to(np.asarray(t), (len(x),))
    return torch.tensor(x).contiguous(memory_format=layout), torch.tensor(timestep_embedding(steps, peer.cfg.channels))


def forward(
    peer: TorchUNet, x: np.ndarray, t: Any, layout: Any, *, compiled: bool = False
) -> Callable[[], torch.Tensor]:
    """Return a forward pass without a graph."""
    images, sinusoid = _inputs(peer, x, t, layout)
    network: Any = compiled_with_constants(peer) if compiled else peer

    def run() -> torch.Tensor:
        with torch.no_grad():
            return network(images, sinusoid)

    return run


class _Module(torch.nn.Module):
    """The network with weights that torch.compile knows as such, and may bring into the order that it likes best."""

    def __init__(self, peer: Any) -> None:
        super().__init__()
        self.kind, self.cfg, self.names = type(peer), peer.cfg, list(peer.w)
        for name, weight in peer.w.items():  # parameters have no dots in their names
            self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(weight.detach(), requires_grad=False))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        weights = {name: getattr(self, name.replace(".", "_")) for name in self.names}
        return self.kind(self.cfg, weights)(*inputs)


def compiled_with_constants(peer: Any) -> Any:
    """torch.compile of a network, with weights `w` by name, for these shapes alone ("freezing")."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torch.compile(_Module(peer).eval(), dynamic=False)


def update(peer: TorchUNet, x: np.ndarray, t: Any, layout: Any) -> Callable[[], object]:
    """Return one update with Adam and clipping; the network is the same as ours, the loss too."""
    images, sinusoid = _inputs(peer, x, t, layout)
    parameters = list(peer.w.values())
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def run() -> object:
        noise = torch.randn_like(images)
        optimizer.zero_grad()
        loss = F.mse_loss(peer(0.6 * images + 0.8 * noise, sinusoid), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss

    return run
