"""The ONNX network: every rounding, product and table is what fake quantization computes, judged by ONNX Runtime."""

import dataclasses
import json

import numpy as np
import pytest
import toys
from ort import session

from refquant.autograd import Tensor, no_grad
from refquant.deploy.export import export
from refquant.deploy.results import result_quantizers
from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.sampling import NoiseSource
from refquant.errors import LoweringError, RangeError
from refquant.metrics import psnr
from refquant.nn.layers import Conv2d
from refquant.nn.unet import UNetConfig
from refquant.quant.affine import QParams, QSpec, fake_quantize
from refquant.quant.calibrate import Calibration
from refquant.quant.methods import METHODS
from refquant.quant.quantized import QuantizedModel
from refquant.quant.wrap import wrap

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

VARIANTS = {
    "nearest W8A8": ("nearest", 8, 8, {}),
    "nearest W4A4": ("nearest", 4, 4, {}),
    "nearest W6A5": ("nearest", 6, 5, {}),
    "split": ("qdiffusion", 4, 8, {"step_iterations": 0}),
    "tables": ("tfmq", 4, 6, {"tiar_iterations": 4}),
    "cache": ("tfmq", 4, 8, {"tiar_iterations": 4, "features": "cached"}),
    "correction": ("ptqd", 4, 8, {"on": "nearest", "images": 3}),
}


@pytest.fixture(scope="module")
def calibration():
    """Of a model that answers v, so that the noise has to be made of it; no two of its sizes are equal."""
    return Calibration(toys.tiny_model(UNetConfig(8, 3, 12, (1, 2), 1, (4,), 4, 0.0), prediction="v"), toys.CALIBRATION)


@pytest.fixture(scope="module", params=VARIANTS)
def quantized(request, calibration):
    return made(calibration, request.param)


def made(calibration, variant, **options):
    name, weight_bits, input_bits, own = VARIANTS[variant]
    session = toys.tiny_session(calibration, weight_bits=weight_bits, input_bits=input_bits, **options)
    return METHODS[name](session, **own)


@pytest.fixture
def x(calibration):
    return np.random.default_rng(3).standard_normal((3, *calibration.model.image_shape), dtype=np.float32)


def answer(network, x, step=None, optimized=True):
    feed = {"x": x} if step is None else {"x": x, "step": np.array(step)}
    return session(network, optimized).run(["eps"], feed)[0]


def every_value(network, x, step):
    """All values of a pass by name, exactly as the graph says: nothing is fused."""
    shown = onnx.ModelProto()
    shown.CopyFrom(network)
    names = [name for node in network.graph.node for name in node.output if name != "eps"]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    running = session(shown, optimized=False)
    outputs = [output.name for output in running.get_outputs()]
    feed = {"x": x} | ({"step": np.array(step)} if any(i.name == "step" for i in network.graph.input) else {})
    return {"x": x, **dict(zip(outputs, running.run(outputs, feed), strict=True))}


def relative(got, want):
    return float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))


def fake(model, x, step):
    return model.denoiser()(x, int(model.timesteps()[step]), step)


def test_the_wiring_is_that_of_the_network(calibration, x):
    """Without quantizers there is nothing that could flip: float sums differ in their order alone."""
    model = calibration.model
    plain = QuantizedModel(model, *wrap(model.network), {"calibration": {"steps": 4}})
    network = export(plain)
    onnx.checker.check_model(network, full_check=True)
    for step in range(4):
        want = fake(plain, x, step)
        np.testing.assert_allclose(answer(network, x, step), want, atol=1e-5 * np.abs(want).max())


def test_the_network_is_valid(quantized):
    onnx.checker.check_model(export(quantized), full_check=True)
    onnx.checker.check_model(export(quantized, step=1, results=result_quantizers(quantized, 1)), full_check=True)


def test_every_layer_and_every_rounding_is_that_of_fake_quantization(quantized, x):
    """Weights and grids bit for bit, with the tables of the step; sums up to the order of float additions."""
    network = export(quantized)
    nodes = {node.name: node for node in network.graph.node}
    for step in (0, 3):
        values = every_value(network, x, step)
        quantized.at_step(step)
        rounded = 0
        for name, quantizer in quantized.quantizers().items():
            for own in (name, f"{name}.before", f"{name}.again"):
                if own not in nodes:
                    continue
                codes = nodes[nodes[own].input[0]]
                given = codes.input[0]
                if given in nodes and nodes[given].op_type == "Clip":
                    given = nodes[given].input[0]
                np.testing.assert_array_equal(values[own], fake_quantize(values[given], quantizer.qparams), own)
                assert values[codes.name].max() <= quantizer.qparams.spec.qmax
                rounded += 1
        assert rounded > len(quantized.layers)
        for name, layer in quantized.layers.items():
            if not isinstance(layer.layer, Conv2d):
                assert name not in nodes  # the time layers do not run
                continue
            weight = layer.layer.weight.data.transpose(0, 3, 1, 2)
            np.testing.assert_array_equal(values[f"{name}.weight"], weight, name)
            taken = values[nodes[name].input[0]].transpose(0, 2, 3, 1)
            with no_grad():
                want = layer.layer(Tensor(np.ascontiguousarray(taken))).data.transpose(0, 3, 1, 2)
            np.testing.assert_allclose(values[name], want, atol=2e-6 * np.abs(want).max(), err_msg=name)
        ab, correction = quantized.base.schedule.alpha_bar[quantized.timesteps()[step]], quantized.correction
        noise = np.sqrt(1 - ab) * x + np.sqrt(ab) * values["conv_out"]
        if correction is not None:
            noise = (noise - correction.mean[step].reshape(1, -1, 1, 1)) / correction.gain[step]
        np.testing.assert_allclose(values["eps"], noise, atol=1e-5)


def test_answers_are_those_of_fake_quantization(quantized, x):
    """Also after a runtime's own optimizations. Codes on an edge may fall to its other side."""
    network = export(quantized)
    coarse = quantized.recipe["input_bits"] < 8
    for step in (0, 3):
        want = fake(quantized, x, step)
        apart = relative(answer(network, x, step), want)
        assert apart < (0.6 if coarse else 0.05)
        assert apart < 0.5 * relative(fake(quantized, x, 3 - step), want)  # the other step is another answer


def test_a_network_for_one_step_has_no_tables(quantized, x):
    """And computes what the one with tables computes at this step, bit for bit."""
    stepped = export(quantized)
    for step in (0, 3):
        network = export(quantized, step=step)
        assert [value.name for value in network.graph.input] == ["x"]
        assert not any(node.op_type == "Gather" for node in network.graph.node)
        assert {p.key: p.value for p in network.metadata_props}["step"] == str(step)
        np.testing.assert_array_equal(
            answer(network, x, optimized=False), answer(stepped, x, step, optimized=False)
        )


def test_images_are_those_of_fake_quantization(calibration):
    """A sampler that knows the file alone: the time-steps and alpha_bar are its properties."""
    model = made(calibration, "tables")
    running = session(export(model))
    facts = running.get_modelmeta().custom_metadata_map
    t, alpha_bar = json.loads(facts["timesteps"]), json.loads(facts["alpha_bar"])
    assert t == model.timesteps().tolist()
    schedule = model.base.schedule
    noise = NoiseSource(5, 4, model.base.image_shape)
    z = noise.draw()
    want = ddim_sample(model.denoiser(), z, schedule, noise, steps=len(t))
    x = z
    for step, (ab, after) in enumerate(zip(alpha_bar, [*alpha_bar[1:], 1.0], strict=True)):
        eps = running.run(["eps"], {"x": x.astype(np.float32), "step": np.array(step)})[0]
        clean = np.clip((x - np.sqrt(1 - ab) * eps) / np.sqrt(ab), -1, 1)
        x = np.sqrt(after) * clean + np.sqrt(1 - after) * (x - np.sqrt(ab) * clean) / np.sqrt(1 - ab)
    assert psnr(x, want) > 30


@pytest.mark.parametrize("variant", ["nearest W8A8", "split"])
def test_rounded_results_make_all_convolutions_integer_ones(calibration, x, variant, tmp_path):
    """What ONNX Runtime makes of the network: no convolution of floats is left, nor a product of attention."""
    model = made(calibration, variant)
    network = export(model, results=result_quantizers(model))
    running = session(network, kept=tmp_path / "o.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node]
    convolutions = sum(isinstance(layer.layer, Conv2d) for layer in model.layers.values())
    assert kinds.count("QLinearConv") == convolutions and not {"Conv", "FusedConv", "MatMul"} & set(kinds)
    want = fake(model, x, 2)
    assert relative(running.run(["eps"], {"x": x, "step": np.array(2)})[0], want) < 0.1


def test_results_are_rounded_with_the_ranges_of_the_trajectories(calibration, x):
    model = made(calibration, "nearest W8A8")
    results = result_quantizers(model, images=2, seed=1)
    values = every_value(export(model, results=results), x, 1)
    attention = {f"{name}.{part}" for name, m in model.network.named_modules() if hasattr(m, "product")
                 for part in "qkv" if hasattr(m, "proj_out")}  # fmt: skip
    assert attention  # these are rounded anyway, by the quantizers of the products
    for name, layer in model.layers.items():
        if isinstance(layer.layer, Conv2d):
            assert (f"{name}.result" in values) == (name not in attention)
        if f"{name}.result" in values:
            np.testing.assert_array_equal(values[f"{name}.result"], fake_quantize(values[name], results[name]), name)
    noise = NoiseSource(1, 2, model.base.image_shape)
    seen = {"conv_in": [], "conv_out": []}
    for name, kept in seen.items():
        layer = model.layers[name]
        layer.input.watcher = lambda _, value, kept=kept, layer=layer: kept.append(
            layer.layer(Tensor(fake_quantize(value, layer.input.qparams))).data)  # fmt: skip
    ddim_sample(model.denoiser(), noise.draw(), model.base.schedule, noise, steps=4)
    for name, kept in seen.items():
        model.layers[name].input.watcher = None
        reach = [results[name].scale * (end - results[name].zero_point) for end in (0, 255)]
        ends = [min(k.min() for k in kept), max(k.max() for k in kept)]
        np.testing.assert_allclose(reach, ends, atol=results[name].scale)


def test_weights_of_four_bits_take_half_a_byte(calibration):
    model = made(calibration, "nearest W4A4")
    stored = {i.name: i for i in export(model).graph.initializer}
    for name, layer in model.layers.items():
        if isinstance(layer.layer, Conv2d):
            tensor = stored[f"{name}.int4"]
            assert tensor.data_type == onnx.TensorProto.INT4 and len(tensor.raw_data) == -(-layer.codes.size // 2)


def test_only_weights_beyond_a_byte_keep_their_zero_points(calibration):
    """Runtimes want codes whose zero is 0: 8 asymmetric bits have no room for that, fewer have."""
    for variant, kept in (("nearest W8A8", True), ("nearest W6A5", False), ("nearest W4A4", False)):
        network = export(made(calibration, variant))
        weights = [n for n in network.graph.node if n.name.endswith(".weight") and n.op_type == "DequantizeLinear"]
        assert any(len(n.input) == 3 for n in weights) == kept


@pytest.mark.parametrize("coverage", ["layers", "released"])
def test_what_is_float_stays_float(calibration, x, coverage):
    model = made(calibration, "nearest W8A8", coverage=coverage)
    network = export(model, results=result_quantizers(model))
    integer = {n.name for n in network.graph.node if n.op_type == "DequantizeLinear"}
    for node in network.graph.node:
        if node.op_type == "Conv":
            layer = model.layers[node.name]
            assert (node.input[1] in integer) == (layer.codes is not None)
            assert (node.input[0] in integer) == (layer.input.qparams is not None)
    assert relative(answer(export(model), x, 1), fake(model, x, 1)) < 0.02


# ---------------------------------------------------------------- what is refused


def test_what_has_no_such_form_is_refused_by_name(calibration):
    def with_input(model, quantizer):
        model.layers["conv_in"].input.set(quantizer)

    def with_weight(model, qparams):
        layer = model.layers["conv_in"]
        layer.set_codes(layer.codes, qparams)

    def zero_beyond(model):
        q = model.layers["conv_in"].weight_qparams
        with_weight(model, QParams(q.scale, np.where(np.arange(len(q.scale)), q.zero_point, 200), q.spec))

    cases = {
        r"conv_in\.input has no QDQ form: a zero point": lambda m: with_input(m, QParams(0.1, 300, QSpec(8))),
        r"conv_in has no QDQ form: a zero point": zero_beyond,
        r"conv_in has no QDQ form: its weight has scales for groups": lambda m: with_weight(
            m, QParams(np.full(36, 0.1), np.zeros(36), QSpec(8, True, True, axis=0))),
        r"conv_in has no QDQ form: it has a low-rank": lambda m: setattr(m.layers["conv_in"], "branch", (0, 0)),
    }  # fmt: skip
    for words, spoil in cases.items():
        model = made(calibration, "nearest W8A8")
        spoil(model)
        with pytest.raises(LoweringError, match=words):
            export(model)


def test_a_grid_of_another_kind_is_refused_by_name(calibration):
    from refquant.quant.mrq_sign import SignSplit

    model = made(calibration, "nearest W8A8")
    model.layers["conv_out"].input.set(SignSplit(8, 0.1, 0.2))
    with pytest.raises(LoweringError, match=r"conv_out\.input has no QDQ form: its grid"):
        export(model)


def test_steps_and_networks_that_there_are_not(calibration):
    model = made(calibration, "nearest W8A8")
    for step in (-1, 4):
        with pytest.raises(RangeError, match=f"step is {step}; this model's sampler has 4, from 0"):
            export(model, step=step)
    with pytest.raises(LoweringError, match="no QDQ form: its network is a NoneType, not a UNet or a DiT"):
        export(dataclasses.replace(model, network=None))
