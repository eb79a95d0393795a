"""Open loop: requests are sent when they are due, whether earlier ones are answered or not.

Latency is counted from the moment that a request was due: a sender that waits for a slow server makes its own requests
late, and would otherwise leave the worst out (coordinated omission).

Shape suffix: R requests, in the order in which they are due.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

Ending = Literal["answered", "refused", "deadline", "invalid", "failed"]
ENDINGS: tuple[Ending, ...] = get_args(Ending)
QUANTILES = (50, 90, 99, 99.9)


class Clock(Protocol):
    """Tells the time, in seconds, and waits."""

    def now(self) -> float:
        """Seconds since any moment."""
        ...

    def wait_until(self, moment: float) -> None:
        """Return at that moment, at once if it is over."""
        ...


class SystemClock:
    """The clock of this machine."""

    def now(self) -> float:
        """Seconds since any moment."""
        return time.perf_counter()

    def wait_until(self, moment: float) -> None:
        """Return at that moment, at once if it is over."""
        time.sleep(max(0.0, moment - self.now()))


class Call:
    """One request that is sent, and what becomes of it.

    Args:
        row: which one, of those that there are to send.
        due: when it is to be sent.
        clock: of all moments.
    """

    # There are many: with more objects in each, garbage collection would take time in which nothing is sent.
    __slots__ = ("_clock", "_is_going", "answer", "detail", "due", "ended", "ending", "row", "sent")

    def __init__(self, row: int, due: float, clock: Clock) -> None:
        self.row, self.due = row, due
        self.sent = self.ended = math.nan
        self.ending: Ending | None = None
        self.answer, self.detail = b"", ""
        self._clock = clock
        self._is_going = threading.Lock()
        self._is_going.acquire()

    def start(self) -> None:
        """It is sent now."""
        self.sent = self._clock.now()

    def end(self, ending: Ending, answer: bytes = b"", detail: str = "") -> None:
        """It ends now, once.

        Args:
            ending: how.
            answer: as the server sent it.
            detail: what the server, or the network, says in place of one.
        """
        assert self.ending is None, f"it was {self.ending} and is {ending}"
        self.ended, self.ending = self._clock.now(), ending
        self.answer, self.detail = answer, detail
        self._is_going.release()

    def wait(self) -> None:
        """Return when it has ended."""
        with self._is_going:
            pass


class Sender(Protocol):
    """Sends requests."""

    def send(self, call: Call) -> None:
        """Send a request and do not wait for the answer; start and end the call, in any thread."""
        ...

    def close(self) -> None:
        """Give up what is not answered."""
        ...


@dataclass(frozen=True, eq=False)
class Arrivals:
    """When requests are due, and which.

    Args:
        seconds_R: from the beginning.
        rows_R: of the requests that there are to send.
    """

    seconds_R: np.ndarray
    rows_R: np.ndarray

    @classmethod
    def poisson(cls, rate: float, seconds: float, num_rows: int, random: np.random.Generator) -> Arrivals:
        """Arrivals of a Poisson process: as of many users who do not know of each other.

        Args:
            rate: requests a second, on average.
            seconds: how long.
            num_rows: requests that there are to send, each as likely as any other.
            random: what they are drawn by.

        Example::

            Arrivals.poisson(100, 10, num_rows=50, random=np.random.default_rng(0))
        """
        # Given their number, which is of a Poisson distribution, the moments are independent and uniform.
        count = random.poisson(rate * seconds)
        return cls(np.sort(random.uniform(0, seconds, count)), random.integers(num_rows, size=count))


def send_all(arrivals: Arrivals, sender: Sender, clock: Clock, when_sent: Callable[[], object]) -> list[Call]:
    """Hand each request to the sender when it is due.

    Args:
        arrivals: which, and when.
        sender: sends them.
        clock: tells when.
        when_sent: called after each.

    Returns:
        list: a call for each; some may not have ended yet.
    """
    calls, beginning = [], clock.now()
    for seconds, row in zip(arrivals.seconds_R.tolist(), arrivals.rows_R.tolist(), strict=True):
        call = Call(row, beginning + seconds, clock)
        clock.wait_until(call.due)
        sender.send(call)
        calls.append(call)
        when_sent()
    return calls


def summary(calls: Sequence[Call], seconds: float, deadline: float) -> dict[str, Any]:
    """What became of the requests, each counted once.

    Args:
        calls: all have ended.
        seconds: in which they were due.
        deadline: seconds from when a request is due in which an answer is good.

    Returns:
        dict: `sent`; how many had each of `ENDINGS`, and under `details` what was said first of each; `goodput`, good
        answers a second; quantiles of the latency of all answers (`p50_ms`, ..., `max_ms`), from when a request was
        due; and how late requests were sent (`late_p99_ms`, `late_max_ms`).
    """
    endings = [call.ending for call in calls]
    latencies = np.array([call.ended - call.due for call in calls if call.ending == "answered"])
    late = np.array([call.sent - call.due for call in calls])
    record: dict[str, Any] = {"sent": len(calls), **{ending: endings.count(ending) for ending in ENDINGS}}
    record["details"] = {call.ending: call.detail for call in reversed(calls) if call.detail}
    record["goodput"] = float((latencies <= deadline).sum() / seconds)
    if len(latencies):
        record |= {f"p{percent}_ms": 1e3 * float(np.percentile(latencies, percent)) for percent in QUANTILES}
        record["max_ms"] = 1e3 * float(latencies.max())
    if len(late):
        record |= {"late_p99_ms": 1e3 * float(np.percentile(late, 99)), "late_max_ms": 1e3 * float(late.max())}
    return record
