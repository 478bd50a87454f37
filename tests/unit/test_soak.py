"""A few rounds of the hour-long soak, and what it would say of a wrong one."""

import numpy as np

from refquant import kernels
from refquant.bench import soak


def test_rounds_find_no_difference():
    short = soak.Soak(seed=1, images=4)
    for _ in range(6):
        short.round()
    found = short.result()
    assert found["different"] == 0 and found["rounds"] == 6 and 6 * soak.FEW <= found["images"] <= 6 * 4
    assert found["resident_bytes"] > 10e6
    assert set(found["kernels"]) <= set(kernels.supported())


def test_a_wrong_image_is_counted(monkeypatch):
    # One kernel on every machine: one that is not drawn before `draw` goes wrong has wrong images to compare with.
    best = kernels.supported()[-1:]
    monkeypatch.setattr(kernels, "supported", lambda: best)
    short = soak.Soak(seed=1, images=4)
    short.round()
    right = short.draw
    monkeypatch.setattr(short, "draw", lambda isa, ids: right(isa, ids) + np.float32(ids == 1)[:, None, None, None])
    short.memory.clear()
    rounds = 3
    for _ in range(rounds):
        short.round()
    assert 1 <= short.result()["different"] <= rounds


def test_growth_is_that_of_the_last_quarter_over_the_second():
    short = soak.Soak.__new__(soak.Soak)
    short.alone, short.drawn, short.different = {}, 0, 0
    short.memory = [1, 9, 5, 5, 5, 5, 7, 8]
    assert short.result()["growth_bytes"] == 3
