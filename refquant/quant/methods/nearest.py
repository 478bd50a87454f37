"""Nearest rounding, the baseline that the papers call "Linear": choose scales, round, done.

    equation                                       function here                  authors' code (TFMQ-DM)
    weights: per output channel, asymmetric        `Run.nearest_weights`          quant/quant_layer.py:193-204
    activations: one range for all time-steps      `Run.shared_inputs`            quant/quant_layer.py:20-64
    q = clamp(round(x / s) + z)                    `refquant.quant.affine`        quant/quant_layer.py:211-227

Where we differ and why. The released codes leave some layers in float (see `refquant.quant.coverage`); here the
coverage is an option of every method. Weights are signed, which moves codes and zero point by 2^(b-1) and changes
no value.
"""

from __future__ import annotations

from ..quantized import QuantizedModel
from ..session import Session


def quantize(session: Session, *, search: str = "mse") -> QuantizedModel:
    """Round weights to the nearest code, and activations likewise, with one scale for all time-steps.

    Parameters
    ----------
    session : Session
    search : {"mse", "minmax"}
        How ranges are chosen, of weights and of activations.

    Returns
    -------
    QuantizedModel
    """
    run = session.start("nearest", search=search)
    run.nearest_weights(search)
    run.shared_inputs(search)
    return run.finish()
