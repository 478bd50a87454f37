"""Reconstruct a network unit after unit: each learns its rounding on what the quantized network before it gives.

    for each unit, in order:
        x^ = the unit's input in the network with quantized weights (finished units: learned; later ones: nearest)
        y  = the float unit's output on the float network's own input
        learn the rounding of the unit's weights so that unit(x^) comes close to y

Activations stay float meanwhile, as in BRECQ, Q-Diffusion and TFMQ-DM (``quant/data_utill.py:114-169``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .importance import step_errors, step_weights
from .reconstruct import reconstruct
from .record import States, Walk, pick
from .session import Arrays, Run
from .units import Unit
from .wrap import QuantLayer

TRIED = 5  # one step in so many is tried for its importance: 10 of 50, in a tenth of the time of all


def learning_states(run: Run) -> States:
    """The states that weights are learned on, drawn evenly or by the importance of their steps (`Session.sampling`).

    The importance is that of the run's weights as they are now, rounded to nearest; it goes into the recipe. What it
    buys: a 4-bit model of the shipped network does a third of its damage in the first 3 of 50 steps, from which even
    sampling takes 6 % of the states (`tfmq`, 200 iterations: 25.2 dB evenly, 27.8 dB by importance).

    Parameters
    ----------
    run : Run

    Returns
    -------
    States
    """
    session, trajectories, weights = run.session, run.session.calibration.trajectories, None
    if session.sampling == "importance" and any(layer.codes is not None for layer in run.layers.values()):

        def measure() -> Arrays:
            with run.phase("importance"):
                return {"mse": step_errors(run.model, run.finish().denoiser(), trajectories, every=TRIED)}

        mse = run.once("importance", measure)["mse"]
        weights = step_weights(mse)
        run.recipe["psnr_of_steps"] = np.round(-10 * np.log10(np.maximum(mse, 1e-20) / 4), 2).tolist()
    return pick(trajectories, session.states, session.reconstruction.seed, weights)


def reconstruct_units(run: Run, units: Sequence[Unit], states: States, *, importance: Arrays | None = None) -> None:
    """Learn the rounding of these units and leave their layers with the codes found.

    Parameters
    ----------
    run : Run
        Its weights have quantizers already.
    units : sequence of Unit
        Of the run's network, in the order of reconstruction. Layers without a weight quantizer stay float.
    states : States
        Inputs of the network.
    importance : dict of str to array, optional
        By unit name, shaped like its outputs (M, ...): weights of the squared errors (Fisher diagonal).
    """
    cfg = run.session.reconstruction
    todo = [(unit, [layer for layer in unit.layers if layer.weight_qparams is not None]) for unit in units]
    todo = [(unit, layers) for unit, layers in todo if layers]
    names = [unit.name for unit, _ in todo]
    with run.phase("blocks"), run.bar(len(todo) * cfg.iterations, "blocks") as bar:
        quantized, float_walk = Walk(run.network, names, states), Walk(run.model.network, names, states)
        for unit, layers in todo:

            def learn(unit: Unit = unit, layers: list[QuantLayer] = layers) -> Arrays:
                inputs, target = quantized.inputs(unit.name), float_walk.output(unit.name)
                weights = [run.weight(layer.name) for layer in layers]
                given = None if importance is None else importance[unit.name]
                losses = reconstruct(
                    unit.module, layers, weights, inputs, target, cfg, importance=given, on_step=bar.update
                )
                return {**{layer.name: layer.codes for layer in layers}, "losses": losses}

            found = run.once(f"unit {unit.name}", learn)
            for layer in layers:
                layer.set_codes(found[layer.name], layer.weight_qparams)
