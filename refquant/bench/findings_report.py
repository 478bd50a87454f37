"""The page of findings, written from the numbers that `bench.findings` saved; no number is typed by hand.

    python -m refquant.bench.findings_report findings.json > refquant/quant/methods/README.md

A claim is *supported* where the difference has its sign and is larger than the spread of both sides together,
*contradicted* where it is as large the other way round, and *open* otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Measured = Mapping[str, Any]

SUPPORTED, CONTRADICTED, OPEN = "**supported**", "**contradicted**", "**open**"

CLAIMS = {
    "1": "TIAR lowers the error of temporal features against other ways of rounding the same layers.",
    "1, bit-widths": "Quantized temporal layers hurt the images.",
    "2": "TIAR on 20 time-steps is as good at the ones it has not seen.",
    "3": "Ranges for each step (FSC) help; whether for temporal layers only or for all makes little difference.",
    "5": "TFMQ-DM is better than Q-Diffusion at equal coverage, not only because it leaves more in float.",
    "6": "TFMQ-DM calibrates 2.0 times as fast as earlier work.",
    "steps": "States drawn by the importance of their time-steps are better to learn on than even ones.",
    "8": "Normally distributed calibration time-steps are better than uniform ones (PTQ4DM).",
    "10": "A running average of batch extremes is good enough for the ranges of a step.",
    "11": "Cached temporal features disturb less than computed ones (journal version).",
    "12": "Tables cost less than 1 % of the parameters.",
}


HEAD = """\
# Methods, and what became of their claims here

One file a paper, each with its table of equations and with what differs from the authors' code. Below, claims of the
papers on the shipped model: 28x28 digits, 1.3 million parameters, 50 DDIM steps, W4A8 and coverage `full` where
nothing else is said. **They are findings about this model, not about the papers' models**; a tiny model may show a
smaller effect, or none.

Written by `python -m refquant.bench.findings_report` from the numbers of `refquant.bench.findings`
({effort}); ± is the standard deviation over three seeds, of the noise or of the rounding.
PSNR is to the float images from the same noise; feature errors are squared, summed over channels and blocks, mean
over all time-steps.
"""


def judge(better: tuple[float, float], worse: tuple[float, float]) -> str:
    """Verdict on "the first (mean, spread) is larger than the second"."""
    difference, spread = better[0] - worse[0], (better[1] ** 2 + worse[1] ** 2) ** 0.5
    if difference > spread:
        return SUPPORTED
    return CONTRADICTED if difference < -spread else OPEN


def _psnr(entry: Measured) -> tuple[float, float]:
    return entry["psnr_db"][0], entry["psnr_db"][1]


def _flip(pair: list[float]) -> tuple[float, float]:
    return -pair[0], pair[1]


def verdict_1(m: Measured) -> str:
    """Against nearest, each layer by itself, and inside of blocks."""
    against = {
        "nearest rounding": m["nearest"],
        "each layer by itself": m["layerwise"],
        "inside of blocks": [m["inside blocks (brecq)"], 0.0],
    }
    parts = [f"{judge(_flip(m['tiar']), _flip(pair))} against {name} (error {m['tiar'][0]:.3f}, there {pair[0]:.3f})"
             for name, pair in against.items()]  # fmt: skip
    return "; ".join(parts) + "."


def verdict_bits(m: Measured) -> str:
    """From which bits on the temporal layers alone cost a decibel that can be seen."""
    lines = [f"W{b}: {m[f'W{b} nearest']['psnr_db'][0]:.1f} dB nearest, {m[f'W{b} tiar']['psnr_db'][0]:.1f} dB TIAR"
             for b in (8, 6, 4, 3, 2)]  # fmt: skip
    return f"{judge(_psnr(m['W8 nearest']), _psnr(m['W4 nearest']))} at 4 bits. " + "; ".join(lines) + "."


def verdict_2(m: Measured) -> str:
    """Errors at seen and unseen time-steps."""
    few, every = m["20 time-steps"], m["all time-steps"]
    seen, unseen = few["at the 20"], few["at the others"]
    ratio = unseen[0] / seen[0]
    word = SUPPORTED if ratio < 1.25 else CONTRADICTED if ratio > 2 else OPEN
    return (
        f"{word}: the error at unseen time-steps is {ratio:.2f} times that at seen ones. With all time-steps in the "
        f"calibration it is {every['at the others'][0]:.3f} there, with 20 it is {unseen[0]:.3f}."
    )


def verdict_3(m: Measured) -> str:
    """Scopes."""
    none, temporal, every = (_psnr(m[f"{scope}, exact"]) for scope in ("none", "temporal", "all"))
    return (
        f"Temporal layers only against none: {judge(temporal, none)} ({temporal[0]:.1f} and {none[0]:.1f} dB). All "
        f"activations against temporal layers only: a difference of {every[0] - temporal[0]:+.1f} dB, spread "
        f"{(every[1] ** 2 + temporal[1] ** 2) ** 0.5:.1f}."
    )


def verdict_5(m: Measured) -> str:
    """Both coverages."""
    parts = [f"{judge(_psnr(m[f'tfmq, {c}']), _psnr(m[f'qdiffusion, {c}']))} at coverage {c} "
             f"({m[f'tfmq, {c}']['psnr_db'][0]:.1f} and {m[f'qdiffusion, {c}']['psnr_db'][0]:.1f} dB)"
             for c in ("full", "released")]  # fmt: skip
    return "; ".join(parts) + "."


def verdict_6(m: Measured) -> str:
    """Ratio of the seconds."""
    extra = m["qdiffusion"].get("steps", 0.0)
    return (
        f"{SUPPORTED if m['ratio'] >= 2 else CONTRADICTED}: {m['ratio']:.2f} times. Learning activation steps is "
        f"{extra:.0f} s of Q-Diffusion's {sum(m['qdiffusion'].values()):.0f} s; without it the two would be alike."
    )


def verdict_steps(m: Measured) -> str:
    """Importance against even sampling, method by method."""
    parts = [
        f"{judge(_psnr(m[f'{name}, importance']), _psnr(m[f'{name}, uniform']))} for {name} "
        f"({m[f'{name}, importance']['psnr_db'][0]:.1f} and {m[f'{name}, uniform']['psnr_db'][0]:.1f} dB)"
        for name in ("brecq", "tfmq")
    ]
    return "; ".join(parts) + "."


def verdict_8(m: Measured) -> str:
    """Normal against uniform, and what the released labels do."""
    return (
        f"{judge(tuple(m['normal']), tuple(m['uniform']))} ({m['normal'][0]:.1f} and {m['uniform'][0]:.1f} dB). The "
        f"released labels, which belong to other noise levels, give {m['normal, released labels'][0]:.1f} dB."
    )


def verdict_10(m: Measured) -> str:
    """Exact against running."""
    exact, running = m["exact"], m["running"]
    return (
        f"Exact extremes against the average: {judge(_psnr(exact), _psnr(running))} as the better one "
        f"({exact['psnr_db'][0]:.1f} and {running['psnr_db'][0]:.1f} dB); of fresh values "
        f"{exact['saturated share']:.1e} and {running['saturated share']:.1e} are saturated."
    )


def verdict_11(m: Measured) -> str:
    """Disturbances."""
    word = SUPPORTED if m["cache"] < m["computed"] else CONTRADICTED
    return (
        f"{word}: {m['cache']:.2e} against {m['computed']:.2e}, and the cache is better for "
        f"{m['blocks where the cache is better']} blocks."
    )


def verdict_12(m: Measured) -> str:
    """Share of the parameters."""
    parts = [f"{scope}: {m[scope]['table numbers']:,} numbers, {100 * m[scope]['share of parameters']:.2f} %"
             for scope in ("temporal", "all")]  # fmt: skip
    return f"{SUPPORTED if m['all']['share of parameters'] < 0.01 else CONTRADICTED}: " + "; ".join(parts) + "."


VERDICTS: dict[str, Callable[[Measured], str]] = {
    "1": verdict_1, "1, bit-widths": verdict_bits, "2": verdict_2, "3": verdict_3, "5": verdict_5, "6": verdict_6,
    "steps": verdict_steps, "8": verdict_8, "10": verdict_10, "11": verdict_11, "12": verdict_12,
}  # fmt: skip


def page(found: Measured) -> str:
    """The whole page as Markdown."""
    effort = ", ".join(f"{name} {value}" for name, value in found["effort"].items())
    lines = [HEAD.format(effort=effort)]
    for claim, entry in found["claims"].items():
        lines += [f"## {claim}. {CLAIMS[claim]}", "", VERDICTS[claim](entry["measured"]), ""]
        lines += [*_table(entry["measured"]), ""]
    return "\n".join(lines)


def _table(measured: Measured) -> list[str]:
    """Numbers as a list, or as a table where every entry has several."""
    rows = {key: value for key, value in measured.items() if isinstance(value, Mapping)}
    if not rows:
        return [f"- {key}: {_number(value)}" for key, value in measured.items()]
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {key} | " + " | ".join(_number(row.get(c)) for c in columns) + " |" for key, row in rows.items()]
    rest = [f"{key}: {_number(value)}" for key, value in measured.items() if key not in rows]
    return lines + ([""] + rest if rest else [])


def _number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"{_number(value[0])} ± {_number(value[1])}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text())), end="")
