"""Every golden case is tested somewhere: each id begins with a prefix that one file here claims."""

from pathlib import Path

import pytest
from goldens import CASES

CLAIMS = {
    "test_tfmq_adaround.py": (
        "adaround.init",
        "adaround.rectified_sigmoid",
        "adaround.loss_grad",
        "temp_decay.",
        "lsq.delta_grad",
    ),
    "test_tfmq_affine.py": ("tfmq.minmax.", "tfmq.mse.", "tfmq.channelwise.", "tfmq.degenerate."),
    "test_tfmq_ptqd.py": ("ptqd.stats",),
    "test_tfmq_ranges.py": ("tfmq.running_stat", "tfmq.kl.", "tfmq.hist.", "qdiff.", "ptq4dm."),
    "test_tfmq_schedule.py": (
        "schedule.quad",
        "schedule.ldm",
        "emb.ddim",
        "emb.ldm",
        "ddim.generalized_steps.",
        "ddim.untill_fake_t",
    ),
    "test_tfmq_split.py": ("split.",),
    "test_tfmq_squant.py": ("squant.squant", "squant.act."),
    "test_tfmq_temporal.py": ("tib.forward", "tib.tiar3000"),
}
PENDING: tuple[str, ...] = ()  # prefixes of cases whose code is not written yet

PREFIXES = [prefix for prefixes in CLAIMS.values() for prefix in prefixes]


@pytest.mark.parametrize("id_", CASES)
def test_case_is_claimed_once(id_):
    claimed = [prefix for prefix in (*PREFIXES, *PENDING) if id_.startswith(prefix)]
    assert len(claimed) == 1, f"{id_} is claimed by {claimed}: give it to one file in CLAIMS, and a test there"


@pytest.mark.parametrize("file", CLAIMS)
def test_claims_are_kept(file):
    """A claim names cases that exist, and the file that makes it names them, too."""
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    for prefix in CLAIMS[file]:
        assert any(id_.startswith(prefix) for id_ in CASES), f"no case begins with {prefix}"
        assert f'"{prefix}' in text, f"{file} claims {prefix} and does not mention it"
