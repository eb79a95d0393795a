"""What is counted of a prepared folder: unknown ids, and events of a request's own second."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import SCHEMA, make_requests
from torchrec_amort import Feature, InputError, RequestSchema, TableConfig
from torchrec_amort.data.counts import IdCounts, read_counts, unknown_ids
from torchrec_amort.data.impressions import to_impressions, to_requests
from torchrec_amort.data.writer import write_requests

IDS = st.lists(st.integers(0, 9), max_size=4)


def small_schema(vocabulary: Any) -> RequestSchema:
    return RequestSchema(
        "small",
        (
            Feature("topics", "request", "ids", 6, vocabulary=vocabulary),
            Feature("film", "candidate", "id", 6, "candidate_item", vocabulary),
            Feature("candidate_item", "candidate", "item", 6, vocabulary=vocabulary),
            Feature("history_item", "event", "item", 6, vocabulary=vocabulary),
        ),
    )


def rows(requests: list[dict[str, list[int]]]) -> pa.Table:
    columns = ("topics", "candidate_item", "history_item")
    return pa.table({name: pa.array([r[name] for r in requests], pa.list_(pa.int64())) for name in columns})


@given(
    st.lists(st.fixed_dictionaries({"topics": IDS, "candidate_item": IDS, "history_item": IDS}), max_size=6),
    st.lists(st.fixed_dictionaries({"topics": IDS, "candidate_item": IDS, "history_item": IDS}), max_size=6),
    st.sampled_from(["refuse", "unknown", "hash"]),
)
def test_the_share_of_unknown_ids_is_that_of_ids_training_does_not_have(
    train: list[dict[str, list[int]]], test: list[dict[str, list[int]]], vocabulary: Any
) -> None:
    schema = small_schema(vocabulary)
    counted = [IdCounts(schema), IdCounts(schema)]
    for counts, requests in zip(counted, (train, test), strict=True):
        for start in range(0, len(requests), 2):
            counts.add(rows(requests[start : start + 2]))
    shares = counted[1].unknown_shares(counted[0])
    for feature in schema.features:
        of_table = [f.source for f in schema.features if f.table == feature.table]
        seen = {i for request in train for column in of_table for i in request[column]}
        ids = [i for request in test for i in request[feature.source]]
        never = {"refuse": set(), "unknown": {0, 6, 7, 8, 9}, "hash": {0}}[vocabulary]
        unknown = [i for i in ids if i not in seen or i in never]
        assert shares[feature.name] == pytest.approx(len(unknown) / len(ids) if ids else 0)


def with_items(requests: list[dict[str, Any]], item: int) -> list[dict[str, Any]]:
    return [{**request, "candidate_item": [item] * len(request["candidate_item"])} for request in requests]


def table_of(requests: list[dict[str, Any]], first_id: int = 0) -> pa.Table:
    numbered = [{**request, "request_id": row} for row, request in enumerate(requests, first_id)]
    return pa.Table.from_pylist(numbered, SCHEMA.arrow_schema())


def test_a_folder_tells_its_unknown_ids_and_warns_of_a_feature_without_known_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, test = make_requests([(0, 3)] * 4, seed=1), make_requests([(0, 2)] * 3, seed=2)
    splits = {"test": [table_of(with_items(test, 0), 9)], "train": [table_of(with_items(train, 7))]}
    with caplog.at_level(logging.WARNING):
        write_requests(tmp_path / "films", SCHEMA, splits)
    counts = read_counts(tmp_path / "films")
    assert counts["test"]["unknown_ids"]["candidate_item"] == counts["test"]["unknown_ids"]["movie_id"] == 1.0
    assert counts["train"]["unknown_ids"]["candidate_item"] == 0.0
    assert "test: all ids of movie_id, candidate_item are unknown" in caplog.text
    assert unknown_ids(tmp_path / "films", "test", SCHEMA) == counts["test"]["unknown_ids"]


def test_unknown_ids_of_a_run_with_smaller_tables_are_counted_by_its_tables(tmp_path: Path) -> None:
    train = with_items(make_requests([(0, 3)] * 4, seed=1), 7)
    write_requests(tmp_path / "films", SCHEMA, {"train": [table_of(train)], "test": [table_of(train, 9)]})
    smaller = SCHEMA.with_tables({"movie_id": TableConfig(rows=5, vocabulary="unknown")})
    shares = unknown_ids(tmp_path / "films", "test", smaller)
    assert shares["movie_id"] == 1.0
    assert shares["candidate_item"] == 0.0


def test_events_of_the_requests_own_second_are_counted_told_and_may_be_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    requests = make_requests([(3, 2), (2, 1), (4, 2)])
    for leaking in (requests[1], requests[2]):
        leaking["history_time"][-1] = leaking["time"]
    with caplog.at_level(logging.WARNING):
        write_requests(tmp_path / "films", SCHEMA, {"train": [table_of(requests)]})
    assert read_counts(tmp_path / "films")["train"]["same_second_requests"] == 2
    assert "train: 2 of 3 requests have events of their own second (request 1 has one in history_time)" in caplog.text
    with pytest.raises(InputError, match="train: request 1: history_time has an event at 1000000"):
        write_requests(tmp_path / "no", SCHEMA, {"train": [table_of(requests)]}, refuse_same_second=True)
    to_impressions(tmp_path / "films", tmp_path / "log")
    caplog.clear()
    log = {"train": tmp_path / "log" / "train"}
    to_requests(log, SCHEMA, tmp_path / "back")
    assert read_counts(tmp_path / "back")["train"]["same_second_requests"] == 2
    assert "2 of 3 requests have events of their own second" in caplog.text
    with pytest.raises(InputError, match="keep events strictly before their request"):
        to_requests(log, SCHEMA, tmp_path / "no", refuse_same_second=True)
    assert not (tmp_path / "no").exists()


def test_a_request_with_events_of_its_own_second_in_two_histories_counts_once(tmp_path: Path) -> None:
    film: dict[str, Any] = {"table_size": 9, "table": "film"}
    schema = RequestSchema(
        "films",
        (
            Feature("film", "candidate", "id", **film),
            *(Feature(f"{name}_film", "event", "id", history=name, **film) for name in ("clicks", "views")),
            *(Feature(f"{name}_age", "event", "age", 64, history=name) for name in ("clicks", "views")),
        ),
    )
    request = {"request_id": 1, "user": 1, "time": 50, "film": [1]}
    request |= {"clicks_film": [2], "views_film": [2, 3], "clicks_age": [50], "views_age": [50, 50]}
    earlier = request | {"request_id": 0, "clicks_age": [49], "views_age": [48, 49]}
    table = pa.Table.from_pylist([earlier, request], schema.arrow_schema())
    write_requests(tmp_path / "films", schema, {"train": [table]})
    assert read_counts(tmp_path / "films")["train"]["same_second_requests"] == 1
