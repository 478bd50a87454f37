# %% [markdown]
# # 09 AdaRound, and from layers to blocks
#
# *Why rounding to nearest is not best, how to learn a better rounding, and what changes when a block learns as one.*
#
# **Run time**: 25 s on two cores. **Before this**: [01](01_affine_quantization.md) and
# [04](04_a_tape_in_150_lines.md).
#
# ## What you'll do
#
# List all roundings of a neuron with ten weights and see where the nearest one stands among them. Make rounding
# differentiable, in NumPy, and learn it. Then do the same to a block of the shipped UNet, layer by layer (AdaRound)
# and as a whole (BRECQ), and ask what the network's own loss thinks of the block's errors (Fisher's diagonal).
#
# ## What you'll learn
#
# - When nearest rounding *is* best, and why real activations are never so kind.
# - The three parts of AdaRound: soft rounding, the rounding term, and its annealing.
# - How to compare layers with blocks fairly, and that the answer depends on what is held equal.
#
# ## What you'll need
#
# Scales and zero points, and the tape. The papers are AdaRound (Nagel et al. 2020,
# [arXiv 2004.10568](https://arxiv.org/abs/2004.10568)) and BRECQ (Li et al. 2021,
# [arXiv 2102.05426](https://arxiv.org/abs/2102.05426)).

# %%
import matplotlib.pyplot as plt
import numpy as np

from refquant.autograd import Tensor, gradients, no_grad, ops
from refquant.diffusion.model import load_model
from refquant.nn.module import Module
from refquant.quant.adaround import (
    beta_schedule,
    hard_codes,
    initial_alpha,
    rectified_sigmoid,
    rounding_regulariser,
    soft_weight,
)
from refquant.quant.affine import QSpec, quantize
from refquant.quant.importance import finish, fisher
from refquant.quant.losses import reconstruction_loss
from refquant.quant.observers import minmax, mse
from refquant.quant.reconstruct import ReconstructionConfig, reconstruct
from refquant.quant.record import pick, record_trajectories, unit_inputs, unit_output
from refquant.quant.units import find_units
from refquant.quant.wrap import rebuild, wrap

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | equation | function |
# |---|---|
# | $h(\alpha) = \mathrm{clip}(1.2 \sigma(\alpha) - 0.1, 0, 1)$ | `refquant.quant.adaround.rectified_sigmoid` |
# | $\hat w = s (\mathrm{clip}(\lfloor w/s \rfloor + z + h(\alpha)) - z)$ | `refquant.quant.adaround.soft_weight` |
# | $R = \sum (1 - \vert 2 h - 1 \vert^\beta)$ | `refquant.quant.adaround.rounding_regulariser` |
# | $\beta$ from 20 to 2 after a warm-up | `refquant.quant.adaround.beta_schedule` |
# | $\min_\alpha \Vert f(\hat x; \hat w(\alpha)) - f(x; w) \Vert^2 + 0.01 R$ | `refquant.quant.reconstruct.reconstruct` |
# | $e^\top H e \approx \sum e^2 g^2$, $g = \partial L / \partial y$ (BRECQ eq. 10) | `refquant.quant.importance.fisher` |
#
# ## All roundings of one neuron
#
# A neuron computes $y = w x$. With rounded weights $\hat w = w + d$ its error, averaged over the inputs, is
#
# ```math
# E(d) = \frac{1}{N} \sum_n (d x_n)^2 = d C d^\top, \qquad C = \frac{1}{N} \sum_n x_n x_n^\top
# ```
#
# Each weight can go down or up: $2^n$ roundings. For ten weights we can try all of them. Sixty neurons, 3 bits, once
# with uncorrelated inputs ($C = 1$) and once with inputs that depend on three hidden causes.

# %%
NEURONS, WEIGHTS = 60, 10
rng = np.random.default_rng(0)
w = rng.standard_normal((NEURONS, WEIGHTS)).astype(np.float32)
grid = minmax(w, QSpec(bits=3, signed=True, axis=0))
s, z = grid.scale[:, None], grid.zero_point[:, None]
low, high = grid.spec.qmin, grid.spec.qmax

causes = rng.standard_normal((NEURONS, WEIGHTS, 3))
correlated = causes @ causes.transpose(0, 2, 1) + 0.04 * np.eye(WEIGHTS)  # C: (NEURONS, 10, 10)
independent = np.broadcast_to(np.eye(WEIGHTS), correlated.shape)


def errors(codes, c):
    """E(d) of codes (..., NEURONS, 10)."""
    d = s * (codes - z) - w
    return np.einsum("...ni,nij,...nj->...n", d, c, d)


up = np.arange(2**WEIGHTS)[:, None] >> np.arange(WEIGHTS) & 1  # (1024, 10), all patterns of bits
everything = np.clip(np.floor(w / s) + z + up[:, None], low, high)  # (1024, NEURONS, 10)
nearest = quantize(w, grid).astype(float)

best, tried = {}, {}
for label, c in (("independent", independent), ("correlated", correlated)):
    tried[label] = errors(everything, c)  # (1024, NEURONS)
    best[label] = tried[label].min(axis=0)
    ratio = errors(nearest, c) / best[label]
    better = (tried[label] < errors(nearest, c) * (1 - 1e-6)).sum(axis=0)
    print(f"{label + ' inputs':20} nearest is {np.median(ratio):5.2f} times the least error (median);")
    print(f"{'':20} {np.median(better):.0f} of 1024 roundings are better")

np.testing.assert_allclose(errors(nearest, independent), best["independent"], rtol=1e-4)
assert np.median(errors(nearest, correlated) / best["correlated"]) > 2

# %% [markdown]
# With $C = 1$ the error is a sum of squares, one for each weight, and nearest rounding is best, exactly. With
# correlated inputs the errors of two weights can cancel, and the nearest rounding is one among many.

# %% Figure: All 1024 roundings of the first neuron. Independent inputs would put the red line at the left end.
figure, axes = plt.subplots(1, 2)
for panel, (label, c) in zip(axes, (("independent", independent), ("correlated", correlated)), strict=True):
    panel.hist(tried[label][:, 0], bins=60, color="#B0B0B0")
    panel.axvline(errors(nearest, c)[0], color="C1", linestyle="--", label="nearest")
    panel.axvline(best[label][0], color="C2", linestyle="-.", label="best")
    panel.set(xlabel=f"error, {label} inputs", ylabel="roundings")
    panel.legend()
plt.show()

# %% [markdown]
# ## Soft rounding
#
# A network has a million weights, and trying all $2^{1000000}$ roundings is out of the question. AdaRound gives each
# weight a number $\alpha$ that says how far *up* it is, $h(\alpha)$ from 0 to 1. At first $h$ is the fraction that the
# floor has cut off, so that the soft weight is the float weight. In the end it must be 0 or 1.
#
# A plain sigmoid would reach its ends at infinity only, with a vanishing slope. So it is stretched to $[-0.1, 1.1]$ and
# clipped. The term $R$ is 0 where all are decided. Large $\beta$ makes it flat in the middle: it catches weights that
# are near an end and leaves the undecided alone. $\beta = 2$ pushes everyone.

# %%
def h_of(alpha):
    """h and its derivative."""
    sigma = 1 / (1 + np.exp(-alpha))
    stretched = 1.2 * sigma - 0.1
    return np.clip(stretched, 0, 1), 1.2 * sigma * (1 - sigma) * ((stretched >= 0) & (stretched <= 1))


alpha = initial_alpha(w, grid)
h, _ = h_of(alpha)
np.testing.assert_allclose(h, w / s - np.floor(w / s), atol=1e-5)
np.testing.assert_allclose(rectified_sigmoid(alpha), h, atol=1e-6)
inside = s * (np.clip(w / s + z, low, high) - z)  # w itself, but where it lies up to half a step beyond the grid
np.testing.assert_allclose(soft_weight(Tensor(alpha), w, grid).data, inside, atol=1e-5)
np.testing.assert_allclose(rounding_regulariser(Tensor(alpha), 5.0).item(), (1 - abs(2 * h - 1) ** 5).sum(), rtol=1e-4)

# %% Figure: Soft rounding, and the rounding term for several exponents. The slopes of the right curves are the forces.
figure, (left, right) = plt.subplots(1, 2)
a, line = np.linspace(-4, 4, 400), np.linspace(0, 1, 400)
left.plot(a, h_of(a)[0], label="h, stretched and clipped")
left.plot(a, 1 / (1 + np.exp(-a)), "--", label="plain sigmoid")
left.set(xlabel=r"$\alpha$", ylabel="how far up")
left.legend()
for beta, style in ((20, "-"), (8, "--"), (2, "-.")):
    right.plot(line, 1 - abs(2 * line - 1) ** beta, style, label=rf"$\beta$ = {beta}")
right.set(xlabel="h", ylabel="share of a weight in R")
right.legend()
plt.show()

# %% [markdown]
# Now learn, for all sixty neurons at once, with Adam. Nothing guarantees the best rounding: this is gradient descent in
# a landscape with $2^n$ corners. So we *count*.

# %%
def adaround(c, iterations=600, rounding=0.1, warmup=0.2, rate=0.03):
    alpha = initial_alpha(w, grid).astype(float)
    m, v = np.zeros_like(alpha), np.zeros_like(alpha)
    for k in range(1, iterations + 1):
        h, slope = h_of(alpha)
        u = np.floor(w / s) + z + h
        q = np.clip(u, low, high)
        gradient = 2 * np.einsum("ni,nij->nj", s * (q - z) - w, c) * s * (u == q) * slope
        if k >= warmup * iterations:
            beta = 20 - 18 * (k - warmup * iterations) / (iterations - warmup * iterations)
            np.testing.assert_allclose(beta, beta_schedule(k, iterations, warmup))
            gradient -= rounding * 2 * beta * abs(2 * h - 1) ** (beta - 1) * np.sign(2 * h - 1) * slope
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        alpha -= rate * (m / (1 - 0.9**k)) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
    return hard_codes(alpha, w, grid).astype(float)


print("rounding term   better than nearest   as good   the best   error / least (median)")
for weight in (0.001, 0.01, 0.1, 1.0):
    found, before = errors(adaround(correlated, rounding=weight), correlated), errors(nearest, correlated)
    shares = (found < before * 0.999, abs(found / before - 1) < 0.001, found < best["correlated"] * 1.001)
    better, equal, optimal = (np.mean(share) for share in shares)
    ratio = np.median(found / best["correlated"])
    print(f"{weight:13} {better:21.0%} {equal:9.0%} {optimal:10.0%} {ratio:18.2f}")
    assert np.median(found) <= np.median(before)

# %% [markdown]
# Usually better than nearest, seldom the best there is, and the weight of the rounding term matters. It stands
# against a loss whose size differs from layer to layer; the papers take 0.01 everywhere.
#
# ## A block of a real network
#
# The block `down.1.block.0` has two convolutions, a shortcut, and the projection of the time. Its inputs are recorded
# along the float sampler's own trajectories: sixteen for learning, and eight from other noise to judge by.

# %%
NAME, BITS = "down.1.block.0", 4
model = load_model("mnist-unet")
network = model.network
floats = {name: p.data for name, p in network.named_parameters()}
trajectories = record_trajectories(model, images=16, steps=20, seed=5)
states = pick(trajectories, 160, seed=0)
unseen = record_trajectories(model, images=8, steps=20, seed=6).at(range(0, 20, 2))
inputs, target = unit_inputs(network, NAME, states), unit_output(network, NAME, states)
unseen_inputs, unseen_target = unit_inputs(network, NAME, unseen), unit_output(network, NAME, unseen)
print(f"inputs {[x.shape for x in inputs]}, output {target.shape}")


def rounded_block():
    """A wrapped network with one block rounded to nearest; the block."""
    twin, layers = wrap(network)
    unit = next(unit for unit in find_units(twin, layers) if unit.name == NAME)
    for layer in unit.layers:
        layer.quantize_weight(mse(layer.layer.weight.data, QSpec(BITS, signed=True, axis=0)))
    return twin, unit


def weights_of(layers):
    return [floats[f"{layer.name}.weight"] for layer in layers]


def judge(unit):
    """Squared error of the block's output on unseen states, summed over channels, mean over pixels."""
    with no_grad():
        y = unit.module(*(Tensor(x) for x in unseen_inputs)).data
    return float(np.square(y - unseen_target).sum(axis=-1).mean())


result = {"nearest": judge(rounded_block()[1])}

# %% [markdown]
# The loop is the one above, with the tape in the place of our derivatives. `forward` may be one layer or the whole
# block: that is all the difference there is between AdaRound and BRECQ. We run twenty iterations beside the
# library's.

# %%
def learn(forward, layers, inputs, target, iterations):
    floats, grids = weights_of(layers), [layer.weight_qparams for layer in layers]
    alphas = [initial_alpha(w, q) for w, q in zip(floats, grids, strict=True)]
    m, v = ([np.zeros_like(a) for a in alphas] for _ in range(2))
    losses = []
    for k in range(1, iterations + 1):
        leaves = [Tensor(a, requires_grad=True) for a in alphas]
        for layer, leaf, w, q in zip(layers, leaves, floats, grids, strict=True):
            layer.layer.weight = soft_weight(leaf, w, q)
        chosen = np.random.default_rng([0, k]).permutation(len(target))[:32]
        loss = total = reconstruction_loss(forward(*(Tensor(x[chosen]) for x in inputs)), target[chosen])
        if k >= 0.2 * iterations:
            for leaf in leaves:
                total = ops.add(total, ops.scale(rounding_regulariser(leaf, beta_schedule(k, iterations)), 0.01))
        for i, g in enumerate(gradients(total, leaves)):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            alphas[i] = alphas[i] - 0.03 * (m[i] / (1 - 0.9**k)) / (np.sqrt(v[i] / (1 - 0.999**k)) + 1e-8)
        losses.append(loss.item())
    for layer, a, w, q in zip(layers, alphas, floats, grids, strict=True):
        layer.set_codes(hard_codes(a, w, q), q)
    return np.array(losses)


def library(unit, layers, inputs, target, iterations, importance=None):
    cfg = ReconstructionConfig(iterations=iterations, rate=0.03)
    return reconstruct(unit, layers, weights_of(layers), inputs, target, cfg, importance=importance)


_, by_hand = rounded_block()
losses = learn(by_hand.module, by_hand.layers, inputs, target, 20)
_, by_library = rounded_block()
np.testing.assert_allclose(losses, library(by_library.module, by_library.layers, inputs, target, 20), rtol=0.01)
same = [np.mean(a.codes == b.codes) for a, b in zip(by_hand.layers, by_library.layers, strict=True)]
print("codes that agree:", *(f"{share:.1%}" for share in same))
assert min(same) > 0.98  # sums in another order, amplified by twenty steps

# %% [markdown]
# ## Layer by layer, or the block as one?
#
# AdaRound takes one layer after the other: its input from the layers rounded before it, its target from the float
# layer. BRECQ takes the block: errors inside may cancel, and only what leaves the block counts. Is that better? It
# depends on what is held equal. A block of four layers, learned layer by layer, gets four times the steps of Adam.

# %%
def by_layer(iterations):
    twin, unit = rounded_block()
    for layer in unit.layers:
        seen, wanted = unit_inputs(twin, layer.name, states), unit_output(network, layer.name, states)
        library(layer, [layer], seen, wanted, iterations)
    return unit


def by_block(iterations, importance=None):
    twin, unit = rounded_block()
    library(unit.module, unit.layers, inputs, target, iterations, importance)
    return twin, unit


steps = 50
result[f"layers,\n4 x {steps} steps"] = judge(by_layer(steps))
result[f"block,\n{steps} steps"] = judge(by_block(steps)[1])
whole, learned = by_block(4 * steps)
result[f"block,\n{4 * steps} steps"] = judge(learned)
for label, error in result.items():
    print(f"{label.replace(chr(10), ' '):25} {error:.4f}")
assert max(list(result.values())[1:]) < result["nearest"]
assert result[f"block,\n{4 * steps} steps"] < result[f"layers,\n4 x {steps} steps"]

# %% Figure: The block's error on unseen states. If only the number of steps counted, second and last would be equal.
figure, axes = plt.subplots()
axes.bar(list(result), list(result.values()), color=["#B0B0B0", "C0", "C2", "C2"], width=0.6)
axes.set(ylabel="squared error of the output")
axes.grid(axis="x", visible=False)
plt.show()

# %% [markdown]
# ## What does the network think of it?
#
# All errors of the output counted alike so far. The network may mind some more than others. To second order an error
# $e$ costs $e^\top H e$; BRECQ takes Fisher's matrix for $H$, and its diagonal only, which is $g^2$ with $g$ the
# gradient of the network's own loss at the block's output. For a diffusion model that loss needs no labels: it is the
# denoising loss on the sampler's own trajectory, whose end serves as $x_0$. By hand, for 16 states:

# %%
class Kept(Module):
    """A module that remembers the tensor it gave."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *arguments):
        self.output = self.module(*arguments)
        return self.output


ends = finish(model, trajectories)  # x_0 of every trajectory
part = states[:16]
kept = Kept(dict(network.named_modules())[NAME])
watching = rebuild(network, lambda name, module: kept if name == NAME else None)

ab = model.schedule.alpha_bar[part.t].reshape(-1, 1, 1, 1)
clean = ends[part.image]
noise = (part.x - np.sqrt(ab) * clean) / np.sqrt(1 - ab)
v = np.sqrt(ab) * noise - np.sqrt(1 - ab) * clean  # what this network is asked for; (16, 1, 28, 28)
answer = watching(Tensor(part.x.transpose(0, 2, 3, 1)), part.t)
loss = ops.mse(answer, v.transpose(0, 2, 3, 1).astype(np.float32))
(g,) = gradients(loss, [kept.output])

by_library = fisher(model, [NAME], states, ends)[NAME]  # (160, 14, 14, 32), scaled to a mean square of 1
unit_of = np.sqrt(np.square(g).mean() / np.square(by_library[:16]).mean())
np.testing.assert_allclose(g / unit_of, by_library[:16], atol=0.01)
print("loss:", f"{loss.item():.4f};", "g by hand and by the library agree up to their unit")

# %% Figure: Mean g² by time-step and by channel. Flat curves would mean that plain squared errors say it all.
figure, (left, right) = plt.subplots(1, 2)
by_state = np.square(by_library).mean(axis=(1, 2, 3))
times = np.unique(states.t)
left.semilogy(times, [by_state[states.t == t].mean() for t in times], "o-")
left.set(xlabel="time-step t", ylabel="mean of g²")
right.bar(np.arange(by_library.shape[-1]), np.sort(np.square(by_library).mean(axis=(0, 1, 2)))[::-1])
right.set(xlabel="channel, by rank", ylabel="mean of g²")
plt.show()
assert by_state[states.t > 600].mean() > 10 * by_state[states.t < 300].mean()

# %% [markdown]
# Errors at noisy time-steps, and in a few channels, matter far more than others. So the weighted loss should help. Does
# it? We judge by the network's answers, all other layers in float.

# %%
def answers(net):
    with no_grad():
        parts = (unseen[i : i + 40] for i in range(0, len(unseen), 40))
        return np.concatenate([net(Tensor(p.x.transpose(0, 2, 3, 1)), p.t).data for p in parts])


weighted, unit = by_block(4 * steps, importance=by_library)
wanted = answers(network)
print("learned with             error of the block   error of the network's answer")
for label, net, error in (
    ("nearest", rounded_block()[0], result["nearest"]),
    ("plain squared error", whole, judge(learned)),
    ("Fisher's diagonal", weighted, judge(unit)),
):
    print(f"{label:22} {error:18.4f} {np.square(answers(net) - wanted).mean():27.2e}")
assert judge(unit) < result["nearest"]

# %% [markdown]
# Read the last two rows against each other. Weighting must cost something in the first column, where plain errors are
# counted. If it does not pay in the second, then here is why it may not: most of the weight lies on few states, so each
# mini-batch of 32 says less. On this model, with this effort, plain squared errors are hard to beat; no script of the
# diffusion papers switches the weights on, either.
#
# ## Where this differs from the authors' code
#
# - 20,000 iterations at a rate of 0.001 in the papers' code; here a few hundred at 0.03, so that $\alpha$ can travel as
#   far. (TFMQ-DM's release at d551eac, `quant/reconstruction.py:72-209`, shared by most diffusion papers.)
# - $\alpha$ starts at $\ln((r + 0.1)/(1.1 - r))$, which is theirs without a difference of near numbers
#   (`quant/adaptive_rounding.py:31-41`).
# - In the released code dropout stays on while blocks learn; here it is off.
# - BRECQ's $g$ comes from a classifier's loss; theirs for diffusion, from the divergence of two outputs plus 1
#   (`quant/data_utill.py`), is unused. Ours is the denoising loss (`refquant.quant.importance.fisher`).
# - The library learns blocks in the order of execution, on what the quantized network before them gives; this page
#   rounds one block only. The whole of it: `refquant quantize --method brecq`, or `--option grain=layer`.
#
# ## On your own
#
# 1. Give the toy 16 weights. Do the shares in the table change? Then start AdaRound from ten random $\alpha$ and keep
#    the best: how much of the gap to the optimum does that close?
# 2. Give the layers 4 x 200 steps and the block 800. Who wins on unseen states, and on those that were learned from?
# 3. Learn the block with 16 states in the place of 160. When does learning begin to do harm?
