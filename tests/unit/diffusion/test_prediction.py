"""What a network was trained to answer, eps or v: both ways to the same noise."""

from dataclasses import replace

import numpy as np
import pytest
from toys import TINY, tiny_session

from refquant import io
from refquant.autograd import Tensor
from refquant.data.shapes import shapes
from refquant.diffusion.denoiser import Denoiser, target
from refquant.diffusion.model import DiffusionModel, load_model
from refquant.diffusion.schedule import cosine
from refquant.diffusion.train import noisy_chunks
from refquant.errors import CheckpointError, UnknownNameError
from refquant.nn.fit import FitConfig
from refquant.nn.unet import UNet
from refquant.quant.calibrate import CalibrationConfig
from refquant.quant.methods import METHODS
from refquant.quant.quantized import load_quantized

SCHEDULE = cosine(1000)


def pair(seed=0, n=4):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (n, 8, 8, 1)).astype(np.float32), rng.standard_normal((n, 8, 8, 1), dtype=np.float32)


def model(prediction):
    return DiffusionModel("tiny", UNet(TINY, np.random.default_rng(1)), cosine(20), prediction)


@pytest.mark.parametrize("t", [0, 1, 250, 500, 999])
def test_the_exact_v_gives_the_exact_noise(t):
    """eps = sqrt(1 - ab) x_t + sqrt(ab) v, whatever the image and the noise."""
    x_0, noise = pair()
    times = np.full(len(x_0), t)
    v = target("v", SCHEDULE, x_0, times, noise)
    x_t = SCHEDULE.q_sample(x_0, times, noise)
    eps = Denoiser(lambda x, t: Tensor(v), v_of=SCHEDULE)(x_t.transpose(0, 3, 1, 2), t, 0)
    np.testing.assert_allclose(eps.transpose(0, 2, 3, 1), noise, atol=1e-6)


def test_v_turns_from_the_noise_to_the_image():
    """At t = 0 nearly eps, at t = T - 1 nearly -x_0: what is hard to see in x_t."""
    x_0, noise = pair()
    first, last = np.zeros(4, int), np.full(4, 999)
    np.testing.assert_allclose(target("v", SCHEDULE, x_0, first, noise), noise, atol=0.03)
    np.testing.assert_allclose(target("v", SCHEDULE, x_0, last, noise), -x_0, atol=0.01)


@pytest.mark.parametrize("t", [100, 500, 900])
def test_an_error_in_v_weighs_1_over_alpha_bar(t):
    x_0, noise = pair()
    ab = SCHEDULE.alpha_bar[t]
    v = target("v", SCHEDULE, x_0, np.full(4, t), noise)
    x_t = SCHEDULE.q_sample(x_0, np.full(4, t), noise).transpose(0, 3, 1, 2)
    wrong = v + np.float32(0.25)
    eps, other = (Denoiser(lambda x, t, a=a: Tensor(a), v_of=SCHEDULE)(x_t, t, 0) for a in (v, wrong))
    assert np.mean((other - eps) ** 2) == pytest.approx(0.25**2 * ab, rel=1e-3)


def test_eps_is_the_noise_itself():
    x_0, noise = pair()
    assert target("eps", SCHEDULE, x_0, np.zeros(4, int), noise) is noise


def test_batches_ask_for_the_same_noise_in_both_ways():
    """From (x_t, v) and from (x_t, eps) of one step follow the same noise."""
    data, cfg = shapes(20, seed=0, size=8), FitConfig(steps=4, batch=6, chunk=3)
    both = (noisy_chunks(data.images, SCHEDULE, cfg, 2, prediction) for prediction in ("eps", "v"))
    for a, b in zip(*both, strict=True):
        ab = SCHEDULE.alpha_bar[a.t].reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(a.x_t, b.x_t)
        np.testing.assert_allclose(np.sqrt(1 - ab) * b.x_t + np.sqrt(ab) * b.target, a.target, atol=1e-5)


def test_unknown_prediction():
    x_0, noise = pair()
    with pytest.raises(UnknownNameError, match="no prediction is called 'x0'. Known: eps, v"):
        target("x0", SCHEDULE, x_0, np.zeros(4, int), noise)


# --- it travels with the model ---


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_checkpoint_remembers(prediction, tmp_path):
    made = model(prediction)
    made.save(tmp_path / "m.safetensors")
    loaded = load_model(str(tmp_path / "m.safetensors"))
    assert loaded.prediction == prediction
    x = pair()[1].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(loaded.denoiser()(x, 7, 0), made.denoiser()(x, 7, 0))


def test_the_two_denoisers_differ():
    """The untrained network answers nearly 0: no noise, or as much of it as v = 0 means."""
    x = pair()[1].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(model("eps").denoiser()(x, 7, 0), np.zeros_like(x), atol=1e-4)
    scale = np.sqrt(1 - cosine(20).alpha_bar[7])
    np.testing.assert_allclose(model("v").denoiser()(x, 7, 0), scale * x, atol=1e-4)


def test_quantized_model_remembers(tmp_path):
    base = model("v")
    quantized = METHODS["nearest"](tiny_session(base, CalibrationConfig(images=2, steps=2)))
    quantized.save(tmp_path / "q.safetensors")
    loaded = load_quantized(str(tmp_path / "q.safetensors"))
    assert loaded.base.prediction == "v"
    x = pair()[1].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(loaded.denoiser()(x, 7, 0), quantized.denoiser()(x, 7, 0))
    as_v = Denoiser(loaded.network, v_of=base.schedule)
    np.testing.assert_array_equal(loaded.denoiser()(x, 7, 0), as_v(x, 7, 0))
    assert not np.array_equal(as_v(x, 7, 0), Denoiser(loaded.network)(x, 7, 0))


def rewrite(path, change):
    found = io.load(path)
    facts = dict(found.metadata)
    change(facts)
    io.save(path, found.tensors, facts)


def test_older_checkpoints_predict_eps(tmp_path):
    model("eps").save(tmp_path / "m.safetensors")
    rewrite(tmp_path / "m.safetensors", lambda facts: facts.pop("prediction"))
    assert load_model(str(tmp_path / "m.safetensors")).prediction == "eps"


def test_checkpoint_of_an_unknown_prediction(tmp_path):
    replace(model("eps"), prediction="score").save(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="prediction 'score' is unknown; eps, v are known"):
        load_model(str(tmp_path / "m.safetensors"))
