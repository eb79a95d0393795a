import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.conftest import HASHED, SCHEMA
from torchrec_amort import Feature, InputError, RequestBatch, RequestSchema, TableConfig
from torchrec_amort.hashing import Vocabulary


def test_survives_json() -> None:
    assert RequestSchema.from_json(SCHEMA.to_json()) == SCHEMA
    record = json.loads(SCHEMA.to_json())
    assert record["format_version"] == 2
    assert record["features"][0] == {"name": "user_id", "side": "request", "kind": "id", "table_size": 20}
    assert RequestSchema.from_json(HASHED.to_json()) == HASHED
    assert json.loads(HASHED.to_json())["features"][0]["vocabulary"] == "hash"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a request schema"),
        ("[]", "not a request schema"),
        ('{"format_version": 1}', "not a request schema"),
        ('{"format_version": 7}', "format_version is 7, this torchrec-amort reads up to 2"),
        (SCHEMA.to_json().replace('"kind": "dense"', '"kind": "image"'), "no kind 'image'"),
    ],
)
def test_other_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RequestSchema.from_json(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": "request", "kind": "item", "table_size": 3}, "no kind 'item' on side 'request'"),
        ({"side": "request", "kind": "id"}, "needs a table_size of 1 or more"),
        ({"side": "event", "kind": "id", "table_size": 0}, "needs a table_size of 1 or more"),
        ({"side": "candidate", "kind": "dense", "table_size": 3}, "has no table"),
        (
            {"side": "request", "kind": "id", "table_size": 3, "vocabulary": "mod"},
            "no vocabulary 'mod'; there is refuse, unknown, hash",
        ),
        ({"side": "event", "kind": "age", "table_size": 3, "vocabulary": "unknown"}, "kind 'age': no vocabulary"),
        ({"side": "request", "kind": "dense", "vocabulary": "hash"}, "kind 'dense': no vocabulary 'hash'"),
        ({"side": "request", "kind": "id", "table_size": 1, "vocabulary": "hash"}, "needs a table_size of 2 or more"),
    ],
)
def test_impossible_features_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Feature("feature", **arguments)


def test_impossible_schemas_are_refused() -> None:
    candidate = Feature("candidate_item", "candidate", "item", table_size=5)
    event = Feature("history_item", "event", "item", table_size=6)
    with pytest.raises(
        InputError, match="table 'item' do not agree: table_size is 5 for candidate_item and 6 for hist"
    ):
        RequestSchema("films", (candidate, event))
    hashed = Feature("history_item", "event", "item", table_size=5, vocabulary="hash")
    with pytest.raises(InputError, match="vocabulary is refuse for candidate_item and hash for history_item"):
        RequestSchema("films", (candidate, hashed))
    for features in ((), (Feature("liked", "candidate", "label"),)):
        with pytest.raises(InputError, match="no feature of the candidate"):
            RequestSchema("films", features)
    with pytest.raises(InputError, match="'candidate_item' is there twice"):
        RequestSchema("films", (candidate, candidate))


def test_other_tables_for_some_ids() -> None:
    tables = {"user_id": TableConfig(rows=7, vocabulary="unknown"), "item": TableConfig(rows=9, vocabulary="hash")}
    changed = SCHEMA.with_tables(tables)
    assert changed.table_sizes == SCHEMA.table_sizes | {"user_id": 7, "candidate_item": 9, "history_item": 9}
    words = {f.name: f.vocabulary for f in changed.features if f.vocabulary != "refuse"}
    assert words == {"user_id": "unknown", "candidate_item": "hash", "history_item": "hash"}
    assert changed.with_tables({}) == changed
    larger = SCHEMA.with_tables({"user_id": TableConfig(rows=21, vocabulary="refuse")})
    assert larger.table_sizes["user_id"] == 21


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"film": TableConfig(rows=9, vocabulary="hash")}, "no table 'film' of ids; there are .*'movie_id', .*'item'"),
        ({"history_item": TableConfig(rows=9, vocabulary="hash")}, "no table 'history_item'"),
        ({"history_age": TableConfig(rows=9, vocabulary="hash")}, "no table 'history_age'"),
        ({"hour": TableConfig(rows=9, vocabulary="hash")}, "no table 'hour'"),
        ({"user_id": TableConfig(rows=1, vocabulary="hash")}, "needs a table_size of 2 or more, not 1"),
        (
            {"user_id": TableConfig(rows=19, vocabulary="refuse")},
            "user_id has 20 rows and vocabulary 'refuse', but the model's table for it has 19 and refuses other ids: "
            "train with vocabulary 'unknown' or 'hash'",
        ),
    ],
)
def test_impossible_tables_are_refused(tables: dict[str, TableConfig], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SCHEMA.with_tables(tables)


def test_data_is_read_if_its_features_are_the_same_and_its_ids_have_rows() -> None:
    larger = SCHEMA.with_tables({"user_id": TableConfig(rows=21, vocabulary="refuse")})
    for reads in (SCHEMA, larger, HASHED, SCHEMA.without(["genres"])):
        reads.refuse_other_data(SCHEMA)
    HASHED.refuse_other_data(larger)
    with pytest.raises(InputError, match="films: user_id has 21 rows .* the model's table for it has 20"):
        SCHEMA.refuse_other_data(larger, "films")
    with pytest.raises(InputError, match="user_id has 11 rows and vocabulary 'hash', but .* has 20 and refuses"):
        SCHEMA.refuse_other_data(HASHED)
    with pytest.raises(InputError, match="reads Feature.name='genres'.*does not have: use data prepared in the same"):
        SCHEMA.refuse_other_data(SCHEMA.without(["genres"]))
    features = tuple(f for f in SCHEMA.features if f.name != "movie_id")
    with pytest.raises(InputError, match="reads Feature.name='movie_id'"):
        other = RequestSchema("films", (*features, Feature("movie_id", "candidate", "id", 40, "film")))
        other.refuse_other_data(SCHEMA)


def test_a_vocabulary_is_saved_beside_the_schema_and_gives_its_rows(tmp_path: Path) -> None:
    words = Vocabulary.of(pa.array(["sport", "news", "sport"]))
    topic = Feature("topic", "candidate", "ids", 3, vocabulary="file", text=True, table="of/topics", nullable=True)
    schema = RequestSchema("news", (topic,), vocabularies={"of/topics": words})
    schema.save(tmp_path)
    assert RequestSchema.load(tmp_path) == schema
    batch = RequestBatch.from_requests(
        [{"topic": [["news", None], ["art", "sport"], None]}], RequestSchema.load(tmp_path)
    )
    assert batch.candidate_sparse["topic"].values().tolist() == [2, 0, 0, 1]
    assert batch.candidate_sparse["topic"].lengths().tolist() == [2, 2, 0]
    with pytest.raises(InputError, match="'of/topics' has vocabulary 'file', but the schema has no vocabulary of it"):
        RequestSchema.from_json(schema.to_json())
    with pytest.raises(InputError, match="has 2 ids, but topic has table_size 2: it needs a row more than ids"):
        RequestSchema("news", (replace(topic, table_size=2),), vocabularies={"of/topics": words})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": "candidate", "kind": "vector"}, "needs a size of 1 or more"),
        ({"side": "candidate", "kind": "dense", "size": 2}, "is no vector: leave out size"),
        (
            {"side": "request", "kind": "id", "table_size": 3, "text": True},
            "text needs a vocabulary of hash, file",
        ),
        ({"side": "request", "kind": "dense", "nullable": True}, "only ids of a table with an unknown id may be null"),
        ({"side": "request", "kind": "dense", "history": "clicks"}, "side 'request' has no history"),
        ({"side": "event", "kind": "weight"}, "no kind 'weight' on side 'event'"),
        ({"side": "request", "kind": "id", "table_size": 3, "vocabulary": "managed"}, "no vocabulary 'managed'"),
        ({"side": "candidate", "kind": "dense", "table": "film"}, "has no table: leave out 'film'"),
    ],
)
def test_features_of_format_2_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Feature("feature", **arguments)


def test_version_1_reads_as_before() -> None:
    record = json.loads(SCHEMA.to_json()) | {"format_version": 1}
    assert RequestSchema.from_json(json.dumps(record)) == SCHEMA
    # It had no tables by name: a feature that is called so has one of its own beside the items'.
    called = Feature("item", "candidate", "id", 3)
    schema = RequestSchema("films", (*SCHEMA.features, called))
    assert [feature.name for feature in schema.bag_features["candidate"]] == ["movie_id", "genres", "item"]
