"""Ten thousand random requests through every way of serving; run by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import SCHEMA, make_requests
from tests.serving.test_scorer import by_impressions, grown, make_model
from torchrec_amort import AmortizedScorer, HistoryCache, RequestBatch, export_package, load_package

REQUESTS, PART, MOST_EVENTS, MOST_CANDIDATES = 10_000, 50, 40, 20
WITHOUT_AGE: dict[str, Any] = {
    "leave_out": ["history_age"],
    "positions": "none",
    "history": "append_cross_causal",
    "embedding_dim": 16,
    "history_length": MOST_EVENTS,
}


@pytest.mark.slow
@pytest.mark.parametrize("interaction", ["dot", "dcn"])
def test_every_score_is_that_of_the_impressions(tmp_path: Path, interaction: str) -> None:
    model, schema = make_model(**WITHOUT_AGE, interaction=interaction), SCHEMA.without(["history_age"])
    export_package(model, tmp_path / "package", schema, tables="float32")
    cache = HistoryCache(2**20)
    scorers = {
        "scorer": AmortizedScorer(model),
        "microbatched": AmortizedScorer(model, 7),
        "cached": AmortizedScorer(model, cache=cache),
        "eager": AmortizedScorer(model, 11, backend="eager"),
        "exported": AmortizedScorer(load_package(tmp_path / "package"), 64),
        "bfloat16": AmortizedScorer(model, dtype=torch.bfloat16),
    }
    greatest = dict.fromkeys(scorers, 0.0)
    random = np.random.default_rng(0)
    requests: list[dict[str, Any]] = []
    for part in range(REQUESTS // PART):
        # Every other part is the one before, later: some of its users have more events by then.
        if part % 2:
            requests = grown(requests, int(random.integers(3)), part)
        else:
            sizes = zip(
                random.integers(MOST_EVENTS, size=PART), random.integers(1, MOST_CANDIDATES, size=PART), strict=True
            )
            requests = make_requests([(int(n), int(m)) for n, m in sizes], part)
            requests = [request | {"user": part * PART + row} for row, request in enumerate(requests)]
        batch = RequestBatch.from_requests(requests, schema)
        expected = torch.sigmoid(by_impressions(model, batch))
        assert not expected.isnan().any()
        for name, scorer in scorers.items():
            difference = float((torch.sigmoid(scorer.score(batch)) - expected).abs().max())
            greatest[name] = max(greatest[name], difference)
    print({name: f"{difference:.1e}" for name, difference in greatest.items()}, cache.counters())
    assert greatest.pop("bfloat16") <= 2e-2
    assert max(greatest.values()) <= 1e-5
    counters = cache.counters()
    assert min(counters[name] for name in ("hits", "extensions", "misses", "evictions")) > 0
