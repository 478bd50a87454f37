"""The benchmark of training times what was checked, and says so when there is no peer."""

import importlib.util
import json

import pytest

from refquant import cli
from refquant.bench import train
from refquant.errors import RangeError, RefquantError
from refquant.nn.networks import CONFIGS
from refquant.nn.unet import UNetConfig


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", UNetConfig(8, 1, 8, (1, 2), 1, (4,), 4, 0.0))


def test_times_are_positive_for_every_engine(tiny):
    times = train.run("tiny", batch=3, repeats=1, seed=0)
    assert all(t > 0 for t in times.values())
    assert ("pytorch eager" in times) == (importlib.util.find_spec("torch") is not None)


def test_a_wrong_peer_is_not_timed(tiny, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from refquant.bench import torch_unet

    monkeypatch.setattr(torch_unet.F, "silu", torch.relu)
    with pytest.raises(RefquantError, match="nothing was timed"):
        train.run("tiny", batch=2, repeats=1, seed=0)


def test_every_network_and_batch_has_a_table(tiny, capsys, tmp_path):
    path = tmp_path / "b.json"
    options = ["--network", "tiny", "--batch", "1", "2", "--repeats", "1", "--quiet", "--json", str(path)]
    assert cli.main(["bench", "train", *options]) == 0
    out = capsys.readouterr().out
    assert "tiny, batch 1" in out and "tiny, batch 2" in out
    assert [case["batch"] for case in json.loads(path.read_text())["cases"]] == [1, 2]


def test_batch_and_repeats_are_checked(capsys):
    with pytest.raises(RangeError, match="batch is 0"):
        train.run("mnist-unet", batch=0, repeats=1, seed=0)
    assert cli.main(["bench", "train", "--repeats", "0"]) == 2
    assert "repeats is 0" in capsys.readouterr().err


def test_a_network_that_is_no_unet_is_refused():
    with pytest.raises(RangeError, match="mnist-dit is a dit"):
        train.run("mnist-dit", batch=1, repeats=1, seed=0)
