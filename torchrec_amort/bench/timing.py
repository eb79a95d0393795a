"""Times and memory of several methods, measured in turns in one process, so that they can be compared."""

from __future__ import annotations

import ctypes
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


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
        self._processor_seconds: dict[str, list[float]] = {}
        self._random = random.Random(0)

    def take(self, methods: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """Run each method once, in random order: what ran before leaves memory and caches as it likes.

        Returns:
            dict: what each method returned.
        """
        results = {}
        for name in self._random.sample(list(methods), len(methods)):
            busy, started = time.process_time(), time.perf_counter()
            results[name] = methods[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds, busy = time.perf_counter() - started, time.process_time() - busy
            if self._turns_to_skip == 0:
                self._seconds.setdefault(name, []).append(seconds)
                self._processor_seconds.setdefault(name, []).append(busy)
        self._turns_to_skip = max(0, self._turns_to_skip - 1)
        return results

    def methods(self) -> list[str]:
        """The methods that were timed."""
        return list(self._seconds)

    def seconds(self, method: str) -> np.ndarray:
        """Seconds of each of a method's turns."""
        return np.array(self._seconds[method])

    def processor_seconds(self, method: str) -> np.ndarray:
        """Processor seconds, of all threads together, of each of a method's turns."""
        return np.array(self._processor_seconds[method])

    def median(self, method: str) -> float:
        """Median seconds of a method."""
        return float(np.median(self._seconds[method]))

    def percentile(self, method: str, percent: float) -> float:
        """Seconds that so many of a method's turns did not exceed."""
        return float(np.percentile(self._seconds[method], percent))

    def turns(self, method: str) -> int:
        """How often a method was timed."""
        return len(self._seconds[method])

    def cores(self, method: str) -> float:
        """Processor seconds per second, of all threads together: how many cores a method kept busy."""
        return float(np.sum(self._processor_seconds[method]) / np.sum(self._seconds[method]))

    def median_rate(self, method: str, amounts: Sequence[float]) -> float:
        """Median over the turns of what a method did in a second.

        Args:
            method: its name.
            amounts: what it did in each turn that was counted.
        """
        return float(np.median(np.asarray(amounts) / self._seconds[method]))


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use so many CPU threads meanwhile; as many as before if None."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> str:
    """What runs it, in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    devices = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{devices}"


def peak_memory(function: Callable[[], object]) -> int | None:
    """Bytes of memory that a function needs at its peak, beyond what the process had; None if not on Linux.

    Once a GPU is in use, the GPU's memory is meant.
    """
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return int(torch.cuda.max_memory_allocated() - before)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        # What was freed before would otherwise be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    except (OSError, AttributeError):
        return None
    before = _kilobytes(status, "VmRSS")
    function()
    return 1024 * max(0, _kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found.group(1))
