"""Scoring beside other busy processes: one thread and two, on the idle machine and on the busy one, in turns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.bench.timing import Times, threads
from torchrec_amort.serving.scorer import AmortizedScorer

NUM_THREADS = (1, 2)
# The machine becomes busy and idle again so often: what it does besides is then shared out.
ROUNDS = 4
# Of each stretch, not counted: native threads need some tenths of a second to see that cores were taken or given back.
SECONDS_TO_SETTLE = 1.0
# Linux ends it (PR_SET_PDEATHSIG, SIGKILL) with the process that started it, however that ends and even while it rests.
_LOOP = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


class BusyProcesses:
    """Processes that compute all the time, or rest.

    Args:
        processes: started already.
    """

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self._processes = processes

    def rest(self) -> None:
        """Stop until they are to work again; when this returns they have.

        Raises:
            RuntimeError: one has ended.
        """
        self._send(signal.SIGSTOP)
        for process in self._processes:
            # Sending a signal looks for one that had ended by then, and takes its status.
            has_ended = process.returncode is not None
            if has_ended or not os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1]):
                raise RuntimeError("a busy process ended: nothing was measured beside it")

    def work(self) -> None:
        """Compute."""
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)


@contextmanager
def busy_processes(count: int) -> Iterator[BusyProcesses]:
    """Have so many processes compute meanwhile.

    Args:
        count: how many.
    """
    command = [sys.executable, "-c", _LOOP, str(os.getpid())]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen(command, start_new_session=True))
        yield BusyProcesses(processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def measure_busy(
    scorer: AmortizedScorer, batch: RequestBatch, count: int, turns: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Latencies of one batch, on one thread and on two, on the idle machine and beside busy processes.

    Args:
        scorer: any.
        batch: to score.
        count: busy processes.
        turns: how often each is timed.

    Returns:
        dict: mean and percentiles in ms by `idle` or `busy` and the number of threads.

    Example::

        measure_busy(scorer, batch, count=4, turns=200)["busy"]["2"]["mean_ms"]
    """
    calls = {str(number): partial(_score, scorer, batch, number) for number in NUM_THREADS}
    times = {"idle": Times(warmup=0), "busy": Times(warmup=0)}
    with busy_processes(count) as processes:
        for _ in range(ROUNDS):
            for machine, taken in times.items():
                (processes.rest if machine == "idle" else processes.work)()
                _settle(calls)
                for _ in range(-(-turns // ROUNDS)):
                    taken.take(calls)
    return {machine: {name: _summary(taken, name) for name in calls} for machine, taken in times.items()}


def busy_lines(record: Mapping[str, Any]) -> list[str]:
    """What `measure_busy` measured, as text.

    Args:
        record: `processes` and `cases`.
    """
    lines = []
    for case in record["cases"]:
        heading = f"One request of {case['history_length']} events and {case['candidates']} candidates"
        lines += ["", f"{heading}, with {record['processes']} other busy processes and without:"]
        lines.append(f"  {'':<18}{'mean ms':>10}{'p50':>10}{'p95':>10}{'p99':>10}{'to one':>9}")
        for machine in ("idle", "busy"):
            one = case[machine]["1"]
            for name, result in case[machine].items():
                times = "".join(f"{result[field]:>10.2f}" for field in one)
                label = f"{machine}, {name} thread{'' if name == '1' else 's'}"
                lines.append(f"  {label:<18}{times}{result['mean_ms'] / one['mean_ms']:>8.2f}x")
    return lines


def _settle(calls: Mapping[str, Callable[[], Tensor]]) -> None:
    end = time.monotonic() + SECONDS_TO_SETTLE
    while time.monotonic() < end:
        for call in calls.values():
            call()


def _score(scorer: AmortizedScorer, batch: RequestBatch, num_threads: int) -> Tensor:
    with threads(num_threads):
        return scorer.score(batch)


def _summary(times: Times, name: str) -> dict[str, float]:
    percentiles = {f"p{percent}_ms": 1e3 * times.percentile(name, percent) for percent in (50, 95, 99)}
    return {"mean_ms": 1e3 * float(times.seconds(name).mean()), **percentiles}
