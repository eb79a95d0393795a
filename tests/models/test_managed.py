from pathlib import Path

import pytest
import torch
from torchrec import EmbeddingConfig, KeyedJaggedTensor

from tests.conftest import MAX_HISTORY, SCHEMA, make_requests
from torchrec_amort import (
    AmortizedDLRM,
    AmortizedScorer,
    Feature,
    HistoryCache,
    InputError,
    ModelConfig,
    RequestBatch,
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
    with pytest.raises(InputError, match="cannot be exported: its table of items is managed"):
        export_package(trained_model(), tmp_path / "package", MANAGED)
