"""Models of schemas of any features: plain loops in float64, and every way to score, give the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torchrec import JaggedTensor

from tests.models.test_rankers import in_float64
from tests.oracle import encode
from tests.schemas import Shapes, entries_of, make_requests, schemas, shapes
from torchrec_amort import AmortizedScorer, Feature, HistoryCache, InputError, RequestBatch, RequestSchema, TableConfig
from torchrec_amort.models.build import ModelConfig, TowerConfig, build_model
from torchrec_amort.models.ranker import ModelRanker
from torchrec_amort.models.tables import tables_of
from torchrec_amort.modules.events import Combine, Numbers
from torchrec_amort.modules.tower import HistoryTower

DIM = 8


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Models of few weights, with all that a tower may be."""
    history: Any = draw(st.sampled_from(["append_cross", "append_cross_causal", "mean_pooling", "target_attention"]))
    rotary = ["rotary"] if history.startswith("append") else []
    return ModelConfig(
        embedding_dim=DIM,
        history=history,
        history_length=6,
        history_layers=1,
        positions=draw(st.sampled_from(["recency", "none", *rotary])),
        combine=draw(st.sampled_from(get_args(Combine))),
        interaction=draw(st.sampled_from(["dot", "dcn"])),
        dense_layers=[4],
        over_layers=[6],
        dcn_low_rank_dim=3,
    )


@st.composite
def models(draw: st.DrawFn) -> tuple[RequestSchema, ModelConfig]:
    """Schemas, and models of them: a tower for each history, or others of some of its features beside."""
    schema, config = draw(schemas(trains=True)), draw(configs())
    if draw(st.booleans()):
        return schema, config
    towers = {}
    for history, features in schema.histories.items():
        film, *others = (feature.name for feature in features)
        some = [film, *(name for name in others if draw(st.booleans()))]
        compared: dict[str, Any] = {"history": history, "positions": "none", "windows": [1, 3]}
        towers[history] = TowerConfig(features=draw(st.sampled_from([None, some])))
        towers[f"like_{history}"] = TowerConfig(
            encoder="similarity", features=some, combine=draw(st.sampled_from(get_args(Combine))), **compared
        )
        towers[f"in_{history}"] = TowerConfig(encoder="matches", features=[film], combine="sum", **compared)
    return schema, replace(config, towers=towers)


def model_of(schema: RequestSchema, config: ModelConfig) -> ModelRanker:
    matches = any(tower.encoder == "matches" for tower in config.towers.values())
    widths = {"film": TableConfig(width=DIM if matches else 4), "tag": TableConfig(width=12)}
    known = {feature.table for feature in schema.features if feature.is_looked_up}
    schema = replace(schema, tables={name: table for name, table in widths.items() if name in known})
    ranker = build_model(schema, config, seed=0)
    assert isinstance(ranker, ModelRanker)
    for module in ranker.modules():
        if isinstance(module, Numbers):
            nn.init.uniform_(module.mean)
            nn.init.uniform_(module.deviation, 0.5, 2)
    return ranker.eval()


def in_double(numbers: JaggedTensor) -> JaggedTensor:
    return JaggedTensor(numbers.values().double(), lengths=numbers.lengths())


class Loops:
    """A model as plain loops over one request and one candidate at a time."""

    def __init__(self, ranker: ModelRanker, schema: RequestSchema) -> None:
        self.ranker, self.schema = ranker, schema
        self.tables = {feature: weight.detach() for feature, weight in weights_of_features(ranker).items()}

    def rows(self, feature: Feature, request: dict[str, Any]) -> list[Tensor]:
        """The vector of each entry, as it is looked up, or its numbers."""
        if feature.num_inputs:
            return [torch.tensor(np.float32(entry), dtype=torch.float64) for entry in entries_of(feature, request)]
        table = self.tables[feature.name]
        vectors = []
        for ids in entries_of(feature, request):
            total = torch.zeros(table.shape[1], dtype=torch.float64)
            for row in ids:
                total = total + table[row]
            mean = total / max(1, len(ids))
            # Collections of bags return float32.
            vectors.append(mean if feature in self.schema.sequence_features else mean.float().double())
        return vectors

    def vectors(self, tower: HistoryTower, names: list[str], request: dict[str, Any]) -> list[list[Tensor]]:
        """Of each entry, the fitted vector of each feature."""
        of = {feature.name: feature for feature in self.schema.features}
        fitted = [[tower.fit(name)(row) for row in self.rows(of[name], request)] for name in names]
        return [list(entry) for entry in zip(*fitted, strict=True)]

    def of_tower(self, tower: HistoryTower, request: dict[str, Any]) -> list[Tensor]:
        """What each candidate makes of one history."""
        encoder = tower.event_encoder
        events = []
        entries = self.vectors(tower, encoder.features, request)
        for place, vectors in enumerate(entries):
            first, others = vectors[0], sum(vectors[1:], torch.zeros_like(vectors[0]))
            event = first * (1 + others) if encoder.combine == "product" else first + others
            if encoder.joined is not None:
                event = encoder.joined(torch.cat(vectors))
            if encoder.recency is not None:
                event = event + encoder.recency.weight[len(entries) - 1 - place]
            events.append(event)
        candidates = [sum(v[1:], v[0]) for v in self.vectors(tower, tower.candidate_features, request)]
        return [tower.out(encode(tower.encoder, events, candidate)) for candidate in candidates]

    def logits(self, request: dict[str, Any]) -> list[Tensor]:
        """Of each candidate."""
        collection = self.ranker.collection
        vectors = {tower.name: self.of_tower(tower, request) for tower in collection.towers}
        of = {feature.name: feature for feature in self.schema.features}
        logits = []
        for place in range(len(request["film"])):
            slots = []
            for bag in collection.bags.widths:
                if bag in vectors:
                    slots.append(vectors[bag][place])
                    continue
                rows = self.rows(of[bag], request)
                row = rows[0] if of[bag].side == "request" else rows[place]
                fit = collection.bags.fit(bag)
                slots.append(row if fit is None else fit(row))
            dense = []
            for side, features in self.schema.dense_features.items():
                for feature in features:
                    numbers = self.rows(feature, request)
                    dense.append(numbers[0] if side == "request" else numbers[place])
            inputs = torch.cat(dense) if dense else torch.ones(1, dtype=torch.float64)
            model: Any = self.ranker.model
            hidden = model.dense_arch(inputs[None])
            logits.append(model.over_arch(model.inter_arch(hidden, torch.stack(slots)[None]))[0])
        return logits


def weights_of_features(ranker: ModelRanker) -> dict[str, Tensor]:
    collection = ranker.collection
    weights: dict[str, Tensor] = {}
    bags: Any
    for bags in (collection.request_bags, collection.candidate_bags):
        for table in bags.embedding_bag_configs() if bags is not None else ():
            weights |= {name: bags.embedding_bags[table.name].weight for name in table.feature_names}
    for sequences in collection.sequences:
        tables: Any = sequences
        for table in tables.embedding_configs():
            weights |= {name: tables.embeddings[table.name].weight for name in table.feature_names}
    return weights


@given(models(), shapes(), st.integers(0, 2**20))
@settings(max_examples=12)
def test_in_float64_a_model_is_its_plain_loops(
    model: tuple[RequestSchema, ModelConfig], sizes: Shapes, seed: int
) -> None:
    schema, config = model
    ranker, requests = in_float64(model_of(schema, config)), make_requests(schema, sizes, seed)
    batch = RequestBatch.from_requests(requests, schema)
    batch = replace(
        batch,
        request_dense=batch.request_dense.double(),
        candidate_dense=batch.candidate_dense.double(),
        dense_sequences={key: in_double(numbers) for key, numbers in batch.dense_sequences.items()},
    )
    loops = Loops(ranker, schema)
    with torch.no_grad():
        expected = torch.stack([logits for request in requests for logits in loops.logits(request)])
        torch.testing.assert_close(ranker(batch), expected, rtol=0, atol=1e-10)
        phases = ranker.score_candidates(ranker.encode_request(batch), batch)
        torch.testing.assert_close(phases, expected, rtol=0, atol=1e-10)


@given(models(), shapes(), st.integers(0, 2**20))
@settings(max_examples=12)
def test_every_way_to_score_gives_the_models_scores(
    model: tuple[RequestSchema, ModelConfig], sizes: Shapes, seed: int
) -> None:
    schema, config = model
    requests = make_requests(schema, sizes, seed)
    assert_every_way_is_the_same(model_of(schema, config), RequestBatch.from_requests(requests, schema))


def assert_every_way_is_the_same(ranker: ModelRanker, batch: RequestBatch) -> None:
    batch = replace(batch, users=torch.arange(len(batch)))
    shorter = batch.keep_latest(1)
    with torch.no_grad():
        expected = {False: ranker(batch.to_impressions()), True: ranker(shorter.to_impressions())}
        assert_same(ranker(batch), expected[False])
        assert_same(ranker.score_candidates(ranker.encode_request(batch), batch), expected[False])
    for backend in ("eager", "auto"):
        cached = AmortizedScorer(ranker, 2, HistoryCache(2**20), backend=backend)
        for scorer in (AmortizedScorer(ranker, backend=backend), cached):
            # Longer histories extend what is cached, where that can be.
            for is_short in (True, False, False):
                assert_same(scorer.score(shorter if is_short else batch), expected[is_short])


@pytest.mark.parametrize("kind", ["ids", "vector"])
def test_histories_of_lists_or_of_vectors_alone_are_scored_every_way(kind: Any) -> None:
    options: dict[str, Any] = {"table": "shared"} | ({"size": 4} if kind == "vector" else {"table_size": 9})
    features = (Feature("of", "candidate", kind, **options), Feature("seen", "event", kind, history="seen", **options))
    schema = RequestSchema("films", (*features, Feature("liked", "candidate", "label")))
    ranker = build_model(schema, ModelConfig(**SMALL), seed=0).eval()
    assert isinstance(ranker, ModelRanker)
    assert_every_way_is_the_same(ranker, batch_of(schema, [((3,), 2), ((0,), 1)]))


def assert_same(logits: Tensor, expected: Tensor) -> None:
    """To rounding, of numbers that may be large."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6 * max(1.0, float(expected.abs().max())))


FILM: dict[str, Any] = {"table_size": 30, "table": "film"}
SCHEMA = RequestSchema(
    "films",
    (
        Feature("film", "candidate", "id", **FILM),
        Feature("film_id", "candidate", "id", 30, column="film"),
        Feature("content", "candidate", "vector", size=4),
        Feature("clicks_film", "event", "id", history="clicks", **FILM),
        Feature("clicks_content", "event", "vector", size=4, table="content", history="clicks"),
        Feature("clicks_gap", "event", "gap", history="clicks"),
        Feature("buys_film", "event", "id", history="buys", **FILM),
        Feature("liked", "candidate", "label"),
    ),
)
SMALL: dict[str, Any] = {"embedding_dim": DIM, "history_layers": 1, "dense_layers": [], "over_layers": [8]}


def batch_of(schema: RequestSchema, sizes: Shapes) -> RequestBatch:
    return RequestBatch.from_requests(make_requests(schema, sizes, 0), schema)


def test_towers_have_encoders_lengths_and_histories_of_their_own() -> None:
    towers = {
        "clicks": TowerConfig(length=4),
        "buys": TowerConfig(length=2, encoder="mean_pooling", positions="none"),
        "focus": TowerConfig(history="clicks", length=4, encoder="target_attention"),
    }
    config = ModelConfig(**SMALL, towers=towers)
    assert config.history_lengths(SCHEMA) == {"clicks": 4, "buys": 2}
    ranker = build_model(SCHEMA, config, seed=0)
    assert isinstance(ranker, ModelRanker)
    assert [type(tower.encoder).__name__ for tower in ranker.collection.towers] == [
        "AmortizedHistoryArch",
        "MeanPooling",
        "TargetAttention",
    ]
    long, latest = batch_of(SCHEMA, [((6, 5), 3)]), batch_of(SCHEMA, [((6, 5), 3)]).keep_latest({"clicks": 4})
    with torch.no_grad():
        torch.testing.assert_close(AmortizedScorer(ranker.eval()).score(long), ranker(latest), rtol=0, atol=2e-6)
    with pytest.raises(InputError, match="a history of 6 events, but the limit is 4"):
        AmortizedScorer(ranker, when_longer="refuse").score(long)
    with pytest.raises(InputError, match=r"towers\.focus: keeps 9 events of 'clicks', and another tower 4"):
        ModelConfig(towers=towers | {"focus": TowerConfig(history="clicks", length=9)}).history_lengths(SCHEMA)
    with pytest.raises(InputError, match=r"towers\.views: no history 'views' in data set 'films', which has"):
        build_model(SCHEMA, ModelConfig(towers={"views": TowerConfig()}))


def test_a_tower_reads_the_features_that_it_names_and_candidates_those_that_share_their_tables() -> None:
    towers = {
        "clicks": TowerConfig(features=["clicks_film", "clicks_gap"]),
        "topics": TowerConfig(history="clicks", features=["clicks_content"], encoder="similarity"),
    }
    ranker = build_model(SCHEMA, ModelConfig(**SMALL, towers=towers), seed=0)
    assert isinstance(ranker, ModelRanker)
    read = [(tower.event_encoder.features, tower.candidate_features) for tower in ranker.collection.towers]
    assert read == [(["clicks_film", "clicks_gap"], ["film"]), (["clicks_content"], ["content"])]


def test_what_no_tower_reads_has_no_table_and_changes_no_score() -> None:
    towers = {"topics": TowerConfig(history="clicks", features=["clicks_content"], encoder="similarity")}
    ranker = build_model(SCHEMA, ModelConfig(**SMALL, towers=towers), seed=0).eval()
    assert isinstance(ranker, ModelRanker)
    assert set(weights_of_features(ranker)) == {"film_id"}
    requests = make_requests(SCHEMA, [((3, 2), 2)], 0)

    def scores(**changed: Any) -> Tensor:
        with torch.no_grad():
            return ranker(RequestBatch.from_requests([{**request, **changed} for request in requests], SCHEMA))

    assert torch.equal(scores(), scores(clicks_film=[1, 1, 1], clicks_at=[1, 2, 3], buys_film=[2, 2]))
    assert not torch.allclose(scores(), scores(clicks_content=[[9.0] * 4] * 3))


@pytest.mark.parametrize(
    ("features", "told"),
    [
        (
            ["clicks_film", "buys_film"],
            r"towers\.clicks: history 'clicks' has no feature 'buys_film', only \['clicks_fi",
        ),
        ([], r"towers\.clicks: features are none: name one of \['clicks_film'"),
        (
            ["clicks_gap"],
            r"no feature of candidates shares a table with history 'clicks', whose tables are \['clicks_g",
        ),
    ],
)
def test_features_that_a_tower_cannot_read_are_told(features: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        build_model(SCHEMA, ModelConfig(**SMALL, towers={"clicks": TowerConfig(features=features)}))


@pytest.mark.parametrize(
    ("features", "width", "told"),
    [
        (
            None,
            None,
            r"compares one feature of candidates with one of events, not \['film', 'content'\] with \['clicks_",
        ),
        (["clicks_film", "clicks_gap"], None, r"not \['film'\] with \['clicks_film', 'clicks_gap'\]: leave the others"),
        (["clicks_film"], 4, r"tower 'seen': .* 'clicks_film' is not of a table of width 8: give its table the enc"),
        (["clicks_content"], None, r"'clicks_content' is not of a table of width 8: .* compare numbers by similarity"),
    ],
)
def test_events_that_no_candidate_would_ever_match_are_refused(
    features: list[str] | None, width: int | None, told: str
) -> None:
    towers = {"seen": TowerConfig(history="clicks", encoder="matches", features=features)}
    schema = SCHEMA.with_tables({"film": TableConfig(width=width)})
    with pytest.raises(InputError, match=told):
        build_model(schema, ModelConfig(**SMALL, towers=towers))


def test_what_a_model_leaves_out_changes_no_score() -> None:
    config = ModelConfig(**SMALL, leave_out=["clicks_gap", "content", "clicks_content"])
    ranker = build_model(SCHEMA, config, seed=0).eval()
    requests = make_requests(SCHEMA, [((3, 2), 2)], 0)
    changed = [{**r, "content": [[9.0] * 4] * 2, "clicks_at": [1, 2, 3]} for r in requests]
    with torch.no_grad():
        one, other = (ranker(RequestBatch.from_requests(of, SCHEMA)) for of in (requests, changed))
    assert torch.equal(one, other)
    with pytest.raises(InputError, match="'clicks_age' cannot be left out: the features that can are"):
        build_model(SCHEMA, ModelConfig(leave_out=["clicks_age"]))


@pytest.mark.parametrize("feature", ["clicks_content", "content"])
def test_other_numbers_than_a_tower_reads_are_told(feature: str) -> None:
    ranker, batch = build_model(SCHEMA, ModelConfig(**SMALL), seed=0).eval(), batch_of(SCHEMA, [((3, 2), 2)])
    numbers = batch.dense_sequences[feature]
    narrow = JaggedTensor(numbers.values()[:, :3], lengths=numbers.lengths())
    other = replace(batch, dense_sequences={**batch.dense_sequences, feature: narrow})
    for score in (ranker, AmortizedScorer(ranker).score, AmortizedScorer(ranker, backend="eager").score):
        with pytest.raises(InputError, match=rf"\['{feature}'\] has 3 numbers for each entry, but tower 'clicks'"):
            score(other)


def test_candidates_need_a_table_to_read_a_history_by() -> None:
    features = [feature for feature in SCHEMA.features if feature.name not in ("film", "content")]
    with pytest.raises(InputError, match="no feature of candidates shares a table with history 'clicks', whose tables"):
        build_model(RequestSchema("films", tuple(features)), ModelConfig(**SMALL))


def test_features_of_one_side_share_a_table_in_any_model() -> None:
    shared = [Feature(name, "candidate", "id", 9, table="topic") for name in ("topic", "second_topic")]
    items = [Feature("candidate_item", "candidate", "item", 30), Feature("history_item", "event", "item", 30)]
    schema = RequestSchema("films", (*shared, *items, Feature("liked", "candidate", "label")))
    weights = [name for name in build_model(schema, ModelConfig(**SMALL)).state_dict() if "embedding_bags" in name]
    assert weights == ["sparse_arch.embedding_bag_collection.embedding_bags.topic.weight"]


def test_a_history_that_no_candidate_shares_a_table_with_is_told() -> None:
    features = (Feature("film", "candidate", "id", 30), Feature("seen", "event", "id", 30))
    schema = RequestSchema("films", (*features, Feature("liked", "candidate", "label")))
    with pytest.raises(InputError, match="no feature of candidates shares a table with history 'history', whose"):
        build_model(schema, ModelConfig(**SMALL))
    build_model(schema, ModelConfig(**SMALL, history="none"))


def test_items_of_candidates_may_have_any_name() -> None:
    features = (Feature("film", "candidate", "item", 30), Feature("seen", "event", "item", 30))
    schema = RequestSchema("films", (*features, Feature("liked", "candidate", "label")))
    batch = RequestBatch.from_requests([{"film": [1, 2], "seen": [3]}], schema)
    assert build_model(schema, ModelConfig(**SMALL))(batch).shape == (2, 1)


def test_a_managed_table_that_no_history_is_read_by_is_told() -> None:
    schema = SCHEMA.with_tables({"film_id": TableConfig(vocabulary="managed")})
    with pytest.raises(InputError, match="table 'film_id' of 'film_id' is managed, but the model reads no history of"):
        build_model(schema, ModelConfig(**SMALL))


def test_tables_start_from_files(tmp_path: Any) -> None:
    vectors = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    np.save(tmp_path / "film.npy", vectors)
    some = pa.table({"id": [3, 5], "vector": vectors[[3, 5]].tolist()})
    pq.write_table(some, tmp_path / "film.parquet")
    for name, expected in (("film.npy", vectors), ("film.parquet", vectors * np.isin(np.arange(30), [3, 5])[:, None])):
        table = TableConfig(width=4, pretrained=str(tmp_path / name))
        ranker = build_model(SCHEMA.with_tables({"film": table}), ModelConfig(**SMALL), seed=0)
        weights = {key: weight for key, weight in ranker.state_dict().items() if "embeddings.film.weight" in key}
        assert [weight.numpy().tolist() for weight in weights.values()] == [expected.tolist()]
    with pytest.raises(InputError, match=r"vectors are \(30, 4\), but table 'film' has 30 rows of 8"):
        wider = replace(table, width=8, pretrained=str(tmp_path / "film.npy"))
        build_model(SCHEMA.with_tables({"film": wider}), ModelConfig(**SMALL))
    pq.write_table(pa.table({"id": [3, 30], "vector": vectors[[3, 5]].tolist()}), tmp_path / "film.parquet")
    with pytest.raises(InputError, match="row 1: id 30 has 4 numbers, but table 'film' has 30 rows of 4"):
        build_model(SCHEMA.with_tables({"film": table}), ModelConfig(**SMALL))
    assert tables_of(ranker)
