"""refquant verify: do the integer kernels give the reference's bits on this machine?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import kernels
from .common import add_verb, print_table, say, write_json


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(
        verbs, "verify", "Compare every integer kernel that runs here with NumPy, bit for bit, in a few seconds.",
        "refquant verify --json verify.json",
    )  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one row for each kernel; exit code 1 and the first difference of each if there is one."""
    built = kernels.build_info()
    say(args, f"{built['compiler'] or 'no C core'}, seed {args.seed}")
    found = kernels.verify(None if args.isa is None else (args.isa,), seed=args.seed)
    rows = [
        (c.name, str(c.results), f"{c.seconds:.2f}", "equal" if c.difference is None else "DIFFERENT")
        for c in found.checked
    ]
    print_table(("kernel", "results", "seconds", "status"), rows)
    for c in found.checked:
        if c.difference is not None:
            print(f"{c.name}: {c.difference}")
    print(found)
    facts = [
        {"name": c.name, "results": c.results, "seconds": c.seconds,
         "difference": None if c.difference is None else vars(c.difference)}
        for c in found.checked
    ]  # fmt: skip
    result = {"seed": args.seed, "ok": found.ok, "kernels": facts, "skipped": found.skipped, "C core": built}
    write_json(args.json, result)
    return 0 if found.ok else 1
