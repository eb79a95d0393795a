import logging
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_amort import HistoryCache, HistoryState
from torchrec_amort.serving.cache import CachedHistory


def make_history(num_events: int, version: bytes = b"v") -> CachedHistory:
    rows = torch.zeros(num_events, 1, 1)
    state = HistoryState((rows,), (rows.clone(),), torch.tensor([num_events]))
    return CachedHistory(version, num_events, state)


SIZE = make_history(4).nbytes


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def find(cache: HistoryCache, user: int, num_events: int = 4, version: bytes = b"v", extendable: bool = False) -> bool:
    return cache.find(user, num_events, lambda _: version, extendable=extendable) is not None


def test_bytes_are_those_of_the_memory_that_is_held() -> None:
    wide = torch.zeros(100, 1, 1)
    state = HistoryState((wide[:1],), (wide[1:2],), torch.tensor([1]))
    assert CachedHistory(b"", 1, state).nbytes == 100 * 4 + 8
    assert SIZE == 2 * 4 * 4 + 8


def test_the_least_recently_used_go_first() -> None:
    cache = HistoryCache(3 * SIZE)
    for user in range(3):
        cache.put(user, make_history(4))
    assert find(cache, 0)
    cache.put(3, make_history(4))
    assert [find(cache, user) for user in range(4)] == [True, False, True, True]
    assert cache.counters() == {
        "hits": 4,
        "extensions": 0,
        "misses": 1,
        "evictions": 1,
        "expirations": 0,
        "refusals": 0,
        "forgotten": 0,
        "users": 3,
        "bytes": 3 * SIZE,
    }


def test_what_is_larger_than_the_budget_is_not_kept_and_costs_no_other() -> None:
    cache = HistoryCache(SIZE)
    cache.put(0, make_history(4))
    cache.put(1, make_history(100))
    assert find(cache, 0)
    assert not find(cache, 1, 100)
    assert cache.counters()["refusals"] == 1


def test_old_histories_are_not_served() -> None:
    clock = Clock()
    cache = HistoryCache(1000, seconds_to_live=10, clock=clock)
    cache.put(0, make_history(4))
    clock.now = 9.9
    assert find(cache, 0)
    clock.now = 10.0
    assert not find(cache, 0)
    assert cache.counters()["expirations"] == 1
    assert cache.nbytes == 0


def test_who_does_not_come_again_is_not_kept_beyond_the_time_to_live() -> None:
    clock = Clock()
    cache = HistoryCache(1000, seconds_to_live=10, clock=clock)
    cache.put(0, make_history(4))
    clock.now = 6.0
    cache.put(1, make_history(4))
    assert find(cache, 0)
    clock.now = 10.0
    assert find(cache, 1)
    assert cache.counters()["users"] == 1
    assert cache.counters()["expirations"] == 1
    # Put anew, its time starts anew.
    cache.put(1, make_history(4))
    clock.now = 19.0
    assert find(cache, 1)
    clock.now = 20.0
    cache.put(2, make_history(4))
    assert cache.counters()["users"] == 1
    assert cache.counters()["expirations"] == 2


def test_what_is_encoded_while_the_cache_is_cleared_is_not_kept() -> None:
    cache = HistoryCache(1000)
    epoch = cache.epoch
    cache.clear()
    cache.put(0, make_history(4), epoch=epoch)
    assert not find(cache, 0)
    assert cache.counters()["forgotten"] == 0


def test_another_version_is_not_served_and_only_first_events_are_extended() -> None:
    cache = HistoryCache(1000)
    cache.put(0, make_history(4))
    assert not find(cache, 0, version=b"w")
    assert not find(cache, 0, num_events=3, extendable=True)
    assert not find(cache, 0, num_events=5)
    assert find(cache, 0, num_events=5, extendable=True)
    asked: list[int] = []
    cache.find(0, 5, lambda events: asked.append(events) or b"v", extendable=True)  # type: ignore[func-returns-value]
    assert asked == [4]
    assert cache.counters()["extensions"] == 2


def test_forgetting_a_user_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        cache = HistoryCache(1000)
        cache.put(12345, make_history(4))
        epoch = cache.epoch
        assert cache.forget(12345)
        assert not cache.forget(12345)
        assert not find(cache, 12345)
        cache.put(12345, make_history(4), epoch=epoch)
        assert not find(cache, 12345)
        assert cache.nbytes == len(cache) == 0
    assert "12345" not in caplog.text
    assert "12345" not in str(vars(cache))


@given(st.lists(st.tuples(st.sampled_from(["put", "find", "forget"]), st.integers(0, 5), st.integers(0, 20))))
def test_bytes_never_exceed_the_budget_and_add_up(steps: list[tuple[str, int, int]]) -> None:
    cache = HistoryCache(300)
    for step, user, events in steps:
        if step == "put":
            cache.put(user, make_history(events))
        elif step == "find":
            find(cache, user, events)
        else:
            cache.forget(user)
        assert cache.nbytes == sum(history.nbytes for history in cache._entries.values()) <= 300


def test_threads_do_not_lose_count() -> None:
    cache = HistoryCache(5 * SIZE)

    def work(seed: int) -> None:
        for step in range(300):
            user = (seed * 7 + step) % 9
            if not find(cache, user):
                cache.put(user, make_history(4), epoch=cache.epoch)
            if step % 50 == 0:
                cache.forget(user)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counters = cache.counters()
    assert counters["hits"] + counters["misses"] == 6 * 300
    assert counters["bytes"] == len(cache) * SIZE <= 5 * SIZE


def test_senseless_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes is 0"):
        HistoryCache(0)
    with pytest.raises(ValueError, match="seconds_to_live is 0"):
        HistoryCache(1, 0)


def test_histories_of_a_user_are_kept_and_forgotten_together_and_never_taken_for_one_another() -> None:
    cache = HistoryCache(1000)
    clicks, buys = make_history(4), make_history(3)
    cache.put(0, clicks, tower="clicks")
    cache.put(0, buys, tower="buys")
    assert len(cache) == 1
    version = lambda history: lambda _: history.version  # noqa: E731
    assert cache.find(0, clicks.num_events, version(clicks), tower="clicks") is clicks
    assert cache.find(0, buys.num_events, version(buys), tower="buys") is buys
    assert cache.find(0, buys.num_events, version(buys), tower="clicks") is None
    assert cache.forget(0)
    assert not cache.forget(0)
    assert (len(cache), cache.nbytes) == (0, 0)
