"""The golden cases of tests/golden/tfmq.json, for the tests beside it (its README says what the fields mean)."""

import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tfmq.json").read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in GOLDEN["cases"]}


def cases(*families):
    """The cases whose id begins with one of these, for parametrize."""
    return [pytest.param(case, id=id_) for id_, case in CASES.items() if id_.startswith(families)]


def floats(values):
    return np.array(values, dtype=np.float32)


def tensor(x):
    """An input tensor: given by its values, or by the name of one that the file holds, as in "mixed (see tensors)"."""
    return floats(GOLDEN["tensors"][x.split()[0]] if isinstance(x, str) else x)


def normal(seed, *shape):
    """The generator that the cases name."""
    return np.random.RandomState(seed).standard_normal(shape)  # noqa: NPY002


def assert_close(got, want, case, size):
    """To the case's rtol, and 1e-6 of the largest number in `size`."""
    got = np.asarray(got)
    atol = 1e-6 * np.abs(size).max()
    np.testing.assert_allclose(got, np.reshape(want, got.shape), rtol=case["rtol"], atol=atol)


def assert_same_quantizer(qparams, scale, zero_point, case):
    """The scale to the case's rtol, the zero point exactly."""
    np.testing.assert_allclose(qparams.scale, np.reshape(scale, qparams.scale.shape), rtol=case["rtol"])
    np.testing.assert_array_equal(qparams.zero_point, np.reshape(zero_point, qparams.zero_point.shape))
