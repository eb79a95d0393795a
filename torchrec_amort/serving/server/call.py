"""Call: one that a server answers, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from torchrec_amort.serving.service import Timing


@dataclass(eq=False)
class Call:
    """A call, from the message that is read to the answer that is made.

    Args:
        protocol: by which it came.
        headers: that came with it, by their names in lower case.
        started_ns: when it came, in nanoseconds since 1970.
        result: what became of it: `ok`, or a word for the error.
        version: that scored it; none yet, or none at all, if None.
        num_candidates: of all its requests.
        seconds: that it took; 0 while it is answered.
    """

    protocol: str
    headers: Mapping[str, str]
    started_ns: int = field(default_factory=time.time_ns)
    result: str = "ok"
    version: str | None = None
    num_candidates: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.perf_counter()
        self._read = 0.0
        self._timing: Timing | None = None

    def was_read(self) -> None:
        """It goes to the queue now."""
        self._read = time.perf_counter() - self._started

    def was_scored(self, version: str, num_candidates: int, timing: Timing) -> None:
        """It has its scores."""
        self.version, self.num_candidates, self._timing = version, num_candidates, timing

    def end(self) -> None:
        """Its answer is made."""
        self.seconds = time.perf_counter() - self._started

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each phase, in their order; of a call that was not scored, none."""
        if self._timing is None:
            return {}
        write = self.seconds - self._read - sum(self._timing)
        return {"read": self._read, "wait": self._timing.waited, "score": self._timing.scored, "write": write}
