"""refquant bench: check first, then time, beside the peers that are installed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..bench import unet
from ..nn.unet import CONFIGS
from .common import add_verb, print_table, say, setting, write_json


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(verbs, "bench", "Time training or sampling beside PyTorch, same network and batch, in one run.",
                 "refquant bench unet --batch 16 --repeats 2")  # fmt: skip
    p.add_argument("what", choices=("train", "unet"), help="train: one update; unet: one forward pass")
    p.add_argument("--network", choices=tuple(CONFIGS), default="mnist-unet", help="configuration, random weights")
    p.add_argument("--batch", type=int, default=64, metavar="B", help="images")
    p.add_argument("--repeats", type=int, default=10, metavar="R", help="timed rounds, engines taking turns")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Time it, print images per second and ratios."""
    say(args, f"bench {args.what} {args.network} batch {args.batch}, {setting()}")
    times = unet.run(args.what, args.network, args.batch, args.repeats, args.seed)
    ours = times["refquant"]
    rows = [
        (name, f"{args.batch / t:.1f}", f"{1000 * t:.1f}", f"{t / ours:.2f}")
        for name, t in sorted(times.items(), key=lambda item: item[1])
    ]
    print_table(("engine", "images/s", "ms", "refquant is x as fast"), rows)
    if len(times) == 1:
        print("PyTorch is not installed: pip install torch, to compare.")
    write_json(args.json, {"what": args.what, "network": args.network, "batch": args.batch, "seconds": times})
    return 0
