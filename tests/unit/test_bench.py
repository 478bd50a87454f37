"""The float benchmark times what was checked, and says so when there is no peer."""

import importlib.util

import pytest

from refquant import cli
from refquant.bench import unet
from refquant.errors import RangeError, RefquantError
from refquant.nn.unet import CONFIGS, UNetConfig


@pytest.mark.parametrize("what", ["train", "unet"])
def test_times_are_positive_for_every_engine(what, monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", UNetConfig(8, 1, 8, (1, 2), 1, (4,), 4, 0.0))
    times = unet.run(what, "tiny", batch=3, repeats=1, seed=0)
    assert all(t > 0 for t in times.values())
    assert ("pytorch eager" in times) == (importlib.util.find_spec("torch") is not None)


def test_a_wrong_peer_is_not_timed(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from refquant.bench import torch_unet

    monkeypatch.setitem(CONFIGS, "tiny", UNetConfig(8, 1, 8, (1, 2), 1, (4,), 4, 0.0))
    monkeypatch.setattr(torch_unet.F, "silu", torch.relu)
    with pytest.raises(RefquantError, match="nothing was timed"):
        unet.run("unet", "tiny", batch=2, repeats=1, seed=0)


def test_batch_and_repeats_are_checked(capsys):
    with pytest.raises(RangeError, match="batch is 0"):
        unet.run("unet", "mnist-unet", batch=0, repeats=1, seed=0)
    assert cli.main(["bench", "unet", "--repeats", "0"]) == 2
    assert "repeats is 0" in capsys.readouterr().err
