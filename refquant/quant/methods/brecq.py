"""BRECQ (Li et al., ICLR 2021, arXiv 2102.05426): learn the rounding of one block after the other.

AdaRound (Nagel et al. 2020) learns, for each layer, which weights are rounded up, so that the layer's *output* on
calibration data stays what it was. BRECQ takes a block (a ResBlock, an attention) as the unit: errors inside of it
may cancel, and the block's output is what the rest of the network sees.

    equation                                     function here               authors' code (TFMQ-DM)
    soft rounding, its regulariser               `adaround`                  quant/adaptive_rounding.py:12-70
    min |unit(x^) - y|² + 0.01 R (eq. 10)        `reconstruct.reconstruct`   quant/reconstruction.py:72-209
    units and their order                        `units.find_units`          quant/calibration.py:56-84
    x^ of the quantized, y of the float network  `blocks.reconstruct_units`  quant/data_utill.py:114-169

Where we differ and why.

1. A ResBlock's projection of the time embedding belongs to its block here, as in BRECQ's adaptation by Q-Diffusion:
   this is the target that TFMQ-DM calls inappropriate.
2. The squared error is not weighted by Fisher's diagonal, which no diffusion paper's script switches on; it is in
   `importance`.
3. Units go by order of execution (`refquant.quant.units`), and dropout is off: the released codes leave it on.
4. States are drawn as the session says; ``sampling="uniform"`` is the paper's way.
5. Activations: one range for all time-steps, by mse search. The paper learns their steps (see `qdiffusion`).
"""

from __future__ import annotations

from ...errors import UnknownNameError
from ..blocks import learning_states, reconstruct_units
from ..quantized import QuantizedModel
from ..session import Session
from ..units import Unit, find_units

GRAINS = ("block", "layer")


def quantize(session: Session, *, grain: str = "block") -> QuantizedModel:
    """Learn the rounding by block, or by layer (which is AdaRound); activations as in `nearest`.

    Parameters
    ----------
    session : Session
    grain : {"block", "layer"}
        What learns together.

    Returns
    -------
    QuantizedModel
    """
    if grain not in GRAINS:
        raise UnknownNameError(f"no grain of reconstruction is called {grain!r}. Known: {', '.join(GRAINS)}.")
    run = session.start("brecq", grain=grain)
    run.nearest_weights()
    units = find_units(run.network, run.layers)
    if grain == "layer":
        units = [Unit(layer.name, layer, (layer,)) for unit in units for layer in unit.layers]
    reconstruct_units(run, units, learning_states(run))
    run.shared_inputs()
    return run.finish()
