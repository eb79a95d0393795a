"""Versions: which weights and tables answer, changed while requests come.

Shape suffixes: B requests; C candidates, all requests together; T tasks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from torchrec_amort.columns import typed_table
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.rollout import Part, RolloutOf, Stage
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

    def score(self, asked: Requests | Ahead) -> Tensor:
        """Logits [C, T] of requests; of those whose histories are encoded ahead there are none.

        Raises:
            InputError: as `AmortizedScorer.score`, or histories are to be encoded and there is no cache for them.
        """
        if not isinstance(asked, Ahead):
            return self.scorer.score(asked)
        if self.scorer.cache is None:
            raise InputError("histories are encoded ahead for a cache, and this server has none: give it cache_bytes")
        self.scorer.encode(asked.requests)
        return torch.empty(0, len(self.schema.labels))

    def refuse_malformed(self, asked: Requests | Ahead) -> None:
        """Refuse requests that cannot be read, without scoring any.

        Raises:
            InputError: as `AmortizedScorer.score`.
        """
        if not isinstance(asked, Ahead):
            self.scorer.warm_up(asked, times=0)


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

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.requests)


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of requests that came together.

    Args:
        logits_CT: of all candidates, in their order.
        num_candidates: of each request.
        version: the one that scored all of them; if two did, both, joined by a comma, the control's first.
        of_requests: if two did, the one that scored each request.
    """

    logits_CT: Tensor
    num_candidates: Sequence[int]
    version: str
    of_requests: Sequence[str] | None = None

    @property
    def versions(self) -> Sequence[str]:
        """The version that scored each request."""
        return self.of_requests or [self.version] * len(self.num_candidates)


class VersionRollout(RolloutOf[Requests | Ahead]):
    """A version that answers a share of the users, beside the one that answers all others.

    Requests are taken apart before either version reads them: each has tables, and so ids, of its own. What the
    treatment is compared with is its own impressions, without a cache.

    Args:
        control: the version that answers all others.
        treatment: the version that is rolled out.
        stage: whose requests go where.
        on_fault: called with the treatment's name and the reason when a fault has switched back.

    Example::

        monday, tuesday = (
            Version(name, AmortizedScorer(one, schema=schema)) for name, one in (("monday", old), ("tuesday", model))
        )
        rollout = VersionRollout(monday, tuesday, Stage("tuesday-1", share=0.1), on_fault=print)
        ((logits_CT, versions_B),) = rollout.score([test_table])
        rollout.close()
    """

    def __init__(
        self, control: Version, treatment: Version, stage: Stage, on_fault: Callable[[str, str], None]
    ) -> None:
        super().__init__(
            _Asked(control.schema),
            treatment.score,
            control=control.score,
            reference=self._reference,
            stage=stage,
            on_fault=lambda reason: on_fault(treatment.name, reason),
        )
        self.control, self.treatment = control, treatment
        self._tell = on_fault

    @property
    def names(self) -> list[str]:
        """Of the versions that answer, the control's first."""
        is_alone = self.share == 0 or self.switched_back is not None
        return [self.control.name] if is_alone else [self.control.name, self.treatment.name]

    def score(self, groups: Sequence[Requests | Ahead]) -> list[tuple[Tensor, list[str]]]:
        """Score groups of requests.

        Args:
            groups: each is scored by itself; if one raises, none is counted.

        Returns:
            list: of each group, its logits, and of each of its requests, the name of the version that scored it.

        Raises:
            InputError: a share of the users is to be served and a request does not tell its `user`; or as `Version`.
        """
        with torch.inference_mode():
            of_groups = [self._parts(asked) for asked in groups]
            scored = [self._joined(*group) for group in zip(groups, of_groups, strict=True)]
            for asked, parts in zip(groups, of_groups, strict=True):
                if not isinstance(asked, Ahead):
                    self._count(parts)
            return scored

    def at(self, stage: Stage) -> VersionRollout:
        """The same versions at another stage; what is switched back stays so."""
        rollout = VersionRollout(self.control, self.treatment, stage, self._tell)
        if self.switched_back is not None:
            rollout.switch_back(self.switched_back)
        return rollout

    def close(self) -> None:
        """Take no more samples, and let go of those that wait."""
        self.drop_samples()
        super().close()

    def goes_on(self, version: str) -> InputError:
        """Why another version may not answer now."""
        name = self.treatment.name
        return InputError(f"version {version!r}: {name!r} is being rolled out: complete it, or roll back, first")

    def refuse_other(self, version: str, stage: Stage | None = None) -> None:
        """Refuse what cannot be done while this version is rolled out.

        Args:
            version: that is to answer.
            stage: that it is to be at; everybody if None.

        Raises:
            InputError: it is another version, or one that was switched back, or in another experiment.
        """
        name = self.treatment.name
        if version != name:
            raise self.goes_on(version)
        if self.switched_back is not None:
            raise InputError(f"version {name!r}: was switched back: {self.switched_back}: roll back, and start again")
        if stage is not None and stage.experiment != self.experiment:
            raise InputError(
                f"version {name!r}: experiment is {stage.experiment!r}, but {self.experiment!r} is on, and users would "
                "change sides: give the same one, or roll back first"
            )

    def _parts(self, requests: Requests | Ahead) -> list[Part[Requests | Ahead]]:
        try:
            return super()._parts(requests)
        except InputError:
            # Told with the numbers that requests have among all, and not in the part that was refused.
            self.control.refuse_malformed(requests)
            raise

    def _joined(self, asked: Requests | Ahead, parts: Sequence[Part[Requests | Ahead]]) -> tuple[Tensor, list[str]]:
        names = {row: (self.treatment if part.is_treated else self.control).name for part in parts for row in part.rows}
        return self._put_together(asked, parts), [names[row] for row in range(len(asked))]

    def _refused(self, requests: Requests | Ahead, rows: Sequence[int]) -> list[Part[Requests | Ahead]]:
        # Requests of several users were put together: those that are well formed stay on their side.
        if len(rows) == 1:
            return super()._refused(requests, rows)
        alone = [self._by_treatment(self._kind.select(requests, [at]), [row]) for at, row in enumerate(rows)]
        return [part for parts in alone for part in parts]

    def _reference(self, asked: Requests | Ahead) -> Tensor:
        assert not isinstance(asked, Ahead)
        return self.treatment.scorer.score_impressions(asked)


class _Asked:
    """Requests as callers send them.

    Args:
        schema: of the control, which every request has to fit.
    """

    without_users = "requests: column 'user' is missing"

    def __init__(self, schema: RequestSchema) -> None:
        self._schema = schema

    def users(self, requests: Requests | Ahead) -> np.ndarray | None:
        asked = requests.requests if isinstance(requests, Ahead) else requests
        if not isinstance(asked, pa.Table):
            asked = table_of([{"user": row["user"]} for row in asked if "user" in row], self._schema)
        if asked.column_names.count("user") != 1 or len(asked) < len(requests):
            return None
        users: np.ndarray = typed_table(asked.select(["user"]), self._schema)["user"].to_numpy()
        return users

    def select(self, requests: Requests | Ahead, rows: Sequence[int]) -> Requests | Ahead:
        if isinstance(requests, Ahead):
            asked = self.select(requests.requests, rows)
            assert not isinstance(asked, Ahead)
            return Ahead(asked)
        return requests.take(rows) if isinstance(requests, pa.Table) else [requests[row] for row in rows]

    def num_candidates(self, requests: Requests | Ahead) -> list[int]:
        return _num_candidates(requests, self._schema)

    def sizes(self, requests: Requests | Ahead) -> str:
        size = f", {requests.nbytes} bytes" if isinstance(requests, pa.Table) else ""
        return f"{len(requests)} requests{size}"

    def refuse_malformed(self, requests: Requests | Ahead) -> None:
        """Rows of a table are requests, whatever they have."""


class Versions:
    """The version that answers, the one before it, to go back to, and one that is rolled out, if any.

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
        self._rollout: VersionRollout | None = None
        self._recorded: deque[Requests] = deque(maxlen=num_recorded)
        self._num_forgotten = 0
        self._lock = threading.Lock()

    @property
    def current(self) -> Version:
        """The version that answers; while another one is rolled out, its control."""
        return self._current

    @property
    def previous(self) -> Version | None:
        """The version that answered before, if it is there still."""
        return self._previous

    @property
    def rollout(self) -> VersionRollout | None:
        """The version that is rolled out, if one is, with whom it answers."""
        return self._rollout

    @property
    def treatment(self) -> Version | None:
        """The version that is rolled out itself."""
        rollout = self._rollout
        return None if rollout is None else rollout.treatment

    @property
    def names(self) -> list[str]:
        """Of the versions that answer; during a rollout there may be two, the control's first."""
        rollout = self._rollout
        return [self._current.name] if rollout is None else rollout.names

    def score(self, requests: Requests | Ahead) -> Scored:
        """Score requests by the version that answers, or each by that of its user.

        Args:
            requests: of its schema; or those whose histories are to be encoded, which have no scores yet.

        Raises:
            InputError: as `AmortizedScorer.score`; histories are to be encoded and there is no cache for them; or a
                share of the users is served by a version that is rolled out and a request does not tell its `user`.
        """
        (scored,) = self.score_together([requests])
        return scored

    def score_together(self, calls: Sequence[Requests | Ahead]) -> list[Scored]:
        """Score the requests of several calls as `score` does: together, where they have the same columns.

        Args:
            calls: see `score`.

        Returns:
            list: what `score` returns for each, to rounding.

        Raises:
            InputError: see `score`; a request's number is that among all.
        """
        version, rollout, num_forgotten = self._current, self._rollout, self._num_forgotten
        groups = _with_the_same_columns(calls)
        if rollout is None:
            answers = [(version.score(asked), [version.name] * len(asked)) for asked, _ in groups]
        else:
            answers = rollout.score([asked for asked, _ in groups])
        with self._lock:
            # Who was forgotten since may be whose request this is.
            if num_forgotten == self._num_forgotten:
                self._recorded.extend(call for call in calls if not isinstance(call, Ahead))
        scored: dict[int, Scored] = {}
        for (_, places), (logits_CT, versions_B) in zip(groups, answers, strict=True):
            of_calls = [calls[place] for place in places]
            scored |= zip(places, _of_each(of_calls, logits_CT, versions_B, version), strict=True)
        return [scored[place] for place in range(len(calls))]

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
                tasks; or another one is being rolled out.
        """
        current, rollout = self._current, self._rollout
        if rollout is not None:
            raise rollout.goes_on(version.name)
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
        with self._lock:
            self._refuse_late(prepared)
            self._current, self._previous = prepared.version, prepared.current

    def roll_out(self, prepared: Prepared, stage: Stage, on_fault: Callable[[str, str], None]) -> None:
        """Let a version answer some users, and the one that answers now all others, which is its control.

        Args:
            prepared: the version.
            stage: whose requests go where.
            on_fault: see `VersionRollout`; called by any thread.

        Raises:
            InputError: another one answers than when it was prepared, or is being rolled out.
        """
        rollout = VersionRollout(
            prepared.current, prepared.version, stage, partial(self._switched_back, on_fault=on_fault)
        )
        with self._lock:
            self._refuse_late(prepared)
            self._rollout = rollout

    def go_on(self, stage: Stage) -> None:
        """Bring the version that is rolled out to its next stage: samples that wait are dropped, counters begin anew.

        Args:
            stage: whose requests go where from now on.

        Raises:
            InputError: no version is being rolled out.
        """
        with self._lock:
            before = self._rolled_out()
            self._rollout = before.at(stage)
        before.close()

    def complete(self) -> Version:
        """Let the version that is rolled out answer everybody; its control is kept.

        Returns:
            Version: the one that answers now.

        Raises:
            InputError: no version is being rolled out.
        """
        with self._lock:
            rollout, self._rollout = self._rolled_out(), None
            self._current, self._previous = rollout.treatment, rollout.control
        rollout.close()
        return rollout.treatment

    def switch_back(self, version: str, reason: str) -> None:
        """Let the control answer everybody, if a version is still being rolled out.

        Args:
            version: its name.
            reason: what is logged, and told by the rollout.
        """
        with self._lock:
            rollout = self._rollout
            if rollout is not None and rollout.treatment.name == version:
                rollout.switch_back(reason)

    def roll_back(self) -> Version:
        """End a rollout; or let the version before answer again. The one that answered until now is not kept.

        Returns:
            Version: the one that answers now.

        Raises:
            InputError: there is none before.
        """
        with self._lock:
            rollout, self._rollout = self._rollout, None
            if rollout is None:
                if self._previous is None:
                    raise InputError(f"version {self._current.name!r}: there is none before it to roll back to")
                self._current, self._previous = self._previous, None
            current = self._current
        if rollout is not None:
            rollout.close()
        return current

    def forget(self, user: int) -> bool:
        """Remove every trace of a user from the caches of all versions, and from what was recorded or sampled.

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
            rollout = self._rollout
            all_of_them = (self._current, self._previous, self.treatment)
            versions = [version for version in all_of_them if version is not None]
        if rollout is not None:
            # First: to score a sample puts its history into the treatment's cache.
            rollout.drop_samples()
        for version in versions:
            if version.scorer.cache is not None:
                found |= version.scorer.cache.forget(user)
        return found

    def close(self) -> None:
        """Let go of the samples of a rollout that wait to be compared."""
        rollout = self._rollout
        if rollout is not None:
            rollout.close()

    def _rolled_out(self) -> VersionRollout:
        if self._rollout is None:
            raise InputError(f"version {self._current.name!r}: answers everybody: no other one is being rolled out")
        return self._rollout

    def _refuse_late(self, prepared: Prepared) -> None:
        """Refuse a version that was prepared to come after another one than that which answers."""
        name = prepared.version.name
        if self._rollout is not None:
            raise self._rollout.goes_on(name)
        if self._current is not prepared.current:
            raise InputError(f"version {name!r}: {self._current.name!r} came before it: switch once more")

    def _switched_back(self, version: str, reason: str, on_fault: Callable[[str, str], None]) -> None:
        # The fault may be one of a sample of the stage before.
        self.switch_back(version, reason)
        on_fault(version, reason)


def _with_the_same_columns(calls: Sequence[Requests | Ahead]) -> list[tuple[Requests | Ahead, list[int]]]:
    """Calls whose tables have the same columns as one, all others by themselves; with their places."""
    places: dict[pa.Schema | int, list[int]] = {}
    for place, call in enumerate(calls):
        places.setdefault(call.schema if isinstance(call, pa.Table) else place, []).append(place)
    groups = [[calls[place] for place in of_group] for of_group in places.values()]
    together = [group[0] if len(group) == 1 else pa.concat_tables(group) for group in groups]
    return list(zip(together, places.values(), strict=True))


def _of_each(
    calls: Sequence[Requests | Ahead], logits_CT: Tensor, versions_B: Sequence[str], current: Version
) -> list[Scored]:
    """The scores of each of several calls that were scored together; the current version's name comes first."""
    counts = [_num_candidates(call, current.schema) for call in calls]
    parts = logits_CT.split([sum(of_call) for of_call in counts])
    scored, start = [], 0
    for part, of_call in zip(parts, counts, strict=True):
        of_requests = versions_B[start : start + len(of_call)]
        start += len(of_call)
        names = sorted(set(of_requests), key=lambda name: name != current.name)
        version = ",".join(names) or current.name
        scored.append(Scored(part, of_call, version, of_requests if len(names) > 1 else None))
    return scored


def _num_candidates(requests: Requests | Ahead, schema: RequestSchema) -> list[int]:
    if isinstance(requests, Ahead):
        return [0] * len(requests)
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
