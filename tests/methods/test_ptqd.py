"""PTQD: planted noise is found and taken out, no noise changes nothing, the variance adds up."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from toys import Replay, tiny_session

import refquant.quant.methods.ptqd as method
from refquant import io
from refquant.diffusion.ddim import ddim_sample, ddim_sigma
from refquant.diffusion.sampling import NoiseSource
from refquant.diffusion.schedule import Schedule
from refquant.errors import RangeError, ShapeError, UnknownNameError
from refquant.quant.affine import QParams
from refquant.quant.calibrate import CalibrationConfig
from refquant.quant.methods import METHODS
from refquant.quant.methods.ptqd import (
    NoiseStatistics,
    corrected,
    ddim_step,
    measure_noise,
    noise_statistics,
    ptqd_ddim_sample,
)
from refquant.quant.quantized import load_quantized

STEPS = 6
CALIBRATION = CalibrationConfig(images=3, steps=STEPS, seed=2)


def statistics(k=0.0, mean=0.0, std=0.0, channels=1, steps=STEPS, spacing=3):
    """The same noise at every step, which goes down to t = 0."""
    ones = np.ones(steps)
    times = spacing * np.arange(steps)[::-1]
    return NoiseStatistics(times, k * ones, mean * np.ones((steps, channels)), std * ones)


def planted(eps, k, mu):
    """A quantized model whose error at each step is exactly k eps + mu."""
    return lambda x, t, step: (1 + np.float32(k[step])) * eps(x, t, step) + np.float32(mu[step])


# ------------------------------------------------------------------ laws, which look up what they test in `method`


def planted_noise_is_taken_out(case):
    """(eps (1 + k) + mu - mean) / (1 + k^) = eps, if mu is of the residual and channels share their mean of eps."""
    eps, k, mu = case
    found, mean, std = method.noise_statistics(eps, k * eps + mu[:, None, None], bias="residual")
    # measured on float64 numbers of size 1 to 10, of which eps has at least 16
    np.testing.assert_allclose(found, k, atol=1e-9)
    np.testing.assert_allclose(mean, mu, atol=1e-9)
    measured = NoiseStatistics(np.array([0]), np.array([found]), mean[None], np.array([std]))
    answer = method.corrected(lambda x, t, step: eps * (1 + k) + mu[:, None, None], measured)
    np.testing.assert_allclose(answer(eps, 0, 0), eps, atol=1e-8)


def negative_correlation_is_left(case):
    """k < 0 is measured as it is, not corrected, and stays in the residual."""
    eps, k, mu = case
    found, mean, std = method.noise_statistics(eps, -k * eps + mu[:, None, None])
    np.testing.assert_allclose(found, -k, atol=1e-9)
    measured = NoiseStatistics(np.array([0]), np.array([found]), mean[None], np.array([std]))
    answer = method.corrected(lambda x, t, step: eps * (1 - k) + mu[:, None, None], measured)
    np.testing.assert_allclose(answer(eps, 0, 0), eps * (1 - k) + mu[:, None, None] - mean[:, None, None], atol=1e-8)


def noise_adds_up(case):
    """sigma'² + c² = sigma², where c is what sigma_q becomes in a DDIM step: its slope in eps, times sigma_q.

    Where c is larger than sigma, nothing is left to add.
    """
    ab, ab_after, eta, sigma_q = case
    sigma = ddim_sigma(ab, ab_after, eta)
    x, zero, one = np.zeros((3, 1, 1, 1, 1))
    slope = ddim_step(x, zero + 1, ab, ab_after, sigma, False)[0] - ddim_step(x, zero, ab, ab_after, sigma, False)[0]
    c = abs(float(slope.item())) * sigma_q
    left = method.absorb(sigma, sigma_q, ab, ab_after)
    # ddim_step rounds its coefficients to float32, each to 2**-24, and c is their difference
    blur = 1e-6 * sigma_q * (1 + math.sqrt((1 - ab) / ab))
    if c + blur < sigma:
        np.testing.assert_allclose(left**2 + c**2, sigma**2, rtol=1e-6, atol=4 * sigma * blur)
    elif c > sigma + blur:
        assert left == 0
    assert 0 <= left <= sigma


@st.composite
def plants(draw):
    """(eps (N, C, 4, 4) with one mean for all channels, k >= 0, mu (C,)), float64."""
    n, c, bounded = draw(st.integers(1, 3)), draw(st.integers(1, 3)), st.floats(-10, 10)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    eps = rng.standard_normal((n, c, 4, 4))
    eps += draw(bounded) - eps.mean(axis=(0, 2, 3), keepdims=True)
    mu = draw(st.lists(bounded, min_size=c, max_size=c))
    return eps, draw(st.sampled_from([0.0, 0.5]) | st.floats(0, 2)), np.array(mu)


@st.composite
def steps_of_ddim(draw):
    """(ab, ab_after, eta, sigma_q) of a step towards the image."""
    ab, ab_after = sorted(draw(st.lists(st.floats(0.01, 0.999), min_size=2, max_size=2, unique=True)))
    return ab, ab_after, draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1)), draw(st.floats(0, 2))


LAWS = [(planted_noise_is_taken_out, plants()), (negative_correlation_is_left, plants()),
        (noise_adds_up, steps_of_ddim())]  # fmt: skip


@pytest.mark.parametrize(("law", "cases"), LAWS, ids=[law.__name__ for law, _ in LAWS])
def test_law(law, cases):
    @given(cases)
    def check(case):
        law(case)

    check()


# ------------------------------------------------------------------ mutants


def slope_of_eps_on_error(eps, error, bias="raw"):
    return noise_statistics(error, eps, bias)


def slope_through_the_origin(eps, error, bias="raw"):
    return float((eps * error).mean() / (eps**2).mean()), *noise_statistics(eps, error, bias)[1:]


def always_the_raw_bias(eps, error, bias="raw"):
    return noise_statistics(eps, error)


def one_bias_for_all_channels(eps, error, bias="raw"):
    k, mean, std = noise_statistics(eps, error, bias)
    return k, np.full_like(mean, mean.mean()), std


def divided_before_the_bias(eps, measured):
    return lambda x, t, step: eps(x, t, step) / measured.gain[step] - measured.mean[step][:, None, None]


def negative_k_too(eps, measured):
    return lambda x, t, step: (eps(x, t, step) - measured.mean[step][:, None, None]) / (1 + measured.k[step])


def multiplied(eps, measured):
    return lambda x, t, step: (eps(x, t, step) - measured.mean[step][:, None, None]) * measured.gain[step]


def noise_added_on_top(sigma, sigma_q, ab, ab_after):
    c = abs(math.sqrt(1 - ab_after - sigma**2) - math.sqrt(ab_after * (1 - ab) / ab)) * sigma_q
    return math.sqrt(sigma**2 + c**2)


def direction_alone(sigma, sigma_q, ab, ab_after):
    c = math.sqrt(1 - ab_after - sigma**2) * sigma_q
    return math.sqrt(sigma**2 - c**2) if c < sigma else 0.0


def sigma_forgotten_in_the_direction(sigma, sigma_q, ab, ab_after):
    c = abs(math.sqrt(1 - ab_after) - math.sqrt(ab_after * (1 - ab) / ab)) * sigma_q
    return math.sqrt(sigma**2 - c**2) if c < sigma else 0.0


MUTANTS = [
    ("noise_statistics", slope_of_eps_on_error, planted_noise_is_taken_out, plants()),
    ("noise_statistics", slope_through_the_origin, planted_noise_is_taken_out, plants()),
    ("noise_statistics", always_the_raw_bias, planted_noise_is_taken_out, plants()),
    ("noise_statistics", one_bias_for_all_channels, planted_noise_is_taken_out, plants()),
    ("corrected", divided_before_the_bias, planted_noise_is_taken_out, plants()),
    ("corrected", multiplied, planted_noise_is_taken_out, plants()),
    ("corrected", negative_k_too, negative_correlation_is_left, plants()),
    ("absorb", noise_added_on_top, noise_adds_up, steps_of_ddim()),
    ("absorb", direction_alone, noise_adds_up, steps_of_ddim()),
    ("absorb", sigma_forgotten_in_the_direction, noise_adds_up, steps_of_ddim()),
]


@pytest.mark.parametrize(
    ("name", "mutant", "law", "cases"), [pytest.param(*m, id=f"{m[1].__name__}-{m[2].__name__}") for m in MUTANTS]
)
def test_law_kills_mutant(name, mutant, law, cases, monkeypatch):
    monkeypatch.setattr(method, name, mutant)

    @settings(max_examples=1000, derandomize=True, database=None, phases=[Phase.generate], report_multiple_bugs=False)
    @given(cases)
    def search(case):
        law(case)

    with pytest.raises(AssertionError):
        search()


# ------------------------------------------------------------------ the sampler


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_correction_of_no_noise_is_the_identity(model, eta, clip):
    eps, noises = model.denoiser(), [NoiseSource(1, 2, model.image_shape) for _ in range(2)]
    options = {"eta": eta, "clip": clip}
    want = ddim_sample(eps, noises[0].draw(), model.schedule, noises[0], steps=STEPS, **options)
    got = ptqd_ddim_sample(eps, noises[1].draw(), model.schedule, noises[1], statistics=statistics(), **options)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("clip", [False, True])
def test_without_noise_of_its_own_the_sampler_is_ddim_on_the_corrected_predictor(model, clip):
    eps, noise, measured = model.denoiser(), NoiseSource(1, 2, model.image_shape), statistics(0.2, 0.1, 0.3)
    x = noise.draw()
    got = ptqd_ddim_sample(eps, x, model.schedule, noise, statistics=measured, clip=clip)
    want = ddim_sample(corrected(eps, measured), x, model.schedule, noise, steps=STEPS, clip=clip)
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(want, ddim_sample(eps, x, model.schedule, noise, steps=STEPS, clip=clip))


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_planted_noise_of_every_step_is_measured_and_its_images_are_the_float_ones(model, spacing):
    """A different k and mu at each step, also where quadratic spacing visits t = 0 three times."""
    eps, k, mu = model.denoiser(), np.linspace(0.02, 0.4, STEPS), np.linspace(-0.3, 0.5, STEPS)
    quantized = planted(eps, k, mu)
    measured = measure_noise(model, quantized, CALIBRATION, spacing=spacing, bias="residual")
    np.testing.assert_allclose(measured.k, k, rtol=1e-5)  # answers are float32
    np.testing.assert_allclose(measured.mean[:, 0], mu, rtol=1e-5)
    assert measured.std.max() < 1e-5
    noise = NoiseSource(9, 2, model.image_shape)
    x = noise.draw()
    want = ddim_sample(eps, x, model.schedule, noise, steps=STEPS, spacing=spacing)
    got = ptqd_ddim_sample(quantized, x, model.schedule, noise, statistics=measured)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    without = ddim_sample(quantized, x, model.schedule, noise, steps=STEPS, spacing=spacing)
    assert np.abs(without - want).max() > 0.1 * np.abs(want).max()


def test_statistics_in_the_wrong_order_are_noticed(model):
    """The mutant that keeps them by the ascending step, as the authors do, and reads them by the descending."""
    eps, k = model.denoiser(), np.linspace(0.02, 0.4, STEPS)
    quantized = planted(eps, k, np.linspace(-0.3, 0.5, STEPS))
    right = measure_noise(model, quantized, CALIBRATION, bias="residual")
    wrong = NoiseStatistics(right.timesteps, right.k[::-1], right.mean[::-1], right.std[::-1])
    noise = NoiseSource(9, 2, model.image_shape)
    x = noise.draw()
    want = ddim_sample(eps, x, model.schedule, noise, steps=STEPS)
    got = ptqd_ddim_sample(quantized, x, model.schedule, noise, statistics=wrong)
    assert np.abs(got - want).max() > 0.05 * np.abs(want).max()


def test_raw_bias_contains_the_part_of_k():
    """Difference 1: mean of D is k mean(eps) + mu; only the residual's is mu."""
    eps = np.random.default_rng(0).standard_normal((2, 1, 8, 8)) + 3
    error = 0.1 * eps + 0.25
    assert noise_statistics(eps, error, bias="residual")[1] == pytest.approx(0.25)
    assert noise_statistics(eps, error)[1] == pytest.approx(0.25 + 0.1 * eps.mean())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_step_by_hand(eta):
    """The four lines of the released step, in float64, for two channels; sigma_q is small, then large."""
    schedule = Schedule("by hand", np.array([0.1, 0.4]))
    ab, ab_after = schedule.alpha_bar[1], schedule.alpha_bar[0]
    rng = np.random.default_rng(0)
    x, eps_hat, z = rng.standard_normal((3, 2, 2, 3, 3))
    for sigma_q in (0.05, 50.0):
        k, mu = 0.08, np.array([0.02, -0.03])
        eps = (eps_hat - mu.reshape(1, 2, 1, 1)) / (1 + k)
        sigma = eta * np.sqrt((1 - ab_after) / (1 - ab) * (1 - ab / ab_after))
        c = abs(np.sqrt(1 - ab_after - sigma**2) - np.sqrt(ab_after * (1 - ab) / ab)) * sigma_q / (1 + k)
        sigma = np.sqrt(sigma**2 - c**2) if c**2 < sigma**2 else 0.0
        assert (sigma > 0) == (eta == 1 and sigma_q == 0.05)
        x_0 = (x - np.sqrt(1 - ab) * eps) / np.sqrt(ab)
        want = np.sqrt(ab_after) * x_0 + np.sqrt(1 - ab_after - sigma**2) * eps + sigma * z
        measured = NoiseStatistics(np.array([1, 0]), np.full(2, k), np.tile(mu, (2, 1)), np.full(2, sigma_q))
        states = []
        ptqd_ddim_sample(lambda x, t, step: eps_hat.astype(np.float32), x.astype(np.float32), schedule,  # noqa: B023
                         Replay([z, z]), statistics=measured, eta=eta, clip=False, callback=states.append)  # fmt: skip
        np.testing.assert_allclose(states[0].x, want, atol=2e-6)
        np.testing.assert_allclose(states[0].x_0, x_0, atol=2e-6)


def test_the_float_model_has_no_quantization_noise(model):
    measured = measure_noise(model, model.denoiser(), CALIBRATION)
    for name in ("k", "mean", "std"):
        np.testing.assert_array_equal(measured.arrays()[name], 0)


# ------------------------------------------------------------------ the correction that a model keeps


@pytest.fixture
def nearest(calibration):
    return METHODS["nearest"](tiny_session(calibration, weight_bits=3))


@pytest.mark.parametrize("bias", ["raw", "residual"])
def test_correct_keeps_what_was_measured(model, nearest, bias, tmp_path):
    """gain, mean and time-steps are `measure_noise`'s; answers those of `corrected`, also after a file and back."""
    last = nearest.layers["conv_out"]
    louder = QParams(last.weight_qparams.scale * 1.25, last.weight_qparams.zero_point, last.weight_qparams.spec)
    last.set_codes(last.codes, louder)
    cfg = CalibrationConfig(images=2, steps=4, seed=9)
    made, measured = method.correct(nearest, cfg, bias=bias), measure_noise(model, nearest.denoiser(), cfg, bias=bias)
    assert measured.gain.max() > 1  # or the test would not see it
    for name, want in (("gain", measured.gain), ("mean", measured.mean), ("timesteps", measured.timesteps)):
        np.testing.assert_array_equal(getattr(made.correction, name), want)
    made.save(tmp_path / "q")
    back, want = load_quantized(str(tmp_path / "q")), corrected(nearest.denoiser(), measured)
    x = np.random.default_rng(0).standard_normal((2, *model.image_shape), dtype=np.float32)
    for step, t in enumerate(made.timesteps()):
        np.testing.assert_array_equal(made.denoiser()(x, int(t), step), want(x, int(t), step))
        np.testing.assert_array_equal(back.denoiser()(x, int(t), step), want(x, int(t), step))
    assert made.layers is nearest.layers and made.recipe["method"] == "ptqd" and nearest.correction is None


def test_the_method_measures_on_other_trajectories(calibration, nearest):
    """Seed + 1: not those that the rounding was fitted to."""
    made = METHODS["ptqd"](tiny_session(calibration, weight_bits=3), on="nearest", images=2)
    cfg = replace(calibration.cfg, images=2, seed=calibration.cfg.seed + 1)
    np.testing.assert_array_equal(made.correction.mean, method.correct(nearest, cfg).correction.mean)
    assert made.recipe["options"] == {"search": "mse", "on": "nearest", "bias": "raw", "noise": cfg.to_json()}


# ------------------------------------------------------------------ files, edges and bad input


def test_file_and_back(tmp_path):
    measured = statistics(0.2, 0.1, 0.3, channels=3)
    io.save(tmp_path / "noise.safetensors", measured.arrays(), {"kind": "noise"})
    back = NoiseStatistics.from_arrays(io.load(tmp_path / "noise.safetensors", kind="noise").tensors)
    for name, array in measured.arrays().items():
        np.testing.assert_array_equal(back.arrays()[name], array)
    with pytest.raises(ShapeError, match="std is missing"):
        NoiseStatistics.from_arrays({k: v for k, v in measured.arrays().items() if k != "std"})


def test_constant_answers_have_no_slope():
    k, mean, std = noise_statistics(np.full((1, 2, 2, 2), 3.0), np.full((1, 2, 2, 2), 0.5))
    assert k == 0 and std == 0
    np.testing.assert_array_equal(mean, 0.5)


def test_one_image_and_one_step(model):
    measured = measure_noise(model, lambda x, t, step: x, CalibrationConfig(images=1, steps=1))
    assert measured.k.shape == (1,) and np.isfinite(measured.std).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_answers_must_be_finite(bad):
    eps = np.ones((2, 1, 2, 2))
    with pytest.raises(RangeError, match="NaN or infinity"):
        noise_statistics(eps, np.where(np.arange(4).reshape(2, 2) == 3, bad, eps))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1, 1), (0, 1, 2, 2)])
def test_answers_have_four_axes_and_two_elements(shape):
    with pytest.raises(ShapeError, match="N, C, H, W"):
        noise_statistics(np.ones(shape), np.ones(shape))


def test_unknown_bias_is_refused():
    with pytest.raises(UnknownNameError, match="raw, residual"):
        noise_statistics(np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)), bias="paper")


def test_statistics_must_fit_together():
    three, two = np.zeros(3), np.zeros(2)
    with pytest.raises(ShapeError, match="S, C"):
        NoiseStatistics(np.arange(3), three, np.zeros((3, 1)), two)
    with pytest.raises(ShapeError, match="S >= 1"):
        NoiseStatistics(np.arange(0), np.zeros(0), np.zeros((0, 1)), np.zeros(0))
    with pytest.raises(RangeError, match="negative std"):
        NoiseStatistics(np.arange(3), three, np.zeros((3, 1)), three - 1)
    with pytest.raises(RangeError, match="NaN"):
        NoiseStatistics(np.arange(3), three + np.nan, np.zeros((3, 1)), three)


def test_other_steps_than_the_measured_ones_are_refused(model):
    noise, x = NoiseSource(1, 2, model.image_shape), np.zeros((2, *model.image_shape), np.float32)
    predict = corrected(model.denoiser(), statistics())
    with pytest.raises(RangeError, match="was not measured"):
        ddim_sample(predict, x, model.schedule, noise, steps=STEPS - 1)
    with pytest.raises(RangeError, match="was not measured"):
        predict(x, 15, STEPS)
    with pytest.raises(ShapeError, match="channels"):
        corrected(model.denoiser(), statistics(channels=3))(x, 15, 0)
    with pytest.raises(RangeError, match="schedule ends at 19"):
        ptqd_ddim_sample(model.denoiser(), x, model.schedule, noise, statistics=statistics(spacing=4))
    with pytest.raises(RangeError, match="eta"):
        ptqd_ddim_sample(model.denoiser(), x, model.schedule, noise, statistics=statistics(), eta=1.5)
