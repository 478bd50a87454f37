"""Methods of post-training quantization, one file a paper. They share the toolbox and do not know each other.

`METHODS` lists them by name: ``METHODS[name](session, **options)`` gives a `QuantizedModel`. PTQD corrects what
another method made, so it is put together here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...errors import UnknownNameError
from ..quantized import QuantizedModel
from ..session import Session
from . import brecq, ditas, importance, nearest, ptq4dit, ptq4dm, ptqd, qdiffusion, qdit, squant, tfmq, tqdit


def quantize_ptqd(session: Session, *, on: str = "brecq", bias: str = "raw", images: int = 32) -> QuantizedModel:
    """Quantize by the method `on`, then measure the noise of its answers and correct it (see `ptqd`).

    Parameters
    ----------
    session : Session
    on : str
        Another method, by name, with its defaults.
    bias : {"raw", "residual"}
        Whose mean is taken: of the error, or of what is left of it without what goes with the answer.
    images : int
        Trajectories that the noise is measured on.

    Returns
    -------
    QuantizedModel
    """
    if on == "ptqd":
        raise UnknownNameError("PTQD corrects another method: choose on=brecq, nearest, tfmq, ...")
    if bias not in ptqd.BIASES:
        raise UnknownNameError(f"PTQD knows no bias {bias!r}. Known: {', '.join(ptqd.BIASES)}.")
    cfg = session.calibration.cfg
    made = method(on)(session)
    # other trajectories than those that the rounding was fitted to
    return ptqd.correct(made, replace(cfg, images=images, seed=cfg.seed + 1), bias=bias)


METHODS: dict[str, Callable[..., QuantizedModel]] = {
    "nearest": nearest.quantize,
    "squant": squant.quantize,
    "ptq4dm": ptq4dm.quantize,
    "brecq": brecq.quantize,
    "importance": importance.quantize,
    "qdiffusion": qdiffusion.quantize,
    "ptqd": quantize_ptqd,
    "tfmq": tfmq.quantize,
    "tqdit": tqdit.quantize,
    "ptq4dit": ptq4dit.quantize,
    "qdit": qdit.quantize,
    "ditas": ditas.quantize,
}

#: Methods that are made for transformers; other networks are refused.
TRANSFORMER_METHODS = ("tqdit", "ptq4dit", "qdit", "ditas")


def methods_for(kind: str) -> list[str]:
    """Names of the methods that fit a kind of network, such as "unet" or "dit"."""
    return [name for name in METHODS if kind == "dit" or name not in TRANSFORMER_METHODS]


def method(name: str) -> Callable[..., QuantizedModel]:
    """Return the method of that name; UnknownNameError lists the names there are."""
    if name not in METHODS:
        raise UnknownNameError(f"no method is called {name!r}. Known: {', '.join(METHODS)}.")
    return METHODS[name]


def options_of(name: str) -> dict[str, Any]:
    """Options of a method with their defaults."""
    parameters = list(inspect.signature(method(name)).parameters.values())[1:]
    return {p.name: p.default for p in parameters}
