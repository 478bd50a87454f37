"""The training loop on a network of 31 weights: the same bits whatever interrupts it, and what it refuses."""

import errno
import os
from dataclasses import replace

import numpy as np
import pytest

from refquant import io
from refquant.autograd import Tensor, ops
from refquant.errors import CheckpointError, RangeError
from refquant.nn.fit import FitConfig, epoch_order, fit
from refquant.nn.layers import Linear
from refquant.nn.module import Module
from refquant.threads import set_threads

CFG = FitConfig(steps=30, batch=8, rate=3e-2, warmup=3, decay=10, average=0.8, seed=4, chunk=3)
X = np.random.default_rng(0).standard_normal((50, 3), dtype=np.float32)
DATA = np.hstack([X, np.sin(X.sum(axis=1, keepdims=True) / 2)])


@pytest.fixture(autouse=True)
def default_threads():
    yield
    set_threads(None)


class Net(Module):
    """3 -> 6 -> 1."""

    def __init__(self, width=6):
        rng = np.random.default_rng(1)
        self.a, self.b = Linear(rng, 3, width), Linear(rng, width, 1)

    def __call__(self, x):
        return self.b(ops.silu(self.a(x)))


class Interrupted(Exception):
    pass


def run(cfg=CFG, state=None, stop_at=None, spoil_at=None, recipe=None, net=None, save_seconds=0.0):
    """Train; weights as one vector and losses. The data of step `stop_at` cannot be had, that of `spoil_at` is NaN."""
    net = net or Net()

    def batch(step):
        if step == stop_at:
            raise Interrupted
        rows = DATA[epoch_order(len(DATA), cfg, step)]
        rows = rows * np.float32(np.nan) if step == spoil_at else rows
        return [rows[i : i + cfg.chunk] for i in range(0, len(rows), cfg.chunk)]

    def loss(rows):
        return ops.mse(net(Tensor(rows[:, :3])), rows[:, 3:])

    losses = fit(net, batch, loss, cfg, state=state, recipe=recipe, save_seconds=save_seconds, quiet=True)
    return np.concatenate([p.data.ravel() for p in net.parameters()]), losses


def same(got, want):
    """Weights and losses agree bit for bit."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole():
    """The run that nothing interrupts."""
    return run()


# --- the run itself ---


def test_loss_goes_down():
    losses = run(replace(CFG, steps=200))[1]
    assert losses.shape == (200,) and losses[-20:].mean() < 0.5 * losses[:20].mean()


def test_same_seed_same_bits(whole):
    same(run(), whole)
    assert not np.array_equal(run(replace(CFG, seed=5))[0], whole[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads, whole):
    """Chunks of 3, 3 and 2 on any number of threads."""
    set_threads(threads)
    same(run(), whole)


def test_chunks_weigh_as_many_examples_as_they_have():
    """The gradient of chunks 3, 3, 2 is the gradient of the batch: only the rounding differs."""
    np.testing.assert_allclose(run()[0], run(replace(CFG, chunk=8))[0], rtol=1e-3, atol=1e-4)


def test_keeping_a_state_changes_nothing(whole, tmp_path):
    for seconds in (0.0, 1e9):
        same(run(state=tmp_path / f"{seconds}", save_seconds=seconds), whole)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["0.0", "1000000000.0"]  # nothing temporary is left


def test_module_gets_the_averaged_weights(tmp_path):
    """The state holds both; the network ends with the average, and w is not it."""
    weights, _ = run(state=tmp_path / "s")
    state = io.load(tmp_path / "s", kind="train-state")
    np.testing.assert_array_equal(weights, state.tensors["average"])
    assert not np.array_equal(weights, state.tensors["weights"])


@pytest.mark.parametrize("size", [8, 9, 50])
def test_an_epoch_shows_every_example_at_most_once(size):
    """The batches of an epoch are disjoint, and the next epoch has another order."""
    epoch = size // CFG.batch
    seen = [np.concatenate([epoch_order(size, CFG, e * epoch + i) for i in range(epoch)]) for e in range(3)]
    for order in seen:
        assert len(set(order)) == epoch * CFG.batch and 0 <= order.min() and order.max() < size
    assert any((seen[0] != other).any() for other in seen[1:])


# --- interrupted ---


@pytest.mark.parametrize("stop_at", [1, 7, 29])
def test_resumed_is_uninterrupted(stop_at, whole, tmp_path):
    with pytest.raises(Interrupted):
        run(state=tmp_path / "s", stop_at=stop_at)
    assert io.load(tmp_path / "s").metadata["step"] == stop_at
    same(run(state=tmp_path / "s"), whole)


def test_interrupted_at_every_step(whole, tmp_path):
    for stop_at in range(1, CFG.steps):
        with pytest.raises(Interrupted):
            run(state=tmp_path / "s", stop_at=stop_at)
    same(run(state=tmp_path / "s"), whole)


def test_interrupted_before_the_first_save(whole, tmp_path):
    with pytest.raises(Interrupted):
        run(state=tmp_path / "s", stop_at=5, save_seconds=1e9)
    assert list(tmp_path.iterdir()) == []
    same(run(state=tmp_path / "s"), whole)


def test_a_finished_run_stays_finished(whole, tmp_path):
    """Started again, it asks for no data and gives the same weights and losses."""
    run(state=tmp_path / "s")
    same(run(state=tmp_path / "s"), whole)


def test_the_state_may_be_of_other_threads(whole, tmp_path):
    for threads, stop_at in ((1, 10), (3, 20)):
        set_threads(threads)
        with pytest.raises(Interrupted):
            run(state=tmp_path / "s", stop_at=stop_at)
    same(run(state=tmp_path / "s"), whole)


# --- the state of another run, or another length ---


def test_another_run_is_refused_by_name(tmp_path):
    with pytest.raises(Interrupted):
        run(state=tmp_path / "s", stop_at=5, recipe={"data": "sine", "layers": (3, 6, 1)})
    before = (tmp_path / "s").read_bytes()
    same_recipe = {"data": "sine", "layers": (3, 6, 1)}
    for cfg, recipe, names in (
        (replace(CFG, rate=1e-2), same_recipe, "rate"),
        (replace(CFG, seed=5, chunk=4), same_recipe, "seed, chunk"),
        (replace(CFG, batch=4, average=0.5), same_recipe, "batch, average"),
        (CFG, {**same_recipe, "data": "cosine"}, "data"),
        (replace(CFG, clip=2.0), {**same_recipe, "layers": (3, 7, 1)}, "clip, layers"),
    ):
        with pytest.raises(CheckpointError, match=rf"another run \({names} differ\)\. Repeat .* or remove"):
            run(cfg, state=tmp_path / "s", recipe=recipe)
        assert (tmp_path / "s").read_bytes() == before
    same(run(state=tmp_path / "s", recipe=same_recipe), run())  # tuples come back from the file as lists


def test_another_network_is_refused(tmp_path):
    run(state=tmp_path / "s")
    with pytest.raises(CheckpointError, match="does not fit this network. Remove the file"):
        run(state=tmp_path / "s", net=Net(width=5))


@pytest.mark.parametrize("steps", [20, 25, 31, 60])
@pytest.mark.parametrize("stop_at", [5, 10])
def test_length_may_change_before_the_decay(steps, stop_at, tmp_path):
    """Decay is the last 10 steps: up to step 10 a run of 30 is one of 20, 25, 31 or 60, bit for bit."""
    with pytest.raises(Interrupted):
        run(state=tmp_path / "s", stop_at=stop_at)
    cfg = replace(CFG, steps=steps)
    same(run(cfg, state=tmp_path / "s"), run(cfg))


@pytest.mark.parametrize(("stop_at", "steps"), [(25, 40), (25, 27), (15, 20), (15, 12), (30, 60), (22, 31)])
def test_length_may_not_change_in_the_decay(stop_at, steps, tmp_path):
    """Steps of either length's decay are done: the rates were, or would have been, different ones."""
    if stop_at == CFG.steps:
        run(state=tmp_path / "s")
    else:
        with pytest.raises(Interrupted):
            run(state=tmp_path / "s", stop_at=stop_at)
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(CheckpointError, match=r"\(steps differ\)"):
        run(replace(CFG, steps=steps), state=tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before


# --- what goes wrong ---


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign"])
def test_damaged_state_is_refused_and_kept(damage, tmp_path):
    path = tmp_path / "s"
    run(state=path)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-7] ^= 4
    path.write_bytes({"truncate": content[:-5], "empty": b"", "foreign": b"\x80\x04pickle"}.get(damage, content))
    before, net = path.read_bytes(), Net()
    with pytest.raises(CheckpointError, match="damaged|foreign|pickle"):
        run(state=path, net=net)
    assert path.read_bytes() == before
    np.testing.assert_array_equal(net.a.weight.data, Net().a.weight.data)


def test_divergence_is_told_and_the_last_state_stays(tmp_path):
    """A rate of 1e30 makes the second loss infinite; the state is that of the step before, and finite."""
    cfg = replace(CFG, rate=1e30, warmup=0, clip=1e30)
    with pytest.raises(RangeError, match=r"diverged at step 1: .* lower rate than 1e\+30.* warm-up than 0 steps"):
        run(cfg, state=tmp_path / "s")
    assert io.load(tmp_path / "s").metadata["step"] == 1


def test_the_step_that_diverges_changes_nothing(tmp_path):
    """NaN in the data of step 6 stops the run there; with the right data it goes on as if nothing had been."""
    with pytest.raises(RangeError, match="diverged at step 6: loss nan"):
        run(state=tmp_path / "s", spoil_at=6)
    assert io.load(tmp_path / "s").metadata["step"] == 6
    same(run(state=tmp_path / "s"), run())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_old_state(call, whole, tmp_path, monkeypatch):
    """The fourth save fails for want of space: one error with a remedy, the third state stays, nothing else is left."""
    saves, original = [], getattr(os, call)

    def full_at_last(*args):
        saves.append(args)
        if len(saves) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(io.os, call, full_at_last)
        with pytest.raises(CheckpointError, match="not written, No space left on device. Free some space .*unchanged"):
            run(state=tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert io.load(tmp_path / "s").metadata["step"] == 3
    same(run(state=tmp_path / "s"), whole)


def test_folder_of_the_state_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="Make the folder first"):
        run(state=tmp_path / "nowhere" / "s")


def test_fewer_examples_than_a_batch():
    with pytest.raises(RangeError, match="has 50 examples, fewer than one batch of 51. Use a smaller batch"):
        run(replace(CFG, batch=51))


@pytest.mark.parametrize("name", ["steps", "batch", "chunk"])
def test_counts_start_at_one(name):
    with pytest.raises(RangeError, match=f"{name} is 0; it must be at least 1"):
        replace(CFG, **{name: 0})


# --- the progress bar ---


def test_bar_goes_to_stderr_and_quiet_is_quiet(capsys):
    """Standard output is for results; a bar that is no terminal's, or not wanted, stays silent."""
    run()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""
