"""Classifier-free guidance: its formula, its two ends, and classes on their way from a request to an image."""

from functools import partial

import numpy as np
import pytest

from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.denoiser import Denoiser
from refquant.diffusion.guidance import Guided
from refquant.diffusion.model import DiffusionModel, load_model
from refquant.diffusion.schedule import cosine
from refquant.errors import RangeError
from refquant.evaluate import BATCH, Request, sample_run
from refquant.nn.dit import DiT, DiTConfig

CFG = DiTConfig(4, 1, patch=2, width=8, depth=1, heads=2, classes=3)
T = 13


def tiny_dit(cfg=CFG, prediction="eps"):
    """A conditional model of random weights, none of them 0."""
    rng = np.random.default_rng(0)
    network = DiT(cfg, rng)
    for p in network.parameters():
        p.data = p.data + np.float32(0.3) * rng.standard_normal(p.shape, dtype=np.float32)
    return DiffusionModel("tiny", network, cosine(20), prediction)


def noise(n, channels=1, seed=1):
    return np.random.default_rng(seed).standard_normal((n, channels, 4, 4)).astype(np.float32)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("weight", [0.5, 2, 7.5])
def test_guided_noise_is_the_formula(weight, prediction):
    """eps_u + w (eps_c - eps_u), of the noise, whether the network predicts that or v."""
    eps, x, y = tiny_dit(prediction=prediction).denoiser(), noise(5), np.array([0, 2, 1, 1, 0])
    with_class, without = eps(x, T, 0, y), eps(x, T, 0, np.full(5, 3))
    assert np.abs(with_class - without).max() > 1e-2
    got = Guided(eps, y, 3, weight)(x, T, 0)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, without + weight * (with_class - without), rtol=0, atol=1e-5 * weight)


def test_weight_1_is_conditional_and_0_is_not():
    """To the bit, and without evaluating the other half."""
    calls = []

    def eps(x, t, step, y):
        calls.append(y)
        return predict(x, t, step, y)

    predict, x, y = tiny_dit().denoiser(), noise(4), np.array([0, 1, 2, 2])
    np.testing.assert_array_equal(Guided(eps, y, 3, 1)(x, T, 0), predict(x, T, 0, y))
    np.testing.assert_array_equal(Guided(eps, y, 3, 0)(x, T, 0), predict(x, T, 0))  # no y means no class
    assert [len(c) for c in calls] == [4, 4]


def test_both_halves_are_one_batch():
    calls = []

    def eps(x, t, step, y):
        calls.append((x, t, step, y))
        return np.zeros_like(x)

    x = noise(2)
    Guided(eps, np.array([2, 1]), 3, 1.5)(x, T, 6)
    ((both, t, step, y),) = calls
    np.testing.assert_array_equal(both, np.concatenate((x, x)))
    assert (t, step, y.tolist()) == (T, 6, [2, 1, 3, 3])


@pytest.mark.parametrize("weight", [-0.1, np.nan, np.inf])
def test_impossible_weights(weight):
    with pytest.raises(RangeError, match="guidance is"):
        Guided(tiny_dit().denoiser(), np.array([0]), 3, weight)


def test_each_image_has_its_own_class_in_any_chunk():
    """Image i of a chunked batch = image i alone with y_i."""
    model, x, y = tiny_dit(), noise(7), np.array([0, 1, 2, 3, 2, 1, 0])
    got = Denoiser(model.network, chunk=3)(x, T, 0, y)
    alone = np.concatenate([Denoiser(model.network)(x[i : i + 1], T, 0, y[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(got, alone, rtol=0, atol=1e-5)


def test_variances_are_left_aside():
    """Of 2 C channels the first C are the noise."""
    cfg = DiTConfig(**{**CFG.to_json(), "image_channels": 2, "learn_sigma": True})
    model, x = tiny_dit(cfg), noise(2, channels=2)
    whole = model.network(x.transpose(0, 2, 3, 1), np.full(2, T)).data
    np.testing.assert_array_equal(model.denoiser()(x, T, 0), whole[..., :2].transpose(0, 3, 1, 2))


def test_requested_classes_follow_the_images_through_the_batches():
    """Image i depends on (seed, i) and its class alone: a later batch gets its own part of the request."""
    model, sampler = tiny_dit(), partial(ddim_sample, steps=2)
    y = np.resize([0, 1, 2], BATCH + 3)
    y[BATCH:] = [2, 2, 0]

    def draw(request):
        return sample_run(model.denoiser(), model, BATCH + 3, sampler, seed=1, request=request).images

    first, other = draw(Request(y, 2.0)), draw(Request(np.where(np.arange(BATCH + 3) == BATCH, 1, y), 2.0))
    changed = np.abs(first - other).max(axis=(1, 2, 3)) > 1e-4
    assert np.flatnonzero(changed).tolist() == [BATCH]
    assert np.abs(first - draw(Request(y, 1.0))).max() > 1e-3  # the weight arrives
    np.testing.assert_array_equal(draw(Request(y, 0.0)), draw(None))


def test_a_saved_dit_is_loaded_to_the_same_bits(tmp_path):
    """The kind of the network is in the file."""
    model = tiny_dit(prediction="v")
    model.save(tmp_path / "dit.safetensors")
    loaded = load_model(str(tmp_path / "dit.safetensors"))
    assert type(loaded.network) is DiT and loaded.network.cfg == CFG and loaded.metadata["kind"] == "dit"
    assert (loaded.classes, loaded.image_shape, loaded.prediction) == (3, (1, 4, 4), "v")
    for name, array in model.network.state_dict().items():
        np.testing.assert_array_equal(loaded.network.state_dict()[name], array)
