"""Cached temporal features: within half a step of the float ones, looked up by step, chosen where they are better."""

import numpy as np
import pytest
from toys import tiny_session

import refquant.quant.methods.tfmq as tfmq_module
from refquant.quant.affine import QSpec, dequantize
from refquant.quant.cache import disturbances, feature_cache
from refquant.quant.methods import METHODS
from refquant.quant.observers import minmax
from refquant.quant.quantized import FeatureCache
from refquant.quant.temporal import features, quantized_features

VISITED = np.array([15, 10, 5, 0])


@pytest.mark.parametrize("bits", range(2, 9))
def test_cached_features_are_within_half_a_step(model, bits):
    """|C[k, i] - emb_i(t_k)| <= s_k / 2 for every channel, and an ulp of the value."""
    caches, wanted = feature_cache(model.network, VISITED, bits), features(model.network, VISITED)
    assert list(caches) == list(wanted)
    for name, cache in caches.items():
        assert cache.codes.dtype == np.uint8 and cache.codes.shape == wanted[name].shape
        assert cache.codes.max() <= 2**bits - 1 and cache.table.spec == QSpec(bits)
        for step in range(len(VISITED)):
            error = np.abs(cache.row(step).astype(np.float64) - wanted[name][step])
            assert (error <= cache.table.scale[step] / 2 + 1e-6 * np.abs(wanted[name][step]).max()).all()


def test_each_row_has_its_own_exact_range(model):
    """Row k: min-max of the feature at t_k, and its codes by that."""
    wanted = features(model.network, VISITED)
    for name, cache in feature_cache(model.network, VISITED, 8).items():
        for step, row in enumerate(wanted[name]):
            q = minmax(row, QSpec(8))
            assert cache.table.scale[step] == q.scale and cache.table.zero_point[step] == q.zero_point
            np.testing.assert_array_equal(cache.row(step), dequantize(cache.codes[step], q))


def test_disturbances_are_the_loops(model):
    """Mean over steps of the squared error, of the cache and of the computed feature."""
    wanted = features(model.network, VISITED)
    caches = feature_cache(model.network, VISITED, 3)
    computed = {name: rows + np.float32(0.01) for name, rows in wanted.items()}
    found = disturbances(caches, computed, wanted)
    for name, rows in wanted.items():
        kept = other = 0.0
        for step in range(4):
            for c in range(rows.shape[1]):
                kept += float(caches[name].row(step)[c] - rows[step, c]) ** 2 / 4
                other += float(computed[name][step, c] - rows[step, c]) ** 2 / 4
        np.testing.assert_allclose(found[name], (kept, other), rtol=1e-5)


# ------------------------------------------------------------------ in a model


def tfmq(calibration, features, bits=(4, 8)):
    session = tiny_session(calibration, weight_bits=bits[0], input_bits=bits[1])
    return METHODS["tfmq"](session, tiar_iterations=2, features=features)


def test_cached_models_look_features_up(model, calibration):
    """At step k every projection gives row k, whatever it is told; its own layer is not run."""
    quantized = tfmq(calibration, "cached")
    assert list(quantized.features) == list(features(model.network, VISITED))
    ran = []
    for name, q in quantized.quantizers().items():
        q.watcher = lambda name, value: ran.append(name)
    for step, t in enumerate(VISITED):
        quantized.denoiser()(np.zeros((2, 1, 8, 8), np.float32), int(t), step)
        got = features(quantized.network, np.array([t, 3]))
        for name, cache in quantized.features.items():
            np.testing.assert_array_equal(got[name], np.stack([cache.row(step)] * 2))
    assert ran and not any("temb_proj" in name for name in ran)


def test_cached_features_do_not_see_weight_bits(calibration):
    """The error of quantized weights is gone: 2 and 8 bits have the same cache."""
    two, eight = (tfmq(calibration, "cached", (bits, 8)) for bits in (2, 8))
    for name, cache in two.features.items():
        np.testing.assert_array_equal(cache.codes, eight.features[name].codes)


@pytest.mark.parametrize("bits", [(4, 4), (8, 3), (3, 8)])
def test_selected_takes_the_smaller_disturbance(calibration, bits):
    """A feature is cached just where its cache is strictly closer to the float one; the recipe tells both numbers."""
    selected, computed = tfmq(calibration, "selected", bits), tfmq(calibration, "computed", bits)
    wanted = features(calibration.model.network, VISITED)
    caches = feature_cache(calibration.model.network, VISITED, bits[1])
    want = disturbances(caches, quantized_features(computed, VISITED), wanted)
    assert selected.recipe["disturbances"] == {name: list(pair) for name, pair in want.items()}
    assert set(selected.features) == {name for name, (kept, other) in want.items() if kept < other}


def test_a_feature_that_the_layers_give_as_well_is_not_cached(calibration, monkeypatch):
    """Smaller, larger and equal disturbances in turn: only the strictly smaller ones are cached."""
    names = list(features(calibration.model.network, VISITED))
    told = {name: [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)][i % 3] for i, name in enumerate(names)}
    monkeypatch.setattr(tfmq_module, "disturbances", lambda *_: told)
    assert list(tfmq(calibration, "selected").features) == names[::3]
    assert list(tfmq(calibration, "cached").features) == names


def test_float_features_are_cached_at_8_bits(calibration):
    """W4A32: nothing else is at 8 bits."""
    quantized = tfmq(calibration, "cached", (4, 32))
    assert {cache.table.spec.bits for cache in quantized.features.values()} == {8}
    assert all(isinstance(cache, FeatureCache) for cache in quantized.features.values())
