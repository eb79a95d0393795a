"""HistoryStore: users' histories on the server, so that clients send new events alone."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from torchrec_amort.errors import InputError
from torchrec_amort.schema import RequestSchema

# Of one user: of each column of events, those that are kept, as an array of them.
_Events = Mapping[str, pa.Array]


class UnknownHistory(LookupError):
    """A request has new events of a user whose history is not kept."""


@dataclass
class HistoryCounters:
    """What a store did so far.

    Args:
        joined: requests whose new events were put after the history that is kept.
        unknown: requests whose history was not.
        evictions: histories removed for want of bytes.
        expirations: removed for age.
        forgotten: users removed by `forget`.
    """

    joined: int = 0
    unknown: int = 0
    evictions: int = 0
    expirations: int = 0
    forgotten: int = 0


class HistoryStore:
    """The histories that users' latest requests had, within a budget of bytes.

    All histories of a request are kept together. The least recently used users go first. All methods may be called by
    several threads.

    Args:
        schema: of the requests.
        max_bytes: budget of all events together, in bytes.
        limits: events of each history that are kept, the latest ones; all of a history that is not named.
        seconds_to_live: how long after a user's latest request they are kept; without limit if None.
        clock: seconds; for tests.

    Raises:
        ValueError: `max_bytes` or `seconds_to_live` is not above 0.

    Example::

        store = HistoryStore(schema, max_bytes=2**30)
        store.keep(test_table, is_new=False, epoch=store.epoch)
        store.joined(test_table)  # the same events once more, after those that were kept
    """

    def __init__(
        self,
        schema: RequestSchema,
        max_bytes: int,
        limits: Mapping[str, int] | None = None,
        seconds_to_live: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}, not 1 or more")
        if seconds_to_live is not None and seconds_to_live <= 0:
            raise ValueError(f"seconds_to_live is {seconds_to_live}, not above 0")
        self._types = {f.source: schema.arrow_schema().field(f.source).type for f in schema.of("event")}
        limits = limits or {}
        self._limits = {f.source: limits.get(f.history) for f in schema.of("event")}
        self._max_bytes, self._seconds_to_live, self._clock = max_bytes, seconds_to_live, clock
        # The least recently used first, with when each was kept.
        self._users: OrderedDict[int, tuple[float, _Events]] = OrderedDict()
        self._num_bytes = 0
        self._epoch = 0
        self._counters = HistoryCounters()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of users."""
        return len(self._users)

    def counters(self) -> dict[str, int]:
        """What the store did so far, and what it holds: see `HistoryCounters`, and `users` and `bytes`."""
        with self._lock:
            return {**asdict(self._counters), "users": len(self._users), "bytes": self._num_bytes}

    @property
    def epoch(self) -> int:
        """A number that changes whenever users are forgotten, to be read when a request comes, for `keep`."""
        return self._epoch

    def joined(self, requests: pa.Table) -> pa.Table:
        """Requests with the histories that are kept, and after them the events that they bring.

        Args:
            requests: one row for each, with their `user`; a column of events that is not there brings none.

        Raises:
            InputError: a request does not tell its user, or a column of events is no list.
            UnknownHistory: names the first user whose history is not kept.
        """
        users = _users_of(requests)
        with self._lock:
            self._expire()
            histories = [self._users[user][1] for user in users if user in self._users]
            if len(histories) < len(users):
                self._counters.unknown += 1
                user = next(user for user in users if user not in self._users)
                raise UnknownHistory(f"user {user}: the history is not kept here: send it whole")
            self._counters.joined += 1
        for column, kind in self._types.items():
            new = self._lists(requests, column)
            both = [self._after(column, history, new, row) for row, history in enumerate(histories)]
            offsets = np.cumsum([0, *map(len, both)]).astype(np.int32)
            lists = pa.ListArray.from_arrays(offsets, pa.concat_arrays([pa.array([], kind.value_type), *both]))
            if column in requests.column_names:
                requests = requests.drop_columns([column])
            requests = requests.append_column(column, lists)
        return requests

    def keep(self, requests: pa.Table, *, is_new: bool, epoch: int) -> None:
        """Keep the histories of requests that were scored; those that do not tell their user are not kept.

        Args:
            requests: one row for each.
            is_new: whether they have new events alone, to be put after what is kept; else they take its place.
            epoch: the store's `epoch` from when they came. If someone was forgotten since, it may have been one of
                their users, so nothing is kept.
        """
        if "user" not in requests.column_names:
            return
        columns = {column: self._lists(requests, column) for column in self._types}
        for row, user in enumerate(_users_of(requests)):
            with self._lock:
                self._expire()
                if epoch != self._epoch or (is_new and user not in self._users):
                    continue
                before = self._users[user][1] if is_new else None
                self._put(user, {c: self._after(c, before, lists, row) for c, lists in columns.items()})

    def _after(self, column: str, before: _Events | None, lists: Sequence[pa.Array] | None, row: int) -> pa.Array:
        """A request's events after those before, the latest ones that are kept, in memory of their own."""
        none = pa.array([], self._types[column].value_type)
        events = pa.concat_arrays([none if before is None else before[column], none if lists is None else lists[row]])
        limit = self._limits[column]
        return events if limit is None or len(events) <= limit else pa.concat_arrays([events[len(events) - limit :]])

    def forget(self, user: int) -> bool:
        """Remove a user's histories, at once.

        Args:
            user: whom to forget.

        Returns:
            bool: whether there were any.
        """
        with self._lock:
            self._counters.forgotten += 1
            self._epoch += 1
            return self._remove(user)

    def _lists(self, requests: pa.Table, column: str) -> Sequence[pa.Array] | None:
        """Of each request, the events of a column in its type; None if it is not there."""
        if column not in requests.column_names:
            return None
        try:
            lists = requests[column].combine_chunks().cast(self._types[column])
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"requests: {column}: not {self._types[column]} ({error})") from error
        if lists.null_count:
            raise InputError(f"requests: {column}: has a null: give a list, which may be empty")
        return [lists[row].values for row in range(len(lists))]

    def _put(self, user: int, events: _Events) -> None:
        self._remove(user)
        if _bytes_of(events) > self._max_bytes:
            return
        self._users[user] = (self._clock(), events)
        self._num_bytes += _bytes_of(events)
        while self._num_bytes > self._max_bytes:
            self._remove(next(iter(self._users)))
            self._counters.evictions += 1

    def _expire(self) -> None:
        """Remove all whose time is over, whoever asks: who was kept last stands last."""
        if self._seconds_to_live is None:
            return
        oldest = self._clock() - self._seconds_to_live
        while self._users and next(iter(self._users.values()))[0] <= oldest:
            self._remove(next(iter(self._users)))
            self._counters.expirations += 1

    def _remove(self, user: int) -> bool:
        if user not in self._users:
            return False
        _, events = self._users.pop(user)
        self._num_bytes -= _bytes_of(events)
        return True


def _users_of(requests: pa.Table) -> list[int]:
    if "user" not in requests.column_names or requests["user"].null_count:
        raise InputError("requests: column 'user' is missing or has a null: tell whose history it is")
    users: list[int] = requests["user"].to_pylist()
    return users


def _bytes_of(events: _Events) -> int:
    return sum(array.nbytes for array in events.values())
