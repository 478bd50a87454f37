"""Nearest rounding, the baseline that the papers call "Linear": choose scales, round, done.

    equation                                       function here                  authors' code (TFMQ-DM)
    weights: per output channel, asymmetric        `quantize_nearest`             quant/quant_layer.py:193-204
    activations: one range for all time-steps      `observe_inputs`, observers    quant/quant_layer.py:20-64
    q = clamp(round(x / s) + z)                    `refquant.quant.affine`        quant/quant_layer.py:211-227

Where we differ and why. The released codes leave some layers in float (TFMQ: shortcuts, down-sampling,
first and last) or wrap all (Q-Diffusion). Here **every convolution and linear layer** has quantized
weights and inputs at the nominal bits; attention's two products and the normalisations stay float.
Weights are signed, which moves codes and zero point by 2^(b-1) and changes no value.
"""

from __future__ import annotations

from ...diffusion.model import DiffusionModel
from ...errors import UnknownNameError
from ...threads import parallel_map
from .. import observers
from ..affine import QSpec
from ..calibrate import CalibrationConfig
from ..observers import RangeObserver
from ..quantized import QuantizedModel
from ..wrap import QuantLayer, wrap

SEARCHES = ("mse", "minmax")


def quantize_nearest(
    model: DiffusionModel,
    inputs: dict[str, RangeObserver],
    cfg: CalibrationConfig,
    *,
    weight_bits: int = 8,
    input_bits: int = 8,
    search: str = "mse",
) -> QuantizedModel:
    """Round weights to the nearest code, and activations likewise, with one scale for all time-steps.

    Parameters
    ----------
    model : DiffusionModel
    inputs : dict of str to RangeObserver
        What `refquant.quant.calibrate.observe_inputs` saw.
    cfg : CalibrationConfig
        How it was made, for the recipe.
    weight_bits, input_bits : int
        2 to 8.
    search : {"mse", "minmax"}
        How ranges are chosen, of weights and of activations.

    Returns
    -------
    QuantizedModel
    """
    if search not in SEARCHES:
        raise UnknownNameError(f"no range search is called {search!r}. Known: {', '.join(SEARCHES)}.")
    weight_spec = QSpec(weight_bits, signed=True, symmetric=False, axis=0)
    input_spec = QSpec(input_bits, signed=False, symmetric=False)
    network, layers = wrap(model.network)

    def quantize(layer: QuantLayer) -> None:
        w, seen = layer.layer.weight.data, inputs[layer.name]
        if search == "mse":
            layer.quantize_weight(observers.mse(w, weight_spec))
            layer.input_qparams = seen.mse(input_spec)
        else:
            layer.quantize_weight(observers.minmax(w, weight_spec))
            layer.input_qparams = seen.minmax(input_spec)

    parallel_map(quantize, layers.values())
    recipe = {
        "method": "nearest",
        "weight_bits": weight_bits,
        "input_bits": input_bits,
        "search": search,
        "calibration": cfg.to_json(),
        "coverage": "all convolutions and linear layers; attention products and normalisations stay float",
    }
    return QuantizedModel(model, network, layers, recipe)
