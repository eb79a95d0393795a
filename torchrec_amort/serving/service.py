"""ScoringService: worker threads behind a bounded queue."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from torchrec_amort.serving.workers import Workers

# Share of the latest request in the mean time to score one.
_LATEST = 0.05


class Closed(RuntimeError):
    """The service takes no more requests."""


Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Scorer(Protocol[Result_co]):
    """What a service needs of a scorer: an `AmortizedScorer`, a `Rollout` and `Versions` have it."""

    def score(self, requests: Any, /) -> Result_co:
        """The scores of every candidate of every request; called by many threads."""
        ...


@runtime_checkable
class ScorerOfMany(Scorer[Result_co], Protocol[Result_co]):
    """A scorer that takes less time for several calls together than for one after the other: `Versions` is one."""

    def score_together(self, calls: Sequence[Any], /) -> Sequence[Result_co]:
        """What `score` returns for each of several calls; called by many threads."""
        ...


class Overloaded(RuntimeError):
    """The request was not scored, since others were before it: it may be sent again later or elsewhere."""


class DeadlineExceeded(RuntimeError):
    """The request's time was over before it was scored."""


class Timing(NamedTuple):
    """Where the seconds of a request went.

    Args:
        waited: in the queue.
        scored: by a worker, with those that it took together.
    """

    waited: float
    scored: float


@dataclass
class ServiceCounters:
    """What became of the requests so far: each was refused or accepted, and then ends in one of the other ways.

    Args:
        accepted: taken into the queue.
        refused: not taken, since the queue was full or the deadline could not be met.
        done: scored.
        failed: ended in an error, which the sender gets.
        cancelled: given up by their sender while they waited.
        displaced: given up for one that goes first, since the queue was full.
        late: whose deadline came while they waited.
    """

    accepted: int = 0
    refused: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    displaced: int = 0
    late: int = 0


@dataclass(order=True)
class _Waiting(Generic[Result]):
    """A request in the queue, which those of lower priority numbers, and then those that came before, leave first."""

    priority: int
    number: int
    requests: Any = field(compare=False)
    num_bytes: int = field(compare=False)
    deadline: float | None = field(compare=False)
    future: Future[Result] = field(compare=False)
    then: Callable[[Result, Timing], None] | None = field(compare=False)
    came: float = field(compare=False)


class ScoringService(Generic[Result]):
    """Scores requests in worker threads; one that finds the queue full, or would come too late, is refused at once.

    A worker takes what waits already together, if that pays; it does not wait for more. So memory and waiting times
    stay bounded however many requests come. An error in one request is its sender's and leaves the others alone.

    Args:
        scorer: shared by the workers.
        num_workers: requests that are scored at the same time.
        max_waiting: requests that may wait for a worker.
        threads_per_request: CPU threads of each worker.
        max_bytes: bytes that requests which wait may have together; any number if None.
        max_together: requests that wait which a worker takes at a time, of a `ScorerOfMany`; one of any other.
        clock: seconds, of deadlines.

    Raises:
        ValueError: a number is below 1.

    Example::

        with ScoringService(scorer, num_workers=8, max_waiting=32) as service:
            logits_CT = service.submit(batch).result()
    """

    def __init__(
        self,
        scorer: Scorer[Result],
        num_workers: int,
        max_waiting: int,
        threads_per_request: int = 1,
        *,
        max_bytes: int | None = None,
        max_together: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min(num_workers, max_waiting, threads_per_request, max_bytes or 1, max_together) < 1:
            raise ValueError(
                f"num_workers is {num_workers}, max_waiting {max_waiting}, threads_per_request {threads_per_request}, "
                f"max_bytes {max_bytes}, max_together {max_together}: all need 1 or more"
            )
        self.scorer = scorer
        self._max_together = max_together if isinstance(scorer, ScorerOfMany) else 1
        self._num_workers, self._max_waiting, self._max_bytes = num_workers, max_waiting, max_bytes
        self._clock = clock
        # A heap; who leaves first stands first.
        self._queue: list[_Waiting[Result]] = []
        self._num_bytes = 0
        self._num_by_priority: Counter[int] = Counter()
        self._numbers = itertools.count()
        self._unfinished: set[Future[Result]] = set()
        self._num_scored_now = 0
        self._mean_seconds = 0.0
        self._counters = ServiceCounters()
        self._lock = threading.Lock()
        self._is_closed = False
        self._workers = Workers(num_workers, threads_per_request)

    def submit(
        self,
        requests: Any,
        *,
        deadline: float | None = None,
        priority: int = 0,
        num_bytes: int = 0,
        then: Callable[[Result, Timing], None] | None = None,
    ) -> Future[Result]:
        """Hand in requests.

        Args:
            requests: one request or several, scored together: whatever the scorer takes.
            deadline: by the service's clock, `time.monotonic` unless given, in seconds: later, no one wants the scores.
            priority: those of lower numbers go first; where the queue is full, they take the place of others.
            num_bytes: what the request takes while it waits.
            then: called with the scores, and how long they took, before the future has them.

        Returns:
            Future: of what the scorer returns. It ends in `Overloaded` for a request that gives up its place, and in
            `DeadlineExceeded` for one whose deadline comes while it waits.

        Raises:
            Overloaded: the queue is full, or too long for the deadline.
            DeadlineExceeded: the deadline is over.
            Closed: the service is closed.
        """
        future: Future[Result] = Future()
        request = _Waiting(priority, next(self._numbers), requests, num_bytes, deadline, future, then, self._clock())
        with self._lock:
            if self._is_closed:
                raise Closed("the service is closed")
            displaced = self._refuse_or_displace(deadline, priority, num_bytes)
            for other in displaced:
                self._queue.remove(other)
                self._counted(other, -1)
            if displaced:
                heapq.heapify(self._queue)
            heapq.heappush(self._queue, request)
            self._counted(request, 1)
            self._counters.accepted += 1
            self._unfinished.add(future)
            self._workers.submit(self._work)
        future.add_done_callback(self._unfinished.discard)
        for other in displaced:
            self._give_up(other, "displaced", Overloaded("the queue is full, and a request that goes first came"))
        return future

    def refuse_early(self, *, deadline: float | None = None, priority: int = 0, num_bytes: int = 0) -> None:
        """Refuse a request as `submit` would now, and nothing else: before it is read, which costs more than this.

        Args:
            deadline: see `submit`.
            priority: see `submit`.
            num_bytes: see `submit`.

        Raises:
            Overloaded: see `submit`.
            DeadlineExceeded: see `submit`.
        """
        with self._lock:
            self._refuse_or_displace(deadline, priority, num_bytes)

    def counters(self) -> dict[str, int]:
        """What became of the requests so far: see `ServiceCounters`."""
        with self._lock:
            return asdict(self._counters)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def drain(self) -> None:
        """Return when all requests that were accepted so far have ended."""
        with self._lock:
            unfinished = self._unfinished.copy()
        wait(unfinished)

    def close(self) -> None:
        """Take no more requests, and return when those that were accepted are scored.

        It may be called any number of times, by any threads; a worker, which calls back who waits for a future, does
        not wait.
        """
        with self._lock:
            self._is_closed = True
        self._workers.close()

    def __enter__(self) -> ScoringService[Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_or_displace(self, deadline: float | None, priority: int, num_bytes: int) -> list[_Waiting[Result]]:
        """The requests that have to leave the queue for another one, if that is not refused."""
        try:
            self._refuse_late(deadline, priority)
            return self._displaced_for(priority, num_bytes)
        except (Overloaded, DeadlineExceeded):
            self._counters.refused += 1
            raise

    def _refuse_late(self, deadline: float | None, priority: int) -> None:
        """Refuse a request whose scores would come after its deadline, as long as others have taken so far."""
        if deadline is None:
            return
        now = self._clock()
        if now >= deadline:
            raise DeadlineExceeded(f"the deadline was {now - deadline:.3g} s ago")
        num_before = self._num_scored_now + sum(
            number for other, number in self._num_by_priority.items() if other <= priority
        )
        # Until a worker is free, and then to be scored with those that it takes together.
        together = min(self._max_together, -(-(len(self._queue) + 1) // self._num_workers))
        turns = max(0, num_before - self._num_workers + 1) / self._num_workers + together
        if now + turns * self._mean_seconds > deadline:
            raise Overloaded(
                f"{num_before} requests are before it, and a request takes {self._mean_seconds * 1e3:.3g} ms: its "
                f"scores would come after its deadline in {(deadline - now) * 1e3:.3g} ms"
            )

    def _displaced_for(self, priority: int, num_bytes: int) -> list[_Waiting[Result]]:
        displaced: list[_Waiting[Result]] = []
        while reason := self._why_full(num_bytes, displaced):
            # The one that goes last, of those that stay.
            other = max((other for other in self._queue if other not in displaced), default=None)
            if other is None or other.priority <= priority:
                raise Overloaded(reason)
            displaced.append(other)
        return displaced

    def _why_full(self, num_bytes: int, displaced: Sequence[_Waiting[Result]]) -> str | None:
        """Why the queue, less some requests, has no place for another one; None if it has."""
        num_waiting = len(self._queue) - len(displaced)
        bytes_waiting = self._num_bytes - sum(other.num_bytes for other in displaced)
        if num_waiting == self._max_waiting:
            return f"{num_waiting} requests are waiting: the limit"
        if self._max_bytes is not None and bytes_waiting + num_bytes > self._max_bytes:
            return (
                f"{num_waiting} requests of {bytes_waiting} bytes are waiting, and it has {num_bytes}: the limit "
                f"is {self._max_bytes} bytes"
            )
        return None

    def _counted(self, request: _Waiting[Result], times: int) -> None:
        """Count a request that joins the queue, or leaves it."""
        self._num_bytes += times * request.num_bytes
        self._num_by_priority[request.priority] += times
        if not self._num_by_priority[request.priority]:
            del self._num_by_priority[request.priority]

    def _work(self) -> None:
        """Score the requests that go first, if there are any: those that left before have left their turns."""
        with self._lock:
            started = self._clock()
            taken, late = self._taken(started)
            self._num_scored_now += len(taken)
        for request in late:
            self._give_up(request, "late", DeadlineExceeded("its deadline came while it waited"))
        # Who cancels a request that waits does not want it scored; later it cannot be cancelled.
        wanted = [request for request in taken if request.future.set_running_or_notify_cancel()]
        with self._lock:
            self._num_scored_now -= len(taken) - len(wanted)
            self._counters.cancelled += len(taken) - len(wanted)
        if len(wanted) > 1:
            self._score_together(wanted, started)
        elif wanted:
            self._score(wanted[0], started)

    def _taken(self, started: float) -> tuple[list[_Waiting[Result]], list[_Waiting[Result]]]:
        """The requests that a worker takes together, and those whose deadline has come; both leave the queue."""
        taken: list[_Waiting[Result]] = []
        late: list[_Waiting[Result]] = []
        # The other workers have their share.
        most = min(self._max_together, -(-len(self._queue) // self._num_workers))
        deadline = math.inf
        while self._queue and len(taken) < max(1, most):
            its_deadline = math.inf if self._queue[0].deadline is None else self._queue[0].deadline
            is_late = started + self._mean_seconds > its_deadline
            # All of them have their scores when the last one has.
            if not is_late and started + (len(taken) + 1) * self._mean_seconds > min(deadline, its_deadline):
                break
            request = heapq.heappop(self._queue)
            self._counted(request, -1)
            if is_late:
                late.append(request)
            else:
                taken.append(request)
                deadline = min(deadline, its_deadline)
        return taken, late

    def _score_together(self, requests: Sequence[_Waiting[Result]], started: float) -> None:
        assert isinstance(self.scorer, ScorerOfMany)
        try:
            scores = self.scorer.score_together([request.requests for request in requests])
        except BaseException:  # noqa: BLE001 - of one of them: each gets its own
            for request in requests:
                self._score(request, self._clock())
            return
        seconds = self._clock() - started
        for request, of_request in zip(requests, scores, strict=True):
            self._tell(request, of_request, Timing(started - request.came, seconds), seconds / len(requests))

    def _score(self, request: _Waiting[Result], started: float) -> None:
        try:
            scores = self.scorer.score(request.requests)
        except BaseException as error:  # noqa: BLE001 - it is the sender's, and the worker goes on
            self._fail(request, error)
        else:
            seconds = self._clock() - started
            self._tell(request, scores, Timing(started - request.came, seconds), seconds)

    def _tell(self, request: _Waiting[Result], scores: Result, timing: Timing, seconds: float) -> None:
        """Hand scores out; seconds are this request's share of its worker's time."""
        try:
            if request.then is not None:
                request.then(scores, timing)
        except BaseException as error:  # noqa: BLE001 - as above
            self._fail(request, error)
            return
        with self._lock:
            self._mean_seconds += (seconds - self._mean_seconds) * (_LATEST if self._counters.done else 1)
        self._scored("done")
        request.future.set_result(scores)

    def _fail(self, request: _Waiting[Result], error: BaseException) -> None:
        self._scored("failed")
        request.future.set_exception(error)

    def _scored(self, how: str) -> None:
        with self._lock:
            self._num_scored_now -= 1
        self._count(how)

    def _give_up(self, request: _Waiting[Result], how: str, error: Exception) -> None:
        if not request.future.set_running_or_notify_cancel():
            self._count("cancelled")
            return
        self._count(how)
        request.future.set_exception(error)

    def _count(self, how: str) -> None:
        with self._lock:
            setattr(self._counters, how, getattr(self._counters, how) + 1)
