"""The page of findings: verdicts follow from numbers, and from nothing else."""

import pytest

from refquant.bench.findings import CLAIMS
from refquant.bench.findings_report import CLAIMS as TEXTS
from refquant.bench.findings_report import CONTRADICTED, OPEN, SUPPORTED, VERDICTS, judge, page


def test_every_claim_has_a_text_and_a_verdict():
    assert set(CLAIMS) == set(TEXTS) == set(VERDICTS)


@pytest.mark.parametrize(
    ("better", "worse", "word"),
    [((10, 1), (8, 1), SUPPORTED), ((8, 1), (10, 1), CONTRADICTED), ((9, 1), (8, 1), OPEN), ((8, 0), (8, 0), OPEN)],
)
def test_a_difference_must_exceed_the_spread_of_both(better, worse, word):
    assert judge(better, worse) == word


def test_verdicts_turn_with_the_numbers():
    one = {"nearest": [0.7, 0.0], "layerwise": [0.2, 0.01], "tiar": [0.06, 0.01], "inside blocks (brecq)": 0.5}
    assert VERDICTS["1"](one).count(SUPPORTED) == 3
    assert VERDICTS["1"]({**one, "tiar": [0.9, 0.01]}).count(CONTRADICTED) == 3
    few = {"20 time-steps": {"at the 20": [0.1, 0.0], "at the others": [0.11, 0.0]},
           "all time-steps": {"at the 20": [0.1, 0.0], "at the others": [0.1, 0.0]}}  # fmt: skip
    assert SUPPORTED in VERDICTS["2"](few)
    few["20 time-steps"]["at the others"] = [0.3, 0.0]
    assert CONTRADICTED in VERDICTS["2"](few)
    seconds = {"qdiffusion": {"blocks": 10.0, "steps": 12.0}, "tfmq": {"blocks": 10.0}, "ratio": 2.2}
    assert SUPPORTED in VERDICTS["6"](seconds) and CONTRADICTED in VERDICTS["6"]({**seconds, "ratio": 1.2})


def test_page_holds_every_number_that_was_saved():
    measured = {"cache": 0.001, "computed": 0.02, "blocks where the cache is better": "11 of 11"}
    text = page({"effort": {"images": 8}, "claims": {"11": {"what": "", "measured": measured}}})
    assert "images 8" in text and SUPPORTED in text and "- cache: 0.001" in text and "11 of 11" in text
