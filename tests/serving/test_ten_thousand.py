"""Ten thousand random requests through every way of serving; run by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import SCHEMA, make_requests
from tests.models.strangers import MODELS, make_events
from tests.models.test_rankers import make_batch as make_stranger_batch
from tests.models.test_rankers import make_ranker
from tests.serving import test_export_rankers
from tests.serving.test_scorer import by_impressions, grown, make_model
from torchrec_amort import (
    AmortizedHistoryArch,
    AmortizedScorer,
    HistoryCache,
    HistoryTower,
    RequestBatch,
    export_package,
    load_package,
)
from torchrec_amort.models.ranker import ModelRanker

RANKERS = 25
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


def tower(name: str, shared: bool, random: np.random.Generator, width: int) -> HistoryTower:
    """A tower with options that are drawn."""
    options: dict[str, Any] = {
        "num_layers": int(random.integers(1, 3)),
        "num_heads": int(random.choice([1, 2, 4])),
        "history_attention": str(random.choice(["full", "causal"])),
        "num_vectors": int(random.integers(1, 3)),
        "rotary": bool(random.integers(2)),
        "has_summary": bool(random.integers(4) == 0),
    }
    if options["has_summary"]:
        options["history_attention"] = "full"
    given = {"item": "item"} if shared else {"events": make_events(8)}
    return HistoryTower(
        name, AmortizedHistoryArch(8, **options), **given, width=width, starts_at_zero=bool(random.integers(2))
    )


def ranker_of(draw: int) -> tuple[ModelRanker, bool]:
    """A stranger's model with one or two histories, its gates open, and whether its bags are weighted."""
    random = np.random.default_rng(draw)
    name = list(MODELS)[draw % len(MODELS)]
    torch.manual_seed(draw)
    is_weighted = bool(random.integers(3) == 0)
    shared = bool(random.integers(2)) and not is_weighted
    width = 16 if name == "MMoE" else 8
    towers = [tower(f"history_{i}", shared, random, width) for i in range(int(random.integers(1, 3)))]
    ranker = make_ranker(name, *towers, is_weighted=is_weighted)
    assert isinstance(ranker, ModelRanker)
    for one in towers:
        if one.gate is not None:
            torch.nn.init.constant_(one.gate, 0.7)
    return ranker, is_weighted


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("draw", range(RANKERS))
def test_every_score_of_any_ranker_is_that_of_the_impressions(tmp_path: Path, draw: int) -> None:
    ranker, is_weighted = ranker_of(draw)
    scorers = {
        "scorer": AmortizedScorer(ranker),
        "microbatched": AmortizedScorer(ranker, 7),
        "cached": AmortizedScorer(ranker, cache=HistoryCache(2**20)),
        "eager": AmortizedScorer(ranker, 11, backend="eager"),
    }
    if not is_weighted:
        export_package(ranker, tmp_path / "package", test_export_rankers.SCHEMA, tables="float32")
        scorers["exported"] = AmortizedScorer(load_package(tmp_path / "package"), 64)
    random = np.random.default_rng(draw)
    for part in range(REQUESTS // PART // RANKERS):
        sizes = zip(
            random.integers(MOST_EVENTS, size=PART), random.integers(1, MOST_CANDIDATES, size=PART), strict=True
        )
        batch = make_stranger_batch([(int(n), int(m)) for n, m in sizes], is_weighted, draw * REQUESTS + part)
        batch.users = torch.arange(PART)
        scorers["cached"].score(replace(batch, sequences=batch.keep_latest(0).sequences))
        with torch.no_grad():
            expected = ranker(batch.to_impressions())
        assert not expected.isnan().any()
        for name, scorer in scorers.items():
            torch.testing.assert_close(scorer.score(batch), expected, rtol=1e-5, atol=1e-5, msg=name)
