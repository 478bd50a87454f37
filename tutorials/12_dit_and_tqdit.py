# %% [markdown]
# # 12 A diffusion transformer, and TQ-DiT
#
# *Two regions for softmax and GELU, and when they pay; what a wrong Hessian looks like; where time enters.*
#
# **Run time**: 45 s on two cores. **Before this**: [01](01_affine_quantization.md), [08](08_activations_move_with_t.md)
# and [11](11_tfmq.md).
#
# ## What you'll do
#
# Draw digits on request with the shipped diffusion transformer, and look at two kinds of numbers that it is full of:
# softmax outputs, and GELU outputs. Give each two step sizes by hand, multiply in integers, and find out for which of
# them that was a good idea. Then ask whose errors the network minds: by the released codes' slopes, one of which is
# right by accident; by the true curvature; and see the truth mislead. At last, break and mend what the transformer is
# told about time and class.
#
# ## What you'll learn
#
# - Why two regions for softmax outputs need one integer accumulator, and for GELU outputs two.
# - A rule for GELU that needs no search: count the positive numbers.
# - How the best split moves with the time-step, which is all that "time grouping" is about.
# - Why the slope of a loss at its minimum is no curvature, and why the true curvature of the loss is not what images
#   mind.
# - That a transformer's modulations are its temporal features, and that TFMQ-DM's cure works on them.
#
# ## What you'll need
#
# Scales and zero points, and the temporal features of page 11. The papers are TQ-DiT: Hwang, Lee, Kang, *TQ-DiT:
# Efficient Time-Aware Quantization for Diffusion Transformers*, 2025, [arXiv
# 2502.04056](https://arxiv.org/abs/2502.04056); PTQ4ViT: Yuan et al., 2022, [arXiv
# 2111.12293](https://arxiv.org/abs/2111.12293), from which its two regions come; and the network itself, Peebles &
# Xie, 2023, [arXiv 2212.09748](https://arxiv.org/abs/2212.09748).

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from refquant.autograd import Tensor, gradients, no_grad, ops
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.model import load_model
from refquant.evaluate import Judge, Request, sample_run
from refquant.metrics import psnr
from refquant.nn.module import Module, Parameter
from refquant.quant.affine import QSpec, fake_quantize, quantize
from refquant.quant.calibrate import Calibration, CalibrationConfig
from refquant.quant.curvature import evened, samples
from refquant.quant.guided import shrunk_ranges
from refquant.quant.methods import tfmq
from refquant.quant.mrq_sign import GELU_LOWEST, SignSplit, pays, share_of_positives
from refquant.quant.mrq_softmax import SoftmaxRegions, accumulate, choose_shift, released_additive
from refquant.quant.observers import minmax
from refquant.quant.session import Session
from refquant.quant.temporal import every_condition, features, quantized_features
from refquant.quant.units import temporal_layers
from refquant.quant.wrap import activation_quantizers, rebuild, wrap
from refquant.viz import difference_images, labelled_rows

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | paper | equation | function |
# |---|---|---|
# | a block of DiT | $x + \alpha_1 \mathrm{attention}(\mathrm{LN}(x)(1 + \gamma_1) + \beta_1)$, then the same with an MLP | `refquant.nn.dit.DiTBlock` |
# | its modulation (adaLN) | $(\beta_1, \gamma_1, \alpha_1, \beta_2, \gamma_2, \alpha_2) = \mathrm{Linear}(\mathrm{SiLU}(c))$ | `refquant.nn.dit.Modulation` |
# | MRQ, softmax | $s_1 = 2^{-m} / (h - 1)$ below $2^{-m}$, $s_2 = 1 / (h - 1)$ above, $h = 2^{k-1}$ | `refquant.quant.mrq_softmax.SoftmaxRegions` |
# | MRQ, GELU | one step for $x < 0$, one for $x \ge 0$ | `refquant.quant.mrq_sign.SignSplit` |
# | TGQ, eq. 9 | one $m$ for each group of the sampler's steps | `refquant.quant.observers.TimeGroups` |
# | HO, eq. 14 to 17 | $\min \sum_j (\partial L / \partial z_j)^2 (\hat z_j - z_j)^2$ | `refquant.quant.guided.search` |
# | all of it | | `refquant.quant.methods.tqdit.quantize` |
#
# ## Digits on request
#
# The image is cut into 49 patches, each becomes a *token* of 96 numbers, and six blocks let the tokens look at each
# other (attention) and think for themselves (an MLP). The time-step $t$ and the wanted digit $y$ are made into one
# vector $c$, and that into shifts, scales and gates for every block. Id 10 means "no digit in particular".

# %%
STEPS = 20
model = load_model("mnist-dit")
network, T, K = model.network, np.arange(model.schedule.timesteps), model.classes
sampler = partial(ddim_sample, steps=STEPS)
request = Request(np.arange(10), guidance=1.0)  # 1: the conditional model, neither more nor less


def draw(eps):
    return sample_run(eps, model, 10, sampler, seed=12, request=request).images


reference = draw(model.denoiser())
cfg, judge = network.cfg, Judge()
print(f"{network.parameter_count():,} parameters, {cfg.depth} blocks, {cfg.heads} heads, {cfg.tokens} tokens")
print(f"recognised as the digit that was asked for: {judge.obedient(reference, request.y):.0%} of these ten")

# %% [markdown]
# Quantizers are calibrated on what the network really sees: states of its own sampler, for every second trajectory
# with a class and else without. From seven steps of it, take what passes each block: queries, keys and values of its
# attention, and the outputs of its GELU.

# %%
calibration = Calibration(model, CalibrationConfig(images=16, steps=STEPS))
trajectories = calibration.trajectories
LOOKED_AT = np.linspace(0, STEPS - 1, 7).round().astype(int)  # steps of the sampler, the noisiest first
times = trajectories.t[LOOKED_AT]
names = [f"blocks.{i}.{part}" for i in range(cfg.depth) for part in ("attn.product", "mlp.fc2")]
seen = {k: samples(model, names, trajectories, trajectories.at([k])[:8], "none") for k in LOOKED_AT}


def attention(k, block):
    """Softmax outputs P (heads of images, 49, 49) and V (..., 49, 32) of a block at step k of the sampler."""
    q, key, v = seen[k][f"blocks.{block}.attn.product"].inputs
    scores = q @ key.transpose(0, 2, 1) / np.sqrt(np.float32(q.shape[-1]))
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True), v


def gelu_outputs(k, block):
    return seen[k][f"blocks.{block}.mlp.fc2"].inputs[0].ravel()


p, v = attention(LOOKED_AT[1], 3)
assert np.allclose(p.sum(axis=-1), 1, atol=1e-5)
print(f"of {p.size:,} softmax outputs {np.mean(p < 1 / 256):.0%} lie below 1/256,", end=" ")
print(f"and {np.mean(p > 0.25):.2%} above 1/4")

# %% [markdown]
# ## Two regions for softmax outputs
#
# 256 codes spread evenly over $[0, 1]$ send all numbers below 1/512 to 0: most of them. A finer step would cut off the
# few large ones, which matter most. So TQ-DiT, like PTQ4ViT, spends one bit on saying which of two steps is meant. With
# $k$ bits, $h = 2^{k-1}$ codes are left for either:

# %%
def codes_by_hand(x, bits, m):
    """Integers u, of which x is about u s_1: fine codes as they are, coarse ones shifted left by m bits."""
    h = 2 ** (bits - 1)
    s2 = 1 / (h - 1)
    s1 = s2 * 2.0**-m
    fine, coarse = np.rint(x / s1), np.rint(x / s2)
    return np.where(x < 2.0**-m, np.minimum(fine, h - 1), np.ldexp(coarse, m)).astype(np.int64), s1


regions = choose_shift(p, v, bits=8)  # the m with the smallest error of P V
codes = regions.quantize(p)  # uint8: the flag, and 7 bits
u, s1 = codes_by_hand(p, 8, regions.shift)
assert np.mean(u != regions.integers(codes)) < 1e-4  # float32 against float64, at ties
np.testing.assert_allclose(s1, regions.fine, rtol=1e-6)

# %% [markdown]
# The coarse step is the fine one, shifted by $m$ bits. That is no accident: whatever the region, a probability is an
# *integer* times $s_1$, so that attention's second product needs a single integer accumulator.

# %%
v_params = minmax(v, QSpec(8))
v_codes = quantize(v, v_params)
sums = accumulate(regions, codes, v_codes, int(v_params.zero_point))  # int32
floats = (s1 * u) @ (v_params.scale * (v_codes.astype(np.float64) - v_params.zero_point))
np.testing.assert_allclose(regions.fine * v_params.scale * sums, floats, rtol=1e-4, atol=1e-6)
print(f"m = {regions.shift}: fine step 1/{1 / s1:.0f} below 1/{2**regions.shift}, coarse step 1/127 above")
print(f"largest sum {abs(sums).max():,}; int32 ends at {2**31 - 1:,}")

# %% [markdown]
# Is it better? Against what, is the question. The papers compare with a quantizer over all of $[0, 1]$, or a signed
# one, which has no use for half of its codes. The fair opponent is uniform, unsigned, and has searched for its
# largest value as we have for $m$. The error is that of $P V$, for all blocks and seven steps of the sampler.

# %%
SHRINK = np.geomspace(1, 2**-7, 40)


def mean_square(x):
    return float(np.square(x).mean())


def opponents(p, v, bits):
    """The error of P V by each quantizer with its best parameter."""
    unsigned = shrunk_ranges(p, QSpec(bits, signed=False, symmetric=True), SHRINK)
    unit = shrunk_ranges(np.float32([0, 1]), QSpec(bits, signed=False, symmetric=True), [1.0])
    return {
        "uniform, all of [0, 1]": min(mean_square((fake_quantize(p, q) - p) @ v) for q in unit),
        "uniform, searched": min(mean_square((fake_quantize(p, q) - p) @ v) for q in unsigned),
        "released code": min(mean_square((released_additive(p, bits, m) - p) @ v) for m in range(12)),
        "MRQ, disjoint": min(mean_square((SoftmaxRegions(bits, m).fake_quantize(p) - p) @ v) for m in range(bits)),
    }


places = [(k, block) for k in LOOKED_AT for block in range(cfg.depth)]
errors = {bits: [opponents(*attention(*place), bits) for place in places] for bits in (8, 6, 4)}
print("softmax outputs          8 bits   6 bits   4 bits      error relative to the searched uniform quantizer,")
for name in errors[8][0]:  # geometric mean, because errors of different blocks differ by orders of magnitude
    ratios = [np.exp(np.mean([np.log(e[name] / e["uniform, searched"]) for e in errors[b]])) for b in errors]
    print(f"{name:22}", *(f"{ratio:8.2f}" for ratio in ratios))
best = {b: sum(e["MRQ, disjoint"] < e["uniform, searched"] for e in errors[b]) for b in errors}
print("MRQ is the better one in", ", ".join(f"{n} of {len(places)} at {b} bits" for b, n in best.items()))

assert best[8] > 0.7 * len(places) and best[8] > best[4]
assert all(e["released code"] > e["MRQ, disjoint"] for e in errors[8])

# %% [markdown]
# Two lessons besides the good news. The released code *adds* its two halves instead of choosing one, which moves every
# large probability up by the split; it loses even to the plain quantizer (it is here for study:
# `refquant.quant.mrq_softmax.released_additive`). And at 4 bits hardly anything is gained: with 8 codes for either
# region both steps are coarse. Where does MRQ lose at 8 bits? Sort the blocks by how peaked their attention is.

# %%
def peak(place):
    """Mean of the largest probability of a row: 1/49 is flat, 1 is a hard choice."""
    return float(attention(*place)[0].max(axis=-1).mean())


peaks = np.array([peak(place) for place in places])
gains = {b: np.array([e["uniform, searched"] / e["MRQ, disjoint"] for e in errors[b]]) for b in errors}
for label, part in (("flattest third", np.argsort(peaks)[:14]), ("most peaked third", np.argsort(peaks)[-14:])):
    typical = np.exp(np.log(gains[8][part]).mean())
    print(f"{label:18} error of the searched uniform quantizer / that of MRQ, 8 bits: {typical:.1f}")

# %% Figure: What MRQ gains, against how peaked attention is. If it always paid, all points would lie above the line.
figure, axes = plt.subplots()
for (bits, gain), marker in zip(gains.items(), "os^", strict=True):
    axes.loglog(peaks, gain, marker, alpha=0.7, label=f"{bits} bits")
axes.axhline(1, color="#888888", linewidth=1)
axes.set(xlabel="mean of the largest probability of a row", ylabel="error, uniform / MRQ")
axes.legend()
plt.show()

# %% [markdown]
# Flat attention has no large probabilities: a uniform quantizer that ends at the largest value uses all of its 256
# codes below it, MRQ half of them.
#
# ## How the best split moves with t
#
# In which steps is attention peaked? One might guess in the last, when there is something to look at. It is the other
# way round: tokens choose their neighbours while the image is still noise, and at the end each patch knows what it
# needs. The best $m$ follows. *Time grouping* (TGQ) gives each group of steps its own $m$, and costs one small integer
# for each.

# %%
def error_of(place, m, bits=8):
    p, v = attention(*place)
    return mean_square((SoftmaxRegions(bits, m).fake_quantize(p) - p) @ v)


by_m = np.array([[[error_of((k, block), m) for m in range(8)] for k in LOOKED_AT] for block in range(cfg.depth)])
best_m = by_m.argmin(axis=2)  # (blocks, steps looked at)
one_m = by_m.sum(axis=1).argmin(axis=1)  # of each block, for all steps
together = np.take_along_axis(by_m, one_m[:, None, None], axis=2)[..., 0]
grouped = by_m.min(axis=2)
print("block   best m at t =", *(f"{t:4}" for t in times), "  one m   its error / that of groups, worst t")
for block in range(cfg.depth):
    worse = together[block] / grouped[block]
    print(f"{block:5}                ", *(f"{m:4}" for m in best_m[block]), f"{one_m[block]:7} {worse.max():17.2f}")
print(f"over all of them, one m for all steps has {together.sum() / grouped.sum():.3f} times the error of groups")
assert len(np.unique(best_m)) > 1 and (together >= grouped).all()
assert peaks[: cfg.depth].mean() > 2 * peaks[-cfg.depth :].mean()  # the first step looked at, and the last

# %% Figure: Left: how peaked attention is over time, by block. Right: error against m at three times; a minimum that stayed would make time grouping useless.
figure, (left, right) = plt.subplots(1, 2)
for block in range(cfg.depth):
    left.plot(times, [peak((k, block)) for k in LOOKED_AT], "o-", markersize=4, label=f"block {block}")
left.set(xlabel="time-step t", ylabel="mean largest probability", yscale="log")
left.legend(fontsize=8, ncols=2)
moves = int(np.argmax((together / grouped).max(axis=1)))
for i in (0, len(times) // 2, len(times) - 1):
    right.semilogy(by_m[moves, i], "o-", markersize=4, label=f"t = {times[i]}")
right.set(xlabel=f"m, block {moves}", ylabel="mean squared error of P V")
right.legend()
plt.show()

# %% [markdown]
# The split does move, and for a block it may matter. In sum it hardly does: the times at which another $m$ is better
# are those with little error anyway.
#
# ## GELU: count the positive numbers
#
# GELU's outputs are never below -0.17. An asymmetric quantizer spends its codes on $[-0.17, \max]$ evenly. MRQ spends
# half on the short negative side, whose error all but vanishes, and half on the other, whose step doubles, so that its
# error quadruples. With a share $p$ of positive numbers, that is $4 p$ against $1$:
#
# ```math
# \mathrm{MRQ\ pays} \iff p < 1/4
# ```
#
# A rule that takes one pass over the data. Is it true? On normal numbers of any mean, and on the model's own.

# %%
def split_against_asymmetric(x, bits=8):
    """Squared error of MRQ with its best positive step, over that of the best asymmetric quantizer."""
    largest, half = float(x.max()), 2 ** (bits - 1)
    found = [SignSplit(bits, GELU_LOWEST / (half - 1), largest * r / (half - 0.5)) for r in np.linspace(0.3, 1.1, 41)]
    one = min(mean_square(fake_quantize(x, q) - x) for q in shrunk_ranges(x, QSpec(bits), np.linspace(0.3, 1, 36)))
    return min(mean_square(grid.fake_quantize(x) - x) for grid in found) / one


def gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


rng = np.random.default_rng(0)
normal = [gelu(rng.normal(mean, 1, 8000)).astype(np.float32) for mean in np.linspace(-2, 0.5, 11)]
own = [rng.choice(gelu_outputs(*place), 8000) for place in places]
shares, ratios = ([f(x) for x in normal + own] for f in (share_of_positives, split_against_asymmetric))
shares, ratios = np.array(shares), np.array(ratios)
right = np.mean((ratios < 1) == (shares < 0.25))
print(f"share of positive numbers in the model: {shares[11:].min():.2f} to {shares[11:].max():.2f}")
print(f"the rule is right in {right:.0%} of {len(ratios)} cases; in the model MRQ pays in {np.sum(ratios[11:] < 1)}")
wrong = shares[(ratios < 1) != (shares < 0.25)]
assert right > 0.75 and (abs(wrong - 0.25) < 0.1).all()
assert [bool(pays(x)) for x in own] == [bool(s < 0.25) for s in shares[11:]]

# %% Figure: MRQ against one asymmetric step, over the share of positives. The line is 4p: a derivation, not a fit.
figure, axes = plt.subplots()
axes.loglog([0.005, 0.7], [0.02, 2.8], color="#888888", linewidth=1, label="4 p")
axes.plot(shares[:11], ratios[:11], "o", label="GELU of normal numbers")
axes.plot(shares[11:], ratios[11:], "^", alpha=0.6, label="this model, all blocks and times")
axes.axhline(1, color="#888888", linewidth=1, linestyle=":")
axes.axvline(0.25, color="#888888", linewidth=1, linestyle=":")
axes.set(xlabel="share of positive numbers p", ylabel="error, MRQ / asymmetric")
axes.legend()
plt.show()

# %% [markdown]
# The papers split everywhere, and show a gain, for they compare with a symmetric quantizer. `tqdit` splits where the
# rule says so.
#
# ## What a wrong Hessian looks like
#
# To second order, an error $e$ of a layer's output $z$ costs $e^\top H e$. "Hessian-guided" searches weigh the squared
# error of every output by the diagonal of $H$. With $f$ the network's answer and $J = \partial f / \partial z$, every
# recipe for it is a vector that is pulled back through the network:
#
# | recipe | pulled back | weight |
# |---|---|---|
# | released code | slope of $KL(\mathrm{softmax}(f_{ref}) \Vert \mathrm{softmax}(f))$: $\mathrm{softmax}(f) - \mathrm{softmax}(f_{ref})$ | its square |
# | Fisher, the paper's text | slope of the denoising loss: $2 (f - \mathrm{wanted})$ | its square |
# | Gauss-Newton | random signs $v$: $E[(J^\top v)^2] = \mathrm{diag}(J^\top J)$ | its square |
#
# In the first, $f_{ref}$ is the same network's own answer. The slope of a distance at its minimum is nothing. In
# PTQ4ViT's code what remains is rounding noise: sums in another order, as in batches of another size. In TQ-DiT's it is
# not nothing, since there the two answers go through a guidance wrapper, in batches of 32 and of 4, that mixes the
# elements of a batch. Let us do both.

# %%
def softmax_of_rows(x):  # along the last axis of an image, as released
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def answers(x, t, y, chunk):
    with no_grad():
        parts = [slice(i, i + chunk) for i in range(0, len(x), chunk)]
        return np.concatenate([network(Tensor(x[s]), t[s], y=y[s]).data[..., 0] for s in parts])


def through_the_wrapper(x, t, y, chunk, weight=1.5):
    """The released forward_with_cfg: the second half of a batch is thrown away, the first takes its place."""
    out = []
    for i in range(0, len(x), chunk):
        part = slice(i, i + chunk)
        half = x[part][: chunk // 2]
        both = answers(np.concatenate((half, half)), t[part], y[part], chunk)
        with_class, without = np.split(both, 2)
        mixed = without + weight * (with_class - without)
        out.append(np.concatenate((mixed, mixed)))
    return np.concatenate(out)


states = trajectories.at(LOOKED_AT)
states = states[rng.permutation(len(states))[:64]]
x = np.ascontiguousarray(states.x.transpose(0, 2, 3, 1))  # (64, 28, 28, 1)
asked = (x, states.t, states.y)
slope = {
    "the plain network (PTQ4ViT)": softmax_of_rows(answers(*asked, 4)) - softmax_of_rows(answers(*asked, 32)),
    "through guidance (TQ-DiT)": softmax_of_rows(through_the_wrapper(*asked, 4))
    - softmax_of_rows(through_the_wrapper(*asked, 32)),
}
for name, value in slope.items():
    print(f"released slope, {name:27} largest {abs(value).max():.1e}; probabilities are about {1 / 28:.2f}")
first, second = slope.values()
assert abs(first).max() < 1e-5 < 1e-2 < abs(second).max()

# %% [markdown]
# Noise in one case, the mixing up of batches in the other. Pull them back to the 49 x 96 outputs of an attention, and
# compare with Gauss-Newton weights from many random signs. (`tests/unit/quant/test_curvature.py` checks those against
# the exact diagonal, by a pull for each pixel.)

# %%
class Keep(Module):
    """A module that remembers the tensor it gave."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *x):
        self.output = self.module(*x)
        return self.output


def pull_back(seeds, layer, x, t, y):
    """Jᵀ seed for each of the states: seeds and x (N, 28, 28, 1) -> (N, 49, features) at a layer's output."""
    kept = {}

    def keep(name, module):
        if name == layer:
            kept[name] = Keep(module)
        return kept.get(name)

    answer = rebuild(network, keep)(Tensor(x), t, y=y)
    return gradients(ops.sum_all(ops.mul(answer, Tensor(seeds))), [kept[layer].output])[0]


LAYER, ONE = "blocks.2.attn.proj", 5  # and one of the states


def sign_weights(which, layer=LAYER):
    """(Jᵀ v)² for these states, v of random signs."""
    v = rng.choice(np.float32([-1, 1]), (len(which), 28, 28, 1))
    return np.square(pull_back(v, layer, *(a[which] for a in asked)))


many = np.mean([sign_weights(np.full(24, ONE)).mean(axis=0) for _ in range(4)], axis=0)
weights = {"one draw of signs": sign_weights(np.arange(64))}
weights |= {name: np.square(pull_back(s[..., None], LAYER, *asked)) for name, s in slope.items()}


def agreement(a, b):
    return float(np.corrcoef(np.log(a.ravel() + 1e-30), np.log(b.ravel() + 1e-30))[0, 1])


def of_state(w):  # (64, 49, 96) -> (64,): how much each state counts
    return w.mean(axis=(1, 2))


truth = np.mean([of_state(sign_weights(np.arange(64))) for _ in range(4)], axis=0)
inside = {name: agreement(w[ONE], many) for name, w in weights.items()}
across = {name: agreement(of_state(w), truth) for name, w in weights.items()}
print("correlation of logarithms with Gauss-Newton's weights   outputs of one state   64 states")
for name in weights:
    print(f"  {name:50} {inside[name]:18.2f} {across[name]:13.2f}")

noise, mixed = "the plain network (PTQ4ViT)", "through guidance (TQ-DiT)"
assert min(inside.values()) > 0.5 and across[noise] > 0.9 > across[mixed] + 0.1

# %% [markdown]
# A surprise, and a fair one: what is left of PTQ4ViT's slope is *not* useless. Whatever vector one pulls back, it
# comes out with the shape of $J$, and rounding noise is as random as random signs are: up to a factor of some
# $10^{-14}$ it is one draw of Gauss-Newton, by accident. TQ-DiT's slope has the shape of $J$ as well, but how much
# each *state* counts is decided by which strangers shared its batch.

# %% Figure: How much each of 64 states counts. Points along a diagonal have the right order; those of mixed batches have one of their own.
figure, panels = plt.subplots(1, 3, figsize=(8, 2.9), sharex=True)
for axes, (name, w) in zip(panels, weights.items(), strict=True):
    points = axes.scatter(truth, of_state(w) + 1e-30, c=states.t, s=12)
    axes.set(xscale="log", yscale="log")
    axes.set_title(name, fontsize=9)
panels[0].set(ylabel="mean weight of a state")
panels[1].set(xlabel="Gauss-Newton's weight, mean of 4 draws")
figure.colorbar(points, ax=panels, label="t")
plt.show()

# %% [markdown]
# ## A right Hessian can mislead, too
#
# The colours tell something else: by the true curvature the cleanest states, those of small $t$, count most. There the
# network is most sensitive, and there the sampler hardly moves any more.
#
# Does that matter? Take one quantizer, that of the inputs of an MLP's first layer; shrink its range step by step, which
# makes the rounding finer and clips more; everything else stays in float. What does the network's answer suffer, on the
# average over states? What do the *images* suffer? And which range would a search choose?

# %%
LAYER = "blocks.2.mlp.fc1"
SHRINKS = np.linspace(1, 0.25, 16)
wrapped, _ = wrap(network)
quantizer = activation_quantizers(wrapped)[f"{LAYER}.input"]
inner = [f"blocks.{i}.{part}" for i in range(cfg.depth) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
sampled = samples(model, inner, trajectories, states, "gauss-newton", tokens=20)
matrices = {name: p.data for name, p in network.named_parameters()}
GUIDES = ("no guide", "curvature", "curvature, steps alike")


def choices(layer):
    """Candidates for the inputs of a layer, and the one that each guide chooses."""
    (rows,), w, g = sampled[layer].inputs, matrices[f"{layer}.weight"], sampled[layer].g
    grids = shrunk_ranges(rows, QSpec(6), SHRINKS)
    errors = [(fake_quantize(rows, q) - rows) @ w.T for q in grids]
    weights = dict(zip(GUIDES, (1, g, evened(sampled[layer]).g), strict=True))
    return grids, {name: int(np.argmin([mean_square(g * e) for e in errors])) for name, g in weights.items()}


grids, chosen = choices(LAYER)

with no_grad():
    wanted = wrapped(Tensor(x), states.t, y=states.y).data
answer, image = [], []
for grid in grids:
    quantizer.set(grid)
    with no_grad():
        answer.append(mean_square(wrapped(Tensor(x), states.t, y=states.y).data - wanted))
    image.append(mean_square(draw(model.denoiser(wrapped)) - reference))
quantizer.set(None)
answer, image = np.array(answer), np.array(image)

print(f"best range for the answers: {SHRINKS[answer.argmin()]:.2f} of the full one;", end=" ")
print(f"for the images {SHRINKS[image.argmin()]:.2f}")
for name, i in chosen.items():
    print(f"{name:24} chooses {SHRINKS[i]:.2f}; error of the answers {answer[i] / answer.min():5.2f} times the least,"
          f" of the images {image[i] / image.min():5.2f} times")

# %% Figure: Error against the range that is kept. Were the loss what the images mind, both minima would be at one place.
figure, axes = plt.subplots()
axes.semilogy(SHRINKS, answer / answer.min(), "o-", markersize=4, label="the network's answers")
axes.semilogy(SHRINKS, image / image.min(), "s-", markersize=4, label="the images")
for (name, i), (colour, style) in zip(chosen.items(), (("C2", "-"), ("C3", "--"), ("k", ":")), strict=True):
    axes.axvline(SHRINKS[i], color=colour, linestyle=style, label=f"choice: {name}")
axes.set(xlabel="range kept", ylabel="squared error, 1 is the least")
axes.legend(fontsize=8)
plt.show()
assert answer[chosen["curvature"]] < 1.5 * answer.min()

# %% [markdown]
# The curvature kept its promise: its choice is nearly the best *for the answers*. The images want less to be clipped.
# But one layer is an anecdote. So let each guide choose the ranges of all inputs of the six blocks, and draw:

# %%
of_all = {layer: choices(layer) for layer in inner}
lost = {}
for name in GUIDES:
    for layer, (candidates, picked) in of_all.items():
        activation_quantizers(wrapped)[f"{layer}.input"].set(candidates[picked[name]])
    images = draw(model.denoiser(wrapped))
    lost[name] = mean_square(images - reference)
    kept = np.mean([SHRINKS[picked[name]] for _, picked in of_all.values()])
    each = [psnr(a, b) for a, b in zip(images, reference, strict=True)]
    print(f"{name:24} keeps {kept:.2f} of the ranges; error of the images {lost[name]:.4f},", end=" ")
    print(f"median {np.median(each):.1f} dB")
assert lost["curvature, steps alike"] < lost["curvature"] / 1.3

# %% [markdown]
# Answers at the end of sampling are not images: there the network is sensitive, and there is little left to decide. So
# `tqdit` lets every step of the sampler count alike (`refquant.quant.curvature.evened`), which asks the Hessian for
# what it knows, which outputs of one state matter, and not for what it does not. That brings it back to where a search
# without any guide is, more or less: the squares of one draw of signs are noisy, and their advantage over treating all
# outputs alike, on this network, is not larger than that noise (the README, under *The methods*, has W6A6 with and
# without a guide).
#
# ## Where time enters
#
# What a block is told is its modulation: shifts, scales and gates, six vectors for each block, all made from $t$ and
# $y$ by layers that never see the image. This is page 11's Temporal Information Block under another name, except that
# it *multiplies*. TQ-DiT, PTQ4DiT and Q-DiT leave it in float, a third of all weights.

# %%
temporal = temporal_layers(network)
count = {name: p.data.size for name, p in network.named_parameters() if name.endswith("weight")}
share = sum(count[f"{name}.weight"] for name in temporal) / network.parameter_count()
told = every_condition(T[::10], K)  # every tenth time-step, with every class and with none
exact = features(network, *told)
print(f"{len(temporal)} of {len(wrap(network)[1])} layers, {share:.0%} of the parameters, see time and class alone")
print(f"all they are ever asked: {len(T)} time-steps x {K + 1} classes = {len(T) * (K + 1):,} conditions")
assert [n for n in temporal if "t_embedder" not in n] == list(exact)

session = Session(calibration, weight_bits=4, input_bits=32)


def with_chain(kind):
    """A model whose temporal layers alone have 4 bits, by nearest rounding or by TIAR; or all others have them."""
    run = session.start("tutorial")
    run.nearest_weights()
    if kind == "TIAR":
        tfmq.tiar(run, temporal, T, iterations=150)
    for name in run.layers:
        if (name in temporal) == (kind == "all others"):
            run.layers[name].layer.weight = Parameter(run.weight(name))
            run.layers[name].weight_qparams = run.layers[name].codes = None
    return run.finish()


found, pictures = {}, {}
for kind in ("nearest", "TIAR", "all others"):
    made = with_chain(kind)
    got = quantized_features(made, *told)
    found[kind] = sum(np.square(got[n] - exact[n]).sum(axis=1) for n in exact).reshape(-1, K + 1)  # (t, classes)
    pictures[kind] = draw(made.denoiser())
    each = [psnr(a, b) for a, b in zip(pictures[kind], reference, strict=True)]
    label = "all others W4, chain float" if kind == "all others" else f"chain W4 by {kind}, others float"
    print(f"{label:32} error of modulations {found[kind].mean():6.2f}; median image {np.median(each):.1f} dB")
loss = {k: np.median(np.square(images - reference).mean(axis=(1, 2, 3))) for k, images in pictures.items()}
assert found["TIAR"].mean() < found["nearest"].mean() / 1.5 and not found["all others"].any()
assert loss["TIAR"] < loss["nearest"] < loss["all others"]

# %% Figure: Squared error of all modulations over time, mean and range over the eleven classes. Were the gain one of chance, the curves would cross.
figure, axes = plt.subplots()
for kind in ("nearest", "TIAR"):
    (line,) = axes.semilogy(T[::10], found[kind].mean(axis=1), label=f"4 bits, {kind}")
    axes.fill_between(T[::10], found[kind].min(axis=1), found[kind].max(axis=1), alpha=0.25, color=line.get_color())
axes.set(xlabel="time-step t", ylabel="squared error, all blocks")
axes.legend()
plt.show()

# %% Figure: Ten digits on request, in float, and what they lose: chain rounded to nearest, by TIAR, all other layers rounded.
rows = [("float32", reference)]
rows += [(f"{kind},\ndifference x 3", difference_images(images, reference, gain=3))
         for kind, images in pictures.items()]
picture = labelled_rows(rows)
plt.figure(figsize=(picture.shape[1] / 100, picture.shape[0] / 100)).figimage(picture)
plt.show()

# %% [markdown]
# TIAR never saw an image, and could not: its data are the 11,000 conditions. It mends what the rounding of the chain
# broke. (Single digits bend at a push: that is why medians are compared.) But look at the last row: in this network the
# chain is not where most is lost, and keeping a third of all weights in float is a high price for little.
# `tfmq` maintains the chain of a transformer as of a UNet, and then
# reconstructs the blocks, where there is more to win. `refquant compare --model mnist-dit` puts all methods into one
# table; `tqdit:coverage=released` among its `--methods` is a row with the chain in float.
#
# ## Where this differs from the authors' code
#
# - zerohye/TQ-DiT at 95397df cannot run as published: files are missing (`quant_dataset.py` among them), one line
#   does not parse, and 10 groups of steps are calibrated where the model counts to 25. What is said of it here was
#   read, and repeated where it could be; its tables could not be had, so nothing is compared with them.
# - Its two regions are added, ours are disjoint; its $m$ goes to 19, ours to $k - 1$, from where on the coarse step
#   would lose what lies just above the split (`quant_layers/matmul.py`).
# - It splits GELU's outputs always, with the negative step fixed at 0.17 over its codes; ours, the same, where the rule
#   says so (`quant_layers/linear.py`).
# - Its gradient is the slope of the section above (`utils/quant_calib.py`); ours is Gauss-Newton's, each step alike, or
#   the Fisher of the paper's text (`guide="fisher"`).
# - Weights there have one symmetric step for a layer; here one asymmetric for each output. Time-step MLP and
#   modulations stay in float there; that is `coverage="released"` here.
# - Softmax outputs have 8 bits here whenever activations have fewer (`refquant.quant.coverage`); there as many as
#   others.
#
# ## On your own
#
# 1. Let the split of GELU depend on the time-step: for which blocks does the rule change its mind? What would a table
#    of sign-splits over groups of steps gain?
# 2. Guidance 3 exaggerates the class: set it in `request`, and look at the errors of the images again. Do errors of the
#    modulations matter more or less? Predict first.
# 3. Weigh every step by what it does to the image instead of alike: put noise of a fixed size into the answers of one
#    step, finish the sampling in float, and measure the image (`refquant.quant.importance.step_errors` can be asked for
#    exactly that). Multiply the guides by it. Is that better than "steps alike"?
