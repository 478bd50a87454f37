# %% [markdown]
# # 11 TFMQ-DM: what a network is told about the time
#
# *Find the layers that see the time-step alone, break them by rounding, and repair them with TIAR and FSC by hand.*
#
# **Run time**: 20 s on two cores. **Before this**: [01](01_affine_quantization.md), [07](07_samplers.md) and
# [09](09_adaround_and_blocks.md).
#
# ## What you'll do
#
# Change the image, change the time-step, and see which layers of the shipped UNet notice. Round the weights of those
# that see nothing but the time to 4 bits and look at the damage: in their features, along the trajectory, in the
# digits. Then learn the rounding of all of them together, in plain NumPy, without a single image; give their
# activations one scale for each step of the sampler; and draw the same digits again.
#
# ## What you'll learn
#
# - Why a small error of a temporal feature is a large error of the picture: it is the feature of *another* time-step.
# - Why this part of the network can be calibrated over everything that it will ever see.
# - What each term of the loss does, by leaving them out one at a time.
# - What remains to be gained once the temporal layers are repaired, and what is better looked up than computed.
#
# ## What you'll need
#
# The scale search and the sampler of earlier pages, and the idea of AdaRound; its formulas are repeated here. The paper
# is TFMQ-DM: Huang et al., *Temporal Feature Maintenance Quantization for Diffusion Models*, CVPR 2024,
# [arXiv 2311.16503](https://arxiv.org/abs/2311.16503).
#
# With half an hour: read from *The block, in three lines* to *Change one thing*, which is the method; then change
# `ITERATIONS` or a line of `tiar` in a copy of this page, and compare what it prints behind "told a wrong time". The
# README has the commands, under *Half an hour*.

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from refquant.autograd import Tensor, no_grad
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.model import load_model
from refquant.evaluate import per_step_error, sample_run
from refquant.metrics import psnr
from refquant.nn.module import Parameter
from refquant.nn.unet import timestep_embedding
from refquant.quant.affine import QSpec, fake_quantize, quantize
from refquant.quant.cache import disturbances, feature_cache
from refquant.quant.calibrate import Calibration, CalibrationConfig
from refquant.quant.methods import tfmq
from refquant.quant.observers import StepRanges, from_range, mse
from refquant.quant.session import Session
from refquant.quant.temporal import feature_errors, features, quantized_features
from refquant.quant.units import temporal_layers
from refquant.quant.wrap import watched, wrap
from refquant.threads import parallel_map
from refquant.viz import difference_images, labelled_rows

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | paper | equation | function |
# |---|---|---|
# | time embedding $h$ | sinusoid and two linear layers | `refquant.nn.unet.TimeMLP` |
# | embedding layer $g_i$ of ResBlock $i$ | one linear layer | `refquant.nn.unet.ResBlock` (its `temb_proj`) |
# | temporal feature | $emb_{t,i} = g_i(h(t))$ | `refquant.quant.temporal.features` |
# | Temporal Information Block | all layers that see $t$ alone | `refquant.quant.units.temporal_layers` |
# | TIAR, eq. 7 | $\min \sum_i \Vert g_i(h(t)) - \hat g_i(\hat h(t)) \Vert_F^2$ | `refquant.quant.methods.tfmq.tiar` |
# | FSC | $(s_T, z_T), \dots, (s_1, z_1)$ | `refquant.quant.methods.tfmq.finite_set_calibration` |
#
# ## Who sees the time, and nothing else?
#
# We do not look for names like "temb". We intervene, as one would on a black box: run the network, then run it with
# another image at the same time-step, then with the same image at another time-step, and note how far every layer's
# input has moved. `wrap` puts an idle quantizer before each layer, and `watched` reports what passes it.

# %%
model = load_model("mnist-unet")
network, T = model.network, np.arange(model.schedule.timesteps)
wrapped, _ = wrap(network)
one, other = np.random.default_rng(0).standard_normal((2, 1, 28, 28, 1)).astype(np.float32)


def layer_inputs(image, t):
    seen = {}
    with no_grad():
        watched(wrapped, lambda name, x: seen.setdefault(name, x))(Tensor(image), np.array([t]))
    return {name.removesuffix(".input"): x for name, x in seen.items() if name.endswith(".input")}


def moved(a, b):
    return {name: np.linalg.norm(b[name] - a[name]) / np.linalg.norm(a[name]) for name in a}


base = layer_inputs(one, 300)
by_image, by_time = moved(base, layer_inputs(other, 300)), moved(base, layer_inputs(one, 600))
temporal = [name for name in base if by_image[name] == 0]
blind = [name for name in base if by_time[name] == 0]
print(f"of {len(base)} layers {len(temporal)} never notice the image; {blind} never notice the time")

assert temporal == temporal_layers(network)  # the library asks in the same way
assert temporal == ["temb.dense.0", "temb.dense.1", *(name for name in base if name.endswith("temb_proj"))]

# %% Figure: How far each layer's input moves. The squares lie at exactly 0, not near it: those layers see time alone.
figure, axes = plt.subplots()
both = [name for name in base if name not in temporal + blind]
for names, label, marker in ((both, "both", "o"), (temporal, "the time alone", "s"), (blind, "the image alone", "^")):
    axes.plot([by_image[n] for n in names], [by_time[n] for n in names], marker, label=label, alpha=0.7)
axes.set(xlabel="relative change of the input, another image", ylabel="... another time-step")
axes.legend(title="layer sees")
plt.show()

# %% [markdown]
# They are the two layers of the time embedding and one projection for each ResBlock, whose output is added to all
# pixels there. The paper calls them the *Temporal Information Block*.
#
# ## The block, in three lines
#
# Everything those layers compute, with $e(t)$ the sinusoid, is
#
# ```math
# u = W_1 \mathrm{SiLU}(W_0 e(t) + b_0) + b_1, \qquad emb_{t,i} = G_i \mathrm{SiLU}(u) + c_i
# ```
#
# All projections read the same $\mathrm{SiLU}(u)$, so they can be stacked into one matrix.

# %%
order = [*temporal[:2], *features(network, T[:1])]  # W_0, W_1, then the projections as the library lists them
parameters = {name: p.data for name, p in network.named_parameters()}
weights, biases = ([parameters[f"{name}.{part}"] for name in order] for part in ("weight", "bias"))
sinusoid = timestep_embedding(T, network.cfg.channels)  # (T, 16)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def block(w, e):
    """Hidden layers and features (B, all channels) of weights w, for sinusoids e (B, 16)."""
    a = e @ w[0].T + biases[0]
    u = a * sigmoid(a) @ w[1].T + biases[1]
    return a, u, u * sigmoid(u) @ np.concatenate(w[2:]).T + np.concatenate(biases[2:])


target = block(weights, sinusoid)[2]  # (T, 624)
wanted = features(network, T)  # the library's, by projection
np.testing.assert_allclose(target, np.concatenate(list(wanted.values()), axis=1), rtol=1e-4, atol=1e-4)
print(f"all there is to know: {target.shape[0]} time-steps x {target.shape[1]} numbers, made by")
print(f"{sum(w.size for w in weights):,} of {network.parameter_count():,} parameters")

# %% [markdown]
# This is the point of the whole method. What a convolution meets changes with every image, so that its calibration is
# always a sample. The temporal block has as many inputs as there are time-steps: a *finite set*, of which `target` is
# all.
#
# ## Break it
#
# 4 bits, a scale for each output channel by the usual search, nearest rounding. From here on all weights of the block
# lie in one long vector; `cut` makes matrices of it again.

# %%
spec = QSpec(bits=4, signed=True, axis=0)
grids = [mse(w, spec) for w in weights]
flat = np.concatenate([w.ravel() for w in weights])
scale, zero = (
    np.concatenate([np.repeat(getattr(q, part), w[0].size) for q, w in zip(grids, weights, strict=True)])
    for part in ("scale", "zero_point")
)
zero = zero.astype(np.float32)


def cut(vector):
    parts = np.split(vector, np.cumsum([w.size for w in weights])[:-1])
    return [part.reshape(w.shape) for part, w in zip(parts, weights, strict=True)]


def features_of(codes):
    return block(cut(scale * (codes - zero)), sinusoid)[2]


nearest = np.clip(np.rint(flat / scale) + zero, spec.qmin, spec.qmax)
library = [quantize(w, q).ravel() for w, q in zip(weights, grids, strict=True)]
assert np.array_equal(nearest, np.concatenate(library))
rounded = features_of(nearest)

# %% [markdown]
# How wrong are the features? Their squared error, summed over the channels of all blocks, is what TIAR will minimise.
# Their cosine, block by block, is what the paper plots.

# %%
squared = ((rounded - target) ** 2).sum(axis=1)  # (T,)


def by_block(x):  # (T, 624) -> one (T, C_i) for each ResBlock
    return np.split(x.astype(np.float64), np.cumsum([len(w) for w in weights[2:]])[:-1], axis=1)


def cosine(x, y):
    return (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


cosines = np.array([cosine(x, y) for x, y in zip(by_block(rounded), by_block(target), strict=True)])  # (blocks, T)

library = feature_errors(T, dict(zip(wanted, by_block(rounded), strict=True)), wanted)
np.testing.assert_allclose(squared, library.squared, rtol=1e-3)
np.testing.assert_allclose(cosines, library.cosine, atol=1e-6)
print(f"squared error: mean {squared.mean():.3f}, worst {squared.max():.2f} at t = {squared.argmax()}")
print(f"cosine: mean {cosines.mean():.4f}, worst {cosines.min():.4f}")

# %% [markdown]
# A cosine so near to 1 looks harmless. The paper's better question is: harmless *compared with what*? For every rounded
# feature, find the float feature that it resembles most. If that belongs to the same $t$, the block still knows what
# time it is. If not, it is told a wrong time, and denoises for a noise level that the image does not have.

# %%
def resembles(x, y):
    """For each row of x (T, C), the index of the nearest row of y (T, C)."""
    return ((x**2).sum(axis=1)[:, None] - 2 * x @ y.T + (y**2).sum(axis=1)).argmin(axis=1)


def time_told(x):
    """The time-step that each block is told, minus t: (blocks, T)."""
    return np.array([resembles(a, b) for a, b in zip(by_block(x), by_block(target), strict=True)]) - T


off = time_told(rounded)
print("ResBlock            right   off by (mean)  at most")
for name, row in zip(wanted, abs(off), strict=True):
    print(f"{name.removesuffix('.temb_proj'):18} {np.mean(row == 0):6.0%} {row.mean():10.1f} {row.max():11}")
far = abs(off[abs(off) > 2])
beat = np.mean(np.abs(far - 2 * np.pi * np.rint(far / (2 * np.pi))) < 1.5)
print(f"of those off by more than 2, {beat:.0%} lie within 1.5 of a multiple of 2 pi")

assert not time_told(target).any()  # the float features do tell the time
assert np.mean(off != 0) > 0.4 and beat > 0.6

# %% Figure: Cosines by t; and the mismatch of one block. Harmless rounding would put all points on the grey line.
worst = np.abs(off).mean(axis=1).argmax()
figure, (left, right) = plt.subplots(1, 2)
left.fill_between(T, cosines.min(axis=0), cosines.max(axis=0), alpha=0.3, label="range over the blocks")
left.plot(T, cosines[worst], "C1", linewidth=1, label=order[2 + worst].removesuffix(".temb_proj"))
left.set(xlabel="time-step t", ylabel="cosine, rounded and float feature")
left.legend()
right.axhline(0, color="#888888", linewidth=1)
right.plot(T, off[worst], "C1.", markersize=3)
right.set(xlabel="time-step t", ylabel="time-step it resembles, minus t")
plt.show()

# %% [markdown]
# The points form stripes near multiples of $2\pi = 6.28$. That is the period of the fastest sinusoid, $\sin t$:
# time-steps one period apart differ in the slow sinusoids alone, and a small error is enough to take one for the other.
# And whole ranges of $t$ are shifted together, so that nothing averages out over the steps of the sampler.
#
# What do the pictures say? Below, only these layers are rounded; convolutions and activations stay in float.

# %%
STEPS = 25
sampler = partial(ddim_sample, steps=STEPS)


def draw(eps):
    return sample_run(eps, model, 10, sampler, seed=7)


def report(label, run):
    each = [psnr(a, b) for a, b in zip(run.images, reference.images, strict=True)]
    print(f"{label:33} median image {np.median(each):5.1f} dB, worst {min(each):5.1f} dB")
    return np.median(each)


def with_codes(codes):
    """The network with these codes in its temporal layers."""
    twin, layers = wrap(network)
    for name, w in zip(order, cut(scale * (codes - zero)), strict=True):
        layers[name].layer.weight = Parameter(w)
    return twin


reference = draw(model.denoiser())
damaged = draw(model.denoiser(with_codes(nearest)))
before = report("temporal weights to nearest", damaged)

# %% [markdown]
# ## TIAR: learn the rounding of all temporal layers together
#
# TIAR is *temporal information aware reconstruction*; FSC, further down, is *finite set calibration*.
#
# Nearest rounding is best for each weight, not for what the weights compute together. AdaRound gives each weight a
# number $\alpha$ and lets the loss decide whether the weight goes down or up:
#
# ```math
# \hat w = s (\mathrm{clip}(\lfloor w/s \rfloor + z + h(\alpha)) - z), \qquad
# h(\alpha) = \mathrm{clip}(1.2 \sigma(\alpha) - 0.1, 0, 1)
# ```
#
# ```math
# \min_\alpha \sum_i \Vert g_i(h(t)) - \hat g_i(\hat h(t)) \Vert^2 + 0.01 \sum (1 - |2 h(\alpha) - 1|^\beta)
# ```
#
# Two things are new in TIAR. The loss looks at the *features*, all at once, where BRECQ and Q-Diffusion train a
# projection inside of its ResBlock, on the block's output, which hardly shows its error. And the data are time-steps.
# First the gradient with respect to the weights, the chain rule through the three lines of `block`:

# %%
def silu_slope(x):
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def loss_and_gradient(w, e, y):
    """Mean over the batch of |features - y|², and its gradient with respect to all weights, as one vector."""
    a, u, out = block(w, e)
    g = 2 * (out - y) / len(e)  # (B, 624)
    du = g @ np.concatenate(w[2:]) * silu_slope(u)
    da = du @ w[1] * silu_slope(a)
    by_weight = (da.T @ e, du.T @ (a * sigmoid(a)), g.T @ (u * sigmoid(u)))
    return ((out - y) ** 2).sum() / len(e), np.concatenate([part.ravel() for part in by_weight])


# %% [markdown]
# Then the learning itself: soft weights, the rounding term with its falling $\beta$, Adam. Every argument is something
# to change; `learns` says which weights may move at all.

# %%
floor = np.floor(flat / scale)
ITERATIONS = 300  # here and in the library below


def tiar(iterations=ITERATIONS, t=T, rounding=0.01, warmup=0.2, rate=0.03, batch=256, learns=1.0, seed=0):
    """Codes, final h, and the loss without the rounding term at each iteration."""
    fraction = flat / scale - floor
    alpha = np.log((fraction + 0.1) / (1.1 - fraction))  # h(alpha) = fraction: learning starts at the float weights
    m, v, losses = np.zeros_like(alpha), np.zeros_like(alpha), []
    for k in range(1, iterations + 1):
        stretched = 1.2 * sigmoid(alpha) - 0.1
        h = np.clip(stretched, 0, 1)
        slope = 1.2 * sigmoid(alpha) * (1 - sigmoid(alpha)) * (h == stretched)
        soft = floor + zero + h
        q = np.clip(soft, spec.qmin, spec.qmax)
        chosen = t[np.random.default_rng([seed, k]).permutation(len(t))[:batch]]
        loss, gradient = loss_and_gradient(cut(scale * (q - zero)), sinusoid[chosen], target[chosen])
        gradient = gradient * scale * slope * (soft == q)
        if k >= warmup * iterations:
            beta = 20 - 18 * (k - warmup * iterations) / (iterations - warmup * iterations)
            gradient -= rounding * 2 * beta * np.abs(2 * h - 1) ** (beta - 1) * np.sign(2 * h - 1) * slope
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        alpha = alpha - learns * rate * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
        losses.append(loss)
    return np.clip(floor + zero + (alpha >= 0), spec.qmin, spec.qmax), h, np.array(losses)


def error(codes):
    """Squared error of the features, mean over all time-steps."""
    return float(((features_of(codes) - target) ** 2).sum(axis=1).mean())


# parallel_map holds the BLAS to one thread, which is faster for matrices as small as these
((codes, _, losses),) = parallel_map(lambda _: tiar(), [0])
print(f"feature error {error(nearest):.3f} -> {error(codes):.3f}; {np.mean(codes != nearest):.1%} of the weights")
print("are no longer at their nearest code")
assert error(codes) < error(nearest) / 3

# %% [markdown]
# The library does the same on its tape. With the same seed it draws the same mini-batches and must end at the same
# codes. (It sums in another order, and learning amplifies the last digit: we ask for 99 % of them, not for all.)

# %%
session = Session(Calibration(model, CalibrationConfig(images=8, steps=STEPS)), weight_bits=4, input_bits=8)
run = session.start("tutorial")
for name, q in zip(order, grids, strict=True):
    run.layers[name].quantize_weight(q)
tfmq.tiar(run, temporal, T, iterations=ITERATIONS)

library = np.concatenate([run.layers[name].codes.ravel() for name in order])
print(f"{np.mean(library == codes):.2%} of the codes agree")
assert np.mean(library == codes) > 0.99

maintained = draw(model.denoiser(with_codes(codes)))
report("temporal weights to nearest", damaged)
after = report("temporal weights by TIAR", maintained)
told_before, told_after = np.abs(off), np.abs(time_told(features_of(codes)))
print(f"told a wrong time: {np.mean(told_before > 0):.0%} of the features before, {np.mean(told_after > 0):.0%} after;")
print(f"off by {told_before.mean():.2f} and {told_after.mean():.2f} time-steps on average")
assert after > before + 3 and told_after.mean() < told_before.mean() / 2

# %% Figure: The loss while learning, the warm-up ending at the grey line; and the error along the trajectory.
figure, (left, right) = plt.subplots(1, 2)
left.semilogy(np.arange(1, len(losses) + 1), losses, label="soft weights")
left.axhline(error(nearest), color="C1", linestyle="--", label="nearest codes")
left.axhline(error(codes), color="C2", linestyle="-.", label="learned codes")
left.axvline(0.2 * len(losses), color="#888888", linewidth=1)
left.set(xlabel="iteration", ylabel="squared error of the features")
left.legend()
for label, made, style in (("nearest", damaged, "C1--"), ("TIAR", maintained, "C2-.")):
    right.semilogy(np.arange(1, STEPS + 1), per_step_error(made, reference), style, label=label)
right.set(xlabel="step of the sampler", ylabel="mean squared error of x")
right.legend()
plt.show()

# %% [markdown]
# The soft weights start as the float weights, but for the largest ones, which lie beyond the grid and are clipped: that
# is the error at the first iteration. During the warm-up the others make up for it. Then the rounding term drives every
# $h$ to 0 or 1, the loss rises, and learning means to let it rise as little as possible.

# %%
steps = flat / scale + zero
clipped = (steps < spec.qmin) | (steps > spec.qmax)
alone = float(((features_of(np.clip(steps, spec.qmin, spec.qmax)) - target) ** 2).sum(axis=1).mean())
print(f"{clipped.mean():.1%} of the weights are clipped; that alone costs {alone:.3f}")
print(f"the loss: {losses[0]:.3f} at first, {losses.min():.4f} at best, {losses[-1]:.3f} at the end")
np.testing.assert_allclose(losses[0], alone, rtol=0.1)  # 256 of the time-steps, and all of them
assert losses.min() < losses[0] / 20

# %% [markdown]
# ## Change one thing
#
# Each row changes one argument. "Soft" is the error of the relaxed weights at the end, "error" that of the codes that
# are kept, "undecided" the share of weights with $h$ between 0.01 and 0.99. Add a row of your own.

# %%
in_mlp = np.concatenate([np.full(w.size, i < 2) for i, w in enumerate(weights)])  # W_0 and W_1
rows = {
    "as above, 150 iterations": {},
    "20 time-steps only": {"t": T[::50]},
    "only the projections learn": {"learns": ~in_mlp},
    "only the time MLP learns": {"learns": in_mlp},
    "no rounding term": {"rounding": 0.0},
    "no warm-up": {"warmup": 0.0},
    "a tenth of the rate": {"rate": 0.003},
}
found = dict(zip(rows, parallel_map(lambda given: tiar(iterations=150, **given), rows.values()), strict=True))
print(f"{'':27}    soft   error  flipped  undecided")
print(f"{'nearest':27} {'':7} {error(nearest):7.3f}")
for label, (c, h, curve) in found.items():
    undecided = np.mean((h > 0.01) & (h < 0.99))
    print(f"{label:27} {curve[-10:].mean():7.3f} {error(c):7.3f} {np.mean(c != nearest):8.1%} {undecided:10.1%}")

errors = {label: error(c) for label, (c, _, _) in found.items()}
for part in ("only the projections learn", "only the time MLP learns"):
    assert errors["as above, 150 iterations"] < errors[part]
assert found["no rounding term"][2][-10:].mean() < 0.01 < errors["no rounding term"] / 10
gain = (error(nearest) - errors["20 time-steps only"]) / (error(nearest) - errors["as above, 150 iterations"])
print(f"20 time-steps bring {gain:.0%} of what all of them bring")

# %% [markdown]
# Without the rounding term the soft weights stay perfect, and most of that is lost when they are rounded at the end:
# nobody asked them to decide. Learning both parts is better than learning either, for they make up for each other's
# errors; that is what "jointly" buys. The released code's few time-steps go a good part of the way, as features are
# smooth in $t$, but the others come for nothing. The warm-up makes little difference to a block as small as this.
#
# ## FSC: one activation scale for each step
#
# Activations are rounded, too. All projections read $v_t = \mathrm{SiLU}(u_t)$, and for a given $t$ that is *one fixed
# vector*: its range is no estimate, and there are no outliers to clip. So the paper keeps a scale and a zero point for
# each step of the sampler. By hand, 8 bits, and then by the library:

# %%
visited = session.calibration.trajectories.t  # (STEPS,), noisiest first
u = block(cut(scale * (codes - zero)), sinusoid)[1]
v = (u * sigmoid(u))[visited]  # (STEPS, 64)
low, high = np.minimum(v.min(axis=1), 0).astype(float), np.maximum(v.max(axis=1), 0).astype(float)
scales = ((high - low) / 255).astype(np.float32)
zeros = np.rint((-low / scales).astype(np.float32))

ranges = StepRanges(STEPS)
for step, row in enumerate(v):
    ranges.update(step, row)
table = ranges.table(QSpec(bits=8))
np.testing.assert_array_equal(table.scale, scales)
np.testing.assert_array_equal(table.zero_point, zeros)

shared = from_range(low.min(), high.max(), QSpec(bits=8))  # the alternative: one range for all steps
with_table = np.array([((fake_quantize(row, table[step]) - row) ** 2).sum() for step, row in enumerate(v)])
with_one = ((fake_quantize(v, shared) - v) ** 2).sum(axis=1)
print(f"scales from {scales.min():.5f} to {scales.max():.5f}")
print(f"squared rounding error: {with_one.mean():.2e} with one scale, {with_table.mean():.2e} with the table")
assert with_table.mean() < with_one.mean() / 1.5

# %% Figure: The scale of each step, and what it saves. Were the range the same at all t, the curves would coincide.
figure, (left, right) = plt.subplots(1, 2)
left.plot(visited, scales, ".-", label="its own at each step")
left.axhline(shared.scale, color="C1", linestyle="--", label="one for all")
left.set(xlabel="time-step t", ylabel="scale of v", ylim=(0, None))
left.legend(loc="lower left")
right.semilogy(visited, with_table, ".-", visited, with_one, "--")
right.set(xlabel="time-step t", ylabel="squared rounding error of v")
plt.show()

# %% [markdown]
# The table is indexed by the *step of the sampler*, not by $t$: there are schedules that visit a $t$ twice (an
# [exercise](../exercises/README.md) is about that). It costs next to nothing; the library makes all of them at once.

# %%
tfmq.finite_set_calibration(run, temporal, "temporal", "exact")
tables = {name: run.layers[name].input.table for name in temporal}
np.testing.assert_allclose(tables[order[2]].scale, scales, rtol=1e-4)  # v by other sums
numbers = sum(2 * len(t) for t in tables.values())
share = numbers / network.parameter_count()
print(f"{len(tables)} tables of {STEPS} steps: {numbers} numbers, {share:.3%} of the parameters")

# %% [markdown]
# ## The same pictures, before and after
#
# So far the rest of the network was in float. Now all of it goes to W4A8 by nearest rounding, and nothing better, so
# that three models differ in their temporal layers alone: rounded like all others; maintained by TIAR and FSC; left in
# float. The last one is the paper's "freeze" test, the most that maintenance can reach.

# %%
def whole_network(temporal_layers_are):
    run = session.start("tutorial")
    run.nearest_weights()
    if temporal_layers_are == "maintained":
        tfmq.tiar(run, temporal, T, iterations=ITERATIONS)
        tfmq.finite_set_calibration(run, temporal, "temporal", "exact")
        return run.finish()
    run.shared_inputs()
    if temporal_layers_are == "float":
        for name in temporal:
            run.layers[name].layer.weight = Parameter(run.weight(name))
            run.layers[name].input.set(None)
    return run.finish()


made = {kind: whole_network(kind) for kind in ("rounded", "maintained", "float")}
runs = {kind: draw(m.denoiser()) for kind, m in made.items()}
exact = features(network, visited)
found = {k: feature_errors(visited, quantized_features(m, visited), exact) for k, m in made.items()}
for kind, drawn in runs.items():
    report(f"all W4A8, temporal {kind}", drawn)
for kind, e in found.items():
    print(f"all W4A8, temporal {kind:10}    feature error {e.squared.mean():.3f}, worst cosine {e.cosine.min():.4f}")
assert found["maintained"].squared.mean() < found["rounded"].squared.mean() / 3

# %% Figure: Differences to the float pictures from equal noise, red brighter, blue darker, three times enlarged.
def difference(run):
    return difference_images(run.images, reference.images, gain=3)


rows = [("float32", reference.images), ("temporal W4\nnearest, rest float", damaged.images)]
rows += [("difference\nnearest, rest float", difference(damaged))]
rows += [("difference\nTIAR, rest float", difference(maintained))]
rows += [(f"difference, W4A8\ntemporal {kind}", difference(drawn)) for kind, drawn in runs.items()]
picture = labelled_rows(rows)
plt.figure(figsize=(picture.shape[1] / 100, picture.shape[0] / 100)).figimage(picture)
plt.show()

# %% [markdown]
# With everything at W4A8 most of the error comes from the convolutions, whose rounding nobody has learned yet: block
# reconstruction, [page 09](09_adaround_and_blocks.md), is the third part of the method. And a push in the first steps
# can bend a stroke or turn a digit into another, perfectly good one, which PSNR counts as a disaster. That is why the
# median is printed, too, and why ten images are no proof. [Page 13](13_method_table.md) compares all methods, with
# their spread.
#
# ## Do not compute what you can look up
#
# If there are only as many temporal features as steps, why run those layers at all? The journal version
# ([arXiv 2407.19547](https://arxiv.org/abs/2407.19547)) stores the *features*, quantized, and drops the weights. What
# remains is the rounding of the feature itself: at most half a step of its own grid.

# %%
caches = feature_cache(network, visited, bits=8)
for name, cache in caches.items():
    kept = np.stack([cache.row(step) for step in range(STEPS)])
    assert (np.abs(kept - exact[name]) <= 0.501 * cache.table.scale[:, None]).all()

pairs = disturbances(caches, quantized_features(made["maintained"], visited), exact).values()
cached, computed = (sum(column) for column in zip(*pairs, strict=True))
print(f"squared error, summed over blocks: {cached:.4f} looked up, {computed:.4f} computed")
size = sum(cache.codes.size for cache in caches.values())
print(f"{size:,} bytes of features in the place of {flat.size // 2:,} bytes of 4-bit weights")
assert cached < computed

# %% [markdown]
# ## Where this differs from the authors' code
#
# The released code (ModelTC/TFMQ-DM at d551eac) agrees with the library where both are asked the same: `tests/golden`
# holds its temporal block, its TIAR with the same flipped weights, and its tables. It asks for other things:
#
# - TIAR there sees the time-steps of the calibration set, 20 different ones for CIFAR-10 (`quant/reconstruction.py`,
#   lines 212 to 318); here it sees all, which costs nothing. The second row of the table above is theirs.
# - The first layer of the time embedding stays in float there (`quant/quant_model.py:103-120`). Here $W_0$ is rounded,
#   learned and counted.
# - 20,000 iterations at a rate of 0.001 there; a few hundred at 0.03 here, to fit a page.
# - The paper gives tables to temporal activations, the released code to all (`quant/calibration.py:108-152`), from a
#   running average over batches: `fsc="all"` and `ranges="running"` of `refquant.quant.methods.tfmq.quantize`. For
#   layers that see $t$ alone, an average of equal ranges is the exact range.
# - The journal version's code was not released; `refquant.quant.cache` is our reading of its abstract.
#
# ## On your own
#
# 1. Set `bits=3` where the page breaks the block, and run it again. At how many bits does nearest rounding begin to
#    hurt, and at how many TIAR?
# 2. Weigh the loss by $w_t$ in `loss_and_gradient`, so that it looks at the worst time-steps more than at others. Does
#    the worst cosine improve, and what does the mean pay?
# 3. Learn the rounding of each temporal layer by itself, on its own output, with the quantized input that it will get.
#    The paper does not make this comparison. Should it have? (`refquant.bench.findings` has it, as "layerwise".)
