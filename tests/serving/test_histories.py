from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.schemas import THREE, make_requests
from torchrec_amort import InputError
from torchrec_amort.serving.ahead import with_a_candidate
from torchrec_amort.serving.histories import HistoryStore, UnknownHistory

HISTORY_OF = {feature.source: feature.history for feature in THREE.of("event")}
LIMITS = {"clicks": 3, "views": 0}


def table_of(requests: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(requests, THREE.arrow_schema())


def request_of(user: int, sizes: list[int], seed: int) -> dict[str, Any]:
    (request,) = make_requests(THREE, [(sizes, 1)], seed)
    return request | {"user": user}


@given(
    calls=st.lists(
        st.tuples(st.booleans(), st.integers(0, 2), st.lists(st.integers(0, 3), min_size=3, max_size=3)), max_size=12
    )
)
def test_it_is_the_list_of_all_events_of_each_user(calls: list[tuple[bool, int, list[int]]]) -> None:
    store = HistoryStore(THREE, 2**20, LIMITS)
    known: dict[int, dict[str, list[Any]]] = {}
    for seed, (is_new, user, sizes) in enumerate(calls):
        request = request_of(user, sizes, seed)
        table = table_of([request])
        if is_new and user not in known:
            with pytest.raises(UnknownHistory, match=f"user {user}: "):
                store.joined(table)
            continue
        for column, history in HISTORY_OF.items():
            of_user = known.setdefault(user, {})
            before = of_user.get(column, []) if is_new else []
            events = before + request[column]
            limit = LIMITS.get(history)
            of_user[column] = events if limit is None else events[max(0, len(events) - limit) :]
        asked = store.joined(table) if is_new else table
        if is_new:
            (row,) = asked.to_pylist()
            assert {name: row[name] for name in HISTORY_OF} == table_of([request | known[user]]).select(
                list(HISTORY_OF)
            ).to_pylist()[0]
            assert {n: v for n, v in row.items() if n not in HISTORY_OF} == {
                n: v for n, v in table.to_pylist()[0].items() if n not in HISTORY_OF
            }
        store.keep(table, is_new=is_new, epoch=store.epoch)
    assert len(store) == len(known)
    for user, events in known.items():
        bare = table_of([request_of(user, [0, 0, 0], 0)])
        (row,) = store.joined(bare).to_pylist()
        assert {name: row[name] for name in HISTORY_OF} == table_of([request_of(user, [0] * 3, 0) | events]).select(
            list(HISTORY_OF)
        ).to_pylist()[0]


def test_what_is_kept_has_a_budget_and_a_term() -> None:
    now = [0.0]
    one = table_of([request_of(1, [2, 2, 2], 0)])
    store = HistoryStore(THREE, 2**20, seconds_to_live=10, clock=lambda: now[0])
    store.keep(one, is_new=False, epoch=store.epoch)
    size = store.counters()["bytes"]
    assert 0 < size < one.nbytes
    now[0] = 10.0
    with pytest.raises(UnknownHistory):
        store.joined(one)
    assert store.counters() == {
        "joined": 0, "unknown": 1, "evictions": 0, "expirations": 1, "forgotten": 0, "users": 0, "bytes": 0,
    }  # fmt: skip
    small = HistoryStore(THREE, int(2.5 * size))
    for user in (1, 2, 1, 3):
        small.keep(table_of([request_of(user, [2, 2, 2], 0)]), is_new=False, epoch=small.epoch)
    assert small.counters()["evictions"] == 1
    with pytest.raises(UnknownHistory, match="user 2"):
        small.joined(table_of([request_of(2, [0, 0, 0], 0)]))
    small.joined(table_of([request_of(user, [0, 0, 0], 0) for user in (1, 3)]))


def test_who_is_forgotten_is_not_kept_by_a_request_that_came_before() -> None:
    store = HistoryStore(THREE, 2**20)
    one = table_of([request_of(1, [2, 2, 2], 0)])
    epoch = store.epoch
    store.keep(one, is_new=False, epoch=epoch)
    assert store.forget(1) and not store.forget(1)
    store.keep(one, is_new=False, epoch=epoch)
    assert len(store) == 0
    # New events of who is not known are no history.
    store.keep(one, is_new=True, epoch=store.epoch)
    assert len(store) == 0


def test_what_does_not_fit_is_refused() -> None:
    store = HistoryStore(THREE, 2**20)
    one = table_of([request_of(1, [2, 2, 2], 0)])
    store.keep(one, is_new=False, epoch=store.epoch)
    with pytest.raises(InputError, match="column 'user' is missing"):
        store.joined(one.drop_columns(["user"]))
    with pytest.raises(InputError, match="clicks_film: not list"):
        store.joined(one.set_column(one.column_names.index("clicks_film"), "clicks_film", pa.array([3])))
    with pytest.raises(InputError, match="clicks_film: has a null"):
        kind = one["clicks_film"].type
        store.joined(one.set_column(one.column_names.index("clicks_film"), "clicks_film", pa.array([None], kind)))
    with pytest.raises(ValueError, match="max_bytes is 0"):
        HistoryStore(THREE, 0)
    with pytest.raises(InputError, match="'film' is of candidates, which come later"):
        with_a_candidate(one, THREE)
