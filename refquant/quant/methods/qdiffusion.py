"""Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304): all time-steps in the calibration, split shortcuts.

1. Calibration states are drawn evenly from the sampler's steps, because activations change with t.
2. A shortcut over concat(h, skip) gets two quantizers, one for each part, whose ranges differ.
3. Weights by AdaRound, block after block, each ResBlock with its projection of the time embedding inside.
4. Activations: one range for all t, whose step is then learned on each unit's output.

    equation                    function here               authors' code (q-diffusion 715783d)
    states, every few steps     `blocks.learning_states`    qdiff/utils.py:325-348
    split shortcuts (eq. 8, 9)  `split.split_shortcuts`     qdiff/quant_layer.py:231-330
    block reconstruction        `blocks.reconstruct_units`  qdiff/block_recon.py:1-57
    learned activation steps    `learn_steps.learn_steps`   qdiff/block_recon.py:58-140

Where we differ and why.

1. Their regulariser reaches the first part of a split weight only; here both parts are ordinary layers.
2. Their CIFAR script takes raw min-max ranges before learning; we start from the mse search, as `nearest` does, so
   that what learning adds is seen.
3. The rate is relative to each step; theirs is 4e-4 for all (see `learn_steps`).
4. As many iterations for the steps as for the weights of a unit, by default; theirs are 5,000 and 20,000.
5. States are drawn as the session says; point 1 above is its ``sampling="uniform"``.
"""

from __future__ import annotations

from ..blocks import learning_states, reconstruct_units
from ..learn_steps import learn_steps
from ..quantized import QuantizedModel
from ..session import Session
from ..split import split_shortcuts
from ..units import find_units


def quantize(session: Session, *, split: bool = True, step_iterations: int | None = None) -> QuantizedModel:
    """Quantize by Q-Diffusion.

    Parameters
    ----------
    session : Session
    split : bool
        Split the shortcuts of the up path.
    step_iterations : int, optional
        For the activation steps of each unit: the session's iterations by default, 0 to leave them as searched.

    Returns
    -------
    QuantizedModel
    """
    iterations = session.reconstruction.iterations if step_iterations is None else step_iterations
    model = session.calibration.model
    run = session.start(
        "qdiffusion", model=split_shortcuts(model) if split else model, split=split, step_iterations=iterations
    )
    units = find_units(run.network, run.layers)
    run.nearest_weights()
    states = learning_states(run)
    reconstruct_units(run, units, states)
    run.shared_inputs(seen=session.calibration.observed(run.model.network) if split else None)
    if iterations and run.input_specs():
        learn_steps(run, units, states, iterations)
    return run.finish()
