"""Noise that belongs to an image, a network as a noise predictor, and what samplers refuse."""

import numpy as np
import pytest
from toys import GaussianEps, Silence

from refquant.autograd import Tensor, ops
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.ddpm import ddpm_sample
from refquant.diffusion.denoiser import Denoiser
from refquant.diffusion.sampling import NoiseSource, timestep_sequence, with_previous
from refquant.diffusion.schedule import Schedule, cosine, linear, schedule
from refquant.errors import RangeError, UnknownNameError
from refquant.nn.unet import UNet, UNetConfig
from refquant.threads import set_threads

TINY = UNetConfig(8, 2, 8, (1, 2), 1, (4,), 4, 0.1)
SHAPE = (2, 8, 8)  # two channels, so that a lost transpose shows


@pytest.fixture(scope="module")
def network():
    """A tiny UNet whose zero-initialised layers are filled, so that its output depends on everything."""
    rng = np.random.default_rng(5)
    net = UNet(TINY, rng)
    for p in net.parameters():
        p.data = p.data + 0.1 * rng.standard_normal(p.shape, dtype=np.float32)
    return net


@pytest.fixture(autouse=True)
def default_threads():
    yield
    set_threads(None)


def images(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, *SHAPE), dtype=np.float32)


# --- NoiseSource ---


def test_noise_of_an_image_is_its_own():
    """The first 16 of 1,000 images are the 16 of a short run, draw after draw."""
    long, short = NoiseSource(3, 1000, (1, 2, 3)), NoiseSource(3, 16, (1, 2, 3))
    for _ in range(3):
        draw = long.draw()
        assert draw.shape == (1000, 1, 2, 3) and draw.dtype == np.float32
        np.testing.assert_array_equal(draw[:16], short.draw())


def test_a_long_run_may_be_drawn_in_parts():
    whole, parts = NoiseSource(3, 10, (4,)), [NoiseSource(3, 4, (4,)), NoiseSource(3, 6, (4,), first=4)]
    for _ in range(2):
        np.testing.assert_array_equal(whole.draw(), np.concatenate([p.draw() for p in parts]))


def test_draws_images_and_seeds_differ():
    a, b = NoiseSource(0, 3, (50,)), NoiseSource(1, 3, (50,))
    rows = np.concatenate([a.draw(), a.draw(), b.draw(), b.draw()])
    assert len(np.unique(rows, axis=0)) == 12
    assert np.abs(np.corrcoef(rows) - np.eye(12)).max() < 0.6  # 4 standard errors of 1/sqrt(50)


def test_noise_is_standard_normal():
    """Mean and variance of n = 2**18 numbers, within five standard errors; float32 tails reach 4 sigma."""
    z = NoiseSource(7, 64, (4096,)).draw().astype(np.float64)
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / z.size)
    assert np.abs(z).max() > 4


@pytest.mark.parametrize("sampler", [ddpm_sample, ddim_sample])
def test_samples_of_a_prefix(sampler):
    """The first images of a long run are the images of a short one, through a whole sampler."""
    s, options = linear(20), {} if sampler is ddpm_sample else {"steps": 5, "eta": 1.0}
    runs = []
    for count in (3, 8):
        noise = NoiseSource(2, count, SHAPE)
        runs.append(sampler(GaussianEps(s, 0.1, 0.3), noise.draw(), s, noise, **options))
    np.testing.assert_array_equal(runs[0], runs[1][:3])


# --- Denoiser ---


def test_denoiser_turns_the_axes(network):
    """eps(x NCHW, t) is the network's answer to x in NHWC, turned back."""
    x = images(3)
    want = network(Tensor(np.ascontiguousarray(np.moveaxis(x, 1, -1))), np.full(3, 17)).data
    got = Denoiser(network)(x, 17, 0)
    assert got.shape == x.shape and got.dtype == np.float32
    np.testing.assert_allclose(np.moveaxis(got, 1, -1), want, rtol=1e-6, atol=1e-6)
    assert np.abs(Denoiser(network)(x, 18, 0) - got).max() > 1e-6  # t arrives


@pytest.mark.parametrize("count", [1, 3, 4, 10])
def test_denoiser_gives_the_same_bits_for_any_number_of_threads(network, count):
    x, got = images(count), []
    for threads in (1, 2, 3):
        set_threads(threads)
        got.append(Denoiser(network, chunk=4)(x, 5, 0))
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[0], got[2])


def test_denoiser_chunks(network):
    """Every chunk has `chunk` images but the last, and each image's answer is that of its chunk alone."""
    sizes = []

    def counting(x, t):
        sizes.append(len(t))
        return network(x, t)

    set_threads(1)
    x = images(10)
    whole = Denoiser(counting, chunk=4)(x, 5, 0)
    assert sizes == [4, 4, 2]
    np.testing.assert_array_equal(whole[4:8], Denoiser(network, chunk=4)(x[4:8], 5, 0))


def test_denoiser_takes_any_layout_and_writes_nothing(network):
    x = images(4)
    frozen = np.asfortranarray(x)
    frozen.flags.writeable = False
    np.testing.assert_array_equal(Denoiser(network)(frozen, 5, 0), Denoiser(network)(x, 5, 0))


def test_denoiser_keeps_float64(network):
    got = Denoiser(network.astype(np.float64))(images(2).astype(np.float64), 3, 0)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, Denoiser(network)(images(2), 3, 0), atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_sampling_builds_no_graph(network, threads, monkeypatch):
    """No Tensor made while sampling has parents, in any thread; and the same network records outside."""
    made, graph, init = [], [], Tensor.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(1)
        if self._parents or self._vjp is not None:
            graph.append(self)

    monkeypatch.setattr(Tensor, "__init__", watched)
    set_threads(threads)
    noise = NoiseSource(0, 4, SHAPE)
    ddim_sample(Denoiser(network, chunk=2), noise.draw(), linear(10), noise, steps=2)
    assert len(made) > 100 and not graph
    ops.mse(network(Tensor(np.zeros((1, 8, 8, 2), np.float32)), np.zeros(1, int)), np.zeros((1, 8, 8, 2), np.float32))
    assert len(graph) > 50


def test_network_that_fails_in_a_thread_is_heard(network):
    """An error in a worker reaches the caller, and recording is on again for the next training step."""
    set_threads(2)
    with pytest.raises(RangeError, match="broken"):
        Denoiser(lambda x, t: (_ for _ in ()).throw(RangeError("broken")), chunk=1)(images(3), 0, 0)


# --- what is refused, and how ---


def sample(sampler, **options):
    s = linear(10)
    return sampler(GaussianEps(s), images(1), s, Silence((1, *SHAPE)), **options)


@pytest.mark.parametrize("steps", [0, -1, 11])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_number_of_steps(steps, spacing):
    with pytest.raises(RangeError, match=rf"steps is {steps}; .* 1 to 10\."):
        sample(ddim_sample, steps=steps, spacing=spacing)


@pytest.mark.parametrize("eta", [-0.01, 1.01, float("nan"), float("inf")])
def test_eta(eta):
    with pytest.raises(RangeError, match=f"eta is {eta}; .* 0 .* 1 "):
        sample(ddim_sample, steps=2, eta=eta)


def test_unknown_names_are_told_with_the_known_ones():
    for name, known, call in (
        ("cubic", "uniform, quadratic", lambda: sample(ddim_sample, steps=2, spacing="cubic")),
        ("fixedlarge", "posterior, beta", lambda: sample(ddpm_sample, variance="fixedlarge")),
        ("sqrt", "linear, cosine", lambda: schedule("sqrt")),
    ):
        with pytest.raises(UnknownNameError, match=f"'{name}'. Known: {known}") as caught:
            call()
        assert not str(caught.value).startswith('"')  # a KeyError would show the repr


@pytest.mark.parametrize("count", [0, -3])
def test_number_of_images(count):
    with pytest.raises(RangeError, match=f"number of images is {count}; .* at least 1"):
        NoiseSource(0, count, SHAPE)


@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize("timesteps", [0, -5])
def test_schedule_length(make, timesteps):
    with pytest.raises(RangeError, match=f"timesteps is {timesteps}; .* at least one"):
        make(timesteps)


@pytest.mark.parametrize(
    "betas",
    [
        np.full(3, 0.1, np.float32),
        np.full((2, 2), 0.1),
        np.zeros(0),
        np.array([0.1, 0.0]),
        np.array([0.1, 1.0]),
        np.array([0.1, np.nan]),
    ],
    ids=["float32", "matrix", "empty", "zero", "one", "nan"],
)
def test_betas(betas):
    with pytest.raises(RangeError, match="betas"):
        Schedule("mine", betas)


def test_sequence_with_the_step_after():
    assert list(with_previous(timestep_sequence(10, 3, "uniform"))) == [(0, 6, 3), (1, 3, 0), (2, 0, -1)]
    assert schedule("linear", 1).timesteps == 1 and timestep_sequence(1, 1, "quadratic") == [0]
