"""PSNR time-step importance with Hessian-guided calibration, after the talk "Diffusion Models Quantization" (X. Li).

Steps of the sampler differ in how much a quantized network hurts the final image there. So calibration data are
drawn by that importance, and blocks are reconstructed with the errors weighted by how much the denoising loss minds
them (the diagonal of Fisher's matrix in the place of the Hessian).

    idea                                          function here                              authors' code
    PSNR when one step is quantized               `refquant.quant.importance.step_errors`    none was released
    states by importance                          `refquant.quant.importance.step_weights`
    Hessian-guided reconstruction (BRECQ)         `refquant.quant.importance.fisher`

Where we differ and why: the talk has no formulas. Each idea can be switched off, so that it can be judged alone:
``steps="uniform"`` with ``loss="mse"`` is `brecq`.
"""

from __future__ import annotations

import numpy as np

from ...errors import UnknownNameError
from ..blocks import reconstruct_units
from ..importance import finish, fisher, step_errors, step_weights
from ..quantized import QuantizedModel
from ..record import pick
from ..session import Arrays, Session
from ..units import find_units

STEPS = ("psnr", "uniform")
LOSSES = ("fisher", "mse")


def quantize(session: Session, *, steps: str = "psnr", loss: str = "fisher") -> QuantizedModel:
    """Quantize with importance of time-steps and of activations.

    Parameters
    ----------
    session : Session
    steps : {"psnr", "uniform"}
        How often each step's states are drawn.
    loss : {"fisher", "mse"}
        Weights of the squared error of a unit's output.

    Returns
    -------
    QuantizedModel
        Its recipe holds the PSNR of each step.
    """
    for given, known in ((steps, STEPS), (loss, LOSSES)):
        if given not in known:
            raise UnknownNameError(f"importance: {given!r} is unknown. Known: {', '.join(known)}.")
    run, calibration = session.start("importance", steps=steps, loss=loss), session.calibration
    run.nearest_weights()
    run.shared_inputs()
    facts, weights = {}, None
    if steps == "psnr":

        def measure() -> Arrays:
            with run.phase("importance"):
                return {"mse": step_errors(run.model, run.finish().denoiser(), calibration.trajectories)[0]}

        error = run.once("importance", measure)["mse"]
        weights = step_weights(error)
        facts["psnr_of_steps"] = np.round(-10 * np.log10(np.maximum(error, 1e-20) / 4), 2).tolist()
    states = pick(calibration.trajectories, session.states, session.reconstruction.seed, weights)
    run.forget_inputs()  # blocks are reconstructed with activations in float
    units = find_units(run.network, run.layers)
    found = None
    if loss == "fisher":
        with run.phase("fisher"):
            end = finish(run.model, run.model.denoiser(), calibration.trajectories, calibration.trajectories.steps - 1)
            found = fisher(run.model, [unit.name for unit in units], states, end)
    reconstruct_units(run, units, states, importance=found)
    run.shared_inputs()
    return run.finish(**facts)
