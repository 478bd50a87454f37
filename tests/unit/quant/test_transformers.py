"""The toolbox on a conditional transformer: what it wraps, records, cuts into units, and keeps in files."""

from dataclasses import replace

import numpy as np
import pytest
from toys import CALIBRATION, TINY_DIT, tiny_dit, tiny_model, tiny_session

from refquant.autograd import Tensor, no_grad, ops
from refquant.errors import CheckpointError, RangeError
from refquant.nn.module import Parameter
from refquant.quant import activations
from refquant.quant.affine import QSpec
from refquant.quant.calibrate import Calibration, observe
from refquant.quant.cost import bit_operations
from refquant.quant.coverage import coverage
from refquant.quant.dynamic import PerToken
from refquant.quant.grids import GridTable
from refquant.quant.groupwise import group_qparams
from refquant.quant.methods import METHODS
from refquant.quant.mrq_sign import SignSplit
from refquant.quant.mrq_softmax import SoftmaxRegions
from refquant.quant.observers import minmax
from refquant.quant.quantized import load_quantized
from refquant.quant.record import ask, calibration_classes, pick, unit_inputs, unit_output
from refquant.quant.temporal import TemporalBlock, every_condition, features
from refquant.quant.units import find_units, temporal_layers
from refquant.quant.wrap import activation_quantizers, wrap

K = TINY_DIT.classes


@pytest.fixture(scope="module")
def dit():
    return tiny_dit()


@pytest.fixture(scope="module")
def recorded(dit):
    return Calibration(dit, replace(CALIBRATION, images=4))


@pytest.fixture
def run(recorded):
    return tiny_session(recorded, weight_bits=4).start("any")


def answer(network, states):
    with no_grad():
        return ask(network, states).data


# ------------------------------------------------------------------ recording


def test_half_of_the_trajectories_have_no_class():
    assert calibration_classes(3, 8).tolist() == [0, 3, 1, 3, 2, 3, 0, 3]
    assert calibration_classes(0, 8) is None


def test_states_keep_their_class(dit, recorded):
    """Through `at`, `pick` and slices; and the recorded states are those of the plain conditional model."""
    trajectories = recorded.trajectories
    assert trajectories.y.tolist() == [0, K, 1, K]
    for states in (trajectories.at([1, 3]), pick(trajectories, 9, 0), pick(trajectories, 9, 0)[2:7]):
        np.testing.assert_array_equal(states.y, trajectories.y[states.image])
    first = trajectories.at([0])
    eps = dit.denoiser()(first.x, int(first.t[0]), 0, trajectories.y)
    again = dit.denoiser()(first.x, int(first.t[0]), 0)  # of no class: another answer where there is one
    assert np.abs(eps - again)[[0, 2]].max() > 1e-3
    np.testing.assert_array_equal(eps[[1, 3]], again[[1, 3]])


def test_the_network_is_asked_for_the_class(dit, recorded):
    states = recorded.trajectories.at([2])
    with no_grad():
        x = Tensor(np.ascontiguousarray(states.x.transpose(0, 2, 3, 1)))
        want = dit.network(x, states.t, y=states.y).data
    np.testing.assert_array_equal(answer(dit.network, states), want)
    np.testing.assert_array_equal(answer(wrap(dit.network)[0], states), want)  # and wrapping changes nothing
    seen = unit_output(dit.network, "final_layer", states)
    np.testing.assert_allclose(seen[1], unit_output(dit.network, "final_layer", states[1:2])[0], rtol=1e-4, atol=1e-5)


def test_an_unconditional_transformer_has_no_classes():
    model = tiny_model(replace(TINY_DIT, classes=0))
    trajectories = Calibration(model, CALIBRATION).trajectories
    assert trajectories.y is None and trajectories.at([0]).y is None
    assert temporal_layers(model.network) and features(model.network, np.arange(3))
    assert every_condition(np.arange(3), 0)[1] is None


# ------------------------------------------------------------------ units, temporal layers, coverage


def test_units_are_blocks_in_order(run):
    units = find_units(run.network, run.layers)
    assert [unit.name for unit in units] == [
        "t_embedder.mlp.0", "t_embedder.mlp.2", "x_embedder.proj", "blocks.0", "blocks.1", "final_layer",
    ] or [unit.name for unit in units] == [
        "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "blocks.0", "blocks.1", "final_layer",
    ]  # fmt: skip
    names = [layer.name for unit in units for layer in unit.layers]
    assert sorted(names) == sorted(run.layers)


def test_a_block_gives_its_output_for_its_inputs(dit, recorded):
    """Tokens and condition in, tokens out: what reconstruction learns on."""
    states = recorded.trajectories.at([0, 2])
    blocks = dict(dit.network.named_modules())
    for name in ("blocks.0", "blocks.1", "final_layer"):
        inputs = unit_inputs(dit.network, name, states)
        assert [x.ndim for x in inputs] == [3, 2] and all(len(x) == len(states) for x in inputs)
        with no_grad():
            got = blocks[name](*(Tensor(x) for x in inputs)).data
        np.testing.assert_allclose(got, unit_output(dit.network, name, states), rtol=1e-5, atol=1e-5)


def test_temporal_layers_are_the_mlp_and_the_modulations(dit):
    assert set(temporal_layers(dit.network)) == {
        "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.adaLN_modulation.1",
        *(f"blocks.{i}.adaLN_modulation.1" for i in range(TINY_DIT.depth)),
    }  # fmt: skip


def test_features_are_what_the_blocks_are_told(dit, recorded):
    """TemporalBlock(t, y) = the linear layer over the c that reaches each block; no class is the default."""
    states = recorded.trajectories.at([1])
    found = features(dit.network, states.t, states.y)
    modules = dict(dit.network.named_modules())
    for name in ("blocks.0", "blocks.1", "final_layer"):
        c = unit_inputs(dit.network, name, states)[1]
        with no_grad():
            want = modules[name].adaLN_modulation[1](ops.silu(Tensor(c))).data
        np.testing.assert_allclose(found[f"{name}.adaLN_modulation.1"], want, rtol=1e-5, atol=1e-6)
    plain, none = features(dit.network, states.t), features(dit.network, states.t, np.full(len(states), K))
    for name in plain:
        np.testing.assert_array_equal(plain[name], none[name])
    joined = TemporalBlock(dit.network).joined(states.t, states.y).data
    np.testing.assert_array_equal(joined, np.concatenate(list(found.values()), axis=1))


def test_every_condition_is_all_pairs():
    t, y = every_condition(np.array([5, 9]), 2)
    assert list(zip(t.tolist(), y.tolist(), strict=True)) == [(5, 0), (5, 1), (5, 2), (9, 0), (9, 1), (9, 2)]


@pytest.mark.parametrize("kind", activations.KINDS)
def test_tables_of_temporal_layers_hold_every_class(run, dit, recorded, kind):
    """A modulation's row covers its input at that t for all classes, not only for the recorded ones; others' do not."""
    name, other = "blocks.1.adaLN_modulation.1.input", "blocks.1.attn.qkv.input"
    specs, trajectories = {name: QSpec(8), other: QSpec(8)}, recorded.trajectories
    tables = activations.step_tables(run.network, trajectories, specs, kind=kind, constant=[name])
    alone = activations.step_tables(run.network, trajectories, {name: QSpec(8)}, kind=kind, constant=[name])
    block = TemporalBlock(dit.network)
    for step, t in enumerate(trajectories.t):
        told, y = every_condition(np.array([t]), K)
        with no_grad():
            u = ops.silu(ops.add(block.mlp(told), block.table(y))).data
        want = minmax(u, QSpec(8))
        for table in (tables, alone):
            np.testing.assert_allclose(table[name][step].scale, want.scale, rtol=1e-5)
    if kind == "exact":
        seen = unit_inputs(run.network, "blocks.1.attn.qkv", trajectories.at([2]))[0]
        np.testing.assert_allclose(tables[other][2].scale, minmax(seen, QSpec(8)).scale, rtol=1e-6)


def test_coverages(dit, run):
    layers = set(run.layers)
    assert coverage("full", dit.network).float_weights == frozenset()
    assert coverage("ends8", dit.network).eight == {"x_embedder.proj", "final_layer.linear"}
    released = coverage("released", dit.network)
    assert released.float_weights == set(temporal_layers(dit.network)) < layers
    assert released.float_inputs == released.float_weights | {"x_embedder.proj"}


def test_bit_operations_count_every_head(recorded):
    """Float: 32 x 32 for each multiplication, written out for the tiny network."""
    made = METHODS["nearest"](tiny_session(recorded, weight_bits=32, input_bits=32))
    d, tokens, hidden = TINY_DIT.width, TINY_DIT.tokens, TINY_DIT.mlp_ratio * TINY_DIT.width
    block = tokens * (4 * d * d + 2 * d * hidden) + 6 * d * d + 2 * tokens * tokens * d
    rest = tokens * 2 * 16 * d + 256 * d + d * d + 2 * d * d
    assert bit_operations(made) == 1024 * (TINY_DIT.depth * block + rest)


# ------------------------------------------------------------------ quantizers of other kinds, in a model and its file


@pytest.fixture
def mixed(recorded):
    """A model with every kind of quantizer that there is."""
    run = tiny_session(recorded, weight_bits=4, input_bits=8).start("any")
    run.nearest_weights()
    run.shared_inputs()
    quantizers, steps = activation_quantizers(run.network), recorded.trajectories.steps
    quantizers["blocks.0.attn.product.probs"].set(GridTable([SoftmaxRegions(8, 1 + s % 2) for s in range(steps)]))
    quantizers["blocks.1.attn.product.probs"].set(SoftmaxRegions(8, 2))
    quantizers["blocks.0.mlp.fc2.input"].set(SignSplit(8, 0.17 / 127, 0.02))
    quantizers["blocks.1.mlp.fc2.input"].set(GridTable([SignSplit(8, 0.17 / 127, 0.01 + s) for s in range(steps)]))
    quantizers["blocks.0.attn.qkv.input"].set(PerToken(8))
    quantizers["blocks.1.attn.qkv.input"].set(PerToken(8, 4))
    grouped = run.layers["blocks.0.mlp.fc1"]
    grouped.layer = replace_weight(grouped.layer, run.weight("blocks.0.mlp.fc1"))
    spec = QSpec(4, signed=True, axis=0)
    grouped.quantize_weight(group_qparams(minmax, run.weight("blocks.0.mlp.fc1"), spec, 4))
    branched, rng = run.layers["blocks.1.mlp.fc2"], np.random.default_rng(0)
    branched.branch = tuple(rng.standard_normal(s).astype(np.float32) for s in ((8, 2), (2, 16)))
    return run.finish()


def replace_weight(layer, weight):
    layer.weight = Parameter(weight)
    return layer


def test_file_and_back(mixed, tmp_path, recorded):
    mixed.save(tmp_path / "a.safetensors")
    again = load_quantized(str(tmp_path / "a.safetensors"))
    states = recorded.trajectories
    for step, t in enumerate(states.t.tolist()):
        want = mixed.denoiser()(states.x[step], t, step, states.y)
        np.testing.assert_array_equal(again.denoiser()(states.x[step], t, step, states.y), want)
    assert again.quantizers()["blocks.0.attn.product.probs"].table[1] == SoftmaxRegions(8, 2)
    assert again.quantizers()["blocks.1.attn.qkv.input"].qparams == PerToken(8, 4)
    assert again.layers["blocks.0.mlp.fc1"].weight_qparams.scale.size == 16 * 2
    assert again.size_bytes() == mixed.size_bytes() and bit_operations(again) == bit_operations(mixed)
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_tables_of_grids_follow_the_step(mixed):
    quantizer = mixed.quantizers()["blocks.0.attn.product.probs"]
    assert mixed.has_tables()
    for step in range(4):
        mixed.at_step(step)
        assert quantizer.qparams.shift == 1 + step % 2


def test_a_branch_takes_the_float_input(mixed, dit):
    """y = layer(q(x)) + L R x."""
    layer = mixed.layers["blocks.1.mlp.fc2"]
    mixed.at_step(2)
    x = Tensor(np.random.default_rng(1).standard_normal((2, 4, 16)).astype(np.float32))
    left, right = layer.branch
    with no_grad():
        want = layer.layer(layer.input(x)).data + x.data @ right.T @ left.T
        np.testing.assert_allclose(layer(x).data, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("blocks.0.attn.product.probs.shift"),
        lambda t: t.update({"blocks.0.attn.product.probs.shift": np.full(4, 9, np.uint8)}),
        lambda t: t.update({"blocks.0.attn.product.probs.shift": np.full(3, 1, np.uint8)}),
        lambda t: t.update({"blocks.0.mlp.fc2.input.positive": np.array(-1, np.float32)}),
        lambda t: t.pop("blocks.1.mlp.fc2.branch.right"),
        lambda t: t.update({"blocks.1.mlp.fc2.branch.right": np.zeros((3, 16), np.float32)}),
        lambda t: t.update({"blocks.0.mlp.fc1.weight_scale": np.ones(17, np.float32)}),
    ],
)
def test_files_that_do_not_fit(mixed, tmp_path, damage):
    from refquant import io

    mixed.save(tmp_path / "a.safetensors")
    found = io.load(tmp_path / "a.safetensors", kind="quantized")
    tensors = dict(found.tensors)
    damage(tensors)
    io.save(tmp_path / "b.safetensors", tensors, found.metadata)
    with pytest.raises(CheckpointError, match="do not fit together"):
        load_quantized(str(tmp_path / "b.safetensors"))


# ------------------------------------------------------------------ the methods that know nothing of transformers

SHORT = {"tfmq": {"tiar_iterations": 2}, "ptqd": {"on": "squant", "images": 2}}
GENERAL = ["nearest", "squant", "ptq4dm", "brecq", "importance", "qdiffusion", "ptqd", "tfmq"]


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("bits", [(32, 32), (4, 8)])
def test_methods_made_for_unets(recorded, name, bits):
    """W32A32 gives the float answers back; W4A8 gives finite ones, of its own."""
    session = tiny_session(recorded, weight_bits=bits[0], input_bits=bits[1])
    made = METHODS[name](session, **SHORT.get(name, {}))
    trajectories, t = recorded.trajectories, int(recorded.trajectories.t[1])
    got = made.denoiser()(trajectories.x[1], t, 1, trajectories.y)
    want = recorded.model.denoiser()(trajectories.x[1], t, 1, trajectories.y)
    assert np.isfinite(got).all()
    if bits == (32, 32):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    else:
        assert 0 < np.abs(got - want).max()


def test_cached_features_are_refused_with_classes(recorded):
    with pytest.raises(RangeError, match="one for each of 4 classes"):
        METHODS["tfmq"](tiny_session(recorded), features="cached")


def test_observed_values_are_those_of_asking(recorded):
    """The observers see the class, too: other classes, other ranges."""
    network = wrap(recorded.model.network)[0]
    states = recorded.trajectories.at([0])
    name = "blocks.0.adaLN_modulation.1.input"
    told = observe(network, states, 0)[name].minmax(QSpec(8))
    other = observe(network, replace(states, y=np.full(len(states), K)), 0)[name].minmax(QSpec(8))
    assert told.scale != other.scale
