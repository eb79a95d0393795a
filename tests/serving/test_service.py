import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch

from tests.serving.test_scorer import assert_same, by_impressions, make_batch, make_model
from torchrec_amort import AmortizedScorer, InputError
from torchrec_amort.serving.service import DeadlineExceeded, Overloaded, ScoringService


class Held:
    """A scorer that waits until it may go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.started = threading.Semaphore(0)

    def score(self, batch: Any) -> Any:
        self.started.release()
        self.go_on.wait()
        return batch


def ended(service: ScoringService[Any]) -> dict[str, int]:
    """What became of requests, less what became of none."""
    return {name: count for name, count in service.counters().items() if count}


def run(*functions: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    return threads


def assert_end(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_results_and_errors_go_to_who_sent_the_request() -> None:
    model = make_model()
    batches = [make_batch([(3, 2)], seed) for seed in range(8)]
    batches[5].candidate_sparse.values()[0] = 10_000
    with ScoringService(AmortizedScorer(model), 2, 8) as service:
        futures = [service.submit(batch) for batch in batches]
        for place, (batch, future) in enumerate(zip(batches, futures, strict=True)):
            if place == 5:
                with pytest.raises(InputError, match="has id 10000"):
                    future.result()
            else:
                assert_same(future.result(), by_impressions(model, batch))
        assert ended(service) == {"accepted": 8, "done": 7, "failed": 1}
    with pytest.raises(RuntimeError, match="closed"):
        service.submit(batches[0])


def test_a_full_queue_refuses_at_once_and_loses_nothing() -> None:
    held = Held()
    service = ScoringService(held, num_workers=1, max_waiting=3)
    first: Future[torch.Tensor] = service.submit(make_batch([(1, 1)]))
    held.started.acquire()
    waiting = [service.submit(make_batch([(1, 1)])) for _ in range(3)]
    for _ in range(5):
        with pytest.raises(Overloaded, match="3 requests are waiting"):
            service.submit(make_batch([(1, 1)]))
    assert waiting[1].cancel()
    held.go_on.set()
    service.close()
    assert all(future.done() for future in wait([first, *waiting]).done)
    assert ended(service) == {"accepted": 4, "refused": 5, "done": 3, "cancelled": 1}


class Clock:
    """Seconds that a test tells; each request takes some to score."""

    def __init__(self, seconds_to_score: float = 0.0) -> None:
        self.now, self.seconds_to_score = 100.0, seconds_to_score

    def __call__(self) -> float:
        return self.now

    def score(self, requests: Any) -> Any:
        self.now += self.seconds_to_score
        return requests


class HeldInOrder(Held):
    """A scorer that waits, and keeps the order in which requests were scored."""

    def __init__(self) -> None:
        super().__init__()
        self.scored: list[Any] = []

    def score(self, batch: Any) -> Any:
        super().score(batch)
        self.scored.append(batch)
        return batch


def test_requests_of_lower_priority_numbers_go_first_and_take_the_place_of_others() -> None:
    held = HeldInOrder()
    service = ScoringService(held, num_workers=1, max_waiting=3)
    service.submit("first")
    held.started.acquire()
    late, usual, later = (service.submit(word, priority=p) for word, p in (("late", 2), ("usual", 1), ("later", 2)))
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        service.submit("too late", priority=2)
    urgent = service.submit("urgent")
    with pytest.raises(Overloaded, match="a request that goes first came"):
        later.result(60)
    held.go_on.set()
    service.close()
    assert held.scored == ["first", "urgent", "usual", "late"]
    assert [future.result(0) for future in (late, usual, urgent)] == ["late", "usual", "urgent"]
    assert ended(service) == {"accepted": 5, "refused": 1, "done": 4, "displaced": 1}


def test_what_waits_is_bounded_in_bytes() -> None:
    held = Held()
    service = ScoringService(held, num_workers=1, max_waiting=9, max_bytes=100)
    service.submit("first", num_bytes=90)
    held.started.acquire()
    service.submit("second", num_bytes=60)
    with pytest.raises(Overloaded, match="1 requests of 60 bytes are waiting, and it has 41: the limit is 100 bytes"):
        service.submit("third", num_bytes=41)
    with pytest.raises(Overloaded, match="and it has 101"):
        service.submit("large", num_bytes=101, priority=-1)
    service.submit("fourth", num_bytes=40)
    held.go_on.set()
    service.close()
    assert ended(service) == {"accepted": 3, "refused": 2, "done": 3}


class HeldTogether(Held):
    """A scorer of many that waits until it may go on, and scores no call of text."""

    def __init__(self) -> None:
        super().__init__()
        self.together: list[list[Any]] = []

    def score(self, call: Any) -> Any:
        self.together.append([call])
        return self._scored(super().score(call))

    def score_together(self, calls: Sequence[Any]) -> list[Any]:
        self.together.append(list(calls))
        return [self._scored(call) for call in calls]

    @staticmethod
    def _scored(call: Any) -> Any:
        if isinstance(call, str):
            raise InputError(f"{call} is text")
        return -call


def test_what_waits_is_scored_together_and_each_sender_gets_its_own() -> None:
    held, told = HeldTogether(), list[Any]()
    with ScoringService(held, num_workers=1, max_waiting=9, max_together=3) as service:
        first: Future[Any] = service.submit(1)
        held.started.acquire()
        calls: list[Any] = [2, 3, 4, 5, "six", 7]
        futures = [service.submit(call, then=lambda scores, _: told.append(scores)) for call in calls]
        assert futures[2].cancel()
        urgent = service.submit(8, priority=-1)
        held.go_on.set()
        assert [first.result(), urgent.result()] == [-1, -8]
        assert [futures[place].result() for place in (0, 1, 3, 5)] == [-2, -3, -5, -7]
        with pytest.raises(InputError, match="six is text"):
            futures[4].result()
    # Who was cancelled had its turn; of those with an error each is scored once more.
    assert held.together == [[1], [8, 2, 3], [5, "six"], [5], ["six"], [7]]
    assert told == [-2, -3, -5, -7]
    assert ended(service) == {"accepted": 8, "done": 6, "failed": 1, "cancelled": 1}


class Ticking(HeldTogether):
    """A scorer of which each call takes a second."""

    now = 0.0

    def score(self, call: Any) -> Any:
        scores = super().score(call)
        self.now += 1
        return scores

    def score_together(self, calls: Sequence[Any]) -> list[Any]:
        self.now += len(calls)
        return super().score_together(calls)


def test_no_deadline_is_missed_for_what_is_scored_together() -> None:
    held = Ticking()
    with ScoringService(held, num_workers=1, max_waiting=9, clock=lambda: held.now) as service:
        held.go_on.set()
        assert service.submit(1).result() == -1
        held.go_on.clear()
        futures: list[Future[Any]] = [service.submit(2)]
        held.started.acquire()
        held.started.acquire()
        # The one that is scored now, the one before it and the two together.
        with pytest.raises(Overloaded, match="2 requests are before it"):
            service.submit(3)
            service.submit(4, deadline=held.now + 3.9)
        futures += [service.submit(4, deadline=held.now + 4), service.submit(5), service.submit(6)]
        held.go_on.set()
        assert [future.result() for future in futures] == [-2, -4, -5, -6]
    assert held.together == [[1], [2], [3, 4, 5], [6]]


def test_workers_share_what_waits() -> None:
    two = HeldTogether()
    with ScoringService(two, num_workers=2, max_waiting=9) as service:
        others = [service.submit(call) for call in (1, 2)]
        two.started.acquire()
        two.started.acquire()
        waiting = [service.submit(call) for call in (3, 4, 5, 6)]
        two.go_on.set()
        wait([*others, *waiting])
    assert max(map(len, two.together)) == 2


def test_what_was_accepted_before_it_is_drained_has_ended() -> None:
    held, drained = Held(), threading.Event()
    service = ScoringService(held, num_workers=1, max_waiting=9)
    futures = [service.submit(word) for word in ("first", "second", "third")]
    assert held.started.acquire(timeout=60)

    def drain() -> None:
        service.drain()
        drained.set()

    draining = run(drain)
    assert not drained.is_set()
    futures[2].cancel()
    held.go_on.set()
    assert_end(draining)
    assert all(future.done() for future in futures)
    service.close()
    service.drain()


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    clock = Clock(seconds_to_score=2.0)
    with ScoringService(clock, num_workers=1, max_waiting=9, clock=clock) as service:
        # Nothing is known of how long a request takes, and then it is.
        assert service.submit("first", deadline=101.0).result(60) == "first"
        with pytest.raises(DeadlineExceeded, match="the deadline was 2 s ago"):
            service.submit("over", deadline=100.0)
        with pytest.raises(Overloaded, match=r"0 requests are before it, and a request takes 2e\+03 ms"):
            service.submit("soon", deadline=103.9)
        assert service.submit("in time", deadline=104.1).result(60) == "in time"
        assert ended(service) == {"accepted": 2, "refused": 2, "done": 2}


def test_those_that_wait_count_against_a_deadline() -> None:
    clock, held = Clock(seconds_to_score=2.0), Held()

    class Scorer:
        def score(self, requests: Any) -> Any:
            if requests == "held":
                held.score(requests)
            return clock.score(requests)

    service = ScoringService(Scorer(), num_workers=1, max_waiting=9, clock=clock)
    service.submit("first").result(60)
    service.submit("held")
    held.started.acquire()
    behind = service.submit("behind", deadline=106.5, priority=1)
    with pytest.raises(Overloaded, match="2 requests are before it"):
        service.submit("last", deadline=107.5, priority=1)
    with pytest.raises(Overloaded, match="2 requests are before it"):
        service.refuse_early(deadline=107.5, priority=1)
    service.refuse_early(deadline=108.5, priority=1)
    service.submit("ahead", deadline=106.5)
    held.go_on.set()
    service.close()
    # The one that went first took its time.
    with pytest.raises(DeadlineExceeded, match="while it waited"):
        behind.result(0)
    assert ended(service) == {"accepted": 4, "refused": 2, "done": 3, "late": 1}


def test_it_is_closed_by_many_threads_while_its_queue_is_full() -> None:
    held = Held()
    service = ScoringService(held, num_workers=2, max_waiting=2)
    futures = []
    for _ in range(2):
        futures.append(service.submit(make_batch([(1, 1)])))
        assert held.started.acquire(timeout=60)
    futures += [service.submit(make_batch([(1, 1)])) for _ in range(2)]
    closing = run(service.close, service.close, service.close)
    held.go_on.set()
    assert_end(closing)
    assert all(future.done() for future in futures)
    assert ended(service) == {"accepted": 4, "done": 4}
    assert_end(run(service.close))
    with pytest.raises(RuntimeError, match="the service is closed"):
        service.submit(make_batch([(1, 1)]))


def test_it_may_be_closed_inside_its_with() -> None:
    def close_twice() -> None:
        with ScoringService(Held(), num_workers=3, max_waiting=1) as service:
            service.close()

    assert_end(run(close_twice))


def test_who_waits_for_a_future_may_close_it_in_the_workers_own_thread() -> None:
    held, closed = Held(), threading.Event()
    service = ScoringService(held, num_workers=2, max_waiting=2)

    def close(_: object) -> None:
        service.close()
        closed.set()

    first: Future[torch.Tensor] = service.submit(make_batch([(1, 1)]))
    first.add_done_callback(close)
    assert held.started.acquire(timeout=60)
    others = [service.submit(make_batch([(1, 1)])) for _ in range(2)]
    held.go_on.set()
    assert closed.wait(60)
    assert_end(run(service.close))
    assert all(future.done() for future in [first, *others])


def test_a_scorer_that_exits_is_its_senders_and_ends_no_worker() -> None:
    class Exits(Held):
        def score(self, batch: Any) -> Any:
            if not self.go_on.is_set():
                self.go_on.set()
                raise SystemExit("told to stop")
            return super().score(batch)

    service = ScoringService(Exits(), num_workers=1, max_waiting=2)
    futures: list[Future[torch.Tensor]] = [service.submit(make_batch([(1, 1)])) for _ in range(2)]
    assert_end(run(service.close))
    assert isinstance(futures[0].exception(0), SystemExit)
    assert len(futures[1].result(0)) == 1
    assert ended(service) == {"accepted": 2, "done": 1, "failed": 1}


def test_workers_have_threads_of_their_own_and_leave_those_of_all_others() -> None:
    class Threads:
        def score(self, batch: Any) -> Any:
            torch.ones(100_000).sum()
            return torch.get_num_threads()

    def number_of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    assert before != 3
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda threads: ScoringService(Threads(), 2, 4, threads), (1, 3, 1, 3)))
    for service, threads in zip(made, (1, 3, 1, 3), strict=True):
        with service:
            numbers: list[Any] = [service.submit(make_batch([(1, 1)])).result() for _ in range(4)]
        assert numbers == [threads] * 4
    assert (torch.get_num_threads(), number_of_a_new_thread()) == (before, before)


def test_senseless_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_workers is 0"):
        ScoringService(AmortizedScorer(make_model()), 0, 1)
