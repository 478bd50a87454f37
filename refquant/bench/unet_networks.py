"""What the whole-network benchmark computes: one network of random weights in float32, W8A8 and W4A8, on files.

Weights are random, so that nothing needs to be trained or fetched; the time of a pass does not depend on them. The
quantized networks come out of the method `nearest` with ranges from two steps of one trajectory.

Peers get the same network as an ONNX file, for one step of the sampler, so that all scales are constants:

    float32   as it is
    int8      quantized like ours, with what their integer operations ask for beyond that: weights whose zero is the
              code 0, and of convolutions results rounded to 8 bits (`refquant.deploy.export`)

What depends on the time-step alone, and of a transformer on the class, is computed beforehand there, as it is in ours:
a UNet's temporal features, a transformer's modulations of every class. PyTorch and our float32 compute it in each pass.

Ours is timed with asymmetric weights, as the methods make them, and compared with theirs on the symmetric ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import io, kernels
from ..deploy.export import export
from ..deploy.results import result_quantizers
from ..deploy.runtime import IntegerDenoiser
from ..diffusion.model import DiffusionModel, load_model
from ..diffusion.schedule import cosine
from ..errors import RangeError, RefquantError
from ..nn.networks import Network, build, config
from ..nn.unet import UNet
from ..quant import observers
from ..quant.affine import QSpec
from ..quant.calibrate import Calibration, CalibrationConfig
from ..quant.methods import method
from ..quant.quantized import QuantizedModel, load_quantized
from ..quant.session import Session
from ..quant.wrap import wrap

Images = NDArray[np.float32]
CALIBRATION = CalibrationConfig(images=1, steps=2, every=1)
STEP, T = 0, 500  # of that sampler: the first of its two steps
MODULATING = ("adaLN_modulation", "embedding_table", "final_layer")  # of a transformer, at first 0 or nearly so


@dataclass(frozen=True)
class Case:
    """One network and batch, as files that `prepare` wrote."""

    folder: str
    network: str
    batch: int

    def __str__(self) -> str:
        """Return the name, as in messages and JSON."""
        return f"{self.network}, batch {self.batch}"

    def path(self, name: str) -> Path:
        """Return the file of that name."""
        return Path(self.folder) / self.network / name

    @cached_property
    def x(self) -> Images:
        """The images (N, C, H, W)."""
        return np.ascontiguousarray(self.expected("x"))

    @cached_property
    def y(self) -> NDArray[np.int64] | None:
        """Their classes (N,), of a network that knows any."""
        path = self.path("y.npy")
        return np.load(path)[: self.batch] if path.exists() else None

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """What an ONNX network is fed with."""
        return {"x": self.x} if self.y is None else {"x": self.x, "y": self.y}

    def expected(self, name: str) -> Images:
        """Return "x", or our answer to it in "float32" or "int8" (symmetric weights)."""
        images: Images = np.load(self.path(f"{name}.npy"))[: self.batch]
        return images

    def float_model(self) -> DiffusionModel:
        """Load the float network."""
        return load_model(str(self.path("float32.safetensors")))

    def quantized(self, bits: int) -> QuantizedModel:
        """Load the network with weights of so many bits."""
        return load_quantized(str(self.path(f"w{bits}.safetensors")))


def random_unet(network: str, seed: int) -> UNet:
    """Build a named UNet with random weights."""
    kind = config(network).kind
    if kind != "unet":
        raise RangeError(f"bench: {network} is a {kind}; the peers here are UNets. Choose a UNet.")
    return random_network(network, seed)  # type: ignore[return-value]  # of that kind


def random_network(network: str, seed: int) -> Network:
    """Build a named network with random weights, those that start at zero too: they would hide the ones before them.

    A transformer's modulations get the size that training gives them: its gates are open.
    """
    rng = np.random.default_rng(seed)
    model = build(config(network), rng)
    for name, p in model.named_parameters():
        size = np.float32(0.3 if any(part in name for part in MODULATING) else 0.02)
        p.data = p.data + size * rng.standard_normal(p.shape, dtype=np.float32)
    return model


def prepare(folder: Path, network: str, images: int, seed: int) -> None:
    """Write everything that contenders read, and check that the kernel gives the bits of `scalar`.

    Raises
    ------
    RefquantError
        It does not, and there is nothing to be timed.
    """
    case = Case(str(folder), network, images)
    case.path("").mkdir()
    model = DiffusionModel(network, random_network(network, seed), cosine())
    model.save(case.path("float32.safetensors"))
    x = np.random.default_rng([seed, 1]).standard_normal((images, *model.image_shape), dtype=np.float32)
    np.save(case.path("x.npy"), x)
    if model.classes:
        np.save(case.path("y.npy"), np.arange(images) % model.classes)
    np.save(case.path("float32.npy"), model.denoiser()(x, T, STEP, case.y))
    calibration = Calibration(model, CALIBRATION)
    for bits in (8, 4):
        made = method("nearest")(Session(calibration, bits, 8, states=1), search="minmax")
        made.save(case.path(f"w{bits}.safetensors"))
        check_kernels(made, x[:1], None if case.y is None else case.y[:1])
    twin = symmetric(method("nearest")(Session(calibration, 8, 8, states=1), search="minmax"))
    np.save(case.path("int8.npy"), IntegerDenoiser(twin)(x, T, STEP, case.y))
    if find_spec("onnx") is not None:
        plain = QuantizedModel(model, *wrap(model.network), twin.recipe)
        rounded = result_quantizers(twin, images=2, seed=seed) if isinstance(model.network, UNet) else {}
        for name, net in (("float32", export(plain, step=STEP)), ("int8", export(twin, step=STEP, results=rounded))):
            io.write_atomically(case.path(f"{name}.onnx"), [net.SerializeToString()])


def symmetric(model: QuantizedModel) -> QuantizedModel:
    """Round all weights of a model of `nearest` anew, to 8 bits with zero points of 0."""
    floats = dict(model.base.network.named_parameters())
    for name, layer in model.layers.items():
        layer.quantize_weight(observers.minmax(floats[f"{name}.weight"].data, QSpec(8, True, True, axis=0)))
    return model


def check_kernels(model: QuantizedModel, x: Images, y: NDArray[np.int64] | None = None) -> None:
    """Compare one answer of the active kernel with that of `scalar`, plain C, bit for bit.

    Not with `ref`: NumPy's float sums may put one code of a hundred thousand on the other side of a boundary, and all
    that comes after it is different then.
    """
    ours = IntegerDenoiser(model)
    plain = "scalar" if "scalar" in kernels.supported() else "ref"
    with kernels.using(plain):
        want = ours(x, T, STEP, y)
    wrong = np.count_nonzero(ours(x, T, STEP, y) != want)
    if wrong:
        raise RefquantError(
            f"bench: {kernels.active()} differs from {plain} in {wrong} of {want.size} numbers of "
            f"{model.base.name}. Nothing was timed; see `refquant verify`."
        )
