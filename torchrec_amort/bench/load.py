"""Load: many clients at once, at a share of what the service can do, with every answer checked."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.bench.timing import threads
from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, refuse_out_of_bounds
from torchrec_amort.models.ranker import Ranker
from torchrec_amort.ops.cores import usable_cores
from torchrec_amort.progress import progress
from torchrec_amort.serving.scorer import AmortizedScorer
from torchrec_amort.serving.service import Overloaded, ScoringService

TOLERANCE = 1e-4


@dataclass(kw_only=True)
class LoadConfig:
    """Many clients at once.

    Args:
        seconds: how long each load lasts; no load if 0.
        clients: threads that send requests.
        rates: loads, each a share of the capacity that is measured first; above 1 is overload.
        workers: requests that are scored at the same time, on one thread each; one for each CPU thread
            unless given, and no more than there are cores for.
        waiting: requests that may wait for a worker; any more are refused.
        requests: different requests that are sent, with shapes as they are in the data.
    """

    seconds: float = 0.0
    clients: int = 8
    rates: list[float] = field(default_factory=lambda: [0.5, 2.0])
    workers: int | None = None
    waiting: int = 32
    requests: int = 200

    def __post_init__(self) -> None:
        at_least_one = ("clients", "workers", "waiting", "requests")
        bounds = {NOT_NEGATIVE: ("seconds",), AT_LEAST_ONE: at_least_one, POSITIVE: ("rates",)}
        refuse_out_of_bounds(self, bounds, "load.")


class _Clients:
    """Clients that send requests at random times and check the answers.

    Each sends at its own times, whether earlier answers have come or not: a slow service does not slow them down.
    """

    def __init__(
        self, service: ScoringService[Tensor], batches: Sequence[RequestBatch], expected: Sequence[Tensor], seed: int
    ) -> None:
        self._service, self._batches, self._expected = service, batches, expected
        self._seed = seed
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self.sent = self.refused = self.failed = self.wrong = 0
        self.seconds: list[float] = []

    def run(self, num_clients: int, rate: float, seconds: float) -> None:
        """Let all of them together send `rate` requests a second, at the times of a Poisson process."""
        clients = [
            threading.Thread(target=self._client, args=(client, rate / num_clients, seconds))
            for client in range(num_clients)
        ]
        for client in clients:
            client.start()
        try:
            for client in clients:
                client.join()
        finally:
            # One that is interrupted does not go on to its end.
            self._is_over.set()

    def _client(self, client: int, rate: float, seconds: float) -> None:
        random = np.random.default_rng([self._seed, client])
        due, end = time.perf_counter(), time.perf_counter() + seconds
        while (due := due + random.exponential(1 / rate)) < end:
            if self._is_over.wait(max(0.0, due - time.perf_counter())):
                return
            row = int(random.integers(len(self._batches)))
            with self._lock:
                self.sent += 1
            try:
                answer = self._service.submit(self._batches[row])
            except Overloaded:
                with self._lock:
                    self.refused += 1
            else:
                answer.add_done_callback(partial(self._check, row, due))

    def _check(self, row: int, due: float, answer: Future[Tensor]) -> None:
        seconds = time.perf_counter() - due
        has_failed = answer.exception() is not None
        is_wrong = not has_failed and not torch.allclose(answer.result(), self._expected[row], rtol=0, atol=TOLERANCE)
        with self._lock:
            self.failed += has_failed
            self.wrong += is_wrong
            self.seconds.append(seconds)


def measure_load(model: Ranker, batches: Sequence[RequestBatch], config: LoadConfig, seed: int) -> dict[str, Any]:
    """Latency under load, and what became of every request.

    Args:
        model: in eval mode.
        batches: requests to send.
        config: the load.
        seed: of the times at which requests are sent.

    Returns:
        dict: `capacity`, requests a second when one always waits; `alone`, latencies one after the other; and for each
        rate what was sent, refused, failed and wrong, latencies, and the growth of memory.

    Example::

        measure_load(model, batches, LoadConfig(seconds=60), seed=0)["rates"]
    """
    scorer = AmortizedScorer(model)
    with torch.inference_mode():
        expected = [model(batch.to_impressions()) for batch in batches]
    alone = _alone(scorer, batches)
    workers = config.workers or min(torch.get_num_threads(), usable_cores())
    rates = []
    with progress(total=len(config.rates) + 1, desc="load", unit="rates") as bar:
        capacity = _capacity(scorer, batches, workers, min(5.0, config.seconds))
        bar.update()
        for rate in config.rates:
            with ScoringService(scorer, workers, config.waiting) as service:
                clients = _Clients(service, batches, expected, seed)
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                clients.run(config.clients, rate * capacity, config.seconds)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
            rates.append({"share_of_capacity": rate, **_result(clients, service, config.seconds, grown)})
            bar.update()
    return {"capacity": capacity, "workers": workers, "alone": alone, "rates": rates}


def _alone(scorer: AmortizedScorer, batches: Sequence[RequestBatch]) -> dict[str, float]:
    """Latencies of the same requests one after the other, on one thread: what their sizes alone make of them."""
    seconds = []
    with threads(1):
        for batch in [*batches, *batches]:
            started = time.perf_counter()
            scorer.score(batch)
            seconds.append(time.perf_counter() - started)
    return _percentiles(seconds[len(batches) :])


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}_ms": 1e3 * float(np.percentile(seconds, percent)) for percent in (50, 95, 99)}


def _capacity(scorer: AmortizedScorer, batches: Sequence[RequestBatch], workers: int, seconds: float) -> float:
    """Requests a second when one always waits."""
    done, end = 0, time.perf_counter() + seconds
    with ScoringService(scorer, workers, 2 * workers) as service:
        started = time.perf_counter()
        waiting: list[Future[Tensor]] = []
        while time.perf_counter() < end:
            while len(waiting) < 2 * workers:
                waiting.append(service.submit(batches[(done + len(waiting)) % len(batches)]))
            waiting.pop(0).result()
            done += 1
        return done / (time.perf_counter() - started)


def _result(clients: _Clients, service: ScoringService[Tensor], seconds: float, grown: int) -> dict[str, Any]:
    counters = service.counters()
    answered = len(clients.seconds)
    percentiles = _percentiles(clients.seconds) if answered else {}
    return {
        "seconds": seconds,
        "sent": clients.sent,
        "answered": answered,
        "refused": clients.refused,
        "failed": clients.failed,
        "wrong": clients.wrong,
        "lost": clients.sent - answered - clients.refused,
        "counters": counters,
        "answers_per_second": answered / seconds,
        **percentiles,
        "grown_megabytes": grown / 1024,
    }
