"""One run of a method: what it works on, what it may spend, what it has spent, and how it goes on after a kill.

A `Session` says what is asked: model, calibration, bits, coverage, effort. A method starts a `Run` of it, which
holds the wrapped network and does what all methods have in common: quantize weights to nearest, calibrate shared
activation ranges, time its phases, show progress, and remember finished parts in a state file.

    run = session.start("nearest", search="mse")
    run.nearest_weights("mse")
    run.shared_inputs("mse")
    return run.finish()

Each part of the work that is worth keeping goes through ``run.once(key, compute)``: arrays by name, computed once
and taken from the state file in a run that follows a kill. A part is a function of the recipe alone, so the
resumed run ends with the same bits.

Errors: `CheckpointError` when the state file belongs to another recipe; `RangeError` for impossible bits, and
where the model's weights are not finite.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .. import io
from ..diffusion.model import DiffusionModel
from ..errors import CheckpointError, RangeError, UnknownNameError
from ..threads import parallel_map
from . import observers
from .affine import QSpec
from .calibrate import Calibration
from .coverage import Coverage, check_bits, coverage
from .progress import bar, remark
from .quantized import QuantizedModel
from .reconstruct import ReconstructionConfig
from .wrap import QuantLayer, activation_quantizers, wrap

Arrays = dict[str, NDArray[Any]]
SEARCHES = ("mse", "minmax")
SAMPLINGS = ("importance", "uniform")


@dataclass(frozen=True)
class Session:
    """What a method is asked to do.

    Attributes
    ----------
    calibration : Calibration
        Of the float model; shared by all methods that are compared.
    weight_bits, input_bits : int
        2 to 8; 32 means float.
    coverage : str
        A name of `refquant.quant.coverage`.
    reconstruction : ReconstructionConfig
        The effort of methods that learn; its seed is the session's.
    states : int
        Network inputs that weights are reconstructed on.
    sampling : {"importance", "uniform"}
        From which steps of the sampler those are drawn: more often from steps that hurt the images more, or evenly, as
        in the papers (see `refquant.quant.blocks.learning_states`).
    state : Path, optional
        File that finished parts are kept in.
    quiet : bool
        Say nothing of phases and progress on standard error.
    """

    calibration: Calibration
    weight_bits: int = 8
    input_bits: int = 8
    coverage: str = "full"
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    states: int = 1024
    sampling: str = "importance"
    state: Path | None = None
    quiet: bool = True

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, self.input_bits)
        if self.states < 1:
            raise RangeError(f"states is {self.states}; reconstruction needs at least 1.")
        if self.sampling not in SAMPLINGS:
            raise UnknownNameError(f"no sampling of states is called {self.sampling!r}. Known: {', '.join(SAMPLINGS)}.")

    def start(self, method: str, *, model: DiffusionModel | None = None, **options: Any) -> Run:
        """Begin a run of `method`, on the calibrated model or one that computes the same."""
        return Run(self, model or self.calibration.model, method, options)


class Run:
    """The work of one method.

    Attributes
    ----------
    model : DiffusionModel
    network : UNet or DiT
        Wrapped; becomes the quantized model.
    layers : dict of str to QuantLayer
    coverage : Coverage
    recipe : dict
        All that defines the run.
    """

    def __init__(self, session: Session, model: DiffusionModel, method: str, options: dict[str, Any]) -> None:
        check_finite(model)
        self.session, self.model = session, model
        self.network, self.layers = wrap(model.network)
        self.coverage: Coverage = coverage(session.coverage, model.network)
        self.recipe: dict[str, Any] = {
            "method": method,
            "options": options,
            "weight_bits": session.weight_bits,
            "input_bits": session.input_bits,
            "coverage": self.coverage.describe(self.layers),
            "calibration": session.calibration.cfg.to_json(),
            "states": session.states,
            "sampling": session.sampling,
            "reconstruction": asdict(session.reconstruction),
        }
        self.seconds: dict[str, float] = {}
        self._told: set[str] = set()
        self._parts: Arrays = {}
        # as JSON gives it back; the weights themselves belong to the identity of a run
        self._identity = json.loads(json.dumps({"recipe": self.recipe, "model": _fingerprint(model)}))
        if session.state is not None and session.state.exists():
            self._restore(session.state)

    # --- what methods have in common ---

    def weight(self, layer: str) -> NDArray[np.float32]:
        """The float weight of a layer."""
        return dict(self.model.network.named_parameters())[f"{layer}.weight"].data

    def nearest_weights(self, search: str = "mse") -> None:
        """Round all covered weights to the nearest code of ranges by this search."""
        if search not in SEARCHES:
            raise UnknownNameError(f"no range search is called {search!r}. Known: {', '.join(SEARCHES)}.")
        observer = observers.mse if search == "mse" else observers.minmax

        def quantize(layer: QuantLayer) -> None:
            spec = self.coverage.weight_spec(layer.name, self.session.weight_bits)
            if spec is not None:
                layer.quantize_weight(observer(layer.layer.weight.data, spec))

        with self.phase("weights"):
            parallel_map(quantize, self.layers.values())

    def shared_inputs(self, search: str = "mse", seen: dict[str, observers.RangeObserver] | None = None) -> None:
        """Give every covered activation one range for all time-steps: of `seen`, or of the shared calibration."""
        if search not in SEARCHES:
            raise UnknownNameError(f"no range search is called {search!r}. Known: {', '.join(SEARCHES)}.")
        with self.phase("activations"):
            specs = self.input_specs()
            seen = seen or (self.session.calibration.inputs if specs else {})
            quantizers = activation_quantizers(self.network)

            def choose(name: str) -> None:
                observer = seen[name]
                quantizers[name].set(observer.mse(specs[name]) if search == "mse" else observer.minmax(specs[name]))

            parallel_map(choose, specs)

    def forget_inputs(self) -> None:
        """Let all activations be float again."""
        for quantizer in activation_quantizers(self.network).values():
            quantizer.set(None)

    def input_specs(self) -> dict[str, QSpec]:
        """Names and specs of the activation quantizers that the coverage asks for."""
        found = {n: self.coverage.input_spec(n, self.session.input_bits) for n in activation_quantizers(self.network)}
        return {name: spec for name, spec in found.items() if spec is not None}

    # --- bookkeeping ---

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to this phase, and say when it begins for the first time."""
        if name not in self._told:
            remark(f"{self.recipe['method']}: {name}", self.session.quiet)
            self._told.add(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def bar(self, total: int, label: str) -> tqdm[Any]:
        """Return a progress bar on standard error with the time left."""
        return bar(total, label, self.session.quiet)

    def once(self, key: str, compute: Callable[[], Arrays]) -> Arrays:
        """Return the arrays of this part: from the state file, or computed now and kept there."""
        prefix = key + "/"
        if not any(name.startswith(prefix) for name in self._parts):
            self._parts |= {prefix + name: value for name, value in compute().items()}
            if self.session.state is not None:
                facts = {"kind": "quantize-state", "seconds": self.seconds, **self._identity}
                io.save(self.session.state, self._parts, facts)
        return {name.removeprefix(prefix): v for name, v in self._parts.items() if name.startswith(prefix)}

    def finish(self, **facts: Any) -> QuantizedModel:
        """Return the quantized model, with `facts` about what was found added to its recipe."""
        self.recipe |= facts
        return QuantizedModel(self.model, self.network, self.layers, self.recipe, seconds=self.seconds)

    def _restore(self, path: Path) -> None:
        found = io.load(path, kind="quantize-state")
        if any(found.metadata.get(k) != v for k, v in self._identity.items()):
            raise CheckpointError(
                f"{path} belongs to another recipe. Repeat that run's options to resume it, or remove the file."
            )
        self._parts, self.seconds = dict(found.tensors), dict(found.metadata["seconds"])


def check_finite(model: DiffusionModel) -> None:
    """RangeError with the name of the first weight that holds NaN or infinity."""
    for name, array in model.network.state_dict().items():
        if not np.isfinite(array).all():
            raise RangeError(
                f"{model.name}: the weight {name} holds NaN or infinity. Take the checkpoint from its source again."
            )


def _fingerprint(model: DiffusionModel) -> str:
    """SHA-256 of all that a model computes with, whether it came from a file or not."""
    digest = hashlib.sha256(repr((model.network.cfg, model.prediction)).encode())
    for name, array in (("alpha_bar", model.schedule.alpha_bar), *sorted(model.network.state_dict().items())):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
