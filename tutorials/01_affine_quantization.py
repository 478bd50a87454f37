# %% [markdown]
# # 01 Affine quantization
#
# *Derive the map from real numbers to integers out of two requirements, then measure what it loses, and where.*
#
# **Run time**: 3 s on two cores. **Before this**: [00](00_first_picture.md), for the motive.
#
# ## What you'll do
#
# Write the affine map in four lines, find out why it has to be exactly so, compare it with the library's, and choose
# its only free choice, the range, for real weights: by their extremes, by a search, and channel by channel.
#
# ## What you'll learn
#
# - Why a quantizer has a scale *and* a zero point, and why 0 must be exact.
# - What rounding ties to even is good for.
# - The error within the range, at most half a step, and the error outside, without bound; how a search balances them.
# - Why weights have one scale for each output channel.
#
# ## What you'll need
#
# NumPy's broadcasting, and the idea of a mean squared error.

# %%
import matplotlib.pyplot as plt
import numpy as np

from refquant.diffusion.model import load_model
from refquant.intmath import round_half_even
from refquant.quant.affine import QParams, QSpec, fake_quantize, quantize
from refquant.quant.observers import SHRINK, from_range, minmax, mse

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# With $b$ bits there are $L = 2^b$ codes, from $q_{min}$ to $q_{max}$.
#
# | equation | function |
# |---|---|
# | $x = s (q - z)$ | `refquant.quant.affine.dequantize` |
# | $q = \mathrm{clamp}(\mathrm{round}(x/s) + z, q_{min}, q_{max})$ | `refquant.quant.affine.quantize` |
# | $s = (M - m)/(L - 1)$, $z = q_{min} + \mathrm{round}(-m/s)$ for a range $[m, M]$ that holds 0 | `refquant.quant.observers.from_range` |
# | $m = \min x$, $M = \max x$ | `refquant.quant.observers.minmax` |
# | $\min_r \sum \vert x - \hat x(r m, r M) \vert^p$ | `refquant.quant.observers.mse` |
# | round to nearest, ties to even | `refquant.intmath.round_half_even` |
#
# ## Two requirements
#
# We want to replace real numbers $x$ by integers $q$ of a few bits, such that
#
# 1. arithmetic on the integers tells us the result of arithmetic on the real numbers; and
# 2. the real number 0 is represented exactly.
#
# The first one asks for the simplest relation there is: $x$ is an affine function of $q$. Products and sums of affine
# functions are again polynomials in $q$, so that a matrix product can be done in integers
# ([02](02_integer_gemm_by_hand.md) does it). The second one asks that $x = 0$ belongs to an integer: call it $z$, the
# *zero point*. A line through $(z, 0)$ with slope $s$, the *scale*, is
#
# ```math
# x = s (q - z)
# ```
#
# Why must 0 be exact? Convolutions pad their images with zeros and ReLU makes them by the thousand. A small error in
# each of them would not average out, as they all have the same one.
#
# Two equations fix the two unknowns: the smallest code should stand for the smallest number $m$, the largest for $M$.
# The zero point must be an integer, so it is rounded, and the ends of the range move by up to half a step.

# %%
bits, m, M = 4, -1.5, 6.0
q_min, q_max = 0, 2**bits - 1

s = (M - m) / (q_max - q_min)
z = q_min + round(-m / s)
print(f"scale {s}, zero point {z}")
for q in (0, z, 15):
    print(f"code {q:2d} stands for {s * (q - z):5.2f}")

library = from_range(m, M, QSpec(bits))
assert float(library.scale) == s and int(library.zero_point) == z

# %% [markdown]
# The way back rounds to the nearest code and stops at the last ones. The zero point is added *after* rounding: an
# integer cannot turn a tie into something else. Clamping comes last.

# %%
x = np.linspace(-3, 8, 1101, dtype=np.float32)  # (1101,)
codes = np.clip(np.rint(x / np.float32(s)) + z, q_min, q_max).astype(np.uint8)
x_hat = np.float32(s) * (codes - np.float32(z))

assert np.array_equal(codes, quantize(x, library))
assert np.array_equal(x_hat, fake_quantize(x, library))
assert fake_quantize([0.0], library)[0] == 0.0

inside = (x >= m) & (x <= M)
print(f"largest error inside of [{m}, {M}]: {np.abs(x - x_hat)[inside].max():.4f}, half a step is {s / 2}")
print(f"largest error outside:            {np.abs(x - x_hat)[~inside].max():.4f}")

assert np.abs(x - x_hat)[inside].max() <= s / 2 * (1 + 1e-6)  # a millionth, for float32's own rounding

# %% Figure: Left, sixteen codes for all real numbers. Right, the error: a saw of half a step, then a ramp without end.
figure, (left, right) = plt.subplots(1, 2)
left.plot(x, x, ":", color="grey", label="x")
left.step(x, x_hat, where="mid", label="what its code stands for")
left.set(xlabel="x", ylabel="real number")
left.legend()
right.plot(x, x_hat - x)
right.axhspan(-s / 2, s / 2, color="0.9", zorder=0)
right.set(xlabel="x", ylabel="error of the code", ylim=(-2.1, 2.1))
plt.show()

# %% [markdown]
# ## Ties
#
# What if $x/s$ lies halfway between two integers? "Half up" moves every tie by $+1/2$. Round to even sends 0.5 down,
# 1.5 up, 2.5 down: half of the ties go either way, and their errors cancel. Ties are no accident with integers:
# take away one bit of a code, and every odd code is one.

# %%
eight_bits = np.arange(256)
half = eight_bits / 2  # (256,) half of these are ties
up = np.floor(half + 0.5)
even = round_half_even(half)
print("to be rounded:", half[:8])
print("half up:      ", up[:8])
print("ties to even: ", even[:8])
print(f"mean error: half up {np.mean(up - half):+.3f}, ties to even {np.mean(even - half):+.3f} of a step")

assert np.mean(up - half) == 0.25
assert np.mean(even - half) == 0.0

# %% [markdown]
# A quarter of a step, in every number of a tensor, is a bias that the next layer sums up. Ties to even is also what
# IEEE 754, NumPy, PyTorch and the conversion instructions of processors do, which makes results comparable bit for bit.
#
# ## How large is the rounding error?
#
# If $x$ falls anywhere between two codes with equal probability, the error is uniform on $[-s/2, s/2]$, with
# mean square $s^2/12$. That is a model. Is it true for weights? Take a convolution of the shipped network.

# %%
weights = dict(load_model("mnist-unet").network.named_parameters())
w = weights["mid.block_2.conv1.weight"].data  # (O, kh, kw, C) float32
print("weights:", w.shape, f"from {w.min():.3f} to {w.max():.3f}, standard deviation {w.std():.3f}")


def mean_square(q: QParams, x) -> float:
    return float(np.mean((fake_quantize(x, q).astype(np.float64) - x) ** 2))


ratios = {}
for bits in range(2, 9):
    q = minmax(w, QSpec(bits))
    ratios[bits] = mean_square(q, w) / (float(q.scale) ** 2 / 12)
    print(f"{bits} bits: step {float(q.scale):.4f}, mean square error / (step² / 12) = {ratios[bits]:.3f}")

assert abs(ratios[8] - 1) < 0.05 and abs(ratios[6] - 1) < 0.05
assert ratios[2] < 0.8

# %% [markdown]
# Nearly exact at 5 bits and more. With 2 bits one step is several standard deviations wide: most weights sit close to
# one code, 0, and the error is their own size rather than a uniform one. A bit less makes the step twice as large and
# the error four times: 6 dB a bit, as long as the model holds.
#
# ## Clipping against rounding
#
# The step is proportional to the range. One outlier makes it large for everyone. So cut: choose $[rm, rM]$ with
# $r < 1$. Numbers beyond are clipped, with an error that grows; all others are rounded more finely. The sum of
# both has a minimum somewhere. Where?

# %%
lo, hi = float(w.min()), float(w.max())
curves = {}
for bits in (8, 4):
    rows = []
    for r in SHRINK:  # 1.00, 0.99, ... 0.21
        q = from_range(r * lo, r * hi, QSpec(bits))
        squares = (fake_quantize(w, q).astype(np.float64) - w) ** 2
        clipped = (w < r * lo) | (w > r * hi)
        rows.append((squares[~clipped].sum() / w.size, squares[clipped].sum() / w.size))
    curves[bits] = np.array(rows)  # (80, 2): rounding, clipping
    total = curves[bits].sum(axis=1)
    best = SHRINK[total.argmin()]
    print(f"{bits} bits: least error at r = {best:.2f}, {total[0] / total.min():.2f} times better than min-max")

    found = mse(w, QSpec(bits), power=2)  # the library's search
    ratio = float(found.scale / minmax(w, QSpec(bits)).scale)
    assert abs(ratio - best) < 0.015  # the same, or its neighbour where two are equal up to the order of a sum

gain = {bits: curve.sum(axis=1)[0] / curve.sum(axis=1).min() for bits, curve in curves.items()}
assert gain[4] > 2 > 1.5 > gain[8] >= 1

# %% Figure: Error against the range, for 8 and 4 bits. What is best for one is far from best for the other.
figure, axes = plt.subplots(1, 2, sharex=True)
for axis, (bits, curve) in zip(axes, curves.items(), strict=True):
    total = curve.sum(axis=1)
    axis.plot(SHRINK, curve[:, 0], "--", label="rounding")
    axis.plot(SHRINK, curve[:, 1], ":", label="clipping")
    axis.plot(SHRINK, total, label="both")
    axis.plot(SHRINK[total.argmin()], total.min(), "ko", markersize=5)
    axis.set(title=f"{bits} bits", xlabel="share r of the range that has codes", ylabel="mean squared error")
    axis.set(yscale="log", ylim=(total.min() / 20, total.max() * 2))
axes[0].legend(loc="upper right")
plt.show()

# %% [markdown]
# The figure could have looked otherwise: for numbers spread evenly over their range there is next to nothing to gain,
# and the minimum lies close to $r = 1$ (not quite at 1, as the last codes reach half a step beyond the range).
# Weights have tails. The fewer the bits, the more the step costs, and the more it pays to cut.

# %%
rng = np.random.default_rng(0)
even_spread = rng.uniform(lo, hi, w.size).astype(np.float32)
evenly = mse(even_spread, QSpec(4), power=2).scale / minmax(even_spread, QSpec(4)).scale
tails = mse(w, QSpec(4), power=2).scale / minmax(w, QSpec(4)).scale
print(f"4 bits: the search keeps {evenly:.2f} of an even spread's range, {tails:.2f} of the weights'")

assert evenly > 0.95 > 0.7 > tails

# %% [markdown]
# ## One scale for each channel
#
# The rows of a weight matrix belong to different outputs, and need not have equal ranges. A scale for each of them
# costs four bytes a row, and does not disturb integer arithmetic: the sum over $k$ stays within a row. (Activations
# have no such freedom: a scale for each input channel would vary inside of the sum.)

# %%
name = "mid.block_2.temb_proj.weight"
v = weights[name].data  # (O, C) float32
one = minmax(v, QSpec(4))
each = minmax(v, QSpec(4, axis=0))
print(f"{name}: {v.shape}, scales {each.scale.min():.4f} to {each.scale.max():.4f}; one for all: {one.scale:.4f}")
print(f"mean squared error: one scale {mean_square(one, v):.2e}, one a channel {mean_square(each, v):.2e}")

assert each.scale.shape == (len(v),)
assert mean_square(each, v) < mean_square(one, v) / 2
stacked = np.stack([fake_quantize(row, minmax(row, QSpec(4))) for row in v])
assert np.array_equal(fake_quantize(v, each), stacked)  # nothing else than each row by itself

# %% Figure: Ranges of the 96 output channels, sorted, and the error of each at 4 bits with one scale and with its own.
order = np.argsort(np.ptp(v, axis=1))
error_one = np.mean((fake_quantize(v, one) - v) ** 2, axis=1)[order]
error_each = np.mean((fake_quantize(v, each) - v) ** 2, axis=1)[order]
channel = np.arange(len(v))
figure, (left, right) = plt.subplots(1, 2)
left.fill_between(channel, v.min(axis=1)[order], v.max(axis=1)[order], alpha=0.35, linewidth=0)
left.axhline(v.min(), color="grey", linestyle=":")
left.axhline(v.max(), color="grey", linestyle=":", label="range of the tensor")
left.set(xlabel="output channel, sorted", ylabel="range of its weights")
left.legend(loc="upper left", bbox_to_anchor=(0, 0.93))
right.plot(channel, error_one, ".", label="one scale")
right.plot(channel, error_each, "x", markersize=4, label="a scale for each")
right.set(xlabel="output channel, sorted", ylabel="mean squared error", yscale="log")
right.legend(loc="upper left", bbox_to_anchor=(0, 0.72))
plt.show()

# %% [markdown]
# ## Where this differs from the authors' code
#
# - **gemmlowp** (`doc/quantization_example.cc`, the derivation this page follows): its `Quantize` adds the zero point
#   before it rounds, and `std::round` sends ties away from zero. Its codes differ from ours on ties.
# - **TFMQ-DM** (`quant/quant_layer.py:20-64`): the same maps, in float32. Its search shrinks the range as found,
#   without widening it to 0 first: for tensors of one sign, 0 is no longer exact. Ours widens, and is never worse
#   than min-max ([`search.py`](../../refquant/quant/observers/search.py) lists all three differences). The exponent
#   of its error is 2.4, our function's default; this page takes 2.
# - **PyTorch** rounds ties to even, as we do.
#
# ## On your own
#
# 1. Replace `w` by the outputs of a ReLU, `np.maximum(rng.standard_normal(10_000), 0)`. Where is the zero point, and
#    how many of 16 codes would a signed symmetric grid, `QSpec(4, signed=True, symmetric=True)`, leave unused?
# 2. Show that scaling `x` and `s` by the same power of two changes no code, and find a factor that does change one.
# 3. The search tries 80 ranges, and shrinks both ends by the same factor. Let the ends move by themselves, on a
#    coarser grid. How much does it gain for `w` at 4 bits, and at 3?
