"""Every method on strange models and settings: a defined result, or one clear error. Never None, never a silent NaN."""

from dataclasses import replace

import numpy as np
import pytest
from toys import TINY, tiny_model, tiny_session

from refquant.errors import RangeError, RefquantError, UnknownNameError
from refquant.quant.calibrate import CalibrationConfig
from refquant.quant.methods import METHODS, method, methods_for, options_of
from refquant.quant.quantized import QuantizedModel

EVERY = pytest.mark.parametrize("name", methods_for("unet"))
SMALL = tiny_model(replace(TINY, image_size=4, multipliers=(1,), attention=(4,)))
LITTLE = CalibrationConfig(images=1, steps=2, every=1)
SHORT = {"tfmq": {"tiar_iterations": 1}, "ptqd": {"on": "nearest", "images": 1}}


def quantized(name, model, calibration=LITTLE, **session):
    effort = {"iterations": 1}
    given = tiny_session(model, calibration, **{"weight_bits": 4, "states": 2, "effort": effort, **session})
    return METHODS[name](given, **SHORT.get(name, {}))


def finite(made):
    """A model whose arrays and answers, at every step, are finite."""
    assert isinstance(made, QuantizedModel)
    for name, array in made.tensors().items():
        assert np.isfinite(array).all(), name
    x = np.random.default_rng(0).standard_normal((2, *made.base.image_shape), dtype=np.float32)
    for step, t in enumerate(made.timesteps()):
        assert np.isfinite(made.denoiser()(x, int(t), step)).all()
    return made


@EVERY
def test_one_image_and_one_step_are_enough(name):
    """Nothing has a spread over images or steps."""
    finite(quantized(name, SMALL, CalibrationConfig(images=1, steps=1, every=5), states=1))


@EVERY
def test_a_schedule_of_one_time_step(name):
    """T = 1: the sampler's only step is t = 0."""
    model = tiny_model(SMALL.network.cfg, timesteps=1)
    finite(quantized(name, model, CalibrationConfig(images=2, steps=1)))


@EVERY
def test_a_network_without_attention_that_predicts_v(name):
    cfg = replace(SMALL.network.cfg, attention=(), image_channels=3)
    finite(quantized(name, tiny_model(cfg, prediction="v")))


def changed(change):
    """The small model with something done to some of its weights."""
    model = tiny_model(SMALL.network.cfg)
    change(model.network)
    return model


def all_zero(network):
    for p in network.parameters():
        p.data[:] = 0


def all_constant(network):
    for p in network.parameters():
        p.data[:] = 0.01


def some_strange(network):
    """A layer of zeros, zero and constant channels of both signs, and scales 38 orders apart."""
    network.mid.block_1.conv1.weight.data[:] = 0
    for layer in (network.conv_in, network.temb.dense[1], network.mid.attn_1.q):
        for channel, value in enumerate((0, 0.25, -0.25)):
            layer.weight.data[channel] = value
    network.conv_out.weight.data *= np.float32(1e8)
    network.mid.block_2.conv1.weight.data *= np.float32(1e-30)


@EVERY
@pytest.mark.parametrize("change", [all_zero, all_constant, some_strange], ids=lambda f: f.__name__)
def test_weights_without_spread(name, change):
    """Defined results; an all-zero layer has codes that mean 0 exactly."""
    made = finite(quantized(name, changed(change)))
    if change is not all_constant:
        np.testing.assert_array_equal(made.layers["mid.block_1.conv1"].layer.weight.data, 0)


@EVERY
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(name, bad):
    """Of a convolution, a bias and a normalisation."""
    for change in (
        lambda n: n.mid.block_1.conv1.weight.data.__setitem__((0, 0, 0, 0), bad),
        lambda n: n.temb.dense[0].bias.data.__setitem__(0, bad),
        lambda n: n.norm_out.weight.data.__setitem__(0, bad),
    ):
        with pytest.raises(RangeError, match="holds NaN or infinity"):
            quantized(name, changed(change))


@EVERY
def test_bits_outside_of_two_to_eight(model, name):
    for options in ({"weight_bits": 1}, {"weight_bits": 9}, {"input_bits": 0}, {"input_bits": 16}):
        with pytest.raises(RangeError, match="2 to 8 are supported, and 32 for float"):
            quantized(name, model, **options)


@EVERY
@pytest.mark.parametrize("bits", [(2, 2), (32, 32)])
def test_bits_at_the_ends(name, bits):
    """32 and 32 is the float model: its answers are given back, up to what PTQD and splitting do to the last bits."""
    made, model = finite(quantized(name, SMALL, weight_bits=bits[0], input_bits=bits[1])), SMALL
    if bits == (32, 32):
        x = np.random.default_rng(0).standard_normal((2, *model.image_shape), dtype=np.float32)
        np.testing.assert_allclose(made.denoiser()(x, 10, 0), model.denoiser()(x, 10, 0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["brecq", "importance", "qdiffusion", "tfmq"])
def test_more_states_than_were_recorded(model, name):
    with pytest.raises(RangeError, match="pick: 3 states of 2 with a positive weight. Record more images"):
        quantized(name, model, states=3)


@EVERY
def test_more_steps_than_the_schedule_has(model, name):
    with pytest.raises(RangeError, match="steps is 21; the model's schedule allows 1 to 20"):
        quantized(name, model, CalibrationConfig(images=1, steps=21))


@EVERY
def test_unknown_options_of_a_method(model, name):
    """Every option that is a name is refused with the names there are, before any work, whatever is quantized."""
    named = {option: default for option, default in options_of(name).items() if isinstance(default, str)}
    for option in named:
        session = tiny_session(model, LITTLE, weight_bits=32, input_bits=32)
        with pytest.raises(UnknownNameError, match="Known: "):
            METHODS[name](session, **{**SHORT.get(name, {}), option: "no-such"})


def test_unknown_methods(model):
    with pytest.raises(UnknownNameError, match="Known: nearest, squant"):
        method("gptq")
    with pytest.raises(UnknownNameError, match="choose on="):
        METHODS["ptqd"](tiny_session(model, LITTLE), on="ptqd")
    with pytest.raises(RefquantError):
        options_of("gptq")
