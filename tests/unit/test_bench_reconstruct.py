"""refquant bench reconstruct: our loop, and PyTorch's where it is installed, on the same losses."""

import importlib.util

import pytest

from refquant.bench import reconstruct
from refquant.cli import main
from refquant.diffusion.model import load_model
from refquant.errors import UnknownNameError


def test_one_unit_is_timed(capsys):
    short = ["--iterations", "1", "--repeats", "1", "--quiet"]
    assert main(["bench", "reconstruct", "--units", "mid.attn_1", *short]) == 0
    assert "mid.attn_1" in capsys.readouterr().out


def test_unknown_units_are_refused_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="mid.block_1"):
        reconstruct.run(load_model("mnist-unet"), ("no-such",), 1, 1)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_the_peer_has_the_same_losses():
    """The bench compares the first losses and raises where they differ: a block with a shortcut, an attention."""
    rows = reconstruct.run(load_model("mnist-unet"), ("down.1.block.0", "mid.attn_1"), 2, 1)
    assert all(row["pytorch eager"] > 0 for row in rows)
