# %% [markdown]
# # 05 A tiny UNet
#
# *The whole network in sixty lines of NumPy, block by block: its shapes, its cost, where time enters, how far it sees.*
#
# **Run time**: 20 s on two cores. **Before this**: [04](04_a_tape_in_150_lines.md).
#
# ## What you'll do
#
# Write the network of the shipped model in plain NumPy, load its weights, and get what the library gets. Count its
# parameters and multiplications. Lie to it about the time-step. Look at what one pixel of the answer depends on.
# Train a smaller one from nothing until its loss falls.
#
# ## What you'll learn
#
# - Which five operations a diffusion UNet consists of, and how its skips are wired.
# - That parameters and work are in different places, which decides what quantization buys where.
# - What the network is told about the time-step, through which layers, and what a wrong time-step costs.
#
# ## What you'll need
#
# NumPy, and an idea of what a convolution is. No data set: we learn from shapes that are drawn on the spot.

# %%
import matplotlib.pyplot as plt
import numpy as np

from refquant.autograd import Tensor, gradients, no_grad, ops
from refquant.data import shapes
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.denoiser import Denoiser, target
from refquant.diffusion.model import load_model
from refquant.diffusion.sampling import NoiseSource
from refquant.diffusion.schedule import cosine
from refquant.diffusion.train import train
from refquant.nn.fit import FitConfig
from refquant.nn.networks import config
from refquant.nn.unet import UNet, UNetConfig, timestep_embedding
from refquant.quant.cost import bit_operations
from refquant.quant.quantized import QuantizedModel
from refquant.quant.units import temporal_layers
from refquant.quant.wrap import wrap
from refquant.viz import PALETTE

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | equation | function |
# |---|---|
# | $[\sin(t f_j), \cos(t f_j)]$ with $f_j = 10000^{-j/(C/2 - 1)}$ | `refquant.nn.unet.timestep_embedding` |
# | $h = \mathrm{conv}(\mathrm{SiLU}(\mathrm{norm}(x))) + \mathrm{proj}(u_t)$, and so on | `refquant.nn.unet.ResBlock` |
# | $x + \mathrm{proj}(\mathrm{softmax}(q k^T / \sqrt C) v)$ | `refquant.nn.unet.AttentionBlock` |
# | the whole (Ho et al. 2020, appendix B) | `refquant.nn.unet.UNet` |
#
# ## Five operations
#
# The weights of the shipped model are a dictionary of arrays with names such as `down.0.block.0.conv1.weight`. We
# write each operation as a function of an array and such a name. Images are $(N, H, W, C)$, channels last, so that
# every operation but attention is a matrix product over the last axis or works on it. Each function also notes what
# it cost.

# %%
model = load_model("mnist-unet")
weights, cfg = model.network.state_dict(), model.network.cfg
notes = []  # (name, parameters, multiplications an image)


def note(name, multiplications):
    size = sum(w.size for key, w in weights.items() if key.rpartition(".")[0] == name)
    notes.append((name, size, multiplications))


def silu(x):
    return x / (1 + np.exp(-x))


def linear(x, name):
    """(..., C) -> (..., O)."""
    w = weights[f"{name}.weight"].reshape(len(weights[f"{name}.bias"]), -1)
    note(name, x[0].size // x.shape[-1] * w.size)
    return x @ w.T + weights[f"{name}.bias"]


def conv(x, name, stride=1, pads=((1, 1), (1, 1))):
    """A 3x3 window: nine matrix products on shifted images, added."""
    w = weights[f"{name}.weight"]  # (O, 3, 3, C)
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    h, width = ((n - 3) // stride + 1 for n in x.shape[1:3])
    y = weights[f"{name}.bias"]
    for i, j in np.ndindex(3, 3):
        y = y + x[:, i : i + stride * h : stride, j : j + stride * width : stride][:, :h, :width] @ w[:, i, j].T
    note(name, h * width * w.size)
    return y


def norm(x, name, eps=1e-6):
    """Mean 0 and variance 1 for each image and group of channels, then scale and shift for each channel."""
    n, h, w, c = x.shape
    groups = x.reshape(n, h * w, cfg.groups, -1)
    mean, variance = groups.mean(axis=(1, 3), keepdims=True), groups.var(axis=(1, 3), keepdims=True)
    note(name, 0)
    normed = ((groups - mean) / np.sqrt(variance + eps)).reshape(x.shape)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


# %% [markdown]
# Of these we make the two blocks. A **ResBlock** adds what two convolutions make of its input to that input; between
# the two, it adds a number to each channel that depends on the time-step alone. An **attention block** lets every
# pixel look at every other one, which is affordable where there are $7 \times 7$ of them.


# %%
def resblock(x, u, name):
    """x (N, H, W, C), and u (N, E), what the network knows of the time-step."""
    h = conv(silu(norm(x, f"{name}.norm1")), f"{name}.conv1")
    h = h + linear(silu(u), f"{name}.temb_proj")[:, None, None, :]  # here time enters
    h = conv(silu(norm(h, f"{name}.norm2")), f"{name}.conv2")
    shortcut = f"{name}.nin_shortcut"
    return h + (linear(x, shortcut) if f"{shortcut}.weight" in weights else x)


def attention(x, name):
    n, h, w, c = x.shape
    tokens = norm(x, f"{name}.norm").reshape(n, h * w, c)
    q, k, v = (linear(tokens, f"{name}.{part}") for part in "qkv")
    scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(c))
    mixed = scores / scores.sum(axis=-1, keepdims=True) @ v
    note(f"{name}.product", 2 * (h * w) ** 2 * c)
    return x + linear(mixed, f"{name}.proj_out").reshape(x.shape)


def block(x, u, name, i):
    x = resblock(x, u, f"{name}.block.{i}")
    return attention(x, f"{name}.attn.{i}") if f"{name}.attn.{i}.q.weight" in weights else x


# %% [markdown]
# And of the blocks, the network. On the way down each level halves the image; on the way up it doubles it, and every
# block gets, beside its input, an array that was put aside on the way down: the **skips**, taken back in reverse
# order.


# %%
def embed(t, channels):
    """Sinusoids of the time-step, from fast to slow: (N,) -> (N, channels)."""
    half = channels // 2
    angle = t[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def unet(x, t):
    """x (N, H, W, 1) and t (N,) -> v (N, H, W, 1), see tutorial 06."""
    levels = range(len(cfg.multipliers))
    u = linear(silu(linear(embed(t, cfg.channels), "temb.dense.0")), "temb.dense.1")
    h = conv(x, "conv_in")
    skips = [h]
    for i in levels:
        h = block(h, u, f"down.{i}", 0)
        skips.append(h)
        if i != levels[-1]:
            h = conv(h, f"down.{i}.downsample.conv", stride=2, pads=((0, 1), (0, 1)))
            skips.append(h)
    h = resblock(h, u, "mid.block_1")
    h = resblock(attention(h, "mid.attn_1"), u, "mid.block_2")
    for i in reversed(levels):
        for j in (0, 1):
            h = block(np.concatenate([h, skips.pop()], axis=-1), u, f"up.{i}", j)
        if i > 0:
            h = conv(h.repeat(2, axis=1).repeat(2, axis=2), f"up.{i}.upsample.conv")
    return conv(silu(norm(h, "norm_out")), "conv_out")


rng = np.random.default_rng(0)
x, t = rng.standard_normal((2, 28, 28, 1), dtype=np.float32), np.array([100, 800])
y = unet(x, t)
with no_grad():
    y_library = model.network(Tensor(x), t).data

print(f"largest difference {np.abs(y - y_library).max():.0e} of values up to {np.abs(y).max():.1f}")
np.testing.assert_allclose(embed(t, 16), timestep_embedding(t, 16), atol=1e-4)  # float32 angles up to 800
np.testing.assert_allclose(y, y_library, atol=1e-3)

# %% [markdown]
# The same, up to float32's rounding. Nothing else is in the library's [`unet.py`](../../refquant/nn/unet.py) either.
#
# ## Where the parameters are, and where the work
#
# The functions have taken notes. Do they add up to what the library counts?

# %%
parameters, work = sum(n for _, n, _ in notes), sum(m for _, _, m in notes)
network, layers = wrap(model.network)
counted = bit_operations(QuantizedModel(model, network, layers, {})) // 32**2  # 32 x 32 bits a multiplication
print(f"{parameters:,} parameters, {work:,} multiplications an image")
assert parameters == model.network.parameter_count() == 1_333_969 and work == counted

cifar = UNet(config("ddpm-cifar10"), rng)  # the same code, other numbers: the network of Ho et al. for CIFAR-10
assert cifar.parameter_count() == 35_746_307
del cifar

# %% [markdown]
# They do. Now level by level, in the order of execution:

# %% Figure: Share of parameters and of multiplications. If each parameter did the same work, the bars of a pair would be equal.
places = ["temb", "conv_in", "down.0", "down.1", "down.2", "mid", "up.2", "up.1", "up.0", "conv_out"]
share = {place: np.zeros(2) for place in places}
for name, size, multiplications in notes:
    place = next((p for p in places if name.startswith(p)), "conv_out")  # norm_out belongs to the end
    place = "temb" if name.endswith("temb_proj") else place
    share[place] += np.array([size / parameters, multiplications / work]) * 100
bars = np.array([share[p] for p in places])
figure, axes = plt.subplots()
at = np.arange(len(places))
axes.bar(at - 0.2, bars[:, 0], 0.4, label="parameters")
axes.bar(at + 0.2, bars[:, 1], 0.4, hatch="///", edgecolor="white", label="multiplications")
heights = ["time", 28, 28, 14, 7, 7, 7, 14, 28, 28]
axes.set_xticks(at, [f"{place}\n{height}" for place, height in zip(places, heights, strict=True)])
axes.set(ylabel="share / %", xlabel="level, and its height in pixels")
axes.legend()
plt.show()

# %%
low = bars[[4, 5, 6]].sum(axis=0)
high = bars[[1, 2, 8, 9]].sum(axis=0)
for size, (p, m) in (("7x7", low), ("28x28", high)):
    print(f"{size}: {p:.0f} % of the parameters, {m:.0f} % of the multiplications; ", end="")
    print(f"each parameter is used {work / parameters * m / p:.0f} times")
assert low[0] > 80 and low[1] < 65 and high[0] < 5

# %% [markdown]
# A convolution's parameters are used once for each pixel, so the levels with few pixels can afford many channels. For
# us that means: weights of few bits shrink the file where the image is small, and integer arithmetic pays at all
# levels.
#
# ## Where time enters
#
# Which layers see nothing but the time-step? The library finds them by trying: those whose input stays the same when
# the image changes. They are the two layers of the time MLP and the projection of every ResBlock, together the
# *temporal information block* of TFMQ-DM, to which tutorial [11](11_tfmq.md) is devoted.

# %%
temporal = temporal_layers(model.network)
assert set(temporal) == {name for name, _, _ in notes if "temb" in name}
size = sum(n for name, n, _ in notes if name in temporal)
cost = sum(m for name, _, m in notes if name in temporal)
print(f"{len(temporal)} layers: {size / parameters:.1%} of the parameters, {cost / work:.2%} of the multiplications")

# %% [markdown]
# So little work, and how much depends on it? We draw eight digits, add noise as at time-step $t$, and tell the
# network that it is $t'$. If the network could see for itself how noisy an image is, all entries of a row would be
# alike.

# %%
noise = NoiseSource(seed=0, count=8, shape=model.image_shape)
digits = ddim_sample(model.denoiser(chunk=4), noise.draw(), model.schedule, noise, steps=20)  # (8, 1, 28, 28) float32
added = noise.draw()
answer = Denoiser(model.network, chunk=4)  # the network's own output, v, for images (N, C, H, W)
levels = [25, 150, 300, 450, 600, 750, 900]
error = np.zeros((len(levels), len(levels)))
for i, t in enumerate(levels):
    x_t = model.schedule.q_sample(digits, np.full(8, t), added)
    v = target("v", model.schedule, digits, np.full(8, t), added)  # what the network should say
    for j, told in enumerate(levels):
        error[i, j] = np.mean((answer(x_t, told, 0) - v) ** 2)
error /= error.min(axis=1, keepdims=True)
np.testing.assert_array_equal(error.argmin(axis=1), np.arange(len(levels)))  # the truth is best, at every level
off_by_one = min(error[i, j] for i, j in np.ndindex(error.shape) if i != j)
print(f"told the neighbouring time-step of this list, the error grows at least {off_by_one:.1f} times")
assert off_by_one > 1.2

# %% Figure: How much larger the network's error is when the network is told another time-step.
figure, axes = plt.subplots(figsize=(8, 4))
image = axes.imshow(np.log10(error), origin="lower")
for i, j in np.ndindex(error.shape):
    ink = "white" if error[i, j] < 6 else "black"
    axes.text(
        j, i, f"{error[i, j]:.{1 if error[i, j] < 9.95 else 0}f}", ha="center", va="center", fontsize=7, color=ink
    )
axes.set_xticks(range(len(levels)), levels)
axes.set_yticks(range(len(levels)), levels)
axes.set(xlabel="time-step t' that the network is told", ylabel="time-step t of the noise")
axes.grid(visible=False)
figure.colorbar(image, label="log10(error / error of the truth)")
plt.show()

# %% [markdown]
# The network believes what it is told. Quantization errors in these few layers are therefore not small errors of the
# image; they are other time-steps.
#
# ## How far it sees
#
# Take one pixel of the answer and differentiate it with respect to the image: which pixels matter? If the network
# always looked at the same neighbourhood, the four pictures below would be alike. The tape of tutorial 04 answers in
# one call.


# %%
def influence(t):
    """Square of d answer at (14, 14) / d image, mean over the digits: (28, 28)."""
    x_t = model.schedule.q_sample(digits, np.full(8, t), added)
    x = Tensor(np.ascontiguousarray(x_t.transpose(0, 2, 3, 1)), requires_grad=True)
    only = np.zeros(x.shape, np.float32)
    only[:, 14, 14] = 1
    pixel = ops.sum_all(ops.mul(model.network(x, np.full(8, t)), Tensor(only)))
    return np.square(gradients(pixel, [x])[0][..., 0]).mean(axis=0)


seen = {t: influence(t) for t in (50, 500, 800, 950)}
rows, columns = np.indices((28, 28)) - 14
near = np.hypot(rows, columns) <= 3
far = {t: 1 - s[near].sum() / s.sum() for t, s in seen.items()}
print("share of the influence from more than 3 pixels away:", {t: round(float(f), 3) for t, f in far.items()})
assert far[800] > 10 * far[50]

# %% Figure: Influence of each pixel on the middle of the answer. Little noise: itself. Much noise: the whole digit.
figure, axes = plt.subplots(1, 4, figsize=(8, 2.6))
for ax, (t, s) in zip(axes, seen.items(), strict=True):
    image = ax.imshow(np.log10(s / s.max()), vmin=-5, vmax=0)
    ax.set(title=f"t = {t}", xlabel="column / pixels", xticks=(0, 14, 27), yticks=(0, 14, 27))
    ax.grid(visible=False)
axes[0].set_ylabel("row / pixels")
figure.colorbar(image, ax=axes, label="log10(influence)")
plt.show()

# %% [markdown]
# ## From nothing
#
# Last, a network of its own: 16x16 pixels, two levels, 8 and 16 channels. The data are discs, rings and crosses drawn
# by [`shapes.py`](../../refquant/data/shapes.py). Before training, its last convolution is (almost) zero, so it
# answers 0 to everything and its loss is the mean of $\epsilon^2$, which is 1. Any loss below 1 has been learned.

# %% Figure: Loss of the small network. The dotted line is what answering 0 costs.
data = shapes(2000, seed=0, size=16)
small = UNet(
    UNetConfig(
        image_size=16, image_channels=1, channels=8, multipliers=(1, 2), blocks=1, attention=(8,), groups=4, dropout=0.0
    ),
    np.random.default_rng(0),
)
recipe = FitConfig(steps=100, batch=32, rate=2e-3, warmup=10, decay=50)
losses = train(small, data, cosine(200), recipe, quiet=True)
figure, axes = plt.subplots()
axes.plot(losses, color=PALETTE[0])
axes.axhline(1, color="black", linestyle=":")
axes.set(xlabel="step of training", ylabel="mean squared error of eps", ylim=(0, 1.1))
plt.show()

# %%
print(f"{small.parameter_count():,} parameters; loss {losses[0]:.3f} at first, {losses[-20:].mean():.3f} at the end")
assert abs(losses[0] - 1) < 0.05  # 32 images of 256 pixels: the mean of as many squares is 1 within 0.016 (one sigma)
assert losses[-20:].mean() < 0.3

# %% [markdown]
# ## Where this differs from the authors' code
#
# - The names and the structure are those of the PyTorch port of Ho et al.'s network (ermongroup/ddim,
#   `models/diffusion.py`), so that its published weights fit one to one. Weights are $(O, h, w, C)$ here and
#   $(O, C, h, w)$ there: the order in which integer kernels read them.
# - The SiLU of the time embedding, the same for all ResBlocks, is computed once here and in each block there.
# - Down-sampling pads at the bottom and at the right only, as there. Attention has one head, as there.
#
# ## On your own
#
# 1. Leave the skips away: put zeros in the place of `skips.pop()`, for all of them and then for one at a time. Which
#    one can the network spare? Measure the error as in "Where time enters".
# 2. Leave attention away (`return x`). At which time-steps does it matter? Does that fit the picture of the
#    influence?
# 3. Train the small network with `prediction="v"`. What is the loss of answering 0 now, and why is it not 1?
