import threading
from concurrent.futures import Future, wait
from typing import Any

import pytest
import torch

from tests.inference.test_scorer import assert_same, by_impressions, make_batch, make_model
from torchrec_amort import AmortizedScorer, InputError
from torchrec_amort.inference.service import Overloaded, ScoringService


class Held:
    """A scorer that waits until it may go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.started = threading.Semaphore(0)

    def score(self, batch: Any) -> Any:
        self.started.release()
        self.go_on.wait()
        return batch


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


def test_senseless_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_workers is 0"):
        ScoringService(AmortizedScorer(make_model()), 0, 1)
