"""The bench of multi-region quantization: its table says what is known."""

from dataclasses import replace

import numpy as np
import pytest
from toys import TINY_DIT, tiny_dit

from refquant.bench import mrq


@pytest.fixture(scope="module")
def rows():
    return mrq.measure_softmax()


def test_directions_of_softmax(rows):
    """Peaked attention: regions win at 8 bits. Flat attention at 4 bits: they do not. Log2 never wins above 4 bits."""
    for r in rows:
        e = r.errors
        if r.bits == 8:
            assert e["disjoint MRQ"] == min(e.values())
        if r.bits == 4 and r.sharpness == 1 and r.tokens > 16:
            assert e["disjoint MRQ"] > e["unsigned, searched"]
        if r.bits > 4:
            assert e["log2"] > 2 * e["disjoint MRQ"]
        assert e["released MRQ"] > e["disjoint MRQ"] or (r.bits == 4 and r.tokens == 256)
        assert e["unsigned, searched"] <= 1.2 * e["uniform 0..1"]  # its range ends at the largest value


def test_the_rule_of_a_quarter_decides_gelu():
    for r in mrq.measure_gelu():
        assert r.pays == (r.errors["MRQ"] < r.errors["asymmetric"]) or abs(r.positive - 0.25) < 0.02
        assert r.errors["MRQ"] < r.errors["symmetric"]


def test_log2_by_hand():
    got = mrq.log2_quantizer(np.float32([1, 0.5, 0.3, 0.26, 2.0**-6, 2.0**-7, 2.0**-8, 0]), 3)
    np.testing.assert_array_equal(got, np.float32([1, 0.5, 0.25, 0.25, 2.0**-6, 0, 0, 0]))


def test_a_models_own_outputs():
    """Every block at every step; sharpness is the deviation of its logits, which quantizers then agree with."""
    model = tiny_dit()
    softmax, gelu = mrq.measure_model(model, images=2, steps=4, shown=2)
    assert [(t, i) for t, i, _ in softmax] == [(15, 0), (15, 1), (0, 0), (0, 1)] == [(t, i) for t, i, _ in gelu]
    assert all(r.sharpness > 0 and r.tokens == 4 and min(r.errors.values()) > 0 for _, _, r in softmax)
    assert all(r.pays == (r.positive < 0.25) and 0 <= r.positive <= 1 for _, _, r in gelu)
    text = mrq.model_report(tiny_dit(replace(TINY_DIT, depth=1), timesteps=50))
    assert text.count("| 49 | 0 |") == 2 and text.count("**") == 2 * 2 * 5
    assert [line[:9] for line in text.splitlines() if " to " in line] == ["| 8 | 5 |", "| 6 | 5 |", "| 4 | 5 |"]


def test_the_summary_counts_who_is_best():
    """Three rows: MRQ is best in one, twice as bad in the flattest; of GELU, it wins one row with few positives."""

    def softmax(sharpness, shift, uniform, regions, log2=9.0):
        errors = {"unsigned, searched": uniform, "log2": log2, "disjoint MRQ": regions}
        return 0, 0, mrq.SoftmaxRow(4, sharpness, 8, shift, errors)

    def gelu(positive, asymmetric, regions):
        return 0, 0, mrq.GeluRow(0, 1, 8, positive, positive < 0.25, {"asymmetric": asymmetric, "MRQ": regions})

    softmaxes = [softmax(1, 4, 1, 2), softmax(9, 2, 4, 1), softmax(5, 3, 4, 2, 1.0)]
    text = mrq.summary({8: (softmaxes, [gelu(0.1, 2, 1), gelu(0.2, 1, 2), gelu(0.5, 1, 2)])})
    assert text.splitlines()[-1] == "| 8 | 3 | 1 | 0.63 | 0.25 | 2.00 | 2 to 4 | 1 | 1 of 2 | 0 of 1 |"


def test_the_report_is_a_table(rows):
    text = mrq.report()
    assert text.count("**") == 2 * (len(rows) + 15) and "| 49 | 3 | 8 |" in text
