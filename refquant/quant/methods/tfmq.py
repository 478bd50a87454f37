"""TFMQ-DM (Huang et al., CVPR 2024, arXiv 2311.16503): keep what the network is told about the time-step.

The layers that see nothing but t, the time MLP h and the projection g_i of every ResBlock, form the *Temporal
Information Block*. Reconstructed inside of ResBlocks they are fitted to a target that hardly shows their error; a
temporal feature that is off by a little stands for another time-step. So

1. TIAR, temporal information aware reconstruction: all of them together learn their rounding, on what they give:

       min  sum_i |g_i(h(t)) - g^_i(h^(t))|²  + 0.01 R                                                      (eq. 7)

2. FSC, finite set calibration: their activations take T different values and no more, so each step of the sampler
   gets a scale and zero point of its own, from the exact range;
3. block reconstruction of the rest, in which the temporal layers stay as they are.

    equation                           function here             authors' code (TFMQ-DM d551eac)
    which layers see t alone           `units.temporal_layers`   quant/quant_model.py:31-46
    the block                          `temporal.TemporalBlock`  quant/quant_block.py:36-127
    TIAR (eq. 7)                       `tiar`                    quant/reconstruction.py:212-318
    FSC                                `finite_set_calibration`  quant/calibration.py:108-152
    blocks without their projection    `blocks`                  quant/calibration.py:56-84
    journal version: cache, selection  `with_cache`              not released (arXiv 2407.19547)

Where we differ and why.

1. TIAR sees all T time-steps; the released code's calibration set holds 20 different ones (`time_steps=20`). It
   costs nothing, and the other t are no longer unseen.
2. `fsc="temporal"` is the paper's scope, "all" the released code's, "none" one range for all steps.
3. Ranges of a step are exact (`ranges="exact"`); the released ones are an average over 17 batches, in which the
   first 16 samples weigh 0.44 (`ranges="running"`).
4. One set of trajectories feeds everything; the released code samples each step's states anew, and evenly, which is
   the session's ``sampling="uniform"`` here.
5. A DiT, which the paper does not treat, has its temporal features in the modulations of adaLN: shifts, scales and
   gates. They depend on the class as well, so TIAR and the tables see every time-step with every class and with none.
6. Units in order of execution (`order="registration"` repeats the released order, which takes the up path of this
   network in reverse), dropout off, coverage as asked (theirs is `coverage="released"`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...autograd import no_grad
from ...errors import RangeError, UnknownNameError
from ..activations import KINDS, step_tables
from ..blocks import learning_states, reconstruct_units
from ..cache import disturbances, feature_cache
from ..quantized import QuantizedModel
from ..reconstruct import reconstruct
from ..session import Arrays, Run, Session
from ..temporal import TemporalBlock, every_condition, quantized_features
from ..temporal import features as temporal_features
from ..units import ORDERS, find_units, temporal_layers
from ..wrap import activation_quantizers

PIECE = 1024  # conditions whose float features are made at a time
TIAR_BATCH = 256  # time-steps for each step of Adam: they cost a thousandth of what images do
SCOPES = ("temporal", "all", "none")
FEATURES = ("computed", "cached", "selected")


def quantize(
    session: Session,
    *,
    fsc: str = "all",
    ranges: str = "exact",
    time_steps: int = 0,
    tiar_iterations: int = 1000,
    order: str = "execution",
    features: str = "computed",
) -> QuantizedModel:
    """Quantize by TFMQ-DM.

    Parameters
    ----------
    session : Session
    fsc : {"all", "temporal", "none"}
        Which activations have one range for each step of the sampler.
    ranges : {"exact", "running"}
        How the range of a step is found.
    time_steps : int
        TIAR looks at this many of the sampler's time-steps, evenly spread; 0 is all T of the schedule.
    tiar_iterations : int
        Steps of Adam for the temporal layers.
    order : {"execution", "registration"}
        Of the units.
    features : {"computed", "cached", "selected"}
        Temporal features at run time: from the quantized layers; from a table of quantized features (journal
        version); or, feature by feature, whichever is closer to the float one.

    Returns
    -------
    QuantizedModel
    """
    # all names before the work: a run may take an hour
    for what, given, known in (
        ("scope of finite set calibration", fsc, SCOPES), ("range over a step", ranges, KINDS),
        ("order of units", order, ORDERS), ("kind of temporal features", features, FEATURES),
    ):  # fmt: skip
        if given not in known:
            raise UnknownNameError(f"no {what} is called {given!r}. Known: {', '.join(known)}.")
    run = session.start(
        "tfmq", fsc=fsc, ranges=ranges, time_steps=time_steps, tiar_iterations=tiar_iterations, order=order,
        features=features,
    )  # fmt: skip
    if features != "computed" and run.model.classes:
        raise RangeError(
            f"tfmq: features={features!r} keeps one row a step, and {run.model.name} has one for each of "
            f"{run.model.classes + 1} classes as well. Use features='computed'."
        )
    temporal = temporal_layers(run.model.network)
    run.nearest_weights()
    tiar(run, temporal, seen_time_steps(run, time_steps), tiar_iterations)
    units = find_units(run.network, run.layers, without=frozenset(temporal), order=order)
    reconstruct_units(run, units, learning_states(run))
    finite_set_calibration(run, temporal, fsc, ranges)
    made = run.finish(temporal_layers=temporal)
    return made if features == "computed" else with_cache(made, run, features)


def seen_time_steps(run: Run, count: int) -> np.ndarray:
    """The time-steps that TIAR looks at: all T, or `count` of those that the sampler visits, evenly spread."""
    visited = run.session.calibration.trajectories.t
    if not 0 <= count <= len(visited):
        raise RangeError(f"time_steps is {count}; it must be 0 (all) to {len(visited)}, the steps of the sampler.")
    if count == 0:
        return np.arange(run.model.schedule.timesteps)
    return visited[np.linspace(0, len(visited) - 1, count).round().astype(int)]


def tiar(run: Run, temporal: list[str], t: np.ndarray, iterations: int) -> None:
    """Learn the rounding of all temporal layers together, on the temporal features of t (N,) and of every class."""
    layers = [run.layers[name] for name in temporal if run.layers[name].weight_qparams is not None]
    cfg = replace(run.session.reconstruction, iterations=iterations, batch=TIAR_BATCH)
    if not layers:
        return

    def learn() -> Arrays:
        inputs = [part for part in every_condition(t, run.model.classes) if part is not None]
        float_block, block = TemporalBlock(run.model.network), TemporalBlock(run.network)
        with no_grad():  # in pieces: 11,000 conditions of mnist-dit have 214 MB of features
            pieces = [[part[i : i + PIECE] for part in inputs] for i in range(0, len(inputs[0]), PIECE)]
            target = np.concatenate([float_block.joined(*piece).data for piece in pieces])
        weights = [run.weight(layer.name) for layer in layers]
        with run.bar(cfg.iterations, "TIAR") as bar:
            losses = reconstruct(
                lambda *told: block.joined(*(part.data for part in told)), layers, weights, inputs, target, cfg,
                chunk=TIAR_BATCH // 2, on_step=bar.update,
            )  # fmt: skip
        return {**{layer.name: layer.codes for layer in layers}, "losses": losses}

    with run.phase("tiar"):
        found = run.once("tiar", learn)
    for layer in layers:
        layer.set_codes(found[layer.name], layer.weight_qparams)


def finite_set_calibration(run: Run, temporal: list[str], scope: str, ranges: str) -> None:
    """Give the activations in scope a table over the sampler's steps, and the others one range."""
    quantizers, specs = activation_quantizers(run.network), run.input_specs()
    constant = {f"{name}.input" for name in temporal}
    stepped = {"none": set(), "temporal": constant & set(specs), "all": set(specs)}[scope]
    if stepped != set(specs):
        run.shared_inputs()
        for name in stepped:
            quantizers[name].set(None)
    chosen = {name: spec for name, spec in specs.items() if name in stepped}
    if not chosen:
        return
    with run.phase("fsc"):
        tables = step_tables(
            run.network, run.session.calibration.trajectories, chosen, kind=ranges, constant=constant,
            seed=run.session.reconstruction.seed,
        )  # fmt: skip
        for name, table in tables.items():
            quantizers[name].set(table)


def with_cache(made: QuantizedModel, run: Run, features: str) -> QuantizedModel:
    """Replace temporal features by cached ones: all of them, or those that the quantized layers give less well."""
    bits, visited = min(run.session.input_bits, 8), made.timesteps()
    with run.phase("cache"):
        caches = feature_cache(run.model.network, visited, bits)
        wanted = temporal_features(run.model.network, visited)
        errors = disturbances(caches, quantized_features(made, visited), wanted)
        if features == "selected":
            caches = {name: cache for name, cache in caches.items() if errors[name][0] < errors[name][1]}
    recipe = {**made.recipe, "disturbances": {name: list(pair) for name, pair in errors.items()}}
    return replace(made, recipe=recipe, features=caches)
