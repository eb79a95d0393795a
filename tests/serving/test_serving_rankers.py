"""The scorer serves any ranker: whole, in micro-batches, from a cache, by native code, in bfloat16 - one function."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, EmbeddingConfig
from torchrec.inference.modules import quantize_embeddings
from torchrec.sparse.jagged_tensor import KeyedTensor

from tests.models.strangers import MODELS, TABLES, make_bags, make_events
from tests.models.test_rankers import OF_REQUEST, SIZES, call_mmoe, make_batch, make_ranker, make_tower
from torchrec_amort import (
    AmortizedEmbeddingBagCollection,
    AmortizedHistoryArch,
    AmortizedScorer,
    HistoryCache,
    HistoryTower,
    InputError,
    RequestBatch,
    Rollout,
    ScoringService,
    score_impressions,
)
from torchrec_amort.jagged_ids import keyed
from torchrec_amort.models.ranker import ModelRanker
from torchrec_amort.modules.events import EventEncoder
from torchrec_amort.modules.rivals import MeanPooling, TargetAttention
from torchrec_amort.serving.native_encoder import why_not_native
from torchrec_amort.serving.phases import Backend


def with_users(batch: RequestBatch) -> RequestBatch:
    return replace(batch, users=torch.arange(len(batch)))


@pytest.mark.parametrize("shared", [False, True], ids=["own events", "shared table"])
@pytest.mark.parametrize("name", MODELS)
def test_every_path_gives_the_models_scores(name: str, shared: bool) -> None:
    ranker = make_ranker(name, make_tower(shared, width=16 if name == "MMoE" else 8))
    assert isinstance(ranker, ModelRanker)
    batch = with_users(make_batch(SIZES))
    with torch.no_grad():
        expected = ranker(batch.to_impressions())
    call = call_mmoe if name == "MMoE" else None
    paths: dict[str, AmortizedScorer] = {
        "eager": AmortizedScorer(ranker.model, call=call, backend="eager"),
        "auto": AmortizedScorer(ranker),
        "micro-batches": AmortizedScorer(ranker, 3),
        "cache": AmortizedScorer(ranker, 4, HistoryCache(2**20)),
    }
    for path, scorer in paths.items():
        for _ in range(2):
            torch.testing.assert_close(scorer.score(batch), expected, rtol=0, atol=2e-6, msg=path)


def make_two_towers() -> ModelRanker:
    torch.manual_seed(0)
    causal = AmortizedHistoryArch(8, 1, 2, history_attention="causal")
    towers = [
        HistoryTower("clicks", causal, events=make_events(), starts_at_zero=False),
        HistoryTower("buys", MeanPooling(8), events=make_events(), starts_at_zero=False),
        HistoryTower("views", TargetAttention(8), item="item", starts_at_zero=False),
    ]
    sparse = AmortizedEmbeddingBagCollection(make_bags(), towers, OF_REQUEST)
    return ModelRanker(MODELS["DLRM"](sparse)).eval()


def test_histories_of_several_towers_are_cached_and_extended_each_for_itself() -> None:
    ranker, cache = make_two_towers(), HistoryCache(2**20)
    scorer = AmortizedScorer(ranker, cache=cache)
    long = with_users(make_batch(((6, 2), (4, 1))))
    short = RequestBatch(**vars(long) | {"sequences": long.keep_latest(0).sequences})
    for batch in (short, long, long):
        with torch.no_grad():
            torch.testing.assert_close(scorer.score(batch), ranker(batch), rtol=0, atol=2e-6)
    # Only the causal history is extended: the others are encoded again.
    assert {name: cache.counters()[name] for name in ("hits", "extensions", "misses")} == {
        "hits": 6,
        "extensions": 2,
        "misses": 10,
    }


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_encoders_run_in_bfloat16(backend: Backend) -> None:
    ranker, batch = make_ranker("DLRM"), make_batch(SIZES)
    in_bfloat16 = AmortizedScorer(ranker, dtype=torch.bfloat16, backend=backend).score(batch)
    exact = AmortizedScorer(ranker).score(batch)
    assert in_bfloat16.dtype == torch.float32
    assert not torch.equal(in_bfloat16, exact)
    torch.testing.assert_close(in_bfloat16, exact, rtol=0, atol=0.05)


def test_an_encoder_is_native_where_native_code_can() -> None:
    ranker = make_ranker("DLRM")
    assert isinstance(ranker, ModelRanker)
    (tower,) = ranker.collection.towers
    if why_not_native(tower.encoder, torch.float32) is None:
        AmortizedScorer(ranker, backend="native").score(make_batch(SIZES))
    other = make_ranker("DLRM", HistoryTower("clicks", MeanPooling(8), events=make_events()))
    with pytest.raises(ValueError, match="no native encoder: it serves AmortizedHistoryArch"):
        AmortizedScorer(other, backend="native")


def test_the_scorer_keeps_the_dense_weights_of_its_moment_and_leaves_the_model_as_it_is() -> None:
    ranker, batch = make_ranker("MMoE", make_tower(width=16)).train(), make_batch(SIZES)
    scorer = AmortizedScorer(ranker)
    before = scorer.score(batch)
    assert all(module.training for module in ranker.modules())
    with torch.no_grad():
        for name, weight in ranker.named_parameters():
            if "embedding" not in name:
                weight.add_(1.0)
    assert torch.equal(scorer.score(batch), before)
    loss = ranker(batch).sum()
    loss.backward()
    assert all(weight.grad is not None for weight in ranker.parameters())


def test_quantized_tables_are_served() -> None:
    ranker, batch = make_ranker("DLRM"), make_batch(SIZES)
    exact = AmortizedScorer(ranker).score(batch)
    quantized = quantize_embeddings(ranker, dtype=torch.qint8, inplace=False)
    assert not any(isinstance(module, EmbeddingBagCollection) for module in quantized.modules())
    scored = AmortizedScorer(quantized).score(batch)
    assert not torch.equal(scored, exact)
    torch.testing.assert_close(scored, exact, rtol=0, atol=0.02)


def test_weighted_bags_are_served() -> None:
    ranker, batch = make_ranker("DLRM", is_weighted=True), make_batch(SIZES, is_weighted=True)
    with torch.no_grad():
        torch.testing.assert_close(AmortizedScorer(ranker, 3).score(batch), ranker(batch), rtol=0, atol=2e-6)
    with pytest.raises(InputError, match="request_sparse has no weights"):
        AmortizedScorer(ranker).score(replace(batch, request_sparse=make_batch(SIZES).request_sparse))


def test_what_does_not_fit_is_told() -> None:
    ranker, batch = make_ranker("DLRM"), make_batch(SIZES)
    scorer = AmortizedScorer(ranker)
    bad = batch.shallow_copy()
    bad.candidate_sparse.values()[0] = TABLES["item"][0]
    with pytest.raises(InputError, match="has id 30, not 0 to 29"):
        scorer.score(bad)
    lacking = replace(batch, request_sparse=batch.request_sparse.split([1, 1])[0])
    with pytest.raises(InputError, match=r"request_sparse has \['user'\], but the model reads 'country', too"):
        scorer.score(lacking)
    ranker.model.forward = partial(ranker.model.forward)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="has a forward of its own.*: score with the model itself"):
        AmortizedScorer(ranker)
    with pytest.raises(ValueError, match="the model is a Linear, which is no ranker"):
        AmortizedScorer(nn.Linear(1, 1))


def test_a_limit_of_places_is_kept_by_all_towers() -> None:
    events = EventEncoder(["history_item"], 8, max_length=3)
    tower = HistoryTower("clicks", AmortizedHistoryArch(8, 1, 2), events=make_events(), event_encoder=events)
    ranker, batch = make_ranker("DLRM", tower), make_batch(SIZES)
    with torch.no_grad():
        expected = ranker(batch.keep_latest(3))
    torch.testing.assert_close(AmortizedScorer(ranker).score(batch), expected, rtol=0, atol=2e-6)
    with pytest.raises(InputError, match="request 2: a history of 5 events, but the limit is 3"):
        AmortizedScorer(ranker, when_longer="refuse").score(batch)


def test_a_service_and_a_rollout_take_any_ranker() -> None:
    ranker, batch = make_ranker("SimpleDeepFMNN"), with_users(make_batch(SIZES))
    scorer = AmortizedScorer(ranker)
    with torch.no_grad():
        expected = ranker(batch)
    with ScoringService(scorer, num_workers=2, max_waiting=4) as service:
        for future in [service.submit(batch) for _ in range(3)]:
            torch.testing.assert_close(future.result(), expected, rtol=0, atol=2e-6)
    as_impressions = partial(score_impressions, ranker)
    with Rollout(
        scorer.score, control=as_impressions, reference=as_impressions, experiment="any", share=1.0, sample_rate=1.0
    ) as rollout:
        for row in range(len(batch)):
            rollout.score(batch.select(torch.tensor([row])))
    assert rollout.switched_back is None
    assert rollout.counters()["largest_difference"] <= 2e-6


class Halved(ModelRanker):
    def score_rows(self, batch: RequestBatch, rows: Any) -> Tensor:
        return super().score_rows(batch, rows) / 2


class Shifted(AmortizedEmbeddingBagCollection):
    def forward(self, rows: Any) -> Any:
        bags = super().forward(rows)
        return KeyedTensor(bags.keys(), bags.length_per_key(), bags.values() + 1)


def hook_on_out(ranker: ModelRanker) -> None:
    ranker.collection.towers[0].out.register_forward_hook(lambda _, args, vectors: 2 * vectors)


def other_call(ranker: ModelRanker) -> None:
    ranker.call = lambda model, batch, rows: model(batch.dense * 2, rows)


def other_class(ranker: ModelRanker) -> None:
    ranker.__class__ = Halved


def one_vector() -> HistoryTower:
    arch = AmortizedHistoryArch(8, num_layers=1, num_heads=2)
    return HistoryTower("clicks", arch, events=make_events(), starts_at_zero=False)


@pytest.mark.parametrize("change", [hook_on_out, other_call, other_class])
def test_what_changes_around_a_fast_head_is_served(change: Callable[[ModelRanker], None]) -> None:
    ranker, batch = make_ranker("DLRM", one_vector()), make_batch(SIZES)
    assert isinstance(ranker, ModelRanker)
    before = AmortizedScorer(ranker).score(batch)
    change(ranker)
    with torch.no_grad():
        expected = ranker(batch)
    assert not torch.allclose(expected, before, atol=1e-4)
    torch.testing.assert_close(AmortizedScorer(ranker).score(batch), expected, rtol=0, atol=2e-6)


def of_one_history(*limits: int | None) -> list[HistoryTower]:
    """Towers that know places for so many events."""
    return [
        HistoryTower(
            f"of_{limit}",
            AmortizedHistoryArch(8),
            events=make_events(),
            event_encoder=EventEncoder(["history_item"], 8, limit),
            starts_at_zero=False,
        )
        for limit in limits
    ]


def test_a_tower_that_reads_any_number_of_events_reads_those_of_the_other_one_of_its_history() -> None:
    ranker, batch = make_ranker("DLRM", *of_one_history(2, None)), make_batch(SIZES)
    assert max(events for events, _ in SIZES) > 2
    with torch.no_grad():
        expected = ranker(batch.keep_latest(2))
    torch.testing.assert_close(AmortizedScorer(ranker).score(batch), expected, rtol=0, atol=2e-6)


def test_what_serving_would_leave_out_is_refused() -> None:
    ranker = make_ranker("DLRM", one_vector())
    assert isinstance(ranker, ModelRanker)
    ranker.collection.__class__ = Shifted
    with pytest.raises(ValueError, match=r"model\.sparse_arch\..* is a Shifted .*: score with the model itself"):
        AmortizedScorer(ranker)
    with pytest.raises(ValueError, match="a Sequential around a ranker: unwrap it"):
        AmortizedScorer(nn.Sequential(make_ranker("DLRM")))
    with pytest.raises(ValueError, match="towers read one history, .* places for other numbers of events, 2 and 3"):
        AmortizedScorer(make_ranker("DLRM", *of_one_history(2, 3)))
    ranker = make_ranker("DLRM")
    assert isinstance(ranker, ModelRanker)
    ranker.call = lambda _, batch, rows: ranker.model(batch.dense, rows)
    with pytest.raises(ValueError, match="call reads the model from its variable 'ranker', and not from the model"):
        AmortizedScorer(ranker)
    for options in ({"backend": "nativ"}, {"when_longer": "drop"}, {"dtype": torch.float16}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name} is {value!r}, not "):
            AmortizedScorer(make_ranker("DLRM"), **options)


def test_events_that_lack_a_feature_are_told() -> None:
    tables = [
        EmbeddingConfig(name=f"t_{name}", feature_names=[name], num_embeddings=30, embedding_dim=8)
        for name in ("film", "kind", "candidate_item")
    ]
    ranker = make_ranker("DLRM", HistoryTower("clicks", AmortizedHistoryArch(8), events=EmbeddingCollection(tables)))
    batch, ids = make_batch(((3, 1), (2, 2))), torch.ones(5, dtype=torch.int64)
    items = batch.sequences["candidate_item"].values(), batch.num_candidates
    events = {"film": (ids, torch.tensor([3, 2])), "kind": (ids, torch.tensor([2, 3])), "candidate_item": items}
    with pytest.raises(InputError, match=r"request 0: sequences\['kind'\] has 2 entries, .*'film'\] has 3: each event"):
        AmortizedScorer(ranker).score(replace(batch, sequences=keyed(events, 2)))


def test_autocast_of_the_caller_changes_no_score() -> None:
    ranker, batch = make_ranker("DLRM", one_vector()), make_batch(SIZES)
    scorer = AmortizedScorer(ranker)
    expected = scorer.score(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer.score(batch), expected)
