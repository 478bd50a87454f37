"""The weights of the guided search: random signs estimate the Gauss-Newton diagonal, and Fisher is the loss's slope."""

from dataclasses import replace

import numpy as np
import pytest
from toys import CALIBRATION, TINY_DIT, tiny_dit, tiny_model

from refquant.autograd import Tensor, gradients, ops
from refquant.errors import UnknownNameError
from refquant.quant import curvature
from refquant.quant.calibrate import Calibration
from refquant.quant.curvature import Sample, evened, samples
from refquant.quant.importance import finish, wanted_answer
from refquant.quant.record import ask, pick, unit_inputs, unit_output

LAYER = "blocks.0.attn.proj"


@pytest.fixture(scope="module")
def dit():
    return tiny_dit()


@pytest.fixture(scope="module")
def trajectories(dit):
    return Calibration(dit, replace(CALIBRATION, images=4)).trajectories


def exact_diagonal(model, state):
    """Sum over all outputs f of (df/dz)², by a backward pass for each."""
    network, kept = model.network, {}

    def keep(name, module):
        if name == LAYER:
            kept[name] = curvature._Kept(module)
        return kept.get(name)

    network = curvature.rebuild(network, keep)
    size = int(np.prod(model.image_shape))
    total = 0.0
    for i in range(size):
        answer = ask(network, state)
        unit = np.zeros(answer.shape, np.float32)
        unit.reshape(-1)[i] = 1
        (g,) = gradients(ops.sum_all(ops.mul(answer, Tensor(unit))), [kept[LAYER].output])
        total = total + np.square(g)
    return total


def estimated(model, trajectories, state, draws=150):
    return np.mean([np.square(samples(model, [LAYER], trajectories, state, seed=s)[LAYER].g) for s in range(draws)], 0)


def far(a, b):
    return float(np.abs(a - b).sum() / b.sum())


def test_random_signs_estimate_the_gauss_newton_diagonal(dit, trajectories, monkeypatch):
    """E g² = diag(J'J): 150 draws come within 12 % on average; a vector of ones, the same each time, does not."""
    state = trajectories.at([2])[:1]
    want = exact_diagonal(dit, state).reshape(-1, TINY_DIT.width)
    got = estimated(dit, trajectories, state).reshape(-1, TINY_DIT.width)
    assert far(got, want) < 0.12
    monkeypatch.setattr(curvature, "_loss", lambda model, answer, *rest: ops.sum_all(answer))
    ones = estimated(dit, trajectories, state, draws=1).reshape(-1, TINY_DIT.width)
    assert far(ones, want) > 0.5


def test_fisher_is_the_gradient_of_the_denoising_loss(dit, trajectories):
    """Summed over a layer's tokens, g is the loss's gradient with respect to the layer's bias."""
    states = pick(trajectories, 3, 0)
    found = samples(dit, [LAYER], trajectories, states, "fisher")[LAYER]
    wanted = wanted_answer(dit, states, finish(dit, trajectories)).transpose(0, 2, 3, 1)
    error = ops.sub(ask(dit.network, states), Tensor(np.ascontiguousarray(wanted)))
    (slope,) = gradients(ops.sum_all(ops.square(error)), [dict(dit.network.named_parameters())[f"{LAYER}.bias"]])
    got = found.g.reshape(-1, TINY_DIT.width).sum(axis=0)
    np.testing.assert_allclose(got, slope, rtol=1e-3, atol=1e-4)


def test_without_a_guide_all_errors_count_alike(dit, trajectories):
    assert (samples(dit, [LAYER], trajectories, trajectories.at([0]), "none")[LAYER].g == 1).all()


def test_inputs_are_those_of_the_layers(dit, trajectories):
    """Tokens as rows, in the order of the states, each with its step; an attention product whole, with every head."""
    states, product = pick(trajectories, 5, 0), "blocks.1.attn.product"
    found = samples(dit, [LAYER, product, "t_embedder.mlp.2"], trajectories, states)
    x = unit_inputs(dit.network, LAYER, states)[0]
    np.testing.assert_allclose(found[LAYER].inputs[0].reshape(x.shape), x, rtol=1e-4, atol=1e-5)
    heads, tokens = TINY_DIT.heads, TINY_DIT.tokens
    assert [a.shape for a in found[product].inputs] == [(5 * heads, tokens, TINY_DIT.width // heads)] * 3
    np.testing.assert_array_equal(found[product].step, np.repeat(states.step, heads))
    assert found["t_embedder.mlp.2"].inputs[0].shape == (5, TINY_DIT.width)
    np.testing.assert_array_equal(found["t_embedder.mlp.2"].step, states.step)


def test_some_tokens_of_each_state(dit, trajectories):
    """Rows of x and g belong together, no token twice, and as many of each state."""
    states = pick(trajectories, 9, 0)  # more than one chunk
    few = samples(dit, [LAYER], trajectories, states, "none", tokens=3)[LAYER]
    assert few.inputs[0].shape == (27, TINY_DIT.width) and few.g.shape == (27, TINY_DIT.width)
    np.testing.assert_array_equal(few.step, np.repeat(states.step, 3))
    x = unit_inputs(dit.network, LAYER, states)[0]
    for state in range(9):
        rows = few.inputs[0][3 * state : 3 * state + 3]
        near = [int(np.abs(x[state] - row).max(axis=1).argmin()) for row in rows]
        assert len(set(near)) == 3
        np.testing.assert_allclose(rows, x[state][near], rtol=1e-4, atol=1e-5)
    output = unit_output(dit.network, LAYER, states)
    assert output.shape[:2] == x.shape[:2]


def test_variances_do_not_count(trajectories):
    """A network that learns sigma: only the noise half of its answer is asked about."""
    model = tiny_dit(replace(TINY_DIT, learn_sigma=True))
    states = trajectories.at([1])
    before = samples(model, [LAYER], trajectories, states)[LAYER].g
    last = model.network.final_layer.linear
    kept = last.weight.data.reshape(4, 4, 2, -1)
    kept[:, :, 1] = 100  # the variances' rows
    np.testing.assert_array_equal(samples(model, [LAYER], trajectories, states)[LAYER].g, before)


def test_it_does_not_need_a_transformer():
    model = tiny_model()
    recorded = Calibration(model, CALIBRATION).trajectories
    found = samples(model, ["mid.attn_1.product", "temb.dense.0"], recorded, recorded.at([0]))
    assert found["temb.dense.0"].g.shape[0] == 3


def test_every_step_counts_alike():
    """g / rms of the step, by hand; equal weights stay equal, and a step without any slope stays without."""
    g = np.float32([[3, 1], [1, 3], [0.1, 0], [0, 0], [0, 0]])
    sample = Sample((np.zeros((5, 4), np.float32),), g, np.array([7, 7, 2, 4, 4]))
    got = evened(sample)
    want = [[9 / 5, 1 / 5], [1 / 5, 9 / 5], [2, 0], [0, 0], [0, 0]]
    np.testing.assert_allclose(np.square(got.g), want, rtol=1e-6)
    assert got.inputs is sample.inputs and sample.g[0, 0] == 3
    np.testing.assert_array_equal(evened(replace(sample, g=np.full((5, 2), 7, np.float32))).g, 1)


def test_unknown_guides(dit, trajectories):
    with pytest.raises(UnknownNameError, match="Known: gauss-newton, fisher, none"):
        samples(dit, [LAYER], trajectories, trajectories.at([0]), "kl")
