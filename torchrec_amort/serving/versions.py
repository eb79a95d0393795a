"""Versions: which weights and tables answer, changed while requests come.

Shape suffixes: B requests; C candidates, all requests together; T tasks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import torch
from torch import Tensor

from torchrec_amort.errors import InputError, one_line
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.scorer import AmortizedScorer

# Requests, of one call each: a table with a row for each, or mappings.
Requests: TypeAlias = pa.Table | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Version:
    """Weights and tables of one moment, with the histories that they have encoded.

    Args:
        name: tells it from others.
        scorer: has a schema, and a cache of its own if it has one.
    """

    name: str
    scorer: AmortizedScorer

    def __post_init__(self) -> None:
        if self.scorer.schema is None:
            raise ValueError(f"version {self.name!r}: its scorer has no schema: give it one")

    @property
    def schema(self) -> RequestSchema:
        """Of the requests that it scores."""
        assert self.scorer.schema is not None
        return self.scorer.schema


@dataclass(frozen=True, eq=False)
class Prepared:
    """A version that may answer.

    Args:
        version: the one.
        current: the one that answered when it was prepared.
    """

    version: Version
    current: Version


@dataclass(frozen=True, eq=False)
class Ahead:
    """Requests whose histories are to be encoded before their candidates are known.

    Args:
        requests: without any column of candidates.
    """

    requests: Requests


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of requests that came together.

    Args:
        logits_CT: of all candidates, in their order.
        num_candidates: of each request.
        version: the one that scored all of them.
    """

    logits_CT: Tensor
    num_candidates: Sequence[int]
    version: str


class Versions:
    """The version that answers, and the one before it, to go back to.

    A request is scored by one version, whichever it was when its turn came; a switch waits for nothing. All methods may
    be called by several threads.

    Args:
        first: the version that answers.
        num_recorded: latest requests that are kept in memory, to warm up the next version with.

    Example::

        versions = Versions(Version("monday", AmortizedScorer(old, schema=schema)))
        versions.switch(Version("tuesday", AmortizedScorer(model, schema=schema)))
        versions.roll_back()
    """

    def __init__(self, first: Version, num_recorded: int = 16) -> None:
        self._current = first
        self._previous: Version | None = None
        self._recorded: deque[Requests] = deque(maxlen=num_recorded)
        self._num_forgotten = 0
        self._lock = threading.Lock()

    @property
    def current(self) -> Version:
        """The version that answers."""
        return self._current

    @property
    def previous(self) -> Version | None:
        """The version that answered before, if it is there still."""
        return self._previous

    def score(self, requests: Requests | Ahead) -> Scored:
        """Score requests by the version that answers.

        Args:
            requests: of its schema; or those whose histories are to be encoded, which have no scores yet.

        Raises:
            InputError: as `AmortizedScorer.score`, or histories are to be encoded and there is no cache for them.
        """
        if isinstance(requests, Ahead):
            version = self._current
            if version.scorer.cache is None:
                raise InputError(
                    "histories are encoded ahead for a cache, and this server has none: give it cache_bytes"
                )
            version.scorer.encode(requests.requests)
            return Scored(torch.empty(0, len(version.schema.labels)), [0] * len(requests.requests), version.name)
        (scored,) = self._score(requests, [requests])
        return scored

    def score_together(self, calls: Sequence[Requests | Ahead]) -> list[Scored]:
        """Score the requests of several calls by the version that answers: together, where they have the same columns.

        Args:
            calls: see `score`.

        Returns:
            list: what `score` returns for each, to rounding.

        Raises:
            InputError: see `score`; a request's number is that among all.
        """
        scored: dict[int, Scored] = {}
        of_schemas: dict[pa.Schema, list[int]] = {}
        for place, call in enumerate(calls):
            if isinstance(call, pa.Table):
                of_schemas.setdefault(call.schema, []).append(place)
            else:
                scored[place] = self.score(call)
        for places in of_schemas.values():
            tables = [calls[place] for place in places]
            scored |= zip(places, self._score(pa.concat_tables(tables), tables), strict=True)
        return [scored[place] for place in range(len(calls))]

    def _score(self, requests: Requests, calls: Sequence[Requests]) -> list[Scored]:
        """Score requests, which are those of some calls."""
        version, num_forgotten = self._current, self._num_forgotten
        logits_CT = version.scorer.score(requests)
        with self._lock:
            # Who was forgotten since may be whose request this is.
            if num_forgotten == self._num_forgotten:
                self._recorded.extend(calls)
        counts = [_num_candidates(call, version.schema) for call in calls]
        parts = logits_CT.split([sum(of_call) for of_call in counts])
        return [Scored(part, of_call, version.name) for part, of_call in zip(parts, counts, strict=True)]

    def switch(self, version: Version) -> None:
        """Let another version answer from now on, once it has scored what was recorded; the one before it is kept.

        Args:
            version: see `prepare`.

        Raises:
            InputError: see `prepare` and `commit`.
        """
        self.commit(self.prepare(version))

    def prepare(self, version: Version) -> Prepared:
        """Let a version that is to answer score what was recorded.

        Args:
            version: which takes all requests that the present one takes.

        Raises:
            InputError: it has the name of the present one, reads a column that requests do not have, or scores other
                tasks.
        """
        current = self._current
        if version.name == current.name:
            raise InputError(f"version {version.name!r}: is the one that answers: give another one")
        version.schema.refuse_other_data(current.schema, f"version {current.name!r}")
        if version.schema.labels != current.schema.labels:
            raise InputError(
                f"version {version.name!r}: scores {list(version.schema.labels)}, but {current.name!r} "
                f"{list(current.schema.labels)}: clients would read the wrong scores"
            )
        with self._lock:
            recorded = list(self._recorded)
        for requests in recorded:
            version.scorer.warm_up(requests, times=1)
        return Prepared(version, current)

    def commit(self, prepared: Prepared) -> None:
        """Let a version answer from now on; the one before it is kept.

        Args:
            prepared: the version.

        Raises:
            InputError: another one answers than when it was prepared.
        """
        version = prepared.version
        with self._lock:
            if self._current is not prepared.current:
                raise InputError(f"version {version.name!r}: {self._current.name!r} came before it: switch once more")
            self._current, self._previous = version, prepared.current

    def roll_back(self) -> Version:
        """Let the version before answer again; the present one is not kept.

        Returns:
            Version: the one that answers now.

        Raises:
            InputError: there is none.
        """
        with self._lock:
            if self._previous is None:
                raise InputError(f"version {self._current.name!r}: there is none before it to roll back to")
            self._current, self._previous = self._previous, None
            return self._current

    def forget(self, user: int) -> bool:
        """Remove every trace of a user from the caches of all versions, and from what was recorded.

        Args:
            user: whom to forget.

        Returns:
            bool: whether there was anything.
        """
        with self._lock:
            # What was recorded is only to warm up with: all of it goes.
            found = len(self._recorded) > 0
            self._recorded.clear()
            self._num_forgotten += 1
            versions = [version for version in (self._current, self._previous) if version is not None]
        for version in versions:
            if version.scorer.cache is not None:
                found |= version.scorer.cache.forget(user)
        return found


def _num_candidates(requests: Requests, schema: RequestSchema) -> list[int]:
    column = schema.candidate_column
    if isinstance(requests, pa.Table):
        return [len(entries) for entries in requests[column]]
    return [len(request[column]) for request in requests]


def table_of(requests: Requests, schema: RequestSchema) -> pa.Table:
    """Requests as a table.

    Args:
        requests: a table, which is returned as it is, or mappings: of these, the columns of the schema that one has.
        schema: of the requests.

    Raises:
        InputError: a value of a mapping cannot be had in the column's type.

    Example::

        table_of([{"user": 7, "candidate_item": [5, 6]}], schema).num_rows  # 1
    """
    if isinstance(requests, pa.Table):
        return requests
    names = {name for request in requests for name in request}
    columns = [field for field in schema.arrow_schema() if field.name in names]
    try:
        return pa.Table.from_pylist(list(requests), pa.schema(columns))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"requests: cannot be read ({one_line(error)})") from error
