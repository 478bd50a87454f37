"""The page of findings: verdicts follow from numbers, and from nothing else."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from refquant.bench import findings, findings_report
from refquant.bench.findings import CLAIMS
from refquant.bench.findings_report import CLAIMS as TEXTS
from refquant.bench.findings_report import CONTRADICTED, OPEN, SUPPORTED, VERDICTS, gain, judge, page

LOW, MIDDLE, HIGH = ({"psnr_db": [base, base + 2.0, base - 1.0]} for base in (20.0, 20.1, 30.0))
NOISY = {"psnr_db": [23.0, 19.0, 21.5]}  # higher than LOW on the mean, not seed by seed


def test_every_claim_has_a_text_and_a_verdict():
    assert set(CLAIMS) == set(TEXTS) == set(VERDICTS)


@pytest.mark.parametrize(
    ("better", "worse", "word"),
    [
        ([9.0, 12.0, 8.0], [8.0, 11.1, 7.1], SUPPORTED),  # 0.93 ± 0.06, though either alone spreads by 2
        ([8.0, 11.1, 7.1], [9.0, 12.0, 8.0], CONTRADICTED),
        ([9.0, 9.0, 9.0], [8.0, 9.0, 8.0], OPEN),  # 0.67 ± 0.58: more than one spread, not two
        ([8.0, 8.0], [8.0, 8.0], OPEN),
        ([1.3], [0.1, 0.2, 0.1], SUPPORTED),  # one number, made once, stands for every seed
        ([1.3], [1.2], SUPPORTED),
    ],
)
def test_a_difference_must_exceed_twice_its_spread_seed_by_seed(better, worse, word):
    assert judge(better, worse) == word


def test_gain_is_that_of_the_pairs():
    assert gain([3.0, 5.0], [1.0, 2.0]) == pytest.approx((2.5, 0.5**0.5))


def words(text: str) -> list[str]:
    """The verdicts of a text, in order."""
    found = [(text.find(word, i), word) for word in (SUPPORTED, CONTRADICTED, OPEN) for i in range(len(text))]
    return [word for _, word in sorted({pair for pair in found if pair[0] >= 0})]


def test_verdicts_turn_with_the_numbers():
    one = {"nearest": [0.7] * 3, "layerwise": [0.2, 0.21, 0.19], "tiar": [0.06, 0.05, 0.06],
           "inside blocks (brecq)": [0.5]}  # fmt: skip
    assert words(VERDICTS["1"](one)) == [SUPPORTED] * 3
    assert words(VERDICTS["1"]({**one, "tiar": [0.9, 0.91, 0.9]})) == [CONTRADICTED] * 3
    few = {"20 time-steps": {"at the 20": [0.1] * 3, "at the others": [0.11] * 3},
           "all time-steps": {"at the 20": [0.1] * 3, "at the others": [0.1] * 3}}  # fmt: skip
    assert words(VERDICTS["2"](few))[0] == SUPPORTED
    few["20 time-steps"]["at the others"] = [0.3] * 3
    assert words(VERDICTS["2"](few))[0] == CONTRADICTED
    seconds = {"qdiffusion": {"blocks": 10.0, "steps": 12.0}, "tfmq": {"blocks": 10.0}, "ratio": 2.2}
    assert words(VERDICTS["6"](seconds)) == [SUPPORTED] and "would be 1.00" in VERDICTS["6"](seconds)
    assert words(VERDICTS["6"]({**seconds, "ratio": 1.2})) == [CONTRADICTED]


@pytest.mark.parametrize(
    ("none", "temporal", "every", "expected"),
    [
        (LOW, HIGH, HIGH, [SUPPORTED, SUPPORTED, SUPPORTED]),
        (LOW, MIDDLE, HIGH, [SUPPORTED, SUPPORTED, CONTRADICTED]),  # scopes differ by 10 dB
        (LOW, NOISY, NOISY, [OPEN, OPEN, SUPPORTED]),
        (HIGH, LOW, LOW, [CONTRADICTED, CONTRADICTED, SUPPORTED]),
    ],
)
def test_verdict_on_the_scope_of_tables(none, temporal, every, expected):
    text = VERDICTS["3"]({"none, exact": none, "temporal, exact": temporal, "all, exact": every})
    assert words(text) == expected


def test_a_running_range_is_good_enough_unless_it_is_clearly_worse():
    def verdict(exact, running):
        shares = {"saturated share": 0.0}
        return words(VERDICTS["10"]({"exact": {**exact, **shares}, "running": {**running, **shares}}))

    assert verdict(LOW, HIGH) == [SUPPORTED]
    assert verdict(HIGH, LOW) == [CONTRADICTED]
    assert verdict(NOISY, LOW) == [SUPPORTED]


def test_freezing_the_temporal_layers_shows_what_is_left_to_gain():
    frozen, plain = "tfmq, temporal weights in float", "tfmq, temporal weights in float, no tables"
    assert words(VERDICTS["4"]({"tfmq": LOW, frozen: HIGH, plain: HIGH})) == [SUPPORTED, CONTRADICTED]
    assert words(VERDICTS["4"]({"tfmq": HIGH, frozen: HIGH, plain: LOW})) == [OPEN, SUPPORTED]


def test_page_holds_every_number_that_was_saved():
    measured = {"cache": 0.001, "computed": 0.02, "blocks where the cache is better": "11 of 11"}
    seeds = {"normal": [30.0, 31.0, 32.0], "uniform": [20.0, 21.0, 22.0], "normal, released labels": [12.5]}
    found = {"11": {"what": "", "measured": measured}, "8": {"what": "", "measured": seeds}}
    text = page({"effort": {"images": 8}, "claims": found})
    assert "images 8" in text and SUPPORTED in text and "- cache: 0.001" in text and "11 of 11" in text
    assert "- normal: 31.00 ± 1.00" in text and "- normal, released labels: 12.50" in text
    assert text.index("## 8.") < text.index("## 11.")


def test_page_ends_with_the_bit_widths():
    row = {"method": "nearest", "bits": "W3A8", "psnr_db": [12.0, 14.0], "psnr_median_db": [15.0, 16.0],
           "frechet": [30.0, 40.0], "feature_squared": 1.25, "feature_squared_worst": 9.0,
           "feature_cosine_worst": 0.5, "bytes": 2_000_000}  # fmt: skip
    text = page({"effort": {}, "claims": {}}, {"caption": "two runs", "rows": [row]})
    assert "two runs" in text and text.rstrip().endswith(
        "| nearest | W3A8 | 13.0 ± 1.4 | 15.5 ± 0.7 | 35.0 ± 7.1 | 1.250 | 0.5000 | 2.00 | - |"
    )


def test_a_model_is_made_once_and_has_a_state_file_of_its_own(monkeypatch, tmp_path):
    """Another option, setting or effort is another file: a run that goes on must not meet the parts of another."""
    asked = []
    monkeypatch.setattr(findings, "Reference", SimpleNamespace(draw=lambda *a: None))
    monkeypatch.setitem(findings.METHODS, "tfmq", lambda session, **options: asked.append(session.state))
    for iterations in (10, 20):
        study = findings.Study(images=2, samples=2, iterations=iterations, states=8, work=tmp_path / "work")
        for _ in range(2):
            study.made("tfmq")
            study.made("tfmq", fsc="none")
            study.made("tfmq", {"sampling": "uniform"})
    assert len(asked) == len(set(asked)) == 6
    assert all(path.parent == tmp_path / "work" for path in asked)


def test_the_page_is_the_one_of_the_committed_numbers():
    bench = Path(findings_report.__file__).parent
    files = ("findings.json", "bit_widths.json", "bit_widths_w4a32.json")
    text = page(*(json.loads((bench / name).read_text(encoding="utf-8")) for name in files))
    assert text == (bench.parent / "quant" / "methods" / "README.md").read_text(encoding="utf-8")
