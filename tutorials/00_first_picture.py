# %% [markdown]
# # 00 First picture
#
# *Draw digits with a diffusion model, in float and with 8-bit and 4-bit weights, from the same noise.*
#
# **Run time**: 15 s on two cores. **Before this**: nothing.
#
# ## What you'll do
#
# Load the diffusion model that comes with refquant, draw sixteen digits, quantize the model in two ways
# without any data, draw the same digits again, and look at what changed.
#
# ## What you'll learn
#
# - Which four things make a picture: a network, a schedule, noise, and a sampler.
# - What "W4A8" means, and what it buys.
# - Why the float model's own pictures are the yardstick, and why the noise must be the same.
#
# ## What you'll need
#
# Python, and refquant installed. No data set, no network connection, no GPU.

# %%
import matplotlib.pyplot as plt
import numpy as np

from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.model import load_model
from refquant.diffusion.sampling import NoiseSource
from refquant.evaluate import Judge
from refquant.metrics import psnr
from refquant.quant.calibrate import Calibration, CalibrationConfig
from refquant.quant.methods import method
from refquant.quant.session import Session
from refquant.viz import difference_images, labelled_rows

plt.style.use("refquant.assets.tutorial")

# %% [markdown]
# ## Equations and functions
#
# | equation or step | function |
# |---|---|
# | predicted clean image $\hat x_0 = (x_t - \sqrt{1-\bar\alpha_t} \hat\epsilon)/\sqrt{\bar\alpha_t}$ | `refquant.diffusion.ddpm.predict_x_0` |
# | one step of DDIM, eq. 12 of Song et al. 2021 | `refquant.diffusion.ddim.ddim_step` |
# | which values do the layers see? | `refquant.quant.calibrate.Calibration` |
# | $q = \mathrm{clamp}(\mathrm{round}(x/s) + z)$ | `refquant.quant.affine.quantize` |
# | PSNR $= 10 \log_{10}(2^2/\mathrm{MSE})$ in dB | `refquant.metrics.psnr` |
#
# ## A model is a network and a schedule
#
# The network sees a noisy image and the time-step, and says what in the image is noise. The schedule says how much
# noise there is at each time-step. Both are in one file.

# %%
model = load_model("mnist-unet")

parameters = model.network.parameter_count()
print(f"{model.name}: {parameters:,} parameters, images of shape {model.image_shape}")
print(f"schedule: {model.schedule.name}, {model.schedule.timesteps} time-steps")
print("share of the image at the first, middle and last of them:")
print(np.sqrt(model.schedule.alpha_bar[[0, 500, -1]]).round(4))

assert parameters == 1_333_969

# %% [markdown]
# ## The first picture
#
# The sampler begins with pure noise and takes 25 steps towards an image. At each step it asks the network once. This is
# the whole loop; [`ddim.py`](../../refquant/diffusion/ddim.py) has it in twenty lines.

# %%
STEPS, IMAGES = 25, 16


def draw(eps):
    """Draw digits with the noise predictor `eps`; also return the images after each step."""
    noise = NoiseSource(seed=7, count=IMAGES, shape=model.image_shape)  # the same numbers at every call
    path = []
    images = ddim_sample(
        eps, noise.draw(), model.schedule, noise, steps=STEPS, callback=lambda state: path.append(state.x)
    )
    return images, np.stack(path)  # (N, 1, 28, 28) float32 and (STEPS, N, 1, 28, 28)


float_images, float_path = draw(model.denoiser())
print(float_images.shape, float_images.dtype, f"from {float_images.min():.2f} to {float_images.max():.2f}")

# %% [markdown]
# A digit grows out of noise. Each column below is one of six images, each row a moment on its way.

# %% Figure: Six digits after 1, 7, 13, 19 and 25 of 25 steps. The shape is decided early, the strokes late.
moments = [1, 7, 13, 19, 25]
picture = labelled_rows([(f"step {k}", float_path[k - 1, :6]) for k in moments], scale=3)
height, width, _ = picture.shape
plt.figure(figsize=(width / 100, height / 100)).figimage(picture)
plt.show()

# %% [markdown]
# ## Fewer bits
#
# Post-training quantization takes the finished network and writes its numbers in few bits. *W8A8* means 8 bits for each
# **w**eight and 8 for each **a**ctivation, *W4A8* only 4 for each weight. It needs to know which values the activations
# take, and learns that from the float model's own sampling: noise is enough, no image of a data set is read.

# %%
calibration = Calibration(model, CalibrationConfig(images=16, steps=STEPS))
quantized = {bits: method("nearest")(Session(calibration, weight_bits=bits, input_bits=8)) for bits in (8, 4)}

float_bytes = 4 * parameters
print(f"float32  {float_bytes / 1e6:.2f} MB")
for bits, made in quantized.items():
    print(f"W{bits}A8     {made.size_bytes() / 1e6:.2f} MB, {float_bytes / made.size_bytes():.1f} times smaller")

assert 3.8 < float_bytes / quantized[8].size_bytes() < 4
assert 7 < float_bytes / quantized[4].size_bytes() < 8

# %% [markdown]
# Not quite 4 and 8 times, as scales, biases and normalisations stay float32.
#
# ## The same noise, three models
#
# Diffusion starts from random numbers. If two models started from different ones, they would draw different digits
# and no comparison could tell bits from luck. From the same noise, every difference is the work of quantization.

# %%
paths = {bits: draw(made.denoiser()) for bits, made in quantized.items()}
decibel = {bits: psnr(images, float_images) for bits, (images, _) in paths.items()}
for bits, value in decibel.items():
    print(f"W{bits}A8: {value:.1f} dB to the float images")

assert decibel[8] > 25
assert 15 < decibel[4] < decibel[8] - 3  # 4 bits cost several decibels, and the digits survive

# %% Figure: The same noise through three models; in rows of differences white is equal, red brighter, blue darker.
shown = slice(0, 7)
rows = [("float32", float_images[shown])]
for bits, (images, _) in paths.items():
    rows.append((f"W{bits}A8\n{decibel[bits]:.1f} dB", images[shown]))
    rows.append(("difference", difference_images(images[shown], float_images[shown])))
picture = labelled_rows(rows, scale=3)
height, width, _ = picture.shape
plt.figure(figsize=(width / 100, height / 100)).figimage(picture)
plt.show()

# %% [markdown]
# Whether a digit is still a digit is for a reader of digits to say. refquant ships a small classifier for that.

# %%
judge = Judge()
labels = {name: judge.classifier.judge(images)[1].argmax(axis=1) for name, images in
          [("float", float_images), (8, paths[8][0]), (4, paths[4][0])]}  # fmt: skip
print("float:", labels["float"])
for bits in (8, 4):
    print(f"W{bits}A8: {labels[bits]}, {np.sum(labels[bits] == labels['float'])} of {IMAGES} are the same digit")

assert np.mean(labels[8] == labels["float"]) >= 0.8
assert np.mean(labels[4] == labels["float"]) >= 0.7

# %% [markdown]
# ## Where does the error come from?
#
# Each of the 25 steps is a little wrong, and each begins where the one before it went wrong. How does the distance to
# the float image grow on the way? Two guesses are at hand. If steps erred alike and independently, the squared error
# would grow in a straight line. If the sampler forgave, as it has the image yet to come, errors made early would
# fade.

# %% Figure: Squared distance to the float images after each step. Both guesses are wrong: it grows faster than a line.
errors = {bits: np.mean((path - float_path) ** 2, axis=(1, 2, 3, 4)) for bits, (_, path) in paths.items()}
step = np.arange(1, STEPS + 1)
figure, axes = plt.subplots()
for (bits, error), style in zip(errors.items(), ["-", "--"], strict=True):
    axes.plot(step, error, style, marker="o", markersize=3, label=f"W{bits}A8")
axes.plot(step, errors[4][-1] * step / STEPS, ":", color="grey", label="a straight line to the end of W4A8")
axes.set(xlabel="step of the sampler (the first starts from noise)", ylabel="mean squared error", yscale="log")
axes.legend()
plt.show()

# %%
half = STEPS // 2
for bits, error in errors.items():
    print(f"W{bits}A8: {100 * error[half] / error[-1]:.0f} % of the final error is there after {half + 1} steps")
    assert error[half] < 0.5 * error[-1]  # a line would have more than half of it

# %% [markdown]
# One reason stands in the schedule: after the early steps, an image is still mostly its starting noise, which all
# models share. How much of the rest is born late, and how much early and then amplified, is the subject of
# [08](08_activations_move_with_t.md).

# %% [markdown]
# ## Where this differs from the authors' code
#
# - The papers' code (TFMQ-DM, Q-Diffusion) quantizes in PyTorch, on a GPU, and calibrates from files of recorded
#   trajectories; here the recording is part of the call.
# - It leaves several layers in float ([`coverage.py`](../../refquant/quant/coverage.py) names them); here W4A8 means
#   all weights and all inputs of layers.
# - Both compute products of rounded numbers in float32. [14](14_real_int8.md) does it in integers.
#
# ## On your own
#
# 1. Try 3 and 2 bits for the weights. At which of them does the classifier lose the digits?
# 2. Start the quantized model from other noise (another seed) and compute the PSNR again. What does it measure now?
# 3. Replace `"nearest"` by `"brecq"` with `ReconstructionConfig(iterations=60)` as the session's `reconstruction`:
#    learned rounding, the subject of [09](09_adaround_and_blocks.md). How many decibels does it buy at 4 bits?
