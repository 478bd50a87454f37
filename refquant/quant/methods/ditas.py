"""DiTAS (Dong & Zhang, WACV 2025, arXiv 2409.07756): smoothing for all time-steps, and a low-rank branch.

1. TAS, temporal-aggregated smoothing: input channels divided by s_j = a_j^alpha / w_j^(1 - alpha), with a_j the largest
   |x_j| at any time-step;
2. alpha by a grid of 21 values for each layer: the least error of the layer's output, summed over the steps;
3. a low-rank branch L R in float beside each weight, by alternating rounding and SVD ten times;
4. activations quantized while the network runs, weights in groups of 32.

    equation                    function here                  authors' code (DiTAS 82b30d2)
    smoothing                   `balance.balancing`, b = 1/s   LinearQuant.py, smooth
    grid of alpha               `best_alpha`                   LinearQuant.py, optimization
    merging into adaLN and V    `transformer.balanced`         sample_merge_TAS.py
    L R                         `low_rank.low_rank`            LinearQuant.py, replace_module
    groups of 32                `groupwise.group_qparams`      utils_qaunt.py, weight_quant_fn

Where we differ and why.

1. **Weights are quantized after smoothing.** The released code multiplies them by s after they were rounded, so that
   smoothing costs the weights nothing; an integer model cannot do that.
2. Groups are 32 neighbouring inputs of one channel. The released view takes numbers a 32nd of the tensor apart.
3. Activations are dynamic per token; theirs are per tensor.
4. fc2 is not smoothed: behind GELU there is nothing to fold into (they divide while the network runs).
5. Calibrated with the plain network; theirs goes through the guidance wrapper.
6. Rank 4 by default: 32 of 1,152 there are 6 % of a square layer, as are 4 of 128 here.
7. What sees no tokens (adaLN, the time-step MLP), the patches and the last layer are quantized as in `nearest`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...diffusion.model import DiffusionModel
from ...errors import RangeError
from ...threads import parallel_map
from ..affine import QParams, dequantize
from ..affine import quantize as to_codes
from ..balance import balancing, fold_columns
from ..coverage import coverage
from ..curvature import samples
from ..dynamic import PerToken
from ..groupwise import as_rows, check_group, group_qparams
from ..low_rank import low_rank
from ..observers import minmax
from ..quantized import QuantizedModel
from ..record import pick
from ..session import Run, Session
from ..transformer import balanced, input_saliences, require, sources, stages, token_layers, weight_salience
from ..wrap import activation_quantizers

ALPHAS = np.linspace(0, 1, 21)
ROUNDS = 10
ROWS = 1280  # tokens that a layer's grid looks at, from all steps

Array = NDArray[np.float32]
Float64 = NDArray[np.float64]
Ranges = Callable[[Array], QParams]


def quantize(session: Session, *, rank: int = 4, group: int = 32) -> QuantizedModel:
    """Quantize a diffusion transformer by DiTAS.

    Parameters
    ----------
    session : Session
    rank : int
        Of the branches; 0 leaves them out.
    group : int
        Inputs that share a scale of the weights; 0 is all of a channel.

    Returns
    -------
    QuantizedModel
        Its recipe holds alpha of each layer.
    """
    model = session.calibration.model
    cfg = require(model, "ditas").cfg
    if not 0 <= rank <= cfg.width:
        raise RangeError(f"rank is {rank}; it must be 0 (no branch) to {cfg.width}, the width of the network.")
    for inputs in (cfg.width, cfg.mlp_ratio * cfg.width):
        check_group(inputs, group)
    smooth, alphas = smoothing(session, group)
    run = session.start("ditas", model=smooth, rank=rank, group=group)
    run.nearest_weights()
    run.shared_inputs(seen=session.calibration.observed(run.model.network) if run.input_specs() else None)
    tokens, quantizers = token_layers(cfg), activation_quantizers(run.network)
    with run.phase("branches"):
        parallel_map(lambda name: branch(run, name, rank, group), tokens)
    for name in tokens:
        spec = run.coverage.input_spec(f"{name}.input", session.input_bits)
        if spec is not None:
            quantizers[f"{name}.input"].set(PerToken(spec.bits))
    return run.finish(alpha=alphas)


def smoothing(session: Session, group: int) -> tuple[DiffusionModel, dict[str, float]]:
    """The smoothed model, and alpha of every layer whose smoothing can be folded."""
    model, trajectories = session.calibration.model, session.calibration.trajectories
    cfg, policy = model.network.cfg, coverage(session.coverage, model.network)
    names = [name for name in sources(cfg) if name in token_layers(cfg)]
    states = pick(trajectories, session.states, session.reconstruction.seed)
    seen = samples(model, names, trajectories, states, "none", tokens=max(1, ROWS // session.states))
    reach = input_saliences(model, trajectories, range(trajectories.steps), names)
    alphas: dict[str, float] = {}

    def choose(name: str) -> tuple[float, Float64]:
        w_spec = policy.weight_spec(name, session.weight_bits)
        x_spec = policy.input_spec(f"{name}.input", session.input_bits)
        ranges = None if w_spec is None else lambda w: group_qparams(minmax, w, w_spec, group)
        grid = None if x_spec is None else PerToken(x_spec.bits)
        w = model.network.state_dict()[f"{name}.weight"]
        return best_alpha(seen[name].inputs[0], w, reach[name].max(axis=0), ranges, grid)

    for stage in stages(cfg):  # of these layers, inputs are what they were; weights are those after the last stage
        now = [name for name in stage if name in names]
        found = dict(zip(now, parallel_map(choose, now), strict=True))
        model = balanced(model, {name: b for name, (_, b) in found.items()})
        alphas |= {name: alpha for name, (alpha, _) in found.items()}
    return model, {name: alphas[name] for name in names}


def best_alpha(
    x: Array, w: Array, reach: Float64, ranges: Ranges | None, grid: PerToken | None
) -> tuple[float, Float64]:
    """The alpha with the least squared error of the layer's output, and its factors b = 1/s (K,).

    Parameters
    ----------
    x : float32 array, (n, K)
        Inputs, of all steps.
    w : float32 array, (O, K)
    reach : float64 array, (K,)
        Largest |x_j| at any step.
    ranges : callable or None
        Gives the quantizer of a smoothed weight; None leaves it float.
    grid : PerToken or None
        Of the smoothed input; None leaves it float.

    Returns
    -------
    alpha : float
    b : float64 array, (K,)
    """
    exact, factors, errors = x @ w.T, [], []
    for alpha in ALPHAS:
        b = balancing(reach, weight_salience(w), float(alpha))
        smooth_x, smooth_w = (x * b).astype(np.float32), fold_columns(w, b)
        if grid is not None:
            smooth_x = grid.fake_quantize(smooth_x)
        if ranges is not None:
            smooth_w = _rounded(smooth_w, ranges(smooth_w))
        factors.append(b)
        errors.append(float(np.square(smooth_x @ smooth_w.T - exact, dtype=np.float64).sum()))
    best = int(np.argmin(errors))
    return float(ALPHAS[best]), factors[best]


def branch(run: Run, name: str, rank: int, group: int) -> None:
    """Split one layer's weight into a low-rank branch and group-wise codes."""
    spec, layer = run.coverage.weight_spec(name, run.session.weight_bits), run.layers[name]
    if spec is None:
        return
    found = low_rank(run.weight(name), rank, lambda w: group_qparams(minmax, w, spec, group), ROUNDS)
    layer.set_codes(found.codes, found.qparams)
    if found.left.shape[1]:
        layer.branch = found.left, found.right


def _rounded(w: Array, qparams: QParams) -> Array:
    rows = as_rows(w, qparams)
    return dequantize(to_codes(rows, qparams), qparams).reshape(w.shape)
