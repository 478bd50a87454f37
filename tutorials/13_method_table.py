# %% [markdown]
# # 13 The table of methods
#
# *Read a saved comparison of all methods, compute one of its rows again by hand, and ask which differences mean much.*
#
# **Run time**: 15 s on two cores. **Before this**: [00](00_first_picture.md), and [11](11_tfmq.md) for the features.
#
# ## What you'll do
#
# Load the numbers that `refquant compare` wrote, print them as a table, and compute each kind of number once by hand,
# on a model that is quantized on this page. Then look at the spread: which methods differ by more than chance?
#
# ## What you'll learn
#
# - What each column says, and what it cannot say.
# - Why methods are compared seed by seed, and what a mean over seeds hides.
# - Why a Fréchet distance of few images is too large, for every method alike.
#
# ## What you'll need
#
# The names of the methods; each is a file in [`refquant/quant/methods`](../../refquant/quant/methods). The comparison
# itself takes long, and this page seconds: the numbers lie in
# [`tutorials/data/comparison.json`](../data/comparison.json). Nothing below depends on which methods are in it, and all
# that is said of them is computed here.

# %%
import json
import re
import textwrap
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from refquant.compare import HEADER, Reference, cells, measure
from refquant.deploy.runtime import integer_denoiser
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.model import load_model
from refquant.evaluate import Judge, sample_run
from refquant.metrics import mean_and_spread
from refquant.quant.calibrate import Calibration, CalibrationConfig
from refquant.quant.methods import method
from refquant.quant.session import Session
from refquant.quant.temporal import features, quantized_features
from refquant.tutorials import folder

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | column | equation | function |
# |---|---|---|
# | PSNR | $10 \log_{10}(2^2 / \mathrm{MSE})$, to the float images from the same noise | `refquant.metrics.psnr` |
# | Fréchet | $\Vert \mu_1 - \mu_2 \Vert^2 + \mathrm{tr}(S_1 + S_2 - 2 (S_1 S_2)^{1/2})$ | `refquant.metrics.frechet_distance` |
# | feature error | $\sum_i \Vert \hat{emb}_{t,i} - emb_{t,i} \Vert^2$, mean over $t$ | `refquant.quant.temporal.feature_errors` |
# | MB | codes, scales, zero points, tables, and what stays float32 | `refquant.quant.quantized.QuantizedModel` |
# | a whole row | | `refquant.compare.measure` |
#
# ## The table

# %%
saved = json.loads((folder() / "data" / "comparison.json").read_text(encoding="utf-8"))
rows = {f"{row['method']} {row['bits']}": row for row in saved["rows"]}
shown = ("method", "bits", "PSNR dB", "median dB", "Frechet", "feature error", "MB", "seconds")
table = [[row[HEADER.index(name)] for name in shown] for row in (HEADER, *map(cells, saved["rows"]))]
widths = [max(len(line[i]) for line in table) for i in range(len(shown))]
for line in table:
    print("  ".join(cell.rjust(width) if i > 1 else cell.ljust(width)
                    for i, (cell, width) in enumerate(zip(line, widths, strict=True))))
print(textwrap.fill(saved["caption"], 100))
spent = sum(row.get("seconds", {}).get("all", 0) for row in saved["rows"])
print(f"Calibrating all of them took {spent / 60:.0f} minutes.")

RUNS, IMAGES, STEPS, SEED = map(int, re.search(
    r"(\d+) runs of (\d+) images, DDIM (\d+) steps, seeds from (\d+)", saved["caption"]).groups())
assert IMAGES >= 8 and all(len(row["psnr_db"]) == RUNS for row in saved["rows"] if "psnr_db" in row)

# %% [markdown]
# "±" is the standard deviation over runs, which differ in the starting noise only. The calibration is the same in
# all of them; its own spread is not in this table.
#
# ## One row again
#
# Nearest rounding at W4A8 learns nothing, so it is quickly made again. Eight images must do here. The noise of image
# $i$ depends on the seed and on $i$ alone, so these are the first eight images of the saved run.

# %%
model = load_model("mnist-unet")
calibration = Calibration(model, CalibrationConfig(images=8, steps=STEPS))
quantized = method("nearest")(Session(calibration, weight_bits=4, input_bits=8))
reference = Reference.draw(model, count=8, seeds=[SEED], steps=STEPS)
live, _ = measure(quantized, reference, engine="c")
old = rows["nearest W4A8"]

for name, unit, scale in (("bytes", "MB", 1e6), ("bit_operations", "GBOP", 1e9), ("feature_squared", "", 1)):
    print(f"{name:16} here {live[name] / scale:8.3f} {unit:4}  saved {old[name] / scale:8.3f}")
print(f"median image     here {live['psnr_median_db'][0]:8.1f} dB    saved {old['psnr_median_db'][0]:8.1f}, same seed")

assert live["bytes"] == old["bytes"] and live["bit_operations"] == old["bit_operations"]
# other trajectories change the sampled ranges a little; on temporal layers, which see t alone, hardly at all
assert abs(live["feature_squared"] / old["feature_squared"] - 1) < 0.1

# %% [markdown]
# ### Its columns by hand
#
# The integers were run above; the same seed gives the same images again.

# %%
sampler = partial(ddim_sample, steps=STEPS)
made = sample_run(integer_denoiser(quantized, "c"), model, 8, sampler, seed=SEED).images  # (8, 1, 28, 28)
wanted = reference.runs[SEED].images

error = np.square(made.astype(np.float64) - wanted).mean(axis=(1, 2, 3))  # of each image; pixels lie in [-1, 1]
np.testing.assert_allclose(live["psnr_db"][0], 10 * np.log10(4 / error.mean()))
np.testing.assert_allclose(live["psnr_median_db"][0], np.median(10 * np.log10(4 / error)))

judge = Judge()
seen = judge.classifier.judge(made)[0].astype(np.float64)  # (8, 64), the classifier's features
mean, cov = seen.mean(axis=0), np.cov(seen.T)
root = np.sqrt(np.linalg.eigvals(cov @ judge.reference.cov).real.clip(0)).sum()  # tr (S1 S2)^(1/2)
distance = np.square(mean - judge.reference.mean).sum() + np.trace(cov) + np.trace(judge.reference.cov) - 2 * root
np.testing.assert_allclose(live["frechet"][0], distance, rtol=1e-3)

t = np.arange(model.schedule.timesteps)
got, exact = quantized_features(quantized, t), features(model.network, t)
np.testing.assert_allclose(live["feature_squared"],
                           np.mean(sum(np.square(got[n] - exact[n]).sum(axis=1) for n in exact)), rtol=1e-3)

size = sum(array.nbytes for array in quantized.float_parameters().values())
for layer in quantized.layers.values():
    outputs, products = len(layer.codes), layer.codes[0].size
    size += outputs * (-(-products // 2)) + 8 * outputs  # two codes a byte; a scale and a zero point for each output
size += 8 * len(quantized.quantizers())
assert size == live["bytes"]
print(f"PSNR {live['psnr_db'][0]:.1f} dB, Fréchet {distance:.1f}, feature error", end=" ")
print(f"{live['feature_squared']:.3f}, {size:,} bytes")

# %% [markdown]
# ## Seed by seed
#
# All methods start from the same noise, so compare them noise by noise: what one seed makes hard may be hard for all.
# Below is the gain over nearest rounding in the median image. "Clear" is a mean of more than twice its spread.

# %%
quantized_rows = {label: row for label, row in rows.items() if "psnr_db" in row}
alone, paired = [], []
for label, row in quantized_rows.items():
    base = rows.get(f"nearest {row['bits']}")
    if base is None or base is row:
        continue
    gain = np.array(row["psnr_median_db"]) - base["psnr_median_db"]
    mean, spread = mean_and_spread(gain) if RUNS > 1 else (float(gain[0]), float("nan"))
    says = "clear" if abs(mean) > 2 * spread else "within the spread"
    print(f"{label:30} {mean:+5.1f} ± {spread:3.1f} dB, better in {np.sum(gain > 0)} of {RUNS} runs: {says}")
    alone.append(np.std(row["psnr_median_db"]))
    paired.append(np.std(gain))
print(f"mean spread: of a method's own number {np.mean(alone):.2f} dB, of its gain {np.mean(paired):.2f} dB")
assert len(alone) > 0

# %% Figure: Each run of each method, a line for each seed. If seeds did not matter, the lines would coincide.
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 1.6 + 0.3 * len(quantized_rows)), sharey=True)
places = np.arange(len(quantized_rows))
for seed in range(RUNS):
    style = {"marker": "os^Dv"[seed % 5], "linewidth": 0.8, "label": f"seed {SEED + seed}"}
    left.plot([row["psnr_median_db"][seed] for row in quantized_rows.values()], places, **style)
    right.plot([row["frechet"][seed] for row in quantized_rows.values()], places, **style)
    right.axvline(rows["float32 W32A32"]["frechet"][seed], color=f"C{seed}", linestyle=":", linewidth=1)
left.set(xlabel="PSNR of the median image, dB", yticks=places, yticklabels=list(quantized_rows))
right.set(xlabel="Fréchet distance (dotted: float32)")
left.invert_yaxis()
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Along the trajectory, and over the time-steps
#
# A mean over images says that something went wrong, not where. Two curves are saved for it: the error of $x$ after each
# step of the sampler, and the cosine of the worst temporal feature at every $t$.

# %% Figure: Where each method loses: error along the trajectory, and its temporal features. Flat at 1 would be exact.
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8 + 0.08 * len(quantized_rows)))
for i, (label, row) in enumerate(quantized_rows.items()):
    style = {"color": f"C{i % 7}", "linestyle": ("-", "--", "-.", ":")[i // 7 % 4]}
    left.semilogy(np.arange(1, STEPS + 1), row["per_step_mse"], linewidth=1.2, **style, label=label)
    right.plot(row["feature_cosine_by_t"], linewidth=1, **style)
left.set(xlabel="step of the sampler", ylabel="mean squared error of x")
right.set(xlabel="time-step t", ylabel="cosine of the worst feature")
figure.legend(fontsize=7, loc="outside right upper")
plt.show()

growth = [row["per_step_mse"][-1] / row["per_step_mse"][0] for row in quantized_rows.values()]
print(f"from the first step to the last the error grows {min(growth):.0f} to {max(growth):.0f} times")
best = max(quantized_rows, key=lambda label: np.mean(quantized_rows[label]["psnr_median_db"]))
steady = min(quantized_rows, key=lambda label: quantized_rows[label]["feature_squared"])
print(f"best median image: {best}; best temporal features: {steady}")
assert min(growth) > 1

# %% [markdown]
# ## What a Fréchet distance of few images is worth
#
# The distance is one of two Gaussians, and a covariance in 64 dimensions cannot be known from a dozen images. The
# estimate is too large, and the fewer the images the more. We draw 64 float images, which have no quantization error at
# all, and look at subsets of them.

# %%
many = sample_run(model.denoiser(), model, 64, partial(ddim_sample, steps=10), seed=SEED).images
rng = np.random.default_rng(0)
counts, found = (4, 8, 16, 32), []
for count in counts:
    found.append([judge.frechet(many[rng.permutation(len(many))[:count]]) for _ in range(8)])
means = np.array([np.mean(values) for values in found])
print("images  ", *(f"{count:7}" for count in (*counts, 64)))
print("distance", *(f"{value:7.1f}" for value in (*means, judge.frechet(many))))
assert (np.diff([*means, judge.frechet(many)]) < 0).all()

# %% Figure: The same images, fewer of them: the distance grows. An unbiased estimate would scatter about a flat line.
figure, axes = plt.subplots()
for count, values in zip(counts, found, strict=True):
    axes.plot([count] * len(values), values, "o", color="C0", alpha=0.4)
axes.plot([*counts, 64], [*means, judge.frechet(many)], "C1s-", label="mean of 8 subsets (last: all 64)")
axes.set(xlabel="images", ylabel="Fréchet distance", xscale="log", xticks=[*counts, 64], xticklabels=[*counts, 64])
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# So compare rows of one table, which have as many images each, and never rows of two. The float row tells how much of
# the number is bias and model; what a method adds is the difference to it, and often smaller than the spread.
#
# ## Where this differs from the authors' code
#
# - The papers report an FID on Inception's features, of 50,000 images, against the training set, for models of 35 to
#   400 million parameters; here the features are those of a small classifier (`refquant.evaluate.Judge`), the images
#   a few dozen, and the model is tiny. No number here can be compared with theirs; the *order* of methods perhaps
#   can.
# - They report one run. A user of Q-Diffusion's released checkpoint measured 4.79 where the paper has 4.93 (issue 41
#   there), so that the spread is not small for them, either.
# - PSNR to the float model's images is not in the papers. It sees what FID cannot, a picture that became another one,
#   and is blind to what FID sees, pictures that are all a little worse in the same way.
# - Coverage is one for all rows here (all layers, all inputs, attention's products), while the released codes leave
#   different parts in float (`refquant.quant.coverage`).
#
# ## On your own
#
# 1. Make your own file: `refquant compare --methods nearest,brecq --bits W4A8 -n 16 --runs 3 --json mine.json`, and
#    load that above.
# 2. How many runs would it take until the best two methods differ by more than two standard errors? Estimate it from
#    the differences seed by seed, and from the two means. Which needs fewer runs, and why?
# 3. Subtract the float row's distance from each. Is the order the same as by PSNR?
