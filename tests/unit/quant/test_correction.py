"""The correction of a quantized model's answers: eps = (eps^ - mean) / gain, at measured steps only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refquant.errors import RangeError, ShapeError
from refquant.quant.correction import Correction

TIMES = np.array([8, 4, 0, 0])  # neighbours may coincide


def correction(seed=0, channels=2):
    rng = np.random.default_rng(seed)
    return Correction(TIMES, 1 + rng.random(4), rng.standard_normal((4, channels)))


@given(st.integers(0, 1000), st.integers(0, 3))
def test_gain_and_mean_of_the_step_are_taken_out(seed, step):
    """The answer gain eps + mean, of each channel, gives eps back; steps with one t keep their own numbers."""
    made = correction(seed)
    eps = np.random.default_rng(seed).standard_normal((3, 2, 4, 4), dtype=np.float32)
    answer = (made.gain[step] * eps + made.mean[step].reshape(1, 2, 1, 1)).astype(np.float32)
    got = made.applied(lambda x, t, k: answer)(eps, int(TIMES[step]), step)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, eps, atol=4e-6)


def test_gain_1_and_mean_0_change_no_bit():
    x = np.random.default_rng(0).standard_normal((2, 1, 4, 4), dtype=np.float32)
    nothing = Correction(TIMES, np.ones(4), np.zeros((4, 1)))
    np.testing.assert_array_equal(nothing.applied(lambda x, t, k: x)(x, 4, 1), x)


def test_arrays_are_the_way_to_a_file_and_back():
    made = correction()
    back = Correction(**made.arrays())
    for name in ("timesteps", "gain", "mean"):
        np.testing.assert_array_equal(getattr(back, name), getattr(made, name))


@pytest.mark.parametrize(("t", "step"), [(8, 1), (0, 1), (5, 1), (0, 4), (8, -4), (4, 0)])
def test_steps_that_were_not_measured(t, step):
    """Step and t must both be those of the measurement."""
    predict = correction().applied(lambda x, t, k: x)
    with pytest.raises(RangeError, match=f"step {step}, t = {t} was not measured: the 4 steps .* t = 8 to 0"):
        predict(np.zeros((1, 2, 4, 4), np.float32), t, step)


def test_images_of_other_channels():
    with pytest.raises(ShapeError, match="3 channels, the noise was measured for 2"):
        correction().applied(lambda x, t, k: x)(np.zeros((1, 3, 4, 4), np.float32), 8, 0)


@pytest.mark.parametrize(
    ("gain", "mean"), [(np.ones(3), np.zeros((4, 1))), (np.ones(4), np.zeros((3, 1))), (np.ones(4), np.zeros(4)),
                       (np.ones((4, 1)), np.zeros((4, 1)))]
)  # fmt: skip
def test_arrays_must_fit_together(gain, mean):
    with pytest.raises(ShapeError, match="for S steps"):
        Correction(TIMES, gain, mean)
