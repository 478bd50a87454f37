"""Training with classes: each image keeps its label, the network learns what a class looks like, a run resumes."""

from dataclasses import replace

import numpy as np
import pytest

import refquant.diffusion.train as module
from refquant.autograd import Tensor
from refquant.data.dataset import Dataset, to_float
from refquant.data.shapes import shapes
from refquant.diffusion.schedule import cosine
from refquant.diffusion.train import noisy_chunks, train
from refquant.errors import CheckpointError, RangeError
from refquant.nn.dit import DiT, DiTConfig
from refquant.nn.fit import FitConfig

NET = DiTConfig(8, 1, patch=4, width=8, depth=1, heads=2, classes=5)
CFG = FitConfig(steps=8, batch=6, rate=5e-3, warmup=3, decay=4, average=0.8, seed=2, chunk=4)
DATA = shapes(40, seed=0, size=8)


def run(cfg=CFG, data=DATA, net=NET, state=None, **options):
    network = DiT(net, np.random.default_rng(cfg.seed))
    losses = train(network, data, cosine(20), cfg, state=state, save_seconds=0, quiet=True, **options)
    return network, losses


def test_the_chosen_data_set_has_these_classes():
    assert set(DATA.labels) == set(range(NET.classes))


def test_every_image_keeps_its_label():
    """x_0, recovered from x_t and its noise, is an image of the data set whose label is y."""
    schedule, known = cosine(1000), to_float(DATA.images).transpose(0, 2, 3, 1)
    unique = replace(DATA, labels=np.arange(len(DATA)))  # each label names its image
    chunks = noisy_chunks(DATA.images, schedule, CFG, 3, labels=unique.labels)
    assert [len(c.y) for c in chunks] == [3, 3]
    for chunk in chunks:
        ab = schedule.alpha_bar[chunk.t].reshape(-1, 1, 1, 1)
        x_0 = (chunk.x_t - np.sqrt(1 - ab) * chunk.target) / np.sqrt(ab)
        distance = np.abs(x_0[:, None] - known).max(axis=(2, 3, 4))
        assert distance.argmin(axis=1).tolist() == chunk.y.tolist()


def test_labels_change_nothing_else():
    """The same images, noise and time-steps with and without them."""
    for a, b in zip(noisy_chunks(DATA.images, cosine(20), CFG, 1),
                    noisy_chunks(DATA.images, cosine(20), CFG, 1, labels=DATA.labels), strict=True):  # fmt: skip
        np.testing.assert_array_equal(a.x_t, b.x_t)
        np.testing.assert_array_equal(a.t, b.t)
        assert a.y is None and b.y is not None


def test_a_class_is_learned():
    """Two classes of one image each, black and white: asked for a class the network gives its image.

    At the noisiest step x_t says nothing of the image, so v = -x_0, and without a class it is between the two.
    """
    images = np.zeros((64, 1, 8, 8), np.uint8)
    images[32:] = 255
    data = Dataset("black and white", images, np.repeat(np.arange(2), 32))
    cfg = FitConfig(steps=300, batch=16, rate=1e-2, warmup=5, decay=100, average=0.5, seed=0, chunk=16)
    net, _ = run(cfg, data, replace(NET, classes=2, class_dropout=0.3), prediction="v")
    x = np.random.default_rng(0).standard_normal((32, 8, 8, 1)).astype(np.float32)
    x_0 = [-net(Tensor(x), np.full(32, 19), y=np.full(32, k)).data.mean() for k in (0, 1, 2)]
    assert x_0[0] < -0.6 and x_0[1] > 0.6 and x_0[0] + 0.1 < x_0[2] < x_0[1] - 0.1, x_0


@pytest.mark.parametrize("probability, learns", [(0.5, True), (1e-9, False)])
def test_no_class_is_learned_from_the_dropped(probability, learns):
    """Only where classes are dropped in training does the row of "no class" move."""
    net = replace(NET, class_dropout=probability)
    before = DiT(net, np.random.default_rng(CFG.seed)).y_embedder.embedding_table.weight.data[-1]
    after = run(net=net)[0].y_embedder.embedding_table.weight.data[-1]
    assert (np.abs(after - before).max() > 1e-3) == learns


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Killed after five steps; the classes dropped later are those of the run that was not."""
    whole, losses = run()
    original = module.noisy_chunks

    def five(images, schedule, cfg, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        return original(images, schedule, cfg, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "noisy_chunks", five)
        run(state=tmp_path / "s")
    resumed, again = run(state=tmp_path / "s")
    np.testing.assert_array_equal(losses, again)
    for name, array in whole.state_dict().items():
        np.testing.assert_array_equal(resumed.state_dict()[name], array)


def test_a_state_of_other_labels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("refquant.nn.fit.Updater.step", lambda *args: 1.0)  # a state, without the work
    run(state=tmp_path / "s")
    with pytest.raises(CheckpointError, match=r"\(labels_sha256 differ\)"):
        run(data=replace(DATA, labels=DATA.labels[::-1].copy()), state=tmp_path / "s")


def test_an_unconditional_network_sees_no_labels(tmp_path):
    """Its run does not depend on them, and its state does not name them."""
    net = replace(NET, classes=0)
    first, _ = run(net=net, state=tmp_path / "s")
    (tmp_path / "s").unlink()
    other, _ = run(net=net, data=replace(DATA, labels=DATA.labels + 7), state=tmp_path / "s")
    for name, array in first.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], array)


def test_more_classes_than_the_network_knows():
    with pytest.raises(RangeError, match="knows 4 classes, the data set 'shapes' has 5"):
        run(net=replace(NET, classes=4))


def test_variances_are_not_taught():
    with pytest.raises(RangeError, match="learn_sigma=False"):
        run(net=replace(NET, learn_sigma=True))
