"""Samplers on data whose noise is known exactly: x_0 ~ N(m, s²), each pixel on its own.

With x_t = sqrt(ab) x_0 + sqrt(1 - ab) e, the pair (e, x_t) is Gaussian, Var x_t = v = ab s² + 1 - ab and
Cov(e, x_t) = sqrt(1 - ab). So E[e | x_t] = sqrt(1 - ab) / v (x_t - sqrt(ab) m), which is what a perfect network
would answer (`toys.GaussianEps`). It is affine in x_t, hence so is every step of every sampler,

    x' = a x + b + sigma z,      mean' = a mean + b,      var' = a² var + sigma²,

and mean and variance of the samples are known without drawing one. Below, `recursion` is those two lines in
float64, with a, b and sigma from E[x_0 | x_t] and from Bayes' rule for q(x_{t-1} | x_t, x_0). Three comparisons:

1. sampler = recursion, tightly and without statistics: image k gets a one as its k-th noise and zeros else, so it
   ends at mean + c_k, and the variance of the samples is the sum of all c_k²;
2. recursion = (m, s²), loosely: what is left is the error of taking steps of finite size;
3. sampler with real noise = recursion, within five standard errors.
"""

import numpy as np
import pytest
from toys import GaussianEps, Impulses, Silence

from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.ddpm import ddpm_sample
from refquant.diffusion.sampling import NoiseSource, timestep_sequence, with_previous
from refquant.diffusion.schedule import cosine, linear

MEAN, STD = 0.4, 0.6
SAMPLERS = {
    "ddpm-posterior": (ddpm_sample, {"variance": "posterior"}),
    "ddpm-beta": (ddpm_sample, {"variance": "beta"}),
    **{
        f"ddim-{spacing}-eta{eta:g}": (ddim_sample, {"steps": 50, "eta": eta, "spacing": spacing})
        for spacing in ("uniform", "quadratic")
        for eta in (0.0, 0.5, 1.0)
    },
}
each_sampler = pytest.mark.parametrize("name", SAMPLERS)
each_schedule = pytest.mark.parametrize("schedule", [linear(200), cosine(200)], ids=lambda s: s.name)


def steps_of(schedule, sampler, variance="posterior", steps=None, eta=0.0, spacing="uniform"):
    """(ab, ab', weight of E[x_0], weight of x_t, sigma) of each step; the rest of a step's algebra is shared."""
    betas, ab = schedule.betas, [*np.cumprod(1 - schedule.betas), 1.0]  # ab[-1] = 1: the clean image
    for _, t, after in with_previous(timestep_sequence(len(betas), steps or len(betas), spacing)):
        here, there = ab[t], ab[after]
        if after == -1:
            yield here, there, 1.0, 0.0, 0.0
        elif sampler is ddpm_sample:  # Bayes: precisions add, means are weighted by them
            var = 1 / ((1 - betas[t]) / betas[t] + 1 / (1 - there))
            sigma = np.sqrt(var if variance == "posterior" else betas[t])
            yield here, there, var * np.sqrt(there) / (1 - there), var * np.sqrt(1 - betas[t]) / betas[t], sigma
        else:  # DDIM: sqrt(ab') x_0 + sqrt(1 - ab' - sigma²) (x_t - sqrt(ab) x_0) / sqrt(1 - ab)
            sigma = eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
            on_x = np.sqrt((1 - there - sigma**2) / (1 - here))
            yield here, there, np.sqrt(there) - on_x * np.sqrt(here), on_x, sigma


def recursion(schedule, sampler, options, mean=MEAN, std=STD):
    """Mean and variance of the samples in exact arithmetic, from N(0, 1)."""
    m, var = 0.0, 1.0
    for ab, _, on_x_0, on_x, sigma in steps_of(schedule, sampler, **options):
        gain = std**2 * np.sqrt(ab) / (ab * std**2 + 1 - ab)  # E[x_0 | x] = mean + gain (x - sqrt(ab) mean)
        a, b = on_x + on_x_0 * gain, on_x_0 * (1 - gain * np.sqrt(ab)) * mean
        m, var = a * m + b, a**2 * var + sigma**2
    return m, var


def measured(schedule, sampler, options, mean=MEAN, std=STD):
    """Mean and variance of the samples, from the sampler itself and one impulse at a time."""
    eps, n = GaussianEps(schedule, mean, std), schedule.timesteps + 1
    noise = Impulses((n, 1, 1, 1))
    x = sampler(eps, noise.draw(), schedule, noise, clip=False, **options).ravel()
    silence = Silence((1, 1, 1, 1))
    quiet = sampler(eps, silence.draw(), schedule, silence, clip=False, **options).item()
    return quiet, float(np.sum((x.astype(np.float64) - quiet) ** 2))


@each_schedule
@each_sampler
def test_sampler_is_the_recursion(name, schedule):
    """The sum of the squared responses is the variance; 200 steps in float32 leave five digits."""
    sampler, options = SAMPLERS[name]
    got, want = measured(schedule, sampler, options), recursion(schedule, sampler, options)
    np.testing.assert_allclose(got, want, rtol=2e-5)


@each_schedule
@each_sampler
def test_real_noise_has_these_moments(name, schedule):
    """2 x 64 x 64 samples: standard errors are s / sqrt(n) of the mean and s² sqrt(2 / n) of the variance."""
    sampler, options = SAMPLERS[name]
    m, var = recursion(schedule, sampler, options)
    noise = NoiseSource(11, 2, (1, 64, 64))
    x = sampler(GaussianEps(schedule, MEAN, STD), noise.draw(), schedule, noise, clip=False, **options)
    assert x.dtype == np.float32
    assert abs(x.mean(dtype=np.float64) - m) < 5 * np.sqrt(var / x.size)
    assert abs(x.var(dtype=np.float64) - var) < 5 * var * np.sqrt(2 / x.size)


# --- the recursion against the truth: what is left is the size of the steps ---


@each_schedule
@each_sampler
def test_mean_is_right_but_for_the_start(name, schedule):
    """mean = m (1 - sqrt(ab_start) prod a): the steps keep sqrt(ab) m exactly, only N(0, 1) starts beside it."""
    sampler, options = SAMPLERS[name]
    m, _ = recursion(schedule, sampler, options)
    unit, _ = recursion(schedule, sampler, options, mean=0.0)
    first_ab = next(iter(steps_of(schedule, sampler, **options)))[0]
    assert unit == 0
    assert 0 <= MEAN - m <= np.sqrt(first_ab) * MEAN


@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize(("variance", "sign", "tolerance"), [("posterior", -1, 0.014), ("beta", 1, 0.0025)])
def test_ddpm_variance_converges(make, variance, sign, tolerance):
    """T = 1,000: the posterior choice is a percent too narrow, beta 0.2 % too wide; twice the steps halve it."""
    error = [recursion(make(T), ddpm_sample, {"variance": variance})[1] / STD**2 - 1 for T in (1000, 2000)]
    assert 0 < sign * error[0] < tolerance
    assert 1.8 < error[0] / error[1] < 2.2


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize(("eta", "tolerance"), [(0.0, 0.10), (0.5, 0.12), (1.0, 0.20)])
def test_ddim_variance_converges(spacing, eta, tolerance):
    """Of 1,000, 50 steps are 6 % (quadratic, eta = 0) to 19 % too narrow, and twice the steps halve it."""
    error = [
        recursion(linear(), ddim_sample, {"steps": n, "eta": eta, "spacing": spacing})[1] / STD**2 - 1
        for n in (50, 100)
    ]
    assert -tolerance < error[0] < 0
    assert 1.7 < error[0] / error[1] < 2.1


# --- data for which a variance choice is exact (DDPM, section 3.2) ---


@pytest.mark.parametrize("make", [linear, cosine])
def test_beta_is_exact_for_standard_normal_data(make):
    """s = 1: every x_t is N(0, 1), which sigma² = beta keeps; the last, noiseless step leaves 1 - beta_0."""
    s = make(100)
    for evaluate, rtol in ((recursion, 1e-12), (measured, 1e-5)):
        got = evaluate(s, ddpm_sample, {"variance": "beta"}, 0.0, 1.0)
        np.testing.assert_allclose(got, (0, 1 - s.betas[0]), rtol=rtol)


@pytest.mark.parametrize("make", [linear, cosine])
def test_posterior_is_exact_for_a_point(make):
    """s = 0: all samples are m, and before that Var x_t = 1 - ab, once the start N(0, 1) is forgotten."""
    s, variances = make(100), {}
    eps, noise = GaussianEps(s, MEAN, 0.0), Impulses((101, 1, 1, 1))

    def keep(state):
        x = state.x.astype(np.float64).ravel()
        variances[state.t - 1] = np.sum((x - x[-1]) ** 2)  # 100 draws: image 100 gets no impulse

    x = ddpm_sample(eps, noise.draw(), s, noise, clip=False, callback=keep)
    np.testing.assert_allclose(x, np.float32(MEAN), rtol=1e-6)
    for t in range(0, 80):
        np.testing.assert_allclose(variances[t], 1 - s.alpha_bar_at(t), rtol=1e-3)


def test_ddim_of_standard_normal_data_is_a_product_of_cosines():
    """s = 1, eta = 0: x' = cos(theta_t - theta_t') x with cos(theta) = sqrt(ab): a rotation seen from one side."""
    s = linear(100)
    sequence = timestep_sequence(100, 20, "uniform")
    theta = np.arccos(np.sqrt([*s.alpha_bar[sequence], 1.0]))
    got = measured(s, ddim_sample, {"steps": 20}, 0.0, 1.0)
    np.testing.assert_allclose(got, (0, np.prod(np.cos(np.diff(theta))) ** 2), rtol=1e-5)
