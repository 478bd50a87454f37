"""The ONNX network of a transformer: every rounding, product and table is that of fake quantization."""

import dataclasses

import numpy as np
import pytest
import toys
from ort import session

from refquant.deploy.export import export
from refquant.errors import LoweringError
from refquant.quant.affine import fake_quantize
from refquant.quant.calibrate import Calibration
from refquant.quant.methods import METHODS
from refquant.quant.quantized import QuantizedModel
from refquant.quant.temporal import features
from refquant.quant.wrap import wrap

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

VARIANTS = {
    "nearest W8A8": ("nearest", 8, 8, {}),
    "nearest W4A5": ("nearest", 4, 5, {}),
    "tables": ("tfmq", 4, 6, {"tiar_iterations": 4}),
}
Y = np.array([2, 3, 0])  # 3 is "no class"


@pytest.fixture(scope="module")
def calibration():
    return Calibration(toys.tiny_dit(), toys.CALIBRATION)


@pytest.fixture(scope="module", params=VARIANTS)
def quantized(request, calibration):
    return made(calibration, request.param)


def made(calibration, variant, **options):
    name, weight_bits, input_bits, own = VARIANTS[variant]
    session = toys.tiny_session(calibration, weight_bits=weight_bits, input_bits=input_bits, **options)
    return METHODS[name](session, **own)


@pytest.fixture
def x():
    return np.random.default_rng(3).standard_normal((3, 1, 8, 8), dtype=np.float32)


def feed(running, **values):
    wanted = {value.name for value in running.get_inputs()}
    return {name: np.asarray(value) for name, value in values.items() if name in wanted}


def answer(network, x, step, y=Y, optimized=True):
    running = session(network, optimized)
    return running.run(["eps"], feed(running, x=x, y=y, step=step))[0]


def fake(model, x, step, y=Y):
    return model.denoiser()(x, int(model.timesteps()[step]), step, y)


def relative(got, want):
    return float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))


CONFIGS = {
    "conditional": toys.TINY_DIT,
    "unconditional": dataclasses.replace(toys.TINY_DIT, classes=0),
    "with variances": dataclasses.replace(toys.TINY_DIT, image_channels=3, patch=2, learn_sigma=True),
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_the_wiring_is_that_of_the_network(cfg):
    """Without quantizers there is nothing that could flip: float sums differ in their order alone."""
    model = toys.tiny_dit(cfg)
    plain = QuantizedModel(model, *wrap(model.network), {"calibration": {"steps": 4}})
    x = np.random.default_rng(3).standard_normal((3, *model.image_shape), dtype=np.float32)
    network = export(plain)
    onnx.checker.check_model(network, full_check=True)
    inputs = [value.name for value in network.graph.input]
    assert inputs == ["x", *(["y"] if cfg.classes else []), "step"]
    for step in range(4):
        want = fake(plain, x, step, Y if cfg.classes else None)
        np.testing.assert_allclose(answer(network, x, step), want, atol=2e-6 * np.abs(want).max())


def test_every_layer_and_every_rounding_is_that_of_fake_quantization(quantized, x):
    """Weights and grids bit for bit, with the tables of the step; sums up to the order of float additions."""
    network = export(quantized)
    onnx.checker.check_model(network, full_check=True)
    nodes = {node.name: node for node in network.graph.node}
    shown = onnx.ModelProto()
    shown.CopyFrom(network)
    shown.graph.output.extend(
        onnx.ValueInfoProto(name=name) for node in network.graph.node for name in node.output if name != "eps"
    )
    running = session(shown, optimized=False)
    names = [output.name for output in running.get_outputs()]
    for step in (0, 3):
        values = {"x": x, **dict(zip(names, running.run(names, feed(running, x=x, y=Y, step=step)), strict=True))}
        quantized.at_step(step)
        known = {name.rpartition(".adaLN")[0] for name in quantized.layers if "adaLN" in name}
        for name, quantizer in quantized.quantizers().items():
            if "adaLN" in name or name.startswith("t_embedder"):
                assert name not in nodes  # known beforehand
                continue
            given = nodes[nodes[name].input[0]].input[0]
            if given in nodes and nodes[given].op_type == "Clip":
                given = nodes[given].input[0]
            np.testing.assert_array_equal(values[name], fake_quantize(values[given], quantizer.qparams), name)
        for name, layer in quantized.layers.items():
            if "adaLN" in name or name.startswith("t_embedder"):
                continue
            weight = layer.layer.weight.data.reshape(len(layer.codes), -1).T
            np.testing.assert_array_equal(values[f"{name}.weight"], weight, name)
            want = values[nodes[f"{name}.product"].input[0]] @ weight + layer.layer.bias.data
            np.testing.assert_allclose(values[name], want, atol=2e-6 * np.abs(want).max(), err_msg=name)
        told = features(quantized.network, np.full(3, quantized.timesteps()[step]), Y)
        for name in known:
            parts = [values[part][:, 0] for part in nodes[f"{name}.modulation.split"].output]
            got = np.concatenate([p - 1 if "scale" in part else p for p, part in zip(
                parts, nodes[f"{name}.modulation.split"].output, strict=True)], axis=1)  # fmt: skip
            np.testing.assert_allclose(got, told[f"{name}.adaLN_modulation.1"], atol=1e-6, err_msg=name)


def test_answers_are_those_of_fake_quantization(quantized, x):
    """Also after a runtime's own optimizations. Codes on an edge may fall to its other side."""
    network = export(quantized)
    coarse = quantized.recipe["input_bits"] < 8
    for step in (0, 3):
        want = fake(quantized, x, step)
        apart = relative(answer(network, x, step), want)
        assert apart < (0.3 if coarse else 0.03)
        for other in (fake(quantized, x, 3 - step), fake(quantized, x, step, Y[::-1])):
            assert apart < 0.5 * relative(other, want)  # another step, or other classes, are other answers


def test_a_network_for_one_step_has_no_tables_of_steps(quantized, x):
    stepped = export(quantized)
    for step in (0, 3):
        network = export(quantized, step=step)
        assert [value.name for value in network.graph.input] == ["x", "y"]
        assert all(n.name.endswith(".modulation") for n in network.graph.node if n.op_type == "Gather")
        np.testing.assert_array_equal(
            answer(network, x, step, optimized=False), answer(stepped, x, step, optimized=False)
        )


def test_onnx_runtime_multiplies_integers_only(calibration, x, tmp_path):
    """Linear layers and both products of attention, without results being rounded; 8-bit weights need zeros of 0."""
    model = made(calibration, "nearest W4A5")
    path = tmp_path / "o.onnx"
    session(export(model, step=0), kept=path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert not {"MatMul", "FusedMatMul", "Gemm"} & set(kinds)
    assert kinds.count("MatMulIntegerToFloat") + kinds.count("QLinearMatMul") == 2 * (4 + 2) + 2


@pytest.mark.parametrize("coverage", ["layers", "released"])
def test_what_is_float_stays_float(calibration, x, coverage):
    model = made(calibration, "nearest W8A8", coverage=coverage)
    network = export(model)
    integer = {n.name for n in network.graph.node if n.op_type == "DequantizeLinear"}
    for node in network.graph.node:
        layer = model.layers.get(node.name.removesuffix(".product"))
        if node.op_type == "MatMul" and layer is not None:
            assert (node.input[1] in integer) == (layer.codes is not None)
            assert (node.input[0] in integer) == (layer.input.qparams is not None)
    assert relative(answer(network, x, 1), fake(model, x, 1)) < 0.02


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tqdit", {"groups": 2}, r"probs has no QDQ form: its grid"),
        ("qdit", {"group": 4, "search": False}, "has no QDQ form"),
        ("ditas", {"group": 4}, "has no QDQ form"),
    ],
)
def test_what_has_no_such_form_is_refused_by_name(calibration, name, options, words):
    model = METHODS[name](toys.tiny_session(calibration), **options)
    with pytest.raises(LoweringError, match=words):
        export(model)
