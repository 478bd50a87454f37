"""Coverage: what each policy quantizes, and that the rest stays float to the last bit."""

import numpy as np
import pytest
from toys import TINY, tiny_model, tiny_session

from refquant.errors import RangeError, UnknownNameError
from refquant.quant.affine import QSpec
from refquant.quant.coverage import COVERAGES, Coverage, check_bits, coverage
from refquant.quant.methods import METHODS
from refquant.quant.split import split_shortcuts
from refquant.quant.wrap import activation_quantizers, wrap

ENDS = {"conv_in", "conv_out"}


@pytest.fixture(scope="module", params=COVERAGES)
def quantized(request, calibration):
    return METHODS["nearest"](tiny_session(calibration, weight_bits=4, input_bits=6, coverage=request.param))


def test_layers_that_are_not_covered_keep_every_bit(model, quantized):
    """Weights without codes are the float model's own arrays; weights with codes are not."""
    policy = quantized.recipe["coverage"].split(":")[0]
    kept = coverage(policy, model.network).float_weights
    original = model.network.state_dict()
    for name, layer in quantized.layers.items():
        same = np.array_equal(layer.layer.weight.data, original[f"{name}.weight"])
        assert same == (name in kept) == (layer.codes is None)
        np.testing.assert_array_equal(layer.layer.bias.data, original[f"{name}.bias"])


def test_bits_of_every_weight_and_input(model, quantized):
    """Nominal bits everywhere, 8 at the ends where the policy says so, 8 for softmax, none where it is float."""
    policy = coverage(quantized.recipe["coverage"].split(":")[0], model.network)
    for name, layer in quantized.layers.items():
        spec = policy.weight_spec(name, 4)
        assert (layer.weight_qparams and layer.weight_qparams.spec) == spec
        assert spec is None or spec == QSpec(8 if name in policy.eight else 4, signed=True, axis=0)
    for name, quantizer in quantized.quantizers().items():
        spec = policy.input_spec(name, 6)
        assert (quantizer.qparams and quantizer.qparams.spec) == spec


def test_full_covers_all(model):
    policy = coverage("full", model.network)
    wrapped, layers = wrap(model.network)
    assert all(policy.weight_spec(name, 4) == QSpec(4, signed=True, axis=0) for name in layers)
    specs = {name: policy.input_spec(name, 5) for name in activation_quantizers(wrapped)}
    assert None not in specs.values()
    probs = {name for name, spec in specs.items() if spec == QSpec(8, symmetric=True)}
    assert probs == {name for name in specs if name.endswith(".probs")} and len(probs) == 4
    assert {spec for name, spec in specs.items() if name not in probs} == {QSpec(5)}


def test_layers_leaves_the_products_of_attention(model):
    policy = coverage("layers", model.network)
    for name in activation_quantizers(wrap(model.network)[0]):
        assert (policy.input_spec(name, 4) is None) == (not name.endswith(".input"))


def test_ends8_lifts_the_ends_and_lowers_nothing(model):
    """conv_in and conv_out get max(bits, 8) bits."""
    policy = coverage("ends8", model.network)
    for name in wrap(model.network)[1]:
        want = 8 if name in ENDS else 4
        assert policy.weight_spec(name, 4).bits == policy.input_spec(f"{name}.input", 4).bits == want
        assert policy.weight_spec(name, 8).bits == 8


def test_released_is_the_table_of_the_released_code(model):
    """Float: shortcuts, down-sampling, the ends, temb.dense.0; inputs of temb.dense.1 and of the first conv1, too."""
    policy = coverage("released", model.network)
    aside = {
        "down.0.downsample.conv", "down.1.block.0.nin_shortcut", "up.0.block.0.nin_shortcut", "conv_in", "conv_out",
        "up.0.block.1.nin_shortcut", "up.1.block.0.nin_shortcut", "up.1.block.1.nin_shortcut", "temb.dense.0",
    }  # fmt: skip
    assert policy.float_weights == aside
    assert policy.float_inputs == aside | {"temb.dense.1", "down.0.block.0.conv1"}
    assert not policy.attention


def test_released_leaves_split_shortcuts_float_too(model):
    """Both parts of a split shortcut are shortcuts."""
    split = split_shortcuts(model).network
    parts = {name for name in wrap(split)[1] if ".part." in name}
    assert len(parts) == 8 and parts <= coverage("released", split).float_weights


@pytest.mark.parametrize("name", COVERAGES)
def test_32_bits_are_float_everywhere(model, name):
    policy = coverage(name, model.network)
    wrapped, layers = wrap(model.network)
    assert all(policy.weight_spec(layer, 32) is None for layer in layers)
    assert all(policy.input_spec(quantizer, 32) is None for quantizer in activation_quantizers(wrapped))


def test_description_counts_weights(model):
    """The share of weights that is quantized, by hand."""
    layers = wrap(model.network)[1]
    sizes = {name: layer.layer.weight.data.size for name, layer in layers.items()}
    policy = coverage("released", model.network)
    share = 100 * (1 - sum(sizes[n] for n in policy.float_weights) / sum(sizes.values()))
    text = policy.describe(layers)
    assert text == (
        f"released: {len(layers) - 9} of {len(layers)} layers, {share:.1f} % of the weights; "
        f"{len(layers) - 11} inputs; attention products float"
    )
    assert ", 100.0 % of the weights;" in Coverage("full").describe(layers)


def test_a_network_without_attention_has_a_coverage_too():
    network = tiny_model(TINY.__class__(8, 1, 8, (1,), 1, (), 4, 0.0)).network
    for name in COVERAGES:
        assert coverage(name, network).name == name


def test_what_is_refused(model):
    with pytest.raises(UnknownNameError, match="full, layers, ends8, released"):
        coverage("everything", model.network)
    for bad in (1, 9, 0, -4, 16, 33):
        with pytest.raises(RangeError, match=f"weight bits are {bad}; 2 to 8 .* 32"):
            check_bits(bad, 8)
        with pytest.raises(RangeError, match=f"input bits are {bad}"):
            check_bits(8, bad)
    check_bits(2, 32)
