"""Training a tiny UNet on procedural shapes: it learns, and a run killed again and again ends with the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from refquant import io
from refquant.data.dataset import to_float
from refquant.data.shapes import shapes
from refquant.diffusion.schedule import cosine, linear
from refquant.diffusion.train import noisy_chunks, train
from refquant.errors import CheckpointError, RangeError, ShapeError
from refquant.nn.fit import FitConfig
from refquant.nn.unet import UNet, UNetConfig
from refquant.threads import set_threads

TINY = UNetConfig(8, 1, 8, (1, 2), 1, (4,), 4, 0.1)
CFG = FitConfig(steps=12, batch=6, rate=5e-3, warmup=3, decay=4, average=0.8, seed=2, chunk=2)
DATA = shapes(40, seed=0, size=8)

posix = pytest.mark.skipif(os.name != "posix", reason="needs kill -9")


@pytest.fixture(autouse=True)
def default_threads():
    yield
    set_threads(None)


def run(cfg=CFG, state=None, data=DATA, schedule=None, net=TINY, **options):
    """Train from the seed; weights as one vector and losses."""
    model = UNet(net, np.random.default_rng(cfg.seed))
    losses = train(model, data, schedule or linear(20), cfg, state=state, save_seconds=0, quiet=True, **options)
    return np.concatenate([p.data.ravel() for p in model.parameters()]), losses


def same(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole():
    """The run that nothing interrupts."""
    return run()


# --- the batch ---


def parts(cfg, step=3, schedule=None, data=DATA, shift=1.0):
    chunks = noisy_chunks(data.images, schedule or cosine(1000), cfg, step, shift=shift)
    return chunks, [np.concatenate([getattr(c, k) for c in chunks]) for k in ("x_t", "target", "t")]


@pytest.mark.parametrize(
    ("batch", "chunk", "sizes"), [(6, 2, [2, 2, 2]), (7, 3, [3, 2, 2]), (4, 9, [4]), (5, 1, [1] * 5)]
)
def test_chunks_share_the_batch_and_the_time_steps(batch, chunk, sizes):
    """Every image is in one chunk, with one t from each of B equal parts of [0, T), and x_t is that of q_sample."""
    s = cosine(1000)
    chunks, (x_t, noise, t) = parts(replace(CFG, batch=batch, chunk=chunk), schedule=s)
    assert [len(c) for c in chunks] == sizes
    assert sorted(t * batch // 1000) == list(range(batch))
    assert x_t.shape == noise.shape == (batch, 8, 8, 1) and x_t.dtype == noise.dtype == np.float32
    ab = s.alpha_bar[t].reshape(-1, 1, 1, 1)
    x_0 = (x_t - np.sqrt(1 - ab) * noise) / np.sqrt(ab)
    # x_0 is given back up to the rounding of x_t, which division by sqrt(ab) makes larger
    known = to_float(DATA.images).transpose(0, 2, 3, 1)
    distance = np.abs(x_0[:, None] - known).max(axis=(2, 3, 4))
    assert (distance.min(axis=1) < 1e-6 / np.sqrt(ab.ravel())).all()


def test_time_steps_and_noise_are_uniform_and_normal():
    """Over 400 batches of 6: t is uniform (mean and variance within 5 standard errors), the noise standard normal."""
    t, noise = [], []
    for step in range(400):
        _, (_, n, k) = parts(CFG, step)
        t.append(k)
        noise.append(n)
    u, z = (np.concatenate(t) + 0.5) / 1000, np.concatenate(noise).astype(np.float64)
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size)
    assert abs(u.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / u.size)
    assert abs(z.mean()) < 5 / np.sqrt(z.size) and abs(z.var() - 1) < 5 * np.sqrt(2 / z.size)


def test_batch_is_a_function_of_seed_and_step():
    _, first = parts(CFG, 3)
    same(parts(CFG, 3)[1], first)
    for different in (parts(CFG, 4)[1], parts(replace(CFG, seed=3), 3)[1]):
        assert not np.array_equal(first[1], different[1]) and not np.array_equal(first[2], different[2])


@pytest.mark.parametrize("timesteps", [1, 3, 6, 7])
def test_few_time_steps(timesteps):
    """More images than time-steps: every t is in [0, T), and all of them occur."""
    _, (_, _, t) = parts(CFG, schedule=linear(timesteps))
    assert t.min() >= 0 and t.max() < timesteps and len(set(t)) >= min(timesteps, 4)


# --- which time-steps ---


@pytest.mark.parametrize("timesteps", [1, 20, 1000])
def test_shift_1_is_one_draw_from_each_stratum(timesteps):
    """t = floor(T (i + u_i) / B) with the step's own generator: what was drawn before there was a shift."""
    for step in range(20):
        _, (_, _, t) = parts(CFG, step, cosine(timesteps))
        rng = np.random.default_rng([CFG.seed, 2, step])
        rng.standard_normal((CFG.batch, 8, 8, 1), dtype=np.float32)
        want = (np.arange(CFG.batch) + rng.random(CFG.batch)) * (timesteps / CFG.batch)
        assert sorted(t) == sorted(want.astype(int))


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shift_has_the_density_of_its_formula(shift):
    """p(t) = s / (s - (s - 1) t)²: counts in tenths of [0, T) of 30,000 draws, within 5 standard deviations."""
    cfg, count = replace(CFG, batch=30, chunk=30), 1000
    t = np.concatenate([parts(cfg, step, shift=shift)[1][2] for step in range(count)])
    numbers, edges = np.bincount(t // 100, minlength=10), np.linspace(0, 1, 11)
    share = np.diff(edges / (shift - (shift - 1) * edges))  # the density's integral
    density = shift / (shift - (shift - 1) * 0.5) ** 2
    np.testing.assert_allclose(share[4:6].mean(), density / 10, rtol=0.02)
    expected = share * t.size
    assert (np.abs(numbers - expected) < 5 * np.sqrt(expected)).all()
    assert (numbers[9] > numbers[0]) == (shift > 1)


@pytest.mark.parametrize("shift", [1e-6, 1e6])
def test_extreme_shifts_stay_within_the_schedule(shift):
    _, (_, _, t) = parts(CFG, shift=shift)
    assert t.min() >= 0 and t.max() <= 999 and (t < 10).all() == (shift < 1)


@pytest.mark.parametrize("shift", [0.0, -1.0, np.inf, np.nan])
def test_shift_out_of_range(shift):
    with pytest.raises(RangeError, match="it must be above 0"):
        run(shift=shift)


# --- the run ---


def test_loss_goes_down():
    """From 1, the variance of the noise (the last layer begins at zero), to 60 % of it."""
    losses = run(replace(CFG, steps=40, batch=8, chunk=4, rate=1e-2, decay=10))[1]
    assert abs(losses[0] - 1) < 0.2 and losses[-10:].mean() < 0.6


def test_same_seed_same_bits(whole):
    same(run(), whole)
    assert not np.array_equal(run(replace(CFG, seed=5))[0], whole[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunk", [2, 6])
def test_threads_do_not_matter(threads, chunk, whole):
    """Three chunks on any number of workers; one chunk with any number of threads inside of BLAS."""
    cfg = replace(CFG, chunk=chunk)
    set_threads(1)
    want = run(cfg)
    set_threads(threads)
    same(run(cfg), want)


def test_resumed_is_uninterrupted(whole, tmp_path, monkeypatch):
    """Interrupted at steps 2, 5 and 11 by the batch that cannot be had."""
    for stop_at in (2, 5, 11):

        def interrupted(images, schedule, cfg, step, *rest, stop_at=stop_at):
            if step == stop_at:
                raise KeyboardInterrupt
            return noisy_chunks(images, schedule, cfg, step, *rest)

        with monkeypatch.context() as patch:
            patch.setattr("refquant.diffusion.train.noisy_chunks", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(state=tmp_path / "s")
        assert io.load(tmp_path / "s").metadata["step"] == stop_at
    same(run(state=tmp_path / "s"), whole)


# --- kill -9 ---

CHILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from refquant.data.shapes import shapes
from refquant.diffusion import train as module
from refquant.diffusion.schedule import linear
from refquant.nn.fit import FitConfig
from refquant.nn.unet import UNet, UNetConfig

state, call, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
cfg, net = FitConfig(**eval(sys.argv[4])), UNetConfig(**eval(sys.argv[5]))

def die(original, calls=[]):  # at the given call of os.fsync or os.replace: in the middle of a save
    def wrapped(*args):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return wrapped

if call != "never":
    setattr(os, call, die(getattr(os, call)))

def told(images, schedule, cfg, step, *rest, original=module.noisy_chunks):
    print(step, flush=True)
    return original(images, schedule, cfg, step, *rest)

module.noisy_chunks = told
model = UNet(net, np.random.default_rng(cfg.seed))
module.train(model, shapes(40, seed=0, size=8), linear(20), cfg, state=state, save_seconds=0, quiet=True)
"""


def child(state, cfg, call="never", count=0):
    """Start the run in a process of its own; it prints every step as it begins."""
    options = [str(state), call, str(count), repr(vars(cfg)), repr(vars(TINY))]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "REFQUANT_NUM_THREADS": "2"},
    )


@posix
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_in_the_middle_of_a_save(call, whole, tmp_path):
    """kill -9 in the third save leaves the second one's state, whole; resumed, the run ends with the same bits."""
    process = child(tmp_path / "s", CFG, call, 3)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and told.split() == ["0", "1", "2"]
    assert io.load(tmp_path / "s").metadata["step"] == 2
    same(run(state=tmp_path / "s"), whole)


@posix
def test_killed_at_random_moments(tmp_path):
    """kill -9 from outside, three times, any time: the state is always whole, the end that of the uninterrupted run."""
    cfg, step = replace(CFG, steps=100, batch=4), 0
    for _ in range(3):
        with child(tmp_path / "s", cfg) as process:
            first_six = [int(process.stdout.readline()) for _ in range(6)]  # so that there is progress
            time.sleep(random.random() * 0.03)
            process.kill()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed: give it more steps"
        assert first_six == list(range(step, step + 6))
        step, before = io.load(tmp_path / "s", kind="train-state").metadata["step"], step
        assert before + 5 <= step < cfg.steps
    process = child(tmp_path / "s", cfg)
    told = process.communicate(timeout=120)[0].split()
    assert process.returncode == 0 and [int(t) for t in told] == list(range(step, cfg.steps))
    state = io.load(tmp_path / "s")
    same((state.tensors["average"], state.tensors["losses"]), run(cfg))


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"schedule": cosine(20)}, "schedule"),
        ({"schedule": linear(21)}, "timesteps"),
        ({"net": replace(TINY, dropout=0.2)}, "network"),
        ({"data": replace(DATA, name="others")}, "data"),
        ({"prediction": "v"}, "prediction"),
        ({"shift": 3.0}, "shift"),
        ({"start": "0123abcd"}, "start"),
        ({"cfg": replace(CFG, rate=1e-3), "schedule": cosine(21)}, "rate, schedule, timesteps"),
    ],
    ids=["schedule", "timesteps", "network", "data", "prediction", "shift", "start", "three"],
)
def test_state_of_another_run(options, names, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("refquant.nn.fit.Updater.step", lambda *args: 1.0)  # a state, without the work
        run(state=tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(CheckpointError, match=rf"another run \({names} differ\)"):
        run(**options, state=tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before


def test_images_of_another_shape():
    with pytest.raises(ShapeError, match=r"\(C, H, W\) = \(1, 8, 8\), .*'shapes' has \(1, 16, 16\)"):
        run(data=shapes(10, seed=0, size=16))


def test_fewer_images_than_a_batch():
    with pytest.raises(RangeError, match="has 5 examples, fewer than one batch of 6"):
        run(data=shapes(5, seed=0, size=8))


def test_divergence(tmp_path):
    """One sentence, no warnings, and a state that can be read."""
    with pytest.raises(RangeError, match="diverged at step 1: .* Use a lower rate than 1000000.0"):
        run(replace(CFG, rate=1e6, warmup=0), state=tmp_path / "s")
    assert io.load(tmp_path / "s", kind="train-state").metadata["step"] == 1
