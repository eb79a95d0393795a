"""The client of servers of scores: what it sends, whom it sends it to, and what it makes of every answer."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from datetime import datetime, timezone
from threading import Event
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import SCHEMA, make_requests
from tests.oip_server import Refusal, echo, grpc_server, table_of
from torchrec_amort.errors import InputError
from torchrec_amort.serving.server.client import ScoringClient, address_of
from torchrec_amort.serving.service import DeadlineExceeded, Overloaded

REQUESTS = make_requests([(3, 2), (0, 1), (5, 4)])


def expected(requests: list[dict[str, Any]]) -> list[list[list[float]]]:
    return [[[item, request["user"]] for item in request["candidate_item"]] for request in requests]


@pytest.mark.parametrize("raw", [True, False])
def test_each_request_gets_its_own_logits_and_the_version_that_scored_it(raw: bool) -> None:
    with grpc_server(raw=raw) as address, ScoringClient([address], model="films") as client:
        for requests in (REQUESTS, pa.Table.from_pylist(REQUESTS)):
            scored = client.score(requests)
            assert [logits.tolist() for logits in scored.logits] == expected(REQUESTS)
            assert {logits.dtype for logits in scored.logits} == {np.dtype(np.float32)}
            assert scored.versions == ["3"] * len(REQUESTS)


def test_deadline_priority_token_and_model_are_told() -> None:
    seen: list[tuple[Any, dict[str, str]]] = []
    with grpc_server(seen=seen) as address, ScoringClient([address], model="films", token="secret") as client:
        client.score(REQUESTS, timeout=20.25, priority=2)
    ((request, metadata),) = seen
    assert request.model_name == "films"
    assert request.parameters["timeout_ms"].int64_param == 20_250
    assert request.parameters["priority"].int64_param == 2
    assert metadata["authorization"] == "Bearer secret"


def test_columns_have_the_types_of_the_schema_if_there_is_one() -> None:
    seen: list[tuple[Any, dict[str, str]]] = []
    request = REQUESTS[1] | {"time": datetime(1970, 1, 2, tzinfo=timezone.utc), "hour": 3}
    with grpc_server(seen=seen) as address:
        for schema in (SCHEMA, None):
            with ScoringClient([address], schema=schema) as client:
                client.score([request])
    typed, inferred = (table_of(request) for request, _ in seen)
    assert typed.schema.equals(pa.schema([f for f in SCHEMA.arrow_schema() if f.name in request]))
    assert typed["time"].to_pylist() == [86_400]
    assert [request.model_name for request, _ in seen] == [SCHEMA.dataset, ""]
    assert pa.types.is_timestamp(inferred["time"].type)
    assert inferred["hour"].type == pa.int64()


def test_a_column_that_only_a_later_request_has_is_sent() -> None:
    seen: list[tuple[Any, dict[str, str]]] = []
    requests = [{"user": 1, "candidate_item": [1]}, {"user": 1, "candidate_item": [2], "hour": 0.5}]
    with grpc_server(seen=seen) as address, ScoringClient([address]) as client:
        client.score(requests)
    assert table_of(seen[0][0])["hour"].to_pylist() == [None, 0.5]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.INVALID_ARGUMENT, InputError),
        (grpc.StatusCode.UNAUTHENTICATED, grpc.RpcError),
    ],
)
def test_what_a_server_says_in_place_of_an_answer_is_raised(code: grpc.StatusCode, error: type[Exception]) -> None:
    def refuse(_: pa.Table) -> np.ndarray:
        raise Refusal(code, "request 0: says why")

    with grpc_server(refuse) as address, ScoringClient([address]) as client, pytest.raises(error, match="says why"):
        client.score(REQUESTS)


def test_what_finds_a_queue_full_is_sent_again_a_few_times() -> None:
    codes = iter([grpc.StatusCode.RESOURCE_EXHAUSTED] * 3)
    seen: list[tuple[Any, dict[str, str]]] = []

    def full_at_first(table: pa.Table) -> np.ndarray:
        for code in codes:
            raise Refusal(code, "full")
        return echo(table)

    def full(_: pa.Table) -> np.ndarray:
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    with grpc_server(full_at_first, seen) as address, ScoringClient([address]) as client:
        scored = client.score(REQUESTS)
    assert [logits.tolist() for logits in scored.logits] == expected(REQUESTS) and len(seen) == 4
    seen.clear()
    with grpc_server(full, seen) as address, ScoringClient([address]) as client, pytest.raises(Overloaded):
        client.score(REQUESTS)
    assert len(seen) == 5


def test_where_most_calls_find_a_queue_full_none_is_sent_again() -> None:
    seen: list[tuple[Any, dict[str, str]]] = []

    def full(_: pa.Table) -> np.ndarray:
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    with grpc_server(full, seen) as address, ScoringClient([address]) as client:
        futures = [client.submit(REQUESTS) for _ in range(600)]
        assert {type(future.exception()) for future in futures} == {Overloaded}
    assert 600 < len(seen) < 600 + 600


def test_a_server_that_is_late_is_given_up() -> None:
    over = Event()

    def stall(table: pa.Table) -> np.ndarray:
        over.wait()
        return echo(table)

    with grpc_server(stall) as address, ScoringClient([address]) as client:
        try:
            with pytest.raises(DeadlineExceeded):
                client.score(REQUESTS, timeout=0.05)
        finally:
            over.set()


def test_what_a_closed_client_has_not_heard_of_ends_in_an_error() -> None:
    over, arrived = Event(), Event()

    def stall(table: pa.Table) -> np.ndarray:
        arrived.set()
        over.wait()
        return echo(table)

    with grpc_server(stall) as address:
        try:
            with ScoringClient([address]) as client:
                scored = client.submit(REQUESTS)
                arrived.wait()
            with pytest.raises(grpc.RpcError):
                scored.result()
        finally:
            over.set()


def test_an_answer_that_is_none_of_scores_is_told() -> None:
    with grpc_server(lambda table: echo(table)[1:]) as address, ScoringClient([address]) as client:
        scored = client.submit(REQUESTS)
        with pytest.raises(InputError, match="logits have 6 rows, but num_candidates adds up to 7"):
            scored.result()


def test_each_user_has_a_server_and_answers_come_in_the_order_of_the_requests() -> None:
    requests = make_requests([(2, 1 + row % 3) for row in range(30)])
    seen: list[list[tuple[Any, dict[str, str]]]] = [[], [], []]
    with ExitStack() as stack:
        addresses = [stack.enter_context(grpc_server(seen=of_server)) for of_server in seen]
        client = stack.enter_context(ScoringClient(addresses))
        scored = client.score(requests)
    assert [logits.tolist() for logits in scored.logits] == expected(requests)
    for address, of_server in zip(addresses, seen, strict=True):
        users = [user for request, _ in of_server for user in table_of(request)["user"].to_pylist()]
        assert users == [r["user"] for r in requests if address_of(r["user"], addresses) == address]


def test_an_error_of_one_of_several_servers_is_that_of_the_call() -> None:
    def refuse(_: pa.Table) -> np.ndarray:
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    # Ports are any: of so many users, each server has some.
    requests = [{"user": user, "candidate_item": [1]} for user in range(100)]
    with grpc_server() as one, grpc_server(refuse) as other, ScoringClient([one, other]) as client:
        scored = client.submit(requests)
        with pytest.raises(Overloaded, match="full"):
            scored.result()


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([{"candidate_item": [1]}], "user is missing"),
        ([{"user": "seven", "candidate_item": [1]}], "user is string"),
        ([{"user": 7}, {"candidate_item": [1]}], "user is int64 with 1 nulls"),
        ([{"user": 7, "candidate_item": [1, "two"]}], "candidate_item cannot be read"),
        ([], "0: send 1 or more"),
    ],
)
def test_requests_that_cannot_be_sent_are_refused(requests: list[dict[str, Any]], message: str) -> None:
    with ScoringClient(["one:1", "two:1"]) as client, pytest.raises(InputError, match=message):
        client.score(requests)


def test_no_address_is_refused() -> None:
    with pytest.raises(InputError, match="1 server or more"):
        ScoringClient([])


ADDRESSES = [f"worker-{number}:8001" for number in range(5)]


@given(st.integers(-(2**63), 2**63 - 1), st.permutations(ADDRESSES))
def test_the_server_of_a_user_does_not_depend_on_the_order_of_servers(user: int, addresses: list[str]) -> None:
    assert address_of(user, addresses) == address_of(user, ADDRESSES)


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from(ADDRESSES))
def test_only_users_of_a_server_that_is_taken_away_move(user: int, gone: str) -> None:
    before = address_of(user, ADDRESSES)
    after = address_of(user, [address for address in ADDRESSES if address != gone])
    assert before in (after, gone)


def test_servers_have_equal_shares_of_the_users() -> None:
    users = Counter(address_of(user, ADDRESSES) for user in range(5000))
    assert set(users) == set(ADDRESSES)
    # Five standard deviations of a fair draw.
    assert all(abs(count - 1000) < 5 * 28.3 for count in users.values())


def test_every_version_picks_the_same_server() -> None:
    places = [ADDRESSES.index(address_of(user, ADDRESSES)) for user in (-1, 0, 1, 2, 3, 2**62)]
    assert places == [4, 2, 4, 4, 1, 4]
