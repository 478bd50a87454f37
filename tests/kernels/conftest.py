"""The loop over instruction sets: a test that takes `isa` runs once on each kernel of this build."""

import pytest

from refquant import kernels


@pytest.fixture(params=kernels.available())
def isa(request):
    """Run the test on one kernel; skip, visibly, one that this processor cannot run."""
    if request.param not in kernels.supported():
        pytest.skip(f"{request.param}: not this machine")
    with kernels.using(request.param):
        yield request.param


def pytest_terminal_summary(terminalreporter):
    """Say which kernels the run has checked: a skipped one must not look like a passed one."""
    available, supported = kernels.available(), kernels.supported()
    missing = [f"{name}: not this machine" for name in available if name not in supported]
    checked = f"checked {len(supported)} of {len(available)} kernels"
    terminalreporter.write_line(f"{checked} ({', '.join([*supported, *missing])})")
