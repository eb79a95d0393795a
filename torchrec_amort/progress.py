"""What people watch while a command works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0
LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines(tqdm):  # type: ignore[type-arg] # tqdm is generic for type checkers only
    """A bar that prints each of its states on a line of its own."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        return lambda state: print(state, file=file, flush=True)


def progress(*, total: int, desc: str, unit: str, initial: int = 0, disable: bool = False) -> tqdm[Any]:
    """A progress bar on a terminal; elsewhere, as under torchrun and TorchX, a line every few seconds.

    Args:
        total: how many there are.
        desc: what is done.
        unit: of what.
        initial: how many were done before.
        disable: show nothing: for all ranks but the first.

    Returns:
        tqdm: to be used as a context manager; call its `update`.

    Example::

        with progress(total=len(files), desc="copy", unit="files") as bar:
            for file in files:
                bar.update()
    """
    is_terminal = sys.stderr.isatty()
    bar = tqdm if is_terminal else _Lines
    return bar(
        total=total,
        desc=desc,
        unit=f" {unit}",
        initial=initial,
        disable=disable,
        mininterval=0.5 if is_terminal else SECONDS_BETWEEN_LINES,
        bar_format=None if is_terminal else LINE,
    )
