# %% [markdown]
# # 03 SIMD, one instruction set at a time
#
# *Walk from three loops to 64 multiplications in one instruction, in NumPy and C, and meet the shortcut that lies.*
#
# **Run time**: 5 s on two cores. **Before this**: [02](02_integer_gemm_by_hand.md).
#
# ## What you'll do
#
# Play processor: write the multiplying instruction of each kernel as a NumPy function on one register, build the matrix
# product from it, and find the same integers each time. Then time the real kernels on your machine, and hunt a bug
# that data like a network's do not show.
#
# ## What you'll learn
#
# - What one register holds, and how many multiplications one instruction does: 1, 16, 32, 64.
# - How the kernel files of refquant differ from their neighbours: by one instruction and the size of a tile.
# - Why a fast, popular instruction is banned here.
# - What it takes for a test to be able to fail.
#
# ## What you'll need
#
# [02](02_integer_gemm_by_hand.md), and an idea of what a processor's register is. No C; a few lines of it are shown
# and read aloud. Without the C core (`refquant info` tells), everything runs, with less to time.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np

from refquant import kernels, ref
from refquant.diffusion.model import load_model
from refquant.quant.affine import QSpec, quantize
from refquant.quant.observers import minmax
from refquant.threads import parallel_map, using_threads

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | equation or step | function or file |
# |---|---|
# | $C_{mn} = \sum_k A_{mk} B_{nk}$, the reference | `refquant.ref.gemm` |
# | the same, three loops in C | [`gemm_scalar.c`](../../cext/gemm_scalar.c) |
# | 16 products in 256 bits | [`gemm_avx2.c`](../../cext/gemm_avx2.c) |
# | 32 products in 256 bits | [`gemm_avxvnni.c`](../../cext/gemm_avxvnni.c) |
# | 64 products in 512 bits | [`gemm_avx512vnni.c`](../../cext/gemm_avx512vnni.c) |
# | 16 products in 128 bits of AArch64 | [`gemm_neondot.c`](../../cext/gemm_neondot.c) |
# | which of them this machine can run | `refquant.kernels.supported` |
# | how fast their instruction can be | `refquant.kernels.peak_gops` |
#
# ## The sentence
#
# The scalar kernel is the definition in C, and its inner line is
#
# ```c
# sum += (uint32_t)(a[k] * code(panel, k / RQ_STEP, j % RQ_PANEL, k % RQ_STEP));
# ```
#
# One multiplication, one addition. `code` only says where the weight lies in memory: packed, as the wide kernels want
# it. All kernels below compute this sum; none is allowed to differ by a bit.

# %%
rng = np.random.default_rng(0)
M, N, K = 6, 16, 64
a = rng.integers(0, 256, (M, K), dtype=np.uint8)
b = rng.integers(-128, 128, (N, K), dtype=np.int8)
wanted = ref.gemm(a, b)  # (M, N) int32

print("compiled here:", ", ".join(kernels.available()))
print("usable here:  ", ", ".join(kernels.supported()))
for name in kernels.supported():
    with kernels.using(name):
        assert np.array_equal(kernels.gemm(a, b), wanted)

# %% [markdown]
# ## 256 bits: widen, then multiply
#
# AVX2 has no exact product of bytes. It has one of 16-bit integers, `vpmaddwd`: 16 products, each added to its
# neighbour, 8 sums of 32 bits. So the bytes are widened first, unsigned ones with zeros, signed ones with their sign:
#
# ```text
#        k0    k1    k2    k3  | k0    k1    k2    k3  | ...            16 x 16 bits
#  a  [  a0    a1    a2    a3  | a0    a1    a2    a3  | .. | .. ]      4 bytes of one row, repeated
#  b  [      output 0          |      output 1         | .. | .. ]      4 bytes of 4 outputs
#        \_+_/       \_+_/        \_+_/       \_+_/
#  C  [  sum01       sum23     |  sum01       sum23    | .. | .. ]       8 x 32 bits
# ```
#
# ```c
# acc[i][q] = _mm256_add_epi32(acc[i][q], _mm256_madd_epi16(four, w[q]));
# ```
#
# `a` is widened once for all outputs of a tile, and one load repeats four of its numbers. Widened where it is used, it
# took two shuffles for each two products, and the ports that multiply waited for those that shuffle.
#
# In NumPy an instruction is a function of registers. The last axis is the register:

# %%


def vpmaddwd(x, y):
    """Multiply 16 pairs of int16 and add neighbours: (..., 16) int16 -> (..., 8) int32."""
    products = x.astype(np.int32) * y
    return products[..., 0::2] + products[..., 1::2]


def gemm_avx2(a, b):
    """Four k and four outputs at a time; a: (M, K) uint8, b: (N, K) int8."""
    acc = np.zeros((len(a), len(b) // 4, 8), np.int32)  # two lanes for each output
    for k in range(0, a.shape[1], 4):
        x = np.tile(a[:, k : k + 4], 4).astype(np.int16)  # (M, 16) vpmovzxbw before, vbroadcastsd
        y = b[:, k : k + 4].astype(np.int16).reshape(-1, 16)  # (N / 4, 16) vpmovsxbw
        acc += vpmaddwd(x[:, None], y)
    return (acc[..., 0::2] + acc[..., 1::2]).reshape(len(a), len(b))  # once, at the end


assert np.array_equal(gemm_avx2(a, b), wanted)

# %% [markdown]
# ## The dot-product instruction
#
# `vpdpbusd` does widening, multiplication and two additions at once: 32 unsigned bytes times 32 signed ones, in
# fours, onto 8 sums. The kernel `avxvnni` is `avx2` with another inner line, and without the halves to be added at
# the end:
#
# ```c
# acc[i][h] = _mm256_dpbusd_avx_epi32(acc[i][h], four, w[h]);
# ```
#
# In `avx512vnni` the register is twice as wide, 64 bytes, 16 sums. There are 32 registers instead of 16, so that the
# tile grows as well:
#
# ```c
# acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], four, b[j]);
# ```


# %%
def vpdpbusd(acc, x, y):
    """Add four products to each int32 lane; x: (..., 4 L) uint8, y: (..., 4 L) int8, acc: (..., L) int32."""
    products = x.astype(np.int32) * y  # each fits 16 bits, four of them 32
    return acc + products.reshape(*products.shape[:-1], -1, 4).sum(axis=-1, dtype=np.int32)


def gemm_vnni(a, b, lanes):
    """Four k of `lanes` outputs at a time."""
    acc = np.zeros((len(a), len(b) // lanes, lanes), np.int32)
    for k in range(0, a.shape[1], 4):
        x = np.tile(a[:, k : k + 4], lanes)  # (M, 4 lanes), 4 bytes broadcast to all lanes
        y = b[:, k : k + 4].reshape(-1, 4 * lanes)  # (N / lanes, 4 lanes)
        acc = vpdpbusd(acc, x[:, None], y)
    return acc.reshape(len(a), len(b))


assert np.array_equal(gemm_vnni(a, b, lanes=8), wanted)
assert np.array_equal(gemm_vnni(a, b, lanes=16), wanted)

# %% [markdown]
# On AArch64, `sdot` is the same for 16 bytes, but reads *both* operands as signed. The bits of $a \oplus 128$, read
# as signed, are $a - 128$; so it computes $\sum (a - 128) b$, and $128 \sum b$, known from packing, repairs it. This
# is the zero point of the [last page](02_integer_gemm_by_hand.md) once more.

# %%
moved = (a ^ 0x80).view(np.int8)
assert np.array_equal(moved, a.astype(np.int16) - 128)
sums_of_b = b.astype(np.int32).sum(axis=1)  # (N,)
assert np.array_equal(moved.astype(np.int32) @ b.T.astype(np.int32) + 128 * sums_of_b, wanted)

products = {"scalar": 1, "avx2": 16, "avxvnni": 32, "avx512vnni": 64, "neondot": 16}
assert vpmaddwd(np.ones(16, np.int16), np.ones(16, np.int16)).sum() == products["avx2"]
for name, lanes in (("avxvnni", 8), ("avx512vnni", 16)):
    ones = np.ones(4 * lanes, np.int8)
    assert vpdpbusd(np.zeros(lanes, np.int32), ones.view(np.uint8), ones).sum() == products[name]
print("multiplications in one instruction:", products)

# %% [markdown]
# ## A tile of registers
#
# An instruction that has to wait for its operands multiplies nothing. In the loops above, each product loads a piece
# of $a$ and a piece of $b$. If instead $r$ rows and $p$ panels are worked on together, $r + p$ loads feed $r p$
# products, and all $r p$ sums must stay in registers. That is the tile. How many loads a multiplication?

# %%
tiles = {"one by one": (1, 1, 0), "avx2": (6, 2, 16), "avxvnni": (6, 2, 16), "avx512vnni": (12, 2, 32)}
for name, (r, p, there) in tiles.items():
    used = r * p + p + 1  # the sums, the panels of b, one register for a
    registers = f", {used} of {there} registers" if there else ""
    print(f"{name:<11}{r:3} x {p}: {(r + p) / (r * p):.2f} loads a product{registers}")
    assert there == 0 or used < there

# %% [markdown]
# `avx2` needs one register more, for the product before it is added, and has it. Two loads a cycle are what
# processors do; one product a load would keep the multiplier waiting half of the time. How such a kernel is built up,
# with the gain of each step measured, is told in [the story](../../cext/story/README.md).
#
# ## On your machine
#
# First equality, then time, on one core: each kernel that this machine can run multiplies the same two matrices. A
# GOP/s is $10^9$ multiplications or additions in a second.

# %%
M, N, K = 256, 256, 1024
a = rng.integers(0, 256, (M, K), dtype=np.uint8)
b = rng.integers(-128, 128, (N, K), dtype=np.int8)
wanted = ref.gemm_blas(a, b)


packed = kernels.pack_weights(b[:, None, None, :])  # (O, kh, kw, C), once, as a model does
x = a.reshape(1, M, 1, K)  # a product is a convolution with a window of one pixel
fa, fb = a.astype(np.float32), b.astype(np.float32).T


def seconds(function, least=0.05):
    """Return the shortest of as many runs as fit into a short time."""
    times = []
    while sum(times) < least:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def float_product():
    """The same product in float32; `parallel_map` holds BLAS to one thread."""
    parallel_map(lambda factors: factors[0] @ factors[1], [(fa, fb)])


fastest, peak = {}, {}
for _ in range(4):  # in turns, so that nobody gets all the bad moments of a busy machine
    with using_threads(1):
        for name in kernels.supported():
            with kernels.using(name):
                assert np.array_equal(kernels.conv2d(x, packed).reshape(M, N), wanted)
                fastest[name] = min(seconds(lambda: kernels.conv2d(x, packed)), fastest.get(name, np.inf))
                peak[name] = max(kernels.peak_gops(name) or 0, peak.get(name, 0))
        fastest["NumPy float32"] = min(seconds(float_product), fastest.get("NumPy float32", np.inf))
speed = {name: 2e-9 * M * N * K / t for name, t in fastest.items()}

print(f"one thread, {kernels.build_info()['compiler'] or 'no C core'}")
for name, value in speed.items():
    share = f", {100 * value / peak[name]:.0f} % of what its instruction can do" if peak.get(name) else ""
    print(f"{name:<14}{value:8.1f} GOP/s{share}")

# %% Figure: Speed of each kernel that runs on this machine, on one core (the axis is logarithmic), and the peak of its instruction.
figure, axes = plt.subplots(figsize=(8, 1.1 + 0.35 * len(speed)))
axes.plot(list(speed.values()), list(speed), "o", markersize=8, label="measured")
known = {name: value for name, value in peak.items() if value}
axes.plot(list(known.values()), list(known), "|", markersize=18, markeredgewidth=2.5, label="peak, on registers alone")
axes.margins(y=0.12)
axes.invert_yaxis()
axes.set(xscale="log", xlabel="GOP/s")
axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
plt.show()

# %% [markdown]
# A kernel that gained nothing from wider registers would have its point above its neighbour's. `scalar` is slow on
# purpose, one multiplication at a time. `avx2` stays further below its peak than the others: widening takes
# instructions as well, and the peak counts multiplications alone. `ref` is no loop: its convolution is a product of
# float64 matrices, which hold every integer up to $2^{53}$ exactly, so that BLAS computes integers
# ([`gemm.py`](../../refquant/ref/gemm.py) says why that is a proof).
#
# ## The shortcut that lies
#
# AVX2 has an instruction that takes bytes as they are: `vpmaddubsw`, 32 products of unsigned and signed bytes, twice
# as many as `vpmaddwd`, no widening. Older libraries are built on it. It adds neighbours in **16 bits, with
# saturation**:

# %%


def vpmaddubsw(x, y):
    """Multiply 32 pairs of bytes, add neighbours, limit to int16: (..., 32) uint8, int8 -> (..., 16) int16."""
    products = x.astype(np.int32) * y
    return np.clip(products[..., 0::2] + products[..., 1::2], -32768, 32767).astype(np.int16)


def gemm_mutant(a, b):
    """The product by vpmaddubsw, pairs then added in 32 bits. WRONG on purpose. a: (M, K), b: (N, K)."""
    c = np.zeros((len(a), len(b)), np.int32)
    for k in range(0, a.shape[1], 2):
        c += vpmaddubsw(a[:, None, k : k + 2], b[:, k : k + 2])[..., 0]
    return c


full = np.full(2, 255, np.uint8), np.full(2, 127, np.int8)
print("255 · 127 + 255 · 127 =", 2 * 255 * 127, "becomes", vpmaddubsw(*full)[0])
assert vpmaddubsw(*full)[0] == 32767

# %% [markdown]
# Would you notice? Test it as one tests such things: on data that look like a network's, a few thousand outputs. Then
# on a real layer, on codes without any shape, and on *corners*: only the codes at the ends and in the middle.

# %%
K = 64


def silu(x):
    return x / (1 + np.exp(-x))


def codes_of(x, w, axis=None):
    """Quantize inputs, and weights with one scale for all (None) or one for each output (0)."""
    return quantize(x, minmax(x, QSpec(8))), quantize(w, minmax(w, QSpec(8, signed=True, symmetric=True, axis=axis)))


layer = dict(load_model("mnist-unet").network.named_parameters())["up.2.attn.0.v.weight"].data.reshape(96, 96)
cases = {
    "like a network": codes_of(silu(rng.standard_normal((100, K))), rng.standard_normal((60, K))),
    "a real layer": codes_of(silu(rng.standard_normal((100, 96))), layer),
    "... scaled by output": codes_of(silu(rng.standard_normal((100, 96))), layer, axis=0),
    "random codes": (rng.integers(0, 256, (100, K), np.uint8), rng.integers(-128, 128, (60, K), np.int8)),
    "corners": (
        rng.choice(np.array([0, 1, 127, 128, 254, 255], np.uint8), (100, K)),
        rng.choice(np.array([-128, -127, -1, 0, 1, 126, 127], np.int8), (60, K)),
    ),
}
share = {}
for name, (x, w) in cases.items():
    right, mutant = ref.gemm_blas(x, w), gemm_mutant(x, w)
    share[name] = np.mean(mutant != right)
    off = np.abs(mutant - right).max() / right.std()
    print(f"{name:<21}{(mutant != right).sum():5} of {right.size:,} outputs wrong, by up to {off:.2f} std")

assert share["like a network"] == 0
assert share["a real layer"] < 0.002 and share["... scaled by output"] < 0.005
assert share["corners"] > 0.8 and share["random codes"] > 0.5

# %% [markdown]
# A test of six thousand outputs like a network's passes. With a scale for each output, whose largest weight then has
# the last code, a few outputs in ten thousand may be wrong, by a fraction of what they vary anyway: a picture would
# not show it, and a test with a tolerance would forgive it. Why so few? A pair saturates only where two neighbours
# are both far out, and the far ends of a bell curve are nearly empty.

# %% Figure: Codes of inputs and weights. Shaded: two such products side by side leave 16 bits. Hardly a real pair lies there.
grid_a, grid_b = np.meshgrid(np.arange(256), np.arange(-128, 128))
beyond = np.abs(2 * grid_a * grid_b + 0.5) > 32767.5  # (256, 256)
figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 3.6))
for axis, name in zip(axes, ["like a network", "corners"], strict=True):
    x, w = cases[name]
    axis.contourf(grid_a, grid_b, beyond, levels=[0.5, 1.5], colors=["0.82"])
    pick = rng.integers(0, [len(x), len(w), K], (1500, 3))
    axis.plot(x[pick[:, 0], pick[:, 2]], w[pick[:, 1], pick[:, 2]], ".", markersize=3, alpha=0.6)
    axis.set(title=name, xlabel="code of the input, uint8", xlim=(-6, 261), ylim=(-133, 132))
axes[0].set_ylabel("code of the weight, int8")
plt.show()

print(f"{100 * beyond.mean():.1f} % of all pairs of codes lie in the shaded part")
x, w = (codes.astype(int) for codes in cases["like a network"])
there = np.abs(2 * x[:, None] * w + 0.5) > 32767.5  # (100, 60, K)
print(f"of those like a network's, {100 * there.mean():.2f} %, and two of them are needed, or one larger yet")
assert beyond.mean() > 0.1 > 0.01 > there.mean()

# %% [markdown]
# So a test must go where the trouble is. refquant draws much of its test data from the corners
# ([`strategies.py`](../../tests/strategies.py)), keeps this mutant in C
# ([`gemm_maddubs.c`](../../tests/kernels/mutants/gemm_maddubs.c)), and a test demands that the suite *fails* on it. A
# suite that cannot fail proves nothing.
#
# Seven bits for the weights would make the shortcut exact, at the price of half of the codes:

# %%
every_a = np.arange(256, dtype=np.uint8)
seven = np.arange(-64, 64, dtype=np.int8)
extremes = [2 * int(x) * int(w) for x in (0, 255) for w in (-64, 63)]
print(f"two products of uint8 and 7 bits lie in [{min(extremes):,}, {max(extremes):,}]")
assert -32768 <= min(extremes) and max(extremes) <= 32767
pairs = np.stack([every_a, every_a], axis=-1)[:, None], np.stack([seven, seven], axis=-1)
assert np.array_equal(vpmaddubsw(*pairs)[..., 0], 2 * every_a.astype(int)[:, None] * seven)

# %% [markdown]
# ## Where this differs from the authors' code
#
# - **ONNX Runtime** and **PyTorch** offer `reduce_range`, weights or activations of 7 bits, for processors where
#   their kernels use `vpmaddubsw`; **oneDNN** documents the trap (`doc/advanced_topics/int8_computations.md`). Here
#   the instruction is banned (a test searches the sources for it), AVX2 pays for widening, and 8 bits are 8 bits
#   everywhere.
# - `vpdpbusds`, the saturating sister of `vpdpbusd`, is banned too: its 32-bit sums depend on the order of summation.
# - The released code of the quantization papers has no integer kernels.
#
# ## On your own
#
# 1. Find the smallest $K$ and the smallest codes that show the mutant.
# 2. Count the wrong outputs over all layers of the network, with a scale for each output. Then simulate sampling with
#    the mutant: would you see it in a picture?
# 3. `REFQUANT_ISA=scalar python tutorials/00_first_picture.py` draws the same digits. Why are its times the same, too?
#    ([14](14_real_int8.md) has a program for which they are not.)
