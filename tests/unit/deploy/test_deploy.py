"""Integer execution: the same codes as fake quantization promised, on NumPy and on every kernel of this machine."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from refquant import kernels
from refquant.autograd import Tensor, no_grad
from refquant.deploy import lower
from refquant.deploy.plan import plan
from refquant.deploy.program import INTEGER, Convolve, reads
from refquant.deploy.runtime import BATCH_SIZES, ENGINES, Executor, IntegerDenoiser, _convolve, integer_denoiser
from refquant.errors import LoweringError, RangeError, ShapeError, UnknownNameError
from refquant.metrics import psnr
from refquant.quant.affine import dequantize, quantize
from refquant.quant.methods import METHODS
from refquant.quant.reconstruct import ReconstructionConfig
from refquant.quant.session import Session
from refquant.threads import using_threads

FAST = ReconstructionConfig(iterations=4, batch=8)
VARIANTS = {
    "nearest W8A8": ("nearest", 8, 8, {}),
    "nearest W4A8": ("nearest", 4, 8, {}),
    "nearest W2A4": ("nearest", 2, 4, {}),
    "split": ("qdiffusion", 4, 8, {"step_iterations": 0}),
    "tables": ("tfmq", 4, 8, {"tiar_iterations": 4}),
    "cache": ("tfmq", 4, 8, {"tiar_iterations": 4, "features": "cached"}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def quantized(request, calibration):
    name, weight_bits, input_bits, options = VARIANTS[request.param]
    session = Session(calibration, weight_bits, input_bits, reconstruction=FAST, states=8)
    return METHODS[name](session, **options)


@pytest.fixture
def x(model):
    return np.random.default_rng(3).standard_normal((3, *model.image_shape), dtype=np.float32)


def traced(program, engine, x, step):
    seen = {}
    nhwc = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    Executor(program, engine)(nhwc, step, lambda name, value: seen.__setitem__(name, value.copy()))
    return seen


def test_every_value_is_equal_on_ref_and_on_every_isa(quantized, x):
    """All tensors of a whole step, integer sums after their scale, codes, probabilities: not one bit differs."""
    program = lower(quantized)
    for step in (0, len(program.timesteps) - 1):
        want = traced(program, "ref", x, step)
        for isa in kernels.supported():
            with kernels.using(isa):
                got = traced(program, "c", x, step)
            assert got.keys() == want.keys()
            for name in want:
                np.testing.assert_array_equal(got[name], want[name], err_msg=f"{isa} {name}")


def test_a_layer_gives_what_fake_quantization_promised(quantized):
    """The same codes in: the sums are those of the dequantized values up to float32's rounding, so that the next
    quantizer finds the same codes wherever its input is not on the edge of two."""
    program = lower(quantized)
    rng = np.random.default_rng(0)
    for op in (o for o in program.operations if isinstance(o, Convolve)):
        layer = quantized.layers[op.name]
        quantized.at_step(0)
        q = layer.input.qparams
        codes = rng.integers(q.spec.qmin, q.spec.qmax + 1, (2, *program.values[op.x].shape)).astype(np.uint8)
        with no_grad():
            wanted = layer.layer(Tensor(dequantize(codes, q).astype(np.float64))).data
        residual = rng.standard_normal(wanted.shape).astype(np.float32) if op.residual is not None else None
        output = op.outputs[0]
        wanted = wanted - layer.layer.bias.data + output.bias + (0 if residual is None else residual)
        got = np.empty(wanted.shape, np.float32)
        _convolve(op, codes, residual, 0, got)
        reach = np.abs(wanted).max()
        assert np.abs(got - wanted).max() <= 4 * np.spacing(np.float32(reach)), op.name  # product, bias, residual
        fresh = quantized.layers["conv_out"].input.qparams  # any quantizer will do
        edge = np.abs((wanted / float(fresh.scale)) % 1 - 0.5) < 1e-4 * reach / float(fresh.scale)
        np.testing.assert_array_equal(quantize(got, fresh)[~edge], quantize(wanted, fresh)[~edge])


def test_images_are_those_of_fake_quantization(quantized, x):
    """Codes flip only where a float sum lies on an edge: at least 45 dB in one step."""
    t = int(quantized.timesteps()[0])
    fake, whole = quantized.denoiser()(x, t, 0), integer_denoiser(quantized)(x, t, 0)
    assert psnr(whole, fake, data_range=float(np.ptp(fake))) >= 45


def test_time_layers_are_gone_and_their_features_are_in_the_biases(quantized):
    program = lower(quantized)
    names = {op.name for op in program.operations if isinstance(op, Convolve)}
    assert not any("temb" in name for name in names)
    first = next(op for op in program.operations if isinstance(op, Convolve) and op.name.endswith("conv1"))
    assert len(first.outputs) == len(program.timesteps)
    assert not np.array_equal(first.outputs[0].bias, first.outputs[-1].bias)


def test_values_alive_together_do_not_overlap(quantized):
    program = lower(quantized)
    offsets, size = plan(program, 3)
    last = {0: -1} | {v: i for i, op in enumerate(program.operations) for v in reads(op)}
    last[program.operations[-1].out] = len(program.operations)
    first = {0: -1} | {op.out: i for i, op in enumerate(program.operations)}
    spans = {v: (offsets[v], offsets[v] + 3 * value.bytes) for v, value in enumerate(program.values)}
    for a in spans:
        for b in spans:
            alive = a < b and first[a] <= last[b] and first[b] <= last[a]
            assert not alive or spans[a][1] <= spans[b][0] or spans[b][1] <= spans[a][0]
    assert size < sum(3 * value.bytes for value in program.values)
    assert all(offset % 64 == 0 for offset in offsets)


def test_nothing_is_allocated_by_a_second_step(quantized, x):
    run = Executor(lower(quantized))
    nhwc = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    assert run(nhwc, 0).ctypes.data == run(nhwc, 1).ctypes.data


@pytest.mark.parametrize("engine", ENGINES)
def test_a_recorded_step_computes_anew(quantized, x, engine):
    """The second run of a step repeats calls: on what the input is now, with the numbers of that step."""
    program, rng = lower(quantized), np.random.default_rng(5)
    images = [rng.standard_normal((2, *x.shape[2:], x.shape[1]), dtype=np.float32) for _ in range(3)]
    run = Executor(program, engine)
    for step in (0, 1, 0, 1):
        for image in images:
            np.testing.assert_array_equal(run(image, step).copy(), Executor(program, engine)(image, step))


def test_settings_of_a_recording_are_those_of_the_call(quantized, x):
    """Another kernel, number of threads or batch size is another recording; few batch sizes keep their memory."""
    program = lower(quantized)
    run, nhwc = Executor(program), np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    want = run(nhwc, 0).copy()
    for isa in kernels.supported():
        for threads in (1, 2):
            with kernels.using(isa), using_threads(threads):
                np.testing.assert_array_equal(run(nhwc, 0), want)
    for images in (1, 2, 3, 1):
        np.testing.assert_array_equal(run(nhwc[:images], 0), want[:images])
    assert len(run._own.rooms) == BATCH_SIZES


def test_threads_have_memory_of_their_own(quantized):
    """Four callers at once, each with its own images and steps, get what they get one after the other."""
    program, rng = lower(quantized), np.random.default_rng(7)
    run = Executor(program)
    todo = [(rng.standard_normal((1 + i % 3, *program.values[0].shape), dtype=np.float32), i % 2) for i in range(24)]
    want = [Executor(program)(*job).copy() for job in todo]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda job: run(*job).copy(), todo))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_number_that_is_none_is_an_error_also_when_repeated(quantized, x):
    run, nhwc = Executor(lower(quantized)), np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    want = run(nhwc, 0).copy()
    with pytest.raises(RangeError, match="nan"):
        run(np.where(np.arange(nhwc.shape[1])[:, None, None] == 3, np.float32(np.nan), nhwc), 0)
    np.testing.assert_array_equal(run(nhwc, 0), want)


def test_codes_that_three_layers_share_are_made_once(quantized):
    """q, k and v of attention read one normalised image: where their ranges agree, its codes are made once."""
    program = lower(quantized)
    for prefix in {op.name.rpartition(".")[0] for op in program.operations if getattr(op, "name", "").endswith(".q")}:
        reading = [op.x for op in program.operations if getattr(op, "name", "")[:-1] == f"{prefix}."]
        ranges = {str(quantized.layers[f"{prefix}.{part}"].input.qparams) for part in "qkv"}
        assert len(set(reading)) == len(ranges)


def test_description_counts_integer_operations(quantized):
    program = lower(quantized)
    found = program.describe()
    assert found["integer"] == sum(isinstance(op, INTEGER) for op in program.operations)
    assert found["integer"] + found["float islands"] == len(program.operations)


@pytest.mark.parametrize(
    ("coverage", "input_bits", "first"),
    [("layers", 8, r"product\.q"), ("released", 8, "conv_in"), ("full", 32, r"conv_in\.input")],
)
def test_what_has_no_integer_form_is_refused_by_name(calibration, coverage, input_bits, first):
    model = METHODS["nearest"](Session(calibration, 8, input_bits, coverage=coverage))
    with pytest.raises(LoweringError, match=first):
        lower(model)


def test_a_step_that_was_not_lowered_is_refused(quantized, x):
    eps = IntegerDenoiser(quantized)
    t = quantized.timesteps()
    for bad in ((int(t[0]) + 1, 0), (int(t[0]), len(t)), (int(t[0]), -1)):
        with pytest.raises(RangeError, match="steps from"):
            eps(x, *bad)


def test_bad_calls_are_one_clear_error(quantized, x):
    with pytest.raises(UnknownNameError, match="ref, c"):
        Executor(lower(quantized), "gpu")
    with pytest.raises(ShapeError, match="float32"):
        Executor(lower(quantized))(x.astype(np.float64), 0)
