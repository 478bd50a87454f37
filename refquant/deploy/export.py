"""A quantized model as an ONNX network, for other runtimes: QuantizeLinear and DequantizeLinear around every product.

    eps = graph(x (N, C, H, W), step)           the noise predictor: what a sampler calls, at this step of the sampler
    eps = graph(x (N, C, H, W), y (N,), step)   of a conditional network, for images of these classes, K for "no class"

Where this package multiplies integers, the graph holds the pattern that runtimes recognise,

    codes of weights -> DequantizeLinear ------------------------v
    x -> QuantizeLinear -> DequantizeLinear -> Conv (MatMul) -> ...

and everything between the products is float32, as it is here. In exact arithmetic it is the function that
`--engine fake` computes; float sums in another order move codes on the edge of two.

What is known before sampling is computed now, as in `refquant.deploy.lower`: the temporal features of every step (of a
transformer: its modulations, of every step and class) are rows of a table, which ``step`` (and ``y``) look up. So are
scales that depend on the step (finite set calibration) and what makes noise out of v, or corrects it. Runtimes multiply
integers only where scales are constant; with scales in tables they compute in float32, unless `step` says which step
the graph is for.

Weights. Runtimes want codes of int8 whose zero is 0. The codes of a weight without their zero point, q - z, are just
that where they fit a byte, as they do up to 7 bits. Up to 4 bits, q is stored in half a byte and z subtracted in the
graph, once, when it is loaded. Asymmetric weights of 8 bits keep their zero points (ONNX Runtime multiplies those in
integers, too; OpenVINO in float32).

Results. ONNX Runtime has an integer convolution only for results that are rounded to 8 bits as well. Where `results`
gives their quantizers (`refquant.deploy.results` measures them), they are: a second rounding that this package does
without. Its matrix products, and with them transformers, need none.

Errors: `LoweringError` with the layer's name where something has no such form: zero points that are no codes, grids
that are no scale and zero point, weights with scales for groups of inputs or with a low-rank branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LoweringError, RangeError
from ..nn.dit import DiT
from ..nn.unet import UNet
from ..quant.affine import QParams
from ..quant.quantized import QuantizedModel
from .export_dit import TransformerWriter
from .export_unet import UNetWriter
from .qdq import Writer

WRITERS: dict[type, type[Writer]] = {UNet: UNetWriter, DiT: TransformerWriter}


def export(model: QuantizedModel, *, step: int | None = None, results: Mapping[str, QParams] | None = None) -> Any:
    """Write a quantized model down as an ONNX network.

    Parameters
    ----------
    model : QuantizedModel
        By any method, with any coverage: what is not quantized is float32 in the graph, too.
    step : int, optional
        Make a graph for this step of the sampler alone, without tables and without the input ``step``.
    results : mapping of str to QParams, optional
        By the names of layers: also round what they give.

    Returns
    -------
    onnx.ModelProto
        Its properties hold the sampler's time-steps and their alpha_bar, as JSON lists.

    Raises
    ------
    LoweringError
        Something has no such form; the message names it.
    RangeError
        There is no such step.
    RefquantError
        The package onnx is missing.
    """
    steps = len(model.timesteps())
    if step is not None and not 0 <= step < steps:
        raise RangeError(f"step is {step}; this model's sampler has {steps}, from 0 (the noisiest) to {steps - 1}.")
    writer = WRITERS.get(type(model.network))
    if writer is None:
        kinds = " or a ".join(network.__name__ for network in WRITERS)
        raise LoweringError(f"{model.base.name} has no QDQ form: its network is a {type(model.network).__name__}, "
                            f"not a {kinds}.")  # fmt: skip
    return writer(model, step, results or {}).model()
