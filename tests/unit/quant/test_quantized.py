"""The quantized file: the same bits for every method and option, equal bytes for equal recipes, damage is noticed."""

from dataclasses import replace

import numpy as np
import pytest
from toys import CALIBRATION, tiny_model, tiny_session

from refquant import io
from refquant.errors import CheckpointError
from refquant.quant.methods import METHODS
from refquant.quant.methods.ptqd import correct
from refquant.quant.observers import StepTable
from refquant.quant.quantized import load_quantized

# method, options of the method, options of the session
CASES = [
    ("nearest", {}, {"weight_bits": 2, "input_bits": 3}),
    ("nearest", {"search": "minmax"}, {"weight_bits": 6, "coverage": "layers"}),
    ("nearest", {}, {"weight_bits": 4, "input_bits": 32}),
    ("nearest", {}, {"weight_bits": 32, "input_bits": 6}),
    ("squant", {"activations": "sigma"}, {"weight_bits": 3, "coverage": "ends8"}),
    ("ptq4dm", {"labels": "released"}, {"weight_bits": 6, "input_bits": 2}),
    ("brecq", {}, {"weight_bits": 2, "coverage": "released"}),
    ("importance", {"loss": "mse"}, {"weight_bits": 3, "input_bits": 32}),
    ("qdiffusion", {}, {"weight_bits": 4, "coverage": "released"}),
    ("qdiffusion", {}, {"weight_bits": 6, "input_bits": 6}),
    ("ptqd", {"on": "nearest", "images": 2}, {"weight_bits": 4}),
    ("tfmq+ptqd", {"tiar_iterations": 2}, {"weight_bits": 4}),
    ("tfmq", {"tiar_iterations": 2}, {"weight_bits": 4}),
    ("tfmq", {"tiar_iterations": 2, "fsc": "temporal", "order": "registration"}, {"weight_bits": 2, "input_bits": 6}),
    ("tfmq", {"tiar_iterations": 2, "fsc": "none", "time_steps": 3}, {"weight_bits": 3, "coverage": "released"}),
    ("tfmq", {"tiar_iterations": 2, "features": "cached", "ranges": "running"}, {"weight_bits": 4, "input_bits": 3}),
    ("tfmq", {"tiar_iterations": 2, "features": "selected"}, {"weight_bits": 4, "input_bits": 32}),
]
IDS = [f"{i}-{m}-W{s.get('weight_bits')}A{s.get('input_bits', 8)}" for i, (m, _, s) in enumerate(CASES)]


def quantized(calibration, method, options, session):
    made = METHODS[method.removesuffix("+ptqd")](tiny_session(calibration, **session), **options)
    return correct(made, replace(CALIBRATION, images=2), bias="residual") if method.endswith("+ptqd") else made


def images(model):
    return np.random.default_rng(1).standard_normal((3, *model.image_shape), dtype=np.float32)


def same_answers(a, b, x):
    """Bit for bit, at every step of the sampler."""
    for step, t in enumerate(a.timesteps()):
        np.testing.assert_array_equal(a.denoiser()(x, int(t), step), b.denoiser()(x, int(t), step))


@pytest.mark.parametrize(("method", "options", "session"), CASES, ids=IDS)
def test_file_and_back(model, calibration, method, options, session, tmp_path):
    """The same bits of answers, codes, quantizers and recipe; saved again, the same bytes."""
    made = quantized(calibration, method, options, session)
    made.save(tmp_path / "q")
    back = load_quantized(str(tmp_path / "q"))
    same_answers(made, back, images(model))
    assert back.recipe == made.recipe and back.size_bytes() == made.size_bytes()
    assert np.isfinite(made.denoiser()(images(model), 15, 0)).all()
    for name, layer in made.layers.items():
        assert (layer.codes is None) == (back.layers[name].codes is None) or name in made.features
        if layer.codes is not None and name not in made.features:
            np.testing.assert_array_equal(back.layers[name].codes, layer.codes)
            assert back.layers[name].codes.dtype == layer.codes.dtype
    back.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "q").read_bytes()


def test_files_do_not_keep_what_is_not_used(calibration):
    """W4A32: no activation quantizers; W32: no codes; cached features: neither codes, bias nor range of their layer."""
    names = set(quantized(calibration, "nearest", {}, {"weight_bits": 4, "input_bits": 32}).tensors())
    assert not any(name.endswith((".scale", ".zero_point")) for name in names)
    names = set(quantized(calibration, "nearest", {}, {"weight_bits": 32}).tensors())
    assert not any(name.endswith(".codes") for name in names) and "conv_in.weight" in names
    cached = quantized(calibration, "tfmq", {"tiar_iterations": 2, "features": "cached"}, {"weight_bits": 4})
    kept = {name.split("temb_proj.")[1] for name in cached.tensors() if "temb_proj." in name}
    assert kept == {"feature.codes", "feature.scale", "feature.zero_point"}


@pytest.mark.parametrize(("method", "options"), [("nearest", {}), ("tfmq", {"tiar_iterations": 2})])
def test_equal_recipes_give_equal_bytes(calibration, method, options, tmp_path):
    """Recorded anew from the same model of another process' making; another seed gives others."""
    session = {"weight_bits": 4}
    quantized(calibration, method, options, session).save(tmp_path / "a")
    METHODS[method](tiny_session(tiny_model(), **session), **options).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = tiny_session(tiny_model(), replace(CALIBRATION, seed=5), **session)
    METHODS[method](other, **options).save(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() != (tmp_path / "a").read_bytes()


def test_tables_are_stepped_whenever_they_were_set(calibration):
    """The list of quantizers is made once; which of them have a table is asked at every step."""
    made = quantized(calibration, "nearest", {}, {"weight_bits": 4})
    assert made.quantizers() is made.quantizers() and not made.has_tables()
    made.at_step(1)
    quantizer = made.quantizers()["conv_in.input"]
    table = StepTable.of([replace(quantizer.qparams, scale=np.float32(1 + k)) for k in range(4)])
    quantizer.set(table)
    made.at_step(2)
    assert quantizer.qparams.scale == 3 and made.has_tables()


# ------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def file(calibration, tmp_path_factory):
    """A file with everything in it: 3-bit codes, tables, some cached features, a correction, split shortcuts no."""
    made = METHODS["ptqd"](tiny_session(calibration, weight_bits=3), on="nearest", images=2)
    cached = METHODS["tfmq"](tiny_session(calibration, weight_bits=3), tiar_iterations=2, features="cached")
    made.save(tmp_path_factory.mktemp("files") / "ptqd")
    path = tmp_path_factory.mktemp("files") / "cached"
    cached.save(path)
    found = io.load(path)
    correction = {f"correction.{k}": v for k, v in made.correction.arrays().items()}
    io.save(path, {**found.tensors, **correction}, found.metadata)
    load_quantized(str(path))
    return path


def refused(path, tmp_path, tensors=None, facts=None):
    found = io.load(path)
    io.save(tmp_path / "damaged", {**found.tensors, **(tensors or {})}, {**found.metadata, **(facts or {})})
    with pytest.raises(CheckpointError):
        load_quantized(str(tmp_path / "damaged"))


def test_missing_tensors_are_noticed(file, tmp_path):
    """One array of each kind, left out alone."""
    found = io.load(file)
    kinds = {name.split(".", 1)[name.startswith("correction")].rsplit(".", 2)[-1]: name for name in found.tensors}
    assert len(kinds) >= 10
    for name in kinds.values():
        io.save(tmp_path / "damaged", {k: v for k, v in found.tensors.items() if k != name}, found.metadata)
        with pytest.raises(CheckpointError):
            load_quantized(str(tmp_path / "damaged"))


@pytest.mark.parametrize(
    "name", ["extra", "conv_in.codes.more", "correction.std", "mid.block_1.temb_proj.weight", "conv_in.weight"]
)
def test_extra_tensors_are_noticed(file, tmp_path, name):
    shapes = {"mid.block_1.temb_proj.weight": (16, 32), "conv_in.weight": (8, 3, 3, 1)}
    refused(file, tmp_path, {name: np.zeros(shapes.get(name, 4), np.float32)})


@pytest.mark.parametrize(
    "name",
    ["conv_in.codes", "conv_in.weight_scale", "conv_in.weight_zero_point", "conv_in.bias", "conv_in.input.scale",
     "conv_in.input.zero_point", "mid.attn_1.product.probs.scale", "mid.block_1.temb_proj.feature.codes",
     "mid.block_1.temb_proj.feature.scale", "correction.gain", "correction.mean", "correction.timesteps"],
)  # fmt: skip
def test_wrong_shapes_are_noticed(file, tmp_path, name):
    """One row less, and one axis more."""
    array = io.load(file).tensors[name]
    refused(file, tmp_path, {name: array[:-1].copy()})
    refused(file, tmp_path, {name: array[None].copy()})


def test_tables_of_another_sampler_are_noticed(file, tmp_path):
    """Both arrays of a table one step short: they fit each other, and not the recipe."""
    tensors = io.load(file).tensors
    names = ("conv_in.input.scale", "conv_in.input.zero_point")
    refused(file, tmp_path, {name: tensors[name][:-1].copy() for name in names})


@pytest.mark.parametrize(
    ("group", "name", "spec"),
    [
        ("weights", "conv_in", {"bits": 2}),  # the codes are of 3
        ("weights", "conv_in", {"bits": 8}),
        ("weights", "conv_in", {"bits": 9}),
        ("weights", "conv_in", {"axis": None}),
        ("weights", "conv_in", {"depth": 1}),
        ("weights", "conv_in", {"symmetric": True}),
        ("weights", "no-such-layer", {}),
        ("activations", "conv_in.input", {"axis": 0}),
        ("activations", "conv_in.input", {"bits": "8"}),
        ("activations", "no.such.input", {}),
        ("features", "mid.block_1.temb_proj", {"bits": 2}),
        ("features", "no-such-layer", {}),
    ],
)
def test_wrong_specs_are_noticed(file, tmp_path, group, name, spec):
    specs = io.load(file).metadata["specs"]
    given = specs[group].get(name, next(iter(specs[group].values())))
    refused(file, tmp_path, facts={"specs": {**specs, group: {**specs[group], name: {**given, **spec}}}})


@pytest.mark.parametrize("key", ["specs", "recipe", "network", "schedule", "timesteps", "split", "model"])
def test_metadata_that_lack_something_are_noticed(file, tmp_path, key):
    found = io.load(file)
    io.save(tmp_path / "damaged", found.tensors, {k: v for k, v in found.metadata.items() if k != key})
    with pytest.raises(CheckpointError):
        load_quantized(str(tmp_path / "damaged"))


def test_codes_of_another_type_are_noticed(file, tmp_path):
    """Floats in the place of codes."""
    codes = io.load(file).tensors["conv_in.codes"]
    refused(file, tmp_path, {"conv_in.codes": codes.astype(np.float32)})
