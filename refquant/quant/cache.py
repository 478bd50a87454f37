"""Temporal features known beforehand: quantized once for every step of the sampler, and looked up (TFMQ-DM's journal).

    C[k, i] = s (clamp(round(emb_i(t_k) / s) + z) - z)          s, z of this feature at this step, exact range

The layers that see the time-step alone need not run at all: S rows of C_i bytes take their place. What remains is the
error of rounding the feature itself, |C - emb| <= s / 2 for each channel; the error of quantized weights is gone.
`disturbances` sets that beside what the quantized layers give, feature by feature, so that the better of the two can
be kept ("disturbance-aware selection"). The journal version's code was not released; its abstract (arXiv
2407.19547) says what is done, not how, so the criterion here is ours: the squared error, averaged over the
sampler's steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..nn.networks import Network
from .affine import QSpec, quantize
from .observers import StepRanges, StepTable
from .quantized import FeatureCache
from .temporal import features


def feature_cache(network: Network, timesteps: NDArray[np.int64], bits: int) -> dict[str, FeatureCache]:
    """Quantize the temporal features of a float network at the sampler's time-steps (S,), by projection."""
    spec, out = QSpec(bits, signed=False, symmetric=False), {}
    for name, rows in features(network, timesteps).items():
        ranges = StepRanges(len(rows))
        for step, row in enumerate(rows):
            ranges.update(step, row)
        table: StepTable = ranges.table(spec)
        codes = np.stack([quantize(row, table[step]) for step, row in enumerate(rows)])
        out[name] = FeatureCache(codes.astype(np.uint8), table)
    return out


def disturbances(
    caches: Mapping[str, FeatureCache],
    computed: Mapping[str, NDArray[np.float32]],
    wanted: Mapping[str, NDArray[np.float32]],
) -> dict[str, tuple[float, float]]:
    """Squared error (of the cache, of the computed feature), averaged over the steps, for each projection.

    Parameters
    ----------
    caches : mapping of str to FeatureCache
    computed, wanted : mapping of str to float32 array, (S, C_i)
        What the quantized layers give, and what the float ones give.

    Returns
    -------
    dict of str to (float, float)
    """
    out = {}
    for name, cache in caches.items():
        kept = np.stack([cache.row(step) for step in range(len(cache.codes))])
        error = [float(np.square(got - wanted[name]).sum(axis=1).mean()) for got in (kept, computed[name])]
        out[name] = (error[0], error[1])
    return out
