"""refquant info: what is installed here, or what a checkpoint holds; of a quantized one, what runs in integers."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import textwrap
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from .. import io, kernels
from .._version import __version__
from ..deploy.inventory import WORDS, Entry, inventory, is_transformer
from ..deploy.lower import lower
from ..deploy.plan import plan
from ..diffusion.model import asset_names, find
from ..errors import LoweringError
from ..quant.quantized import load_quantized
from ..threads import get_threads
from .common import add_verb, print_table, write_json

#: What of a session's effort these methods look at; all others look at all of it. Recipes hold it all the same.
LOOKS_AT: dict[str, tuple[str, ...]] = {
    "nearest": (),
    "squant": (),
    **dict.fromkeys(("ptq4dm", "tqdit", "qdit", "ditas"), ("states", "seed")),
}


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(verbs, "info", "Describe this installation, or a model.", "refquant info mnist-unet", seed=False)
    p.add_argument("model", nargs="?", metavar="MODEL", help="asset name or checkpoint file")
    p.add_argument("--layers", action="store_true", help="every operation of a quantized model, not only their kinds")
    p.add_argument("--json", type=Path, metavar="FILE", help="write it there too")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print names and values; of a quantized model its operations, too."""
    facts = describe_model(args.model) if args.model else describe_installation()
    for key, value in facts.items():
        print(f"{key + ':':<22} {value if isinstance(value, str) else json.dumps(value)}")
    if facts.get("kind") == "quantized":
        facts["integers"] = print_integers(args.model, args.layers)
    write_json(args.json, facts)
    return 0


def print_integers(name: str, layers: bool) -> dict[str, Any] | None:
    """Print what of a quantized model runs in integers with --engine c, and return it; None where it cannot."""
    model = load_quantized(name)
    try:
        program = lower(model)
    except LoweringError as reason:
        print(f"runs in integers:      no. {reason}")
        return None
    entries, space = inventory(program), plan(program, 1)[1]
    for integer, title in ((True, "in integers"), (False, "float islands")):
        chosen = [entry for entry in entries if entry.integer is integer]
        print()
        print_entries(title, chosen) if layers else print_kinds(title, chosen)
    weights, tables = (sum(getattr(e, part) for e in entries) for part in ("weight_bytes", "table_bytes"))
    print()
    print("Behind every product its sums are scaled, and bias and residual added, in float32.")
    known = f"The sampler's {len(program.timesteps)} time-steps"
    if is_transformer(program):
        print(f"{known} and {program.classes} classes are known beforehand: a table holds what they tell each block, "
              "and the layers that find it do not run.")  # fmt: skip
    else:
        print(f"{known} are known beforehand: biases hold what they tell each block, and the time layers do not run.")
    print(f"memory: weights {_size(weights)}, tables and norms {_size(tables)}, "
          f"values of one image at a time {_size(space)}")  # fmt: skip
    return {
        "weight_bytes": weights, "table_bytes": tables, "buffer_bytes": space, "operations": list(map(asdict, entries))
    }  # fmt: skip


def print_kinds(title: str, entries: list[Entry]) -> None:
    """One line for each kind of operation, then where the kinds with names of layers stand."""
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(entry.what, []).append(entry)
    frequent = dict(sorted(kinds.items(), key=lambda item: -len(item[1])))
    print_table((title, "times", "weights", "tables", "products"),
                [(what, str(len(group)), *_numbers(group)) for what, group in frequent.items()])  # fmt: skip
    for what, group in frequent.items():
        if what not in WORDS.values():
            names = Counter(_role(entry.name) for entry in group)
            listed = ", ".join(f"{n} {name}" if n > 1 else name for name, n in names.items())
            print(textwrap.fill(f"{what}: {listed}", 110, initial_indent="  ", subsequent_indent="    "))


def print_entries(title: str, entries: list[Entry]) -> None:
    """One line for each operation."""
    print_table((title, "what", "shape", "weights", "tables", "products"),
                [(e.name, e.what, "x".join(map(str, e.shape)), *_numbers([e])) for e in entries])  # fmt: skip


def _numbers(group: list[Entry]) -> tuple[str, str, str]:
    """Weights, tables and multiplications of entries, as text."""
    products = sum(e.multiplications for e in group)
    return (_size(sum(e.weight_bytes for e in group)), _size(sum(e.table_bytes for e in group)),
            f"{products / 1e6:.1f} M" if products else "-")  # fmt: skip


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B" if count else "-"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _role(name: str) -> str:
    """What a layer is in its block: down.1.block.0.conv1 -> conv1, mid.attn_1.product.q -> product.q."""
    parts = name.removesuffix(".input").split(".")
    return ".".join(parts[-2:]) if parts[-2:-1] in (["product"], ["downsample"], ["upsample"]) else parts[-1]


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
    if "recipe" in facts:
        facts["recipe"] = used(facts["recipe"])
    facts = {"file": path.name, "bytes": path.stat().st_size, **facts}
    if specs is not None:
        facts["quantized weights"] = len(specs["weights"])
        facts["quantized activations"] = len(specs["activations"])
        facts["cached features"] = len(specs["features"])
    return facts


def used(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without the effort that its method does not look at."""
    name = recipe.get("options", {}).get("on", recipe.get("method"))  # PTQD spends no effort of its own
    if name not in LOOKS_AT:
        return recipe
    shown = {key: value for key, value in recipe.items() if key not in {"states", "sampling"} - set(LOOKS_AT[name])}
    kept = {key: value for key, value in shown.pop("reconstruction", {}).items() if key in LOOKS_AT[name]}
    return shown | ({"reconstruction": kept} if kept else {})
