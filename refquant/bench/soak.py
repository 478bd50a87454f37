"""Sampling in a loop, in every way there is: no image may differ, and memory may not grow.

    python -m refquant.bench.soak --minutes 60 --out soak.json

Each round draws some of 24 images, in batches of a random size, with a random number of threads of the C core, a random
kernel (`ref` among them), and with one Python thread or four that sample at once with one denoiser. Every image is
compared, bit for bit, with the one that its kernel gave alone, in a batch of one on one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import io, kernels
from ..deploy.runtime import ENGINES, IntegerDenoiser
from ..diffusion.ddim import ddim_sample
from ..diffusion.model import load_model
from ..diffusion.sampling import NoiseSource
from ..quant.calibrate import Calibration, CalibrationConfig
from ..quant.methods import METHODS
from ..quant.session import Session
from ..threads import using_threads

IMAGES, STEPS = 24, 4
SLOW, FEW = ("ref", "scalar"), 2  # kernels that take a second an image draw so many
LARGEST, THREADS, CALLERS = 9, (1, 2, 3), (1, 4)
SLOW_SHARE = 0.1  # of the rounds


class Soak:
    """A quantized model, its images drawn one by one, and rounds that draw them in other ways.

    Parameters
    ----------
    seed : int
        Of the rounds' choices.
    images : int
    """

    def __init__(self, seed: int = 0, images: int = IMAGES) -> None:
        self.model, self.rng = load_model("mnist-unet"), np.random.default_rng(seed)
        session = Session(Calibration(self.model, CalibrationConfig(images=4, steps=STEPS)), 4, 8)
        quantized = METHODS["nearest"](session)
        self.denoisers = {engine: IntegerDenoiser(quantized, engine) for engine in ENGINES}
        self.noise = NoiseSource(7, images, self.model.image_shape).draw()
        self.alone: dict[str, NDArray[np.float32]] = {}
        self.memory: list[int] = []  # resident bytes after each round
        self.drawn = self.different = 0

    def draw(self, isa: str, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Sample these images in one batch."""
        eps = self.denoisers["ref" if isa == "ref" else "c"]
        none = NoiseSource(0, len(ids), self.model.image_shape)  # DDIM with eta 0 asks for no more noise
        return ddim_sample(eps, self.noise[ids].copy(), self.model.schedule, none, steps=STEPS)

    def round(self) -> None:
        """Draw all images in one random way, and compare."""
        rng = self.rng
        fast = [isa for isa in kernels.supported() if isa not in SLOW]
        isa = str(rng.choice(SLOW if rng.random() < SLOW_SHARE or not fast else fast))
        isa = isa if isa in kernels.supported() else "ref"
        threads, callers, size = int(rng.choice(THREADS)), int(rng.choice(CALLERS)), int(rng.integers(1, LARGEST + 1))
        count = min(FEW, len(self.noise)) if isa in SLOW else len(self.noise)
        with kernels.using(isa):
            if isa not in self.alone:
                with using_threads(1):
                    self.alone[isa] = np.concatenate([self.draw(isa, np.array([i])) for i in range(count)])
            order = rng.permutation(count)
            parts = [order[i : i + size] for i in range(0, count, size)]
            with using_threads(threads), ThreadPoolExecutor(callers) as pool:
                made = list(pool.map(lambda ids: self.draw(isa, ids), parts))
        for ids, images in zip(parts, made, strict=True):
            self.drawn += len(ids)
            self.different += int((images != self.alone[isa][ids]).any(axis=(1, 2, 3)).sum())
        self.memory.append(resident_bytes())

    def result(self) -> dict[str, Any]:
        """What came of it; memory is compared between the second quarter of the rounds and the last."""
        quarter = len(self.memory) // 4
        second, last = self.memory[quarter : 2 * quarter], self.memory[-quarter:]
        return {
            "rounds": len(self.memory), "images": self.drawn, "different": self.different,
            "kernels": sorted(self.alone), "growth_bytes": max(last) - max(second) if quarter else 0,
            "resident_bytes": self.memory[-1] if self.memory else 0,
        }  # fmt: skip


def resident_bytes() -> int:
    """Memory of this process that is in RAM; where the system does not tell, the most there has been."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def main() -> int:
    """Soak for so many minutes; 1 where an image differed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=60)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    soak, end = Soak(args.seed), time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        soak.round()
        found = soak.result() | {"minutes": args.minutes}
        if args.out is not None:
            io.write_atomically(args.out, [json.dumps(found, indent=1).encode()])
    print(json.dumps(found, indent=1))
    return int(soak.different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
