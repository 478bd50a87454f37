"""Q-DiT (Chen et al., CVPR 2025, arXiv 2406.17343): groups of channels, dynamic activations, and a search.

1. Weights and activations of a layer are cut into groups of g input channels, each with its scale;
2. activations find theirs while the network runs, for each token and group;
3. weights are rounded by GPTQ;
4. an evolutionary search gives each layer its g: the error is not monotone in g.

    equation                 function here               authors' code (Q-DiT 5067d11)
    group-wise weights       `groupwise.group_qparams`   qdit/quant.py, quantize_tensor_channel_group
    dynamic activations      `dynamic.PerToken`          qdit/quant.py, quantize_activation_wrapper
    GPTQ                     `gptq.gptq`                 qdit/gptq.py, GPTQ.fasterquant
    search                   `evolve`                    scripts/evolution.py, EvolutionSearcher

Where we differ and why.

1. **Fitness** is the squared error of the trajectory: the images after ten steps of DDIM from the same noise, against
   the float model's. Theirs is the Frechet distance of 800 images, which for ten images means nothing; the error of an
   image from the same noise is sharp even for four.
2. Group sizes divide these layers: 16 or 32 of 96 inputs, 16 to 128 of 384, where theirs are 32 to 288 of 1,152 or
   4,608; so `group` is 32, and not their 128, which does not divide 96.
3. The budget is that of their code, mean g at least `group`; the paper states it in bit operations.
4. Population and rounds are small (the paper's: 50 and 10, hours of a GPU).
5. Activation ranges contain 0; theirs need not, but the zero point is clamped to the codes, so that a group of one sign
   loses a part of its range. GPTQ's groups are those of the float weight (see `gptq`).
6. Only the four linear layers of each block are treated so, as there. What remains of the coverage (attention products,
   adaLN, patches, the last layer), which theirs leaves in float, is quantized as in `nearest`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...diffusion.ddim import ddim_sample
from ...diffusion.denoiser import NoisePredictor
from ...diffusion.sampling import Images, NoiseSource
from ...errors import RangeError
from ...threads import parallel_map
from ..affine import QParams
from ..curvature import samples
from ..dynamic import PerToken
from ..gptq import gptq, second_moment
from ..groupwise import check_group, group_qparams
from ..observers import minmax
from ..quantized import QuantizedModel
from ..record import calibration_classes, pick
from ..session import Run, Session
from ..transformer import require, token_layers

SIZES = (16, 32, 64, 128)
TOKENS = 16  # of each state, for H: 512 states give 8,192 rows for the 384 x 384 numbers of fc2's
IMAGES, STEPS = 4, 10  # of the trajectories that judge a choice of sizes

Genes = tuple[int, ...]


@dataclass(frozen=True)
class Evolution:
    """How far to search.

    Attributes
    ----------
    population : int
        Genes of the first round; each later round makes half as many by crossing and half by changing the best.
    elite : int
        How many are the best.
    rounds : int
    """

    population: int = 8
    elite: int = 3
    rounds: int = 3


def quantize(
    session: Session, *, group: int = 32, search: bool = True, rounds: int = 3, population: int = 8
) -> QuantizedModel:
    """Quantize a diffusion transformer by Q-DiT.

    Parameters
    ----------
    session : Session
    group : int
        g of every layer, and the least mean of a searched choice; 0 is whole channels and tokens.
    search : bool
        Give each layer a g of its own.
    rounds, population : int
        Of the search.

    Returns
    -------
    QuantizedModel
        Its recipe holds g of each layer, and how the fitness fell.
    """
    model = session.calibration.model
    cfg = require(model, "qdit").cfg
    names = token_layers(cfg)
    inputs = [cfg.mlp_ratio * cfg.width if name.endswith("fc2") else cfg.width for name in names]
    for k in inputs:
        check_group(k, group)
    if rounds < 1 or population < 2:
        raise RangeError(f"qdit: {rounds} rounds of {population}; at least 1 round and a population of 2 are needed.")
    run = session.start("qdit", group=group, search=search, rounds=rounds, population=population)
    run.nearest_weights()
    run.shared_inputs()
    states = pick(session.calibration.trajectories, session.states, session.reconstruction.seed)
    with run.phase("hessians"):
        seen = samples(model, names, session.calibration.trajectories, states, "none", tokens=TOKENS)
        moments = {name: second_moment(s.inputs[0]) for name, s in seen.items()}
    known: dict[tuple[str, int], tuple[NDArray[np.integer], QParams]] = {}

    def use(genes: Genes) -> None:
        """Give every layer its group size."""
        pairs = list(zip(names, genes, strict=True))
        todo = [pair for pair in pairs if pair not in known]
        known.update(zip(todo, parallel_map(lambda p: rounded(run, p[0], p[1], moments[p[0]]), todo), strict=True))
        for name, size in pairs:
            spec = run.coverage.input_spec(f"{name}.input", session.input_bits)
            if known[name, size] is not None:
                run.layers[name].set_codes(*known[name, size])
            if spec is not None:
                run.layers[name].input.set(PerToken(spec.bits, size))

    genes, trace = tuple(group for _ in names), []
    if search:
        sizes = [tuple(s for s in SIZES if k % s == 0) or (k,) for k in inputs]
        fitness = trajectory_error(run, use)
        with run.phase("search"), run.bar(population * rounds, "group sizes") as bar:
            genes, trace = evolve(
                fitness, sizes, genes, group or max(inputs), Evolution(population, max(1, population // 3), rounds),
                session.reconstruction.seed, on_try=bar.update,
            )  # fmt: skip
    use(genes)
    return run.finish(groups=dict(zip(names, genes, strict=True)), fitness=trace)


def rounded(
    run: Run, name: str, size: int, h: NDArray[np.float64]
) -> tuple[NDArray[np.integer], QParams] | None:
    """GPTQ's codes of one layer in groups of this size; None where its weight stays float."""
    spec, w = run.coverage.weight_spec(name, run.session.weight_bits), run.weight(name)
    if spec is None:
        return None
    qparams = group_qparams(minmax, w, spec, size)
    return gptq(w, h, qparams), qparams


def trajectory_error(run: Run, use: Callable[[Genes], None]) -> Callable[[Genes], float]:
    """Fitness of a choice: squared error of a few images drawn with it, from the same noise as the float model's."""
    model, seed = run.model, run.session.calibration.cfg.seed + 2
    y, steps = calibration_classes(model.classes, IMAGES), min(STEPS, model.schedule.timesteps)

    def draw(eps: NoisePredictor) -> Images:
        noise = NoiseSource(seed, IMAGES, model.image_shape)
        told = () if y is None else (y,)
        return ddim_sample(lambda x, t, step: eps(x, t, step, *told), noise.draw(), model.schedule, noise, steps=steps)

    want = draw(model.denoiser())

    def fitness(genes: Genes) -> float:
        use(genes)
        return float(np.square(draw(model.denoiser(run.network)) - want, dtype=np.float64).mean())

    return fitness


def evolve(
    fitness: Callable[[Genes], float],
    sizes: list[tuple[int, ...]],
    first: Genes,
    least_mean: float,
    cfg: Evolution,
    seed: int,
    on_try: Callable[[], object] = lambda: None,
) -> tuple[Genes, list[float]]:
    """Search for group sizes.

    Parameters
    ----------
    fitness : callable
        Of genes; smaller is better. Asked once for each choice.
    sizes : list of tuple of int
        What each gene may be.
    first : tuple of int
        A member of the first round, so that the result is never worse.
    least_mean : float
        Choices with a smaller mean are not tried: small groups cost scales.
    cfg : Evolution
    seed : int
    on_try : callable
        Called after each evaluation.

    Returns
    -------
    genes : tuple of int
    trace : list of float
        Best fitness after each round; it never rises.
    """
    rng, found = np.random.default_rng(seed), {}

    def try_(genes: Genes) -> None:
        if genes not in found and (genes == first or np.mean(genes) >= least_mean):
            found[genes] = fitness(genes)
            on_try()

    def fresh(make: Callable[[], Genes], count: int) -> None:
        """Try `count` new choices, or as many as a hundred attempts give."""
        wanted = len(found) + count
        for _ in range(100):
            if len(found) >= wanted:
                return
            try_(make())

    def random() -> Genes:
        return tuple(int(rng.choice(s)) for s in sizes)

    def best() -> list[Genes]:
        return sorted(found, key=lambda g: (found[g], g))[: cfg.elite]

    def crossed() -> Genes:
        parents = best()
        a, b = (parents[rng.integers(len(parents))] for _ in range(2))
        return tuple(int(x if rng.random() < 0.5 else y) for x, y in zip(a, b, strict=True))

    def changed() -> Genes:
        parent = best()[rng.integers(len(best()))]
        return tuple(int(rng.choice(s)) if rng.random() < 0.1 else g for g, s in zip(parent, sizes, strict=True))

    try_(first)
    fresh(random, cfg.population - 1)
    trace = [found[best()[0]]]
    for _ in range(cfg.rounds - 1):
        fresh(crossed, cfg.population // 2)
        fresh(changed, cfg.population - cfg.population // 2)
        trace.append(found[best()[0]])
    return best()[0], trace
