"""PTQ4DM: time-steps drawn by a clipped normal distribution; labels that fit their states or, as released, do not."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import tiny_session

from refquant.errors import UnknownNameError
from refquant.quant.affine import QSpec
from refquant.quant.calibrate import observe
from refquant.quant.methods import METHODS
from refquant.quant.methods.ptq4dm import MEAN, STD, calibration_states, time_steps
from refquant.quant.observers import ptq4dm
from refquant.quant.record import Trajectories
from refquant.quant.wrap import wrap


def numbered(steps, images):
    """Trajectories whose pixel says where it comes from: 100 step + image."""
    x = (100 * np.arange(steps)[:, None] + np.arange(images)).astype(np.float32)
    return Trajectories(x[:, :, None, None, None], 7 * np.arange(steps)[::-1])


def test_time_steps_are_a_clipped_normal():
    """P(t = k) of floor(N(0.4 S, 0.4 S)) clamped to [0, S): counts of 100,000 within 5 standard deviations."""
    steps, count = 10, 100_000
    numbers = np.bincount(time_steps(count, steps, np.random.default_rng(0)), minlength=steps)
    assert len(numbers) == steps

    def below(k):
        return 0.5 * (1 + math.erf((k / steps - MEAN) / STD / math.sqrt(2)))

    for k in range(steps):
        p = (below(k + 1) if k < steps - 1 else 1.0) - (below(k) if k > 0 else 0.0)
        assert abs(numbers[k] - count * p) < 5 * math.sqrt(count * p * (1 - p))


def test_uniform_is_uniform():
    """What NDTC is compared with: every step within 5 standard deviations of its share."""
    numbers = np.bincount(time_steps(100_000, 10, np.random.default_rng(0), "uniform"), minlength=10)
    assert (np.abs(numbers - 10_000) < 5 * math.sqrt(100_000 * 0.1 * 0.9)).all()


def test_near_the_image_there_are_more():
    """The mean lies below half of the steps, and both ends collect what lies beyond them."""
    drawn = time_steps(10_000, 50, np.random.default_rng(0))
    assert drawn.mean() < 0.45 * 50
    numbers = np.bincount(drawn, minlength=50)
    assert numbers[0] > 4 * numbers[1] and numbers[49] > 4 * numbers[48]


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 30), st.integers(0, 1000))
def test_paper_labels_are_the_states_own(steps, images, count, seed):
    """x, t, step and image of a state belong together; as many as asked, also more than were recorded."""
    trajectories = numbered(steps, images)
    states = calibration_states(trajectories, count, seed)
    assert len(states) == count
    np.testing.assert_array_equal(states.x[:, 0, 0, 0], 100 * states.step + states.image)
    np.testing.assert_array_equal(states.t, trajectories.t[states.step])


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 1000))
def test_released_labels_belong_to_another_noise_level(steps, images, seed):
    """Label t = i (from the image) on the state after i + 1 steps from the noisiest: mirrored, and one step on."""
    trajectories = numbered(steps, images)
    paper, released = (calibration_states(trajectories, 20, seed, labels) for labels in ("paper", "released"))
    np.testing.assert_array_equal(released.t, paper.t)  # the same draws
    np.testing.assert_array_equal(released.image, paper.image)
    from_image = steps - 1 - released.step
    state = np.minimum(from_image + 1, steps - 1)
    np.testing.assert_array_equal(released.x[:, 0, 0, 0], 100 * state + released.image)


def test_nearest_draws_are_those_of_the_seed():
    first, again, other = (calibration_states(numbered(9, 9), 30, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.x, again.x)
    assert not np.array_equal(first.x, other.x)


def test_ranges_are_those_of_the_search_on_the_drawn_states(calibration):
    """Weights: the symmetric search; inputs: the asymmetric one of what these states give; softmax: pinned at 0."""
    session = tiny_session(calibration, weight_bits=4, input_bits=6, states=5)
    made = METHODS["ptq4dm"](session)
    model = calibration.model
    seen = observe(wrap(model.network)[0], calibration_states(calibration.trajectories, 5, 0), 0)
    for name in ("conv_in", "mid.block_1.conv1", "temb.dense.1"):
        weight = dict(model.network.named_parameters())[f"{name}.weight"].data
        want = ptq4dm.search(weight, QSpec(4, signed=True, axis=0), symmetric=True)
        np.testing.assert_array_equal(made.layers[name].weight_qparams.scale, want.scale)
        np.testing.assert_array_equal(made.layers[name].weight_qparams.zero_point, want.zero_point)
        want = ptq4dm.search(seen[f"{name}.input"].sample, QSpec(6), symmetric=False)
        assert made.layers[name].input.qparams.scale == want.scale
    probs = made.quantizers()["mid.attn_1.product.probs"].qparams
    assert probs.zero_point == 0 and probs.spec == QSpec(8, symmetric=True)


def test_labels_change_the_ranges(calibration):
    """With more than one noise level, what the network sees differs."""
    scales = [
        METHODS["ptq4dm"](tiny_session(calibration, weight_bits=32), labels=labels).layers["temb.dense.1"].input.qparams
        for labels in ("paper", "released")
    ]
    assert scales[0].scale == scales[1].scale  # t alone: the labels are the same draws
    inputs = [
        METHODS["ptq4dm"](tiny_session(calibration, weight_bits=32), labels=labels).layers["conv_in"].input.qparams
        for labels in ("paper", "released")
    ]
    assert inputs[0].scale != inputs[1].scale


def test_unknown_labels(calibration):
    with pytest.raises(UnknownNameError, match="paper, released"):
        METHODS["ptq4dm"](tiny_session(calibration), labels="mine")
