"""Trajectories, states picked out of them, and what a unit is given and gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits
from toys import CALIBRATION

from refquant.autograd import Tensor, no_grad
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.sampling import NoiseSource
from refquant.errors import RangeError, UnknownNameError
from refquant.nn.layers import Conv2d, Linear
from refquant.nn.module import Module
from refquant.quant.record import CHUNK, Trajectories, Walk, pick, unit_inputs, unit_output
from refquant.quant.wrap import rebuild
from refquant.threads import using_threads


def numbered(steps, images):
    """Trajectories whose pixel says where it comes from: 100 step + image."""
    x = (100 * np.arange(steps)[:, None] + np.arange(images)).astype(np.float32)
    return Trajectories(x[:, :, None, None, None], 7 * np.arange(steps)[::-1])


def known(states, trajectories):
    """Each state's pixel, time-step, step and image belong together."""
    np.testing.assert_array_equal(states.x[:, 0, 0, 0], 100 * states.step + states.image)
    np.testing.assert_array_equal(states.t, trajectories.t[states.step])


def nhwc(states):
    return Tensor(np.ascontiguousarray(states.x.transpose(0, 2, 3, 1)))


# ------------------------------------------------------------------ recording


def test_what_the_float_network_was_called_with(model, calibration):
    """x[k], t[k] are the arguments of call k of the DDIM sampler, whose end the last of them leads to."""
    calls = []

    def eps(x, t, step):
        calls.append((x, t))
        return model.denoiser()(x, t, step)

    noise = NoiseSource(CALIBRATION.seed, CALIBRATION.images, model.image_shape)
    ddim_sample(eps, noise.draw(), model.schedule, noise, steps=CALIBRATION.steps)
    recorded = calibration.trajectories
    assert recorded.steps == len(calls) == CALIBRATION.steps
    for k, (x, t) in enumerate(calls):
        np.testing.assert_array_equal(recorded.x[k], x)
        assert recorded.t[k] == t


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_at_gives_all_images_of_each_step_in_order(steps, images, data):
    """at([a, b]) = all images of a, then all of b, also where a step comes twice or not at all."""
    trajectories = numbered(steps, images)
    asked = data.draw(st.lists(st.integers(0, steps - 1), min_size=1, max_size=4))
    states = trajectories.at(iter(asked))
    known(states, trajectories)
    assert states.step.tolist() == [k for k in asked for _ in range(images)]
    assert states.image.tolist() == list(range(images)) * len(asked)
    part = states[1:]
    assert len(part) == len(states) - 1
    known(part, trajectories)


# ------------------------------------------------------------------ pick


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 100), st.data())
def test_picked_states_are_different_ones(steps, images, seed, data):
    """`count` states, none twice, every part of a state from the same place, only of steps with a weight."""
    share = st.sampled_from([0.0, 1e-9, 1.0, 1e9]) | st.floats(0, 10)
    weights = data.draw(st.lists(share, min_size=steps, max_size=steps).filter(any))
    trajectories, most = numbered(steps, images), images * sum(w > 0 for w in weights)
    count = data.draw(st.integers(1, most))
    states = pick(trajectories, count, seed, weights)
    known(states, trajectories)
    assert len(states) == count == len(set(zip(states.step.tolist(), states.image.tolist(), strict=True)))
    assert all(weights[k] > 0 for k in states.step)


@given(st.integers(1, 8), st.integers(1, 5), st.data())
def test_steps_are_alike_by_default(steps, images, data):
    """Numbers of states of any two steps differ by one at most."""
    count = data.draw(st.integers(1, steps * images))
    numbers = np.bincount(pick(numbered(steps, images), count, 0).step, minlength=steps)
    assert numbers.max() - numbers.min() <= 1


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=6), st.integers(1, 40))
def test_numbers_follow_the_weights(weights, count):
    """Where no step runs out: within one state of count w_k / sum w."""
    states = pick(numbered(len(weights), 40), count, 0, weights)
    numbers = np.bincount(states.step, minlength=len(weights))
    assert np.abs(numbers - count * np.array(weights) / sum(weights)).max() <= 1


def test_an_exhausted_step_gives_its_share_to_the_others():
    """Weights 8:1:1 on 4 images a step: 10 states are 4, 3 and 3; all 12 are taken where 12 are asked."""
    assert np.bincount(pick(numbered(3, 4), 10, 0, [8, 1, 1]).step).tolist() == [4, 3, 3]
    assert np.bincount(pick(numbered(3, 4), 12, 0, [1e6, 1, 1e-6]).step).tolist() == [4, 4, 4]


def test_images_of_a_step_depend_on_the_seed_alone():
    first, again, other = (pick(numbered(3, 20), 9, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("count", [0, -1, 13])
def test_impossible_counts(count):
    with pytest.raises(RangeError, match="of 12 with a positive weight. Record more images"):
        pick(numbered(3, 4), count, 0)
    with pytest.raises(RangeError, match="of 4 with a positive weight"):
        pick(numbered(3, 4), 5, 0, [0, 1, 0])


@pytest.mark.parametrize("weights", [[1, 1], [0, 0, 0], [1, -1, 1], [1, np.nan, 1], [1, np.inf, 1], [1e308] * 3])
def test_impossible_weights(weights):
    with pytest.raises(RangeError, match="weights must be 3 numbers from 0"):
        pick(numbered(3, 4), 2, 0, weights)


# ------------------------------------------------------------------ inside the network


@pytest.fixture(scope="module")
def states(calibration):
    """More states than one thread takes at a time, so that chunks must be put together in order."""
    trajectories = calibration.trajectories
    return trajectories.at([*range(trajectories.steps)] * 2)


def test_inputs_and_output_of_a_unit_are_those_of_the_forward_pass(model, states):
    """temb and conv_in by hand, the first ResBlock on them, and the whole network as a unit of its own."""
    network = model.network
    assert len(states) > CHUNK
    with no_grad():
        temb = network.temb(states.t)
        u = np.asarray(temb.data)
        h = network.conv_in(nhwc(states))
        x, shared = unit_inputs(network, "down.0.block.0", states)
        out = network.down[0].block[0](Tensor(x), Tensor(shared))
        whole = network(nhwc(states), states.t)
    # chunks of 16 and all at once: BLAS may sum in another order
    np.testing.assert_allclose(x, h.data, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shared, u / (1 + np.exp(-u)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(unit_output(network, "down.0.block.0", states), out.data, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(unit_output(network, "conv_out", states), whole.data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", ["conv_in", "mid.attn_1", "up.1.block.0", "up.1.block.0.nin_shortcut", "temb.dense.1"])
def test_a_unit_maps_its_inputs_to_its_output(model, states, unit):
    """output = unit(inputs), bit for bit, for the states of one chunk."""
    few = states[:CHUNK]
    module = dict(model.network.named_modules())[unit]
    inputs = [Tensor(a) for a in unit_inputs(model.network, unit, few)]
    with no_grad(), threadpool_limits(1, "blas"):  # as recordings are made: BLAS cuts its sums by threads
        got = module(*inputs)
    np.testing.assert_array_equal(got.data, unit_output(model.network, unit, few))


def test_probing_leaves_the_network_alone_and_does_not_depend_on_threads(model, states):
    before = dict(vars(model.network.mid))
    with using_threads(1):
        alone = unit_output(model.network, "mid.block_1", states)
    with using_threads(2):
        np.testing.assert_array_equal(unit_output(model.network, "mid.block_1", states), alone)
    assert vars(model.network.mid) == before


# ------------------------------------------------------------------ a walk from unit to unit

ALL_LAYERS = "layers"
BLOCKS = ("conv_in", "down.0.block.0", "mid.block_1", "mid.attn_1", "up.1.block.0", "up.0.block.0", "conv_out")


@pytest.fixture
def layers(model):
    """Every layer, in the order of the network's own list, which is not that of execution."""
    return [name for name, module in model.network.named_modules() if isinstance(module, (Conv2d, Linear))]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("units", [BLOCKS, ALL_LAYERS])
def test_a_walk_sees_what_passes_of_their_own_see(model, states, layers, units, order):
    """Inputs and outputs of all units, bit for bit, forwards (by registration) and backwards."""
    units = layers if units == ALL_LAYERS else units
    walk = Walk(model.network, units, states)
    for unit in units[::order]:
        for got, want in zip(walk.inputs(unit), unit_inputs(model.network, unit, states), strict=True):
            np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(walk.output(unit), unit_output(model.network, unit, states))


class Counted(Module):
    """A module that notes its name when it runs on more than the one state that a walk tries things with."""

    def __init__(self, name, module, calls):
        self.name, self.module, self.calls = name, module, calls

    def __call__(self, *given):
        self.calls += [self.name] * (len(given[0].data) > 1)
        return self.module(*given)


def test_a_walk_runs_each_unit_once_and_keeps_what_is_still_taken(model, states):
    """One call a chunk, none for the last; beside the unit just passed only skips that a later block takes are kept."""
    calls, chunks = [], -(-len(states) // CHUNK)
    walk = Walk(rebuild(model.network, lambda n, m: Counted(n, m, calls) if n in BLOCKS else None), BLOCKS, states)
    kept = []
    for name in BLOCKS:
        walk.inputs(name)
        kept.append(set.union(*map(set, walk._kept)))
    assert sorted(calls) == sorted(BLOCKS[:-1] * chunks)
    skips, end = {"conv_in", "down.0.block.0"}, {"conv_in", "up.0.block.0"}
    assert kept == [set(), {"conv_in"}, skips, *(skips | {name} for name in BLOCKS[2:5]), end]


def test_a_walk_says_which_units_there_are(model, states):
    with pytest.raises(UnknownNameError, match=r"no module called 'mid\.block_9' is run.*conv_in"):
        Walk(model.network, ["conv_in", "mid.block_9"], states)
