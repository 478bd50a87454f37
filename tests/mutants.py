"""Mutants: a law that no wrong implementation can break is decoration.

`assert_killed` searches for a counterexample of a law while a wrong implementation is in place, and fails if there is
none.
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings


def assert_killed(law, cases, examples=500):
    """The law, a function of one case, must raise AssertionError for one of the cases."""

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def search(case):
        law(case)

    with pytest.raises(AssertionError):
        search()
