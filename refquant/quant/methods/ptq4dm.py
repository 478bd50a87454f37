"""PTQ4DM (Shang et al., CVPR 2023, arXiv 2211.15736): calibrate on states near the image, normally distributed.

The first paper on quantizing diffusion models asks which time-steps calibration data should come from, and answers:
from all, with more of those near the image (NDTC, normally distributed time-step calibration). Weights are rounded
to nearest; ranges minimise the error of the values themselves.

    equation                               function here         authors' code (PTQ4DM 180a4d1)
    t_i ~ N(0.4 T, 0.4 T), kept in [0, T)  `time_steps`          quant_image_sample.py, generate_t
    states by the float model from noise   `calibration_states`  backward_t_calib_data_generator
    range searches                         `observers.ptq4dm`    QDrop/quant/quant_layer.py:151-287

Where we differ and why.

1. The released generator labels a state t where it has counted t steps from the *noisiest*, and takes a step's
   output for its input: label and state belong to different noise levels. `labels="released"` repeats that, for
   study; `labels="paper"` is right.
2. t_i are the sampler's own steps (theirs: of a sampler with all T steps).
3. One range search over a sample of all values; theirs is an average over batches.
4. Coverage as asked; theirs keeps the first and the last layer at 8 bits (`coverage="ends8"`).
"""

from __future__ import annotations

import numpy as np

from ...errors import UnknownNameError
from ...threads import parallel_map
from ..calibrate import observe
from ..observers import ptq4dm
from ..quantized import QuantizedModel
from ..record import States, Trajectories
from ..session import Session
from ..wrap import QuantLayer, activation_quantizers, wrap

MEAN, STD = 0.4, 0.4  # of t / T
LABELS = ("paper", "released")
SPREADS = ("normal", "uniform")


def quantize(session: Session, *, labels: str = "paper", spread: str = "normal") -> QuantizedModel:
    """Quantize by PTQ4DM.

    Parameters
    ----------
    session : Session
    labels : {"paper", "released"}
        Whether states carry their own time-step.
    spread : {"normal", "uniform"}
        Of the time-steps; uniform is what NDTC is to be compared with.

    Returns
    -------
    QuantizedModel
    """
    _check(labels, spread)
    run = session.start("ptq4dm", labels=labels, spread=spread)

    def quantize_weight(layer: QuantLayer) -> None:
        spec = run.coverage.weight_spec(layer.name, session.weight_bits)
        if spec is not None:
            layer.quantize_weight(ptq4dm.search(layer.layer.weight.data, spec, symmetric=True))

    with run.phase("weights"):
        parallel_map(quantize_weight, run.layers.values())
    specs, quantizers = run.input_specs(), activation_quantizers(run.network)
    if not specs:
        return run.finish()
    with run.phase("activations"):
        seed = session.reconstruction.seed
        states = calibration_states(session.calibration.trajectories, session.states, seed, labels, spread)
        seen = observe(wrap(run.model.network)[0], states, seed)

        def choose(name: str) -> None:
            spec = specs[name]  # the softmax's zero point is pinned, which this search does not know
            pinned = seen[name].mse(spec) if spec.symmetric else None
            quantizers[name].set(pinned or ptq4dm.search(seen[name].sample, spec, symmetric=False))

        parallel_map(choose, specs)
    return run.finish()


def time_steps(count: int, steps: int, rng: np.random.Generator, spread: str = "normal") -> np.ndarray:
    """Draw how near the image each state is: int array (count,), 0 at the image to steps - 1 at the noise."""
    if spread == "uniform":
        return rng.integers(0, steps, count)
    drawn = np.floor(rng.normal(MEAN, STD, count) * steps).astype(np.int64)
    return np.clip(drawn, 0, steps - 1)


def calibration_states(
    trajectories: Trajectories, count: int, seed: int, labels: str = "paper", spread: str = "normal"
) -> States:
    """Pick `count` states by NDTC, or uniformly; with ``labels="released"`` with time-steps of other noise levels."""
    _check(labels, spread)
    rng, last = np.random.default_rng(seed), trajectories.steps - 1
    image = rng.integers(0, trajectories.x.shape[1], count)
    index = time_steps(count, trajectories.steps, rng, spread)
    label = last - index  # the sampler's steps count from the noisiest
    # released: the loop index of the sampler is compared with `index`, and the step's output is kept
    state = label if labels == "paper" else np.minimum(index + 1, last)
    return States(trajectories.x[state, image], trajectories.t[label], label, image, trajectories.classes(image))


def _check(labels: str, spread: str) -> None:
    """All names before the work."""
    if labels not in LABELS:
        raise UnknownNameError(f"no labels of calibration states are called {labels!r}. Known: {', '.join(LABELS)}.")
    if spread not in SPREADS:
        raise UnknownNameError(f"no spread of time-steps is called {spread!r}. Known: {', '.join(SPREADS)}.")
