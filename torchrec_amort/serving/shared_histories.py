"""SharedHistoryStore: histories that several servers share, so that new events may go to any of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import pyarrow as pa

from torchrec_amort.serving.histories import (
    Asked,
    Events,
    HistoryStore,
    KeptHistory,
    TierUnreachable,
    UnknownHistory,
    users_of,
)
from torchrec_amort.serving.history_tier import Found, HistoryTier, Read


@dataclass
class SharedCounters:
    """What a store did with its tier so far.

    Args:
        joined: requests whose new events were put after a history.
        unknown: requests whose history is not kept.
        merged: new events that were put after others which another request had written meanwhile.
        crossed: whole histories that took the place of events which another request had written meanwhile.
        refused: events that were not written, since their user was forgotten, or what they come after is gone.
        missed: requests whose events the tier does not have, since it did not answer.
    """

    joined: int = 0
    unknown: int = 0
    merged: int = 0
    crossed: int = 0
    refused: int = 0
    missed: int = 0


class SharedHistoryStore:
    """Histories in a tier that several servers share, and copies of them here.

    The tier is asked for every request, by which revision it has a user's events: copies that are the latest are not
    read again. Where it does not answer, the copies go on alone. All methods may be called by several threads.

    Args:
        local: the copies.
        tier: what is shared.

    Example::

        store = SharedHistoryStore(local, HistoryTier(url, local.columns, sealing, seconds_to_live=86400))
        asked = store.asked(requests, is_new=True)
        scorer.score(asked.requests)
        asked.keep()
    """

    is_shared = True

    def __init__(self, local: HistoryStore, tier: HistoryTier) -> None:
        self._local, self._tier = local, tier
        self._counters = SharedCounters()
        self._lock = threading.Lock()

    def counters(self) -> dict[str, int]:
        """What the store did so far: see `SharedCounters`, `TierCounters` and `HistoryStore.counters`."""
        local = self._local.counters()
        with self._lock:
            shared = asdict(self._counters)
        both = {name: local[name] + shared[name] for name in ("joined", "unknown")}
        return {**local, **shared, **both, **self._tier.counters()}

    def asked(self, requests: pa.Table, *, is_new: bool) -> Asked:
        """Requests as they are to be scored, with histories that are kept, and what keeps theirs afterwards.

        Args:
            requests: one row for each.
            is_new: whether they have new events alone, to be put after what is kept; else they take its place.

        Raises:
            InputError: a request does not tell its user, or a column of events is no list.
            UnknownHistory: names the first user whose history is not kept.
        """
        epoch = self._local.epoch
        if "user" not in requests.column_names and not is_new:
            return Asked(requests, lambda: None)
        users = users_of(requests)
        kept = [self._local.kept(user) for user in users]
        known = [(of_user and of_user.revision) or b"" for of_user in kept]
        try:
            read = self._tier.read(users, known if is_new else None)
        except TierUnreachable:
            keep = partial(self._keep_here, requests, is_new=is_new, epoch=epoch)
            return Asked(self._local.joined(requests) if is_new else requests, keep)
        if not is_new:
            return Asked(requests, partial(self._keep, requests, None, read, epoch))
        before = [self._current(*of_user) for of_user in zip(users, kept, read.found, strict=True)]
        self._count("joined")
        joined = self._local.columns.joined(requests, before)
        return Asked(joined, partial(self._keep, requests, before, read, epoch))

    def forget(self, user: int) -> bool:
        """Remove a user's histories from the tier and here; what is under way is not written afterwards.

        Args:
            user: whom to forget.

        Returns:
            bool: whether there were any.

        Raises:
            TierUnreachable: the tier does not answer. The user is forgotten here alone.
        """
        try:
            is_in_tier = self._tier.forget(user)
        except TierUnreachable as error:
            self._local.forget(user)
            raise TierUnreachable(
                f"user {user}: is not forgotten: the shared tier of histories does not answer: forget again"
            ) from error
        # After the tier: what was read before that is not kept any more.
        return self._local.forget(user) or is_in_tier

    def _current(self, user: int, kept: KeptHistory | None, found: Found) -> Events:
        """The latest events of a user."""
        is_missed = kept is not None and kept.revision is None
        if not is_missed and kept is not None and kept.revision == found.revision:
            return kept.events
        if not is_missed and found.events is not None:
            return found.events
        # Of the events of one that the tier missed, it has some only, which may be others than those here.
        self._local.drop(user)
        self._count("unknown")
        raise UnknownHistory.of(user)

    def _keep_here(self, requests: pa.Table, *, is_new: bool, epoch: int) -> None:
        self._count("missed")
        self._local.keep(requests, is_new=is_new, epoch=epoch)

    def _keep(self, requests: pa.Table, before: Sequence[Events] | None, read: Read, epoch: int) -> None:
        rows = zip(users_of(requests), self._local.columns.of(requests), read.found, strict=True)
        answers = True
        for row, (user, new, found) in enumerate(rows):
            of_user = None if before is None else before[row]
            # Where it does not answer for one, the others do not wait for it.
            answers = answers and self._write(user, new, of_user, found, read.at, epoch)
            if not answers:
                self._count("missed")
                self._local.put(user, KeptHistory(self._local.columns.after(of_user, new)), epoch=epoch)

    def _write(self, user: int, new: Events, before: Events | None, found: Found, at: int, epoch: int) -> bool:
        """Write new events after those before, or after those that another request has written meanwhile.

        Returns:
            bool: whether the tier answers.
        """
        is_whole = before is None
        # It ends: each time that it goes on, another request's events were written.
        while True:
            events = self._local.columns.after(before, new)
            try:
                written = self._tier.write(user, events, found, at, is_whole=is_whole)
            except TierUnreachable:
                return False
            if written.found is None or written.found.events is None:
                self._count("refused")
                self._local.drop(user)
                return True
            if written.outcome != "newer":
                if written.outcome == "crossed":
                    self._count("crossed")
                self._local.put(user, KeptHistory(events, written.found.revision), epoch=epoch)
                return True
            self._count("merged")
            before, found = written.found.events, written.found

    def _count(self, name: Literal["joined", "unknown", "merged", "crossed", "refused", "missed"]) -> None:
        with self._lock:
            setattr(self._counters, name, getattr(self._counters, name) + 1)
