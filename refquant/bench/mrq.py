"""What multi-region quantization is worth: softmax and GELU outputs by it, and by uniform and log2 quantizers.

    softmax   error of the attention output P V, for rows of different length and sharpness
    GELU      error of the values themselves, for different shares of positive ones

All with the best parameter of each quantizer for these data: the search is not what is compared. "signed" is the
symmetric quantizer that PTQ4ViT and TQ-DiT compare with; it has no use for half of its codes. "unsigned" is what a
softmax output deserves, the same search with all codes from 0 up.

Run ``python -m refquant.bench.mrq``; half a minute. With a transformer's name or file after it, the tables are those of
the model's own attention and GELU outputs: how often which quantizer is best, with how many bits, and every time-step
and block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, tokenops
from ..diffusion.model import DiffusionModel, load_model
from ..quant.affine import QSpec, fake_quantize
from ..quant.curvature import samples
from ..quant.guided import shrunk_ranges
from ..quant.mrq_sign import choose_positive, pays, share_of_positives
from ..quant.mrq_softmax import SoftmaxRegions, choose_shift, released_additive
from ..quant.record import record_trajectories
from ..quant.transformer import require

Float32 = NDArray[np.float32]

TOKENS, SHARPNESS, BITS = (16, 49, 256), (1.0, 3.0), (8, 6, 4)
SHAPES = ((0.0, 1.5), (-1.0, 1.5), (-2.0, 1.5), (-1.0, 0.7), (-2.0, 1.0))
UNSIGNED_SHRINK = np.geomspace(1, 2**-7, 80)  # down to a hundredth: flat attention has one large value in thousands


@dataclass(frozen=True)
class SoftmaxRow:
    """Mean squared errors of P V for one kind of attention.

    Attributes
    ----------
    tokens : int
    sharpness : float
        Deviation of the logits.
    bits, shift : int
        m of the best disjoint regions.
    errors : dict of str to float
        By quantizer.
    """

    tokens: int
    sharpness: float
    bits: int
    shift: int
    errors: dict[str, float]


@dataclass(frozen=True)
class GeluRow:
    """Mean squared errors of GELU outputs of N(mean, deviation²)."""

    mean: float
    deviation: float
    bits: int
    positive: float
    pays: bool
    errors: dict[str, float]


def log2_quantizer(p: Float32, bits: int) -> Float32:
    """Round -log2 p to 0 .. 2^k - 2; the last code is 0. p = 2^-code."""
    last = (1 << bits) - 1
    code = np.rint(-np.log2(np.maximum(p, np.float32(2.0**-126))))
    return np.where(code >= last, 0, 2.0 ** -np.clip(code, 0, last)).astype(np.float32)


def softmax_errors(p: Float32, v: Float32, bits: int) -> tuple[dict[str, float], SoftmaxRegions]:
    """Errors of P V by quantizer, and the best regions, for any P (..., L, L) and V (..., L, d)."""

    def least(found: Iterable[Float32]) -> float:
        return min(float(np.square(np.matmul(q - p, v)).mean()) for q in found)

    def searched(spec: QSpec) -> float:
        return least(fake_quantize(p, q) for q in shrunk_ranges(p, spec, UNSIGNED_SHRINK))

    regions = choose_shift(p, v, bits)
    unit = shrunk_ranges(np.float32([0, 1]), QSpec(bits, False, True), [1.0])[0]
    return {
        "uniform 0..1": least([fake_quantize(p, unit)]),
        "signed, searched": searched(QSpec(bits, True, True)),
        "unsigned, searched": searched(QSpec(bits, False, True)),
        "log2": least([log2_quantizer(p, bits)]),
        "released MRQ": least(released_additive(p, bits, m) for m in range(20)),
        "disjoint MRQ": least([regions.fake_quantize(p)]),
    }, regions


def gelu_errors(x: Float32, bits: int) -> dict[str, float]:
    """Errors of x, outputs of GELU, by quantizer."""

    def searched(spec: QSpec) -> float:
        return min(float(np.square(fake_quantize(x, q) - x).mean()) for q in shrunk_ranges(x, spec))

    return {
        "symmetric": searched(QSpec(bits, True, True)),
        "asymmetric": searched(QSpec(bits)),
        "MRQ": float(np.square(choose_positive(x, bits).fake_quantize(x) - x).mean()),
    }


def measure_softmax(images: int = 4, width: int = 8, seed: int = 0) -> list[SoftmaxRow]:
    """Rows for random logits N(0, sharpness²) and V ~ N(0, 1)."""
    rows = []
    for tokens in TOKENS:
        for sharpness in SHARPNESS:
            rng = np.random.default_rng([seed, tokens])
            logits = sharpness * rng.standard_normal((images, tokens, tokens))
            e = np.exp(logits - logits.max(axis=-1, keepdims=True))
            p = (e / e.sum(axis=-1, keepdims=True)).astype(np.float32)
            v = rng.standard_normal((images, tokens, width)).astype(np.float32)
            for bits in BITS:
                errors, regions = softmax_errors(p, v, bits)
                rows.append(SoftmaxRow(tokens, sharpness, bits, regions.shift, errors))
    return rows


def measure_gelu(values: int = 20_000, seed: int = 0) -> list[GeluRow]:
    """Rows for GELU of normal numbers."""
    rows = []
    for mean, deviation in SHAPES:
        x = np.random.default_rng(seed).normal(mean, deviation, values).astype(np.float32)
        y = tokenops.gelu(Tensor(x)).data
        rows += [
            GeluRow(mean, deviation, bits, share_of_positives(y), pays(y), gelu_errors(y, bits)) for bits in BITS
        ]
    return rows


def table(rows: list[SoftmaxRow] | list[GeluRow], head: Callable[..., list[str]], names: list[str]) -> str:
    """Markdown, the least error of a row in bold."""
    lines = []
    for row in rows:
        errors = list(row.errors.values())
        cells = [f"**{e:.1e}**" if e == min(errors) else f"{e:.1e}" for e in errors]
        lines.append("| " + " | ".join([*head(row), *cells]) + " |")
    titles = [*names, *rows[0].errors]
    return "\n".join(["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles), *lines])


def report() -> str:
    """Both tables."""
    softmax = table(
        measure_softmax(),
        lambda r: [str(r.tokens), f"{r.sharpness:g}", str(r.bits), str(r.shift)],
        ["tokens", "sharpness", "bits", "m"],
    )
    gelu = table(
        measure_gelu(),
        lambda r: [f"N({r.mean:g}, {r.deviation:g}²)", f"{r.positive:.2f}", str(r.bits), "yes" if r.pays else "no"],
        ["GELU of", "positive", "bits", "pays?"],
    )
    return f"Attention output, mean squared error\n\n{softmax}\n\nGELU output, mean squared error\n\n{gelu}"


def measure_model(
    model: DiffusionModel, bits: int = 8, images: int = 4, steps: int = 50, shown: int = 5
) -> tuple[list[tuple[int, int, SoftmaxRow]], list[tuple[int, int, GeluRow]]]:
    """Rows for a model's own softmax and GELU outputs: (t, block, row) at `shown` of the sampler's steps."""
    depth = require(model, "this bench").cfg.depth
    trajectories = record_trajectories(model, images, steps, seed=0)
    names = [f"blocks.{i}.{part}" for i in range(depth) for part in ("attn.product", "mlp.fc2")]
    softmax, gelu = [], []
    for step in np.linspace(0, steps - 1, shown).round().astype(int):
        t, seen = int(trajectories.t[step]), samples(model, names, trajectories, trajectories.at([step]), "none")
        for i in range(depth):
            q, k, v = seen[f"blocks.{i}.attn.product"].inputs
            scores = np.matmul(q, k.transpose(0, 2, 1)) / np.sqrt(np.float32(q.shape[-1]))
            e = np.exp(scores - scores.max(axis=-1, keepdims=True))
            errors, regions = softmax_errors(e / e.sum(axis=-1, keepdims=True), v, bits)
            sharpness = float(scores.std(axis=-1).mean())
            softmax.append((t, i, SoftmaxRow(q.shape[1], sharpness, bits, regions.shift, errors)))
            x = seen[f"blocks.{i}.mlp.fc2"].inputs[0]
            row = GeluRow(float(x.mean()), float(x.std()), bits, share_of_positives(x), pays(x), gelu_errors(x, bits))
            gelu.append((t, i, row))
    return softmax, gelu


def summary(found: dict[int, tuple[list[tuple[int, int, SoftmaxRow]], list[tuple[int, int, GeluRow]]]]) -> str:
    """Markdown: one line for each number of bits, over all time-steps and blocks of `measure_model`.

    Against the best that a uniform quantizer can do, "unsigned, searched" or "asymmetric"; "sharpest" and "flattest" go
    by the deviation of the logits.
    """
    lines = [
        "| bits | rows | MRQ best | error of MRQ / uniform | sharpest third | flattest third | m | "
        "MRQ best for GELU | with fewer than 1/4 positive | with more |",
        "|" + "---|" * 10,
    ]
    for bits, (softmax, gelu) in found.items():
        rows = sorted((row for *_, row in softmax), key=lambda row: row.sharpness)
        ratio = np.array([row.errors["disjoint MRQ"] / row.errors["unsigned, searched"] for row in rows])
        won = [min(row.errors, key=row.errors.__getitem__) == "disjoint MRQ" for row in rows]
        third, shifts = max(1, len(rows) // 3), [row.shift for row in rows]
        few = [row.errors["MRQ"] < row.errors["asymmetric"] for *_, row in gelu if row.pays]
        many = [row.errors["MRQ"] < row.errors["asymmetric"] for *_, row in gelu if not row.pays]
        cells = (
            bits, len(rows), f"{sum(won)}", _middle(ratio), _middle(ratio[-third:]), _middle(ratio[:third]),
            f"{min(shifts)} to {max(shifts)}", f"{sum(few) + sum(many)}", f"{sum(few)} of {len(few)}",
            f"{sum(many)} of {len(many)}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _middle(ratios: NDArray[np.float64]) -> str:
    return f"{np.exp(np.log(ratios).mean()):.2f}"  # geometric mean


def model_report(model: DiffusionModel) -> str:
    """A summary over 8, 6 and 4 bits, and both tables of 8 bits."""
    found = {bits: measure_model(model, bits) for bits in BITS}
    softmax, gelu = found[BITS[0]]
    places = {id(row): [str(t), str(i)] for t, i, row in [*softmax, *gelu]}
    first = table(
        [row for _, _, row in softmax],
        lambda r: [*places[id(r)], f"{r.sharpness:.2f}", str(r.shift)],
        ["t", "block", "sharpness", "m"],
    )
    second = table(
        [row for _, _, row in gelu],
        lambda r: [*places[id(r)], f"{r.positive:.2f}", "yes" if r.pays else "no"],
        ["t", "block", "positive", "pays?"],
    )
    return (
        f"{model.name}, all time-steps and blocks\n\n{summary(found)}\n\n"
        f"Attention output, mean squared error, {BITS[0]} bits\n\n{first}\n\nGELU output\n\n{second}"
    )


if __name__ == "__main__":
    print(model_report(load_model(sys.argv[1])) if sys.argv[1:] else report())
