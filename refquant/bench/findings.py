"""Claims of the papers, tried on the shipped model: what was measured, and whether it supports the claim.

    python -m refquant.bench.findings --out findings.json

Bits are W4A8 where nothing else is said, coverage "full"; PSNR is to the float images from the same noise. A list is
one number for each seed, of the noise or of the rounding: two lists can be compared seed by seed. A claim that is in
the file already is not measured again, and finished parts of a model lie beside it, in findings.work, so that a run
that was killed goes on where it was. Claims that need no learned blocks come first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from .. import io
from ..compare import Reference, measure
from ..deploy.lower import lower
from ..diffusion.model import DiffusionModel, load_model
from ..errors import LoweringError
from ..quant.activations import step_tables
from ..quant.cache import disturbances, feature_cache
from ..quant.calibrate import Calibration, CalibrationConfig, record
from ..quant.methods import METHODS, tfmq
from ..quant.observers import mse
from ..quant.quantized import QuantizedModel
from ..quant.reconstruct import ReconstructionConfig, reconstruct
from ..quant.session import Run, Session
from ..quant.temporal import feature_errors, features, quantized_features
from ..quant.units import temporal_layers
from ..quant.wrap import activation_quantizers, watched, wrap

SEEDS = (0, 1, 2)


class Study:
    """The model, its calibration and its own images, and quantized models that several claims look at."""

    def __init__(self, images: int, samples: int, iterations: int, states: int, work: Path) -> None:
        self.model: DiffusionModel = load_model("mnist-unet")
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.iterations, self.states = iterations, states
        self.calibration = Calibration(self.model, CalibrationConfig(images=images))
        self.reference = Reference.draw(self.model, samples, (42, 43, 44), 50)
        self._made: dict[str, QuantizedModel] = {}
        self._temporal: dict[tuple[int, int, str, int], Run] = {}
        self.t = np.arange(self.model.schedule.timesteps)
        self.wanted = features(self.model.network, self.t)

    def session(
        self, weight_bits: int = 4, input_bits: int = 8, *, seed: int = 0, state: Path | None = None, **settings: str
    ) -> Session:
        """A session with the study's effort; `settings` are its coverage and sampling."""
        learning = ReconstructionConfig(iterations=self.iterations, seed=seed)
        return Session(
            self.calibration, weight_bits, input_bits, reconstruction=learning, states=self.states, quiet=False,
            state=state, **settings,
        )  # fmt: skip

    def made(self, name: str, settings: dict[str, str] | None = None, **options: Any) -> QuantizedModel:
        """A quantized model, made once."""
        key = json.dumps([name, settings, options])
        if key not in self._made:
            effort = [self.iterations, self.states, self.calibration.cfg.images]
            label = hashlib.sha256(json.dumps([key, effort]).encode()).hexdigest()[:12]
            asked = self.session(state=self.work / f"{name}-{label}.state", **settings or {})
            self._made[key] = METHODS[name](asked, **options)
        return self._made[key]

    def temporal(self, bits: int, seed: int, how: str, t: np.ndarray) -> Run:
        """The run of `temporal_run`, made once."""
        key = (bits, seed, how, len(t))
        if key not in self._temporal:
            self._temporal[key] = temporal_run(self, bits, seed, how, t)
        return self._temporal[key]

    def numbers(self, quantized: QuantizedModel) -> dict[str, Any]:
        """PSNR for each seed of the noise, temporal errors, and bytes."""
        row = measure(quantized, self.reference, engine=engine(quantized))[0]
        kept = (
            "psnr_db", "psnr_median_db", "feature_squared", "feature_squared_visited", "feature_squared_unseen",
            "feature_cosine_worst", "bytes",
        )  # fmt: skip
        return {key: row[key] for key in kept}

    def error(self, run: Run, part: np.ndarray | None = None) -> float:
        """Squared error of the temporal features of quantized weights, mean over all t or over some."""
        found = feature_errors(self.t, features(run.network, self.t), self.wanted).squared
        return float(found.mean() if part is None else found[part].mean())


def engine(quantized: QuantizedModel) -> str:
    """Integers where everything has an integer form, for they are ten times as fast; simulated elsewhere."""
    try:
        lower(quantized)
    except LoweringError:
        return "fake"
    return "c"


def temporal_run(study: Study, bits: int, seed: int, how: str, t: np.ndarray) -> Run:
    """The temporal layers alone, by "nearest", "layerwise" AdaRound (each layer by itself) or "tiar"."""
    run = study.session(bits, 32, seed=seed).start("study")
    names = temporal_layers(study.model.network)
    for layer in run.layers:  # all others stay float
        if layer in names:
            run.layers[layer].quantize_weight(_nearest(run, layer, bits))
    if how == "tiar":
        tfmq.tiar(run, names, t, iterations=1000)
    elif how == "layerwise":
        _layerwise(run, names, t, seed)
    return run


def _nearest(run: Run, layer: str, bits: int) -> Any:
    return mse(run.weight(layer), run.coverage.weight_spec(layer, bits))


def _layerwise(run: Run, names: list[str], t: np.ndarray, seed: int) -> None:
    """AdaRound of each temporal layer by itself, in order: its quantized input, its float output."""
    cfg = ReconstructionConfig(iterations=1000, batch=256, seed=seed)
    for name in names:
        layer = run.layers[name]
        seen, wanted = _input(run.network, name, t), _output(run, name, t)
        reconstruct(layer, [layer], [run.weight(name)], [seen], wanted, cfg, chunk=128)


def _input(network: Any, layer: str, t: np.ndarray) -> np.ndarray:
    seen: dict[str, np.ndarray] = {}
    features(watched(network, lambda name, x: seen.__setitem__(name, x)), t)
    return seen[f"{layer}.input"]


def _output(run: Run, layer: str, t: np.ndarray) -> np.ndarray:
    weight, bias = run.weight(layer), dict(run.model.network.named_parameters())[f"{layer}.bias"].data
    return _input(wrap(run.model.network)[0], layer, t) @ weight.T + bias


def claim_1(study: Study) -> dict[str, Any]:
    """TIAR lowers the temporal error against nearest, layer-wise and block-wise reconstruction."""
    out: dict[str, Any] = {}
    for how in ("nearest", "layerwise", "tiar"):
        out[how] = [study.error(study.temporal(4, seed, how, study.t)) for seed in SEEDS]
    brecq = study.made("brecq")
    found = feature_errors(study.t, features(brecq.network, study.t), study.wanted).squared
    return {**out, "inside blocks (brecq)": [float(found.mean())]}


def claim_1_bits(study: Study) -> dict[str, Any]:
    """Where the temporal layers' bits begin to matter: they alone are quantized, weights only."""
    out = {}
    for bits in (2, 3, 4, 6, 8):
        for how in ("nearest", "tiar"):
            run = study.temporal(bits, 0, how, study.t)
            out[f"W{bits} {how}"] = study.numbers(run.finish())
    return out


def claim_2(study: Study) -> dict[str, Any]:
    """TIAR on 20 time-steps, judged on those and on all others."""
    out = {}
    visited = study.calibration.trajectories.t
    few = visited[np.linspace(0, len(visited) - 1, 20).round().astype(int)]
    for name, t in (("20 time-steps", few), ("all time-steps", study.t)):
        runs = [study.temporal(4, seed, "tiar", t) for seed in SEEDS]
        out[name] = {
            "at the 20": [study.error(r, few) for r in runs],
            "at the others": [study.error(r, np.setdiff1d(study.t, few)) for r in runs],
        }
    return out


def claim_3(study: Study) -> dict[str, Any]:
    """Scope of finite set calibration, with the same weights."""
    out = {}
    for scope, ranges in (("none", "exact"), ("temporal", "exact"), ("all", "exact"), ("all", "running")):
        out[f"{scope}, {ranges}"] = study.numbers(rescoped(study, scope, ranges))
    return out


def rescoped(
    study: Study, scope: str, ranges: str, input_bits: int = 8, weights_in_float: Collection[str] = ()
) -> QuantizedModel:
    """The weights of `tfmq`, all but these, with another scope of its tables."""
    made = study.made("tfmq")  # its tables come after its weights, which know nothing of them
    run = study.session(4, input_bits).start("tfmq", fsc=scope, ranges=ranges)
    for name, layer in made.layers.items():
        if layer.codes is not None and name not in weights_in_float:
            run.layers[name].set_codes(layer.codes, layer.weight_qparams)
    tfmq.finite_set_calibration(run, temporal_layers(study.model.network), scope, ranges)
    return run.finish()


def claim_4(study: Study) -> dict[str, Any]:
    """The finished model, and the same with its temporal layers' weights in float ("Freeze")."""
    names = temporal_layers(study.model.network)
    return {
        "tfmq": study.numbers(rescoped(study, "all", "exact")),
        "tfmq, temporal weights in float": study.numbers(rescoped(study, "all", "exact", weights_in_float=names)),
        "tfmq, temporal weights in float, no tables": study.numbers(
            rescoped(study, "none", "exact", weights_in_float=names)
        ),
    }


def claim_5(study: Study) -> dict[str, Any]:
    """Coverage: both methods with the full one and with TFMQ's released one."""
    out = {}
    for coverage, settings in (("full", None), ("released", {"coverage": "released"})):
        for name in ("qdiffusion", "tfmq"):
            out[f"{name}, {coverage}"] = study.numbers(study.made(name, settings))
    return out


def claim_steps(study: Study) -> dict[str, Any]:
    """States drawn by the importance of their steps, and evenly."""
    out = {}
    for sampling, settings in (("uniform", {"sampling": "uniform"}), ("importance", None)):
        for name in ("brecq", "tfmq"):
            out[f"{name}, {sampling}"] = study.numbers(study.made(name, settings))
    return out


def claim_6(study: Study) -> dict[str, Any]:
    """Seconds of each phase, equal iterations for every block."""
    out = {name: {k: round(v, 1) for k, v in study.made(name).seconds.items()} for name in ("qdiffusion", "tfmq")}
    total = {name: sum(phases.values()) for name, phases in out.items()}
    return {**out, "ratio": total["qdiffusion"] / total["tfmq"]}


def claim_8(study: Study) -> dict[str, Any]:
    """Normally distributed time-steps against uniform ones, and the released labels; W8A8, where ranges matter."""
    out = {}
    kinds = {"normal": {}, "uniform": {"spread": "uniform"}, "normal, released labels": {"labels": "released"}}
    for name, options in kinds.items():
        made = [METHODS["ptq4dm"](study.session(8, 8, seed=s), **options) for s in SEEDS]
        out[name] = [float(np.mean(study.numbers(quantized)["psnr_db"])) for quantized in made]
    return out


def claim_10(study: Study) -> dict[str, Any]:
    """Share of activation values beyond the range of a step: exact extremes and running averages."""
    made, states = study.made("tfmq"), study.calibration.trajectories
    run = study.session().start("saturation")
    for name, layer in made.layers.items():
        if layer.codes is not None:
            run.layers[name].set_codes(layer.codes, layer.weight_qparams)
    fresh = Calibration(study.model, CalibrationConfig(images=8, seed=99)).trajectories  # other noise
    out = {}
    for kind in ("exact", "running"):
        tables = step_tables(run.network, states, run.input_specs(), kind=kind)
        beyond = total = 0
        for step in range(0, fresh.steps, 7):
            for name, x in record(run.network, fresh.at([step])):
                q = tables[name][step]
                codes = np.rint(x / q.scale) + q.zero_point
                beyond += int(((codes < q.spec.qmin) | (codes > q.spec.qmax)).sum())
                total += x.size
        out[kind] = {"saturated share": beyond / total, **study.numbers(rescoped(study, "all", kind))}
    return out


def claim_11(study: Study) -> dict[str, Any]:
    """Disturbance of cached features and of computed ones, mean over the sampler's steps, summed over blocks."""
    made, visited = study.made("tfmq"), study.calibration.trajectories.t
    caches = feature_cache(study.model.network, visited, 8)
    found = disturbances(caches, quantized_features(made, visited), features(study.model.network, visited))
    return {
        "cache": sum(pair[0] for pair in found.values()),
        "computed": sum(pair[1] for pair in found.values()),
        "blocks where the cache is better": f"{sum(a < b for a, b in found.values())} of {len(found)}",
    }


def claim_12(study: Study) -> dict[str, Any]:
    """Bytes of the tables, of this model and beside the float parameters."""
    out, parameters = {}, study.model.network.parameter_count()
    for scope in ("none", "temporal", "all"):
        made = rescoped(study, scope, "exact")
        tables = [q.table for q in activation_quantizers(made.network).values() if q.table is not None]
        numbers = sum(2 * len(table) for table in tables)
        out[scope] = {"bytes": made.size_bytes(), "table numbers": numbers, "share of parameters": numbers / parameters}
    return out


CLAIMS: dict[str, Callable[[Study], dict[str, Any]]] = {
    "2": claim_2, "8": claim_8, "1, bit-widths": claim_1_bits, "11": claim_11, "12": claim_12, "3": claim_3,
    "4": claim_4, "10": claim_10, "1": claim_1, "steps": claim_steps, "6": claim_6, "5": claim_5,
}  # fmt: skip


def main() -> None:
    """Measure what is not in the file yet."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("findings.json"))
    p.add_argument("--claims", nargs="+", choices=tuple(CLAIMS), default=list(CLAIMS))
    p.add_argument("--images", type=int, default=32, help="calibration trajectories")
    p.add_argument("--samples", type=int, default=32, help="images of each run")
    p.add_argument("--iterations", type=int, default=200)
    p.add_argument("--states", type=int, default=512)
    args = p.parse_args()
    effort = {name: getattr(args, name) for name in ("images", "samples", "iterations", "states")}
    found = json.loads(args.out.read_text()) if args.out.exists() else {"effort": effort, "claims": {}}
    study = Study(**effort, work=args.out.with_suffix(".work"))
    for claim in args.claims:
        if claim not in found["claims"]:
            found["claims"][claim] = {"what": CLAIMS[claim].__doc__, "measured": CLAIMS[claim](study)}
            io.write_atomically(args.out, [(json.dumps(found, indent=1) + "\n").encode()])
            print(claim, json.dumps(found["claims"][claim], indent=1), flush=True)


if __name__ == "__main__":
    main()
