"""Worker threads that compute on a number of CPU threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

_LOCK = threading.Lock()


class Workers:
    """Started worker threads, which take what is handed in in turn; other threads keep their number of CPU threads.

    Args:
        num_workers: how many.
        num_threads: CPU threads of each.

    Example::

        workers = Workers(num_workers=2, num_threads=1)
        workers.submit(print, "scored")
        workers.close()
    """

    def __init__(self, num_workers: int, num_threads: int) -> None:
        self._own = threading.local()
        all_started = threading.Barrier(num_workers)
        # A thread's number is that of threads made later, too: a new thread reads it first, and sets it back.
        with _LOCK:
            of_process = _in_a_new_thread(torch.get_num_threads)
            self._pool = ThreadPoolExecutor(num_workers, initializer=self._start, initargs=(num_threads,))
            for started in [self._pool.submit(all_started.wait) for _ in range(num_workers)]:
                started.result()
            _in_a_new_thread(lambda: torch.set_num_threads(of_process))

    def submit(self, function: Callable[..., Result], *args: object) -> Future[Result]:
        """Let the next free worker call a function.

        Returns:
            Future: of what it returns or raises.

        Raises:
            RuntimeError: the workers are closed.
        """
        return self._pool.submit(function, *args)

    def close(self) -> None:
        """Take nothing more, and return when all that was handed in is done; a worker that calls this does not wait.

        It may be called any number of times, by any threads.
        """
        self._pool.shutdown(wait=not hasattr(self._own, "is_worker"))

    def _start(self, num_threads: int) -> None:
        self._own.is_worker = True
        # Asked for its number first, or a thread takes that of the process when it first computes.
        torch.get_num_threads()
        torch.set_num_threads(num_threads)


def _in_a_new_thread(function: Callable[[], Result]) -> Result:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()
