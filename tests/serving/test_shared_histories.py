import base64
import logging
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.schemas import THREE
from tests.serving.test_histories import HISTORY_OF, LIMITS, request_of, table_of
from tests.serving.valkey import Valkey, valkey
from torchrec_amort import InputError
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.histories import HistoryStore, TierUnreachable, UnknownHistory
from torchrec_amort.serving.history_tier import HistoryTier, Plain, Sealed, Sealing
from torchrec_amort.serving.shared_histories import SharedHistoryStore

SECONDS = 3600.0
KEY = bytes(range(32))
COLUMN = "clicks_film"


@pytest.fixture(scope="module")
def running() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture
def server(running: Valkey) -> Valkey:
    running.admin.flushall()
    return running


def store_of(
    url: str,
    sealing: Sealing | None = None,
    schema: RequestSchema = THREE,
    limits: dict[str, int] | None = None,
    timeout: float = 30.0,
) -> SharedHistoryStore:
    """What one process has."""
    local = HistoryStore(schema, 2**20, limits, SECONDS)
    tier = HistoryTier(url, local.columns, sealing or Sealed("films", KEY), SECONDS, timeout=timeout)
    return SharedHistoryStore(local, tier)


def one(user: int, *films: int) -> pa.Table:
    """A request of a user with some films clicked, and nothing else."""
    table = table_of([request_of(user, [0, 0, 0], 0)])
    events = {column: [0] * len(films) for column, history in HISTORY_OF.items() if history == "clicks"}
    for column, values in (events | {COLUMN: list(films)}).items():
        kind = table.schema.field(column).type
        value: Any = [[value] for value in values] if pa.types.is_list(kind.value_type) else values
        table = table.set_column(table.column_names.index(column), column, pa.array([value], kind))
    return table


def films_of(table: pa.Table) -> list[int]:
    films: list[int] = table[COLUMN].to_pylist()[0]
    return films


def score(store: SharedHistoryStore, table: pa.Table, is_new: bool) -> pa.Table:
    asked = store.asked(table, is_new=is_new)
    asked.keep()
    return asked.requests


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    calls=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.sampled_from(["whole", "append", "append", "forget"]),
            st.integers(0, 1),
            st.lists(st.integers(0, 3), min_size=3, max_size=3),
        ),
        max_size=14,
    )
)
def test_any_process_has_the_list_of_all_events_of_each_user(
    server: Valkey, calls: list[tuple[int, str, int, list[int]]]
) -> None:
    server.admin.flushall()
    stores = [store_of(server.url, limits=LIMITS) for _ in range(2)]
    alone = HistoryStore(THREE, 2**20, LIMITS)
    for seed, (place, kind, user, sizes) in enumerate(calls):
        store, table = stores[place], table_of([request_of(user, sizes, seed)])
        if kind == "forget":
            alone.forget(user)
            store.forget(user)
            continue
        try:
            expected = alone.asked(table, is_new=kind == "append")
        except UnknownHistory as error:
            with pytest.raises(UnknownHistory, match=str(error)):
                store.asked(table, is_new=True)
            continue
        expected.keep()
        assert score(store, table, is_new=kind == "append").equals(expected.requests)
    for store in stores:
        counters = store.counters()
        assert [counters[name] for name in ("merged", "crossed", "refused", "missed", "tier_errors")] == [0] * 5


def test_events_that_two_processes_write_at_once_are_all_there(server: Valkey) -> None:
    first, second = store_of(server.url), store_of(server.url)
    score(first, one(1, 1), is_new=False)
    asked = first.asked(one(1, 2), is_new=True), second.asked(one(1, 3), is_new=True)
    assert [films_of(of.requests) for of in asked] == [[1, 2], [1, 3]]
    asked[1].keep()
    asked[0].keep()
    assert first.counters()["merged"] == 1
    for store in (first, second):
        assert films_of(store.asked(one(1), is_new=True).requests) == [1, 3, 2]
    whole, new = first.asked(one(1, 7), is_new=False), second.asked(one(1, 4), is_new=True)
    new.keep()
    whole.keep()
    assert first.counters()["crossed"] == 1
    assert films_of(second.asked(one(1), is_new=True).requests) == [7]


def test_many_threads_lose_no_event(server: Valkey) -> None:
    stores = [store_of(server.url) for _ in range(2)]
    score(stores[0], one(1, 0), is_new=False)
    with ThreadPoolExecutor(8) as threads:
        done = threads.map(lambda film: score(stores[film % 2], one(1, film % 5, film), is_new=True), range(1, 40))
        assert len(list(done)) == 39
    films = films_of(stores[0].asked(one(1), is_new=True).requests)
    assert films[0] == 0
    # Of each request the events stay together.
    assert sorted(zip(films[1::2], films[2::2], strict=True)) == sorted((film % 5, film) for film in range(1, 40))


def test_rows_of_one_user_are_all_kept(server: Valkey) -> None:
    store = store_of(server.url)
    score(store, pa.concat_tables([one(1, 1), one(2, 2)]), is_new=False)
    score(store, pa.concat_tables([one(1, 3), one(2, 4), one(1, 5)]), is_new=True)
    again = store_of(server.url).asked(pa.concat_tables([one(1), one(2)]), is_new=True).requests
    assert again[COLUMN].to_pylist() == [[1, 3, 5], [2, 4]]
    with pytest.raises(UnknownHistory, match="user 3: "):
        store.asked(pa.concat_tables([one(1), one(3)]), is_new=True)
    # Nobody's are not kept.
    score(store, one(1, 9).drop_columns(["user"]), is_new=False)
    with pytest.raises(InputError, match="column 'user' is missing"):
        store.asked(one(1).drop_columns(["user"]), is_new=True)


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("is_back", [False, True])
def test_who_is_forgotten_elsewhere_is_not_kept_by_a_request_under_way(
    server: Valkey, is_new: bool, is_back: bool
) -> None:
    first, second = store_of(server.url), store_of(server.url)
    score(first, one(1, 1), is_new=False)
    under_way = first.asked(one(1, 2), is_new=is_new)
    assert second.forget(1) and not second.forget(1)
    if is_back:
        score(second, one(1, 5), is_new=False)
    under_way.keep()
    assert first.counters()["refused"] == 1 and first.counters()["users"] == 0
    for store in (first, second):
        if is_back:
            assert films_of(store.asked(one(1), is_new=True).requests) == [5]
        else:
            with pytest.raises(UnknownHistory):
                store.asked(one(1), is_new=True)


def test_who_was_never_known_is_not_kept_either(server: Valkey) -> None:
    first, second = store_of(server.url), store_of(server.url)
    under_way = first.asked(one(1, 2), is_new=False)
    assert not second.forget(1)
    under_way.keep()
    with pytest.raises(UnknownHistory):
        second.asked(one(1), is_new=True)
    score(first, one(1, 3), is_new=False)
    assert films_of(second.asked(one(1), is_new=True).requests) == [3]


def test_what_is_kept_has_a_term_and_so_have_requests(server: Valkey) -> None:
    store = store_of(server.url)
    score(store, one(1, 1), is_new=False)
    (name,) = server.admin.keys()
    assert 0.9 * SECONDS < server.admin.pttl(name) / 1000 <= SECONDS
    server.admin.persist(name)
    score(store, one(1, 2), is_new=True)
    assert 0.9 * SECONDS < server.admin.pttl(name) / 1000 <= SECONDS
    store.forget(1)
    # The mark has it, too: it holds no events.
    assert 0.9 * SECONDS < server.admin.pttl(name) / 1000 <= SECONDS
    assert set(server.admin.hgetall(name)) == {b"mark"}
    columns = HistoryStore(THREE, 2**20).columns
    tier = HistoryTier(server.url, columns, Sealed("films", KEY), SECONDS)
    (events,), read = columns.of(one(1, 1)), tier.read([1], None)
    late = tier.write(1, events, read.found[0], read.at - int(1000 * SECONDS / 2) - 1, is_whole=True)
    assert late.outcome == "late"
    assert tier.write(1, events, read.found[0], read.at, is_whole=True).outcome == "written"


def test_what_expires_meanwhile_is_unknown(server: Valkey) -> None:
    store = store_of(server.url)
    score(store, one(1, 1), is_new=False)
    under_way = store.asked(one(1, 2), is_new=True)
    server.admin.flushall()
    under_way.keep()
    assert store.counters()["refused"] == 1
    with pytest.raises(UnknownHistory):
        store.asked(one(1), is_new=True)
    assert server.admin.keys() == []


def test_the_tier_tells_neither_users_nor_events(server: Valkey) -> None:
    user, film = 123_456_789, 1_234_567_890_123
    films = [film] * 50
    score(store_of(server.url), one(user, *films), is_new=False)
    (name,) = server.admin.keys()
    everything = name + b"".join(part for pair in server.admin.hgetall(name).items() for part in pair)
    for number in (user, film):
        assert str(number).encode() not in everything and number.to_bytes(8, "little") not in everything
    plain = store_of(server.url, Plain("films"))
    score(plain, one(user, *films), is_new=False)
    value = server.admin.hget(f"torchrec-amort:films:{user}", "value")
    assert film.to_bytes(8, "little") in value
    assert films_of(store_of(server.url, Plain("films")).asked(one(user), is_new=True).requests) == films


def test_a_value_is_of_one_user_one_key_and_one_model(server: Valkey) -> None:
    sealed = Sealed("films", KEY)
    score(store_of(server.url), one(1, 1), is_new=False)
    name = sealed.name_of(1)
    kept = server.admin.hgetall(name)
    server.admin.hset(sealed.name_of(2), mapping=kept)
    spoilt = bytearray(kept[b"value"])
    spoilt[-1] ^= 1
    server.admin.hset(sealed.name_of(3), mapping=kept | {b"value": bytes(spoilt)})
    server.admin.hset(sealed.name_of(4), mapping=kept | {b"value": b"short"})
    store = store_of(server.url)
    for user in (2, 3, 4):
        with pytest.raises(UnknownHistory):
            store.asked(one(user), is_new=True)
    assert store.counters()["unreadable"] == 3
    assert films_of(store.asked(one(1), is_new=True).requests) == [1]
    for other in (Sealed("films", KEY[::-1]), Sealed("books", KEY)):
        assert other.name_of(1) != name and other.name_of(1).rpartition(":")[2] != name.rpartition(":")[2]
        assert sealed.sealed(1, b"the same") != sealed.sealed(1, b"the same")
        with pytest.raises(ValueError, match="not written with this key"):
            other.opened(1, kept[b"value"])


def test_values_without_a_key_are_checked(server: Valkey) -> None:
    store = store_of(server.url, Plain("films"))
    score(store, one(1, 1), is_new=False)
    name = Plain("films").name_of(1)
    value = server.admin.hget(name, "value")
    with pa.ipc.open_stream(value) as stream:
        batch = stream.read_next_batch()
    column = batch.schema.get_field_index(COLUMN)
    arrays = list(batch.columns)
    arrays[column] = pa.array([None], batch.schema.field(column).type)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as null:
        null.write_batch(pa.record_batch(arrays, schema=batch.schema))
    for spoilt in (b"nothing", value[: len(value) // 2], sink.getvalue().to_pybytes()):
        server.admin.hset(name, mapping={"value": spoilt, "revision": secrets.token_bytes(16)})
        with pytest.raises(UnknownHistory):
            store.asked(one(1), is_new=True)
    assert store.counters()["unreadable"] == 3


def test_a_value_of_other_columns_is_unknown(server: Valkey) -> None:
    before, after = store_of(server.url), store_of(server.url, schema=THREE.without(["clicks_gap"]))
    score(before, one(1, 1), is_new=False)
    with pytest.raises(UnknownHistory):
        after.asked(one(1), is_new=True)
    assert after.counters()["other_schema"] == 1
    score(after, one(1, 2), is_new=False)
    assert films_of(after.asked(one(1), is_new=True).requests) == [2]


def test_without_the_tier_the_copies_go_on(server: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (store_of(server.url, timeout=0.2) for _ in range(2))
    for user in (1, 2):
        score(first, one(user, 1), is_new=False)
    with caplog.at_level(logging.ERROR):
        server.process.send_signal(signal.SIGSTOP)
        try:
            assert films_of(score(first, one(1, 2), is_new=True)) == [1, 2]
            assert films_of(score(first, one(1, 3), is_new=True)) == [1, 2, 3]
            with pytest.raises(UnknownHistory):
                second.asked(one(1), is_new=True)
            score(second, one(3, 1), is_new=False)
            assert films_of(score(second, one(3, 2), is_new=True)) == [1, 2]
            with pytest.raises(TierUnreachable, match="user 3: is not forgotten: .* forget again"):
                second.forget(3)
            with pytest.raises(UnknownHistory):
                second.asked(one(3), is_new=True)
        finally:
            server.process.send_signal(signal.SIGCONT)
    assert (first.counters()["missed"], first.counters()["tier_errors"]) == (2, 2)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all("does not answer: TimeoutError" in message for message in messages)
    # It has not all: neither is taken for the whole.
    with pytest.raises(UnknownHistory):
        first.asked(one(1), is_new=True)
    score(first, one(1, 1, 2, 3), is_new=False)
    assert films_of(second.asked(one(1), is_new=True).requests) == [1, 2, 3]
    assert films_of(first.asked(one(2), is_new=True).requests) == [1]


def test_a_write_that_fails_is_missed(server: Valkey) -> None:
    first, second = store_of(server.url), store_of(server.url)
    score(first, pa.concat_tables([one(1, 1), one(2, 1)]), is_new=False)
    under_way = first.asked(pa.concat_tables([one(1, 2), one(2, 2)]), is_new=True)
    server.admin.config_set("maxmemory", 1)
    try:
        under_way.keep()
        # The others do not wait for it.
        assert (first.counters()["missed"], first.counters()["tier_errors"]) == (2, 1)
        # Where memory is full one can still be forgotten.
        assert second.forget(2)
    finally:
        server.admin.config_set("maxmemory", 0)
    for user in (1, 2):
        with pytest.raises(UnknownHistory):
            first.asked(one(user), is_new=True)
    assert first.counters()["users"] == 0


def test_who_does_not_answer_is_not_waited_for() -> None:
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        accepting = threading.Thread(target=lambda: accepted.append(silent.accept()[0]))
        accepting.start()
        store = store_of(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout=0.05)
        score(store, one(1, 1), is_new=False)
        accepting.join()
        silent.setblocking(False)
        # A write may have been done, so nothing is sent again.
        with pytest.raises(BlockingIOError):
            silent.accept()
    # Nor one that is not there.
    assert films_of(score(store, one(1, 2), is_new=True)) == [1, 2]
    assert store.counters()["tier_errors"] == 2 and len(accepted) == 1
    accepted[0].close()


def test_a_senseless_tier_is_refused(tmp_path: Path) -> None:
    columns = HistoryStore(THREE, 2**20).columns
    with pytest.raises(InputError, match="give redis://HOST:PORT/DATABASE") as told:
        HistoryTier("http://me:secret@host", columns, Plain("films"), SECONDS)
    assert "secret" not in str(told.value)
    path = tmp_path / "key.txt"
    path.write_text(base64.b64encode(KEY).decode() + "\n")
    assert Sealed.read("films", str(path)).name_of(1) == Sealed("films", KEY).name_of(1)
    for text, message in (
        ("no key", "not a file of base64"),
        (base64.b64encode(KEY[1:]).decode(), "31 bytes: give 32"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            Sealed.read("films", str(path))
    with pytest.raises(InputError, match="FileNotFoundError"):
        Sealed.read("films", str(tmp_path / "none.txt"))
