"""Hypothesis profiles, chosen by REFQUANT_HYPOTHESIS = dev | ci | nightly.

dev      25 examples, random: for the editor loop
ci       200 examples, derandomized, no database, as hypothesis' own ci profile; the default where CI is set
nightly  5,000 examples, random: finds new things, and prints how to replay them
"""

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile(
    "ci",
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("nightly", max_examples=5000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("REFQUANT_HYPOTHESIS", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(scope="session")
def model():
    """The tiny float model; nothing may write to it."""
    import toys  # here, so that a library that does not import fails the tests that need it, and no others

    return toys.tiny_model()


@pytest.fixture(scope="session")
def calibration(model):
    """One recording of the tiny model, shared by all tests that quantize it."""
    import toys

    from refquant.quant.calibrate import Calibration

    return Calibration(model, toys.CALIBRATION)
