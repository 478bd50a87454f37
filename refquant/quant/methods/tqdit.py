"""TQ-DiT (Hwang, Lee, Kang 2025, arXiv 2502.04056): two regions, groups of time-steps, guided scales.

1. MRQ, multi-region quantization: softmax outputs get a fine and a coarse step, GELU outputs a step for either sign;
2. TGQ, time grouping: what changes most from step to step, the split of the softmax outputs, is found for each of ten
   groups of the sampler's steps;
3. HO, Hessian-guided optimisation: scales minimise the output error of each layer, weighted by squared gradients.

Nothing is learned: it is a search in one dimension for each layer, and takes a minute or two.

    equation                              function here                        authors' code (TQ-DiT 95397df)
    softmax regions (MRQ)                 `mrq_softmax.SoftmaxRegions`         quant_layers/matmul.py, SoSPTQSL...
    GELU regions (MRQ)                    `mrq_sign.SignSplit`                 quant_layers/linear.py, PostGeluPTQSL...
    code with a region flag               `quantize` of both                   utils/integer.py
    groups of steps (eq. 9)               `observers.TimeGroups`               utils/global_var.py, get_group_ind
    calibration set (eq. 10)              `record.pick`                        quant_dataset.py, which is missing
    weighted output error (eq. 14 to 17)  `guided.search`, `search_attention`  quant_layers/linear.py, _get_similarity
    its weights                           `curvature.samples`                  utils/quant_calib.py, grad_hook

Where we differ and why.

1. **The gradient.** Theirs is that of a KL divergence between two outputs of one float network: nothing, or an artefact
   of batching (see `guided`). Ours is the Gauss-Newton diagonal, or the empirical Fisher that the text derives; and
   each step of the sampler counts alike (`even`), where the text's sums let the cleanest, which move the image
   least, count most (see `curvature`).
2. **Disjoint regions.** Theirs are added up, which is worse than a uniform quantizer (see `mrq_softmax`); m is at most
   k - 1, theirs goes to 19.
3. **The sign split only where it pays**: fewer than a quarter of positive numbers (`gelu="auto"`); theirs is everywhere
   ("split"), and is compared with a symmetric baseline. With coverage "full" the inputs behind SiLU, which theirs leave
   in float, are judged by the same rule.
4. Weights per output channel and asymmetric, activations asymmetric, one step for all heads; theirs are symmetric,
   weights per tensor (qkv 3 steps), q, k, v and softmax one step a head. Candidates are 40 shrunk ranges, theirs 100
   steps.
5. Calibrated with the plain network, never through guidance, and half of the states with "no class".
6. `scope="softmax"` is what is released, "all" what the text says: every searched activation has a step for each group.
7. Coverage as asked; theirs leaves time-step MLP and adaLN in float (`coverage="released"`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...errors import RangeError, UnknownNameError
from ...nn.layers import Linear
from ...threads import parallel_map
from ..affine import QParams, QSpec
from ..affine import quantize as to_codes
from ..curvature import Sample, check_guide, evened, samples
from ..grids import Grid, GridTable
from ..guided import search, search_attention, shrunk_ranges
from ..mrq_sign import GELU_LOWEST, SILU_LOWEST, candidates, pays
from ..mrq_softmax import SoftmaxRegions
from ..observers import SHRINK, StepTable, TimeGroups
from ..quantized import QuantizedModel
from ..record import States, pick
from ..session import Run, Session
from ..transformer import require
from ..wrap import QuantAttention, activation_quantizers

SCOPES = ("softmax", "all")
SOFTMAX = ("regions", "uniform")
GELU = ("auto", "split", "uniform")

ROWS = 5120  # tokens that a layer's search looks at: with 1,280 the guide's noise costs 0.7 dB at W6A6; 20,480 gain 0
PRODUCTS = 4  # states of each group that an attention product's search looks at, with all heads and tokens
TRIED = SHRINK[::2]  # 40 ranges from 1.00 to 0.22; PTQ4ViT's authors find 20 enough


def quantize(
    session: Session,
    *,
    groups: int = 10,
    scope: str = "softmax",
    guide: str = "gauss-newton",
    softmax: str = "regions",
    gelu: str = "auto",
    even: bool = True,
) -> QuantizedModel:
    """Quantize a diffusion transformer by TQ-DiT.

    Parameters
    ----------
    session : Session
        `states` is the size of the calibration set; `coverage` what is quantized.
    groups : int
        G; at most the steps of the sampler. 1 switches time grouping off.
    scope : {"softmax", "all"}
        What has a quantizer for each group.
    guide : {"gauss-newton", "fisher", "none"}
        Weights of the squared errors, see `refquant.quant.curvature`.
    softmax : {"regions", "uniform"}
        Quantizer of softmax outputs.
    gelu : {"auto", "split", "uniform"}
        A step for either sign behind GELU and SiLU: where it pays, always, or never.
    even : bool
        Let each step of the sampler count alike in the guide (see `refquant.quant.curvature.evened`).

    Returns
    -------
    QuantizedModel
    """
    for what, given, known in (("scope", scope, SCOPES), ("softmax quantizer", softmax, SOFTMAX), ("GELU", gelu, GELU)):
        if given not in known:
            raise UnknownNameError(f"tqdit knows no {what} {given!r}. Known: {', '.join(known)}.")
    check_guide(guide)
    model = session.calibration.model
    require(model, "tqdit")
    trajectories = session.calibration.trajectories
    time = TimeGroups(trajectories.steps, groups)
    seed = session.reconstruction.seed
    states = _picked(session, time, session.states, seed)
    few = _picked(session, time, min(session.states, PRODUCTS * groups), seed + 1)
    run = session.start(
        "tqdit", groups=groups, scope=scope, guide=guide, softmax=softmax, gelu=gelu, even=even
    )
    run.nearest_weights()  # of the patches, which the search below does not reach
    run.shared_inputs()
    linear = [name for name, layer in run.layers.items() if isinstance(layer.layer, Linear)]
    products = [name for name, module in run.network.named_modules() if isinstance(module, QuantAttention)]
    with run.phase("gradients"):
        seen = samples(
            model, linear, trajectories, states, guide, tokens=max(1, ROWS // session.states), seed=seed
        )
        attended = samples(model, products, trajectories, few, guide, seed=seed)
    with run.phase("search"):
        weighted = {name: evened(sample) if even else sample for name, sample in (seen | attended).items()}
        parallel_map(lambda name: search_linear(run, name, weighted[name], time, scope, gelu), linear)
        parallel_map(lambda name: search_product(run, name, weighted[name], time, scope, softmax), products)
    return run.finish()


def _picked(session: Session, time: TimeGroups, count: int, seed: int) -> States:
    """So many states, evenly from all steps; RangeError where a group has none."""
    states = pick(session.calibration.trajectories, count, seed)
    empty = [group for group, rows in enumerate(time.samples(states.step)) if not rows.size]
    if empty:
        raise RangeError(
            f"tqdit: none of {count} states is of group {empty[0]} of {time.count}. Give several states for each "
            "group, or fewer groups."
        )
    return states


def search_linear(run: Run, name: str, sample: Sample, time: TimeGroups, scope: str, gelu: str) -> None:
    """Choose the scales of one linear layer and its input."""
    session, layer = run.session, run.layers[name]
    w_spec = run.coverage.weight_spec(name, session.weight_bits)
    x_spec = run.coverage.input_spec(layer.input.name, session.input_bits)
    if w_spec is None and x_spec is None:
        return
    (x,), w = sample.inputs, run.weight(name)
    parts = time if scope == "all" else TimeGroups(time.steps, 1)
    weights = shrunk_ranges(w, w_spec, TRIED) if w_spec else []
    group = parts.index[sample.step]
    inputs = [_input_candidates(name, x[group == i], x_spec, gelu) if x_spec else [] for i in range(parts.count)]
    best, chosen = search(x, w, sample.g, group, weights, inputs)
    if best is not None:
        layer.set_codes(to_codes(w, best), best)
    if x_spec is not None:
        layer.input.set(stepped(chosen, parts))


def search_product(run: Run, name: str, sample: Sample, time: TimeGroups, scope: str, softmax: str) -> None:
    """Choose the quantizers of one attention product's operands."""
    quantizers = activation_quantizers(run.network)
    q, k, v = sample.inputs
    found: dict[str, Sequence[QParams | Grid]] = {}
    for part, x in (("q", q), ("k", k), ("v", v)):
        spec = run.coverage.input_spec(f"{name}.{part}", run.session.input_bits)
        if spec is not None:
            found[part] = shrunk_ranges(x, spec, TRIED)
    spec = run.coverage.input_spec(f"{name}.probs", run.session.input_bits)
    if spec is not None:
        regions = [SoftmaxRegions(spec.bits, m) for m in range(spec.bits)]
        found["probs"] = regions if softmax == "regions" else shrunk_ranges([0.0, 1.0], spec, TRIED)
    grouped = set(found) if scope == "all" else {"probs"}
    for part, chosen in search_attention(q, k, v, sample.g, time.index[sample.step], found, grouped).items():
        quantizers[f"{name}.{part}"].set(stepped(chosen, time))


def stepped(
    chosen: Sequence[QParams | Grid | None], time: TimeGroups
) -> QParams | Grid | StepTable | GridTable:
    """One quantizer where all groups have the same, else a table of the sampler's steps whose rows repeat."""
    if all(other is chosen[0] for other in chosen):
        return chosen[0]
    rows = time.repeated(chosen)
    return StepTable.of(rows) if isinstance(rows[0], QParams) else GridTable(rows)


def _input_candidates(name: str, x: NDArray[np.float32], spec: QSpec, gelu: str) -> list[QParams | Grid]:
    """Quantizers to try for these inputs of a layer."""
    lowest = _lowest(name)
    if lowest is not None and spec.bits >= 3 and (gelu == "split" or (gelu == "auto" and pays(x))):
        return list(candidates(float(x.max()), spec.bits, lowest))[::2]
    return list(shrunk_ranges(x, spec, TRIED))


def _lowest(name: str) -> float | None:
    """How far below 0 the activation function before this layer goes; None where there is none."""
    if name.endswith("mlp.fc2"):
        return GELU_LOWEST
    return SILU_LOWEST if name.endswith("adaLN_modulation.1") or name == "t_embedder.mlp.2" else None
