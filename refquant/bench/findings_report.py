"""The page of findings, written from the numbers that `bench.findings` saved; no number is typed by hand.

    cd refquant/bench
    python -m refquant.bench.findings_report findings.json bit_widths*.json > ../quant/methods/README.md

The other files, if given, are what `refquant compare` wrote for several bit-widths; their tables end the page.

Two ways are compared seed by seed, since both start from the same noise (or round with the same seed). A claim is
*supported* where the mean difference has its sign and is more than twice the spread of the differences,
*contradicted* where it is so the other way round, and *open* otherwise. Where a claim has parts, each has its verdict.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..compare import HEADER, cells
from ..metrics import mean_and_spread

Measured = Mapping[str, Any]
Seeds = Sequence[float]

SUPPORTED, CONTRADICTED, OPEN = "**supported**", "**contradicted**", "**open**"
CLEAR = 2.0  # spreads of three differences: half the size is met by chance in one of nine, this in one of 27

CLAIMS = {
    "1": "TIAR lowers the error of temporal features against other ways of rounding the same layers.",
    "1, bit-widths": "Quantized temporal layers hurt the images.",
    "2": "TIAR on 20 time-steps is as good at the ones it has not seen.",
    "3": "Ranges for each step (FSC) help; whether for temporal layers only or for all makes little difference.",
    "4": "What TFMQ-DM gains, it gains in the temporal layers.",
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

Written by `python -m refquant.bench.findings_report` from [the numbers](../../bench/findings.json) of
`refquant.bench.findings` (effort: {effort}; a fraction of the default, so that decibels are lower than in the
README's table). ± is the standard deviation over three seeds, of the noise or of the rounding. A verdict compares
seed by seed: *supported* or *contradicted* where the mean difference is more than twice its spread, *open* where it
is not. Each model is calibrated once, so that the spread of calibration is in no verdict on decibels.
PSNR is to the float images from the same noise; feature errors are squared, summed over channels and blocks, mean
over all time-steps.
"""


def judge(better: Seeds, worse: Seeds) -> str:
    """Verdict on "the first is larger than the second", seed by seed; a list of one stands for every seed."""
    mean, spread = gain(better, worse)
    if mean > CLEAR * spread:
        return SUPPORTED
    return CONTRADICTED if mean < -CLEAR * spread else OPEN


def gain(better: Seeds, worse: Seeds) -> tuple[float, float]:
    """Mean of the differences and their spread; one difference has none."""
    found = np.subtract(better, worse)
    return mean_and_spread(found) if found.size > 1 else (float(found[0]), 0.0)


def _decibel(better: Measured, worse: Measured) -> str:
    """Verdict and gain in PSNR."""
    mean, spread = gain(better["psnr_db"], worse["psnr_db"])
    return f"{judge(better['psnr_db'], worse['psnr_db'])}, {mean:+.1f} ± {spread:.1f} dB"


def verdict_1(m: Measured) -> str:
    """Against nearest, each layer by itself, and inside of blocks."""
    against = {
        "nearest rounding": m["nearest"],
        "each layer by itself": m["layerwise"],
        "inside of blocks": m["inside blocks (brecq)"],
    }
    parts = [f"{judge(there, m['tiar'])} against {name} (error {np.mean(m['tiar']):.3f}, there {np.mean(there):.3f})"
             for name, there in against.items()]  # fmt: skip
    return "; ".join(parts) + "."


def verdict_bits(m: Measured) -> str:
    """From which bits on the temporal layers alone cost a decibel that can be seen."""
    lines = [f"W{b}: {np.mean(m[f'W{b} nearest']['psnr_db']):.1f} dB nearest, "
             f"{np.mean(m[f'W{b} tiar']['psnr_db']):.1f} dB TIAR" for b in (8, 6, 4, 3, 2)]  # fmt: skip
    return f"{_decibel(m['W8 nearest'], m['W4 nearest'])} for 8 bits over 4. They alone are quantized: " + (
        "; ".join(lines) + "."
    )


def verdict_2(m: Measured) -> str:
    """Errors at seen and unseen time-steps: within a quarter, or twice as large."""
    few, every = m["20 time-steps"], m["all time-steps"]
    seen, unseen = np.mean(few["at the 20"]), np.mean(few["at the others"])
    ratio = unseen / seen
    word = SUPPORTED if ratio < 1.25 else CONTRADICTED if ratio > 2 else OPEN
    return (
        f"{word}: the error at unseen time-steps is {ratio:.2f} times that at seen ones (to 1.25 is supported, from 2 "
        f"contradicted). With all time-steps in the calibration it is {np.mean(every['at the others']):.3f} there, "
        f"with 20 it is {unseen:.3f}."
    )


def verdict_3(m: Measured) -> str:
    """Scopes: the tables help, and the rest of the network needs none."""
    none, temporal, every = (m[f"{scope}, exact"] for scope in ("none", "temporal", "all"))
    mean, spread = gain(every["psnr_db"], temporal["psnr_db"])
    alike = SUPPORTED if abs(mean) <= CLEAR * spread else CONTRADICTED
    return (
        f"Tables of temporal layers over one range: {_decibel(temporal, none)}. Tables of everything over one range: "
        f"{_decibel(every, none)}. That the scopes are alike: {alike}, {mean:+.1f} ± {spread:.1f} dB for everything."
    )


def verdict_4(m: Measured) -> str:
    """If the temporal layers were all, giving them float weights on top would change little."""
    made, frozen = m["tfmq"], m["tfmq, temporal weights in float"]
    plain = m["tfmq, temporal weights in float, no tables"]
    return (
        f"Float weights in the temporal layers over those of TIAR, a gain that remains to be had: "
        f"{_decibel(frozen, made)}. TIAR with tables over float weights without ("
        f"what the paper's two ablations suggest): {_decibel(made, plain)}."
    )


def verdict_5(m: Measured) -> str:
    """Both coverages."""
    parts = [f"{_decibel(m[f'tfmq, {c}'], m[f'qdiffusion, {c}'])} at coverage {c}" for c in ("full", "released")]
    return "; ".join(parts) + "."


def verdict_6(m: Measured) -> str:
    """Ratio of the seconds, with and without the learning of activation steps."""
    extra, spent = m["qdiffusion"].get("steps", 0.0), {n: sum(m[n].values()) for n in ("qdiffusion", "tfmq")}
    return (
        f"{SUPPORTED if m['ratio'] >= 2 else CONTRADICTED}: {m['ratio']:.2f} times. Learning activation steps is "
        f"{extra:.0f} s of Q-Diffusion's {spent['qdiffusion']:.0f} s; without it the ratio would be "
        f"{(spent['qdiffusion'] - extra) / spent['tfmq']:.2f}."
    )


def verdict_steps(m: Measured) -> str:
    """Importance against even sampling, method by method."""
    parts = [f"{_decibel(m[f'{name}, importance'], m[f'{name}, uniform'])} for {name}" for name in ("brecq", "tfmq")]
    return "; ".join(parts) + "."


def verdict_8(m: Measured) -> str:
    """Normal against uniform, and what the released labels do."""
    mean, spread = gain(m["normal"], m["uniform"])
    return (
        f"{judge(m['normal'], m['uniform'])}, {mean:+.1f} ± {spread:.1f} dB at W8A8. The released labels, which belong "
        f"to other noise levels, give {np.mean(m['normal, released labels']):.1f} dB "
        f"(right ones {np.mean(m['normal']):.1f} dB)."
    )


def verdict_10(m: Measured) -> str:
    """Good enough is not clearly worse than the exact extremes."""
    exact, running = m["exact"], m["running"]
    worse = judge(exact["psnr_db"], running["psnr_db"])
    mean, spread = gain(running["psnr_db"], exact["psnr_db"])
    return (
        f"{CONTRADICTED if worse == SUPPORTED else SUPPORTED}: {mean:+.1f} ± {spread:.1f} dB over exact extremes; of "
        f"fresh values {running['saturated share']:.1e} are saturated, with exact ones {exact['saturated share']:.1e}."
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
    "1": verdict_1, "1, bit-widths": verdict_bits, "2": verdict_2, "3": verdict_3, "4": verdict_4, "5": verdict_5,
    "6": verdict_6, "steps": verdict_steps, "8": verdict_8, "10": verdict_10, "11": verdict_11, "12": verdict_12,
}  # fmt: skip


REMARKS = {  # on the numbers in findings.json: to be read again when those change
    "1": "Each layer by itself takes as many iterations for every layer as TIAR for all of them together, and "
    "with that much more work it ends closer. Inside of blocks the same layers hardly improve on nearest, "
    "which is the paper's point.",
    "1, bit-widths": "A few images that turn into other digits make the spread; the median moves less with the seed.",
    "2": "Few time-steps are seen more often than each of all, and learned better; the others pay for it. All of "
    "them cost no more time, so `tfmq` looks at all.",
    "3": "At W4A8 the weights do the damage, and ranges cannot mend it. Where weights do less, they can: in the "
    "last tables `tfmq` is far ahead of `brecq` at W8A8 and W6A6, whose activations have one range for all "
    "steps.",
    "4": "Float weights bring nothing more because TIAR has taken what was to be had (claim 1), and what is left "
    "hurts less than the other layers do.",
    "5": "Learned activation steps are what `qdiffusion` has and `tfmq` has not, and with few iterations they "
    "weigh more than the temporal features. With the documented effort, in the README's table, `tfmq` is "
    "ahead; most of what it lacks here it lacks in the weights of its blocks, not in the temporal layers "
    "(claim 4).",
    "6": "Both do the same work on the same units, so what is left is the learning of activation steps; our "
    "`tfmq` samples nothing anew for each step, on which the released code spends most of its time. With so "
    "few iterations what every method pays once weighs much: the ratio at the documented effort is in the "
    "README.",
    "steps": "With more trajectories and states `tfmq` gained (README). What is drawn more often must be there often "
    "enough: of so few states the many steps that seem harmless are left with a few each.",
    "8": "Probably because a search for the least squared error looks at where most values are, which the weight "
    "of the steps hardly moves. States with labels of other noise levels are as good for ranges alone.",
    "10": "Clipping so few values is nothing beside the rounding of all.",
}


def page(found: Measured, *compared: Measured) -> str:
    """The whole page as Markdown, with comparisons of bit-widths at its end if there are any."""
    effort = ", ".join(f"{name} {value}" for name, value in found["effort"].items())
    lines = [HEAD.format(effort=effort)]
    for claim in (name for name in CLAIMS if name in found["claims"]):  # in this order, whatever was measured first
        measured = found["claims"][claim]["measured"]
        lines += [f"## {claim}. {CLAIMS[claim]}", "", VERDICTS[claim](measured), ""]
        lines += [REMARKS[claim], ""] if claim in REMARKS else []
        lines += [*_table(measured), ""]
    lines += ["## Bit-widths", ""] if compared else []
    for one in compared:
        lines += [one["caption"], "", *_compared(one["rows"]), ""]
    return "\n".join(lines)


def _compared(rows: Sequence[Measured]) -> list[str]:
    """What a method gains or loses from one bit-width to the next; seconds and sizes are in the README's table."""
    shown = ("method", "bits", "PSNR dB", "median dB", "Frechet", "feature error", "worst cosine", "MB", "GBOP")
    lines = ["| " + " | ".join(shown) + " |", "|---|---|" + "---:|" * (len(shown) - 2)]
    for row in rows:
        texts = dict(zip(HEADER, cells(dict(row)), strict=True))
        lines.append("| " + " | ".join(texts[name] for name in shown) + " |")
    return lines


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
        if len(value) == 1:
            return _number(value[0])
        mean, spread = mean_and_spread(value)
        return f"{_number(mean)} ± {_number(spread)}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    print(page(*(json.loads(Path(name).read_text()) for name in sys.argv[1:])), end="")
