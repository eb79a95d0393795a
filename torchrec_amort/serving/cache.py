"""HistoryCache: encoded histories kept from one request of a user to the next."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property

from torchrec_amort.models.dlrm import HISTORY
from torchrec_amort.modules.encoder import HistoryState

# A user, and one of their histories by the name of its tower.
Key = tuple[int, str]


@dataclass(frozen=True, eq=False)
class CachedHistory:
    """An encoded history and what it is of.

    Args:
        version: tells this history from any other of its user.
        num_events: events that it has.
        state: of one request.
    """

    version: bytes
    num_events: int
    state: HistoryState

    @cached_property
    def nbytes(self) -> int:
        """Bytes of memory that the state holds."""
        state = self.state
        tensors = [*state.keys, *state.values, state.lengths, *([] if state.summary is None else [state.summary])]
        storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
        return sum(storages.values())


@dataclass
class CacheCounters:
    """What a cache did so far.

    Args:
        hits: the history was there as it is.
        extensions: an older version of it was there, to be extended.
        misses: neither.
        evictions: histories removed for want of bytes.
        expirations: removed for age.
        refusals: not kept: larger than the whole budget, or encoded before a user was forgotten or all were cleared.
        forgotten: users removed by `forget`.
    """

    hits: int = 0
    extensions: int = 0
    misses: int = 0
    evictions: int = 0
    expirations: int = 0
    refusals: int = 0
    forgotten: int = 0


class HistoryCache:
    """The latest encoded histories of each user, within a budget of bytes.

    The least recently used histories go first. A history is found by its user and its version, so that one that has
    changed is never served from what it was. Nothing of it is written anywhere: neither to disk nor to a log. All
    methods may be called by several threads.

    Args:
        max_bytes: budget of all states together, in bytes.
        seconds_to_live: how long after it was put a history is kept; whoever asks the cache next removes those whose
            time is over. Without limit if None.
        clock: seconds; for tests.

    Raises:
        ValueError: `max_bytes` or `seconds_to_live` is not above 0.

    Example::

        cache = HistoryCache(max_bytes=2**30, seconds_to_live=3600)
        scorer = AmortizedScorer(model, cache=cache)
        logits_CT = scorer.score(batch)  # batch.users tells whose histories they are
        cache.forget(7)
        cache.counters()
    """

    def __init__(
        self, max_bytes: int, seconds_to_live: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}, not 1 or more")
        if seconds_to_live is not None and seconds_to_live <= 0:
            raise ValueError(f"seconds_to_live is {seconds_to_live}, not above 0")
        self.max_bytes = max_bytes
        self.seconds_to_live = seconds_to_live
        self._clock = clock
        self._lock = threading.Lock()
        # The least recently used first; and when each was put, the oldest first.
        self._entries: OrderedDict[Key, CachedHistory] = OrderedDict()
        self._put_at: dict[Key, float] = {}
        self._num_histories: Counter[int] = Counter()
        self._towers: set[str] = set()
        self._num_bytes = 0
        self._counters = CacheCounters()
        self._scorer: object | None = None
        self._epoch = 0

    def __len__(self) -> int:
        """The number of users."""
        return len(self._num_histories)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return self._num_bytes

    def counters(self) -> dict[str, int]:
        """What the cache did so far, and what it holds: see `CacheCounters`, and `users` and `bytes`."""
        with self._lock:
            return {**asdict(self._counters), "users": len(self), "bytes": self._num_bytes}

    @property
    def epoch(self) -> int:
        """A number that changes whenever users are forgotten, to be read before a history is encoded, for `put`."""
        return self._epoch

    def find(
        self,
        user: int,
        num_events: int,
        version_of: Callable[[int], bytes],
        *,
        extendable: bool = False,
        tower: str = HISTORY,
    ) -> CachedHistory | None:
        """What there is of a user's history.

        Args:
            user: whose history it is.
            num_events: events that it has now.
            version_of: the version of the history's first so many events.
            extendable: whether a version of its first events is of use.
            tower: which of the user's histories.

        Returns:
            CachedHistory: of all events; or, if `extendable`, of the first ones; or None.
        """
        with self._lock:
            self._expire()
            cached = self._entries.get((user, tower))
        is_new_enough = cached is not None and (
            cached.num_events == num_events or (extendable and cached.num_events < num_events)
        )
        # Hashing needs no lock.
        if cached is not None and (not is_new_enough or version_of(cached.num_events) != cached.version):
            cached = None
        with self._lock:
            if cached is None:
                self._counters.misses += 1
            elif cached.num_events == num_events:
                self._counters.hits += 1
            else:
                self._counters.extensions += 1
            if cached is not None and (user, tower) in self._entries:
                self._entries.move_to_end((user, tower))
        return cached

    def put(self, user: int, history: CachedHistory, *, epoch: int | None = None, tower: str = HISTORY) -> None:
        """Keep a history in place of what there is of its user.

        Args:
            user: whose history it is.
            history: its state is not changed afterwards.
            epoch: the cache's `epoch` from before the history was encoded. If someone was forgotten since, it may
                have been this user, so nothing is kept.
            tower: which of the user's histories.
        """
        with self._lock:
            self._expire()
            if (epoch is not None and epoch != self._epoch) or history.nbytes > self.max_bytes:
                self._counters.refusals += 1
                return
            self._remove((user, tower))
            self._entries[user, tower] = history
            self._put_at[user, tower] = self._clock()
            self._num_histories[user] += 1
            self._towers.add(tower)
            self._num_bytes += history.nbytes
            while self._num_bytes > self.max_bytes:
                self._remove(next(iter(self._entries)))
                self._counters.evictions += 1

    def forget(self, user: int) -> bool:
        """Remove every trace of a user, at once; a history that is being encoded meanwhile is not kept either.

        Args:
            user: whom to forget.

        Returns:
            bool: whether there was anything.
        """
        with self._lock:
            self._counters.forgotten += 1
            self._epoch += 1
            return any([self._remove((user, tower)) for tower in self._towers])

    def bind(self, scorer: object) -> None:
        """Make the cache a scorer's own: its states are of no use to another one.

        Raises:
            ValueError: it is another scorer's.
        """
        with self._lock:
            if self._scorer is not None and self._scorer is not scorer:
                raise ValueError("the cache is another scorer's, whose states are of no use here: give each its own")
            self._scorer = scorer

    def clear(self) -> None:
        """Remove all histories, at once; one that is being encoded meanwhile is not kept either."""
        with self._lock:
            self._epoch += 1
            self._entries.clear()
            self._put_at.clear()
            self._num_histories.clear()
            self._num_bytes = 0

    def _expire(self) -> None:
        """Remove all histories whose time is over, whoever asks."""
        if self.seconds_to_live is None:
            return
        oldest = self._clock() - self.seconds_to_live
        while self._put_at and self._put_at[key := next(iter(self._put_at))] <= oldest:
            self._remove(key)
            self._counters.expirations += 1

    def _remove(self, key: Key) -> bool:
        if key not in self._entries:
            return False
        del self._put_at[key]
        self._num_bytes -= self._entries.pop(key).nbytes
        user, _ = key
        self._num_histories[user] -= 1
        if self._num_histories[user] == 0:
            del self._num_histories[user]
        return True
