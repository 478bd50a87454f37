# %% [markdown]
# # 10 Q-Diffusion
#
# *Calibrate over all time-steps, give the two halves of a shortcut their own scales, and let activation scales learn.*
#
# **Run time**: 20 s on two cores. **Before this**: [08](08_activations_move_with_t.md) and
# [09](09_adaround_and_blocks.md).
#
# ## What you'll do
#
# Calibrate activations on the wrong time-steps and on the right ones. Look at what a UNet's shortcut concatenates, and
# quantize the two parts apart. Then derive the gradient of a scale, and learn the scales of a block.
#
# ## What you'll learn
#
# - Why "which time-steps?" is the first question of calibration, and what a uniform choice protects from.
# - Why one scale for a concatenation wastes codes, and why splitting changes nothing where ranges are equal.
# - What the gradient of a rounding step says, and how it differs from a search over ranges.
#
# ## What you'll need
#
# Scale searches ([01](01_affine_quantization.md)) and the tape ([04](04_a_tape_in_150_lines.md)). The papers are
# Q-Diffusion (Li et al. 2023, [arXiv 2302.04304](https://arxiv.org/abs/2302.04304)) and, for the learned step, LSQ
# (Esser et al. 2020, [arXiv 1902.08153](https://arxiv.org/abs/1902.08153)). The third part of Q-Diffusion, block
# reconstruction, was the subject of page 09. Weights stay in float on this page, so that activations alone are at
# fault.

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from refquant.autograd import Tensor, gradients, no_grad, ops
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.model import load_model
from refquant.evaluate import sample_run
from refquant.metrics import psnr
from refquant.quant.affine import QParams, QSpec, fake_quantize
from refquant.quant.calibrate import Calibration, CalibrationConfig, observe, record
from refquant.quant.learn_steps import learn_steps
from refquant.quant.losses import reconstruction_loss
from refquant.quant.lsq import lsq
from refquant.quant.observers import minmax, mse
from refquant.quant.reconstruct import ReconstructionConfig
from refquant.quant.record import pick, unit_inputs, unit_output
from refquant.quant.session import Session
from refquant.quant.split import SplitConv, fake_quantize_split, observe_split, split_shortcuts
from refquant.quant.units import find_units
from refquant.quant.wrap import activation_quantizers, wrap

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | equation | function |
# |---|---|
# | states $x_t$ from every few steps of the float sampler | `refquant.quant.record.pick` |
# | $\hat x = [q_0(x_{:c}), q_1(x_{c:})]$ (eq. 8) | `refquant.quant.split.fake_quantize_split` |
# | $\hat w = [p_0(w_{:c}), p_1(w_{c:})]$ (eq. 9) | `refquant.quant.split.split_shortcuts` |
# | $\partial \hat x / \partial s$, LSQ eq. 3 | `refquant.quant.lsq.lsq` |
# | $\min_s \sum \vert f(x; s) - f(x) \vert^{2.4}$ | `refquant.quant.learn_steps.learn_steps` |
#
# ## Which time-steps?
#
# We record the float sampler once, 8 trajectories of 20 steps, and calibrate on 4 of the steps, by the extremes of what
# every activation takes there. Four choices: the noisiest steps, the last ones, and a uniform grid, once with the very
# first step and once shifted by two.

# %%
STEPS = 20
model = load_model("mnist-unet")
network = model.network
calibration = Calibration(model, CalibrationConfig(images=8, steps=STEPS, every=4))
trajectories = calibration.trajectories  # x: (20, 8, 1, 28, 28) float32
wrapped, _ = wrap(network)
choices = {
    "noisiest 4": range(4),
    "last 4": range(STEPS - 4, STEPS),
    "uniform from 0": range(0, STEPS, 5),
    "uniform from 2": range(2, STEPS, 5),
}

LAYER = "up.0.block.1.nin_shortcut.input"
seen, reaches = [], []
for step in range(STEPS):
    inputs = dict(record(wrapped, trajectories.at([step])))  # of all layers, by name
    seen.append(inputs[LAYER])  # (8, 28, 28, 32)
    reaches.append({name: abs(x).max() for name, x in inputs.items()})
reach = np.array([row[LAYER] for row in reaches])
farthest = np.array([np.argmax([row[name] for row in reaches]) for name in reaches[0]])
print(f"{np.mean(farthest == 0):.0%} of {len(farthest)} activations reach farthest at the first step,")
print(f"{np.mean(farthest >= STEPS - 4):.0%} at one of the last four")


def scale_of(steps):
    """By hand: 8 bits over the extremes of these steps; scale and zero point."""
    low, high = min(seen[k].min() for k in steps), max(seen[k].max() for k in steps)
    scale = np.float32((float(max(high, 0)) - float(min(low, 0))) / 255)
    return scale, np.rint(-min(low, 0) / scale)


def rounded(x, scale, zero):
    return scale * (np.clip(np.rint(x / scale) + zero, 0, 255) - zero)


error = {}
for label, steps in choices.items():
    scale, zero = scale_of(steps)
    q = minmax(np.concatenate([seen[k] for k in steps]), QSpec(8))
    assert scale == q.scale and zero == q.zero_point  # the library's
    error[label] = np.array([np.square(rounded(x, scale, zero) - x).mean() for x in seen])
    clipped = [np.mean((np.rint(x / scale) + zero < 0) | (np.rint(x / scale) + zero > 255)) for x in seen]
    print(f"{label:15} scale {scale:.3f}; clips up to {max(clipped):.2%} of the values of a step")

# %% Figure: A layer's reach at each step, and its error by four calibrations. If t did not matter, all would coincide.
figure, (left, right) = plt.subplots(1, 2)
left.plot(reach, "o-")
left.set(xlabel="step of the sampler, noisiest first", ylabel="largest absolute input", ylim=(0, None))
for (label, e), style in zip(error.items(), ("o-", "s--", "^-.", "x:"), strict=True):
    right.semilogy(e, style, markersize=4, label=label)
right.set(xlabel="step of the sampler", ylabel="squared error at 8 bits")
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# A range that misses a step clips there, and clipping has no bound. A range that is too wide costs a coarser grid, at
# every step, and no more than half a scale. What does that do to pictures? All inputs of all layers at 8 bits:

# %%
sampler = partial(ddim_sample, steps=STEPS)


def draw(eps):
    return sample_run(eps, model, 10, sampler, seed=7).images


def median_psnr(images):
    return float(np.median([psnr(a, b) for a, b in zip(images, reference, strict=True)]))


reference = draw(model.denoiser())
session = Session(calibration, weight_bits=32, input_bits=8)
decibel = {}
for label, steps in choices.items():
    run = session.start("tutorial")
    run.shared_inputs("minmax", seen=observe(run.network, trajectories.at(steps), seed=0))
    decibel[label] = median_psnr(draw(run.finish().denoiser()))
    print(f"{label:15} median image {decibel[label]:5.1f} dB")
assert decibel["uniform from 0"] > decibel["last 4"] + 5

# %% [markdown]
# The last steps alone, which look like images and would be the natural choice of someone with a data set, are the
# worst. A uniform choice is safe because it leaves nothing out for long. But compare the two uniform rows, and the
# first: in *this* network many layers reach farthest at the noisiest step, and whoever has that step has their range.
# In another network it may be the other end. That is why the paper takes steps from everywhere.
#
# ## Splitting a shortcut
#
# On the way up a block's input is $[h, \mathrm{skip}]$: $h$ was made a layer ago, the skip on the way down. A
# convolution of size 1 carries both past the block, without a normalisation before it.

# %%
NAME = "up.1.block.0.nin_shortcut"
split_model = split_shortcuts(model)
convs = {name: m for name, m in split_model.network.named_modules() if isinstance(m, SplitConv)}
cut = convs[NAME].channels
states = trajectories.at(range(0, STEPS, 4))
x = dict(record(wrapped, states))[f"{NAME}.input"]  # (40, 14, 14, 128), the first 96 channels are h
weight = dict(network.named_parameters())[f"{NAME}.weight"].data[:, 0, 0]  # (32, 128)
for label, part in (("h", x[..., :cut]), ("skip", x[..., cut:])):
    print(f"{label:5} {part.shape[-1]:3} channels, from {part.min():7.1f} to {part.max():6.1f}, std {part.std():.2f}")

# %% Figure: Values of the two parts, and the 8-bit scale of each. Were the bell curves alike, one scale would do.
figure, axes = plt.subplots()
bins = np.linspace(-40, 40, 161)
for label, part, colour in (("h", x[..., :cut], "C0"), ("skip", x[..., cut:], "C1")):
    scale = mse(part, QSpec(8)).scale
    axes.hist(part.ravel(), bins, density=True, alpha=0.5, color=colour, label=f"{label}, scale {scale:.3f}")
axes.axvspan(0, mse(x, QSpec(8)).scale, color="C2", label=f"one step of the shared scale {mse(x, QSpec(8)).scale:.3f}")
axes.set(xlabel="value", ylabel="density", yscale="log")
axes.legend()
plt.show()

# %% [markdown]
# One scale must reach as far as $h$ does, and the skip is left with a few codes. With two quantizers, by hand:

# %%
def by_hand(part, bits):
    """Min-max, one scale for `part`."""
    low, high = float(min(part.min(), 0)), float(max(part.max(), 0))
    scale = np.float32((high - low) / (2**bits - 1))
    zero = np.rint(np.float32(-low / scale))
    return scale * (np.clip(np.rint(part / scale) + zero, 0, 2**bits - 1) - zero)


for bits in (4, 6, 8):
    one = by_hand(x, bits)
    two = np.concatenate([by_hand(x[..., :cut], bits), by_hand(x[..., cut:], bits)], axis=-1)
    pair = observe_split(x, cut, lambda part, bits=bits: minmax(part, QSpec(bits)))
    np.testing.assert_array_equal(two, fake_quantize_split(x, cut, pair))
    out = [np.square((made - x) @ weight.T).mean() for made in (one, two)]
    print(f"{bits} bits: squared error of the convolution {out[0]:.5f} with one scale, {out[1]:.5f} with two")
    assert out[1] < out[0]

# %% [markdown]
# Two laws keep an implementation honest. With *equal* quantizers splitting changes nothing, not a bit. And a split
# network, in which two convolutions with one quantizer each take the place of one, computes what the whole one did.

# %%
same = minmax(x, QSpec(8))
np.testing.assert_array_equal(fake_quantize_split(x, cut, (same, same)), fake_quantize(x, same))

few = trajectories.at([0, 10])
with no_grad():
    image = Tensor(few.x.transpose(0, 2, 3, 1))
    whole, parts = (net(image, few.t).data for net in (network, split_model.network))
np.testing.assert_allclose(parts, whole, atol=1e-3)  # sums in another order
print(f"{len(convs)} shortcuts split; the float network's answers move by at most {abs(parts - whole).max():.1e}")

for label, float_model in (("one scale", model), ("two", split_model)):
    run = session.start("tutorial", model=float_model)
    run.shared_inputs("minmax", seen=calibration.observed(run.model.network))
    decibel[label] = median_psnr(draw(run.finish().denoiser()))
    print(f"all inputs at 8 bits, shortcuts with {label:9}  median image {decibel[label]:5.1f} dB")
assert decibel["two"] > decibel["one scale"] + 1

# %% [markdown]
# ## The gradient of a scale
#
# A search asks which range loses least of the *values*. What counts is the block's *output*. So let the scale $s$
# learn. Rounding has no useful derivative; LSQ treats it as the addition of a constant. With $v = x/s$ and the code
# $q = \mathrm{clip}(\mathrm{round}(v) + z)$:
#
# ```math
# \hat x = s (q - z), \qquad
# \frac{\partial \hat x}{\partial s} = \mathrm{round}(v) - v \ \text{ inside}, \qquad q - z \ \text{ where clipped}
# ```
#
# Inside, growing $s$ carries the point of the grid away from $x$ or towards it. Where clipped, it moves the end of the
# grid outwards. The sum over all values, weighted by what the loss wants of each, is a vote between the two.

# %%
def step_gradient(x, s, z, wanted, bits):
    """d/ds of sum(wanted * x^)."""
    v = x / s
    unclipped = np.rint(v) + z
    q = np.clip(unclipped, 0, 2**bits - 1)
    return (wanted * np.where(unclipped == q, np.rint(v) - v, q - z)).sum()


values = x[0].ravel()
q4 = minmax(values, QSpec(4))
for share in (1.0, 0.5, 0.25):  # of the whole range: the smaller, the more is clipped
    s, z = np.float32(q4.scale * share), q4.zero_point
    leaf = Tensor(s, requires_grad=True)
    made = lsq(Tensor(values), leaf, z, QSpec(4))
    (by_tape,) = gradients(ops.mse(made, values), [leaf])
    slope = step_gradient(values, s, z, 2 * (made.data - values) / values.size, 4)
    np.testing.assert_allclose(slope, by_tape, rtol=1e-3, atol=1e-4)
    print(f"scale {s:5.2f}: squared error {np.square(made.data - values).mean():6.3f}, slope {slope:+.3f}")

# %% [markdown]
# A positive slope says "make the grid finer", a negative one "reach farther". Now the scales of a whole block, on its
# output, with $p = 2.4$ as in the paper. Each is learned as a multiple of what it was, so that Adam moves large and
# small scales alike; the rate falls along a cosine. 4 bits, starting from min-max ranges.

# %%
BLOCK, ITERATIONS, RATE = "up.1.block.1", 24, 0.05
rough = Session(calibration, weight_bits=32, input_bits=4, reconstruction=ReconstructionConfig(seed=0))
states = pick(trajectories, 96, seed=0)
inputs, target = unit_inputs(network, BLOCK, states), unit_output(network, BLOCK, states)


def block_with_minmax():
    run = rough.start("tutorial")
    run.shared_inputs("minmax")
    unit = next(unit for unit in find_units(run.network, run.layers) if unit.name == BLOCK)
    return run, unit, activation_quantizers(unit.module)


def block_loss(unit, quantizers, scales):
    for q, scale in zip(quantizers.values(), scales, strict=True):
        q.set(QParams(scale, q.qparams.zero_point, q.qparams.spec))
    with no_grad():
        return reconstruction_loss(unit.module(*(Tensor(a) for a in inputs)), target, 2.4).item()


run, unit, quantizers = block_with_minmax()
first = np.array([q.qparams.scale for q in quantizers.values()])
multiple, m, v = np.ones(len(first), np.float32), 0.0, 0.0
for k in range(ITERATIONS):
    chosen = np.random.default_rng([0, k]).permutation(len(target))[:32]
    leaves = [Tensor(scale, requires_grad=True) for scale in first * multiple]
    for q, leaf in zip(quantizers.values(), leaves, strict=True):
        q.learned = leaf  # `lsq` with this scale in the place of plain rounding
    loss = reconstruction_loss(unit.module(*(Tensor(a[chosen]) for a in inputs)), target[chosen], 2.4)
    g = np.array(gradients(loss, leaves)) * first
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    step = (m / (1 - 0.9 ** (k + 1))) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
    multiple = multiple - RATE * 0.5 * (1 + np.cos(np.pi * k / ITERATIONS)) * step
for q in quantizers.values():
    q.learned = None

by_library = block_with_minmax()
learn_steps(by_library[0], [by_library[1]], states, ITERATIONS, RATE)
learned = np.array([q.qparams.scale for q in by_library[2].values()])
np.testing.assert_allclose(first * multiple, learned, rtol=0.01)  # sums in another order

searched = np.array([calibration.inputs[name].mse(QSpec(4)).scale for name in quantizers])
loss = {}
for label, scales in (("min-max", first), ("mse search", searched), ("learned", learned)):
    loss[label] = block_loss(unit, quantizers, scales)
    print(f"{label:11} loss {loss[label]:6.1f}   scales / min-max:", *(f"{c:.2f}" for c in scales / first))
assert loss["learned"] < 0.7 * loss["min-max"]

# %% [markdown]
# Is that where the minimum lies? We move one scale, that of the shortcut's input, and hold the others at their learned
# values: once looking at the block's output, as learning does, and once at the values alone, as a search does.

# %% Figure: One scale is moved. If rounding the values well were all that counts, both curves would have one minimum.
position = list(quantizers).index(f"{BLOCK}.nin_shortcut.input")
name = list(quantizers)[position]
shares = np.linspace(0.2, 1.1, 13)
passing = dict(record(wrapped, states[::4]))[name]
zero, on_output, on_values = quantizers[name].qparams.zero_point, [], []
for share in shares:
    scales = learned.copy()
    scales[position] = share * first[position]
    on_output.append(block_loss(unit, quantizers, scales))
    moved = fake_quantize(passing, QParams(scales[position], zero, QSpec(4)))
    on_values.append((abs(moved - passing) ** 2.4).mean())
figure, axes = plt.subplots()
axes.plot(shares, np.array(on_output) / min(on_output), "o-", label="loss of the output")
axes.plot(shares, np.array(on_values) / min(on_values), "s--", label="loss of the values")
for scales, label, style in ((learned, "learned", "C0:"), (searched, "mse search", "C1:")):
    axes.axvline(scales[position] / first[position], color=style[:2], linestyle=style[2:], label=label)
axes.set(xlabel="scale of the shortcut's input / min-max scale", ylabel="loss / least loss", yscale="log")
axes.legend()
plt.show()

# %% [markdown]
# ## Where this differs from the authors' code
#
# - The released code (q-diffusion at 715783d) regularises the first part of a split weight only
#   (`qdiff/block_recon.py:221-224`); the second is learned without the rounding term. Here both parts are layers.
# - Its CIFAR script takes raw min-max ranges as they are before learning; the library starts from the mse search. The
#   page starts from min-max, to show what learning can do.
# - Its rate for scales is 4e-4 for all of them (`qdiff/block_recon.py:58-140`), whatever their size, and users report
#   divergence; ours is relative.
# - LSQ's paper clips before it rounds, and scales the gradient by $1/\sqrt{N q_{max}}$; the released code and
#   `refquant.quant.lsq` do neither.
# - Calibration there draws 256 states from each of 20 steps; here 8 trajectories must do.
#
# ## On your own
#
# 1. Which layers reach farthest at the last steps? Plot `reach` for several `LAYER`, and predict from it what "last 4"
#    does to them.
# 2. Learn the scales of the block in the split network: the shortcut now has two inputs. Is there anything left for
#    learning to gain?
# 3. Start learning from the mse search. Which scales move, and in which direction?
