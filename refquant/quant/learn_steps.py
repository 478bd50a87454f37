"""Learn the step sizes of a unit's activation quantizers, after its weights are done (Q-Diffusion, BRECQ).

    minimise over the scales s_j of the unit's quantizers     mean sum_c |unit_q(x) - unit(x)|^2.4

x is the float network's own input, so units do not depend on each other. Each scale is learned as a multiple m_j of
what it was: Adam moves every m by about its rate, whatever the size of s. The rate falls to 0 along a cosine.

Source: q-diffusion ``qdiff/block_recon.py:58-140``. The released rate is 4e-4 for the scales themselves, about a
hundredth of scales of 0.04; users report that learning diverges (issue 2 there), which an absolute rate invites
where scales are small.

Errors: `RangeError` where a learned step is no longer positive (see `refquant.quant.lsq`), or the loss not finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, gradients
from ..errors import RangeError
from ..nn.optim import Adam
from ..threads import parallel_map
from .affine import QParams
from .losses import reconstruction_loss
from .reconstruct import CHUNK
from .record import States, Walk
from .session import Arrays, Run
from .units import Unit
from .wrap import ActivationQuantizer, activation_quantizers

POWER = 2.4
Array = NDArray[np.float32]


def learn_steps(run: Run, units: Sequence[Unit], states: States, iterations: int, rate: float = 1e-2) -> None:
    """Improve the scales of all activation quantizers of these units; those must be set, one for all time-steps.

    Parameters
    ----------
    run : Run
    units : sequence of Unit
        Of the run's network.
    states : States
    iterations : int
        Steps of Adam for each unit, with the mini-batches of the run's reconstruction.
    rate : float
        Of the relative scales, at the beginning.
    """
    if iterations < 1 or not 0 < rate < 1:
        raise RangeError(f"learn_steps: {iterations} iterations at rate {rate}; at least 1, and a rate in (0, 1).")
    cfg = run.session.reconstruction
    with run.phase("steps"), run.bar(len(units) * iterations, "steps") as bar:
        walk = Walk(run.model.network, [unit.name for unit in units], states)
        for unit in units:
            parts = [q for q in activation_quantizers(unit.module).values() if q.qparams is not None]
            if not parts:
                continue

            def learn(unit: Unit = unit, parts: list[ActivationQuantizer] = parts) -> Arrays:
                inputs, target = walk.inputs(unit.name), walk.output(unit.name)
                draws = (
                    np.random.default_rng([cfg.seed, k]).permutation(len(target))[: cfg.batch]
                    for k in range(iterations)
                )
                relative, adam = np.ones(len(parts), np.float32), Adam.zeros(len(parts))
                initial = np.array([q.qparams.scale for q in parts])
                for k, chosen in enumerate(draws):
                    _, gradient = _differentiate(unit, parts, initial * relative, inputs, target, chosen)
                    falling = rate * 0.5 * (1 + np.cos(np.pi * k / iterations))
                    adam.update(relative, gradient * initial, falling, k)
                    bar.update()
                return {"scale": initial * relative}

            scales = run.once(f"steps {unit.name}", learn)["scale"]
            for q, scale in zip(parts, scales, strict=True):
                q.set(QParams(scale, q.qparams.zero_point, q.qparams.spec))


def _differentiate(
    unit: Unit, parts: list[ActivationQuantizer], scales: Array, inputs: tuple[Array, ...], target: Array,
    chosen: NDArray[np.integer],
) -> tuple[float, Array]:  # fmt: skip
    """Loss of a mini-batch and its gradient with respect to the scales."""
    leaves = [Tensor(np.asarray(s, np.float32), requires_grad=True) for s in scales]
    for q, leaf in zip(parts, leaves, strict=True):
        q.learned = leaf
    try:

        def run_part(part: NDArray[np.integer]) -> tuple[float, list[Array]]:
            y = unit.module(*(Tensor(x[part]) for x in inputs))
            value = reconstruction_loss(y, target[part], POWER)
            return value.item(), gradients(value, leaves)

        found = parallel_map(run_part, [chosen[i : i + CHUNK] for i in range(0, len(chosen), CHUNK)])
    finally:
        for q in parts:
            q.learned = None
    share = [len(chosen[i : i + CHUNK]) / len(chosen) for i in range(0, len(chosen), CHUNK)]
    loss = sum(s * value for s, (value, _) in zip(share, found, strict=True))
    if not np.isfinite(loss):
        raise RangeError(f"learning the steps of {unit.name} gave the loss {loss}: look for NaN in the calibration.")
    gradient = np.array([sum(s * g[j] for s, (_, g) in zip(share, found, strict=True)) for j in range(len(parts))])
    return loss, gradient.astype(np.float32)
