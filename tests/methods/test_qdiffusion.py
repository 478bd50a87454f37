"""Q-Diffusion: split shortcuts, blocks with their projections, and activation steps that are learned or left."""

import numpy as np
import pytest
from toys import tiny_session

from refquant.quant.affine import QSpec
from refquant.quant.methods import METHODS
from refquant.quant.split import is_split, split_shortcuts


def quantized(calibration, **options):
    return METHODS["qdiffusion"](tiny_session(calibration, weight_bits=4, input_bits=6), **options)


@pytest.fixture(scope="module")
def searched(calibration):
    return quantized(calibration, step_iterations=0)


def test_shortcuts_of_the_up_path_are_two_layers(model, calibration, searched):
    """Each part with codes, ranges and a name of its own; without splitting, none."""
    parts = {name for name in searched.layers if ".part." in name}
    assert len(parts) == 8 and all(name.startswith("up.") for name in parts)
    assert is_split(searched.base.network) and not is_split(model.network)
    whole = quantized(calibration, split=False, step_iterations=0)
    assert not is_split(whole.base.network) and not any(".part." in name for name in whole.layers)


def test_steps_that_are_not_learned_are_as_searched(calibration, searched):
    """The mse search on what each quantizer of the split float network sees."""
    seen = calibration.observed(split_shortcuts(calibration.model).network)
    for name, q in searched.quantizers().items():
        want = seen[name].mse(QSpec(8, symmetric=True) if name.endswith(".probs") else QSpec(6))
        assert q.qparams.scale == want.scale and q.qparams.zero_point == want.zero_point


def test_learning_moves_scales_and_no_code(calibration, searched):
    """As many iterations as for weights, if not said otherwise."""
    learned = quantized(calibration)
    assert learned.recipe["options"] == {"split": True, "step_iterations": 3}
    moved = 0
    for name, q in learned.quantizers().items():
        other = searched.quantizers()[name].qparams
        assert q.qparams.zero_point == other.zero_point and q.qparams.scale > 0
        moved += q.qparams.scale != other.scale
    assert moved > len(learned.quantizers()) // 2
    for name, layer in learned.layers.items():
        np.testing.assert_array_equal(layer.codes, searched.layers[name].codes)


def test_float_activations_have_no_steps_to_learn(calibration):
    made = METHODS["qdiffusion"](tiny_session(calibration, weight_bits=4, input_bits=32))
    assert all(q.qparams is None for q in made.quantizers().values())
