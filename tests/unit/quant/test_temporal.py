"""Temporal features: functions of t alone, over all T of them; their errors; and those of quantized models."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import tiny_dit, tiny_model, tiny_session

from refquant.autograd import Tensor, no_grad
from refquant.errors import ShapeError
from refquant.nn.module import Module
from refquant.nn.unet import ResBlock, TimeMLP
from refquant.quant.affine import QSpec
from refquant.quant.calibrate import CalibrationConfig
from refquant.quant.methods import METHODS
from refquant.quant.observers import minmax
from refquant.quant.temporal import TemporalBlock, every_condition, feature_errors, features, quantized_features
from refquant.quant.wrap import rebuild, wrap

T = 20
ALL = np.arange(T)


class Watch(Module):
    """A projection that keeps what it gives."""

    def __init__(self, module, kept, name):
        self.module, self.kept, self.name = module, kept, name

    def __call__(self, x):
        y = self.module(x)
        self.kept[self.name] = y.data
        return y


def inside(network, seed):
    """What every projection gives in a pass of the whole network, with another random image for each of the T."""
    kept = {}
    own = rebuild(network, lambda name, m: Watch(m, kept, name) if name.endswith("temb_proj") else None)
    x = np.random.default_rng(seed).standard_normal((T, 8, 8, 1), dtype=np.float32)
    with no_grad():
        own(Tensor(x), ALL)
    return kept


@pytest.mark.parametrize("seed", [0, 1])
def test_features_are_what_the_network_computes_for_any_image(model, seed):
    """All T time-steps, all projections, bit for bit; `features` sees no image."""
    kept, got = inside(model.network, seed), features(model.network, ALL)
    assert set(got) == set(kept) and len(got) == 8
    for name, rows in got.items():
        np.testing.assert_array_equal(rows, kept[name])
        assert len(np.unique(rows, axis=0)) == T  # and they differ from t to t


def test_features_of_a_wrapped_network_are_those_of_the_float_one(model):
    wrapped, _ = wrap(model.network)
    got, want = features(wrapped, ALL), features(model.network, ALL)
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_block_in_order_of_registration(model):
    """Calling gives one tensor for each projection; `joined` is those side by side, in that order."""
    block = TemporalBlock(model.network)
    blocks = [name for name, m in model.network.named_modules() if isinstance(m, ResBlock)]
    assert list(block.projections) == [f"{name}.temb_proj" for name in blocks]
    with no_grad():
        parts, joined = block(ALL), block.joined(ALL).data
    start = 0
    for part, projection in zip(parts, block.projections.values(), strict=True):
        width = projection.weight.shape[0]
        np.testing.assert_array_equal(joined[:, start : start + width], part.data)
        start += width
    assert joined.shape == (T, start)


def test_a_network_without_projections_is_refused():
    class Bare(Module):
        def __init__(self):
            self.temb = TimeMLP(np.random.default_rng(0), 8)

    with pytest.raises(ShapeError, match="no temporal features"):
        TemporalBlock(Bare())


# ------------------------------------------------------------------ errors


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_feature_errors_are_the_loops(seed, steps, widths):
    """squared[t] = sum_i |a_i(t) - b_i(t)|^2, cosine[i, t] of a_i(t) and b_i(t)."""
    rng = np.random.default_rng(seed)
    got, want = (
        {str(i): rng.standard_normal((steps, c), dtype=np.float32) for i, c in enumerate(widths)} for _ in "ab"
    )
    errors = feature_errors(np.arange(steps), got, want)
    assert errors.squared.shape == (steps,) and errors.cosine.shape == (len(widths), steps)
    for t in range(steps):
        squared = 0.0
        for i in range(len(widths)):
            dot = aa = bb = 0.0
            for a, b in zip(got[str(i)][t].tolist(), want[str(i)][t].tolist(), strict=True):
                squared, dot, aa, bb = squared + (a - b) ** 2, dot + a * b, aa + a * a, bb + b * b
            np.testing.assert_allclose(errors.cosine[i, t], dot / np.sqrt(aa * bb), atol=1e-12)
        np.testing.assert_allclose(errors.squared[t], squared, rtol=1e-12)


def test_no_error_and_no_direction():
    """Equal features: 0 and 1. A feature of zeros has no direction: cosine 0, not NaN."""
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    errors = feature_errors(np.arange(3), {"p": x}, {"p": x})
    np.testing.assert_array_equal(errors.squared, 0)
    np.testing.assert_allclose(errors.cosine, 1)
    np.testing.assert_array_equal(feature_errors(np.arange(3), {"p": 0 * x}, {"p": x}).cosine, 0)


# ------------------------------------------------------------------ quantized models


@pytest.fixture(scope="module")
def quantized(calibration):
    return METHODS["tfmq"](tiny_session(calibration, weight_bits=4, input_bits=4), tiar_iterations=2)


def test_at_visited_steps_their_tables_are_used(quantized):
    """The sampler visits 15, 10, 5, 0; row k of every table is in force at the k-th of them."""
    visited = quantized.timesteps()
    assert visited.tolist() == [15, 10, 5, 0]
    got = quantized_features(quantized, ALL)
    for step, t in enumerate(visited):
        for q in quantized.quantizers().values():
            q.qparams = q.table[step]
        for name, rows in features(quantized.network, visited[step : step + 1]).items():
            np.testing.assert_array_equal(got[name][t], rows[0])


def test_at_other_time_steps_the_range_is_that_of_the_time_step(quantized):
    """What a sampler that visits all T has at t: min-max of each input of a temporal layer, by brute force."""
    got, network = quantized_features(quantized, ALL), quantized.network
    seen, other = {}, [t for t in range(T) if t not in quantized.timesteps()]
    quantizers = {n: q for n, q in quantized.quantizers().items() if "temb" in n}
    for q in quantizers.values():
        q.qparams, q.watcher = None, lambda name, value: seen.setdefault(name, value.copy())
    features(network, ALL)
    for t in other:
        for name, q in quantizers.items():
            q.qparams, q.watcher = minmax(seen[name][t], QSpec(4)), None
        for name, rows in features(network, np.array([t])).items():
            np.testing.assert_array_equal(got[name][t], rows[0])


def test_cached_features_are_given_as_they_are(calibration):
    """At a visited t the cache's row; elsewhere the nearest step's, also when asked again."""
    cached = METHODS["tfmq"](tiny_session(calibration), tiar_iterations=2, features="cached")
    for _ in range(2):
        got = quantized_features(cached, ALL)
        for name, cache in cached.features.items():
            for t in range(T):
                step = min(range(4), key=lambda k: (abs(15 - 5 * k - t), k))
                np.testing.assert_array_equal(got[name][t], cache.row(step))


def test_tables_of_other_steps_give_other_features(quantized):
    """What the test above could not see if all rows were alike."""
    right = quantized_features(quantized, ALL)
    quantized.at_step(3)
    wrong = features(quantized.network, ALL)
    assert any(not np.allclose(right[name], wrong[name], rtol=1e-3) for name in right)


def test_without_tables_they_are_the_features_of_the_quantized_layers(calibration):
    quantized = METHODS["nearest"](tiny_session(calibration, weight_bits=3))
    got, want = quantized_features(quantized, ALL), features(quantized.network, ALL)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)


def test_a_schedule_of_one_time_step():
    """T = 1: one feature, one table row."""
    quantized = METHODS["tfmq"](
        tiny_session(tiny_model(timesteps=1), CalibrationConfig(images=3, steps=1), states=2),
        tiar_iterations=2,
        features="cached",
    )
    got = quantized_features(quantized, np.arange(1))
    assert all(rows.shape[0] == 1 and np.isfinite(rows).all() for rows in got.values())


# ------------------------------------------------------------------ conditional transformers


@pytest.fixture(scope="module")
def conditional():
    """A transformer of 3 classes with 4-bit tables, at t = 15, 10, 5 and 0."""
    return METHODS["tfmq"](tiny_session(tiny_dit(), weight_bits=4, input_bits=4), tiar_iterations=2)


def test_classes_have_features_of_their_own(conditional):
    """Row by row what the network gives for this t and this class, whatever the order they are asked in."""
    t, y = every_condition(ALL, 3)
    assert len(t) == len(y) == T * 4
    got = quantized_features(conditional, t, y)
    order = np.random.default_rng(0).permutation(len(t))
    mixed = quantized_features(conditional, t[order], y[order])
    for step, now in enumerate(conditional.timesteps()):
        conditional.at_step(step)
        for k in range(4):
            want = features(conditional.network, np.array([now]), np.array([k]))
            for name, rows in want.items():
                np.testing.assert_allclose(got[name][4 * now + k], rows[0], rtol=1e-5, atol=1e-6)
    for name, rows in got.items():
        np.testing.assert_allclose(mixed[name], rows[order], rtol=1e-5, atol=1e-6)
        assert len(np.unique(rows[:4].round(4), axis=0)) == 4  # at t = 0 no two classes are told the same
        np.testing.assert_allclose(quantized_features(conditional, ALL)[name], rows[3::4], rtol=1e-5, atol=1e-6)


def test_at_other_time_steps_the_range_is_that_of_all_classes(conditional):
    """Asked for one class, the range is still that of every class at this t: a table has one row for all."""
    t, quantizers = 7, {n: q for n, q in conditional.quantizers().items() if "adaLN" in n or "t_embedder" in n}
    seen = {}
    for q in quantizers.values():
        q.qparams, q.watcher = None, lambda name, value: seen.setdefault(name, value.copy())
    features(conditional.network, *every_condition(np.array([t]), 3))
    for name, q in quantizers.items():
        q.qparams, q.watcher = minmax(seen[name], QSpec(4)), None
    want = features(conditional.network, np.array([t]), np.array([1]))
    for name, rows in quantized_features(conditional, np.array([t]), np.array([1])).items():
        np.testing.assert_allclose(rows, want[name], rtol=1e-5, atol=1e-6)
