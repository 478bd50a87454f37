# %% [markdown]
# # 07 Samplers
#
# *From DDPM's thousand noisy steps to DDIM's twenty without noise, and what is lost on the way.*
#
# **Run time**: 20 s on two cores. **Before this**: [06](06_ddpm.md).
#
# ## What you'll do
#
# Derive DDIM from DDPM by asking what the network really needs, write it in ten lines, turn its noise on and off,
# measure its error over the number of steps, walk through its latent space, and find out when an error of the network
# hurts.
#
# ## What you'll learn
#
# - Why one trained network serves a whole family of samplers.
# - That DDIM with `eta=1` and all steps *is* DDPM, and that with `eta=0` each step is a rotation.
# - How the error falls with the number of steps, and which part of it is due to where the steps begin.
# - Why comparisons of quantized models start from the same noise.
#
# ## What you'll need
#
# The notation of tutorial 06. No data set.

# %%
import matplotlib.pyplot as plt
import numpy as np

from refquant.diffusion.ddim import ddim_sample, ddim_sigma, ddim_step
from refquant.diffusion.ddpm import ddpm_sample
from refquant.diffusion.model import load_model
from refquant.diffusion.sampling import NoiseSource, timestep_sequence
from refquant.metrics import mse
from refquant.viz import labelled_rows

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# Equations of Song et al. 2021, whose $\alpha$ is the $\bar\alpha$ of DDPM and ours.
#
# | equation | function |
# |---|---|
# | one step, (12) | `refquant.diffusion.ddim.ddim_step` |
# | standard deviation of its noise, (16) | `refquant.diffusion.ddim.ddim_sigma` |
# | which time-steps are visited | `refquant.diffusion.sampling.timestep_sequence` |
# | the loop | `refquant.diffusion.ddim.ddim_sample` |
# | noise of image $i$ from (seed, $i$) | `refquant.diffusion.sampling.NoiseSource` |
#
# ## What the network needs
#
# A network was trained on $x_t$ with the distribution $q(x_t \vert x_0)$, and on nothing else: it has never seen two
# neighbouring states. So a step from $t$ to *any* less noisy $t'$ is as good as DDPM's, if it turns an $x_t$ of that
# distribution into an $x_{t'}$ of that distribution. Take $x_0$ and $\epsilon$ apart, and put them together again for
# $t'$; part of $\epsilon$ may be replaced by fresh noise $z$, as long as the variances add up to $1 - \bar\alpha'$:
#
# ```math
# x_{t'} = \sqrt{\bar\alpha'} \hat x_0 + \sqrt{1 - \bar\alpha' - \sigma^2} \hat\epsilon + \sigma z, \qquad
# \sigma = \eta \sqrt{\frac{1 - \bar\alpha'}{1 - \bar\alpha}} \sqrt{1 - \frac{\bar\alpha}{\bar\alpha'}}
# \qquad (12, 16)
# ```
#
# This holds for every $\sigma$. We check mean and variance over 200,000 values, within five standard errors.

# %%
model = load_model("mnist-unet")
schedule = model.schedule
alpha_bar = schedule.alpha_bar
rng = np.random.default_rng(0)

N, x_0 = 200_000, 0.6
eps, z = rng.standard_normal((2, N))
ab, ab_next = alpha_bar[700], alpha_bar[300]  # 400 steps in one
x_t = np.sqrt(ab) * x_0 + np.sqrt(1 - ab) * eps
for eta in (0.0, 0.5, 1.0):
    sigma = eta * np.sqrt((1 - ab_next) / (1 - ab)) * np.sqrt(1 - ab / ab_next)
    x = np.sqrt(ab_next) * x_0 + np.sqrt(1 - ab_next - sigma**2) * eps + sigma * z
    print(f"eta {eta}: mean {x.mean():.3f} of {np.sqrt(ab_next) * x_0:.3f}, ", end="")
    print(f"variance {x.var():.3f} of {1 - ab_next:.3f}, correlation with x_t {np.corrcoef(x, x_t)[0, 1]:.2f}")
    assert abs(x.mean() - np.sqrt(ab_next) * x_0) < 5 * np.sqrt((1 - ab_next) / N)
    assert abs(x.var() - (1 - ab_next)) < 5 * (1 - ab_next) * np.sqrt(2 / N)
    np.testing.assert_allclose(sigma, ddim_sigma(ab, ab_next, eta), rtol=1e-12)

# %% [markdown]
# The distributions agree; what differs is how much of $x_t$ is remembered. The sampler is a loop over that line:


# %%
def ddim(eps, x, times, eta, noise):
    """Walk through `times`, noisiest first, and on to the clean image."""
    for t, after in zip(times, [*times[1:], -1], strict=True):
        ab, ab_next = alpha_bar[t], alpha_bar[after] if after >= 0 else 1.0
        e = eps(x, t, None)
        x_0 = np.clip((x - np.sqrt(1 - ab) * e) / np.sqrt(ab), -1, 1)
        e = (x - np.sqrt(ab) * x_0) / np.sqrt(1 - ab)  # the noise that belongs to the clipped image
        sigma = eta * np.sqrt((1 - ab_next) / (1 - ab)) * np.sqrt(max(0, 1 - ab / ab_next))
        x = np.sqrt(ab_next) * x_0 + np.sqrt(1 - ab_next - sigma**2) * e
        x = (x + sigma * noise.draw() if sigma > 0 else x).astype(np.float32)
    return x


eps = model.denoiser(chunk=2)
for eta in (0.0, 1.0):
    noise = NoiseSource(seed=0, count=4, shape=model.image_shape)
    on_page = ddim(eps, noise.draw(), timestep_sequence(1000, 5, "uniform"), eta, noise)
    noise = NoiseSource(seed=0, count=4, shape=model.image_shape)
    in_library = ddim_sample(eps, noise.draw(), schedule, noise, steps=5, eta=eta)
    np.testing.assert_allclose(on_page, in_library, atol=1e-3)  # factors in float64 here, in float32 there

# %% [markdown]
# ## With eta = 1 and all steps it is DDPM
#
# Between neighbours, (16) with $\eta = 1$ is the posterior's standard deviation, at every $t$. So the two samplers,
# fed the same noise, must walk the same way. We let them find the two points of tutorial 06.


# %%
def two_points(x, t, step):
    """The perfect noise predictor of data that is -1 or 1."""
    guess = np.tanh(np.sqrt(alpha_bar[t]) * x.astype(np.float64) / (1 - alpha_bar[t]))
    return ((x - np.sqrt(alpha_bar[t]) * guess) / np.sqrt(1 - alpha_bar[t])).astype(np.float32)


for t in range(1, 1000):
    variance = ddim_sigma(alpha_bar[t], alpha_bar[t - 1], eta=1) ** 2
    np.testing.assert_allclose(variance, schedule.posterior_variance(t), rtol=1e-9)

paths = {}
for name, sampler, options in (("ddpm", ddpm_sample, {}), ("ddim", ddim_sample, {"steps": 1000, "eta": 1.0})):
    noise = NoiseSource(seed=1, count=1, shape=(1, 1, 500))
    path = paths[name] = []
    sampler(two_points, noise.draw(), schedule, noise, clip=False, callback=path.append, **options)
apart = max(np.abs(a.x - b.x).max() for a, b in zip(paths["ddpm"], paths["ddim"], strict=True))
print(f"the paths are never more than {apart:.0e} apart, on a way of length 1 and more")
assert apart < 1e-3  # float32; a sigma wrong by 1 % would part them by about 1 % of the noise

# %% [markdown]
# ## With eta = 0 each step is a rotation
#
# Write $\cos\varphi = \sqrt{\bar\alpha}$ and recall that $(x_t, v)$ is $(x_0, \epsilon)$ turned by $\varphi$. To take
# $x_0$ and $\epsilon$ apart and put them together for $\varphi'$ is to turn back by $\varphi - \varphi'$. What makes
# the path curved is that the network corrects $v$ at every stop; the fewer the stops, the more the straight pieces
# cut the corners.

# %%
phi = np.arccos(np.sqrt(alpha_bar))
x, v = rng.standard_normal((2, 4, 1, 8, 8)).astype(np.float32)
e = np.float32(np.sin(phi[700])) * x + np.float32(np.cos(phi[700])) * v
by_library, _ = ddim_step(x, e, alpha_bar[700], alpha_bar[300], sigma=0.0, clip=False)
turn = phi[700] - phi[300]
np.testing.assert_allclose(by_library, np.cos(turn) * x - np.sin(turn) * v, atol=1e-5)

# %% [markdown]
# ## How many steps?
#
# For data $x_0 \sim N(0, 1)$ the perfect predictor is $\hat\epsilon = \sqrt{1-\bar\alpha_t} x_t$, and the exact path
# stands still. DDIM with $n$ steps shrinks it by $\prod \cos(\Delta\varphi)$, an error of about $(\pi/2)^2 / 2n$:
# half the error for twice the steps, no more. DDIM is a method of first order.
#
# Is the shipped model like that? We compare with a fine path of 200 steps. And we try two ways of placing the steps:
# the usual one ends at $t = 0$ and *begins* at $T - c$, though the noise it is given belongs to $t = T - 1$; the
# other begins at the top.


# %%
def usual(n):
    return timestep_sequence(1000, n, "uniform")


def from_the_top(n):
    return [999 - i * (1000 // n) for i in range(n)]


x = np.ones((1, 1, 1, 1), np.float32)
counts = np.array([5, 10, 20, 50])
of_formula = []
for n in counts:
    noise = NoiseSource(seed=0, count=1, shape=(1, 1, 1))
    y = ddim_sample(
        lambda x, t, step: np.float32(np.sqrt(1 - alpha_bar[t])) * x, x, schedule, noise, steps=int(n), clip=False
    )
    of_formula.append(1 - y.item())
    expected = np.prod(np.cos(np.diff([0.0, *phi[usual(n)][::-1]])))
    assert abs(y.item() - expected) < 1e-5
np.testing.assert_allclose(of_formula[2] / of_formula[3], 50 / 20, rtol=0.1)  # first order

start = NoiseSource(seed=5, count=4, shape=model.image_shape).draw()
eps = model.denoiser(chunk=2)
reference = ddim(eps, start, from_the_top(200), 0.0, None)
error = {
    name: np.array([np.sqrt(mse(ddim(eps, start, place(n), 0.0, None), reference)) for n in counts])
    for name, place in (("as usual", usual), ("from the top", from_the_top))
}

# %% Figure: Error over the number of steps. Along the dotted line: first order. Few steps suffer from their start, too.
figure, axes = plt.subplots()
for (name, values), style in zip(error.items(), ("o-", "s--"), strict=True):
    axes.loglog(counts, values, style, label=f"shipped model, steps placed {name}")
axes.loglog(counts, of_formula, "^-.", label="N(0, 1), by formula")
axes.loglog(counts, 1 / counts, ":", color="black", label="1 / n")
axes.set_xticks(counts, counts)
axes.set_yticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
axes.minorticks_off()
axes.set(xlabel="number of steps n", ylabel="root mean squared error")
axes.legend()
plt.show()

# %%
for name, values in error.items():
    order = np.log(values[1] / values[3]) / np.log(5)
    print(f"{name}: {values.round(3)}, order {order:.2f} from 10 to 50 steps")
    assert 0.6 < order < 1.7
assert error["from the top"][0] < error["as usual"][0]

# %% [markdown]
# A method of second order would fall twice as steeply; a line that flattens would mean that further steps are wasted.
# What this does *not* show is the error of the network itself, as the fine path has that, too. The papers of this
# field place the steps as usual, and so does the library.
#
# ## The same noise, the same image
#
# Without fresh noise the image is a function of the starting noise, to the bit. `NoiseSource` makes the noise of
# image $i$ from the seed and $i$ alone, so the first four of eight are the four.

# %%
eight = NoiseSource(seed=4, count=8, shape=model.image_shape)
four = NoiseSource(seed=4, count=4, shape=model.image_shape)
eps = model.denoiser(chunk=4)
images = ddim_sample(eps, eight.draw(), schedule, eight, steps=20)
np.testing.assert_array_equal(images[:4], ddim_sample(eps, four.draw(), schedule, four, steps=20))

# %% [markdown]
# This is why a quantized model is compared with its original *from the same noise*: what differs is the quantization.
# It also makes the noise a coordinate system. Between two noises lies an arc of noises (a straight line would be too
# quiet: half of each has variance 1/2), and an image belongs to each point.

# %% Figure: Left and right two digits from their own noise; between them, images from the arc between the two noises.
a, b = NoiseSource(seed=4, count=8, shape=model.image_shape).draw()[[0, 1]]
angles = np.linspace(0, np.pi / 2, 9, dtype=np.float32)
arc = np.stack([np.cos(w) * a + np.sin(w) * b for w in angles])
between = ddim_sample(eps, arc, schedule, eight, steps=20)
straight = 0.5 * (a + b)
print(f"variance in the middle: {arc[4].var():.2f} on the arc, {straight.var():.2f} on the straight line")
assert abs(arc[4].var() - 1) < 0.2 and straight.var() < 0.7
np.testing.assert_allclose(between[[0, 8]], images[[0, 1]], atol=0.01)  # other chunks, so other last bits
picture = labelled_rows([("arc", between)], scale=2)
plt.figure(figsize=(picture.shape[1] / 100, picture.shape[0] / 100)).figimage(picture)
plt.show()

# %% [markdown]
# The image changes slowly in places and at once in others. Where it changes at once, a small disturbance makes
# another digit, and a few such images can decide a mean of squared errors.
#
# With $\eta > 0$ the fresh noise has a say. From one start and two streams of fresh noise come two images; how far
# apart are they?

# %% Figure: Each pair of rows has one starting noise and two streams of fresh noise. Their distance grows with eta.
rows, distance = [], []
start = NoiseSource(seed=4, count=6, shape=model.image_shape).draw()
for eta in (0.0, 0.3, 1.0):
    pair = [
        ddim_sample(eps, start, schedule, NoiseSource(seed, 6, model.image_shape), steps=20, eta=eta) for seed in (1, 2)
    ]
    rows += [(f"eta = {eta}, {which}", images) for which, images in zip("ab", pair, strict=True)]
    distance.append(mse(*pair))
print("squared distance of the pairs:", np.round(distance, 3))
assert distance[0] == 0 and 0 < distance[1] < distance[2]
picture = labelled_rows(rows, scale=2)
plt.figure(figsize=(picture.shape[1] / 100, picture.shape[0] / 100)).figimage(picture)
plt.show()

# %% [markdown]
# ## When does an error hurt?
#
# A quantized network errs at every step. Let it err at one step only, by random noise of size 0.1, and look at the
# image in the end. If all steps were alike, the curves would be flat; if fresh noise washed old errors away, as one
# might hope, the curve of $\eta = 1$ would lie below that of $\eta = 0$. We try errors of $\epsilon$, and errors of
# $v$, which is what the network says: a factor $\sqrt{\bar\alpha_t}$ is between them.

# %%
N, at = 4, [0, 3, 9, 19]
bump = np.float32(0.1) * rng.standard_normal((N, *model.image_shape), dtype=np.float32)
eps = model.denoiser(chunk=2)


def draw(eta, wrong_step=None, of="eps"):
    def erring(x, t, step):
        factor = np.float32(np.sqrt(alpha_bar[t]) if of == "v" else 1)
        return eps(x, t, step) + (factor * bump if step == wrong_step else 0)

    noise = NoiseSource(seed=4, count=N, shape=model.image_shape)
    return ddim_sample(erring, noise.draw(), schedule, noise, steps=20, eta=eta)


right, harm = {eta: draw(eta) for eta in (0.0, 1.0)}, {}
for of, eta in (("eps", 0.0), ("eps", 1.0), ("v", 0.0)):
    harm[of, eta] = np.array([np.sqrt(mse(draw(eta, step, of), right[eta])) for step in at])
    print(f"error in {of}, eta {eta}: {harm[of, eta].round(4)}")
assert harm["eps", 0.0][0] > 20 * harm["eps", 0.0][-1] and harm["v", 0.0].argmax() < 2
assert harm["eps", 1.0][2] > harm["eps", 0.0][2] / 3  # an error half-way is not washed away

# %% Figure: What an error of 0.1 at one step of twenty does to the final image. Early ones cost most, whatever eta is.
figure, axes = plt.subplots()
for ((of, eta), values), style in zip(harm.items(), ("o-", "s--", "^-."), strict=True):
    axes.semilogy(at, values, style, label=f"error in {of}, eta = {eta}")
axes.set(xlabel="step at which the network errs, 0 the noisiest", ylabel="RMSE of the image")
axes.set_xticks(at)
axes.legend()
plt.show()

# %% [markdown]
# Two lessons for quantization. What the network gets wrong in the early steps costs most, and far more in a network
# that predicts $\epsilon$ than in one that predicts $v$. And fresh noise does not wash errors away: the curve of
# $\eta = 1$ lies below the other at one step and above it at others. It moves the image, it does not repair it.
#
# ## Where this differs from the authors' code
#
# - The steps are those of ermongroup/ddim (`runners/diffusion.py`): uniform, or quadratic with `spacing="quadratic"`.
# - Clipping: that code (`functions/denoising.py`, commit 270890e) clips $\hat x_0$ in DDPM, and nothing in DDIM.
#   Here, by default, $\hat x_0$ is clipped to $[-1, 1]$ and $\hat\epsilon$ computed again from it; `clip=False` is
#   the authors' formula.
# - Noise is drawn image by image from streams of its own, so results do not depend on how many images are drawn
#   together.
#
# ## On your own
#
# 1. A method of second order: take a step of DDIM to $t'$, ask the network there, and repeat the step with the mean
#    of the two answers $v$ (Heun). Does the error fall as $1/n^2$? Count network calls, not steps.
# 2. Walk backwards: `ddim` from an image at $t = 0$ up to $t = 980$ with the times in reverse. Does the way down
#    return the image? With how many steps?
# 3. Let the network err at every step, by an amount proportional to its answer. Which steps should get more bits?
