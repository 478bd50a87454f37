"""Importance of time-steps, by brute force with the sampler; of activations, by finite differences of the loss."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from toys import CALIBRATION, tiny_model, tiny_session

from refquant.autograd import Tensor, no_grad
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.denoiser import target
from refquant.diffusion.sampling import NoiseSource
from refquant.errors import RangeError, UnknownNameError
from refquant.nn.module import Module
from refquant.quant.blocks import TRIED, learning_states
from refquant.quant.calibrate import Calibration
from refquant.quant.importance import finish, fisher, step_errors, step_weights
from refquant.quant.methods import METHODS
from refquant.quant.record import unit_output
from refquant.quant.wrap import rebuild

# ------------------------------------------------------------------ steps


def sampled(model, calibration, eps):
    noise = NoiseSource(CALIBRATION.seed, CALIBRATION.images, model.image_shape)
    return ddim_sample(eps, noise.draw(), model.schedule, noise, steps=CALIBRATION.steps)


def test_one_quantized_step_at_a_time_by_brute_force(model, calibration):
    """MSE_k of the images of a whole run in which step k alone asks the quantized network."""
    quantized, original = METHODS["nearest"](tiny_session(calibration, weight_bits=3)).denoiser(), model.denoiser()
    error = step_errors(model, quantized, calibration.trajectories)
    want = sampled(model, calibration, original)
    np.testing.assert_array_equal(finish(model, calibration.trajectories), want)
    assert error.shape == (CALIBRATION.steps,)
    for k in range(CALIBRATION.steps):
        got = sampled(model, calibration, lambda x, t, s, k=k: (quantized if s == k else original)(x, t, s))
        # sums of a larger batch may be rounded otherwise
        np.testing.assert_allclose(error[k], np.mean((got.astype(np.float64) - want) ** 2), rtol=1e-3)
        assert error[k] > 0


def test_fewer_images_are_the_first_ones(model, calibration):
    """Asked for more images than there are, all are taken; a float step in the place of a quantized one errs little."""
    quantized = METHODS["nearest"](tiny_session(calibration, weight_bits=3)).denoiser()
    some, all_, more = (step_errors(model, quantized, calibration.trajectories, images=n) for n in (2, 3, 99))
    np.testing.assert_array_equal(all_, more)
    assert (some != all_).all()
    assert step_errors(model, model.denoiser(), calibration.trajectories).max() < 1e-10


def test_steps_between_lie_on_straight_lines(model, calibration):
    """Steps 0, 3 of 4 are tried: those of 1 and 2 divide the difference into thirds."""
    quantized = METHODS["nearest"](tiny_session(calibration, weight_bits=3)).denoiser()
    exact = step_errors(model, quantized, calibration.trajectories)
    found = step_errors(model, quantized, calibration.trajectories, every=3)
    np.testing.assert_allclose(found[[0, 3]], exact[[0, 3]], rtol=1e-3)
    np.testing.assert_allclose(found[1:3], [(2 * found[0] + found[3]) / 3, (found[0] + 2 * found[3]) / 3])


def test_psnr_in_the_recipe_is_that_of_the_errors(calibration):
    """PSNR_k = -10 log10(MSE_k / 4), of the model with nearest weights and float activations."""
    made = METHODS["importance"](tiny_session(calibration, weight_bits=4), loss="mse")
    nearest = METHODS["nearest"](tiny_session(calibration, weight_bits=4, input_bits=32))
    error = step_errors(calibration.model, nearest.denoiser(), calibration.trajectories, every=TRIED)
    np.testing.assert_allclose(made.recipe["psnr_of_steps"], -10 * np.log10(error / 4), atol=0.006)


def test_states_are_drawn_by_the_importance_of_their_steps(calibration):
    """More states of a step whose rounding hurts more; evenly, if asked, or where no weight is rounded."""

    def drawn(**options):
        run = tiny_session(calibration, **{"weight_bits": 3, "states": 8, **options}).start("any")
        if run.session.weight_bits < 32:
            run.nearest_weights()
        states = learning_states(run)
        return np.bincount(states.step, minlength=CALIBRATION.steps), run.recipe.get("psnr_of_steps")

    even = [2, 2, 2, 2]
    count, psnr = drawn()
    assert count.sum() == 8 and count[np.argmin(psnr)] >= count[np.argmax(psnr)] and list(count) != even
    assert list(drawn(sampling="uniform")[0]) == even and list(drawn(weight_bits=32)[0]) == even


def test_unknown_sampling(calibration):
    with pytest.raises(UnknownNameError, match="importance, uniform"):
        tiny_session(calibration, sampling="often")


errors_of_steps = hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(0, 1e6))


@given(errors_of_steps, st.floats(0, 1))
def test_weights_are_shares_with_a_floor(errors, floor):
    """sum w = 1, w_k >= floor / S, and above it like the roots of the errors; all alike where there is none."""
    weights = step_weights(errors, floor)
    np.testing.assert_allclose(weights.sum(), 1)
    assert (weights >= floor / len(errors) * (1 - 1e-12)).all()
    if errors.sum() > 1e-300:
        root = np.sqrt(errors)
        np.testing.assert_allclose(weights - floor / len(errors), (1 - floor) * root / root.sum(), atol=1e-12)
    elif not errors.any():
        np.testing.assert_allclose(weights, 1 / len(errors))


@pytest.mark.parametrize(
    ("errors", "floor"), [([1.0, np.nan], 0.1), ([1.0, np.inf], 0.1), ([1.0, -1.0], 0.1), ([1.0], -0.1), ([1.0], 1.1)]
)
def test_impossible_errors_and_floors(errors, floor):
    with pytest.raises(RangeError, match="step_weights"):
        step_weights(np.array(errors), floor)


# ------------------------------------------------------------------ activations

UNITS = ["conv_in", "temb.dense.1", "down.1.block.0", "mid.attn_1", "conv_out"]


class Nudged(Module):
    """A module that adds a constant to what it gives."""

    def __init__(self, module, nudge):
        self.module, self.nudge = module, nudge

    def __call__(self, *arguments):
        y = self.module(*arguments)
        return Tensor(y.data + self.nudge)


@pytest.fixture(scope="module", params=["eps", "v"])
def case(request):
    """A float64 model, states, the ends of their trajectories, and the loss as the formula has it."""
    model = tiny_model(prediction=request.param)
    calibration = Calibration(model, CALIBRATION)
    states = calibration.trajectories.at([0, 2])[1:5]  # two images of the first step, two of the third
    end = finish(model, calibration.trajectories)
    precise = replace(model, network=model.network.astype(np.float64))

    def loss(network):
        ab = model.schedule.alpha_bar[states.t].reshape(-1, 1, 1, 1)
        clean = end[states.image]
        noise = (states.x - np.sqrt(ab) * clean) / np.sqrt(1 - ab)
        wanted = target(model.prediction, model.schedule, clean, states.t, noise)
        with no_grad():
            answer = network(Tensor(states.x.transpose(0, 2, 3, 1).astype(np.float64)), states.t).data
        return np.mean((answer.transpose(0, 3, 1, 2) - wanted) ** 2)

    return precise, states, end, loss, fisher(model, UNITS, states, end)


@pytest.mark.parametrize("unit", UNITS)
def test_fisher_is_the_gradient_of_the_denoising_loss(case, unit):
    """Central differences at a few elements of the unit's output, up to one factor for the whole unit."""
    model, states, _, loss, found = case
    assert found[unit].shape == unit_output(model.network, unit, states).shape and found[unit].dtype == np.float32
    np.testing.assert_allclose(np.mean(np.square(found[unit], dtype=np.float64)), 1, rtol=1e-4)
    order = np.argsort(np.abs(found[unit]).ravel())
    ratios = []
    for flat in order[[-1, -2, len(order) // 2, 3 * len(order) // 4]]:
        index, step = np.unravel_index(flat, found[unit].shape), 1e-4
        values = []
        for sign in (1, -1):
            nudge = np.zeros(found[unit].shape)
            nudge[index] = sign * step
            network = rebuild(model.network, lambda n, m, nudge=nudge: Nudged(m, nudge) if n == unit else None)
            values.append(loss(network))
        slope = (values[0] - values[1]) / (2 * step)
        ratios.append(slope / found[unit][index])
    assert ratios[0] > 0
    np.testing.assert_allclose(ratios, ratios[0], rtol=5e-3)


def test_a_unit_that_the_loss_does_not_see_counts_evenly(calibration):
    """conv_out of zeros: nothing before it matters, its own output does."""
    model = tiny_model()
    model.network.conv_out.weight.data[:] = 0
    states = calibration.trajectories.at([1])
    found = fisher(model, ["conv_in", "conv_out"], states, np.zeros((3, 1, 8, 8), np.float32))
    np.testing.assert_array_equal(found["conv_in"], 1)
    assert found["conv_out"].std() > 0


def test_states_beyond_a_chunk_keep_their_order(model, calibration):
    """20 states in chunks of 16 and 4: each row is the gradient of its own state, whichever chunk it is in."""
    states = calibration.trajectories.at([0, 1, 2, 3, 0, 1, 2, 3])[:20]
    end = finish(model, calibration.trajectories)
    g = fisher(model, ["mid.block_1"], states, end)["mid.block_1"].reshape(20, -1)
    for i in range(8):  # state i + 12 is state i again
        np.testing.assert_allclose(g[i + 12], g[i], rtol=1e-3, atol=1e-4)


def test_no_gradient_is_held_twice(model, calibration, monkeypatch):
    """The pieces that the threads give are gone when they are joined: with all units they are most of the memory."""
    pieces = []

    def watched(function, items):
        pieces.extend(function(item) for item in items)
        return pieces

    monkeypatch.setattr("refquant.quant.importance.parallel_map", watched)
    states = calibration.trajectories.at([0, 1, 2, 3, 0, 1, 2, 3])[:20]
    found = fisher(model, UNITS, states, finish(model, calibration.trajectories))
    assert set(found) == set(UNITS) and len(pieces) == 2 and not any(pieces)
