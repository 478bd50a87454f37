"""refquant bench: check first, then time, beside the peers that are installed."""

from __future__ import annotations

import argparse
import math
from itertools import product
from pathlib import Path
from typing import Any

from .. import kernels
from ..bench import kernels as kernel_bench
from ..bench import reconstruct, train, unet
from ..diffusion.model import load_model
from ..nn.networks import CONFIGS
from .common import add_verb, print_table, say, setting, write_json


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(verbs, "bench", "Time training, sampling, calibration or the integer kernels beside other libraries.",
                 "refquant bench kernels --shapes 256,16x16 8x8 --repeats 5")  # fmt: skip
    p.add_argument("what", choices=("train", "unet", "kernels", "reconstruct"),
                   help="train: one update; unet: one forward pass of a UNet or a transformer, in integers and in "
                   "float32; kernels: convolutions in uint8 x int8; reconstruct: learning roundings")  # fmt: skip
    p.add_argument("--repeats", type=int, metavar="R",
                   help=f"timed rounds, engines taking turns (default: 10; unet: {unet.ROUNDS})")  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    net = p.add_argument_group("train and unet")
    net.add_argument("--network", nargs="+", choices=tuple(CONFIGS), metavar="NAME",
                     help=f"{', '.join(CONFIGS)}; random weights (default: mnist-unet; unet: "
                     f"{' '.join(unet.NETWORKS)})")  # fmt: skip
    net.add_argument("--batch", nargs="+", type=int, metavar="B",
                     help=f"images (default: 64; unet: {' '.join(map(str, unet.BATCHES))})")  # fmt: skip
    net.add_argument("--engines", nargs="+", default=[], metavar="TEXT",
                     help="unet: those whose name contains a TEXT (default: all, of which PyTorch compiled needs "
                     "minutes before its first pass)")  # fmt: skip
    integer = p.add_argument_group("kernels")
    integer.add_argument("--shapes", nargs="+", metavar="TEXT", help="those whose name contains a TEXT")
    integer.add_argument("--gemm", action="store_true", help="matrix products of the same size, beside NumPy float32")
    integer.add_argument("--int4", action="store_true", help="weights of 4 bits beside those of 8, two larger shapes")
    integer.add_argument("--zero-point", type=int, default=0, metavar="Z", help="code of the activations that means 0")
    block = p.add_argument_group("reconstruct")
    block.add_argument("--units", nargs="+", metavar="NAME", default=reconstruct.UNITS, help="blocks of mnist-unet")
    block.add_argument("--iterations", type=int, default=30, metavar="I", help="of each turn")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Time what is asked for."""
    verbs = {"train": run_train, "unet": run_unet, "kernels": run_kernels, "reconstruct": run_reconstruct}
    if args.repeats is None:
        args.repeats = unet.ROUNDS if args.what == "unet" else 10
    return verbs[args.what](args)


def run_train(args: argparse.Namespace) -> int:
    """Print images per second and ratios."""
    found = []
    for network, batch in product(args.network or ["mnist-unet"], args.batch or [64]):
        say(args, f"bench train {network} batch {batch}, {setting()}")
        times = train.run(network, batch, args.repeats, args.seed)
        rows = [
            (name, f"{batch / t:.1f}", f"{1000 * t:.1f}", f"{t / times['refquant']:.2f}")
            for name, t in sorted(times.items(), key=lambda item: item[1])
        ]
        print_table((f"{network}, batch {batch}", "images/s", "ms", "refquant is x as fast"), rows)
        found.append({"network": network, "batch": batch, "seconds": times})
    if len(times) == 1:
        print("PyTorch is not installed: pip install torch, to compare.")
    write_json(args.json, {"what": "train", "cases": found})
    return 0


def run_unet(args: argparse.Namespace) -> int:
    """Print times, images per second and ratios of all engines, and where the time of ours goes."""
    networks, batches = args.network or unet.NETWORKS, args.batch or unet.BATCHES
    say(args, f"bench unet {' '.join(networks)}, batch {' '.join(map(str, batches))}, {setting()}")
    found = unet.run(
        networks, batches, args.repeats, engines=args.engines, seed=args.seed, progress=lambda text: say(args, text)
    )
    print_unet(found, args.repeats)
    write_json(args.json, {"what": "unet", "repeats": args.repeats, **found})
    return 0


def print_unet(found: dict[str, Any], rounds: int) -> None:
    """Print the result of `bench.unet.run`."""
    print(f"One pass of a network with random weights, {found['threads']} threads: the fastest of {rounds} rounds.")
    print("What depends on time-step and class alone is known before sampling: in integers and in the networks of")
    print("ONNX Runtime and OpenVINO it is a table; PyTorch and refquant float32 compute it in each pass.")
    print("x float32, x int8: how many times as fast as the fastest peer of that kind; range over the rounds.")
    print("apart: of float32 from refquant float32, of int8 from refquant's integers, of those from float32;")
    print("the largest difference for float32, else root mean square, relative.")
    for case in found["cases"]:
        print()
        print_case(case, found["peak_gops"], found["isa"])
    print()
    for name, what in found["contenders"].items():
        if what is None:
            print(f"{name}: not installed (pip install refquant[bench])")
        elif what:
            print(f"{name}: {what}")
            for network, note in {case["network"]: case["notes"].get(name) for case in found["cases"]}.items():
                if note:
                    print(f"  {network}: {note}")
    for case in found["cases"]:
        for name, reason in case["unfit"].items():
            print(f"{name}, {case['network']}, batch {case['batch']}: not timed, {reason}")


def print_case(case: dict[str, Any], peak: float | None, isa: str) -> None:
    """Print one network and batch: the engines, the fastest last, then our operations, the slowest first."""
    work = 2 * case["multiplications"] * case["batch"]
    if peak is not None:
        least = 1000 * work / (1e9 * peak)
        print(f"{work / 1e9:.2f} GOP in integers; {least:.2f} ms at the peak of {isa}, {peak:.0f} GOP/s")
    kinds = list(case["ratios"])
    rows = []
    for name, seconds in sorted(case["fastest"].items(), key=lambda item: -item[1]):
        cells = [f"{1000 * seconds:.2f}", f"{case['batch'] / seconds:.1f}"]
        for kind in kinds:
            r = case["ratios"][kind][name]
            cells += [f"{r['ratio']:.2f}", f"{r['least']:.2f}-{r['most']:.2f}"]
        rows.append((name, *cells, f"{case['differences'][name]:.1e}"))
    header = [f"{case['network']}, batch {case['batch']}", "ms", "images/s"]
    print_table((*header, *(cell for kind in kinds for cell in (f"x {kind}", "range")), "apart"), rows)
    profiles = case["profiles"]
    if not profiles:
        return
    print()
    first = next(iter(profiles.values()))
    table = []
    for kind, what in (*first["kinds"].items(), ("all", {"operations": len(first["names"])})):
        cells = []
        for p in profiles.values():
            seconds = p["seconds"] if kind == "all" else p["kinds"][kind]["seconds"]
            cells += [f"{1000 * seconds:.2f}", f"{100 * seconds / p['seconds']:.0f} %"]
        table.append((kind, str(what["operations"]), *cells))
    print_table(("operation", "times", *(cell for name in profiles for cell in (f"{name} ms", "share"))), table)


def run_reconstruct(args: argparse.Namespace) -> int:
    """Print iterations per second and ratios."""
    say(args, f"bench reconstruct, 4-bit weights, batch 32, {args.iterations} iterations, {setting()}")
    rows = reconstruct.run(load_model("mnist-unet"), tuple(args.units), args.iterations, args.repeats)
    engines = [name for name in rows[0] if name != "unit"]
    table = [(r["unit"], *(f"{r[e]:.1f}" for e in engines), *(f"{r['refquant'] / r[e]:.2f}" for e in engines[1:]))
             for r in rows]  # fmt: skip
    print("iterations per second, and how many times as fast as each peer refquant is")
    print_table(("unit", *engines, *(f"x {e}" for e in engines[1:])), table)
    if len(engines) == 1:
        print("PyTorch is not installed: pip install torch, to compare.")
    write_json(args.json, {"what": "reconstruct", "iterations": args.iterations, "rows": rows})
    return 0


def run_kernels(args: argparse.Namespace) -> int:
    """Print GOP/s of our kernels and their share of the peak, then of the peers, and ratios."""
    wide = [name for name in kernels.supported() if name not in kernel_bench.SLOW]
    isas = wide if args.isa is None and wide else [kernels.active()]
    shapes = kernel_bench.chosen_shapes(args.shapes or (), args.int4)
    say(args, f"bench kernels, {len(shapes)} shapes, {args.repeats} rounds, {setting()}")
    found = kernel_bench.run(
        shapes, args.repeats, isas=isas, int4=args.int4, gemm=args.gemm, zero_point=args.zero_point, seed=args.seed,
        progress=lambda text: say(args, text),
    )  # fmt: skip
    print_kernels(found, isas)
    write_json(args.json, {"what": "kernels", "repeats": args.repeats, "gemm": args.gemm, "int4": args.int4, **found})
    return 0


def print_kernels(found: dict[str, Any], isas: list[str]) -> None:
    """Print the result of `bench.kernels.run`: ours, peers, peers beside ours, and the mean ratio of each kernel."""
    rows, peaks = found["shapes"], found["peak_gops"]
    print(f"GOP/s, {found['threads']} threads; in brackets the share of the peak of the kernel's own instruction.")
    print("A shape is images, channels in->out, pixels, window.")
    ours = [name for name in rows[0]["gops"] if name.split()[0] in isas]
    share = {name: 100 / peaks[name.split()[0]] for name in ours if name.split()[0] in peaks}

    def cell(name: str, gops: float) -> str:
        return f"{gops:.0f} ({share[name] * gops:.0f}%)" if name in share else f"{gops:.0f}"

    print_table(("shape", *ours), [(r["name"], *(cell(n, r["gops"][n]) for n in ours)) for r in rows])
    print("peaks: " + (", ".join(f"{isa} {peak:.0f} GOP/s" for isa, peak in peaks.items()) or "none measured"))
    print()
    for name, what in found["peers"].items():
        print(f"{name + ':':<14} {what or 'not installed (pip install refquant[bench])'}")
    names = [n for n in found["peers"] if any(n in r["gops"] for r in rows)]
    print()
    _print_ratios(rows, names, isas)
    for r in rows:
        for name, reason in r["unfit"].items():
            print(f"{name}, {r['name']}: not timed, {reason}")


def _print_ratios(rows: list[dict[str, Any]], names: list[str], isas: list[str]) -> None:
    """Print peers in GOP/s, and for our fastest kernel how many times as fast as the best peer it is."""
    compared = [key for key in rows[0]["ratios"]]
    if not compared:
        print("No peer computes the same here: there is nothing to compare with.")
        return
    fastest = compared[-1]
    table = []
    for r in rows:
        ratio = r["ratios"][fastest]
        cells = [f"{r['gops'][n]:.0f}" if n in r["gops"] else "-" for n in (fastest, *names)]
        table.append((r["name"], *cells, f"{ratio['median']:.2f}", f"{ratio['least']:.2f}-{ratio['most']:.2f}"))
    print_table(("shape", fastest, *names, "ratio", "range"), table)
    print("ratio: how many times as fast as the fastest comparable peer; median and range over the rounds.")
    for key in compared:
        ratios = {r["name"]: r["ratios"][key]["median"] for r in rows}
        least = min(ratios, key=ratios.__getitem__)
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        print(f"{key}: geometric mean {mean:.2f}, least {ratios[least]:.2f} ({least})")
