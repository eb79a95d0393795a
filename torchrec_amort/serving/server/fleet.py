"""Processes that answer for one model side by side, and what they have to do together."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeAlias

from torchrec_amort.errors import InputError, place_of, with_place
from torchrec_amort.serving.histories import TierUnreachable
from torchrec_amort.serving.server.loaded import Loaded

logger = logging.getLogger(__name__)

# Seconds until a process that has ended is started anew; doubled each time, if it ends again and again.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 10.0
# What either all processes do, or none: one that cannot is started anew, by what the others have.
_FOR_ALL = ("commit", "roll_out")
# Whoever asks all processes for something waits for one that starts.
_MOST_SECONDS_TO_START = 900.0

# What a process runs: its link, the ports that it had before if it is started anew, and what is loaded.
Run: TypeAlias = Callable[["Link", "Started | None", Loaded], None]
# What a process does when it is told to, by name.
Actions: TypeAlias = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Started:
    """What a process tells once it answers.

    Args:
        grpc_port: that it listens on.
        http_port: that it listens on.
    """

    grpc_port: int
    http_port: int


class Link:
    """What a process has of its supervisor.

    Args:
        asks: where it asks for what all processes have to do.
        orders: where it is told what to do.
        place: of the process among the others.

    Example::

        link.started(Started(8001, 8000), endpoint.actions, is_over.set)
        link.all("forget", 7)
    """

    def __init__(self, asks: Connection, orders: Connection, place: int) -> None:
        self.place = place
        self._asks, self._orders = asks, orders
        self._lock = threading.Lock()

    def started(self, started: Started, actions: Actions, left_alone: Callable[[], None]) -> None:
        """Tell that the process answers, and do what is ordered from now on.

        Args:
            started: how it answers.
            actions: what does what is ordered.
            left_alone: called when the supervisor is gone.
        """
        self._orders.send(started)
        threading.Thread(target=self._obey, args=(actions, left_alone), name="orders", daemon=True).start()

    def all(self, order: str, *args: Any) -> list[Any]:
        """Let all processes do something.

        Returns:
            list: what each of them answered.

        Raises:
            Exception: the first that one of them raised.
        """
        with self._lock:
            self._asks.send((order, args))
            answers = self._asks.recv()
        if isinstance(answers, Exception):
            raise answers
        return list(answers)

    def _obey(self, actions: Actions, left_alone: Callable[[], None]) -> None:
        while True:
            try:
                order, args = self._orders.recv()
            except EOFError:
                left_alone()
                return
            try:
                answer: Any = actions[order](*args)
            except (InputError, TierUnreachable) as error:
                answer = with_place(error, error)
            except Exception as error:  # noqa: BLE001 - it is the one's who asked, and the process goes on
                # Others may not be able to read it.
                answer = with_place(RuntimeError(place_of(error)), error)
            self._orders.send(answer)


@dataclass(eq=False)
class _Worker:
    """A process, and the supervisor's ends of its connections."""

    place: int
    process: BaseProcess
    asks: Connection
    orders: Connection
    started_at: float
    started: Started | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Fleet:
    """Starts processes, starts those that end anew, and passes on what all of them have to do.

    Args:
        num_processes: how many.
        run: what each of them runs.
        modules: that are imported once, before processes are forked from that: a process is there faster then.
        loaded: what they load.
        changed: called with what is loaded, whenever it is something else.

    Raises:
        InputError: a process ended before it answered.

    Example::

        loaded = Loaded(("packages/films",))
        with Fleet(4, run, ["torchrec_amort.jobs.serve"], loaded, changed=print) as fleet:
            fleet.watch(until=is_told_to_end)
    """

    def __init__(
        self,
        num_processes: int,
        run: Run,
        modules: Sequence[str],
        loaded: Loaded,
        changed: Callable[[Loaded], None],
    ) -> None:
        # Forked from a process of one thread: those of this one would not be there, and what they hold locked would be.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))
        self._run, self._changed, self._lock = run, changed, threading.Lock()
        self._loaded = loaded
        self._pauses = [_FIRST_PAUSE] * num_processes
        self._workers: list[_Worker] = []
        try:
            # The first one writes what the others read.
            for place in range(num_processes):
                self._workers.append(self._start(place, None))
                if place == 0:
                    self._wait_for(self._workers[0])
            for worker in self._workers[1:]:
                self._wait_for(worker)
        except BaseException:
            self.close()
            raise

    @property
    def started(self) -> list[Started]:
        """How each process answers."""
        return [worker.started for worker in self._workers if worker.started is not None]

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [worker.process.pid or 0 for worker in self._workers]

    def watch(self, until: threading.Event) -> None:
        """Start processes that end anew.

        Args:
            until: when this returns.
        """
        while not until.is_set():
            multiprocessing.connection.wait([worker.process.sentinel for worker in self._workers], timeout=0.1)
            for place, worker in enumerate(self._workers):
                if not worker.process.is_alive() and not until.is_set():
                    self._replace(place, worker, until)

    def close(self, seconds: float = 60) -> None:
        """Tell the processes to end, and return when they have.

        Args:
            seconds: after which they are killed.
        """
        until = time.monotonic() + seconds
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.join()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, place: int, before: Started | None) -> _Worker:
        asks, asks_there = self._context.Pipe()
        orders, orders_there = self._context.Pipe()
        process = self._context.Process(
            target=_run, args=(self._run, asks_there, orders_there, place, before, self._loaded)
        )
        process.start()
        # Of a process that ends, the connection ends.
        asks_there.close()
        orders_there.close()
        return _Worker(place, process, asks, orders, time.monotonic())

    def _wait_for(self, worker: _Worker) -> None:
        if not worker.orders.poll(_MOST_SECONDS_TO_START):
            worker.process.kill()
            raise InputError(f"process {worker.place} does not answer after {_MOST_SECONDS_TO_START:g} s: it is killed")
        try:
            started = worker.orders.recv()
        except (EOFError, OSError) as error:
            worker.process.join()
            raise InputError(f"process {worker.place} ended with {worker.process.exitcode}: see above") from error
        if isinstance(started, InputError):
            raise started
        worker.started = started
        threading.Thread(target=self._listen, args=(worker,), name=f"asks-{worker.place}", daemon=True).start()

    def _replace(self, place: int, worker: _Worker, until: threading.Event) -> None:
        lived = time.monotonic() - worker.started_at
        logger.error("process %s ended with %s after %.1f s: it is started anew", place, worker.process.exitcode, lived)
        again = lived < _LONGEST_PAUSE / 2
        self._pauses[place] = min(2 * self._pauses[place], _LONGEST_PAUSE) if again else _FIRST_PAUSE
        if until.wait(self._pauses[place]):
            return
        with self._lock:
            self._workers[place] = self._start(place, worker.started)
            try:
                self._wait_for(self._workers[place])
            except InputError as error:
                logger.error("process %s: %s", place, place_of(error))
                self._workers[place].started = worker.started

    def _listen(self, worker: _Worker) -> None:
        """Do what a process asks for, until it is gone."""
        while True:
            try:
                order, args = worker.asks.recv()
            except (EOFError, OSError):
                return
            try:
                answers: Any = self._all(order, args)
            except Exception as error:  # noqa: BLE001 - it is the one's who asked
                answers = error
            try:
                worker.asks.send(answers)
            except OSError:
                return

    def _all(self, order: str, args: Sequence[Any]) -> list[Any]:
        with self._lock:
            answers = [self._ordered(worker, order, args) for worker in self._workers]
            if order in _FOR_ALL and not all(isinstance(answer, Exception) for answer in answers):
                # One that was started anew in between has not loaded it: it is once more, by what the others have now.
                for place, answer in enumerate(answers):
                    if isinstance(answer, Exception):
                        self._workers[place].process.kill()
                        answers[place] = _GONE
            if errors := [answer for answer in answers if isinstance(answer, Exception)]:
                if order == "prepare":
                    for worker in self._workers:
                        self._ordered(worker, "discard", ())
                raise errors[0]
            if (loaded := self._loaded.after(order, *args)) != self._loaded:
                self._loaded = loaded
                self._changed(loaded)
        # A process that has ended knows nothing any more.
        return [answer for answer in answers if answer is not _GONE]

    def _ordered(self, worker: _Worker, order: str, args: Sequence[Any]) -> Any:
        try:
            worker.orders.send((order, args))
            return worker.orders.recv()
        except (EOFError, OSError):
            return _GONE


_GONE = object()


def _run(run: Run, asks: Connection, orders: Connection, place: int, before: Started | None, loaded: Loaded) -> None:
    try:
        run(Link(asks, orders, place), before, loaded)
    except InputError as error:
        orders.send(with_place(error, error))
