import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.inference.modules import quantize_embeddings
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.conftest import HASHED, MAX_HISTORY, NUM_ITEMS, SCHEMA, make_requests, spread_ids, with_weights
from torchrec_amort import (
    AmortizedDLRM,
    AmortizedDLRMTrain,
    AmortizedHistoryArch,
    AmortizedScorer,
    HistoryCache,
    InputError,
    ModelConfig,
    RequestBatch,
    RequestSchema,
    attach_history,
    build_model,
)
from torchrec_amort.models.build import ENCODERS
from torchrec_amort.serving.lookup import BagLookup
from torchrec_amort.serving.rollout import Rollout, score_impressions
from torchrec_amort.serving.service import ScoringService
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.sharding import shard

shapes = st.lists(st.tuples(st.integers(0, MAX_HISTORY), st.integers(1, 5)), min_size=1, max_size=4)
seeds = st.integers(0, 2**20)
SERVED = [word for word in ENCODERS if word not in ("append_self", "concatenation")]
TOLERANCE = 1e-5


def make_model(seed: int = 0, schema: RequestSchema = SCHEMA, **changes: Any) -> AmortizedDLRM:
    """A model none of whose weights is zero."""
    sizes: dict[str, Any] = {"embedding_dim": 8, "dense_layers": [6], "over_layers": [16, 10]}
    config = ModelConfig(**(sizes | {"history_length": MAX_HISTORY} | changes))
    model = build_model(schema, config, seed=seed).eval()
    assert isinstance(model, AmortizedDLRM)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or ".bias." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_batch(sizes: list[tuple[int, int]], seed: int = 0) -> RequestBatch:
    return RequestBatch.from_requests(make_requests(sizes, seed), SCHEMA)


def by_impressions(model: nn.Module, batch: RequestBatch) -> Tensor:
    with torch.no_grad():
        return model(batch.to_impressions())


def assert_same(scores: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)


@given(
    shapes,
    st.sampled_from(["dot", "dcn"]),
    st.sampled_from(SERVED),
    st.sampled_from(["auto", "eager"]),
    st.one_of(st.none(), st.integers(1, 7)),
    seeds,
)
@example([(0, 1)], "dot", "none", "auto", None, 0)
@example([(0, 1), (5, 4)], "dcn", "none", "auto", 3, 0)
@example([(0, 3)], "dot", "append_cross", "auto", None, 0)
def test_scores_are_those_of_the_model_on_impressions(
    sizes: list[tuple[int, int]], interaction: str, encoder: str, backend: Any, microbatch: int | None, seed: int
) -> None:
    model, batch = make_model(interaction=interaction, history=encoder), make_batch(sizes, seed)
    scorer = AmortizedScorer(model, microbatch, backend=backend)
    assert_same(scorer.score(batch), by_impressions(model, batch))


@given(
    shapes,
    st.fixed_dictionaries(
        {
            "positions": st.sampled_from(["recency", "rotary", "none"]),
            "history_vectors": st.integers(1, 2),
            "history_summary": st.booleans(),
            "recent_events": st.sampled_from([None, 2]),
            "history": st.sampled_from(["append_cross", "append_cross_causal", "append_candidate_self"]),
            "interaction": st.sampled_from(["dot", "dcn"]),
        }
    ),
    seeds,
)
def test_every_option_of_the_encoder_is_served(sizes: list[tuple[int, int]], options: Any, seed: int) -> None:
    model, batch = make_model(**options), make_batch(sizes, seed)
    assert_same(AmortizedScorer(model, 2).score(batch), by_impressions(model, batch))


@pytest.mark.parametrize("kind", [DLRM, DLRM_DCN])
@pytest.mark.parametrize("sizes", [[(5, 4)], [(3, 2), (0, 1), (8, 3)]])
def test_a_dlrm_with_history_attached_is_served(kind: type[DLRM], sizes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=rows, embedding_dim=8)
        for name, rows in (("movie_id", NUM_ITEMS), ("genres", 5))
    ]
    options: dict[str, Any] = {"dcn_num_layers": 2, "dcn_low_rank_dim": 3} if kind is DLRM_DCN else {}
    dlrm = kind(EmbeddingBagCollection(tables=tables), 1, [6, 8], [12, 2], **options)
    items = EmbeddingConfig(
        name="item", feature_names=["history_item", "candidate_item"], num_embeddings=NUM_ITEMS, embedding_dim=8
    )
    model = attach_history(
        dlrm, EmbeddingCollection(tables=[items]), AmortizedHistoryArch(8, num_heads=2, num_vectors=2)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = make_batch(sizes)
    batch.request_dense = torch.empty(len(batch), 0)
    batch.sequences = batch.sequences.permute(
        [batch.sequences.keys().index(key) for key in ("history_item", "candidate_item")]
    )
    assert_same(AmortizedScorer(model, 3).score(batch), by_impressions(model, batch))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("interaction", ["dot", "dcn"])
def test_bfloat16_scores_are_close(backend: Any, interaction: str) -> None:
    model, batch = make_model(interaction=interaction), make_batch([(8, 30), (0, 5), (3, 8)])
    scores = AmortizedScorer(model, dtype=torch.bfloat16, backend=backend).score(batch)
    assert scores.dtype == torch.float32
    assert_same(torch.sigmoid(scores), torch.sigmoid(by_impressions(model, batch)), 2e-2)


def test_requests_may_be_plain_mappings() -> None:
    model, requests = make_model(), make_requests([(3, 2), (0, 1)])
    expected = by_impressions(model, RequestBatch.from_requests(requests, SCHEMA))
    assert_same(AmortizedScorer(model, schema=SCHEMA).score(requests), expected)
    with pytest.raises(InputError, match="schema"):
        AmortizedScorer(model).score(requests)


@pytest.mark.parametrize("validate", [True, False])
def test_requests_may_be_a_table_which_is_checked_as_it_is_read(validate: bool) -> None:
    model, requests = make_model(), make_requests([(3, 2), (0, 1)])
    table = pa.Table.from_pylist(requests, SCHEMA.arrow_schema())
    scorer = AmortizedScorer(model, schema=SCHEMA, validate=validate)
    scorer.warm_up(table)
    assert_same(scorer.score(table), by_impressions(model, RequestBatch.from_arrow(table, SCHEMA)))
    requests[1]["candidate_item"] = [NUM_ITEMS]
    with pytest.raises(InputError, match=f"requests: request 1, candidate 0: .* has id {NUM_ITEMS}, not 0 to"):
        scorer.score(pa.Table.from_pylist(requests, SCHEMA.arrow_schema()))
    with pytest.raises(InputError, match="requests are given as a table: give the scorer the schema"):
        AmortizedScorer(model).score(table)


def test_a_batch_that_was_changed_after_it_was_read_is_refused() -> None:
    scorer, batch = AmortizedScorer(make_model(), schema=SCHEMA), make_batch([(3, 2), (0, 1)])
    scorer.score(batch)
    batch.sequences.values()[0] = -1
    with pytest.raises(InputError, match="has id -1"):
        scorer.score(batch)


def test_requests_may_come_one_by_one() -> None:
    model, requests = make_model(), make_requests([(3, 2), (0, 1)])
    scorer = AmortizedScorer(model, schema=SCHEMA)
    scorer.warm_up(request for request in requests)
    assert_same(scorer.score(iter(requests)), scorer.score(requests))


@pytest.mark.parametrize("path", [AmortizedScorer.score, AmortizedScorer.warm_up])
@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (make_requests([(1, 1)])[0], r"one mapping by itself: give a list of requests: \[request\]"),
        ("requests", "requests: a str: give a list of mappings"),
        (None, "requests: a NoneType: give a list of mappings"),
        (["user_id"], "request 0 is a str, not a mapping"),
        ([*make_requests([(1, 1)]), None], "request 1 is a NoneType, not a mapping"),
        ([], "an empty list"),
        (pa.Table.from_pylist([], SCHEMA.arrow_schema()), "there is none"),
        (make_batch([(1, 1)]).select(torch.empty(0, dtype=torch.int64)), "there is none"),
    ],
)
def test_what_is_no_list_of_requests_is_told(path: Callable[..., Any], requests: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        path(AmortizedScorer(make_model(), schema=SCHEMA), requests)


def summed_and_weighted(bags: EmbeddingBagCollection) -> EmbeddingBagCollection:
    tables = [replace(table, pooling=PoolingType.SUM) for table in bags.embedding_bag_configs()]
    return EmbeddingBagCollection(tables=tables, is_weighted=True)


def make_weighted_model(interaction: str = "dot", **changes: Any) -> AmortizedDLRM:
    """A model both of whose collections of bags are weighted."""
    parts = make_model(**changes)
    assert parts.request_sparse_arch is not None
    model = AmortizedDLRM(
        candidate_embedding_bag_collection=summed_and_weighted(parts.sparse_arch.embedding_bag_collection),
        request_embedding_bag_collection=summed_and_weighted(parts.request_sparse_arch.embedding_bag_collection),
        dense_in_features=parts.dense_in_features,
        dense_arch_layer_sizes=[6, 8],
        over_arch_layer_sizes=[16, 2],
        history_embedding_collection=parts.history_embedding_collection,
        event_encoder=parts.event_encoder,
        history_arch=parts.history_arch,
        interaction=interaction,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_weighted_batch(sizes: list[tuple[int, int]], seed: int = 0) -> RequestBatch:
    random = torch.Generator().manual_seed(seed)
    return with_weights(make_batch(sizes, seed), lambda ids: torch.randn(ids.shape, generator=random))


@settings(max_examples=20)
@given(shapes, st.sampled_from(["dot", "dcn"]), st.sampled_from(["auto", "eager"]), st.integers(1, 7), seeds)
def test_weighted_bags_score_the_same_however_a_batch_is_cut(
    sizes: list[tuple[int, int]], interaction: str, backend: Any, microbatch: int, seed: int
) -> None:
    model, batch = make_weighted_model(interaction), make_weighted_batch(sizes, seed)
    expected = by_impressions(model, batch)
    with torch.no_grad():
        assert_same(model(batch), expected)
    whole, cut = AmortizedScorer(model, backend=backend), AmortizedScorer(model, microbatch, backend=backend)
    assert_same(whole.score(batch), expected)
    assert_same(cut.score(batch), expected)
    assert_same(whole.score(batch.to_impressions()), expected)
    assert_same(torch.cat([cut.score(batch.select(torch.tensor([row]))) for row in range(len(batch))]), expected)
    assert_same(score_impressions(model, batch, microbatch_size=microbatch), expected)


bags_of_ids = st.one_of(
    st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=2, max_size=12),
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=1), min_size=2, max_size=12),
)


@settings(max_examples=20)
@given(bags_of_ids, st.data(), st.sampled_from([None, torch.float]), st.sampled_from([torch.float, torch.double]))
def test_weighted_bags_are_sums_of_rows_times_weights(
    bags: list[list[int]], data: st.DataObject, quantized: torch.dtype | None, dtype: torch.dtype
) -> None:
    rows = len(bags) // 2
    bags = bags[: 2 * rows]
    lengths = torch.tensor([len(bag) for bag in bags])
    weights = torch.randn(int(lengths.sum()), dtype=dtype)
    ids = torch.tensor([i for bag in bags for i in bag], dtype=torch.int64)
    configs = [
        EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=5, embedding_dim=4) for name in ("f", "g")
    ]
    collection = EmbeddingBagCollection(tables=configs, is_weighted=True)
    expected = []
    for place, (bag, of_bag) in enumerate(zip(bags, weights.split(lengths.tolist()), strict=True)):
        table = collection.embedding_bags["fg"[place // rows]].weight.detach()
        terms = [weight * table[i] for i, weight in zip(bag, of_bag, strict=True)]
        expected.append(sum(terms, torch.zeros(4)).float())
    if quantized is not None:
        collection = quantize_embeddings(nn.ModuleDict({"bags": collection}), dtype=quantized, inplace=True)["bags"]
    features = KeyedJaggedTensor(["f", "g"], ids, weights, lengths, stride=rows)
    for slot, first in zip(BagLookup(collection, "bags")(features).values(), (0, rows), strict=True):
        assert_same(slot.tensor().detach(), torch.stack(expected[first : first + rows]))


def unweighted(batch: RequestBatch, *names: str) -> RequestBatch:
    """The batch without the weights of some fields."""
    kjts = {name: getattr(batch, name) for name in names}
    return replace(
        batch,
        **{
            name: KeyedJaggedTensor(of.keys(), of.values(), lengths=of.lengths(), stride=of.stride())
            for name, of in kjts.items()
        },
    )


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("name", ["candidate_sparse", "request_sparse"])
def test_weights_that_the_bags_do_not_read_or_miss_are_refused(name: str, validate: bool) -> None:
    other = {"candidate_sparse": "request_sparse", "request_sparse": "candidate_sparse"}[name]
    batch = make_weighted_batch([(3, 2), (0, 1)])
    cases = [
        (
            make_model(),
            unweighted(batch, other),
            "has weights, but .* not weighted: build it with is_weighted=True, or",
        ),
        (make_weighted_model(), unweighted(batch, name), "has no weights, but .* is weighted: give each id its weight"),
    ]
    for model, wrong, message in cases:
        scorer = AmortizedScorer(model, 1, validate=validate)
        for score in (scorer.score, scorer.warm_up, model):
            with pytest.raises(InputError, match=f"batch: {name} {message}"):
                score(wrong)
    # Weights of sequences are nobody's: an EmbeddingCollection does not read them.
    only_sequences = unweighted(batch, name, other)
    assert_same(AmortizedScorer(make_model()).score(only_sequences), by_impressions(make_model(), only_sequences))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharded_bags_apply_the_weights_that_unsharded_ones_leave_out_so_both_are_refused() -> None:
    def sharded(model: AmortizedDLRM) -> DistributedModelParallel:
        module = shard(model, device=torch.device("cpu"), optimizer=OptimizerConfig(), batch_size=3).module
        assert isinstance(module, DistributedModelParallel)
        return module

    batch = make_weighted_batch([(3, 2), (0, 1)])
    plain = unweighted(batch, "candidate_sparse", "request_sparse")
    model, alone = sharded(make_model()), make_model()
    assert_same(model(plain).detach(), AmortizedScorer(alone).score(plain))
    bags: Any = model.module.sparse_arch
    with torch.no_grad():
        left_out, applied = alone.sparse_arch(batch.candidate_sparse), bags(batch.candidate_sparse)
        assert_same(left_out, alone.sparse_arch(plain.candidate_sparse))
    assert float((applied - left_out).abs().max()) > 0.1
    for refusing in (model, AmortizedScorer(alone).score):
        with pytest.raises(InputError, match="candidate_sparse has weights, but"):
            refusing(batch)
    weighted = make_weighted_model()
    expected = AmortizedScorer(weighted, 1).score(batch)
    assert_same(sharded(weighted)(batch).detach(), expected)


def test_a_mean_cannot_be_weighted() -> None:
    table = EmbeddingBagConfig(name="t", feature_names=["f"], num_embeddings=5, embedding_dim=4)
    bags = EmbeddingBagCollection(tables=[replace(table, pooling=PoolingType.MEAN)], is_weighted=True)
    with pytest.raises(ValueError, match="table 't' is weighted and pools by the mean"):
        BagLookup(bags, "bags")


def copy_of(batch: RequestBatch, given_by: str) -> RequestBatch:
    """The same batch, with nothing worked out yet."""

    def copied(value: Any) -> Any:
        if not isinstance(value, KeyedJaggedTensor):
            return value.clone() if isinstance(value, Tensor) else value
        rows = {given_by: getattr(value, given_by)().clone()}
        weights = value.weights_or_none()
        weights = None if weights is None else weights.clone()
        return KeyedJaggedTensor(list(value.keys()), value.values().clone(), weights, stride=value.stride(), **rows)

    return RequestBatch(**{field.name: copied(getattr(batch, field.name)) for field in fields(RequestBatch)})


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("given_by", ["lengths", "offsets"])
def test_a_batch_trains_as_if_it_had_never_been_scored(is_weighted: bool, given_by: str) -> None:
    sizes = [(3, 2), (0, 1), (MAX_HISTORY + 2, 4), (2, 3)]
    model = make_weighted_model() if is_weighted else make_model()
    made = make_weighted_batch(sizes) if is_weighted else make_batch(sizes)
    short = made.keep_latest(MAX_HISTORY)
    batch, untouched, long = (copy_of(of, given_by) for of in (short, short, made))
    plain, cut = AmortizedScorer(model), AmortizedScorer(model, 2, HistoryCache(2**20), backend="eager")
    whatever = partial(score_impressions, model, microbatch_size=3)
    make_rollout = partial(Rollout, cut.score, control=model, reference=whatever, experiment="films", sample_rate=1.0)
    with make_rollout(share=0.0) as shadow, make_rollout(share=0.5) as both:
        for scored in (batch, long):
            plain.warm_up(scored)
            for score in (plain.score, cut.score, cut.score, AmortizedScorer(model, validate=False).score, whatever):
                score(scored)
        for scorer in (plain, shadow, both):
            scorer.score(batch)
            with ScoringService(scorer, 1, 1) as service:
                service.submit(batch).result()
    gradients = []
    for trained in (batch, untouched):
        model.zero_grad()
        loss, _ = AmortizedDLRMTrain(model)(trained)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for gradient, expected in zip(*gradients, strict=True):
        assert torch.equal(gradient, expected)
    for field in fields(RequestBatch):
        value, expected = getattr(batch, field.name), getattr(untouched, field.name)
        if isinstance(value, KeyedJaggedTensor):
            assert value.keys() == expected.keys()
            for part in ("values", "lengths", "offsets", *(["weights"] if is_weighted else [])):
                assert torch.equal(getattr(value, part)(), getattr(expected, part)())
                assert not getattr(value, part)().is_inference()
        elif isinstance(value, Tensor):
            assert torch.equal(value, expected)


def test_dense_weights_are_those_of_the_moment_the_scorer_is_made() -> None:
    model, batch = make_model(), make_batch([(3, 2)])
    scorer, expected = AmortizedScorer(model), by_impressions(model, batch)
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" not in name:
                parameter.add_(1.0)
    assert_same(scorer.score(batch), expected)
    assert model.training


def test_bad_input_is_one_clear_error_and_the_scorer_goes_on() -> None:
    model, good = make_model(), make_batch([(3, 2)])
    scorer = AmortizedScorer(model, history_length=4, when_longer="refuse")
    expected = by_impressions(model, good)
    outside = make_batch([(3, 2)])
    outside.candidate_sparse.values()[0] = 10_000
    with pytest.raises(InputError, match=r"request 0, candidate 0: candidate_sparse\['movie_id'\] has id 10000"):
        scorer.score(outside)
    with pytest.raises(InputError, match="request 1: a history of 6 events, but the limit is 4"):
        scorer.score(make_batch([(3, 2), (6, 1)]))
    with pytest.raises(InputError, match="finite"):
        bad = make_batch([(3, 2)])
        bad.candidate_dense[1, 0] = torch.nan
        scorer.score(bad)
    assert_same(scorer.score(good), expected)
    kept = AmortizedScorer(model, history_length=4).score(make_batch([(3, 2), (6, 1)]))
    assert_same(kept, by_impressions(model, make_batch([(3, 2), (6, 1)]).keep_latest(4)))


def test_scores_that_are_not_finite_are_not_returned() -> None:
    model = make_model()
    with torch.no_grad():
        model.over_arch.model[1].bias.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="candidate 0"):
        AmortizedScorer(model).score(make_batch([(3, 2)]))


def test_what_cannot_be_served_is_told() -> None:
    with pytest.raises(ValueError, match="for every candidate anew"):
        AmortizedScorer(make_model(history="concatenation")).score(make_batch([(1, 1)]))
    with pytest.raises(ValueError, match="microbatch_size is 0"):
        AmortizedScorer(make_model(), 0)
    with pytest.raises(ValueError, match="places for 8"):
        AmortizedScorer(make_model(), history_length=9)
    with pytest.raises(ValueError, match="reads no history"):
        AmortizedScorer(make_model(history="none"), cache=HistoryCache(100))
    with pytest.raises(ValueError, match="no native encoder"):
        AmortizedScorer(make_model(positions="rotary"), backend="native").score(make_batch([(1, 1)]))


def grown(requests: list[dict[str, Any]], events: int, seed: int) -> list[dict[str, Any]]:
    """The same users later, with some more events and other candidates."""
    later = make_requests([(events, len(request["candidate_item"]) + 1) for request in requests], seed)
    keys = ("history_item", "history_action", "history_time")
    pairs = zip(requests, later, strict=True)
    return [new | {k: old[k] + new[k] for k in keys} | {"user": old["user"]} for old, new in pairs]


@given(shapes, st.one_of(st.none(), st.integers(1, 7)), seeds)
def test_requests_with_ids_of_any_size_score_as_the_model_on_their_rows(
    sizes: list[tuple[int, int]], microbatch: int | None, seed: int
) -> None:
    model, requests = make_model(schema=HASHED), spread_ids(make_requests(sizes, seed))
    requests = [request | {"user": row} for row, request in enumerate(requests)]
    expected = by_impressions(model, RequestBatch.from_requests(requests, HASHED))
    scorer = AmortizedScorer(model, microbatch, HistoryCache(2**20), schema=HASHED)
    for _ in range(2):
        assert_same(scorer.score(requests), expected)
    assert scorer.cache is not None
    assert scorer.cache.counters()["hits"] == len(requests)


WITHOUT_AGE: dict[str, Any] = {"leave_out": ["history_age"], "positions": "none", "history": "append_cross_causal"}


@settings(max_examples=20)
@given(shapes, st.integers(0, 3), st.sampled_from(["auto", "eager"]), st.sampled_from(["none", "rotary"]), seeds)
def test_cached_and_extended_histories_score_as_encoded_ones(
    sizes: list[tuple[int, int]], events: int, backend: Any, positions: str, seed: int
) -> None:
    model = make_model(**(WITHOUT_AGE | {"positions": positions}))
    schema = SCHEMA.without(["history_age"])
    cache = HistoryCache(2**20)
    scorer = AmortizedScorer(model, cache=cache, backend=backend)
    first = [request | {"user": user} for user, request in enumerate(make_requests(sizes, seed))]
    for requests in (first, first, grown(first, events, seed + 1)):
        batch = RequestBatch.from_requests(requests, schema)
        assert_same(scorer.score(batch), by_impressions(model, batch))
    counters = cache.counters()
    assert counters["misses"] == len(sizes)
    assert counters["hits"] == len(sizes) * (2 if events == 0 else 1)
    assert counters["extensions"] == (0 if events == 0 else len(sizes))


def test_a_changed_history_is_never_served_from_what_it_was() -> None:
    model, cache = make_model(), HistoryCache(2**20)
    scorer = AmortizedScorer(model, cache=cache)
    for seed in range(4):
        requests = [make_requests([(4, 3)], seed)[0] | {"user": 1}]
        batch = RequestBatch.from_requests(requests, SCHEMA)
        assert_same(scorer.score(batch), by_impressions(model, batch))
    assert cache.counters()["misses"] == 4
    assert len(cache) == 1
    with pytest.raises(ValueError, match="another scorer's"):
        AmortizedScorer(model, cache=cache)
    batch.users = None
    with pytest.raises(InputError, match="users is None"):
        scorer.score(batch)


def test_what_the_model_does_not_read_does_not_change_a_cached_history() -> None:
    model, cache = make_model(**WITHOUT_AGE), HistoryCache(2**20)
    scorer = AmortizedScorer(model, cache=cache)
    (request,) = make_requests([(4, 3)])
    for seconds in (0, 10**5):
        # Later, all events are older; the batch tells, but the model does not look.
        batch = RequestBatch.from_requests([request | {"user": 1, "time": request["time"] + seconds}], SCHEMA)
        scorer.score(batch)
    assert cache.counters()["hits"] == 1


def test_many_threads_get_the_scores_of_one() -> None:
    model = make_model(**WITHOUT_AGE)
    schema = SCHEMA.without(["history_age"])
    scorer = AmortizedScorer(model, 4, HistoryCache(20_000))
    requests = [request | {"user": user % 5} for user, request in enumerate(make_requests([(6, 9)] * 30))]
    batches = [RequestBatch.from_requests([request], schema) for request in requests]
    expected = [by_impressions(model, batch) for batch in batches]
    errors: list[BaseException] = []

    def client(first: int) -> None:
        try:
            for place in range(len(batches)):
                row = (first + place) % len(batches)
                assert_same(scorer.score(batches[row]), expected[row])
                scorer.cache.forget(row % 5)  # type: ignore[union-attr]
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=client, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert scorer.cache is not None
    assert scorer.cache.nbytes <= 20_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interaction", ["dot", "dcn"])
def test_a_gpu_scores_as_a_cpu(dtype: torch.dtype, interaction: str) -> None:
    # Heads of dimension 8, which variable-length attention takes in bfloat16.
    model = make_model(**(WITHOUT_AGE | {"interaction": interaction, "embedding_dim": 16}))
    schema = SCHEMA.without(["history_age"])
    requests = [request | {"user": row} for row, request in enumerate(make_requests([(8, 30), (0, 5), (3, 8)]))]
    batch = RequestBatch.from_requests(requests, schema)
    expected = torch.sigmoid(by_impressions(model, batch))
    scorer = AmortizedScorer(model.cuda(), 16, HistoryCache(2**20), dtype=dtype)
    for _ in range(2):
        scores = scorer.score(batch)
        assert scores.is_cuda
        assert_same(torch.sigmoid(scores).cpu(), expected, 1e-4 if dtype == torch.float32 else 2e-2)
