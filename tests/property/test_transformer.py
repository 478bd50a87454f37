"""Balancing a diffusion transformer changes no answer, and does change what its layers see."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import assert_killed
from toys import CALIBRATION, TINY_DIT, tiny_dit, tiny_model

from refquant.errors import ShapeError, UnknownNameError
from refquant.quant import transformer
from refquant.quant.calibrate import Calibration
from refquant.quant.record import unit_inputs
from refquant.quant.transformer import Source, balanced, input_saliences, require, sources, token_layers

MODEL = tiny_dit()
STATES = Calibration(MODEL, replace(CALIBRATION, images=2)).trajectories.at([0, 2])


@st.composite
def factors(draw):
    """Of any of the layers, up to a factor of e^3 apart."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    chosen = draw(st.lists(st.sampled_from(list(sources(TINY_DIT))), min_size=1, unique=True))
    return {name: np.exp(rng.uniform(-1.5, 1.5, TINY_DIT.width)) for name in chosen}


def balancing_changes_no_answer(b):
    """The float network's answer stays, to 1e-5 of its largest value; each balanced layer's input is times b."""
    model = balanced(MODEL, b)
    before, after = (m.denoiser()(STATES.x, 7, 0, STATES.y) for m in (MODEL, model))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * float(np.abs(before).max()))
    for name, f in b.items():
        seen = [unit_inputs(m.network, name, STATES)[0] for m in (MODEL, model)]
        np.testing.assert_allclose(seen[1], seen[0] * f, rtol=1e-3, atol=1e-4 * float(np.abs(seen[0] * f).max()))


@settings(max_examples=10)
@given(factors())
def test_balancing_changes_no_answer(b):
    balancing_changes_no_answer(b)


def test_the_model_itself_is_not_changed():
    kept = {name: a.copy() for name, a in MODEL.network.state_dict().items()}
    balanced(MODEL, {name: np.full(TINY_DIT.width, 3.0) for name in sources(TINY_DIT)})
    for name, array in MODEL.network.state_dict().items():
        np.testing.assert_array_equal(array, kept[name])


def _gates_for_scales(cfg):
    d = cfg.width
    return {
        n: Source(s.layer, s.rows, slice(2 * d, 3 * d)) if s.scale and "blocks" in n else s
        for n, s in RIGHT(cfg).items()
    }


def _keys_for_values(cfg):
    d = cfg.width
    return {n: Source(s.layer, slice(d, 2 * d)) if n.endswith("proj") else s for n, s in RIGHT(cfg).items()}


def _the_other_branch(cfg):
    found = RIGHT(cfg)
    return {n: found[n.replace("mlp.fc1", "attn.qkv")] for n in found}


RIGHT = sources


@pytest.mark.parametrize("mutant", [_gates_for_scales, _keys_for_values, _the_other_branch])
def test_other_rows_are_caught(mutant, monkeypatch):
    monkeypatch.setattr(transformer, "sources", mutant)
    assert_killed(balancing_changes_no_answer, factors(), examples=40)


def test_saliences_are_maxima_over_tokens_and_images():
    trajectories = Calibration(MODEL, replace(CALIBRATION, images=2)).trajectories
    names = ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"]
    found = input_saliences(MODEL, trajectories, [0, 3], names)
    for name in names:
        for row, step in zip(found[name], (0, 3), strict=True):
            x = unit_inputs(MODEL.network, name, trajectories.at([step]))[0]
            np.testing.assert_allclose(row, np.abs(x).max(axis=(0, 1)), rtol=1e-4)


def test_names():
    assert token_layers(TINY_DIT)[:4] == [f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert not any(name.endswith("fc2") for name in sources(TINY_DIT))
    with pytest.raises(UnknownNameError, match="nothing linear makes the input of 'blocks.0.mlp.fc2'"):
        balanced(MODEL, {"blocks.0.mlp.fc2": np.ones(16)})
    with pytest.raises(ShapeError, match="tqdit is made for diffusion transformers"):
        require(tiny_model(), "tqdit")
    assert require(MODEL, "tqdit") is MODEL.network
