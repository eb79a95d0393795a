"""Metrics of a server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from torchrec_amort.serving.server.call import Call

_SECONDS = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5)
_CANDIDATES = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# What may fall again of what a cache, or a rollout, tells; all else only rises.
_LEVELS = ("users", "bytes", "share", "switched_back", "largest_difference")


class Metrics:
    """What a server counts and times; nothing of what requests have.

    Example::

        metrics = Metrics()
        metrics.switched("ok")
        print(metrics.text().decode())
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._seconds = Histogram(
            "amort_request_seconds",
            "From the message that is read to the answer that is made.",
            ["protocol", "result"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._phases = Histogram(
            "amort_phase_seconds",
            "Of calls that were scored: to read one, to wait for a worker, to score it, to write its answer.",
            ["phase"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._candidates = Histogram(
            "amort_candidates", "Candidates of a call.", buckets=_CANDIDATES, registry=self._registry
        )
        self._by_version = Counter(
            "amort_scored", "Calls that a version scored, whole or in part.", ["version"], registry=self._registry
        )
        self._switches = Counter(
            "amort_switches",
            "Versions that were loaded, rolled out further, or completed.",
            ["result"],
            registry=self._registry,
        )

    def ended(self, call: Call) -> None:
        """A call has ended."""
        self._seconds.labels(call.protocol, call.result).observe(call.seconds)
        for phase, seconds in call.phases.items():
            self._phases.labels(phase).observe(seconds)

    def scored(self, versions: Iterable[str], num_candidates: int) -> None:
        """A call was scored by a version, or by two."""
        self._candidates.observe(num_candidates)
        for version in versions:
            self._by_version.labels(version).inc()

    def switched(self, result: str) -> None:
        """A version was to answer, or a share of the users: it does, `ok`, or was `refused`."""
        self._switches.labels(result).inc()

    def collect(self, name: str, counters: Callable[[], Mapping[str, float]]) -> None:
        """Tell counters of something else, as they are when they are asked for.

        Args:
            name: what they are of.
            counters: all of them rise but `users` and `bytes`; and, of a rollout, `share`, `switched_back` and
                `largest_difference`.
        """
        self._registry.register(_Counters(name, counters))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Counters:
    """Counters that are kept elsewhere."""

    def __init__(self, name: str, counters: Callable[[], Mapping[str, float]]) -> None:
        self._name, self._counters = name, counters

    def collect(self) -> Iterator[Metric]:
        for key, value in self._counters().items():
            family = GaugeMetricFamily if key in _LEVELS else CounterMetricFamily
            yield family(f"amort_{self._name}_{key}", f"See the counters of the {self._name}.", value=value)
