"""What docs/porting.md shows runs, in at most ten lines each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchrec.models.deepfm import SimpleDeepFMNN

import torchrec_amort
from tests.models.strangers import MODELS, WIDE_TABLES, MMoE, make_bags, make_events
from tests.models.test_rankers import SIZES, make_batch
from tests.pages import blocks

MOST_LINES = 10
PAGE = "porting.md"
GROUPED, *PORTED = blocks(f"docs/{PAGE}", "python")


def names() -> dict[str, Any]:
    """What the page's reader has: trained models, their collections, and impressions."""
    torch.manual_seed(0)
    batch = make_batch(SIZES)
    bags, wide_bags = make_bags(), make_bags(WIDE_TABLES)
    impressions = batch.to_impressions()
    lists = {"history_item": impressions.sequences["history_item"]}
    return {
        **{name: getattr(torchrec_amort, name) for name in torchrec_amort.__all__},
        "torch": torch,
        "SimpleDeepFMNN": SimpleDeepFMNN,
        "MMoE": MMoE,
        "dense": impressions.dense,
        "ids": type(batch.sparse).concat([batch.sparse, type(batch.sparse).from_jt_dict(lists)]),
        "request_ids": torch.repeat_interleave(torch.arange(len(batch)), batch.num_candidates),
        "labels": batch.labels,
        "events": make_events(),
        "bags": bags,
        "wide_bags": wide_bags,
        "dlrm": MODELS["DLRM"](make_bags()).eval(),
        "deepfm": MODELS["SimpleDeepFMNN"](bags).eval(),
        "mmoe": MODELS["MMoE"](wide_bags).eval(),
    }


@pytest.mark.parametrize("block", PORTED, ids=["DLRM", "DeepFM", "MMoE", "residual"])
def test_a_model_gains_history_in_ten_lines(block: str) -> None:
    assert len(GROUPED.splitlines()) <= MOST_LINES
    assert len(block.splitlines()) <= MOST_LINES
    known = names()
    exec(GROUPED, known)
    assert len(known["batch"]) == len(SIZES)
    exec(block, known)
    model, batch = known["model"].eval(), known["batch"]
    scorer = known.get("scorer") or torchrec_amort.AmortizedScorer(model)
    scored = scorer.score(batch)
    torch.testing.assert_close(scorer.score(batch.to_impressions()), scored, rtol=0, atol=2e-6)
