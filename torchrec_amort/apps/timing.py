"""Times of several methods, measured in turns in one process, so that they can be compared."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

Result = TypeVar("Result")


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """What a function returns, and the seconds it took."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


class Times:
    """Seconds of several methods, taken in turns.

    Args:
        warmup: turns that are not counted.

    Example::

        times = Times(warmup=3)
        for batch in batches:
            times.take({"eager": partial(model, batch), "compiled": partial(compiled, batch)})
        times.median("eager")
    """

    def __init__(self, warmup: int) -> None:
        self._turns_to_skip = warmup
        self._seconds: dict[str, list[float]] = {}
        self._random = random.Random(0)

    def take(self, methods: Mapping[str, Callable[[], object]]) -> None:
        """Run each method once, in random order: what ran before leaves memory and caches as it likes."""
        for name in self._random.sample(list(methods), len(methods)):
            _, seconds = timed(methods[name])
            if self._turns_to_skip == 0:
                self._seconds.setdefault(name, []).append(seconds)
        self._turns_to_skip = max(0, self._turns_to_skip - 1)

    def median(self, method: str) -> float:
        """Median seconds of a method."""
        return float(np.median(self._seconds[method]))

    def median_rate(self, method: str, amounts: Sequence[float]) -> float:
        """Median over the turns of what a method did in a second.

        Args:
            method: its name.
            amounts: what it did in each turn that was counted.
        """
        return float(np.median(np.asarray(amounts) / self._seconds[method]))
