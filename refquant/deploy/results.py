"""What convolutions give, on the model's own trajectories: ranges for runtimes that round results, too.

This package adds bias and residual to the exact sums in float32 and needs no such range. ONNX Runtime has an integer
convolution only for results of 8 bits, so `refquant.deploy.export` can round them, with these quantizers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor
from ..diffusion.ddim import ddim_sample
from ..diffusion.sampling import NoiseSource
from ..nn.layers import Conv2d
from ..nn.module import Module
from ..quant.affine import QParams, QSpec
from ..quant.observers import StepRanges
from ..quant.quantized import QuantizedModel
from ..quant.wrap import QuantLayer, rebuild

IMAGES = 4  # trajectories; all steps of the sampler are seen


def result_quantizers(model: QuantizedModel, images: int = IMAGES, seed: int = 0) -> dict[str, QParams]:
    """Sample with a quantized model and give each convolution's result the range that it had over all steps.

    Parameters
    ----------
    model : QuantizedModel
        Unconditional.
    images, seed : int
        Trajectories, and what their noise is drawn from.

    Returns
    -------
    dict of str to QParams
        By the names of the layers; 8 bits, asymmetric, from the smallest to the largest value.
    """
    ranges: dict[str, StepRanges] = {}

    def listening(_: str, node: Module) -> Module | None:
        convolves = isinstance(node, QuantLayer) and isinstance(node.layer, Conv2d)
        return _Listener(node, ranges.setdefault(node.name, StepRanges(1))) if convolves else None

    own = replace(model, network=rebuild(model.network, listening))
    noise = NoiseSource(seed, images, model.base.image_shape)
    ddim_sample(own.denoiser(), noise.draw(), model.base.schedule, noise, steps=len(model.timesteps()))
    return {name: seen.shared(QSpec(8)) for name, seen in ranges.items()}


class _Listener(Module):
    """A layer that remembers the range of what it gave."""

    def __init__(self, layer: QuantLayer, seen: StepRanges) -> None:
        self.layer, self.seen = layer, seen

    def __call__(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        values: NDArray[np.float32] = y.data
        self.seen.update(0, values)
        return y
