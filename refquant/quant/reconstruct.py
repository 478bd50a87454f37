"""Learn the rounding of a unit's weights, so that its output stays that of the float network.

    minimise over alpha     loss(unit(x^; w^(alpha)), y) + [k >= warm-up] 0.01 sum (1 - |2 h(alpha) - 1|^beta(k))

x^ is what the unit gets from the quantized network before it ("asymmetric" inputs: earlier errors are there
to be made good), y what the float unit gives on the float input (AdaRound, Nagel et al. 2020, eq. 21; BRECQ,
Li et al. 2021, eq. 10; TFMQ-DM ``quant/reconstruction.py:212-318``). Scales and zero points stay.

A mini-batch is cut into chunks for the worker threads, as in `refquant.nn.fit`. The soft weights are made once
for all chunks; each chunk gives the derivative with respect to them, and one step of the chain rule leads on to
alpha. Everything random comes from (seed, iteration): the result does not depend on the number of threads.

Shapes: inputs (M, ...), target (M, ...), channels last.
Errors: `RangeError` for impossible settings, or when the loss is not finite; the layers are then as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..autograd import Tensor, gradients, ops
from ..errors import RangeError, ShapeError
from ..nn.module import Parameter
from ..nn.optim import Adam
from ..threads import parallel_map
from .adaround import (
    beta_schedule,
    hard_codes,
    initial_alpha,
    rounding_is_active,
    rounding_regulariser,
    soft_weight,
)
from .losses import fisher_diag, reconstruction_loss
from .wrap import QuantLayer

Array = NDArray[np.float32]
Forward = Callable[..., Tensor]

CHUNK = 16  # of a mini-batch of 32, half for each of two threads


@dataclass(frozen=True)
class ReconstructionConfig:
    """How long and how to learn.

    Attributes
    ----------
    iterations : int
        Steps of Adam for each unit. The papers take 20,000. Here `tfmq` at W4A8 has 27.8 dB after 200, 28.6 after 400
        and 29.9 after 1,000.
    batch : int
        States for each step.
    rate : float
        Of Adam, constant. From 0, alpha must travel ln 11 = 2.4 to be decided, so that rate * iterations must be
        well above that. The papers' 1e-3 goes with 20,000 iterations. With 200, a unit's own error on held-out states
        goes on falling up to a rate of 0.2, but the images do not: at W4A8 and 150 iterations the median image has
        31.6 dB with 0.03 and 27.6 to 29 dB with 0.2, which moves twice as many weights.
    rounding_weight, warmup : float
        Of the rounding term, and the part of the iterations without it.
    seed : int
    """

    iterations: int = 1000
    batch: int = 32
    rate: float = 0.03
    rounding_weight: float = 0.01
    warmup: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch"):
            if getattr(self, name) < 1:
                raise RangeError(f"reconstruction: {name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 < self.rate < np.inf or not 0 <= self.rounding_weight < np.inf or not 0 <= self.warmup < 1:
            raise RangeError(
                f"reconstruction: rate {self.rate}, rounding_weight {self.rounding_weight}, warmup {self.warmup}; "
                "a rate above 0, a weight from 0 and a warm-up from 0 to below 1 are needed."
            )


class Rounding:
    """The alphas of several layers as one vector, and the soft weights that follow from them.

    Attributes
    ----------
    alpha : float32 array, (P,)
    """

    def __init__(self, layers: Sequence[QuantLayer], weights: Sequence[Array]) -> None:
        for layer in layers:
            if layer.weight_qparams is None:
                raise RangeError(f"{layer.name}: its weight has no quantizer yet. Give it one before its rounding.")
        self.layers, self.weights = tuple(layers), tuple(weights)
        self._qparams = [layer.weight_qparams for layer in layers]
        self.alpha = np.concatenate([initial_alpha(w, q).ravel() for w, q in zip(weights, self._qparams, strict=True)])
        self._parts: list[NDArray[np.float32]] = []
        start = 0
        for w in weights:
            self._parts.append(self.alpha[start : start + w.size].reshape(w.shape))  # a view: follows the vector
            start += w.size

    def soften(self) -> tuple[list[Tensor], list[Parameter]]:
        """Make soft weights on the tape of the alphas, and put leaves of the same values into the layers."""
        alphas = [Tensor(part, requires_grad=True) for part in self._parts]
        soft = [soft_weight(a, w, q) for a, w, q in zip(alphas, self.weights, self._qparams, strict=True)]
        leaves = [Parameter(s.data) for s in soft]
        for layer, leaf in zip(self.layers, leaves, strict=True):
            layer.layer.weight = leaf
        self._alphas, self._soft = alphas, soft
        return soft, leaves

    def gradient(self, by_weights: Sequence[Array], rounding_weight: float, beta: float | None) -> Array:
        """From d loss / d soft weights to d / d alpha, (P,), with the rounding term if there is a beta."""
        terms = [ops.sum_all(ops.mul(s, Tensor(g))) for s, g in zip(self._soft, by_weights, strict=True)]
        if beta is not None:
            terms += [ops.scale(rounding_regulariser(a, beta), rounding_weight) for a in self._alphas]
        total = terms[0]
        for term in terms[1:]:
            total = ops.add(total, term)
        return np.concatenate([g.ravel() for g in gradients(total, self._alphas)])

    def harden(self) -> None:
        """Give every layer the codes that its alphas have decided for."""
        for layer, part, w, q in zip(self.layers, self._parts, self.weights, self._qparams, strict=True):
            layer.set_codes(hard_codes(part, w, q), q)


def reconstruct(
    forward: Forward,
    layers: Sequence[QuantLayer],
    weights: Sequence[Array],
    inputs: Sequence[Array],
    target: Array,
    cfg: ReconstructionConfig,
    *,
    importance: Array | None = None,
    chunk: int = CHUNK,
    on_step: Callable[[], object] | None = None,
) -> NDArray[np.float32]:
    """Learn the rounding of `layers` and leave them with the codes found.

    Parameters
    ----------
    forward : callable
        ``forward(*inputs)`` runs the unit on tensors (B, ...) and gives a tensor like (B, ...) of the target.
    layers : sequence of QuantLayer
        With weight quantizers; used by `forward`.
    weights : sequence of float32 array
        The layers' float weights.
    inputs : sequence of float32 array, (M, ...)
    target : float32 array, (M, ...)
    cfg : ReconstructionConfig
    importance : float32 array, (M, ...), optional
        Shaped like the target: the squared error is weighted by its square (`losses.fisher_diag`).
    chunk : int
        Examples a worker thread differentiates at a time; part of the recipe, as the order of sums is.
    on_step : callable, optional
        Called after each iteration.

    Returns
    -------
    float32 array, (iterations,)
        The loss without the rounding term.

    Raises
    ------
    ShapeError
        Inputs and target differ in length, or there is nothing to learn from.
    RangeError
        The loss is not finite; the layers have the nearest codes again.
    """
    size = len(target)
    if size == 0 or not layers or any(len(x) != size for x in inputs):
        raise ShapeError(
            f"reconstruct: {len(layers)} layers, {[len(x) for x in inputs]} inputs and {size} targets; "
            "at least one layer, and as many inputs as targets, from 1, are needed."
        )
    rounding = Rounding(layers, weights)
    adam, losses = Adam.zeros(rounding.alpha.size), np.empty(cfg.iterations, np.float32)
    batch = min(cfg.batch, size)
    for k in range(1, cfg.iterations + 1):
        chosen = np.random.default_rng([cfg.seed, k]).permutation(size)[:batch]
        _, leaves = rounding.soften()

        def differentiate(part: NDArray[np.integer], leaves: list[Parameter] = leaves) -> tuple[float, list[Array]]:
            y = forward(*(Tensor(x[part]) for x in inputs))
            value = (
                reconstruction_loss(y, target[part])
                if importance is None
                else fisher_diag(y, target[part], importance[part])
            )
            return value.item(), gradients(value, leaves)

        parts = [chosen[i : i + chunk] for i in range(0, batch, chunk)]
        found = parallel_map(differentiate, parts)
        share = [np.float32(len(part) / batch) for part in parts]
        losses[k - 1] = sum(s * value for s, (value, _) in zip(share, found, strict=True))
        if not np.isfinite(losses[k - 1]):
            for layer, w in zip(layers, weights, strict=True):
                layer.layer.weight = Parameter(w)
                layer.quantize_weight(layer.weight_qparams)
            raise RangeError(
                f"reconstruction of {layers[0].name} gave the loss {losses[k - 1]} at iteration {k}: the calibration "
                "data or the weights hold NaN or infinity. Look for them there."
            )
        by_weights = [
            np.asarray(sum(s * g[i] for s, (_, g) in zip(share, found, strict=True))) for i in range(len(layers))
        ]
        active = rounding_is_active(k, cfg.iterations, cfg.warmup)
        beta = beta_schedule(k, cfg.iterations, cfg.warmup) if active else None
        gradient = rounding.gradient(by_weights, cfg.rounding_weight, beta)
        adam.update(rounding.alpha, gradient, cfg.rate, k - 1)
        if on_step is not None:
            on_step()
    rounding.harden()
    return losses
