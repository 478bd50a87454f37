"""refquant average: the mean of weights, and nothing else."""

import numpy as np
import pytest
from toys import tiny_model

from refquant.cli import main
from refquant.commands.average import average
from refquant.diffusion.model import load_model
from refquant.errors import RefquantError


@pytest.fixture
def files(tmp_path):
    """Three models of one network."""
    paths = [str(tmp_path / f"{seed}.safetensors") for seed in range(3)]
    for seed, path in enumerate(paths):
        tiny_model(seed=seed).save(path)
    return paths


def test_weights_are_the_mean(files, tmp_path):
    out = tmp_path / "mean.safetensors"
    assert main(["average", *files, "--out", str(out), "--quiet"]) == 0
    found, parts = load_model(str(out)), [load_model(path).network.state_dict() for path in files]
    for name, weight in found.network.state_dict().items():
        np.testing.assert_allclose(weight, np.mean([p[name] for p in parts], axis=0), rtol=1e-6, atol=1e-7)
    sources = [load_model(path).metadata["data_sha256"] for path in files]
    assert [source["data_sha256"] for source in found.metadata["mean_of"]] == sources


def test_the_mean_of_equal_models_is_the_model(files):
    again = average([load_model(files[0]), load_model(files[0])], "same")
    for got, want in zip(again.network.parameters(), load_model(files[0]).network.parameters(), strict=True):
        np.testing.assert_array_equal(got.data, want.data)


def test_models_that_do_not_belong_together_are_refused(files, tmp_path):
    path = str(tmp_path / "v.safetensors")
    tiny_model(prediction="v").save(path)
    with pytest.raises(RefquantError, match="prediction"):
        average([load_model(files[0]), load_model(path)], "mixed")
    with pytest.raises(RefquantError, match="two or more"):
        average([load_model(files[0])], "one")
