from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec import EmbeddingConfig, KeyedJaggedTensor

from tests.conftest import MAX_HISTORY, SCHEMA, make_requests
from tests.schemas import THREE, Shapes
from tests.schemas import make_requests as make_requests_of
from torchrec_amort import (
    AmortizedDLRM,
    AmortizedScorer,
    Feature,
    HistoryCache,
    InputError,
    ModelConfig,
    RequestBatch,
    RequestSchema,
    TableConfig,
    build_model,
    export_package,
)
from torchrec_amort.models.managed import ManagedCollection

MANAGED = SCHEMA.with_tables({"item": TableConfig(rows=16, vocabulary="managed")})


def collection(rows: int = 4, eviction_interval: int = 1) -> ManagedCollection:
    table = EmbeddingConfig(name="item", num_embeddings=rows, embedding_dim=2, feature_names=["f"])
    return ManagedCollection(table, eviction_interval, None)


def features(*ids: int) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(["f"], torch.tensor(ids, dtype=torch.int64), lengths=torch.tensor([len(ids)]))


def rows_of(managed: ManagedCollection, *ids: int) -> list[int]:
    """The rows that the ids are read from."""
    weight = managed._embedding_module.embeddings["item"].weight
    embeddings, _ = managed.eval()(features(*ids))
    managed.train()
    return [int((weight == row).all(1).nonzero()) for row in embeddings["f"].values()]


def test_ids_get_rows_and_lose_them_to_ids_that_come_more_often() -> None:
    managed, big = collection(), 2**63 - 2
    assert rows_of(managed, 5, big) == [3, 3]
    managed(features())  # No id in the first batch: TorchRec alone would learn none ever after.
    for _ in range(3):
        managed(features(5, 7, big, 7))
    known = rows_of(managed, 5, 7, big)
    assert sorted(known) == [0, 1, 2]
    assert rows_of(managed, 6, 2**40) == [3, 3]
    for _ in range(20):
        managed(features(6, 6, 8, 8))
    after = rows_of(managed, 6, 8, 5, 7, big)
    assert sorted(after)[:3] == [0, 1, 2]
    assert 3 not in after[:2]
    assert after[2:].count(3) == 2
    assert rows_of(managed, 6, 8, 5, 7, big) == after


def trained_model() -> AmortizedDLRM:
    model = build_model(MANAGED, ModelConfig(history_length=MAX_HISTORY, eviction_interval=1), seed=0)
    assert isinstance(model, AmortizedDLRM)
    for seed in range(3):
        model(RequestBatch.from_requests(make_requests([(8, 3), (8, 2)], seed), MANAGED))
    return model.eval()


def test_a_scorer_and_its_cache_take_raw_ids() -> None:
    model, requests = trained_model(), make_requests([(5, 3), (0, 1), (8, 4)])
    requests[0]["history_item"][0] = 2**62
    batch = RequestBatch.from_requests(requests, MANAGED)
    scorer = AmortizedScorer(model, cache=HistoryCache(2**20), schema=MANAGED)
    with torch.no_grad():
        expected = model(batch.to_impressions())
        torch.testing.assert_close(model(batch), expected)
    for _ in range(2):
        torch.testing.assert_close(scorer.score(requests), expected)
    requests[0]["history_item"][0] = -1
    with pytest.raises(InputError, match=r"request 0: sequences\['history_item'\] has id -1, not 0 to 2\*\*63 - 2"):
        scorer.score(requests)


SHARED = THREE.with_tables({"film": TableConfig(rows=12, width=4, vocabulary="managed")})
SIZES: Shapes = [((3, 2, 0), 3), ((0, 0, 0), 1), ((4, 1, 5), 2)]


def films(seed: int) -> list[dict[str, Any]]:
    """Requests of 30 films of large ids, some of which come more often than others."""

    def spread(film: int) -> int:
        return int((film % 7 if seed % 2 else film) * 2**57 + film % 3)

    requests = make_requests_of(THREE, SIZES, seed)
    columns = ("film", "clicks_film", "buys_film", "views_film")
    return [request | {name: [spread(i) for i in request[name]] for name in columns} for request in requests]


def test_a_managed_table_is_shared_by_several_histories_and_the_candidate(tmp_path: Path) -> None:
    features = tuple(f for f in SHARED.features if f.name != "film_id")
    schema = RequestSchema("films", features, tables=SHARED.tables)
    config = ModelConfig(embedding_dim=8, history_layers=1, history_length=6, eviction_interval=1)
    model = build_model(schema, config, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items() if "sorted_raw_ids" in name}
    for seed in range(4):
        model(RequestBatch.from_requests(films(seed), schema)).sum().backward()
    (ids,) = (value for name, value in model.state_dict().items() if name in before)
    assert int((ids[:-1] < 2**63 - 1).sum()) == 11, "each row but the unknown ids' has an id"
    batch = replace(RequestBatch.from_requests(films(1), schema), users=torch.arange(3))
    with torch.no_grad():
        expected = model.eval()(batch.to_impressions())
        torch.testing.assert_close(model(batch), expected, rtol=0, atol=2e-6)
    cached = AmortizedScorer(model, 2, HistoryCache(2**20))
    for scorer in (AmortizedScorer(model, schema=schema, backend="eager"), cached, cached):
        torch.testing.assert_close(scorer.score(batch), expected, rtol=0, atol=2e-6)
    with pytest.raises(InputError, match="cannot be exported: its table 'film' is managed"):
        export_package(model, tmp_path / "package", schema)
    with pytest.raises(InputError, match="table 'film' is managed, and rows that change hands start at random: leave"):
        schema.with_tables({"film": TableConfig(trains=False)})


def test_a_scorer_of_a_model_in_training_learns_no_ids() -> None:
    model, batch = trained_model(), RequestBatch.from_requests(make_requests([(5, 3), (0, 1), (8, 4)]), MANAGED)
    expected = AmortizedScorer(model.eval()).score(batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(AmortizedScorer(model.train()).score(batch), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model(batch).sum().backward()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'user_id' of kind 'id': no vocabulary 'managed'; there is refuse, unknown"):
        Feature("user_id", "request", "id", table_size=9, vocabulary="managed")
    with pytest.raises(InputError, match="'interests' of kind 'ids': no vocabulary 'managed'"):
        SCHEMA.with_tables({"interests": TableConfig(rows=9, vocabulary="managed")})
    with pytest.raises(InputError, match="has 1 rows for 1 ranks: each needs 2"):
        collection(rows=1)
    with pytest.raises(InputError, match="model.eviction_interval is 0: give 1 or more"):
        collection(eviction_interval=0)
    with pytest.raises(InputError, match="cannot be exported: its table 'item' is managed"):
        export_package(trained_model(), tmp_path / "package", MANAGED)
