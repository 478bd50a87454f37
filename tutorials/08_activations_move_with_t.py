# %% [markdown]
# # 08 Activations move with t
#
# *Why diffusion models are hard to calibrate: one network, many time-steps, and ranges that differ tenfold.*
#
# **Run time**: 20 s on two cores. **Before this**: [01](01_affine_quantization.md), [07](07_samplers.md).
#
# ## What you'll do
#
# Watch every activation of the shipped model while it draws, and see its range move. Work out what it costs to serve
# all time-steps with one range, choose calibration states in four ways, and look at the images that come of it. End
# with the layers that see nothing but the time-step.
#
# ## What you'll learn
#
# - How to look into a network without editing it, and without data.
# - That a range which is too wide costs bits, and one that is too narrow costs the image.
# - Which time-steps a calibration set must see.
# - Why temporal features can be calibrated exactly: there is a finite set of them.
#
# ## What you'll need
#
# Scale and zero point (tutorial 01), the sampler (07). No data set: noise and the model are enough.

# %%
import matplotlib.pyplot as plt
import numpy as np

from refquant.autograd import no_grad, ops
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.model import load_model
from refquant.diffusion.sampling import NoiseSource
from refquant.metrics import per_image_psnr
from refquant.quant.activations import step_tables
from refquant.quant.affine import QSpec, fake_quantize
from refquant.quant.calibrate import record
from refquant.quant.methods.ptq4dm import time_steps
from refquant.quant.observers import StepTable, from_range, minmax
from refquant.quant.record import record_trajectories
from refquant.quant.temporal import TemporalBlock
from refquant.quant.units import temporal_layers
from refquant.quant.wrap import activation_quantizers, wrap
from refquant.threads import parallel_map
from refquant.viz import PALETTE, labelled_rows

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | equation or step | function |
# |---|---|
# | states $x_t$ of the float sampler | `refquant.quant.record.record_trajectories` |
# | see what flows through a layer | `refquant.quant.wrap.watched` |
# | one (scale, zero point) for all time-steps | `refquant.quant.observers.minmax` |
# | one for each: finite set calibration (TFMQ-DM) | `refquant.quant.activations.step_tables` |
# | $t_i \sim N(0.4 T, 0.4 T)$ (PTQ4DM) | `refquant.quant.methods.ptq4dm.time_steps` |
# | temporal features $g_i(h(t))$ (TFMQ-DM) | `refquant.quant.temporal.TemporalBlock` |
#
# ## Watching a network draw
#
# Calibration needs inputs like those that the network will meet. For a sampler, these are its own states: push noise
# through the float model and keep what the network is called with. `wrap` copies the network with a place for a
# quantizer in front of every layer; while none is set, each lets all values pass and can tell what it sees.

# %%
STEPS, IMAGES = 20, 16
model = load_model("mnist-unet")
trajectories = record_trajectories(model, IMAGES, STEPS, seed=1_000_003)
times = trajectories.t  # (STEPS,): 950, 900, ..., 0
network, layers = wrap(model.network)
names = list(activation_quantizers(network))
SHOWN = {
    "up.1.block.0.nin_shortcut.input": "a shortcut",
    "conv_out.input": "the last convolution",
    "mid.block_2.conv2.input": "in the middle",
    "up.0.block.0.temb_proj.input": "the time embedding",
}


def look(step):
    """Range of each activation for each image at one step, and some values of the layers that are shown."""
    seen = dict(record(network, trajectories.at([step])))
    ranges = {name: (x.reshape(IMAGES, -1).min(axis=1), x.reshape(IMAGES, -1).max(axis=1)) for name, x in seen.items()}
    return ranges, {name: seen[name][:4].ravel() for name in SHOWN}


looks = parallel_map(look, range(STEPS))
low = {name: np.stack([ranges[name][0] for ranges, _ in looks]) for name in names}  # (STEPS, IMAGES)
high = {name: np.stack([ranges[name][1] for ranges, _ in looks]) for name in names}
values = {name: [shown[name] for _, shown in looks] for name in SHOWN}
print(f"{len(names)} activations, {STEPS} steps, {IMAGES} images")

# %% [markdown]
# If calibrating a diffusion model were like calibrating a classifier, the bands below would be horizontal.

# %% Figure: Four activations over the time-steps, noise at the left: extremes (light), 1st to 99th percentile (dark).
figure, axes = plt.subplots(2, 2, figsize=(8, 4.6), sharex=True)
for ax, (name, title) in zip(axes.flat, SHOWN.items(), strict=True):
    dark = np.array([np.percentile(x, [1, 99]) for x in values[name]])
    ax.fill_between(times, low[name].min(axis=1), high[name].max(axis=1), alpha=0.3, color=PALETTE[0])
    ax.fill_between(times, *dark.T, color=PALETTE[0])
    ax.set(title=title, xlim=(times[0], 0))
axes[0, 0].set(ylabel="value")
axes[1, 0].set(ylabel="value", xlabel="time-step t")
axes[1, 1].set(xlabel="time-step t")
plt.show()

# %% [markdown]
# Now all of them. The width of a range, widened to contain 0 as quantizers need it, at the step where it is widest
# and where it is narrowest:

# %%
width = {  # (STEPS,)
    name: np.maximum(high[name].max(axis=1), 0) - np.minimum(low[name].min(axis=1), 0) for name in names
}
ratio = {name: w.max() / w.min() for name, w in width.items()}
order = sorted(names, key=ratio.get, reverse=True)
for name in (*order[:4], order[len(order) // 2], order[-1]):
    print(f"{name:36} {width[name].min():7.2f} to {width[name].max():7.2f}, ratio {ratio[name]:.1f}")
assert ratio[order[0]] > 5 and np.median(list(ratio.values())) > 1.5

# %% Figure: Width of all ranges, each in units of its widest. A row of one colour would be a range that stands still.
figure, axes = plt.subplots(figsize=(8, 3.6))
picture = axes.imshow(np.array([width[n] / width[n].max() for n in order]), aspect="auto", vmin=0, vmax=1)
axes.set_xticks(range(0, STEPS, 3), times[::3])
axes.set(xlabel="time-step t", ylabel="activations, most mobile first")
axes.grid(visible=False)
figure.colorbar(picture, label="width / widest")
plt.show()

# %% [markdown]
# ## What one range costs
#
# A range of width $R$ in $b$ bits has steps of $s = R / (2^b - 1)$, and rounding to it makes an error of about
# $s / \sqrt{12}$, whatever the values. If the range is ten times too wide for *this* time-step, the error is ten
# times too large: $\log_2 10$ bits are lost. We try it on the first of the four, with the min-max range of all steps,
# and with one for each.

# %%
name, spec = "up.1.block.0.nin_shortcut.input", QSpec(bits=8)
lo, hi = min(x.min() for x in values[name]), max(x.max() for x in values[name])
scale = (hi - lo) / 255  # ten lines of NumPy ...
zero = np.rint(-lo / scale)
error = {"one range": [], "a range for each step": []}
for x in values[name]:
    x_hat = scale * (np.clip(np.rint(x / scale) + zero, 0, 255) - zero)
    error["one range"].append(np.sqrt(np.mean((x_hat - x) ** 2)))
    own = fake_quantize(x, minmax(x, spec))
    error["a range for each step"].append(np.sqrt(np.mean((own - x) ** 2)))

shared = from_range(lo, hi, spec)  # ... and the library
by_library = [np.sqrt(np.mean((fake_quantize(x, shared) - x) ** 2)) for x in values[name]]
np.testing.assert_allclose(error["one range"], by_library, rtol=1e-3)  # ties may go the other way

lost = np.log2(np.array(error["one range"]) / error["a range for each step"])
print(f"bits lost: {lost[0]:.1f} at t = {times[0]}, {lost[STEPS // 2]:.1f} in the middle, {lost[-1]:.1f} at t = 0")
np.testing.assert_allclose(error["one range"], scale / np.sqrt(12), rtol=0.15)
assert lost[-1] > 2

# %% Figure: Error of 8-bit rounding of one shortcut. One range: the same error at all steps, though the values shrink.
figure, axes = plt.subplots()
for (label, e), style in zip(error.items(), ("o-", "s--"), strict=True):
    axes.semilogy(times, e, style, label=label)
axes.axhline(scale / np.sqrt(12), color="black", linestyle=":", label="s / sqrt(12)")
axes.set(xlabel="time-step t", ylabel="RMS error of the activation", xlim=(times[0] + 10, -10))
axes.legend()
plt.show()

# %% [markdown]
# ## Which time-steps does a calibration set see?
#
# A set of 64 states, chosen in four ways: evenly over the steps; by PTQ4DM's normal distribution, with its centre at
# $0.4 T$, and so wide that what lies beyond piles up at the two ends; from the first step only, that is, calibrated
# on noise; from the last step only, on finished images, which is what calibrating "on data" would mean. Each gives a
# min-max range to every activation. How often does a state leave these ranges by more than 5 % of their width?

# %%
rng = np.random.default_rng(0)
image = rng.integers(0, IMAGES, 64)
chosen = {
    "even": np.arange(64) % STEPS,
    "PTQ4DM": STEPS - 1 - time_steps(64, STEPS, rng),  # 0 is the image there, and the noise here
    "first": np.zeros(64, int),
    "last": np.full(64, STEPS - 1),
}
ranges, leaves = {}, {}
for label, step in chosen.items():
    ranges[label] = {n: (low[n][step, image].min(), high[n][step, image].max()) for n in names}
    out = []
    for n in names:
        a, b = ranges[label][n]
        margin = 0.05 * (max(b, 0) - min(a, 0))
        out.append((low[n] < min(a, 0) - margin) | (high[n] > max(b, 0) + margin))
    leaves[label] = 100 * np.mean(out, axis=(0, 2))  # (STEPS,) percent of activations and images
    mean, worst = leaves[label].mean(), leaves[label].max()
    print(f"{label:7} {mean:4.1f} % of the ranges are left, {worst:4.1f} % at the worst step")
assert leaves["even"].max() < 15 < leaves["first"].max() and leaves["last"].max() > 50

# %% Figure: Left: where the states come from. Right: how many activations leave their range at each time-step.
figure, axes = plt.subplots(1, 2)
for i, (label, step) in enumerate(chosen.items()):
    style = {"color": PALETTE[i], "linestyle": ("-", "--", "-.", ":")[i]}
    axes[0].step(times, np.bincount(step, minlength=STEPS), where="mid", **style)
    axes[1].plot(times, leaves[label], label=label, **style)
axes[0].set(xlabel="time-step t", ylabel="states of 64", ylim=(0, 20), xlim=(times[0] + 25, -25))
axes[1].set(xlabel="time-step t", ylabel="ranges left / %", xlim=(times[0], 0))
axes[1].legend()
plt.show()

# %% [markdown]
# ## What becomes of the images
#
# Now round all activations, to 8 and to 6 bits, and leave the weights in float. The fifth competitor has a range for
# each step: `step_tables` makes the same from the trajectories as our minima and maxima.


# %%
def spec_of(name, bits):
    return QSpec(8, symmetric=True) if name.endswith("probs") else QSpec(bits)  # softmax: [0, 1], always 8 bits


def quantizer(name, label, bits):
    if label != "each step":
        return from_range(*ranges[label][name], spec_of(name, bits))
    steps = zip(low[name].min(axis=1), high[name].max(axis=1), strict=True)
    return StepTable.of([from_range(lo, hi, spec_of(name, bits)) for lo, hi in steps])


few = names[:3]
tables = step_tables(network, trajectories, {n: spec_of(n, 8) for n in few})
for n in few:
    np.testing.assert_allclose(tables[n].scale, quantizer(n, "each step", 8).scale, rtol=1e-4)  # chunks of 16 states


def draw(label=None, bits=None):
    """Six digits from the same noise, with all activations rounded."""
    noise = NoiseSource(seed=0, count=6, shape=model.image_shape)
    rounded, _ = wrap(model.network)
    places = activation_quantizers(rounded)
    for name, place in places.items() if label else ():
        place.set(quantizer(name, label, bits))
    predict = model.denoiser(rounded, chunk=3)

    def eps(x, t, step):
        for place in places.values():
            place.at_step(step)
        return predict(x, t, step)

    return ddim_sample(eps, noise.draw(), model.schedule, noise, steps=STEPS)


labels = [*chosen, "each step"]
right = draw()
drawn = {(label, bits): draw(label, bits) for bits in (8, 6) for label in labels}
quality = {key: per_image_psnr(images, right) for key, images in drawn.items()}
for label in labels:
    print(f"{label:9} median PSNR {np.median(quality[label, 8]):4.1f} dB in 8 bits, ", end="")
    print(f"{np.median(quality[label, 6]):4.1f} dB in 6 bits")
three = [np.median(quality[label, 6]) for label in ("even", "PTQ4DM", "first")]
assert np.median(quality["each step", 6]) - max(three) > 5 > max(three) - min(three)
assert np.median(quality["last", 8]) < np.median(quality["even", 8]) - 15

# %% Figure: Agreement with the float model's image, each dot one of six digits. Crosses: 8 bits. Circles: 6 bits.
figure, axes = plt.subplots()
for i, label in enumerate(labels):
    axes.plot(np.full(6, i - 0.1), quality[label, 8], "x", color=PALETTE[0])
    axes.plot(np.full(6, i + 0.1), quality[label, 6], "o", color=PALETTE[1])
axes.set_xticks(range(len(labels)), labels)
axes.set(xlabel="where the ranges come from", ylabel="PSNR / dB")
plt.show()

# %% Figure: The digits in 6 bits, from the same noise.
picture = labelled_rows([("float", right)] + [(label, drawn[label, 6]) for label in labels], scale=2)
plt.figure(figsize=(picture.shape[1] / 100, picture.shape[0] / 100)).figimage(picture)
plt.show()

# %% [markdown]
# Ranges of finished images destroy everything: the sampler never gets so far as to draw one. Ranges of noise, which
# hold in four of five cases, do surprisingly well. Even or normal hardly matters here, as both see all steps. In 6
# bits these three differ less from each other than any of them from a range for each step. If the ranges did not
# move, the five columns of dots would be alike.
#
# ## Layers that see time alone
#
# One of the four activations at the beginning is unlike the others: the time embedding does not depend on the image.
# All sixteen images gave the same range, up to the last bits of float32. There are only $T = 1000$ different inputs,
# and we can try them all.

# %%
temporal = [f"{layer}.input" for layer in temporal_layers(model.network)]
for n in names:
    differ = max(np.ptp(low[n], axis=1).max(), np.ptp(high[n], axis=1).max())
    assert (differ < 1e-5 * width[n].max()) == (n in temporal), (
        n
    )  # BLAS may sum the rows of a batch in different orders

block = TemporalBlock(model.network)
with no_grad():
    u = ops.silu(block.mlp(np.arange(1000))).data  # (1000, 64): the input of all projections, at every t
n = "up.0.block.0.temb_proj.input"
np.testing.assert_allclose(u[times].min(axis=1), low[n][:, 0], atol=1e-5)
np.testing.assert_allclose(u[times].max(axis=1), high[n][:, 0], atol=1e-5)
widest = np.ptp(u, axis=1)
print(f"{len(temporal)} of {len(names)} activations; width {widest.min():.2f} to {widest.max():.2f} over all t")
assert widest.max() > 2 * widest.min()

# %% Figure: The range of the time embedding at every t. Dots: the sampler's steps. Dotted: one range for all.
figure, axes = plt.subplots()
axes.fill_between(np.arange(1000), u.min(axis=1), u.max(axis=1), alpha=0.4, color=PALETTE[0])
axes.plot(times, u[times].max(axis=1), "o", color=PALETTE[1], markersize=4)
for end in (u.min(), u.max()):
    axes.axhline(end, color="black", linestyle=":")
axes.set(xlabel="time-step t", ylabel="value", xlim=(1000, 0))
plt.show()

# %% [markdown]
# What does one range cost *these* layers? Round the input of the projections to 8 bits and look at the squared error
# of all temporal features, with one range for all $t$ and with one for each.

# %%
weight = np.concatenate([p.weight.data for p in block.projections.values()])  # (sum of channels, 64)
feature_error = {}
for label, rounded in (
    ("one range", fake_quantize(u, minmax(u, spec))),
    ("each t", fake_quantize(u, minmax(u, QSpec(bits=8, axis=0)))),
):
    feature_error[label] = np.square((rounded - u) @ weight.T).sum(axis=1)
    print(f"{label:9}: mean over t {feature_error[label].mean():.4f}")
gain = feature_error["one range"].mean() / feature_error["each t"].mean()
print(f"{gain:.1f} times less, for two numbers a time-step")
assert gain > 1.5

# %% [markdown]
# A finite set can be calibrated exactly: no sampling, no percentiles, no luck. That is the *finite set calibration*
# of TFMQ-DM. Why these few layers deserve it, we saw in tutorial 05: whoever changes them tells the network another
# time-step. Tutorial [11](11_tfmq.md) goes on from here.
#
# ## Where this differs from the authors' code
#
# - PTQ4DM's released generator labels states with time-steps of other noise levels; ours has the paper's
#   (`refquant.quant.methods.ptq4dm`, which can do both).
# - TFMQ-DM's paper gives a range for each step to the temporal layers; its code to all activations
#   (`quant/calibration.py:108-152`), as here, from a running average over batches instead of the exact extremes.
# - The methods search ranges by squared error rather than take the extremes (exercise 1), and round the weights, too.
#
# ## On your own
#
# 1. Replace min-max by `refquant.quant.observers.mse` on the values of a layer. How many of the lost bits come back,
#    and at which time-steps?
# 2. Give a range for each step to the ten most mobile activations only. How much of the gain do you get?
# 3. Calibrate with 20 steps and sample with 10 (`steps=10`), the tables indexed by the nearest t. What breaks?
