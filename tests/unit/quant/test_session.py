"""A run of a method: resumed after a kill it ends with the same bits, on any number of threads; states are its own."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from toys import CALIBRATION, tiny_model, tiny_session

import refquant.quant.blocks as blocks
from refquant import io
from refquant.errors import CheckpointError, RangeError, UnknownNameError
from refquant.quant.calibrate import CalibrationConfig
from refquant.quant.methods import METHODS
from refquant.quant.wrap import activation_quantizers
from refquant.threads import using_threads

posix = pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
SHORT = {"tfmq": {"tiar_iterations": 2}, "ptqd": {"on": "nearest", "images": 2}}
LEARNING = ("importance", "qdiffusion", "tfmq")


def made(method, path, given, **options):
    """The bytes of the file that a method writes."""
    METHODS[method](tiny_session(given, weight_bits=4, **options), **SHORT.get(method, {})).save(path)
    return path.read_bytes()


class Killed(BaseException):
    """What no code catches."""


# ------------------------------------------------------------------ once, and what resumes


def test_a_part_is_computed_once(calibration, tmp_path):
    """The second run takes it from the file, bit for bit, and computes what is not there."""
    session = tiny_session(calibration, state=tmp_path / "s")
    found = {"a": np.arange(3, dtype=np.int8), "b": np.float32([[0.1]])}
    run = session.start("any")
    assert run.once("unit x", lambda: found).keys() == found.keys()
    run.once("unit x", pytest.fail)
    again = session.start("any")
    for name, value in again.once("unit x", pytest.fail).items():
        assert value.dtype == found[name].dtype
        np.testing.assert_array_equal(value, found[name])
    other = again.once("unit x.y", lambda: {"a": np.zeros(1)})  # a name that only begins alike
    assert other.keys() == {"a"} and other["a"].shape == (1,)


def test_without_a_state_file_nothing_is_written(calibration, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_session(calibration).start("any").once("part", lambda: {"a": np.zeros(1)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", LEARNING)
def test_a_killed_run_resumes_with_the_same_bits(calibration, method, tmp_path, monkeypatch):
    """Killed at the 2nd and again at the 7th unit; the resumed run repeats none that was finished."""
    whole = made(method, tmp_path / "whole", calibration)
    original, state, begun = blocks.reconstruct, tmp_path / "state", []

    def counted(*arguments, **options):
        begun.append(arguments[1][0].name)
        if len(begun) in (2, 8):
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(blocks, "reconstruct", counted)
    for _ in range(2):
        with pytest.raises(Killed):
            made(method, tmp_path / "file", calibration, state=state)
    assert made(method, tmp_path / "file", calibration, state=state) == whole
    units = len({*begun})
    assert len(begun) == units + 2  # each unit once, but the two at which it was killed
    made(method, tmp_path / "file", calibration, state=state)
    assert len(begun) == units + 2  # nothing is left to do


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from toys import tiny_model, tiny_session
from refquant.quant.methods import METHODS

def die(original, calls=[]):  # at the third os.replace: a state is written, and not yet in its place
    def wrapped(*args):
        calls.append(1)
        if len(calls) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return wrapped

os.replace = die(os.replace)
METHODS["tfmq"](tiny_session(tiny_model(), weight_bits=4, state=Path(sys.argv[2])), tiar_iterations=2)
"""


@posix
def test_kill_minus_nine_in_the_middle_of_a_save(calibration, tmp_path):
    """The state holds the three parts before, whole; resumed by another process, the file has the same bytes."""
    folder, state = os.path.dirname(sys.modules["toys"].__file__), tmp_path / "state"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "REFQUANT_NUM_THREADS": "2"}
    child = subprocess.run([sys.executable, "-c", CHILD, folder, str(state), "4"], env=environment, timeout=300)
    assert child.returncode == -signal.SIGKILL
    parts = {name.split("/")[0] for name in io.load(state, kind="quantize-state").tensors}
    assert parts == {"tiar", "importance", "unit conv_in"}
    assert made("tfmq", tmp_path / "a", calibration, state=state) == made("tfmq", tmp_path / "b", calibration)


# ------------------------------------------------------------------ whose state it is


@pytest.fixture(scope="module")
def state(calibration, tmp_path_factory):
    """The state of a run that was killed at its second unit."""
    path = tmp_path_factory.mktemp("state") / "s"
    tiny_session(calibration, weight_bits=4, state=path).start("brecq", grain="block").once(
        "unit conv_in", lambda: {"losses": np.zeros(3, np.float32)}
    )
    return path


@pytest.mark.parametrize(
    "options",
    [{"weight_bits": 3}, {"input_bits": 6}, {"coverage": "layers"}, {"states": 5}, {"effort": {"iterations": 4}},
     {"effort": {"seed": 1}}, {"sampling": "uniform"}],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_another_recipe_is_refused(calibration, state, options):
    session = tiny_session(calibration, **{"weight_bits": 4, "state": state, **options})
    with pytest.raises(CheckpointError, match="belongs to another recipe.*remove the file"):
        session.start("brecq", grain="block")


def test_another_method_option_calibration_or_model_is_refused(model, calibration, state):
    """Models are told apart by their weights and schedule, whatever their metadata say."""
    tiny_session(calibration, weight_bits=4, state=state).start("brecq", grain="block")  # the right one
    before = state.read_bytes()
    for given, method, options in (
        (calibration, "tfmq", {"grain": "block"}),
        (calibration, "brecq", {"grain": "layer"}),
        (replace(model, metadata={}), "brecq", {"grain": "block", "more": 1}),
        (tiny_model(seed=1), "brecq", {"grain": "block"}),
        (tiny_model(timesteps=21), "brecq", {"grain": "block"}),
        (tiny_model(prediction="v"), "brecq", {"grain": "block"}),
    ):
        with pytest.raises(CheckpointError, match="another recipe"):
            tiny_session(given, weight_bits=4, state=state).start(method, **options)
    with pytest.raises(CheckpointError, match="another recipe"):
        tiny_session(model, replace(CALIBRATION, seed=1), weight_bits=4, state=state).start("brecq", grain="block")
    assert state.read_bytes() == before


def test_a_file_that_is_no_state(model, calibration, tmp_path):
    model.save(tmp_path / "m")
    (tmp_path / "half").write_bytes((tmp_path / "m").read_bytes()[:1000])
    for name in ("m", "half"):
        with pytest.raises(CheckpointError):
            tiny_session(calibration, state=tmp_path / name).start("brecq")


# ------------------------------------------------------------------ threads, and the rest


@pytest.mark.parametrize("method", ["squant", "ptq4dm", "ptqd", *LEARNING])
def test_threads_do_not_matter(model, method, tmp_path):
    """One worker and two: the same bytes, from the first trajectory on."""
    found = []
    for threads in (1, 2):
        with using_threads(threads):
            found.append(made(method, tmp_path / str(threads), model))
    assert found[0] == found[1]


def test_phases_add_up_their_seconds(calibration):
    run = tiny_session(calibration).start("any")
    with run.phase("a"):
        pass
    first = run.seconds["a"]
    with pytest.raises(KeyError), run.phase("a"):
        raise KeyError
    assert run.seconds["a"] > first >= 0 and set(run.seconds) == {"a"}


def test_the_two_searches_of_weights_and_inputs(calibration):
    """`forget_inputs` makes activations float again; unknown searches are named."""
    run = tiny_session(calibration).start("any")
    run.nearest_weights("minmax")
    run.shared_inputs("minmax")
    quantizers = activation_quantizers(run.network).values()
    assert all(q.qparams is not None for q in quantizers) and all(la.codes is not None for la in run.layers.values())
    run.forget_inputs()
    assert all(q.qparams is None and q.table is None for q in quantizers)
    for call in (run.nearest_weights, run.shared_inputs):
        with pytest.raises(UnknownNameError, match="mse, minmax"):
            call("kl")


def test_what_a_session_refuses(model):
    for options, words in (
        ({"weight_bits": 9}, "weight bits are 9"),
        ({"input_bits": 1}, "input bits are 1"),
        ({"states": 0}, "states is 0"),
    ):
        with pytest.raises(RangeError, match=words):
            tiny_session(model, **options)
    with pytest.raises(UnknownNameError, match="full, layers"):
        tiny_session(model, coverage="half").start("nearest")
    for field in ("images", "steps", "every"):
        with pytest.raises(RangeError, match=f"{field} is 0"):
            CalibrationConfig(**{field: 0})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    broken = tiny_model()
    broken.network.mid.block_1.conv1.weight.data[0, 0, 0, 0] = bad
    with pytest.raises(RangeError, match=r"mid\.block_1\.conv1\.weight holds NaN or infinity"):
        tiny_session(broken).start("nearest")
