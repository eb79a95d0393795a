import json
from typing import Any

import pytest

from tests.conftest import HASHED, SCHEMA
from torchrec_amort import Feature, InputError, RequestSchema, TableConfig


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
