# %% [markdown]
# # 02 An integer matrix product by hand
#
# *Multiply codes instead of numbers: what zero points do to a product, when 32 bits are enough, and the way back.*
#
# **Run time**: 4 s on two cores. **Before this**: [01](01_affine_quantization.md).
#
# ## What you'll do
#
# Expand a product of affine numbers on paper, do it in integers with every term in sight, drive an accumulator to the
# last value that fits and one step beyond, and bring the sums back to real numbers and to 8-bit codes.
#
# ## What you'll learn
#
# - Why zero points cost next to nothing: they leave the inner loop as sums of rows and columns.
# - The bound $K \le 65793$, and why it is a wall and not a warning.
# - Why integer sums are exact in any order, where float32 sums are not.
# - How integers are scaled by a real number without a float.
#
# ## What you'll need
#
# Matrix products, and the binary notation of integers.

# %%
from fractions import Fraction

import matplotlib.pyplot as plt
import numpy as np

from refquant import kernels, ref
from refquant.diffusion.model import load_model
from refquant.errors import RangeError
from refquant.intmath import fixed_point, requantize
from refquant.quant.affine import QSpec, dequantize, quantize
from refquant.quant.observers import from_range, minmax

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | equation | function |
# |---|---|
# | $C_{mn} = \sum_k (A_{mk} - z_a)(B_{nk} - z_b)$, $A$ uint8, $B$ int8, $C$ int32 | `refquant.ref.gemm` |
# | the same on the C core | `refquant.kernels.gemm` |
# | $K \le \lfloor (2^{31} - 1)/(255 \cdot 128) \rfloor$ | `refquant.ref.gemm.max_k` |
# | $y = s_a s_b C$ | `refquant.ref.output.Dequantize` |
# | $s_a s_b / s_y = \mathrm{mantissa} \cdot 2^{-\mathrm{shift}}$ | `refquant.intmath.fixed_point` |
# | $q_y = \mathrm{saturate}(\mathrm{round}(C s_a s_b / s_y) + z_y)$ | `refquant.intmath.requantize` |
#
# ## Zero points leave the sum
#
# Let $x = s_a (a - z_a)$ and $w = s_b (b - z_b)$. Then $\sum_k x_k w_k = s_a s_b \sum_k (a_k - z_a)(b_k - z_b)$, and
#
# ```math
# \sum_k (a_k - z_a)(b_k - z_b) = \sum_k a_k b_k - z_a \sum_k b_k - z_b \sum_k a_k + K z_a z_b
# ```
#
# Only the first term has a product in its inner loop. By hand, with $K = 3$:

# %%
a = np.array([[7, 0, 255], [128, 130, 1]], dtype=np.uint8)  # (M, K), one row for each input vector
b = np.array([[1, -128, 2], [127, 3, -5]], dtype=np.int8)  # (N, K), one row for each output
za, zb = 128, 2

A, B, K = a.astype(np.int64), b.astype(np.int64), a.shape[1]
terms = {
    "sum a b": A @ B.T,  # (M, N)
    "- za sum b": np.broadcast_to(-za * B.sum(axis=1), (2, 2)),  # of the weights alone
    "- zb sum a": np.broadcast_to(-zb * A.sum(axis=1)[:, None], (2, 2)),  # of the inputs alone
    "+ K za zb": np.full((2, 2), K * za * zb),  # of nothing
}
for name, term in terms.items():
    print(f"{name:<12}{term[0]} {term[1]}")
together = sum(terms.values())
print(f"{'together':<12}{together[0]} {together[1]}")

assert np.array_equal(together, (A - za) @ (B - zb).T)
assert np.array_equal(together, ref.gemm(a, b, a_zero_point=za, b_zero_point=zb))

# %% [markdown]
# The second and the last term are known as soon as the weights are: one number for each output, added like a bias. The
# third needs a sum over each input row, one addition for each $a$ instead of a multiplication for each pair. With
# symmetric weights, $z_b = 0$, it is gone as well.
#
# Padding is part of the story. A convolution pads its image with *real* zeros, hence with the code $z_a$. A frame of
# code 0 would mean real numbers below zero. A constant image of code $z_a$ is the number 0 everywhere, so its
# convolution must be 0 everywhere, at the border too:

# %%
blank = np.full((1, 4, 4, 8), 128, dtype=np.uint8)  # (N, H, W, C)
window = np.full((1, 3, 3, 8), 3, dtype=np.int8)  # (O, kh, kw, C)
framed = ref.conv2d(blank, window, padding=1, x_zero_point=128)[0, :, :, 0]

wrong = np.pad(blank, ((0, 0), (1, 1), (1, 1), (0, 0)))  # a frame of code 0
wrong = ref.conv2d(wrong, window, padding=0, x_zero_point=128)[0, :, :, 0]
print("framed with za: ", framed[0], framed[1])
print("framed with 0:  ", wrong[0], wrong[1])

assert not framed.any()
assert wrong[0, 0] == -128 * 3 * 8 * 5  # 5 of 9 pixels of a corner's window lie outside

# %% [markdown]
# ## When 32 bits are enough
#
# A product of uint8 and int8 lies between $255 \cdot (-128) = -32640$ and $255 \cdot 127 = 32385$: 16 bits hold one,
# and no second one (that is a trap for the [next page](03_simd_one_isa_at_a_time.md)). In int32, how many fit for
# certain?

# %%
limit = (2**31 - 1) // (255 * 128)
print(f"K <= {limit:,}")

worst = 255 * -128
print(f"{limit:,} of the worst: {limit * worst:,}; int32 begins at {-(2**31):,}")
print(f"one more:            {(limit + 1) * worst:,}")

assert limit == 65_793 == ref.MAX_K
assert limit * worst >= -(2**31) > (limit + 1) * worst

# %% [markdown]
# Now in the machine. At the limit the sum is right. One more, and a 32-bit register wraps around to a large positive
# number, without a sign that anything happened. So the library refuses; it does not warn.

# %%
for k in (limit, limit + 1):
    x = np.full((1, k), 255, dtype=np.uint8)
    y = np.full((1, k), -128, dtype=np.int8)
    wrapped = np.sum(x.astype(np.int32) * y.astype(np.int32), dtype=np.int32)
    try:
        answer = f"{kernels.gemm(x, y)[0, 0]:,}"
        assert kernels.gemm(x, y)[0, 0] == wrapped == k * worst
    except RangeError as error:
        answer = str(error)
        assert k == limit + 1 and wrapped == k * worst + 2**32
    print(f"K = {k:,}: 32-bit register {wrapped:,}\n  {answer}")

# %% [markdown]
# ## Exact in any order
#
# Integer addition is associative, also where it wraps: registers compute modulo $2^{32}$, and a sum is right whenever
# its *final* value fits, whatever happened on the way. So four threads, or sixteen lanes of a register, may add in
# any order and give the same bits. float32 has 24 bits for a sum; beyond $2^{24}$ it rounds, and the order shows.

# %%
x = np.full((1, 1001), 255, dtype=np.uint8)
y = np.full((1, 1001), 127, dtype=np.int8)
exact = ref.gemm(x, y)[0, 0]
single = (x.astype(np.float32) @ y.astype(np.float32).T)[0, 0]
double = (x.astype(np.float64) @ y.astype(np.float64).T)[0, 0]
print(f"int32 {exact:,}, float32 {single:,.0f}, float64 {double:,.0f}; 2^24 is {2**24:,}")

assert exact == double == 1001 * 255 * 127
assert exact != single  # odd and above 2^24: no float32 is equal to it

# %% Figure: Largest sum against K. Data like a network's grow with the root of K; the worst data end at K = 65,793.
rng = np.random.default_rng(0)
lengths = 2 ** np.arange(4, 18)
seen = []
for k in lengths:
    x = rng.integers(0, 256, (64, k)) - 128  # (64, K) codes less their zero point
    y = np.clip(np.rint(30 * rng.standard_normal((k, 16))), -128, 127)
    seen.append(np.abs(x.astype(np.float64) @ y).max())
figure, axes = plt.subplots()
axes.loglog(lengths, 255.0 * 128 * lengths, "--", label="worst case, 255 · 128 · K")
axes.loglog(lengths, seen, "-o", markersize=4, label="largest of 1,024 sums of random codes")
axes.axhline(2.0**31, color="black", linewidth=1)
axes.annotate("$2^{31}$: int32 wraps", (20, 2.0**31), xytext=(0, 4), textcoords="offset points")
axes.axhline(2.0**24, color="grey", linestyle=":")
axes.annotate("$2^{24}$: float32 rounds", (20, 2.0**24), xytext=(0, 4), textcoords="offset points")
axes.axvline(limit, color="grey", linewidth=1)
axes.set(xlabel="K, length of the sum", ylabel="size of the sum", ylim=(1e4, 3e10))
axes.legend(loc="lower right")
plt.show()

growth = np.log(seen[-1] / seen[0]) / np.log(lengths[-1] / lengths[0])
print(f"random codes: the sum grows like K^{growth:.2f}")
assert 0.4 < growth < 0.6

# %% [markdown]
# Had the sums grown like $K$, no network could use int32 freely; as they grow like $\sqrt K$, overflow is a thing
# that tests with random data never see. The bound protects from the data that are not random.
#
# ## A layer of the network, and the way back
#
# Now real weights, with a scale for each output channel, and activations like those behind a SiLU.

# %%
w = dict(load_model("mnist-unet").network.named_parameters())["mid.block_2.conv1.weight"].data
w = w.reshape(len(w), -1)  # (N, K) float32
x = rng.standard_normal((256, w.shape[1])).astype(np.float32)
x = x / (1 + np.exp(-x))  # (M, K) float32, SiLU

qx = minmax(x, QSpec(8))
qw = minmax(w, QSpec(8, signed=True, symmetric=True, axis=0))
a, b = quantize(x, qx), quantize(w, qw)
acc = kernels.gemm(a, b, a_zero_point=int(qx.zero_point))  # (M, N) int32
real = acc * (qx.scale * qw.scale)  # (M, N) float32: one multiplication for each sum

simulated = dequantize(a, qx) @ dequantize(b, qw).T  # what "fake quantization" computes, in float32
print(f"M, N, K = {len(x)}, {len(w)}, {w.shape[1]}; sums from {acc.min():,} to {acc.max():,}")
print(f"to the simulation: {np.abs(real - simulated).max() / np.abs(simulated).max():.1e} of the largest")
print(f"to float32:        {np.sqrt(np.mean((real - x @ w.T) ** 2)) / np.std(x @ w.T):.1e} of the standard deviation")

assert np.array_equal(acc, ref.gemm(a, b, a_zero_point=int(qx.zero_point)))
assert np.allclose(real, simulated, rtol=0, atol=1e-5 * np.abs(simulated).max())  # float32's rounding of K terms
assert np.sqrt(np.mean((real - x @ w.T) ** 2)) < 0.05 * np.std(x @ w.T)

# %% [markdown]
# ## Staying in integers: a multiplier without a float
#
# If the next layer wants 8-bit codes, the sum has to be multiplied by $m = s_a s_b / s_y$, rounded, and clamped. A
# processor without a float unit does that with an integer *mantissa* of 31 bits and a shift: $m \approx
# \mathrm{mantissa} \cdot 2^{-\mathrm{shift}}$. The product of an int32 with a mantissa needs 64 bits; then it is
# rounded once.

# %%
qy = from_range(float(real.min()), float(real.max()), QSpec(8))
multiplier = qx.scale.astype(np.float64) * qw.scale / qy.scale  # (N,)
mantissa, shift = fixed_point(multiplier)  # (N,) int32 each
print(f"m = {multiplier[0]:.10f} = {mantissa[0]:,} / 2^{shift[0]}")

off = np.abs(mantissa * 2.0**-shift - multiplier) / multiplier
print(f"worst relative error of {len(off)} multipliers: 2^{np.log2(off.max()):.1f}")
assert off.max() <= 2.0**-31

codes = requantize(acc, mantissa, shift, int(qy.zero_point), 0, 255)  # (M, N) uint8

# By the definition, in fractions of whole numbers: nothing is rounded but once, ties to even.
for i, j in zip(*rng.integers(0, [[256], [96]], (2, 200)), strict=True):
    exact = Fraction(int(acc[i, j]) * int(mantissa[j]), 2 ** int(shift[j]))
    assert codes[i, j] == min(max(round(exact) + int(qy.zero_point), 0), 255)
print("200 codes compared with exact fractions: all equal")

# %% [markdown]
# Rounding *once* matters. gemmlowp rounds twice: first the product to 32 bits, then by the rest of the shift. A
# number just below a tie can be rounded up to the tie, and from there up again. It takes a tie after the first
# rounding, which has the probability $2^{-\mathrm{rest}}$ if the last bits are random; on one side of it the second
# rounding does harm.

# %%
product = acc.astype(np.int64) * mantissa
high = (product + (1 << 30)) >> 31  # to 32 bits, half up
rest = shift - 31
second = np.sign(high) * ((np.abs(high) + (1 << (rest - 1))) >> rest)  # the shift, ties away from zero
twice = np.clip(second + int(qy.zero_point), 0, 255)

tie = np.abs(high) & ((1 << rest) - 1) == 1 << (rest - 1)  # (M, N)
different = twice != codes
print(f"ties: {tie.sum()} of {tie.size:,} sums; expected {np.mean(2.0**-rest) * tie.size:.0f}")
print(f"codes that differ: {different.sum()}, all of them at such ties, and by one")

assert 0 < different.sum() and not different[~tie].any()
assert np.abs(twice - codes.astype(np.int64)).max() == 1

# %% [markdown]
# ## What if the zero points were forgotten?
#
# Every sum of an output would be wrong by the same amount, $z_a \sum_k b_k$: a bias. How large is it, beside what the
# sums vary by? That depends on the input. Behind a SiLU nearly all codes stand for numbers above zero and $z_a$ is
# small; inputs of both signs, such as those of attention, have a $z_a$ in the middle of the codes.

# %% Figure: The zero point's term of each output, in standard deviations of its sums. Without it, hardly one output is right.
inputs = {"SiLU": x, "both signs": rng.standard_normal(x.shape).astype(np.float32)}
figure, axes = plt.subplots()
for (name, values), marker in zip(inputs.items(), ["o", "x"], strict=True):
    q = minmax(values, QSpec(8))
    sums = kernels.gemm(quantize(values, q), b, a_zero_point=int(q.zero_point))  # (M, N)
    term = int(q.zero_point) * b.astype(np.int64).sum(axis=1)  # (N,)
    share = np.sort(term / sums.std(axis=0))
    axes.plot(share, marker, markersize=4, label=f"{name}, zero point {q.zero_point}")
    print(f"{name}: zero point {q.zero_point}, largest term {np.abs(share).max():.2f} standard deviations")
axes.axhline(0, color="black", linewidth=1)
axes.set(xlabel="output, sorted", ylabel="zero point's term / std of the sum")
axes.legend()
plt.show()

assert np.abs(share).max() > 1  # of inputs of both signs

# %% [markdown]
# If the weights of every output summed to zero, all points would lie on the line, and nobody would notice.
#
# ## Where this differs from the authors' code
#
# - **gemmlowp** multiplies uint8 by uint8; here weights are int8, as in the dot-product instructions of x86
#   processors. Its fixed-point multiplication (`fixedpoint/fixedpoint.h`, `SaturatingRoundingDoublingHighMul`, then
#   `RoundingDivideByPOT`) rounds twice, as above; ours rounds once, ties to even.
# - **The papers' released code** (TFMQ-DM, Q-Diffusion) has no integer product: it rounds weights and inputs and
#   multiplies in float32, which is our `simulated`.
#
# ## On your own
#
# 1. Let the weights be asymmetric, `QSpec(8, signed=True, axis=0)`: $z_b$ is now a vector, `b_zero_point=`. Compute
#    the third term by hand and compare with `ref.gemm`.
# 2. 4-bit weights lie in -8 .. 7. What is the limit on $K$ then? Why does `ref.gemm` not use it?
# 3. Write a product with int16 accumulators that is emptied into int32 every $n$ terms. How large may $n$ be for 8-bit
#    weights, and for 4-bit weights?
