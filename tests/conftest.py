"""Hypothesis profiles, chosen by REFQUANT_HYPOTHESIS = dev | ci | nightly.

dev      25 examples, random: for the editor loop
ci       200 examples, derandomized, no database, as hypothesis' own ci profile; the default where CI is set
nightly  5,000 examples, random: finds new things, and prints how to replay them

With `pytest -n` each worker is to have a core, and BLAS one thread in each of them: set here, before NumPy is there.
REFQUANT_NUM_THREADS stays as it is, for the threads of refquant are what many tests are about.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

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


def pytest_terminal_summary(terminalreporter):
    """Say which kernels the run has checked: a skipped one must not look like a passed one.

    Not in kernels/conftest.py, which a process that only hands tests to workers does not load.
    """
    if not any(report.nodeid.startswith("tests/kernels/") for report in terminalreporter.stats.get("passed", ())):
        return
    from refquant import kernels

    available, supported = kernels.available(), kernels.supported()
    missing = [f"{name}: not this machine" for name in available if name not in supported]
    checked = f"checked {len(supported)} of {len(available)} kernels"
    terminalreporter.write_line(f"{checked} ({', '.join([*supported, *missing])})")
