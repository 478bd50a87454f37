# %% [markdown]
# # 06 DDPM
#
# *Noise in a thousand small steps or in one, three ways to say what is noise, and the way back.*
#
# **Run time**: 20 s on two cores. **Before this**: [05](05_tiny_unet.md).
#
# ## What you'll do
#
# Write the forward process, the posterior and the ancestral sampler of DDPM in a few lines each. Try them on data so
# simple that the perfect noise predictor is a formula: two points. Then draw digits with the shipped model, all
# thousand steps.
#
# ## What you'll learn
#
# - Why the noise of a thousand steps can be added at once.
# - That predicting the noise, the image, or v is the same, up to a factor that weighs the time-steps differently.
# - Where the mean and the variance of a step back come from, and why the last step adds no noise.
# - When a sampler decides what it draws.
#
# ## What you'll need
#
# Gaussians: their sum, their product, Bayes' rule. No data set.

# %%
import matplotlib.pyplot as plt
import numpy as np

from refquant.autograd import Tensor
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.ddpm import ddpm_sample, predict_x_0
from refquant.diffusion.denoiser import Denoiser, target
from refquant.diffusion.model import load_model
from refquant.diffusion.sampling import NoiseSource
from refquant.diffusion.schedule import cosine, linear
from refquant.viz import PALETTE, labelled_rows

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# Equations of Ho et al. 2020. Their $t$ runs from 1, ours from 0: `t = 0` is one step of noise.
#
# | equation | function |
# |---|---|
# | $x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1-\bar\alpha_t} \epsilon$ (4) | `refquant.diffusion.schedule.Schedule` |
# | cosine schedule (Nichol & Dhariwal 2021, eq. 17) | `refquant.diffusion.schedule.cosine` |
# | $\hat x_0$ from $\hat\epsilon$ (15) | `refquant.diffusion.ddpm.predict_x_0` |
# | $v = \sqrt{\bar\alpha_t} \epsilon - \sqrt{1-\bar\alpha_t} x_0$ | `refquant.diffusion.denoiser.target` |
# | $\tilde\mu_t$, $\tilde\beta_t$ (7), in the sampler (Algorithm 2) | `refquant.diffusion.ddpm.ddpm_sample` |
#
# ## Schedules
#
# A step of the forward process keeps $\sqrt{1 - \beta_t}$ of the image and adds noise of variance $\beta_t$. A
# *schedule* is the list of $\beta_t$; it is usually told by $\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)$, the share
# of the image's power that is left. Two are in common use.

# %%
T = 1000
betas = np.linspace(1e-4, 0.02, T)  # linear: Ho et al.
np.testing.assert_array_equal(betas, linear().betas)

f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2  # cosine: wanted alpha_bar, from which the betas
betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
np.testing.assert_array_equal(betas, cosine().betas)
alpha_bar = np.cumprod(1 - betas)
np.testing.assert_array_equal(alpha_bar, cosine().alpha_bar)

# %% [markdown]
# How evenly does a schedule fall? Look at the signal-to-noise ratio $\bar\alpha_t / (1 - \bar\alpha_t)$, and count
# the steps on which less than 1 % of the power is the image's: they can tell the sampler little.

# %% Figure: What is left of the image, and signal to noise. The linear schedule spends its last third on noise.
figure, axes = plt.subplots(1, 2)
for schedule, colour, style in ((linear(), PALETTE[1], "--"), (cosine(), PALETTE[0], "-")):
    ab = schedule.alpha_bar
    print(f"{schedule.name}: {np.sum(ab < 0.01)} steps with under 1 % of the power, the last has {ab[-1]:.0e}")
    axes[0].plot(np.sqrt(ab), style, color=colour, label=schedule.name)
    axes[1].plot(10 * np.log10(ab / (1 - ab)), style, color=colour)
axes[0].set(xlabel="time-step t", ylabel="sqrt(alpha_bar)")
axes[1].set(xlabel="time-step t", ylabel="signal to noise / dB", ylim=(-50, 45))
axes[0].legend()
assert np.sum(linear().alpha_bar < 0.01) > 4 * np.sum(cosine().alpha_bar < 0.01)
plt.show()

# %% [markdown]
# ## A thousand steps are one
#
# A Gaussian plus a Gaussian is a Gaussian: if $x_{t-1}$ has mean $m x_0$ and variance $s$, then $x_t$ has mean
# $\sqrt{1-\beta_t} m x_0$ and variance $(1-\beta_t) s + \beta_t$. Follow the two numbers for a thousand steps, and
# the closed form (4) comes out. So training never walks: it jumps to any $t$. We check the two numbers exactly, and
# the walk of 20,000 values statistically: mean and variance within five of their standard errors.

# %%
rng = np.random.default_rng(0)
N, x_0 = 20_000, 0.8
x, m, s = np.full(N, x_0), 1.0, 0.0
for t in range(T):
    x = np.sqrt(1 - betas[t]) * x + np.sqrt(betas[t]) * rng.standard_normal(N)
    m, s = np.sqrt(1 - betas[t]) * m, (1 - betas[t]) * s + betas[t]
    assert abs(m - np.sqrt(alpha_bar[t])) < 1e-12 and abs(s - (1 - alpha_bar[t])) < 1e-12
    if t in (9, 99, 499, 999):
        print(f"t = {t:3}: mean {x.mean():.4f} of {m * x_0:.4f}, variance {x.var():.4f} of {s:.4f}")
        assert abs(x.mean() - m * x_0) < 5 * np.sqrt(s / N) and abs(x.var() - s) < 5 * s * np.sqrt(2 / N)

# %% [markdown]
# ## Three names for one answer
#
# Given $x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} \epsilon$, who knows $\epsilon$ knows $x_0$, and the
# other way round. Write $\cos\varphi = \sqrt{\bar\alpha_t}$ and $\sin\varphi = \sqrt{1-\bar\alpha_t}$: $(x_t, v)$ is
# the pair $(x_0, \epsilon)$ turned by the angle $\varphi$. Turning back is exact.

# %%
t = 700
c, s = np.sqrt(alpha_bar[t]), np.sqrt(1 - alpha_bar[t])
x_0, eps = rng.uniform(-1, 1, (4, 1, 8, 8)), rng.standard_normal((4, 1, 8, 8))
x_t, v = c * x_0 + s * eps, c * eps - s * x_0
np.testing.assert_allclose(c * x_t - s * v, x_0, atol=1e-12)
np.testing.assert_allclose(s * x_t + c * v, eps, atol=1e-12)
np.testing.assert_allclose((x_t - s * eps) / c, x_0, atol=1e-12)  # (15)

# The library: what is asked of a network, and how a network that answers v is made a predictor of eps.
schedule = cosine()
np.testing.assert_array_equal(schedule.q_sample(x_0, np.full(4, t), eps), x_t)
np.testing.assert_array_equal(target("v", schedule, x_0, np.full(4, t), eps), v)
perfect = Denoiser(lambda x, t: Tensor(v.transpose(0, 2, 3, 1)), v_of=schedule)  # networks are (N, H, W, C)
np.testing.assert_allclose(perfect(x_t, t, step=0), eps, atol=1e-12)
np.testing.assert_allclose(predict_x_0(x_t, eps, alpha_bar[t], clip=False), x_0, atol=1e-6)  # factors in float32

# %% [markdown]
# What differs is the price of a mistake. As $x_t$ is given, an error $e$ in $v$ is an error $\cos\varphi \cdot e$ in
# $\epsilon$ and $-\sin\varphi \cdot e$ in $x_0$. Here is what the shipped model's errors, on digits that it drew
# itself, are in each currency. If the choice did not matter, the curves would be parallel.

# %% Figure: Mean squared error of the shipped model over t, told as an error of eps, of v, and of the image.
model = load_model("mnist-unet")
assert model.schedule.name == "cosine" and model.prediction == "v"
noise = NoiseSource(seed=0, count=8, shape=model.image_shape)
digits = ddim_sample(model.denoiser(chunk=4), noise.draw(), schedule, noise, steps=20)
added = noise.draw()
where = np.array([2, 20, 60, *range(100, 1000, 100), 960, 990])
in_eps = []
for t in where:
    x_t = schedule.q_sample(digits, np.full(8, t), added)
    in_eps.append(np.mean((model.denoiser(chunk=4)(x_t, int(t), 0) - added) ** 2))
in_v = np.array(in_eps) / alpha_bar[where]
figure, axes = plt.subplots()
axes.semilogy(where, in_eps, "o-", label="of eps")
axes.semilogy(where, in_v, "s--", label="of v")
axes.semilogy(where, in_v * (1 - alpha_bar[where]), "^-.", label="of the image")
axes.set(xlabel="time-step t", ylabel="mean squared error")
axes.legend()
plt.show()

# %%
factor = np.sqrt((1 - alpha_bar) / alpha_bar)
for t in (10, 500, 990):
    print(f"t = {t:3}: an error in eps is {factor[t]:5.2f} times as large in the image")
assert factor[10] < 0.1 and factor[990] > 50
assert in_eps[-1] < in_eps[0] / 10 and in_v[-1] > in_v[-4]  # noisy steps: easy in eps, the hardest in v

# %% [markdown]
# A network that predicts $\epsilon$ is praised most where it has least to do: at high noise $x_t$ *is* nearly
# $\epsilon$. In $v$ those steps, which decide what the image shows, weigh most. The shipped model predicts $v$.
#
# ## One step back
#
# If $x_0$ were known, the step back would be Bayes' rule:
# $q(x_{t-1} \vert x_t, x_0) \propto q(x_t \vert x_{t-1}) q(x_{t-1} \vert x_0)$, a product of two Gaussians. Multiply
# them on a fine grid of $x_{t-1}$ and measure mean and variance; they are those of (7).

# %%
t, x_0, x_t = 400, 0.5, -0.3
ab, ab_before, beta = alpha_bar[t], alpha_bar[t - 1], betas[t]

grid = np.linspace(-2, 2, 400_001)
q = np.exp(-((x_t - np.sqrt(1 - beta) * grid) ** 2) / (2 * beta))  # of x_t, given each x_{t-1} of the grid
q *= np.exp(-((grid - np.sqrt(ab_before) * x_0) ** 2) / (2 * (1 - ab_before)))  # of x_{t-1}, given x_0
q /= q.sum()
mean = (q * grid).sum()
variance = (q * (grid - mean) ** 2).sum()

on_x_0 = np.sqrt(ab_before) * beta / (1 - ab)  # (7)
on_x_t = np.sqrt(1 - beta) * (1 - ab_before) / (1 - ab)
posterior_mean, posterior = on_x_0 * x_0 + on_x_t * x_t, beta * (1 - ab_before) / (1 - ab)
print(f"on the grid: mean {mean:.9f}, variance {variance:.9f}")
print(f"by formula:  mean {posterior_mean:.9f}, variance {posterior:.9f}")
np.testing.assert_allclose((mean, variance), (posterior_mean, posterior), atol=1e-8)
np.testing.assert_allclose(schedule.posterior_variance(t), posterior, rtol=1e-12)

eps = (x_t - np.sqrt(ab) * x_0) / np.sqrt(1 - ab)  # the paper's (11) is the same mean, told in eps
np.testing.assert_allclose((x_t - beta / np.sqrt(1 - ab) * eps) / np.sqrt(1 - beta), posterior_mean, rtol=1e-9)
assert schedule.posterior_variance(0) == 0  # before t = 0 there is the image itself, of which nothing is uncertain

# %% [markdown]
# ## The best guess, where it is a formula
#
# In truth $x_0$ is unknown, and the network that minimises the squared error says the mean of all it could be,
# $E[x_0 \vert x_t]$. Let the data be two points, -1 and 1, equally likely. Bayes' rule gives
# $E[x_0 \vert x_t] = \tanh(\sqrt{\bar\alpha_t} x_t / (1 - \bar\alpha_t))$. We check it against averages over drawn
# pairs, then hand it to the sampler as a perfect network.


# %%
def guess(x, t):
    return np.tanh(np.sqrt(alpha_bar[t]) * x / (1 - alpha_bar[t]))


def perfect_eps(x, t, step):
    """What samplers call, see tutorial 07 for the arguments."""
    x = x.astype(np.float64)
    return ((x - np.sqrt(alpha_bar[t]) * guess(x, t)) / np.sqrt(1 - alpha_bar[t])).astype(np.float32)


points = rng.choice([-1.0, 1.0], 200_000)
x_t = np.sqrt(alpha_bar[500]) * points + np.sqrt(1 - alpha_bar[500]) * rng.standard_normal(points.size)
for low in (-1.0, -0.25, 0.0, 0.5):
    here = (low <= x_t) & (x_t < low + 0.05)
    found, formula = points[here].mean(), guess(x_t[here], 500).mean()
    print(f"x_t near {low + 0.025:6.3f}: mean of x_0 {found:6.3f}, formula {formula:6.3f}")
    assert abs(found - formula) < 5 / np.sqrt(here.sum())

# %% [markdown]
# Algorithm 2 is a loop over (7) with the guess in the place of $x_0$. From 2,000 numbers of pure noise it must find
# its way to the two points, half of them to each. The library's sampler, given the same noise, walks the same way.

# %%
shape = (1, 1, 2000)  # one "image" of 2,000 independent values
noise = NoiseSource(seed=1, count=1, shape=shape)
x = noise.draw()
walk, guesses = [x], []
for t in reversed(range(T)):
    ab, ab_before, beta = alpha_bar[t], alpha_bar[t - 1] if t > 0 else 1.0, betas[t]
    x_0 = (x - np.sqrt(1 - ab) * perfect_eps(x, t, None)) / np.sqrt(ab)
    x = np.sqrt(ab_before) * beta / (1 - ab) * x_0 + np.sqrt(1 - beta) * (1 - ab_before) / (1 - ab) * x
    if t > 0:  # the last step adds no noise
        x = x + np.sqrt(beta * (1 - ab_before) / (1 - ab)) * noise.draw()
    walk.append(x)
    guesses.append(x_0)

noise = NoiseSource(seed=1, count=1, shape=shape)
states = []
y = ddpm_sample(perfect_eps, noise.draw(), schedule, noise, clip=False, callback=states.append)
np.testing.assert_allclose(y, x, atol=1e-3)  # float32 in the library, float64 here
np.testing.assert_allclose(states[500].x, walk[501], atol=1e-2)

assert np.abs(np.abs(y) - 1).max() < 1e-4  # on the points, all of them
print(f"{(y > 0).mean():.1%} at 1")
assert abs((y > 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(2000)
np.testing.assert_array_equal(states[-1].x, states[-1].x_0)  # the last mean is the guess itself: on_x_0 = 1, on_x_t = 0

# %% [markdown]
# When does a value decide where it goes? Ask for the last step at which its guess changed sign. If every step
# mattered alike the curve on the right would be a straight line down to t = 0.

# %% Figure: Forty values on their way from noise to two points, and the share that has decided. The end only polishes.
walk, guesses = np.array(walk)[:, 0, 0, 0], np.array(guesses)[:, 0, 0, 0]
decided = T - 1 - (np.diff(np.sign(guesses), axis=0) != 0).cumsum(axis=0).argmax(axis=0)
figure, axes = plt.subplots(1, 2)
axes[0].plot(np.arange(T, -1, -1), walk[:, :40], color=PALETTE[0], linewidth=0.4)
axes[0].set(xlabel="time-step t", ylabel="value", xlim=(T, 0))
axes[1].plot(np.sort(decided)[::-1], np.arange(2000) / 20, color=PALETTE[1])
axes[1].set(xlabel="time-step t", ylabel="have decided / %", xlim=(T, 0))
plt.show()

# %%
low, median = np.quantile(decided, [0.05, 0.5])
print(f"half have decided at t = {median:.0f}, 95 % at {low:.0f}; {np.mean(decided < 200):.1%} decide after t = 200")
assert 500 < median < 800 and np.mean(decided < 200) < 0.02  # 20 %, if all steps mattered alike

# %% [markdown]
# ## Digits, in a thousand steps
#
# The same function, with the network in the place of the formula. Two digits, a thousand calls each.

# %% Figure: Two digits on their way: the state x_t, and the image that the network sees in it.
noise = NoiseSource(seed=3, count=2, shape=model.image_shape)
moments, states = [0, 100, 200, 300, 400, 500, 700, 850, 999], {}
images = ddpm_sample(
    model.denoiser(chunk=1), noise.draw(), model.schedule, noise, callback=lambda s: states.setdefault(s.step, s)
)
rows = []
for i in (0, 1):
    for what in ("x", "x_0"):
        rows.append((f"digit {i + 1}, {what}", np.stack([getattr(states[k], what)[i] for k in moments])))
picture = labelled_rows(rows, scale=2)
plt.figure(figsize=(picture.shape[1] / 100, picture.shape[0] / 100)).figimage(picture)
plt.show()

# %%
np.testing.assert_array_equal(images, states[999].x_0)  # no noise in the last step
change = [float(np.mean((states[k].x_0 - images) ** 2)) for k in moments]
print("squared distance of the predicted image to the final one:", np.round(change, 3))
assert change[0] > 0.1 and change[-3] < change[0] / 5

# %% [markdown]
# ## Where this differs from the authors' code
#
# - Time-steps count from 0 (as in improved-diffusion); the paper's $\bar\alpha_0 = 1$ is `alpha_bar_at(-1)` here.
# - The variance of a step is the posterior's by default, right for data that is a point, as above. The PyTorch port
#   (ermongroup/ddim, `functions/denoising.py`, commit 270890e) uses $\beta_t$; `variance="beta"` does, too. Section
#   3.2 of the paper finds them alike.
# - Schedules are float64 throughout. The shipped model has the cosine schedule and predicts $v$; the paper's network
#   has the linear one and predicts $\epsilon$.
# - In training, the time-steps of a batch are stratified: `refquant.diffusion.train`.
#
# ## On your own
#
# 1. Add noise of variance $\beta_0$ in the last step. How far from the two points do the values end? Is it
#    $\sqrt{\beta_0}$?
# 2. Replace the two points by -1 with probability 0.9 and 1 with 0.1. What is $E[x_0 \vert x_t]$ now, and when does a
#    value decide?
# 3. Sample the two points with the *linear* schedule. How many of the thousand steps pass before anything is decided?
