"""TFMQ-DM: temporal layers learn together and are then left alone, steps have ranges, features can be looked up."""

import numpy as np
import pytest
from toys import tiny_session

import refquant.quant.blocks as blocks
import refquant.quant.methods.tfmq as method
from refquant.errors import RangeError, UnknownNameError
from refquant.quant.methods import METHODS
from refquant.quant.methods.tfmq import seen_time_steps, tiar
from refquant.quant.observers import StepTable
from refquant.quant.temporal import feature_errors, features, quantized_features
from refquant.quant.units import temporal_layers

ALL = np.arange(20)


def quantized(calibration, *, bits=(4, 8), effort=None, coverage="full", **options):
    session = tiny_session(calibration, weight_bits=bits[0], input_bits=bits[1], effort=effort or {}, coverage=coverage)
    return METHODS["tfmq"](session, **{"tiar_iterations": 2, **options})


def learned_layers(calibration, monkeypatch, name, **options):
    """Which layers each call of `reconstruct` for blocks is given, by method."""
    given, original = [], blocks.reconstruct

    def spy(forward, layers, *rest, **more):
        given.append([layer.name for layer in layers])
        return original(forward, layers, *rest, **more)

    monkeypatch.setattr(blocks, "reconstruct", spy)
    METHODS[name](tiny_session(calibration, weight_bits=4, effort={"iterations": 1}), **options)
    return given


# ------------------------------------------------------------------ TIAR


def test_blocks_leave_temporal_layers_alone(calibration, monkeypatch):
    """Codes after TIAR = codes of the result, with every other layer learned in exactly one block."""
    after, original = {}, method.reconstruct_units

    def spy(run, units, states):
        after.update({name: run.layers[name].codes.copy() for name in temporal_layers(run.model.network)})
        original(run, units, states)
        return None

    monkeypatch.setattr(method, "reconstruct_units", spy)
    made = quantized(calibration, effort={"iterations": 8})
    for name, codes in after.items():
        np.testing.assert_array_equal(made.layers[name].codes, codes)
    given = learned_layers(calibration, monkeypatch, "tfmq", tiar_iterations=1)
    learned = [name for layers in given for name in layers]
    assert sorted(learned) == sorted(set(made.layers) - set(after))


@pytest.mark.parametrize("name", ["brecq", "qdiffusion", "importance"])
def test_other_methods_learn_projections_inside_their_blocks(calibration, monkeypatch, name):
    """What TFMQ-DM objects to: temb_proj belongs to its ResBlock, the time MLP to units of one layer."""
    given = learned_layers(calibration, monkeypatch, name)
    block = next(layers for layers in given if "mid.block_1.conv1" in layers)
    assert "mid.block_1.temb_proj" in block and ["temb.dense.0"] in given


def test_tiar_lowers_the_temporal_error(calibration):
    """3-bit weights, 600 iterations: the sum over all t of the squared errors falls to less than half of nearest's."""
    run = tiny_session(calibration, weight_bits=3, effort={"rate": 0.02}).start("any")
    run.nearest_weights()
    want = features(run.model.network, ALL)
    before = feature_errors(ALL, features(run.network, ALL), want).squared.sum()
    tiar(run, temporal_layers(run.model.network), ALL, 600)
    after = feature_errors(ALL, features(run.network, ALL), want)
    assert after.squared.sum() < 0.5 * before
    assert after.cosine.min() > 0


def test_all_temporal_layers_learn_together(calibration, monkeypatch):
    """One call of `reconstruct`, with the time MLP and all projections, on the joined features."""
    given, original = [], method.reconstruct

    def spy(forward, layers, weights, inputs, target, *rest, **more):
        given.append(([layer.name for layer in layers], inputs[0], target))
        return original(forward, layers, weights, inputs, target, *rest, **more)

    monkeypatch.setattr(method, "reconstruct", spy)
    quantized(calibration)
    ((names, t, target),) = given
    assert names == temporal_layers(calibration.model.network)
    np.testing.assert_array_equal(t, ALL)
    np.testing.assert_array_equal(target, np.concatenate(list(features(calibration.model.network, t).values()), axis=1))


@pytest.mark.parametrize(("count", "want"), [(0, list(range(20))), (1, [15]), (2, [15, 0]), (3, [15, 5, 0])])
def test_time_steps_that_tiar_sees(calibration, monkeypatch, count, want):
    """0: all T. Otherwise so many of the sampler's 15, 10, 5, 0, evenly spread."""
    given, original = [], method.reconstruct
    monkeypatch.setattr(method, "reconstruct", lambda *a, **k: (given.append(a[3][0].tolist()), original(*a, **k))[1])
    quantized(calibration, time_steps=count)
    (seen,) = given
    assert len(seen) == len(set(seen)) == (count or 20)
    if count == 3:
        assert seen[0] == 15 and seen[-1] == 0 and seen[1] in (10, 5)
    else:
        assert seen == want


@pytest.mark.parametrize("count", [-1, 5])
def test_more_time_steps_than_the_sampler_has(calibration, count):
    with pytest.raises(RangeError, match=f"time_steps is {count}; it must be 0 .all. to 4"):
        seen_time_steps(tiny_session(calibration).start("any"), count)


# ------------------------------------------------------------------ FSC


@pytest.mark.parametrize("scope", ["all", "temporal", "none"])
def test_which_activations_have_a_row_for_each_step(calibration, scope):
    """All, those of layers that see t alone, or none; the others have the range that `nearest` gives them."""
    made, nearest = quantized(calibration, fsc=scope), METHODS["nearest"](tiny_session(calibration, weight_bits=4))
    temporal = {f"{name}.input" for name in temporal_layers(calibration.model.network)}
    for name, q in made.quantizers().items():
        stepped = scope == "all" or (scope == "temporal" and name in temporal)
        assert isinstance(q.table, StepTable) == stepped
        if not stepped:
            want = nearest.quantizers()[name].qparams
            assert q.qparams.scale == want.scale and q.qparams.zero_point == want.zero_point


def test_released_coverage_has_no_table_where_activations_are_float(calibration):
    made = quantized(calibration, coverage="released")
    for name in ("temb.dense.0", "temb.dense.1", "conv_in", "down.0.block.0.conv1"):
        assert made.layers[name].input.qparams is None
    assert made.layers["temb.dense.0"].codes is None and made.layers["temb.dense.1"].codes is not None


def test_temporal_tables_make_better_features_than_one_range(calibration):
    """4-bit activations, float weights: what is left is the rounding of inputs, finer with a range for each step."""
    want = features(calibration.model.network, ALL)
    error = {
        scope: feature_errors(ALL, quantized_features(quantized(calibration, bits=(32, 4), fsc=scope), ALL), want)
        for scope in ("temporal", "none")
    }
    assert error["temporal"].squared.sum() < 0.8 * error["none"].squared.sum()


# ------------------------------------------------------------------ options


def test_orders_differ_in_result_and_cover_the_same(calibration):
    """Registration order reconstructs the up path in reverse: other codes, the same layers."""
    execution, registration = (
        quantized(calibration, bits=(3, 8), effort={"iterations": 8}, order=order)
        for order in ("execution", "registration")
    )
    assert execution.layers.keys() == registration.layers.keys()
    assert any(not np.array_equal(la.codes, registration.layers[n].codes) for n, la in execution.layers.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"fsc": "half"}, "all, temporal|temporal, all"), ({"features": "stored"}, "computed, cached, selected"),
     ({"ranges": "mse"}, "exact, running"), ({"order": "reversed"}, "execution, registration")],
)  # fmt: skip
def test_unknown_names(calibration, options, words):
    with pytest.raises(UnknownNameError, match=words):
        quantized(calibration, **options)


def test_the_recipe_names_the_temporal_layers(calibration):
    made = quantized(calibration)
    assert made.recipe["temporal_layers"] == temporal_layers(calibration.model.network)
    assert set(made.seconds) >= {"weights", "tiar", "blocks", "fsc"}
