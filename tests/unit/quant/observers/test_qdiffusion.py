"""Q-Diffusion's searches by hand, and where they differ from min-max."""

import numpy as np
import pytest

from refquant.errors import RangeError
from refquant.quant.affine import QSpec, fake_quantize
from refquant.quant.observers import minmax, mse, qdiffusion

ASYMMETRIC, SYMMETRIC, ALWAYS_ZERO = QSpec(4), QSpec(4, signed=True, symmetric=True), QSpec(4, symmetric=True)


@pytest.mark.parametrize(
    ("spec", "x", "scaled", "scale", "zero_point"),
    [
        (ASYMMETRIC, [-1.5, 6.0], False, 0.5, 3),
        (QSpec(4, signed=True), [-1.5, 6.0], False, 0.5, -5),
        (ASYMMETRIC, [-1.5, 6.0], True, 0.5, 2),  # 3 * 6/8 = 2.25; the step does not shrink
        (ASYMMETRIC, [1.0, 8.5], False, 0.5, 0),  # reaches to 7.5
        (ASYMMETRIC, [-8.5, -1.0], False, 0.5, 17),  # beyond the codes: 0 is not represented
        (SYMMETRIC, [-3.5, 1.0], False, 0.5, 0),
        (SYMMETRIC, [-3.5, 1.0], True, 0.375, 0),
        (ALWAYS_ZERO, [0.0, 7.5], False, 0.5, 0),
        (ALWAYS_ZERO, [0.5, 8.0], False, 0.5, 0),
        (ASYMMETRIC, [0.0, 0.0], False, 1e-8, 0),
        (ASYMMETRIC, [2.0, 2.0], False, 1e-8, 0),
    ],
)
def test_max_by_hand(spec, x, scaled, scale, zero_point):
    q = qdiffusion.max_range(x, spec, scaled=scaled)
    assert (q.scale, q.zero_point) == (np.float32(scale), zero_point)


def test_max_of_a_negative_constant_has_no_usable_zero_point():
    with pytest.raises(RangeError, match="let it contain 0"):
        qdiffusion.max_range([-2.0, -2.0], ASYMMETRIC)


def test_mse_leaves_zero_without_a_code_in_tensors_of_one_sign():
    x = np.linspace(2.0, 3.0, 100)
    q = qdiffusion.mse(x, ASYMMETRIC)
    assert q.zero_point == -30 and not q.zero_is_exact  # as mse(..., zero_in_range=False)
    assert mse(x, ASYMMETRIC).zero_is_exact


def test_mse_always_zero():
    x = np.append(np.full(500, 0.5), 8.0)
    q = qdiffusion.mse(x, ALWAYS_ZERO)
    assert q.zero_point == 0 and q.scale < minmax(x, ALWAYS_ZERO).scale


@pytest.mark.parametrize(
    ("x", "spec"),
    [
        (np.zeros(4), ASYMMETRIC),
        (np.full(4, 0.5), ASYMMETRIC),
        (np.array([[0.0, 1.0], [1.0, 1.0]]), QSpec(4, axis=0)),
        (np.array([-1.0, 0.0]), ALWAYS_ZERO),
    ],
)
def test_mse_needs_a_range(x, spec):
    with pytest.raises(RangeError, match="returns nothing there"):
        qdiffusion.mse(x, spec)


def test_the_broken_symmetric_mse_must_be_asked_for_by_name():
    x = np.linspace(-1.0, 1.0, 101)
    with pytest.raises(RangeError, match="symmetric_mse_as_released"):
        qdiffusion.mse(x, SYMMETRIC)
    q = qdiffusion.symmetric_mse_as_released(x, 4)
    assert q.zero_point >= q.spec.qmax
    assert fake_quantize(x, q).max() <= 0  # every positive value is lost
