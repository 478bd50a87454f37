# %% [markdown]
# # 14 Real int8
#
# *Turn a calibrated model into a program of integer operations, run it on NumPy and on C, and compare every tensor.*
#
# **Run time**: 10 s on two cores. **Before this**: [02](02_integer_gemm_by_hand.md) and
# [00](00_first_picture.md).
#
# ## What you'll do
#
# Quantize the shipped model and lower it: no network remains, only a list of operations on numbered buffers. Compute
# one of them by hand. Run the list with the NumPy reference and with every kernel of this machine, and compare all
# that they write. Then ask what came of it: in the codes, in the pictures, in bytes, in milliseconds.
#
# ## What you'll learn
#
# - What is an integer operation in a quantized network, and what stays a float island, and why.
# - Why kernels can be *equal*, while simulation and integers are only *close*, and how small differences grow.
# - Where time-steps go: into biases.
# - What quantization makes smaller, and what it does not.
#
# ## What you'll need
#
# The integer matrix product with zero points (page 02). A C compiler is not needed: without the C core all runs on
# NumPy, and only the times differ.

# %%
import time
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from refquant import kernels, ref
from refquant.deploy import lower
from refquant.deploy.plan import plan
from refquant.deploy.program import INTEGER, Convolve, Mix, Scores, reads
from refquant.deploy.runtime import Executor, integer_denoiser
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.model import load_model
from refquant.evaluate import sample_run
from refquant.metrics import psnr
from refquant.quant.affine import quantize
from refquant.quant.calibrate import Calibration, CalibrationConfig, record
from refquant.quant.methods import method
from refquant.quant.session import Session
from refquant.quant.temporal import features
from refquant.viz import difference_images, labelled_rows

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | equation | function |
# |---|---|
# | simulation: $y = \sum (s_w (q_w - z_w)) (s_x (q_x - z_x)) + b$ in float32 | `refquant.quant.wrap.QuantLayer` |
# | integers: $y = s_w s_x \sum (q_w - z_w)(q_x - z_x) + b$ | `refquant.ref.conv2d`, `refquant.kernels.conv2d` |
# | a network as a list of operations | `refquant.deploy.lower.lower`, `refquant.deploy.program.Program` |
# | which values share memory | `refquant.deploy.plan.plan` |
# | run it | `refquant.deploy.runtime.Executor`, `refquant.deploy.runtime.integer_denoiser` |
#
# ## From a network to a list
#
# Nearest rounding with 8-bit weights and activations, the same at all time-steps, is enough for this page. `lower`
# walks through the network as its forward pass does, and writes down operations instead of computing.

# %%
STEPS = 20
model = load_model("mnist-unet")
calibration = Calibration(model, CalibrationConfig(images=8, steps=STEPS))
quantized = method("nearest")(Session(calibration, weight_bits=8, input_bits=8), search="minmax")
program = lower(quantized)

for operation in program.operations[:6]:
    value, kind = program.values[operation.out], "codes" if program.values[operation.out].codes else "floats"
    print(f"{type(operation).__name__:9} -> {kind:6} {value.shape!s:14} {value.name}")
print("...")
kinds = program.describe()
for kind, count in kinds.items():
    print(f"{count:4} {kind}")
assert kinds["integer"] + kinds["float islands"] == len(program.operations)

# %% [markdown]
# `Convolve`, `Scores` ($q k^\top$ of attention) and `Mix` (probabilities times $v$) multiply integers and add them up
# exactly. Between them are float islands: normalisation, SiLU and softmax need roots and exponentials, residuals add
# tensors of different scales, and every `Encode` divides by a scale and rounds. Islands touch each number once; integer
# operations multiply.

# %%
def multiplications(operation):
    """Of one integer operation, for one image."""
    shape = program.values[operation.out].shape
    if isinstance(operation, Convolve):
        return shape[0] * shape[1] * int(np.prod(operation.weights.shape))
    q = operation.q if isinstance(operation, Scores) else operation.v
    return int(np.prod(program.values[q].shape)) * program.values[q].shape[0]  # tokens x channels x tokens


integer = [o for o in program.operations if isinstance(o, INTEGER)]
islands = [o for o in program.operations if not isinstance(o, INTEGER)]
products = sum(multiplications(o) for o in integer)
touched = sum(int(np.prod(program.values[o.out].shape)) for o in islands)
print(f"one image, one step: {products / 1e6:.1f} million integer multiplications;")
print(f"float islands write {touched / 1e6:.2f} million numbers")
assert any(isinstance(o, Mix) for o in integer) and products > 50 * touched

# %% [markdown]
# ## One operation by hand
#
# The first convolution of a ResBlock. In the network a projection of the time embedding is added after it; but the
# step of the sampler is known beforehand, so `lower` has computed that projection and added it to the *bias*. The
# time MLP and all projections are gone from the program.

# %%
STEP, NAME = 7, "down.1.block.0.conv1"
x = calibration.trajectories.at([STEP]).x.transpose(0, 2, 3, 1).copy()  # (8, 28, 28, 1) float32


def run_traced(engine, isa=None):
    """Everything that one step writes, in order: (name, array)."""
    written = []
    executor = Executor(program, engine)
    with kernels.using(isa or kernels.active()):
        executor(x, STEP, lambda name, value: written.append((name, value.copy())))
    return written


reference = run_traced("ref")
values = dict(reference)
x_codes = values[f"{NAME}.input"]  # (8, 14, 14, 16) uint8
layer = quantized.layers[NAME]
w_codes = layer.codes  # (32, 3, 3, 16) int8
x_q, w_q = layer.input.qparams, layer.weight_qparams

zx, zw = int(x_q.zero_point), w_q.zero_point[:, None, None, None]
padded = np.pad(x_codes.astype(np.int32), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=zx)  # zx means 0
windows = np.lib.stride_tricks.sliding_window_view(padded - zx, (3, 3), axis=(1, 2))  # (8, 14, 14, 16, 3, 3)
sums = np.einsum("nijcpq,opqc->nijo", windows, w_codes.astype(np.int32) - zw)

t = quantized.timesteps()[STEP : STEP + 1]
bias = layer.layer.bias.data + features(quantized.network, t)["down.1.block.0.temb_proj"]
y = sums * (x_q.scale * w_q.scale) + bias

by_ref = ref.conv2d(x_codes, w_codes, padding=1, x_zero_point=zx, w_zero_point=w_q.zero_point)
assert sums.dtype == np.int32 and np.array_equal(sums, by_ref)
np.testing.assert_allclose(y, values[NAME], rtol=1e-5, atol=1e-5)
print(f"{sums.size:,} sums of {w_codes[0].size} products each, from {sums.min()} to {sums.max()}: all equal")
print(f"time-step {t[0]} has become a part of {bias.size} biases")

# %% [markdown]
# ## Equal, not close
#
# Integer sums do not depend on the order in which they are taken. The islands of the C core do the same float
# operations in the same order on every instruction set. So all its kernels must write the same bits into every
# buffer, and we can simply ask.
#
# The NumPy reference has the same sums, but computes islands in float64. Its codes are the same, unless a value lies
# within two millionths of a step of the middle between two codes ([`ref/islands.py`](../../refquant/ref/islands.py)).
# If that happens once in the millions of values below, all that comes after may differ a little.

# %%
compiled = [isa for isa in kernels.supported() if isa != "ref"] or ["ref"]
first, *others = (run_traced("c", isa) for isa in compiled)
for isa, written in zip(compiled[1:], others, strict=True):
    assert [name for name, _ in written] == [name for name, _ in first]
    for (name, a), (_, b) in zip(written, first, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b), (isa, name)
bits = sum(8 * a.nbytes for _, a in first)
print(f"{len(first)} tensors of one step, {bits:,} bits: equal on {', '.join(compiled)}")

pairs = zip(reference, first, strict=True)
apart = [(name, a.dtype, np.mean(a != b)) for (name, a), (_, b) in pairs if not np.array_equal(a, b)]
print(f"{len(first) - len(apart)} of them are equal to NumPy's, too")
if apart:  # began with a code next to a middle
    name, dtype, share = apart[0]
    print(f"the first that is not, {name}, differs in {share:.1e} of its codes")
    assert dtype == np.uint8 and share < 1e-4

# %% [markdown]
# ## Close, not equal
#
# Simulation multiplies rounded *floats*, $s_w (q_w - z_w)$ times $s_x (q_x - z_x)$, and sums them in float32. Each
# product carries a rounding error of its own, and so does each addition. That is a difference in the seventh digit,
# until a value lies near the border between two codes. Then one side writes 17 and the other 18.
#
# We compare codes at the inputs of the layers, in order of execution.

# %%
names, differing, largest = [], [], []
for name, value in record(quantized.network, calibration.trajectories.at([STEP])):
    got = values.get(name)
    if got is not None and got.size == value.size:  # the time MLP is gone; upsampled inputs have another size
        simulated = quantize(value, quantized.quantizers()[name].qparams).reshape(got.shape)
        names.append(name)
        differing.append(np.mean(simulated != got))
        largest.append(abs(simulated.astype(int) - got).max())
print(f"{len(names)} tensors of codes; the first {np.flatnonzero(differing)[0]} are the same")
print(f"at the last, {names[-1]}, {differing[-1]:.1%} differ, by {largest[-1]} at most")
assert differing[0] == 0 and max(differing) < 0.5

# %% Figure: Share of codes that differ between simulation and integers. If both rounded alike, all would be 0.
figure, axes = plt.subplots()
axes.plot(100 * np.array(differing), ".-")
axes.set(xlabel="quantized tensor, in order of execution", ylabel="codes that differ, %")
plt.show()

# %% [markdown]
# Neither side is wrong: where a value lies in the middle between two codes, both are equally near. But once a code
# differs, the layers behind it see another input, and what began in the seventh digit has become a step of the grid. So
# simulation and integers are two roundings of the same model. Is one of them better?

# %%
draw = partial(sample_run, model=model, count=10, sampler=partial(ddim_sample, steps=STEPS), seed=7)
in_float, simulated = draw(model.denoiser()), draw(quantized.denoiser())
in_integers = draw(integer_denoiser(quantized, "c"))


def median(a, b):
    return float(np.median([psnr(p, q) for p, q in zip(a.images, b.images, strict=True)]))


to_float = median(simulated, in_float), median(in_integers, in_float)
print(f"median image to float32: simulation {to_float[0]:.1f} dB, integers {to_float[1]:.1f} dB")
print(f"simulation to integers:  {median(simulated, in_integers):.1f} dB")
assert median(simulated, in_integers) < max(to_float) + 10
assert abs(to_float[0] - to_float[1]) < 6  # two roundings of one model; which one is luckier depends on the machine

# %% [markdown]
# The squared difference of simulation and integers is not even ten times smaller than that of either from float32. So
# simulation predicts what integers draw on average, not pixel by pixel; and a runtime that claims exactness has to be
# compared with another *integer* implementation, as above.

# %% Figure: The same noise in float32, in simulation and in integers; differences five times enlarged.
rows = [("float32", in_float.images), ("integers", in_integers.images)]
for label, a, b in (
    ("difference x 5\nsimulation, float32", simulated, in_float),
    ("difference x 5\nintegers, float32", in_integers, in_float),
    ("difference x 5\nintegers, simulation", in_integers, simulated),
):
    rows.append((label, difference_images(a.images, b.images, gain=5)))
picture = labelled_rows(rows)
plt.figure(figsize=(picture.shape[1] / 100, picture.shape[0] / 100)).figimage(picture)
plt.show()

# %% [markdown]
# ## Bytes
#
# Weights shrink as promised. Memory while running is another matter: it holds activations, which depend on the number
# of images, and half of them are floats on their way from one integer operation to the next. `plan` puts values that
# are never alive at the same time into the same place.

# %%
IMAGES = 16
four_bits = method("nearest")(Session(calibration, weight_bits=4, input_bits=8), search="minmax")
float_bytes = 4 * model.network.parameter_count()
for label, made in (("W8A8", quantized), ("W4A8", four_bits)):
    packed = sum(o.weights.nbytes for o in lower(made).operations if isinstance(o, Convolve))
    size = made.size_bytes()
    print(f"{label}: file {size / 1e6:.2f} MB, {float_bytes / size:.1f} times smaller than float32; ", end="")
    print(f"packed for the kernels {packed / 1e6:.2f} MB")

offsets, size = plan(program, IMAGES)
alone = sum(value.bytes for value in program.values) * IMAGES
print(f"buffers of {IMAGES} images: {size / 1e6:.2f} MB shared, {alone / 1e6:.2f} MB if each value had its own")
assert size < alone / 3

# %% Figure: The life of every value, one box each; no two overlap. The long boxes are the skips of the UNet.
first, last = {0: 0}, {0: 0}
for i, operation in enumerate(program.operations):
    first[operation.out] = last[operation.out] = i
    for value in reads(operation):
        last[value] = i
figure, axes = plt.subplots()
for v, value in enumerate(program.values):
    box = (offsets[v] / 1e6, IMAGES * value.bytes / 1e6)
    axes.broken_barh([(first[v], last[v] - first[v] + 1)], box, color="C0" if value.codes else "C1", ec="white", lw=0.3)
axes.set(xlabel="operation, in order of execution", ylabel="address in MB (blue: codes)")
plt.show()

ends = [offset + IMAGES * value.bytes for offset, value in zip(offsets, program.values, strict=True)]
for v in range(len(ends)):
    for w in range(v):
        together = first[v] <= last[w] and first[w] <= last[v]
        assert not together or ends[v] <= offsets[w] or ends[w] <= offsets[v]

# %% [markdown]
# ## Milliseconds
#
# One step for 16 images: the package's own float32 network, the simulation, and the integers. Each in turn, five times,
# and the least of each, because this machine may have other things to do.

# %%
batch = np.random.default_rng(0).standard_normal((IMAGES, *model.image_shape), dtype=np.float32)
engines = {
    "float32": model.denoiser(),
    "simulation W8A8": quantized.denoiser(),
    f"integers W8A8 ({kernels.active()})": integer_denoiser(quantized, "c"),
    f"integers W4A8 ({kernels.active()})": integer_denoiser(four_bits, "c"),
}
least = dict.fromkeys(engines, np.inf)
for _ in range(5):
    for label, eps in engines.items():
        began = time.perf_counter()
        eps(batch, int(t[0]), STEP)
        least[label] = min(least[label], time.perf_counter() - began)
for label, seconds in least.items():
    print(f"{label:28} {1000 * seconds:7.1f} ms   {least['float32'] / seconds:5.2f} times float32's speed")

# %% [markdown]
# Simulation is *slower* than float: it does all of float's work, and rounds besides. Papers that simulate cannot show a
# speed, and mostly do not claim one. The integers gain on two sides, by cheaper multiplications and by islands that are
# fused and run in C; how much of it is due to what, `refquant bench kernels` and `refquant bench unet` measure, beside
# PyTorch and others.
#
# ## Where this differs from the authors' code
#
# - The papers' code (TFMQ-DM, Q-Diffusion, PTQ4DM) has the simulation only: rounded weights as float32, in
#   checkpoints that are not smaller than the original (q-diffusion issue 12). TFMQ-DM reports times of a modified
#   OpenVINO that was not released (its issues 2 and 10).
# - Runtimes for classifiers fold the batch normalisation into the convolution before it, and requantize from sums to
#   codes in fixed point (gemmlowp, TensorFlow Lite). Group normalisation depends on the image and cannot be folded. So
#   here the sums become floats; `refquant.kernels.Requantize` is there for networks where they need not.
#
# ## On your own
#
# 1. Write down what `Scores` computes, from codes, and compare with the trace (`down.2.attn.0.product.q.scores`).
# 2. Quantize with `coverage="released"` and lower that. What does the error say, and why is it right?
# 3. Take the simulation in float64: convert the parameters, and count again which codes differ from the integers'. Does
#    simulation come closer, and what remains?
