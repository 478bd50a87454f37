"""Noise predictors whose answers are known, noise sources that a test controls, and a tiny model to quantize."""

from dataclasses import replace

import numpy as np

from refquant.diffusion.model import DiffusionModel
from refquant.diffusion.schedule import cosine
from refquant.nn.dit import DiTConfig
from refquant.nn.networks import build
from refquant.nn.unet import UNetConfig
from refquant.quant.calibrate import Calibration, CalibrationConfig
from refquant.quant.reconstruct import ReconstructionConfig
from refquant.quant.session import Session

TINY = UNetConfig(8, 1, 8, (1, 2), 1, (4,), 4, 0.0)
TINY_DIT = DiTConfig(8, 1, patch=4, width=8, depth=2, heads=2, mlp_ratio=2, classes=3)
CALIBRATION = CalibrationConfig(images=3, steps=4, every=2)
EFFORT = ReconstructionConfig(iterations=3, batch=4, rate=0.1)


def tiny_model(cfg=TINY, *, timesteps=20, prediction="eps", seed=0):
    """A model of random weights, none of them 0 (new networks answer 0): every layer matters."""
    rng = np.random.default_rng(seed)
    network = build(cfg, rng)
    for p in network.parameters():
        p.data = p.data + np.float32(0.1) * rng.standard_normal(p.shape, dtype=np.float32)
    return DiffusionModel("tiny", network, cosine(timesteps), prediction)


def tiny_dit(cfg=TINY_DIT, *, timesteps=20, seed=0):
    """A conditional transformer of random weights; its gates are open, so that every layer matters."""
    model = tiny_model(cfg, timesteps=timesteps, prediction="v", seed=seed)
    rng = np.random.default_rng([seed, 1])
    for name, p in model.network.named_parameters():
        if "adaLN" in name or name.startswith("final_layer") or "embedding_table" in name:
            p.data = np.float32(0.5) * rng.standard_normal(p.shape, dtype=np.float32)
    return model


def tiny_session(model, calibration=CALIBRATION, **options):
    """A session of little effort; `model` may be a Calibration, to be shared."""
    shared = model if isinstance(model, Calibration) else Calibration(model, calibration)
    effort = replace(EFFORT, **options.pop("effort", {}))
    return Session(shared, **{"states": 6, "reconstruction": effort, **options})


class GaussianEps:
    """The exact noise predictor of data x_0 ~ N(m, s²), each pixel on its own.

    x_t = sqrt(ab) x_0 + sqrt(1 - ab) e has variance v = ab s² + 1 - ab and Cov(e, x_t) = sqrt(1 - ab), so
    E[e | x_t] = sqrt(1 - ab) / v (x_t - sqrt(ab) m). With s = 0 the data is the point m (an array will do), and
    this is the very noise that was added to it.
    """

    def __init__(self, schedule, mean=0.0, std=1.0):
        self.alpha_bar, self.mean, self.std = schedule.alpha_bar, mean, std

    def __call__(self, x, t, step):
        ab = self.alpha_bar[t]
        v = ab * self.std**2 + 1 - ab
        return (np.sqrt(1 - ab) / v * (x.astype(np.float64) - np.sqrt(ab) * self.mean)).astype(np.float32)


class Silence:
    """A noise source of zeros, which counts how often it was asked."""

    def __init__(self, shape):
        self.shape, self.drawn = shape, 0

    def draw(self):
        self.drawn += 1
        return np.zeros(self.shape, np.float32)


class Replay(Silence):
    """A noise source that gives the listed draws, one after another."""

    def __init__(self, draws):
        super().__init__(np.shape(draws)[1:])
        self.draws = np.asarray(draws, np.float32)

    def draw(self):
        self.drawn += 1
        return self.draws[self.drawn - 1]


class Impulses(Silence):
    """Noise for linear systems: draw number k (from 0) is 1 for image k and 0 for all others."""

    def draw(self):
        z = super().draw()
        z[self.drawn - 1] = 1
        return z


class Recorder:
    """A callback that keeps every `StepState`, and what the sampler called the network with."""

    def __init__(self, eps):
        self.eps, self.calls, self.states = eps, [], []

    def model(self, x, t, step):
        self.calls.append((t, step, x))
        return self.eps(x, t, step)

    def __call__(self, state):
        self.states.append(state)
