"""Times of configs, and the spans between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timezone

from torchrec_amort.errors import InputError


def instant(name: str, value: str) -> float:
    """Seconds since 1970 UTC of a time of a config, which is UTC if it tells no zone.

    Args:
        name: of the option.
        value: as `2023-05-24 07:00`.

    Raises:
        InputError: it is no time.

    Example::

        instant("until", "1970-01-02")  # 86400.0
    """
    try:
        time = datetime.fromisoformat(value)
    except ValueError as error:
        raise InputError(f"{name} is {value!r}, not a time such as 2023-05-24 07:00") from error
    return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()


@dataclass(frozen=True)
class Span:
    """From one time on, and before another.

    Args:
        since: the first one, of a config; from the beginning on if None.
        until: the first one that is left out; to the end if None.

    Raises:
        InputError: one is no time, or there is nothing between them.

    Example::

        Span("2023-05-24", "2023-05-25").start  # 1684886400.0
    """

    since: str | None = None
    until: str | None = None

    def __post_init__(self) -> None:
        if self.start >= self.stop:
            raise InputError(f"since is {self.since!r} and until {self.until!r}, which is not later: give a later time")

    @property
    def start(self) -> float:
        """Seconds since 1970 UTC of `since`."""
        return -math.inf if self.since is None else instant("since", self.since)

    @property
    def stop(self) -> float:
        """Seconds since 1970 UTC of `until`."""
        return math.inf if self.until is None else instant("until", self.until)

    def __str__(self) -> str:
        return f"from {self.since or 'the beginning'} until {self.until or 'the end'}"
