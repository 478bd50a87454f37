"""refquant info: what is installed here, or what a checkpoint holds."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from .. import io, kernels
from .._version import __version__
from ..diffusion.model import asset_names, find
from ..threads import get_threads
from .common import add_verb, write_json


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(verbs, "info", "Describe this installation, or a model.", "refquant info mnist-unet", seed=False)
    p.add_argument("model", nargs="?", metavar="MODEL", help="asset name or checkpoint file")
    p.add_argument("--json", type=Path, metavar="FILE", help="write it there too")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print names and values."""
    facts = describe_model(args.model) if args.model else describe_installation()
    for key, value in facts.items():
        print(f"{key + ':':<22} {value if isinstance(value, str) else json.dumps(value)}")
    write_json(args.json, facts)
    return 0


def describe_installation() -> dict[str, Any]:
    """Everything a bug report needs."""
    blas = [f"{b['internal_api']} {b['version']} ({b['num_threads']} threads)" for b in threadpool_info()
            if b["user_api"] == "blas"]  # fmt: skip
    built = kernels.build_info()
    return {
        "refquant": __version__,
        "python": f"{sys.version.split()[0]} on {platform.platform()}",
        "numpy": np.__version__,
        "blas": ", ".join(blas) or "none found",
        "threads": get_threads(),
        "kernels compiled": list(kernels.available()),
        "kernels usable here": list(kernels.supported()),
        "kernel in use": kernels.active(),
        **{f"C core {key}": value for key, value in built.items()},
        "assets": asset_names(),
    }


def describe_model(name: str) -> dict[str, Any]:
    """Return the metadata of a checkpoint, and its size; the arrays are not read."""
    path = find(name)
    facts = io.read_metadata(path)
    specs = facts.pop("specs", None)
    facts = {"file": path.name, "bytes": path.stat().st_size, **facts}
    if specs is not None:
        facts["quantized weights"] = len(specs["weights"])
        facts["quantized activations"] = len(specs["activations"])
        facts["cached features"] = len(specs["features"])
    return facts
