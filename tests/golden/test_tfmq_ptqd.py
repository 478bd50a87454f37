"""Statistics of the quantization noise by PTQD's released code (see README.md here)."""

import numpy as np
import pytest
from goldens import CASES, floats, normal

from refquant.quant.methods.ptqd import noise_statistics

TIMES = (1, 51, 101)  # three images each
PLANTED = {1: 0.08, 51: -0.05, 101: 0.02}


def answers():
    """The float answers (9, 3, 4, 4) and the errors, as the case's `generator` says."""
    data = floats(normal(60, 9, 3, 4, 4))
    bias = floats(normal(61, 3, 3) * 0.02)
    error = [
        data[i] * np.float32(PLANTED[TIMES[i // 3]])
        + bias[i // 3][:, None, None]
        + floats(normal(62 + i, 3, 4, 4) * 0.05)
        for i in range(9)
    ]
    return data, np.stack(error)


@pytest.mark.parametrize("i", range(3), ids=[f"t{t}" for t in TIMES])
def test_statistics(i):
    case = CASES["ptqd.stats"]
    want, t = case["outputs"], str(TIMES[i])
    data, error = answers()
    k, mean, std = noise_statistics(data[3 * i : 3 * i + 3], error[3 * i : 3 * i + 3])
    np.testing.assert_allclose(k, want["k_t"][t], rtol=case["rtol"])
    np.testing.assert_allclose(mean, want["bias"][i], rtol=case["rtol"])
    np.testing.assert_allclose(std, want["std"][t], rtol=case["rtol"])
