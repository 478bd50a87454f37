"""The inner loop of block reconstruction, here and in a straightforward PyTorch version of the same block.

The shipped network's blocks learn the rounding of 4-bit weights on recorded states. Both start from the same alphas
and take the same mini-batches, and before anything is timed their losses of the first iterations must agree.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..diffusion.model import DiffusionModel
from ..errors import RefquantError, UnknownNameError
from ..quant.calibrate import Calibration, CalibrationConfig
from ..quant.reconstruct import ReconstructionConfig, reconstruct
from ..quant.record import pick, unit_inputs, unit_output
from ..quant.session import Run, Session
from ..quant.units import Unit, find_units
from ..threads import get_threads

UNITS = ("down.1.block.0", "mid.block_1", "mid.attn_1", "up.0.block.1")
STATES = 64
CHECKED = 3  # iterations whose losses must agree
TOLERANCE = 1e-3  # relative: float32 sums in another order, through a norm and an Adam step


def run(model: DiffusionModel, names: tuple[str, ...], iterations: int, repeats: int) -> list[dict[str, float | str]]:
    """Return iterations per second of each engine, for each unit: the best of `repeats` turns."""
    session = Session(Calibration(model, CalibrationConfig(images=8, steps=10)), 4, 8)
    job = session.start("bench")
    job.nearest_weights()
    units = {unit.name: unit for unit in find_units(job.network, job.layers)}
    states, rows = pick(session.calibration.trajectories, STATES, seed=0), []
    for name in names:
        if name not in units:
            raise UnknownNameError(f"the network has no unit {name!r}. Known: {', '.join(units)}.")
        unit = units[name]
        inputs, target = unit_inputs(job.network, name, states), unit_output(model.network, name, states)
        cfg = ReconstructionConfig(iterations=iterations)
        engines = {"refquant": _ours(job, unit, inputs, target)}
        if importlib.util.find_spec("torch") is not None:
            from .torch_reconstruct import engine

            engines |= engine(job, unit, inputs, target, get_threads())
        short = replace(cfg, iterations=CHECKED)
        losses = {key: go(short) for key, go in engines.items()}
        for key, found in losses.items():
            if not np.allclose(found, losses["refquant"], rtol=TOLERANCE):
                raise RefquantError(f"bench: {name}: {key} has the losses {found}, refquant {losses['refquant']}.")
        best = dict.fromkeys(engines, np.inf)
        for _ in range(repeats):
            for key, go in engines.items():
                began = time.perf_counter()
                go(cfg)
                best[key] = min(best[key], time.perf_counter() - began)
        rows.append({"unit": name, **{key: iterations / seconds for key, seconds in best.items()}})
    return rows


def _ours(
    job: Run, unit: Unit, inputs: tuple[np.ndarray, ...], target: np.ndarray
) -> Callable[[ReconstructionConfig], np.ndarray]:
    weights = [job.weight(layer.name) for layer in unit.layers]
    nearest = [(layer.codes, layer.weight_qparams) for layer in unit.layers]

    def go(cfg: ReconstructionConfig) -> np.ndarray:
        losses = reconstruct(unit.module, unit.layers, weights, inputs, target, cfg)
        for layer, (codes, qparams) in zip(unit.layers, nearest, strict=True):
            layer.set_codes(codes, qparams)
        return losses

    return go
