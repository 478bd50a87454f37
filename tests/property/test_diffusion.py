"""The diffusion family: schedules, the posterior, DDPM and DDIM, each law with its line of mathematics.

Notation: ab = alpha_bar, u = 2**-24, the relative rounding error of float32.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import GaussianEps, Recorder, Replay, Silence

from refquant.diffusion.ddim import ddim_sample, ddim_sigma
from refquant.diffusion.ddpm import VARIANCES, ddpm_sample, predict_x_0
from refquant.diffusion.sampling import NoiseSource, timestep_sequence
from refquant.diffusion.schedule import SCHEDULES, Schedule, schedule

U = 2.0**-24
SHAPE = (2, 1, 3, 3)
GOLDEN = {c["id"]: c for c in json.loads((Path(__file__).parents[1] / "golden" / "tfmq.json").read_text())["cases"]}


def schedules(longest=4000):
    lengths = st.sampled_from([1, 2, 3, 10, 20, 25, 50]) | st.integers(1, longest)
    return st.builds(schedule, st.sampled_from(sorted(SCHEDULES)), lengths)


@st.composite
def schedules_and_t(draw, first=0):
    s = draw(schedules().filter(lambda s: s.timesteps > first))
    return s, draw(st.integers(first, s.timesteps - 1))


@st.composite
def ddim_cases(draw, longest=60):
    """A schedule, and the options of a DDIM run on it."""
    s = draw(schedules(longest))
    steps = draw(st.integers(1, s.timesteps))
    options = {
        "steps": steps,
        "eta": draw(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)),
        "spacing": draw(st.sampled_from(["uniform", "quadratic"])),
    }
    return s, options


seeds = st.integers(0, 2**32 - 1)


def normal(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# --- schedules ---


@given(schedules())
def test_alpha_bar_decreases(s):
    """1 > ab_0 > ab_1 > ... > ab_{T-1} > 0, in float64."""
    ab = s.alpha_bar
    assert ab.dtype == np.float64 and ab.shape == (s.timesteps,)
    assert 0 < ab[-1] and ab[0] < 1 and (np.diff(ab) < 0).all()


@given(schedules_and_t(), st.floats(-1, 1, width=32), seeds)
def test_q_sample_moments(case, value, seed):
    """E x_t = sqrt(ab) x_0 and Var x_t = 1 - ab, within 6 standard errors of n = 2**14 samples."""
    (s, t), n = case, 2**14
    ab = s.alpha_bar_at(t)
    noise = normal(seed, (1, n))
    x_t = s.q_sample(np.full((1, n), value, np.float32), np.array([t]), noise).astype(np.float64)
    rounding = 2 * U * (1 + np.abs(x_t).max())
    assert abs(x_t.mean() - np.sqrt(ab) * value) < 6 * np.sqrt((1 - ab) / n) + rounding
    assert abs(x_t.std() / np.sqrt(1 - ab) - 1) < 6 * np.sqrt(0.5 / n) + rounding / np.sqrt(1 - ab)


@given(schedules_and_t())
def test_posterior_variance_is_smaller_than_beta(case):
    """0 = var_0 <= beta_t (1 - ab_{t-1}) / (1 - ab_t) <= beta_t."""
    s, t = case
    assert s.posterior_variance(0) == 0
    assert 0 <= s.posterior_variance(t) <= s.betas[t]
    assert t == 0 or s.posterior_variance(t) > 0


@given(schedules_and_t(first=1))
def test_posterior_variance_is_that_of_bayes(case):
    """1 / var = alpha_t / beta_t + 1 / (1 - ab_{t-1}): precisions of likelihood and prior add."""
    s, t = case
    alpha, beta, rest = 1 - s.betas[t], s.betas[t], 1 - s.alpha_bar_at(t - 1)
    # 1 - ab carries an absolute error of about 2**-52, and is no smaller than beta_0
    rtol = 2.0**-50 / s.betas[0]
    np.testing.assert_allclose(1 / s.posterior_variance(t), alpha / beta + 1 / rest, rtol=rtol)


# --- ancestral sampling ---


@given(schedules(60), st.sampled_from(VARIANCES), st.booleans(), seeds)
def test_last_step_adds_no_noise(s, variance, clip, seed):
    """x_{-1} = x_0^ at t = 0, bit for bit, and z is drawn T - 1 times."""
    noise = Replay(normal(seed, (s.timesteps, *SHAPE)))
    seen = Recorder(GaussianEps(s))
    x = ddpm_sample(seen.eps, normal(seed + 1), s, noise, variance=variance, clip=clip, callback=seen)
    assert noise.drawn == s.timesteps - 1
    np.testing.assert_array_equal(x, seen.states[-1].x_0)


@given(schedules(60), st.booleans(), seeds)
def test_ddpm_mean_is_the_closed_form_posterior(s, clip, seed):
    """mean = var (sqrt(alpha) x_t / beta + sqrt(ab') x_0^ / (1 - ab')), the product of two Gaussians (eq. 7)."""
    seen = Recorder(GaussianEps(s, 0.3, 0.5))
    ddpm_sample(seen.model, normal(seed), s, Silence(SHAPE), clip=clip, callback=seen)
    for (t, _, x_t), state in zip(seen.calls[:-1], seen.states[:-1], strict=True):
        alpha, beta, ab_prev = 1 - s.betas[t], s.betas[t], s.alpha_bar_at(t - 1)
        var = 1 / (alpha / beta + 1 / (1 - ab_prev))
        on_x_t, on_x_0 = var * np.sqrt(alpha) / beta, var * np.sqrt(ab_prev) / (1 - ab_prev)
        error = state.x - (on_x_t * x_t.astype(np.float64) + on_x_0 * state.x_0)
        assert (np.abs(error) <= 4 * U * (on_x_t * np.abs(x_t) + on_x_0 * np.abs(state.x_0))).all()


@given(schedules(60), seeds)
def test_ddpm_mean_is_that_of_eq_11(s, seed):
    """mean = (x_t - beta eps / sqrt(1 - ab)) / sqrt(alpha) where nothing is clipped, for any eps."""
    seen = Recorder(lambda x, t, step: np.tanh(x) * np.float32(0.5) + np.float32(1e-3 * t))
    ddpm_sample(seen.model, normal(seed), s, Silence(SHAPE), clip=False, callback=seen)
    for (t, _, x_t), state in zip(seen.calls, seen.states, strict=True):
        root, on_eps = np.sqrt(1 - s.betas[t]), s.betas[t] / np.sqrt(1 - s.alpha_bar_at(t))
        error = state.x - (x_t.astype(np.float64) - on_eps * state.eps) / root
        # about eight roundings of terms that are at most (|x_t| + |eps|) / sqrt(alpha)
        assert (np.abs(error) <= 8 * U * (np.abs(x_t) + np.abs(state.eps)) / root).all(), t


# --- DDIM ---


@given(schedules_and_t())
def test_ddim_variance_at_eta_1_is_the_posterior(case):
    """sigma(ab_t, ab_{t-1}, eta=1)² = posterior variance; 1 - ab/ab' has an absolute error of 2**-52."""
    s, t = case
    sigma = ddim_sigma(s.alpha_bar_at(t), s.alpha_bar_at(t - 1), 1.0)
    np.testing.assert_allclose(sigma**2, s.posterior_variance(t), rtol=2.0**-52 / s.betas[t] + 2.0**-50)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_ddim_sigma_at_eta_1_of_1000_steps(name):
    """sigma = sqrt(posterior variance) at every t of the published schedules, to 12 digits."""
    s = schedule(name)
    ab = [1.0, *s.alpha_bar]
    sigma = [ddim_sigma(ab[t + 1], ab[t], 1.0) for t in range(1000)]
    np.testing.assert_allclose(sigma, [np.sqrt(s.posterior_variance(t)) for t in range(1000)], rtol=1e-12)


@given(st.builds(schedule, st.sampled_from(sorted(SCHEDULES)), st.integers(25, 150)), seeds)
def test_ddim_eta_1_with_all_steps_is_ddpm(s, seed):
    """The same noise gives the same images; every step may differ by 8 roundings, and the model contracts."""
    runs = []
    for sampler, options in ((ddpm_sample, {}), (ddim_sample, {"steps": s.timesteps, "eta": 1.0})):
        noise = NoiseSource(seed, 2, SHAPE[1:])
        seen = Recorder(GaussianEps(s, 0.3, 0.5))
        x = noise.draw()
        runs.append(sampler(seen.eps, x, s, noise, clip=False, callback=seen, **options))
    largest = max(np.abs(state.x).max() for state in seen.states)
    np.testing.assert_allclose(runs[0], runs[1], rtol=0, atol=8 * U * s.timesteps * largest)


@given(ddim_cases(), seeds)
def test_ddim_without_eta_draws_nothing_and_is_a_function(case, seed):
    """eta = 0: no z is drawn; equal inputs give equal bits."""
    s, options = case
    noise = Silence(SHAPE)
    run = [ddim_sample(GaussianEps(s), normal(seed), s, noise, **{**options, "eta": 0.0}) for _ in range(2)]
    assert noise.drawn == 0
    np.testing.assert_array_equal(*run)


@given(ddim_cases(), st.booleans(), seeds)
def test_ddim_is_finite(case, clip, seed):
    """1 - ab' - sigma² >= 0 for every pair of time-steps: no NaN, no warning, and x keeps dtype and shape."""
    s, options = case
    noise = NoiseSource(seed, 2, SHAPE[1:])
    x = ddim_sample(GaussianEps(s, 0.3, 0.5), noise.draw(), s, noise, clip=clip, **options)
    assert np.isfinite(x).all() and x.dtype == np.float32 and x.shape == SHAPE


# --- the true noise gives the true image ---


@given(schedules_and_t(), st.booleans(), seeds)
def test_true_noise_gives_x_0(case, clip, seed):
    """(x_t - sqrt(1 - ab) e) / sqrt(ab) = x_0 for x_t = sqrt(ab) x_0 + sqrt(1 - ab) e; rounding grows by 1/sqrt(ab)."""
    s, t = case
    ab = s.alpha_bar_at(t)
    x_0, e = np.tanh(normal(seed)), normal(seed + 1)
    got = predict_x_0(s.q_sample(x_0, np.array([t, t]), e), e, ab, clip)
    assert (np.abs(got - x_0) <= 4 * U * (np.abs(x_0) + np.abs(e) / np.sqrt(ab))).all()


@given(ddim_cases(), st.booleans(), seeds)
def test_samplers_find_the_only_image(case, clip, seed):
    """eps = (x - sqrt(ab) x_0) / sqrt(1 - ab) leads every sampler to x_0."""
    s, options = case
    x_0 = np.tanh(normal(seed))
    for sampler, arguments in ((ddim_sample, options), *((ddpm_sample, {"variance": v}) for v in VARIANCES)):
        noise = NoiseSource(seed, 2, SHAPE[1:])
        x = sampler(GaussianEps(s, x_0, 0.0), noise.draw(), s, noise, clip=clip, **arguments)
        # the last prediction is at t = 0, from an x_t and an eps of at most about 6
        np.testing.assert_allclose(x, x_0, rtol=0, atol=4 * U * 6 / np.sqrt(s.alpha_bar_at(0)))


@given(ddim_cases(), seeds)
def test_ddim_steps_compose(case, seed):
    """eta = 0 and the true e: x_{t'} = sqrt(ab') x_0 + sqrt(1 - ab') e at every t' visited, whatever the path."""
    s, options = case
    x_0, x = np.tanh(normal(seed)), normal(seed + 1)
    seen = Recorder(GaussianEps(s, x_0, 0.0))
    ddim_sample(seen.model, x, s, Silence(SHAPE), clip=False, callback=seen, **{**options, "eta": 0.0})
    e, visited, error = seen.states[0].eps, seen.calls[0][0], 0.0
    for t, _, x_t in seen.calls[1:]:
        # x_0^ carries a few roundings of x_t / sqrt(ab), and enters x_{t'} times sqrt(ab')
        error += 4 * U * (1 + np.abs(e).max()) * (1 + np.sqrt(s.alpha_bar_at(t) / s.alpha_bar_at(visited)))
        np.testing.assert_allclose(x_t, s.q_sample(x_0, np.array([t, t]), e), rtol=0, atol=error)
        visited = t


# --- what samplers tell and visit ---


@given(ddim_cases(), st.booleans(), seeds)
def test_callback_sees_every_step_once(case, ancestral, seed):
    """Step i of S visits t_i: the network is called with (t_i, i), and the state tells (i, S, t_i, x_{i+1})."""
    s, options = case
    seen = Recorder(GaussianEps(s))
    sampler, options = (ddpm_sample, {}) if ancestral else (ddim_sample, options)
    x = sampler(seen.model, normal(seed), s, NoiseSource(seed, 2, SHAPE[1:]), callback=seen, **options)
    want = timestep_sequence(s.timesteps, options.get("steps", s.timesteps), options.get("spacing", "uniform"))
    assert [(t, step) for t, step, _ in seen.calls] == [(t, i) for i, t in enumerate(want)]
    assert [(a.step, a.steps, a.t) for a in seen.states] == [(i, len(want), t) for i, t in enumerate(want)]
    for state, after in zip(seen.states, [*(c[2] for c in seen.calls[1:]), x], strict=True):
        assert state.x is after and state.x.shape == state.x_0.shape == state.eps.shape == SHAPE
        assert state.x.dtype == state.x_0.dtype == state.eps.dtype == np.float32


@given(st.integers(1, 4000), st.data())
def test_timestep_sequence(timesteps, data):
    """uniform: 0, c, 2c, ... c = T // S, reversed; quadratic: weakly decreasing; S terms in [0, T), the last 0."""
    steps = data.draw(st.integers(1, timesteps))
    uniform, quadratic = (timestep_sequence(timesteps, steps, spacing) for spacing in ("uniform", "quadratic"))
    c = timesteps // steps
    assert uniform == list(range(c * (steps - 1), -1, -c))
    assert len(uniform) == len(quadratic) == steps
    assert quadratic == sorted(quadratic, reverse=True)
    for sequence in (uniform, quadratic):
        assert sequence[-1] == 0 and 0 <= sequence[0] < timesteps and all(type(t) is int for t in sequence)


# --- the authors' code ---


def test_quadratic_sequence_of_the_authors():
    golden = GOLDEN["schedule.quad100"]
    got = timestep_sequence(golden["inputs"]["T"], golden["inputs"]["S"], "quadratic")
    assert got[::-1] == golden["outputs"]["seq"] and len(set(got)) == golden["outputs"]["n_unique"]


@pytest.mark.parametrize("name", ["eta0", "eta1"])
def test_ddim_of_the_authors(name):
    golden = GOLDEN[f"ddim.generalized_steps.{name}"]
    inputs, want, rtol = golden["inputs"], golden["outputs"], golden["rtol"]
    x = np.random.RandomState(90).standard_normal((2, 3, 4, 4)).astype(np.float32)  # noqa: NPY002 - their generator
    # their loop draws at every step, also at the last, where sigma = 0
    draws = np.array(inputs.get("noise_per_step", [])).reshape(-1, *x.shape)
    s = Schedule("golden", np.linspace(1e-4, 0.02, 1000).astype(np.float32).astype(np.float64))
    seen = Recorder(lambda x, t, step: np.tanh(x) * np.float32(0.5) + np.float32(0.001 * t))
    got = ddim_sample(
        seen.model, x, s, Replay(draws), steps=6, eta=inputs["eta"], spacing="quadratic", clip=False, callback=seen
    )
    assert [t for t, _, _ in seen.calls] == inputs["seq"][::-1]
    for (t, _, x_t), (golden_t, golden_sum) in zip(seen.calls, want["visited"], strict=True):
        assert t == golden_t
        np.testing.assert_allclose(x_t.sum(dtype=np.float64), golden_sum, rtol=rtol)
    atol = 1e-6 * np.abs(want["final"]).max()
    np.testing.assert_allclose(got.ravel(), want["final"], rtol=rtol, atol=atol)
    np.testing.assert_allclose(seen.states[-1].x_0.ravel()[:16], want["x0_last"], rtol=rtol, atol=atol)
