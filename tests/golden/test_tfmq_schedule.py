"""Time-steps, sinusoids and DDIM trajectories of the released codes, and where their labels go wrong."""

import numpy as np
import pytest
from goldens import CASES, assert_close, cases, floats, normal

from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.sampling import timestep_sequence
from refquant.diffusion.schedule import linear
from refquant.nn.unet import timestep_embedding


@pytest.mark.parametrize("case", cases("schedule.quad"))
def test_quadratic_steps(case):
    inputs, want = case["inputs"], case["outputs"]
    sequence = timestep_sequence(inputs["T"], inputs["S"], "quadratic")
    assert sequence[::-1] == want["seq"]
    assert len(set(sequence)) == want["n_unique"]


@pytest.mark.parametrize("case", cases("schedule.ldm"))
def test_latent_diffusion_steps(case):
    """The released t are ours + 1, and S of them only where S divides 1000.

    Theirs is range(0, 1000, 1000 // S) + 1, which has 500 entries for S = 400; ours takes the S entries that were
    asked for. The labels of the calibration data and the index into the table of activation ranges are computed
    as if there were S: for 400 steps no label is right and the index falls to -100. Our tables are indexed by step.
    """
    steps, want = case["inputs"]["S"], case["outputs"]
    released = [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]
    labels = [(steps - k) * 1000 // steps + 1 for k in range(1, steps + 1)]
    index = [steps - 1 - (t - 1) // (1000 // steps) for t in released]
    assert len(released) == want["n_steps"]
    assert (released[:5], released[-3:]) == (want["first5_desc"], want["last3_desc"])
    assert (labels[:5], labels[-3:]) == (want["labels_first5"], want["labels_last3"])
    assert sum(a == b for a, b in zip(released, labels, strict=False)) == want["labels_matching"]
    assert (min(index), max(index)) == (want["act_index_min"], want["act_index_max"])

    ours = [t + 1 for t in timestep_sequence(1000, steps, "uniform")]
    assert len(ours) == steps
    assert ours == released[-steps:]
    assert (ours == released == labels) == (1000 % steps == 0)


def test_ddpm_sinusoids():
    case = CASES["emb.ddim"]
    got = timestep_embedding(np.array(case["inputs"]["t"]), case["inputs"]["dim"])
    np.testing.assert_allclose(got, case["outputs"]["emb"], rtol=case["rtol"], atol=1e-4)  # the case's own atol


def test_latent_diffusion_sinusoids():
    """[cos | sin] at frequencies 10000^(-j/half): DDPM's [sin | cos] of one more, without the last of each."""
    case = CASES["emb.ldm"]
    dim = case["inputs"]["dim"]
    sin, cos = np.split(timestep_embedding(np.array(case["inputs"]["t"]), dim + 2), 2, axis=1)
    got = np.concatenate([cos[:, :-1], sin[:, :-1]], axis=1)
    np.testing.assert_allclose(got, case["outputs"]["emb"], rtol=case["rtol"], atol=1e-4)


START = normal(90, 2, 3, 4, 4).astype(np.float32)


class Given:
    """A source of noise that hands out what the case lists, one entry a step."""

    def __init__(self, noise):
        self.noise = iter(floats(noise).reshape(-1, *START.shape))

    def draw(self):
        return next(self.noise)


def trajectory(inputs):
    """Run our sampler on the case's analytic network: the inputs (x_t, t) of every call, and the result."""
    calls, sequence = [], timestep_sequence(1000, len(inputs["seq"]), "quadratic")
    assert sequence[::-1] == inputs["seq"]

    def eps(x, t, step):
        assert step == len(calls)
        calls.append((x, t))
        return (np.tanh(x) * 0.5 + 0.001 * t).astype(np.float32)

    noise = Given(inputs.get("noise_per_step", []))
    options = {"steps": len(sequence), "eta": inputs["eta"], "spacing": "quadratic", "clip": False}
    states = []
    x = ddim_sample(eps, START, linear(), noise, **options, callback=states.append)
    return calls, x, states


@pytest.mark.parametrize("case", cases("ddim.generalized_steps."))
def test_ddim(case):
    want = case["outputs"]
    calls, x, states = trajectory(case["inputs"])
    assert [t for _, t in calls] == [t for t, _ in want["visited"]]
    sums = [s for _, s in want["visited"]]
    assert_close([x_t.sum(dtype=np.float64) for x_t, _ in calls], sums, case, sums)
    assert_close(x, want["final"], case, x)
    assert_close(states[-1].x_0.reshape(-1)[: len(want["x0_last"])], want["x0_last"], case, x)


def test_one_recorded_trajectory_holds_every_calibration_pair():
    """The released code runs a new trajectory up to call k for every k; one run that records all calls is the same."""
    case = CASES["ddim.untill_fake_t"]
    inputs, want = case["inputs"], case["outputs"]
    calls, *_ = trajectory(inputs)
    x_t, t = calls[inputs["k"] - 1]
    assert t == want["t"]
    assert inputs["k"] - 1 == want["n_calls"]  # calls made before this one
    first = x_t.reshape(-1)[: len(want["x_t_first8"])]
    assert_close(first, want["x_t_first8"], case, x_t)
    np.testing.assert_array_equal(calls[0][0], START)  # k = 1 is pure noise
