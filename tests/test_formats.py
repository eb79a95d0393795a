"""Batches of schemas of any features hold what their requests say, whatever becomes of them."""

from dataclasses import replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from tests.schemas import NOW, Shapes, entries_of, make_requests, schemas, shapes
from tests.test_batch import assert_same
from torchrec_amort import Feature, InputError, RequestBatch, RequestSchema
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.data.sample import random_requests
from torchrec_amort.data.writer import write_requests


def rows(jagged: Any) -> list[Any]:
    return [row.tolist() for row in jagged.values().split(jagged.lengths().tolist())]


def refuse_other_batch(batch: RequestBatch, requests: list[dict[str, Any]], schema: RequestSchema) -> None:
    """The parts of a batch, told by the requests in plain loops."""
    assert batch.num_candidates.tolist() == [len(request["film"]) for request in requests]
    for side, ids, dense in (
        ("request", batch.request_sparse, batch.request_dense),
        ("candidate", batch.candidate_sparse, batch.candidate_dense),
    ):
        assert list(ids.keys()) == [feature.name for feature in schema.bag_features[side]]
        for feature in schema.bag_features[side]:
            assert rows(ids[feature.name]) == [entry for r in requests for entry in entries_of(feature, r)]
        columns = [[e for r in requests for e in entries_of(feature, r)] for feature in schema.dense_features[side]]
        assert (
            dense.tolist()
            == [pytest.approx([number for entry in row for number in entry]) for row in zip(*columns, strict=True)]
            or not columns
        )
    assert list(batch.sequences.keys()) == [feature.name for feature in schema.sequence_features]
    for feature in schema.sequence_features:
        entries = [entries_of(feature, request) for request in requests]
        joined = [[one for entry in of_request for one in entry] for of_request in entries]
        assert rows(batch.sequences[feature.name]) == joined
        if feature.kind == "ids":
            assert rows(batch.num_ids[feature.name]) == [[len(entry) for entry in of_each] for of_each in entries]
        else:
            assert feature.name not in batch.num_ids
    assert list(batch.dense_sequences) == [feature.name for feature in schema.dense_sequence_features]
    for feature in schema.dense_sequence_features:
        expected = [entries_of(feature, request) for request in requests]
        for have, entries in zip(rows(batch.dense_sequences[feature.name]), expected, strict=True):
            assert [pytest.approx(entry) for entry in entries] == have
    if schema.of("request", "weight"):
        assert batch.weights is not None
        assert batch.weights.tolist() == pytest.approx([r["worth"] * share for r in requests for share in r["share"]])
    else:
        assert batch.weights is None


@given(schemas(), shapes(), st.integers(0, 2**20))
@settings(max_examples=60)
def test_a_batch_holds_what_its_requests_say(schema: RequestSchema, sizes: Shapes, seed: int) -> None:
    requests = make_requests(schema, sizes, seed)
    refuse_other_batch(RequestBatch.from_requests(requests, schema), requests, schema)


@given(schemas(), shapes(), st.data(), st.integers(0, 2**20))
@settings(max_examples=40)
def test_a_part_of_a_table_in_chunks_is_read_as_its_requests(
    schema: RequestSchema, sizes: Shapes, data: st.DataObject, seed: int
) -> None:
    requests = make_requests(schema, sizes, seed)
    # What stands before and after may be anything, nulls included.
    others: list[dict[str, Any]] = [dict.fromkeys(requests[0]), *make_requests(schema, sizes, seed + 1)]
    table = pa.Table.from_pylist([*others, *requests, *others], schema.arrow_schema())
    part = table.slice(len(others), len(requests))
    cut = data.draw(st.integers(0, len(requests)))
    part = data.draw(st.sampled_from([part, pa.concat_tables([part.slice(0, cut), part.slice(cut)])]))
    batch = RequestBatch.from_arrow(part, schema)
    refuse_other_batch(batch, requests, schema)
    assert_same(batch, RequestBatch.from_requests(requests, schema))


ODD: list[Any] = [
    0,
    3,
    3.0,
    2.5,
    True,
    None,
    2**24 + 1,
    2**53 + 1,
    2**63,
    1e300,
    "ab",
    b"ab",
    Decimal(3),
    Decimal("2.5"),
]
ODD += [datetime(1970, 1, 2), date(1970, 1, 2), timedelta(1), np.int64(3), np.float32(2.5), np.datetime64(3, "s")]
ODD_LISTS: list[Any] = [
    [],
    (),
    [None],
    [1, 2],
    (1, 2),
    [1.0],
    [2.5, 1],
    [True],
    [True, 1],
    ["ab"],
    ["a", None],
    [b"a"],
    [[1]],
    {1},
]
ODD_LISTS += [np.array([1, 2]), np.array([1.0]), np.array([], "M8[s]"), np.array([True]), np.array(["a"])]
READ_FROM_ANY = {
    "id": Feature("x", "request", "id", 9, vocabulary="unknown"),
    "nullable id": Feature("x", "request", "id", 9, vocabulary="unknown", nullable=True),
    "ids": Feature("x", "request", "ids", 9, vocabulary="unknown"),
    "text": Feature("x", "request", "id", 9, vocabulary="hash", text=True),
    "texts": Feature("x", "request", "ids", 9, vocabulary="hash", text=True, nullable=True),
    "number": Feature("x", "request", "dense"),
    "time": Feature("x", "request", "age", 64),
    "vector": Feature("x", "request", "vector", size=1),
}


@given(st.sampled_from(sorted(READ_FROM_ANY)), st.lists(st.sampled_from([*ODD, *ODD_LISTS]), min_size=2, max_size=3))
@settings(max_examples=300)
def test_requests_that_are_read_together_are_what_each_is_alone(kind: str, values: list[Any]) -> None:
    schema = RequestSchema("any", (Feature("film", "candidate", "id", 9), READ_FROM_ANY[kind]))
    requests = [{"time": NOW, "film": [1], "x": value} for value in values]

    def read(requests: list[dict[str, Any]]) -> RequestBatch | str:
        try:
            return RequestBatch.from_requests(requests, schema)
        except InputError as error:
            return str(error)

    together, alone = read(requests), [read([request]) for request in requests]
    refused = [row for row, one in enumerate(alone) if isinstance(one, str)]
    if isinstance(together, str):
        # Of values that no column holds, the first; what it holds is checked afterwards.
        assert together in [str(alone[row]).replace("request 0", f"request {row}") for row in refused]
        return
    assert not refused
    for row, one in enumerate(alone):
        assert isinstance(one, RequestBatch)
        assert_same(together.select(torch.tensor([row])), one)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("texts", "ab", "is string, not a list"),
        ("ids", b"ab", "is binary, not a list"),
        ("ids", [True, True], "has an entry that is bool, not a number"),
        ("number", 1e300, r"is 1e\+300, which float32 does not hold exactly"),
    ],
)
def test_what_python_could_take_for_a_column_s_values_is_refused(kind: str, value: Any, message: str) -> None:
    schema = RequestSchema("any", (Feature("film", "candidate", "id", 9), READ_FROM_ANY[kind]))
    with pytest.raises(InputError, match=f"requests: request 0: x {message}: write "):
        RequestBatch.from_requests([{"film": [1], "x": value}], schema)


def without_candidates(request: dict[str, Any], schema: RequestSchema, keep: slice) -> dict[str, Any]:
    columns = {feature.source for feature in schema.of("candidate")}
    return {name: value[keep] if name in columns else value for name, value in request.items()}


def with_latest(request: dict[str, Any], schema: RequestSchema, limits: dict[str, int]) -> dict[str, Any]:
    limit_of = {feature.source: limits.get(feature.history) for feature in schema.of("event")}
    return {
        name: value if (limit := limit_of.get(name)) is None else value[max(len(value) - limit, 0) :]
        for name, value in request.items()
    }


@given(schemas(), shapes(), st.data(), st.integers(0, 2**20))
@settings(max_examples=60)
def test_whatever_becomes_of_a_batch_is_as_if_its_requests_had_been_so(
    schema: RequestSchema, sizes: Shapes, data: st.DataObject, seed: int
) -> None:
    requests = make_requests(schema, sizes, seed)
    batch = RequestBatch.from_requests(requests, schema)
    chosen = data.draw(st.lists(st.integers(0, len(requests) - 1), min_size=1))
    refuse_other_batch(batch.select(torch.tensor(chosen)), [requests[row] for row in chosen], schema)
    alone = [
        without_candidates(request, schema, slice(place, place + 1))
        for request in requests
        for place in range(len(request["film"]))
    ]
    refuse_other_batch(batch.to_impressions().validate(schema.table_sizes), alone, schema)
    start = data.draw(st.integers(0, batch.stride() - 1))
    stop = data.draw(st.integers(start + 1, batch.stride()))
    parts, first = [], 0
    for request in requests:
        end = first + len(request["film"])
        parts.append(without_candidates(request, schema, slice(max(start - first, 0), max(min(stop, end) - first, 0))))
        first = end
    refuse_other_batch(batch.part(start, stop), parts, schema)
    assert_same(batch.to(torch.device("cpu")), batch)


@given(schemas(), shapes(), st.integers(0, 6), st.integers(0, 2**20))
def test_each_history_is_kept_to_its_own_limit(schema: RequestSchema, sizes: Shapes, limit: int, seed: int) -> None:
    # The gap before an event that is kept is still told when the event before it is not.
    without_gaps = [feature for feature in schema.features if feature.kind != "gap"]
    schema = RequestSchema("films", tuple(without_gaps))
    requests = make_requests(schema, sizes, seed)
    limits = dict(zip(schema.histories, (limit, 2), strict=False))
    latest = [with_latest(request, schema, limits) for request in requests]
    kept = RequestBatch.from_requests(requests, schema, limits)
    refuse_other_batch(kept.validate(schema.table_sizes), latest, schema)
    if schema.histories:
        every = RequestBatch.from_requests(requests, schema).keep_latest(limit)
        latest = [with_latest(request, schema, dict.fromkeys(schema.histories, limit)) for request in requests]
        refuse_other_batch(every, latest, schema)


@given(schema=schemas(), sizes=shapes(), seed=st.integers(0, 2**20))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_folder_keeps_all_of_it(schema: RequestSchema, sizes: Shapes, seed: int, tmp_path: Path) -> None:
    requests = make_requests(schema, sizes, seed)
    table = pa.Table.from_pylist(requests, schema.arrow_schema())
    write_requests(tmp_path / "films", schema, {"train": [table]}, overwrite=True)
    assert RequestSchema.load(tmp_path / "films") == schema
    (batch,) = RequestDataset(tmp_path / "films", "train", batch_size=len(requests))
    assert_same(batch, RequestBatch.from_requests(requests, schema))


@given(schemas(), st.integers(0, 2**20))
def test_random_requests_fit_any_schema(schema: RequestSchema, seed: int) -> None:
    table = random_requests(schema, [0, 3], [1, 4], seed=seed)
    assert RequestBatch.from_arrow(table, schema).num_candidates.tolist() == [1, 4]


FILM = Feature("film", "candidate", "id", 30, table="film")
CLICKS = (
    Feature("clicked", "event", "id", 30, table="film", history="clicks"),
    Feature("clicked_tags", "event", "ids", 9, history="clicks"),
    Feature("clicked_at", "event", "gap", history="clicks"),
    Feature("content", "event", "vector", size=2, history="clicks"),
)
REQUEST = {
    "time": 100,
    "film": [1, 2],
    "clicked": [3, 4],
    "clicked_tags": [[1], []],
    "clicked_at": [10, 20],
    "content": [[0.5, 1.0], [0.0, 2.0]],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"content": [[0.5, 1.0], [0.0]]}, "0: content has a vector of 1 numbers, but the schema says 2"),
        (
            {"content": [[0.5, 1.0], [0.0, float("nan")]]},
            r"dense_sequences\['content'\] column 1 is nan, not",
        ),
        (
            {"clicked_at": [20, 10]},
            "0: clicked_at has an event at 10 after one at 20: list events with",
        ),
        ({"clicked_tags": [[1]]}, "request 0: clicked_tags lists 1 entries but clicked lists 2"),
        (
            {"clicked_tags": [[1], None]},
            "clicked_tags has a null: write lists of lists of integers, none null",
        ),
        ({"clicked_tags": [[1], [9]]}, r"request 0: sequences\['clicked_tags'\] has id 9, not 0 to 8"),
    ],
)
def test_bad_events_are_refused_with_field_request_and_numbers(changes: dict[str, Any], message: str) -> None:
    schema = RequestSchema("films", (FILM, *CLICKS))
    RequestBatch.from_requests([REQUEST], schema)
    with pytest.raises(InputError, match=message):
        RequestBatch.from_requests([REQUEST | changes], schema)


def test_a_feature_of_the_request_has_one_entry() -> None:
    liked = Feature("liked_tags", "request", "ids", 9, table="clicked_tags")
    batch = RequestBatch.from_requests(
        [{**REQUEST, "liked_tags": [1, 2]}], RequestSchema("films", (FILM, liked, *CLICKS))
    )
    two = JaggedTensor(torch.tensor([1, 1]), lengths=torch.tensor([2]))
    with pytest.raises(InputError, match=r"\['liked_tags'\] has 2 entries, but a request tells of 1"):
        replace(batch, num_ids={**batch.num_ids, "liked_tags": two}).validate()
    with pytest.raises(InputError, match="num_ids has 'likes', but sequences has"):
        replace(batch, num_ids={**batch.num_ids, "likes": two}).validate()


def test_numbers_of_ids_have_to_add_up() -> None:
    batch = RequestBatch.from_requests([REQUEST], RequestSchema("films", (FILM, *CLICKS)))
    tags = batch.num_ids["clicked_tags"]
    tags.values()[0] = 2
    with pytest.raises(InputError, match=r"\['clicked_tags'\] has 1 entries, but num_ids\['clicked_tags'\] tells of 2"):
        batch.validate()
    assert isinstance(batch.sequences, KeyedJaggedTensor)
