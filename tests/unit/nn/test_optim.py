"""Adam, clipping, learning rate and averaging against their formulas in float64."""

import numpy as np
import pytest

from refquant.nn.layers import Conv2d, Linear
from refquant.nn.module import Module
from refquant.nn.optim import Adam, clip_norm, flatten, learning_rate, split, update_average


def adam_by_the_book(w, gradients, rate, beta1=0.9, beta2=0.999, eps=1e-8):
    """Kingma & Ba 2015, algorithm 1, line by line in float64."""
    w = w.astype(np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        w = w - rate * m_hat / (np.sqrt(v_hat) + eps)
    return w, m, v


def test_adam_is_the_algorithm():
    """w_t = w_(t-1) - α m̂ / (√v̂ + ε), 50 steps; float32 keeps 1e-5 of the distance travelled."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal(40).astype(np.float32)
    gradients = (rng.standard_normal((50, 40)) * 10.0 ** rng.integers(-6, 3, 40)).astype(np.float32)
    w, adam = start.copy(), Adam.zeros(40)
    for step, g in enumerate(gradients):
        adam.update(w, g.copy(), 0.01, step)
    want, m, v = adam_by_the_book(start, gradients.astype(np.float64), 0.01)
    np.testing.assert_allclose(w, want, rtol=0, atol=1e-5 * np.abs(want - start).max())
    np.testing.assert_allclose(adam.m, m, rtol=1e-4, atol=1e-6 * np.abs(m).max())
    np.testing.assert_allclose(adam.v, v, rtol=1e-4)
    assert w.dtype == adam.m.dtype == adam.v.dtype == np.float32


def test_first_step_of_adam_is_the_rate():
    """m̂ = g and √v̂ = |g|, so w moves by α sign(g), whatever the size of g >> ε."""
    g = np.array([1e-3, -1e3, 5], np.float32)
    w = np.zeros(3, np.float32)
    Adam.zeros(3).update(w, g.copy(), 0.1, 0)
    np.testing.assert_allclose(w, -0.1 * np.sign(g), rtol=2e-5)


def test_adam_leaves_a_weight_without_gradient():
    """g = 0 always: m = v = 0 and the step is 0 / ε = 0."""
    w = np.ones(2, np.float32)
    adam = Adam.zeros(2)
    for step in range(3):
        adam.update(w, np.zeros(2, np.float32), 0.1, step)
    np.testing.assert_array_equal(w, 1)


def test_clip_norm():
    """g <- g min(1, limit / |g|); |g| before is returned."""
    g = np.array([3, 4], np.float32)
    assert clip_norm(g, 10) == 5
    np.testing.assert_array_equal(g, [3, 4])
    assert clip_norm(g, 1) == 5
    np.testing.assert_allclose(g, [0.6, 0.8], rtol=1e-6)
    zero = np.zeros(3, np.float32)
    assert clip_norm(zero, 1) == 0 and not zero.any()
    assert np.isnan(clip_norm(np.array([np.nan], np.float32), 1))  # reported, not hidden


def test_learning_rate_has_three_parts():
    """k/warmup up to the peak, flat, then (steps - k)/decay down to 0."""
    rate = np.array([learning_rate(k, 100, 0.5, 10, 20) for k in range(101)])
    np.testing.assert_allclose(rate[:10], 0.5 * np.arange(1, 11) / 10)
    np.testing.assert_array_equal(rate[9:81], 0.5)
    np.testing.assert_allclose(rate[80:], 0.5 * np.arange(20, -1, -1) / 20)
    assert rate[100] == 0
    assert np.abs(np.diff(rate)).max() <= 0.5 / 10 + 1e-15  # no jumps


def test_learning_rate_without_warmup_or_decay():
    """warmup = decay = 0 is a constant."""
    assert {learning_rate(k, 10, 0.1, 0, 0) for k in range(10)} == {0.1}


def test_a_longer_run_begins_like_a_shorter_one():
    """Before the decay the rate does not know how long the run is."""
    short, long = ([learning_rate(k, steps, 1, 5, 10) for k in range(40)] for steps in (50, 90))
    assert short == long


@pytest.mark.parametrize("warmup, decay", [(8, 8), (20, 20), (10, 3)])
def test_learning_rate_of_a_run_shorter_than_its_parts(warmup, decay):
    """Where the ramps overlap the lower one holds; the rate stays in (0, peak]."""
    rate = [learning_rate(k, 10, 1.0, warmup, decay) for k in range(10)]
    assert all(0 < r <= 1 for r in rate)
    assert rate == [min(1, (k + 1) / warmup, (10 - k) / decay) for k in range(10)]


def test_average_is_the_recursion():
    """a <- d a + (1 - d) w with d = min(decay, (1 + k)/(10 + k))."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((200, 5)).astype(np.float32)
    average = weights[0].copy()
    want = average.astype(np.float64)
    for k, w in enumerate(weights):
        update_average(average, w, 0.9, k)
        d = min(0.9, (1 + k) / (10 + k))
        want = d * want + (1 - d) * w
    np.testing.assert_allclose(average, want, rtol=1e-5, atol=1e-6)
    assert average.dtype == np.float32


def test_average_of_a_constant_is_the_constant():
    """a = w is a fixed point."""
    w = np.full(3, 0.1, np.float32)
    average = w.copy()
    for k in range(1000):
        update_average(average, w, 0.999, k)
    np.testing.assert_allclose(average, w, rtol=1e-5)


class Pair(Module):
    """Two layers of different shapes."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.a, self.b = Conv2d(rng, 2, 3), Linear(rng, 3, 4)


def test_flatten_makes_parameters_views_of_one_vector():
    """The vector holds what the parameters held, in their order; writing to it writes to them."""
    module = Pair()
    before = {name: a.copy() for name, a in module.state_dict().items()}
    flat = flatten(module)
    assert flat.size == module.parameter_count() and flat.dtype == np.float32
    for name, a in module.state_dict().items():
        np.testing.assert_array_equal(a, before[name])
        assert np.shares_memory(a, flat)
    flat *= 2
    for name, a in module.state_dict().items():
        np.testing.assert_array_equal(a, 2 * before[name])


def test_split_moves_the_views():
    """After split(other) the parameters are views of the other vector, the first is left alone."""
    module = Pair()
    flat = flatten(module)
    other = np.arange(flat.size, dtype=np.float32)
    split(other, module)
    np.testing.assert_array_equal(np.concatenate([p.data.ravel() for p in module.parameters()]), other)
    assert not any(np.shares_memory(p.data, flat) for p in module.parameters())
