"""HistoryTier: users' histories in a Valkey or Redis that several servers share."""

from __future__ import annotations

import base64
import logging
import secrets
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import redis
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from redis.backoff import NoBackoff
from redis.retry import Retry

from torchrec_amort.errors import InputError, place_of
from torchrec_amort.serving.histories import EventColumns, Events, TierUnreachable

logger = logging.getLogger(__name__)

_KEY_BYTES, _NONCE_BYTES, _REVISION_BYTES = 32, 12, 16
# Known revisions of those whose events are not wanted.
_NO_EVENTS = b"*"

# What is kept of a user is a hash: `revision` and `value`, and `mark`, which each forgetting makes anew. A script is
# one step, by the tier's own clock.
_READ = """
local now = redis.call('TIME')
local found = {now[1] * 1000 + math.floor(now[2] / 1000)}
for place, name in ipairs(KEYS) do
  local kept = redis.call('HMGET', name, 'mark', 'revision')
  local is_wanted = kept[2] and ARGV[place] ~= '*' and ARGV[place] ~= kept[2]
  found[place + 1] = {kept[1] or '', kept[2] or '', is_wanted and redis.call('HGET', name, 'value') or ''}
end
return found
"""
_WRITE = """
local mark, came_at, longest, expected, is_whole, revision, value, term = unpack(ARGV)
local now = redis.call('TIME')
local age = now[1] * 1000 + math.floor(now[2] / 1000) - tonumber(came_at)
local kept = redis.call('HMGET', KEYS[1], 'mark', 'revision')
if (kept[1] or '') ~= mark or age > tonumber(longest) then return {'late'} end
local is_other = (kept[2] or '') ~= expected
if is_other and is_whole == '0' then
  return {'newer', mark, kept[2] or '', redis.call('HGET', KEYS[1], 'value') or ''}
end
redis.call('HSET', KEYS[1], 'revision', revision, 'value', value)
redis.call('PEXPIRE', KEYS[1], term)
return {is_other and 'crossed' or 'written'}
"""
# It deletes first: that is allowed where memory is full, and so is then all of the script.
_FORGET = """
local found = redis.call('HEXISTS', KEYS[1], 'value')
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'mark', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return found
"""


class Unreadable(ValueError):
    """A value was not written with this key for this user."""


class Sealing(Protocol):
    """How a tier names users and keeps their values."""

    def name_of(self, user: int) -> str:
        """The name that a user's value has."""
        ...

    def sealed(self, user: int, value: bytes) -> bytes:
        """A user's value as the tier has it."""
        ...

    def opened(self, user: int, sealed: bytes) -> bytes:
        """A user's value from what `sealed` gave.

        Raises:
            Unreadable: it is another one.
        """
        ...


class Plain:
    """Names and values that whoever can read the tier can read.

    Args:
        model: whose histories they are.
    """

    def __init__(self, model: str) -> None:
        self._model = model

    def name_of(self, user: int) -> str:
        """See `Sealing`."""
        return f"torchrec-amort:{self._model}:{user}"

    def sealed(self, user: int, value: bytes) -> bytes:
        """See `Sealing`."""
        return value

    def opened(self, user: int, sealed: bytes) -> bytes:
        """See `Sealing`."""
        return sealed


class Sealed:
    """Names that do not tell users, and values that are encrypted by AES-GCM, with a key for each user.

    Args:
        model: whose histories they are.
        key: secret, 32 bytes.

    Raises:
        InputError: the key has another length.
    """

    def __init__(self, model: str, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise InputError(f"the key of shared histories has {len(key)} bytes: give {_KEY_BYTES}")
        self._model, self._key = model, key

    @classmethod
    def read(cls, model: str, path: str) -> Sealed:
        """By a file of a key.

        Args:
            model: whose histories they are.
            path: of a file of 32 bytes in base64.

        Raises:
            InputError: it is not.
        """
        try:
            key = base64.b64decode(Path(path).read_text(encoding="ascii").strip(), validate=True)
        except (OSError, ValueError) as error:
            kind = type(error).__name__
            raise InputError(f"shared_histories_key: {path}: not a file of base64 that can be read ({kind})") from error
        return cls(model, key)

    def name_of(self, user: int) -> str:
        """See `Sealing`."""
        return f"torchrec-amort:{self._model}:{self._derived('name', user).hex()}"

    def sealed(self, user: int, value: bytes) -> bytes:
        """See `Sealing`."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher(user).encrypt(nonce, value, self._context("value", user))

    def opened(self, user: int, sealed: bytes) -> bytes:
        """See `Sealing`."""
        nonce, value = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return self._cipher(user).decrypt(nonce, value, self._context("value", user))
        # A value that is too short.
        except (InvalidTag, ValueError) as error:
            raise Unreadable("the value was not written with this key for this user") from error

    def _cipher(self, user: int) -> AESGCM:
        # Nonces are random: one key may have 2**32 of them, which one of all users would have in weeks.
        return AESGCM(self._derived("value", user))

    def _derived(self, purpose: str, user: int) -> bytes:
        """A HMAC of the user."""
        return HKDFExpand(SHA256(), _KEY_BYTES, self._context(purpose, user)).derive(self._key)

    def _context(self, purpose: str, user: int) -> bytes:
        return f"torchrec-amort:1:{purpose}:{self._model}:{user}".encode()


@dataclass(frozen=True, eq=False)
class Found:
    """What the tier has of a user.

    Args:
        mark: of the latest time that the user was forgotten; empty if that was not, or long ago.
        revision: of the events; empty if there are none.
        events: None if there are none, if they were not asked for, or if they cannot be read.
    """

    mark: bytes
    revision: bytes
    events: Events | None


@dataclass(frozen=True, eq=False)
class Read:
    """What the tier has of the users of a request.

    Args:
        at: when it was read, in milliseconds by the clock of the tier.
        found: of each user.
    """

    at: int
    found: Sequence[Found]


@dataclass(frozen=True, eq=False)
class Written:
    """What became of a write.

    Args:
        outcome: `written`; `crossed`: written in place of events that came meanwhile; `newer`: not written, since such
            events are there; `late`: not written, since the user was forgotten meanwhile or the request is too old.
        found: what the tier has then; None if that is `late`.
    """

    outcome: Literal["written", "crossed", "newer", "late"]
    found: Found | None


@dataclass
class TierCounters:
    """What went wrong with a tier so far.

    Args:
        tier_errors: calls that it did not answer, or refused.
        other_schema: values that were written with other columns of events, which count as unknown.
        unreadable: values that were not written with this key for their user, or are damaged; unknown, too.
    """

    tier_errors: int = 0
    other_schema: int = 0
    unreadable: int = 0


class HistoryTier:
    """Users' events in a Valkey or Redis: one server, or the primary of several; no cluster of shards.

    All methods may be called by several threads. None is tried again by itself. That the tier does not answer is logged
    once, until it does.

    Args:
        url: `redis://HOST:PORT/DATABASE`; `rediss://` for TLS, `unix://` for a socket.
        columns: of the events.
        sealing: names users and encrypts their values.
        seconds_to_live: how long after a user's latest request events are kept. Requests that take more than half of
            it leave none.
        timeout: how long the tier is waited for whenever it is, in seconds, unless the URL has `socket_timeout` and
            `socket_connect_timeout`.

    Raises:
        InputError: the URL is none of those.

    Example::

        tier = HistoryTier("redis://localhost:6379/0", columns, Sealed.read("films", "key.txt"), seconds_to_live=86400)
        read = tier.read([7], known=[b""])
        tier.write(7, events, read.found[0], read.at, is_whole=True)
    """

    def __init__(
        self, url: str, columns: EventColumns, sealing: Sealing, seconds_to_live: float, *, timeout: float = 0.05
    ) -> None:
        try:
            self._client = redis.Redis.from_url(
                url,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                # A write that was sent may have been done.
                retry=Retry(NoBackoff(), 0),
                # No more to agree on with each connection than it needs.
                protocol=2,
            )
        except ValueError as error:
            # The URL may hold a password.
            raise InputError("shared_histories: give redis://HOST:PORT/DATABASE, rediss://... or unix://...") from error
        self._columns, self._sealing = columns, sealing
        self._milliseconds = max(1, int(1000 * seconds_to_live))
        self._read, self._write, self._forget = map(self._client.register_script, (_READ, _WRITE, _FORGET))
        self._counters = TierCounters()
        self._lock = threading.Lock()
        self._is_out = False

    def counters(self) -> dict[str, int]:
        """What went wrong so far: see `TierCounters`."""
        with self._lock:
            return asdict(self._counters)

    def read(self, users: Sequence[int], known: Sequence[bytes] | None) -> Read:
        """Read what there is of users.

        Args:
            users: may repeat.
            known: of each user, the revision whose events need not be read, empty for none; if None, no events are.

        Raises:
            TierUnreachable: the tier does not answer.
        """
        names = [self._sealing.name_of(user) for user in users]
        at, *found = self._asked(self._read, names, [_NO_EVENTS] * len(users) if known is None else known)
        return Read(at, [self._found(user, *one) for user, one in zip(users, found, strict=True)])

    def write(self, user: int, events: Events, before: Found, at: int, *, is_whole: bool) -> Written:
        """Write a user's events in place of those that were found, in one step.

        Args:
            user: whose they are.
            events: all that are kept.
            before: what was found when the request came, or by the write before this one.
            at: when the request came.
            is_whole: whether they take the place of any others, too.

        Raises:
            TierUnreachable: the tier does not answer, and whether it has written is not known.
        """
        revision = secrets.token_bytes(_REVISION_BYTES)
        value = self._sealing.sealed(user, self._bytes_of(events))
        times = (before.mark, at, self._milliseconds // 2, before.revision)
        arguments = [*times, int(is_whole), revision, value, self._milliseconds]
        outcome, *found = self._asked(self._write, [self._sealing.name_of(user)], arguments)
        kind: Any = outcome.decode()
        if found:
            return Written(kind, self._found(user, *found))
        return Written(kind, None if kind == "late" else Found(before.mark, revision, events))

    def forget(self, user: int) -> bool:
        """Remove a user's events; those of requests that came before are not written afterwards either.

        Args:
            user: whom to forget.

        Returns:
            bool: whether there were any.

        Raises:
            TierUnreachable: the tier does not answer, and whether it has removed them is not known.
        """
        arguments = [secrets.token_bytes(_REVISION_BYTES), self._milliseconds]
        return bool(self._asked(self._forget, [self._sealing.name_of(user)], arguments))

    def _asked(self, script: Any, names: Sequence[str], arguments: Sequence[Any]) -> Any:
        try:
            answer = script(keys=names, args=arguments)
        except redis.RedisError as error:
            with self._lock:
                self._counters.tier_errors += 1
                is_first, self._is_out = not self._is_out, True
            if is_first:
                logger.error("the shared tier of histories does not answer: %s", place_of(error))
            raise TierUnreachable("the shared tier of histories does not answer") from error
        self._is_out = False
        return answer

    def _found(self, user: int, mark: bytes, revision: bytes, value: bytes) -> Found:
        return Found(mark, revision, self._events_of(user, value) if value else None)

    def _bytes_of(self, events: Events) -> bytes:
        lists = [pa.ListArray.from_arrays(pa.array([0, len(array)], pa.int32()), array) for array in events.values()]
        batch = pa.record_batch(lists, schema=self._schema())
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        data: bytes = sink.getvalue().to_pybytes()
        return data

    def _events_of(self, user: int, value: bytes) -> Events | None:
        """Events of a value; None, which is counted, if they cannot be read."""
        try:
            with pa.ipc.open_stream(self._sealing.opened(user, value)) as stream:
                if not stream.schema.equals(self._schema()):
                    self._count("other_schema")
                    return None
                batch = stream.read_next_batch()
            batch.validate(full=True)
        except (Unreadable, pa.ArrowException, OSError, StopIteration):
            self._count("unreadable")
            return None
        if len(batch) != 1 or any(column.null_count for column in batch.columns):
            self._count("unreadable")
            return None
        return {name: batch[name][0].values for name in self._columns.types}

    def _schema(self) -> pa.Schema:
        return pa.schema([pa.field(name, kind) for name, kind in self._columns.types.items()])

    def _count(self, name: Literal["other_schema", "unreadable"]) -> None:
        with self._lock:
            setattr(self._counters, name, getattr(self._counters, name) + 1)
