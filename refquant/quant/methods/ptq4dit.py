"""PTQ4DiT (Wu et al., NeurIPS 2024, arXiv 2405.16005): balance salient channels, for all time-steps at once.

A few channels of a layer's input are large, a few of its weight's columns, rarely the same ones; and which channels of
the input are large changes with t.

1. CSB, channel-wise salience balancing: input channels times b = sqrt(s_x s_w) / s_x, the weight's columns by 1 / b;
2. SSC, Spearman's rho-guided calibration: s_x is a mean over time-steps with more weight on those whose large channels
   are not the weight's;
3. folding b into adaLN and V, so that nothing is left to do at run time;
4. block reconstruction (AdaRound) of the balanced network.

    equation                   function here               authors' code (PTQ4DiT c77659e)
    balance                    `balance.balancing`         quant/quant_layer.py, QuantModule
    weights of time-steps      `balance.ssc_weights`       quant/quant_layer.py, QuantModule
    folding                    `transformer.balanced`      none: scales are applied while the network runs
    reconstruction             `blocks.reconstruct_units`  quant/block_recon.py

Where we differ and why.

1. The balance really is folded, in the float model, before anything is quantized: what is measured is what would run.
2. The final linear layer is balanced, too, by the same rule; fc2 is not, as there.
3. The balance of proj is found before that of qkv, whose rows it changes; theirs look at each layer as it was.
4. rho is taken from the maxima over all recorded trajectories of a step; theirs is one a sample.
5. Activations get a range by the mse search; they learn its step (rate 4e-5).
6. adaLN and the time-step MLP are quantized where the coverage says so; theirs stay in float (`coverage="released"`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import RangeError, UnknownNameError
from ..balance import balancing, ssc_salience
from ..blocks import learning_states, reconstruct_units
from ..quantized import QuantizedModel
from ..session import Session
from ..transformer import balanced, input_saliences, require, sources, stages, weight_salience
from ..units import find_units

SALIENCES = ("ssc", "mean", "max", "none")


def quantize(session: Session, *, salience: str = "ssc", time_steps: int = 25) -> QuantizedModel:
    """Quantize a diffusion transformer by PTQ4DiT.

    Parameters
    ----------
    session : Session
        Its effort is that of the block reconstruction.
    salience : {"ssc", "mean", "max", "none"}
        How the time-steps' saliences become one: by Spearman's rho, all alike, the largest; or no balance.
    time_steps : int
        Steps of the sampler that are looked at, evenly spread; at most all of them are.

    Returns
    -------
    QuantizedModel
        Its recipe holds the largest and the smallest factor of each layer.
    """
    if salience not in SALIENCES:
        raise UnknownNameError(f"ptq4dit knows no salience {salience!r}. Known: {', '.join(SALIENCES)}.")
    if time_steps < 1:
        raise RangeError(f"time_steps is {time_steps}; at least 1 step is needed to see a salience.")
    model = session.calibration.model
    network = require(model, "ptq4dit")
    trajectories = session.calibration.trajectories
    count = min(time_steps, trajectories.steps)
    steps = np.linspace(0, trajectories.steps - 1, count).round().astype(int).tolist()
    seen = input_saliences(model, trajectories, steps, list(sources(network.cfg))) if salience != "none" else {}
    factors: dict[str, NDArray[np.float64]] = {}
    for names in stages(network.cfg) if seen else ():
        weights = model.network.state_dict()
        found = {name: balancing(*_saliences(seen[name], weights[f"{name}.weight"], salience)) for name in names}
        model, factors = balanced(model, found), factors | found
    run = session.start("ptq4dit", model=model, salience=salience, time_steps=time_steps)
    run.nearest_weights()
    reconstruct_units(run, find_units(run.network, run.layers), learning_states(run))
    run.shared_inputs(seen=session.calibration.observed(run.model.network) if run.input_specs() else None)
    facts = {name: [float(b.min()), float(b.max())] for name, b in factors.items()}
    return run.finish(balance=facts)


def _saliences(
    seen: NDArray[np.float64], weight: NDArray[np.float32], how: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """s_x of all time-steps together and s_w, both (K,); seen (T, K), weight (O, K)."""
    s_w = weight_salience(weight)
    if how == "ssc":
        return ssc_salience(list(seen), s_w), s_w
    return seen.mean(axis=0) if how == "mean" else seen.max(axis=0), s_w
