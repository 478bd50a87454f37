"""Evaluation: batches, paths, and the judge."""

from functools import partial

import numpy as np
import pytest

from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.model import DiffusionModel, asset_names
from refquant.diffusion.schedule import cosine
from refquant.errors import RangeError
from refquant.evaluate import BATCH, Judge, Request, per_step_error, sample_run
from refquant.nn.unet import UNet, UNetConfig

MODEL = DiffusionModel("tiny", UNet(UNetConfig(4, 1, 4, (1,), 1, (), 2, 0.0), np.random.default_rng(0)), cosine(10))


def pull(x, t, step):
    """A noise predictor that needs no network."""
    return 0.5 * x


def test_a_long_run_begins_with_the_images_of_a_short_one():
    long = sample_run(pull, MODEL, BATCH + 3, partial(ddim_sample, steps=5), seed=1).images
    short = sample_run(pull, MODEL, 3, partial(ddim_sample, steps=5), seed=1).images
    assert long.shape == (BATCH + 3, 1, 4, 4)
    np.testing.assert_array_equal(long[:3], short)
    assert not np.array_equal(long[BATCH:], long[:3])


def test_per_step_error_follows_the_path():
    a = sample_run(pull, MODEL, BATCH + 1, partial(ddim_sample, steps=5), seed=1)
    b = sample_run(lambda x, t, step: 0.6 * x, MODEL, BATCH + 1, partial(ddim_sample, steps=5), seed=1)
    error = per_step_error(b, a)
    assert error.shape == (5,) and (error > 0).all() and (per_step_error(a, a) == 0).all()
    want = np.mean((a.images[:BATCH].astype(float) - b.images[:BATCH]) ** 2)
    np.testing.assert_allclose(error[-1], want, rtol=1e-6)


def test_nan_is_an_error_and_not_a_picture():
    with pytest.raises(RangeError, match="NaN"):
        sample_run(lambda x, t, step: x * np.nan, MODEL, 2, partial(ddim_sample, steps=2), seed=0)


@pytest.mark.skipif("mnist-classifier" not in asset_names(), reason="no classifier in refquant/assets")
def test_the_judge_tells_noise_from_nothing():
    judge = Judge()
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, (100, 1, 28, 28)).astype(np.float32)
    assert judge.frechet(noise) > 20 * judge.metadata["real_1000_frechet"]["mean"]
    assert 0 <= judge.confident(noise) <= 1
    sure = judge.classifier.judge(noise)[1]
    for k in (0, 8):  # the share that is recognised as k, of images that are all requested to be k
        assert judge.obedient(noise, np.full(100, k)) == np.mean(sure[:, k] > 0.9)
    assert judge.obedient(noise, sure.argmax(axis=1)) == judge.confident(noise) > 0
    assert judge.recognised(noise, None) == judge.confident(noise)
    assert judge.recognised(noise, Request(np.full(100, 8))) == judge.obedient(noise, np.full(100, 8))
    assert judge.metadata["test_accuracy"] >= 0.99
