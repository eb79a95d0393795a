"""The open loop: every request is counted once, and what a server takes too long for is in the latencies."""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_amort.bench.open_loop import ENDINGS, Arrivals, Call, Ending, send_all, summary


class Simulation:
    """A clock, and a server of one worker: requests take `service` seconds each, and nothing starts in the stall."""

    def __init__(self, service: float, stall: tuple[float, float] = (0.0, 0.0), *, blocks: bool = False) -> None:
        self._service, self._stall, self._blocks = service, stall, blocks
        self._now = self._free = 0.0
        self._answers: list[tuple[float, int, Call]] = []

    def now(self) -> float:
        return self._now

    def wait_until(self, moment: float) -> None:
        while self._answers and self._answers[0][0] <= moment:
            self._now, _, call = heapq.heappop(self._answers)
            call.end("answered")
        self._now = max(self._now, moment)

    def send(self, call: Call) -> None:
        call.start()
        begins = max(self._now, self._free)
        if self._stall[0] <= begins < self._stall[1]:
            begins = self._stall[1]
        self._free = begins + self._service
        heapq.heappush(self._answers, (self._free, len(self._answers), call))
        if self._blocks:
            self.wait_until(self._free)

    def close(self) -> None: ...


def every(seconds: float, count: int) -> Arrivals:
    return Arrivals(seconds * np.arange(count), np.zeros(count, np.int64))


def run(simulation: Simulation, arrivals: Arrivals) -> list[Call]:
    calls = send_all(arrivals, simulation, simulation, lambda: None)
    simulation.wait_until(np.inf)
    return calls


@pytest.mark.parametrize("blocks", [False, True])
def test_a_stall_is_in_the_latency_of_all_requests_that_were_due_in_it(blocks: bool) -> None:
    calls = run(Simulation(0.001, (5.0, 6.0), blocks=blocks), every(0.01, 1000))
    record = summary(calls, seconds=10, deadline=0.1)
    latencies, free = [], 0.0
    for row in range(1000):
        due = 0.01 * row
        begins = max(due, free)
        free = (6.0 if 5.0 <= begins < 6.0 else begins) + 0.001
        latencies.append(free - due)
    for name, percent in {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99, "p99.9_ms": 99.9, "max_ms": 100}.items():
        assert record[name] == pytest.approx(1e3 * np.percentile(latencies, percent))
    assert record["p50_ms"] == pytest.approx(1)
    assert record["p99_ms"] > 800
    assert record["goodput"] == pytest.approx(sum(latency <= 0.1 for latency in latencies) / 10)
    # Whose sender waits for an answer cannot send the next request: its latency is the same, and it is told.
    assert record["late_max_ms"] == pytest.approx(991 if blocks else 0)


def test_what_a_slow_sender_does_not_send_in_time_is_in_the_latency() -> None:
    record = summary(run(Simulation(0.02, blocks=True), every(0.01, 100)), seconds=1, deadline=np.inf)
    assert record["max_ms"] == pytest.approx(20 + 10 * 99)
    assert record["late_max_ms"] == pytest.approx(10 * 99)
    assert record["goodput"] == pytest.approx(100)


@given(st.lists(st.sampled_from(ENDINGS), max_size=30))
def test_every_request_is_counted_once(endings: list[Ending]) -> None:
    simulation = Simulation(0)
    calls: list[Call] = []
    for ending in endings:
        call = Call(0, simulation.now(), simulation)
        call.start()
        call.end(ending, detail=f"{ending} {len(calls)}" if ending != "answered" else "")
        calls.append(call)
    record = summary(calls, seconds=2, deadline=1)
    assert record["sent"] == len(endings) == sum(record[ending] for ending in ENDINGS)
    assert Counter(endings) == Counter({ending: record[ending] for ending in ENDINGS})
    assert record["goodput"] == endings.count("answered") / 2
    first = {ending: f"{ending} {endings.index(ending)}" for ending in set(endings) - {"answered"}}
    assert record["details"] == first
    assert ("p50_ms" in record) == ("answered" in endings)


def test_a_request_does_not_end_twice() -> None:
    call = Call(0, 0, Simulation(0))
    call.end("refused")
    with pytest.raises(AssertionError, match="refused and is answered"):
        call.end("answered")


def test_arrivals_are_those_of_a_poisson_process() -> None:
    arrivals = Arrivals.poisson(50, 200, 7, np.random.default_rng(0))
    gaps = np.diff(arrivals.seconds_R)
    # Five standard deviations.
    assert abs(len(arrivals.seconds_R) - 10_000) < 500
    assert gaps.min() >= 0
    assert 0 <= arrivals.seconds_R[0] <= arrivals.seconds_R[-1] < 200
    # Of an exponential distribution, the standard deviation is the mean.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.07)
    assert set(arrivals.rows_R.tolist()) == set(range(7))
    again = Arrivals.poisson(50, 200, 7, np.random.default_rng(0))
    assert np.array_equal(arrivals.seconds_R, again.seconds_R)
