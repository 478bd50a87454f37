"""PSNR time-step importance with Hessian-guided calibration, after the talk "Diffusion Models Quantization" (X. Li).

Steps of the sampler differ in how much a quantized network hurts the final image there. So calibration data are
drawn by that importance, and blocks are reconstructed with the errors weighted by how much the denoising loss minds
them (the diagonal of Fisher's matrix in the place of the Hessian).

    idea                                          function here                              authors' code
    PSNR when one step is quantized               `refquant.quant.importance.step_errors`    none was released
    states by importance                          `refquant.quant.blocks.learning_states`
    Hessian-guided reconstruction (BRECQ)         `refquant.quant.importance.fisher`

Where we differ and why: the talk has no formulas. The first idea serves all methods that learn, for it belongs to the
calibration and not to the rounding: it is the session's ``sampling``. What is left is the loss: with ``loss="mse"``
this is `brecq`.
"""

from __future__ import annotations

from ...errors import UnknownNameError
from ..blocks import learning_states, reconstruct_units
from ..importance import finish, fisher
from ..quantized import QuantizedModel
from ..session import Session
from ..units import find_units

LOSSES = ("fisher", "mse")


def quantize(session: Session, *, loss: str = "fisher") -> QuantizedModel:
    """Quantize with importance of time-steps and of activations.

    Parameters
    ----------
    session : Session
        Its `sampling` says whether steps are drawn by importance.
    loss : {"fisher", "mse"}
        Weights of the squared error of a unit's output.

    Returns
    -------
    QuantizedModel
        Its recipe holds the PSNR of each step.
    """
    if loss not in LOSSES:
        raise UnknownNameError(f"importance: no loss is called {loss!r}. Known: {', '.join(LOSSES)}.")
    run = session.start("importance", loss=loss)
    run.nearest_weights()
    states = learning_states(run)
    units = find_units(run.network, run.layers)
    found = None
    if loss == "fisher":
        with run.phase("fisher"):
            end = finish(run.model, session.calibration.trajectories)
            found = fisher(run.model, [unit.name for unit in units], states, end)
    reconstruct_units(run, units, states, importance=found)
    run.shared_inputs()
    return run.finish()
