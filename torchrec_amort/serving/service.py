"""ScoringService: worker threads behind a bounded queue."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.serving.workers import Workers


class Scorer(Protocol):
    """What a service needs of a scorer: an `AmortizedScorer` and a `Rollout` have it."""

    def score(self, requests: RequestBatch, /) -> Tensor:
        """Logits [C, T] of every candidate of every request; called by many threads."""
        ...


class Overloaded(RuntimeError):
    """The queue is full: the request was not taken, and may be sent again later or elsewhere."""


@dataclass
class ServiceCounters:
    """What became of the requests so far: each was refused or accepted, and then ends done, failed or cancelled.

    Args:
        accepted: taken into the queue.
        refused: not taken, since the queue was full.
        done: scored.
        failed: ended in an error, which the sender gets.
        cancelled: given up by their sender while they waited.
    """

    accepted: int = 0
    refused: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0


class ScoringService:
    """Scores requests in worker threads; a request that finds the queue full is refused at once.

    So that memory and waiting times stay bounded however many requests come. An error in one request is its sender's
    and leaves the others alone.

    Args:
        scorer: shared by the workers.
        num_workers: requests that are scored at the same time.
        max_waiting: requests that may wait for a worker.
        threads_per_request: CPU threads of each worker.

    Raises:
        ValueError: a number is below 1.

    Example::

        with ScoringService(scorer, num_workers=8, max_waiting=32) as service:
            logits_CT = service.submit(batch).result()
    """

    def __init__(self, scorer: Scorer, num_workers: int, max_waiting: int, threads_per_request: int = 1) -> None:
        if min(num_workers, max_waiting, threads_per_request) < 1:
            raise ValueError(
                f"num_workers is {num_workers}, max_waiting {max_waiting}, threads_per_request {threads_per_request}: "
                "all need 1 or more"
            )
        self.scorer = scorer
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._counters = ServiceCounters()
        self._lock = threading.Lock()
        self._is_closed = False
        self._workers = Workers(num_workers, threads_per_request)

    def submit(self, batch: RequestBatch) -> Future[Tensor]:
        """Hand in requests.

        Args:
            batch: one request or several, scored together.

        Returns:
            Future: of their logits [C, T].

        Raises:
            Overloaded: the queue is full.
            RuntimeError: the service is closed.
        """
        future: Future[Tensor] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the service is closed")
            if self._num_waiting == self._max_waiting:
                self._counters.refused += 1
                raise Overloaded(f"{self._max_waiting} requests are waiting: the limit")
            self._workers.submit(self._work, batch, future)
            self._num_waiting += 1
            self._counters.accepted += 1
        return future

    def counters(self) -> dict[str, int]:
        """What became of the requests so far: see `ServiceCounters`."""
        with self._lock:
            return asdict(self._counters)

    def close(self) -> None:
        """Take no more requests, and return when those that were accepted are scored.

        It may be called any number of times, by any threads; a worker, which calls back who waits for a future, does
        not wait.
        """
        with self._lock:
            self._is_closed = True
        self._workers.close()

    def __enter__(self) -> ScoringService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, batch: RequestBatch, future: Future[Tensor]) -> None:
        # Who cancels a request that waits does not want it scored; later it cannot be cancelled.
        is_wanted = future.set_running_or_notify_cancel()
        with self._lock:
            self._num_waiting -= 1
            self._counters.cancelled += not is_wanted
        if not is_wanted:
            return
        try:
            logits_CT = self.scorer.score(batch)
        except BaseException as error:  # noqa: BLE001 - it is the sender's, and the worker goes on
            with self._lock:
                self._counters.failed += 1
            future.set_exception(error)
        else:
            with self._lock:
                self._counters.done += 1
            future.set_result(logits_CT)
