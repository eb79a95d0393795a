"""HistoryStore: users' histories on the server, so that clients send new events alone."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

from torchrec_amort.errors import InputError
from torchrec_amort.schema import RequestSchema

# Of one user: of each column of events, an array of them, the latest last.
Events: TypeAlias = Mapping[str, pa.Array]


class UnknownHistory(LookupError):
    """A request has new events of a user whose history is not kept."""

    @classmethod
    def of(cls, user: int) -> UnknownHistory:
        """Of a user."""
        return cls(f"user {user}: the history is not kept here: send it whole")


class TierUnreachable(RuntimeError):
    """The tier that several servers share does not answer, or refuses."""


class Asked(NamedTuple):
    """Requests as they are scored, and what keeps their histories.

    Args:
        requests: with whole histories.
        keep: to be called once they are scored.
    """

    requests: pa.Table
    keep: Callable[[], None]


class Histories(Protocol):
    """What an `Endpoint` needs of a store of histories."""

    @property
    def is_shared(self) -> bool:
        """Whether other servers are asked, so that calls may wait."""
        ...

    def asked(self, requests: pa.Table, *, is_new: bool) -> Asked:
        """See `HistoryStore.asked`."""
        ...

    def forget(self, user: int) -> bool:
        """See `HistoryStore.forget`."""
        ...

    def counters(self) -> dict[str, int]:
        """What the store did so far."""
        ...


@dataclass(frozen=True, eq=False)
class KeptHistory:
    """Events of one user that are kept.

    Args:
        events: by column.
        revision: that a shared tier has them by; None if it does not have them.
    """

    events: Events
    revision: bytes | None = None


class EventColumns:
    """The columns of events of a schema, and how many events of each are kept.

    Args:
        schema: of the requests.
        limits: events of each history that are kept, the latest ones; all of a history that is not named.

    Example::

        columns = EventColumns(schema, {"history": 100})
        (events,) = columns.of(test_table.slice(0, 1))
        columns.after(events, events)  # twice the same, the latest 100
    """

    def __init__(self, schema: RequestSchema, limits: Mapping[str, int] | None = None) -> None:
        limits = limits or {}
        self.types = {f.source: schema.arrow_schema().field(f.source).type for f in schema.of("event")}
        self._limits = {f.source: limits.get(f.history) for f in schema.of("event")}

    def of(self, requests: pa.Table) -> list[Events]:
        """The events of each request; a column that is not there brings none.

        Raises:
            InputError: a column of events is no list.
        """
        columns = {column: self._lists(requests, column) for column in self.types}
        return [{column: lists[row] for column, lists in columns.items()} for row in range(len(requests))]

    def after(self, before: Events | None, new: Events) -> Events:
        """New events after those before, the latest ones that are kept, in memory of their own."""
        return {column: self._after(column, before, new) for column in self.types}

    def joined(self, requests: pa.Table, before: Sequence[Events]) -> pa.Table:
        """Requests with the events of each before its own."""
        both = [self.after(*pair) for pair in zip(before, self.of(requests), strict=True)]
        for column, kind in self.types.items():
            of_column = [events[column] for events in both]
            offsets = np.cumsum([0, *map(len, of_column)]).astype(np.int32)
            lists = pa.ListArray.from_arrays(offsets, pa.concat_arrays([pa.array([], kind.value_type), *of_column]))
            if column in requests.column_names:
                requests = requests.drop_columns([column])
            requests = requests.append_column(column, lists)
        return requests

    def _after(self, column: str, before: Events | None, new: Events) -> pa.Array:
        none = pa.array([], self.types[column].value_type)
        events = pa.concat_arrays([none if before is None else before[column], new[column]])
        limit = self._limits[column]
        return events if limit is None or len(events) <= limit else pa.concat_arrays([events[len(events) - limit :]])

    def _lists(self, requests: pa.Table, column: str) -> Sequence[pa.Array]:
        """Of each request, the events of a column in its type."""
        if column not in requests.column_names:
            return [pa.array([], self.types[column].value_type)] * len(requests)
        try:
            lists = requests[column].combine_chunks().cast(self.types[column])
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"requests: {column}: not {self.types[column]} ({error})") from error
        if lists.null_count:
            raise InputError(f"requests: {column}: has a null: give a list, which may be empty")
        return [lists[row].values for row in range(len(lists))]


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
        store.asked(test_table, is_new=False).keep()
        store.asked(test_table, is_new=True).requests  # the same events once more, after those that were kept
    """

    is_shared = False

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
        self.columns = EventColumns(schema, limits)
        self._max_bytes, self._seconds_to_live, self._clock = max_bytes, seconds_to_live, clock
        # The least recently used first, with when each was kept.
        self._users: OrderedDict[int, tuple[float, KeptHistory]] = OrderedDict()
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

    def asked(self, requests: pa.Table, *, is_new: bool) -> Asked:
        """Requests as they are to be scored, with histories that are kept, and what keeps theirs afterwards.

        Args:
            requests: one row for each.
            is_new: whether they have new events alone, to be put after what is kept; else they take its place.

        Raises:
            InputError: as `joined`.
            UnknownHistory: as `joined`.
        """
        keep = partial(self.keep, requests, is_new=is_new, epoch=self.epoch)
        return Asked(self.joined(requests) if is_new else requests, keep)

    def joined(self, requests: pa.Table) -> pa.Table:
        """Requests with the histories that are kept, and after them the events that they bring.

        Args:
            requests: one row for each, with their `user`; a column of events that is not there brings none.

        Raises:
            InputError: a request does not tell its user, or a column of events is no list.
            UnknownHistory: names the first user whose history is not kept.
        """
        users = users_of(requests)
        with self._lock:
            self._expire()
            histories = [self._users[user][1].events for user in users if user in self._users]
            if len(histories) < len(users):
                self._counters.unknown += 1
                raise UnknownHistory.of(next(user for user in users if user not in self._users))
            self._counters.joined += 1
        return self.columns.joined(requests, histories)

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
        for user, new in zip(users_of(requests), self.columns.of(requests), strict=True):
            with self._lock:
                self._expire()
                if epoch != self._epoch or (is_new and user not in self._users):
                    continue
                before = self._users[user][1].events if is_new else None
                self._put(user, KeptHistory(self.columns.after(before, new)))

    def kept(self, user: int) -> KeptHistory | None:
        """What is kept of a user."""
        with self._lock:
            self._expire()
            return self._users[user][1] if user in self._users else None

    def put(self, user: int, history: KeptHistory, *, epoch: int) -> None:
        """Keep a history in place of what there is of its user.

        Args:
            user: whose history it is.
            history: whole.
            epoch: as in `keep`.
        """
        with self._lock:
            self._expire()
            if epoch == self._epoch:
                self._put(user, history)

    def drop(self, user: int) -> None:
        """Remove a history that is not the latest any more."""
        with self._lock:
            self._remove(user)

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

    def _put(self, user: int, history: KeptHistory) -> None:
        self._remove(user)
        if _bytes_of(history) > self._max_bytes:
            return
        self._users[user] = (self._clock(), history)
        self._num_bytes += _bytes_of(history)
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
        _, history = self._users.pop(user)
        self._num_bytes -= _bytes_of(history)
        return True


def users_of(requests: pa.Table) -> list[int]:
    """The user of each request.

    Raises:
        InputError: one does not tell it.
    """
    if "user" not in requests.column_names or requests["user"].null_count:
        raise InputError("requests: column 'user' is missing or has a null: tell whose history it is")
    users: list[int] = requests["user"].to_pylist()
    return users


def _bytes_of(history: KeptHistory) -> int:
    return sum(array.nbytes for array in history.events.values())
