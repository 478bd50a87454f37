"""The affine family: every law of ``laws.py`` on drawn tensors and quantizers, per tensor and per channel."""

import laws
import numpy as np
import pytest
from hypothesis import given
from strategies import affine_cases, qparams, tensors

from refquant.errors import RangeError
from refquant.quant.affine import quantize

LAWS = [
    laws.zero_is_exact,
    laws.codes_are_the_exact_ones,
    laws.error_is_half_a_step,
    laws.outside_saturates,
    laws.monotone,
    laws.idempotent,
    laws.codes_stay_in_range,
    laws.scaling_by_powers_of_two,
    laws.signed_codes_are_unsigned_ones_moved,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@given(case=affine_cases())
def test_law(law, case):
    law(case)


@given(affine_cases(per_channel=(True,)))
def test_channels_are_a_stack_of_tensors(case):
    laws.channels_are_a_stack_of_tensors(case)


@given(affine_cases(zero_in_range=False))
def test_codes_are_exact_for_any_zero_point(case):
    """The formula holds up to |z| = 2**23, far outside of the codes (the released search makes such z)."""
    laws.codes_are_the_exact_ones(case)


@given(tensors(), qparams())
def test_one_nan_anywhere_is_refused(x, q):
    """q(NaN) does not exist: it raises, wherever in the array it stands."""
    poisoned = np.array(x)
    poisoned.flat[x.size // 2] = np.nan
    with pytest.raises(RangeError, match="NaN"):
        quantize(poisoned, q)


@given(affine_cases())
def test_arguments_are_not_written_to(case):
    """q reads x only: frozen arrays pass."""
    x, q = case
    frozen = np.array(x)
    frozen.setflags(write=False)
    np.testing.assert_array_equal(quantize(frozen, q), quantize(x, q))
