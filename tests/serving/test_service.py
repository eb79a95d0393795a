import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch

from tests.serving.test_scorer import assert_same, by_impressions, make_batch, make_model
from torchrec_amort import AmortizedScorer, InputError
from torchrec_amort.serving.service import Overloaded, ScoringService


class Held:
    """A scorer that waits until it may go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.started = threading.Semaphore(0)

    def score(self, batch: Any) -> Any:
        self.started.release()
        self.go_on.wait()
        return batch


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
        assert service.counters() == {"accepted": 8, "refused": 0, "done": 7, "failed": 1, "cancelled": 0}
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
    assert service.counters() == {"accepted": 4, "refused": 5, "done": 3, "failed": 0, "cancelled": 1}


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
    assert service.counters() == {"accepted": 4, "refused": 0, "done": 4, "failed": 0, "cancelled": 0}
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
    assert service.counters() == {"accepted": 2, "refused": 0, "done": 1, "failed": 1, "cancelled": 0}


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
