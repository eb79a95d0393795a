"""The plan: SQL that puts logs in the order of what was known when.

All that has to do with time is one shape: two logs are merged by key and instant, and a window tells, for each row of
the one, what of the other was before or after. What has the same instant comes after, so it never counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torchrec_amort.data.builder.config import BuildConfig, FeatureConfig
from torchrec_amort.data.builder.counted import acted, by, count_steps, counted_by, label_step, weights_step
from torchrec_amort.data.builder.histories import event_features, history_steps
from torchrec_amort.data.builder.sources import source_steps
from torchrec_amort.data.builder.steps import (
    MICROSECONDS,
    MICROSECONDS_PER_DAY,
    Check,
    Explode,
    Instant,
    Step,
    at_least,
    expression,
    key_of,
    quoted,
    table_of,
    whether,
)

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Span:
    """Which requests are made, and what is there already.

    Args:
        ends: the instants that end the splits train and validation.
        since: that of the first request to make; all if None.
        until: that of the first request that is not made; none if None.
        end: that after the last request that is there already.
        num_requests: that are there already.
        num_events: of each history, that are there already.
    """

    ends: tuple[int, int]
    since: int | None = None
    until: int | None = None
    end: int | None = None
    num_requests: int = 0
    num_events: Mapping[str, int] = field(default_factory=dict)


class Plan:
    """The steps from logs to rows of candidates in the order of their requests, and to events in that of their users.

    Args:
        config: what is built.
        span: of which requests.
        instant: of the engine.
    """

    def __init__(self, config: BuildConfig, span: Span, instant: Instant) -> None:
        self.config, self.span, self._instant = config, span, instant
        # When a request was, of a row of its source.
        self._time = "__time" if config.requests.gap is None else "__begin"
        self._shown = table_of(config.requests.source)
        if config.requests.gap is not None:
            self._shown += " JOIN begins ON __user = __whose AND __time = __at"
        self._columns = [quoted(name) for name in config.requests.id] or ["__user", self._time]
        self._ids = [f"__id{place}" for place in range(len(self._columns))]

    def features(self, side: str) -> dict[str, FeatureConfig]:
        """The features of requests or candidates, without counts."""
        return {
            name: feature
            for name, feature in self.config.features.items()
            if feature.side == side and name not in self.config.counts
        }

    def steps(self) -> Iterator[Step | Explode | Check]:
        """All tables, each after those that it reads, and what is checked of them.

        Raises:
            InputError: a source, column or history is named that there is not.
        """
        yield from source_steps(self.config, self._instant)
        yield from self._requests()
        for name in self.config.histories:
            first = self.span.num_events.get(name, 0)
            yield from history_steps(self.config, name, self.span.since is not None, first)
        if any(count.half_life is not None for count in self.config.counts.values()):
            yield weights_step()
        for name, count in self.config.counts.items():
            yield from count_steps(name, count, self.span.since)
        for name in self.config.labels:
            yield label_step(self.config, name, self._shown, self._time, self.span.since)

    def _requests(self) -> Iterator[Step | Explode | Check]:
        requests, source = self.config.requests, self._shown
        if requests.gap is not None:
            yield self._begins(requests.gap)
        if self.span.since is not None:
            between = f"{self._time} >= {self.span.end} AND {self._time} < {self.span.since}"
            yield Check(
                f"SELECT count(*) FROM {source} WHERE {between} HAVING count(*) > 0",
                "since: {0} candidates are after the last request that is there, and before it: give an earlier since",
            )
        yield self._rows(source)
        is_null = " OR ".join(f"{name} IS NULL" for name in self._ids)
        yield Check(
            f"SELECT count(*) FROM rows WHERE {is_null} HAVING count(*) > 0",
            f"requests.id: {', '.join(requests.id)} is null in {{0}} rows of {requests.source}: leave them out with "
            "where",
        )
        ids, shared = ", ".join(self._ids), self._of_requests
        values = [f"min({column}) AS {column}" for column in shared.values()]
        values += [f"max({column}) AS __most{place}" for place, column in enumerate(shared.values())]
        values += [f"count({column}) AS __known{place}" for place, column in enumerate(shared.values())]
        day = f"min(__time) // {MICROSECONDS_PER_DAY} AS __day"
        grouped = f"SELECT {ids}, {', '.join(values)}, count(*) AS __rows, {day} FROM rows GROUP BY {ids}"
        yield Step("grouped", grouped, True)
        for place, (told, column) in enumerate(shared.items()):
            yield Check(
                f"SELECT {self._ids[0]}, {column}, __most{place} FROM grouped WHERE {column} <> __most{place} OR "
                f"(__known{place} > 0 AND __known{place} < __rows) ORDER BY {ids} LIMIT 1",
                f"requests: rows of request {{0}} do not agree on {told}, which is {{1}} and {{2}}, or null: it is a "
                "feature of candidates, or requests.id does not tell requests apart",
            )
        # Numbers of requests in order of time, without putting all of them into one partition.
        before = f"CAST(sum(__n) OVER (ORDER BY __day) - __n AS BIGINT) + {self.span.num_requests}"
        yield Step(
            "days",
            f"SELECT __day, {before} AS __before FROM (SELECT __day, count(*) AS __n FROM grouped GROUP BY __day) AS d",
        )
        columns = [f"g.{column}" for column in (*self._ids, *shared.values())]
        train, validation = self.span.ends
        split = f"CASE WHEN g.__time < {train} THEN 0 WHEN g.__time < {validation} THEN 1 ELSE 2 END"
        order = ", ".join(f"g.{column}" for column in ("__time", *self._ids))
        number = f"CAST(d.__before + row_number() OVER (PARTITION BY g.__day ORDER BY {order}) - 1 AS BIGINT)"
        columns += [f"{split} AS __split", f"{number} AS request_id"]
        yield Step(
            "requests", f"SELECT {', '.join(columns)} FROM grouped AS g JOIN days AS d ON g.__day = d.__day", True
        )

    def _begins(self, gap: int) -> Step:
        """Of each instant at which a user was shown something, when the session began that it is of."""
        over = "OVER (PARTITION BY __user ORDER BY __time"
        instants = f"SELECT DISTINCT __user, __time FROM {table_of(self.config.requests.source)}"
        begins = (
            f"SELECT *, CASE WHEN __time - lag(__time) {over}) <= {gap * MICROSECONDS} THEN NULL ELSE __time END "
            f"AS __first FROM ({instants}) AS i"
        )
        latest = f"max(__first) {over} ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)"
        return Step("begins", f"SELECT __user AS __whose, __time AS __at, {latest} AS __begin FROM ({begins}) AS b")

    def _rows(self, source: str) -> Step:
        """The candidates, with all that other steps read of them."""
        columns = [f"{column} AS {name}" for column, name in zip(self._columns, self._ids, strict=True)]
        columns += ["__user", f"{self._time} AS __time"]
        columns += [f"{quoted(name)} AS {key_of(name)}" for name in self._keys]
        for name, count in self.config.counts.items():
            columns.append(f"{quoted(counted_by(name, count)[0])} AS {by(name)}")
        for name, label in self.config.labels.items():
            columns += [f"{quoted(mine)} AS {acted(name, place)}" for place, mine in enumerate(label.keys)]
        for name, feature in {**self.features("request"), **self.features("candidate")}.items():
            columns.append(f"{expression(feature.of or name)} AS {quoted(name)}")
        columns += [f"{quoted(name)} AS __order{place}" for place, name in enumerate(self.config.requests.order)]
        until = None if self.span.until is None else f"{self._time} < {self.span.until}"
        of_span = whether(at_least(self._time, self.span.since), until)
        return Step("rows", f"SELECT {', '.join(columns)} FROM {source}{of_span}", True)

    @property
    def _of_requests(self) -> dict[str, str]:
        """What rows of one request have alike, by what it is called in the config."""
        named = {"user": "__user", "time": "__time", **{name: key_of(name) for name in self._keys}}
        return named | {name: quoted(name) for name in self.features("request")}

    @property
    def _keys(self) -> list[str]:
        return list(dict.fromkeys(name for history in self.config.histories.values() for name in history.keys))

    def candidates(self) -> str:
        """Rows of candidates, request by request in order of time, with all that a request has."""
        columns = ["r.request_id", "r.__user", "r.__time", "r.__split"]
        columns += [f"r.{quoted(name)}" for name in self.features("request")]
        joins = []
        for place, name in enumerate(self.config.histories):
            table = f"h{place}"
            joins.append(f"LEFT JOIN {quoted(f'ends_{name}')} AS {table} ON r.request_id = {table}.request_id")
            columns += [f"coalesce({table}.__{end}, 0) AS {quoted(f'{name}_{end}')}" for end in ("seen", "stop")]
        candidate = [quoted(name) for name in self.features("candidate")]
        columns += [f"x.{name}" for name in candidate]
        for place, name in enumerate(self.config.counts):
            table = f"c{place}"
            same = f"x.{by(name)} = {table}.{by(name)} AND x.__time = {table}.__time"
            joins.append(f"LEFT JOIN {quoted(f'count_{name}')} AS {table} ON {same}")
            columns.append(f"coalesce({table}.__count, 0) AS {quoted(name)}")
        for place, (name, label) in enumerate(self.config.labels.items()):
            table = f"l{place}"
            keys = ["__user", *(acted(name, i) for i in range(len(label.keys))), "__time"]
            same = " AND ".join(f"x.{key} = {table}.{key}" for key in keys)
            joins.append(f"LEFT JOIN {quoted(f'label_{name}')} AS {table} ON {same}")
            columns.append(f"coalesce({table}.__label, 0.0) AS {quoted(name)}")
        same = " AND ".join(f"x.{i} = r.{i}" for i in self._ids)
        order = ["r.request_id", *(f"x.__order{place}" for place in range(len(self.config.requests.order)))]
        order += [f"x.{name}" for name in candidate]
        return (
            f"SELECT {', '.join(columns)} FROM rows AS x JOIN requests AS r ON {same} {' '.join(joins)} "
            f"ORDER BY {', '.join(order)}"
        )

    def vocabulary(self, table: str) -> str:
        """The ids of a table that are in train often enough, the most frequent first."""
        parts, train = [], self.span.ends[0]
        of_events = {name for history in self.config.histories for name in event_features(self.config, history)}
        for name, feature in self.config.features.items():
            if (feature.table or name) != table or feature.kind not in ("id", "ids"):
                continue
            value = f"unnest({quoted(name)})" if feature.kind == "ids" else quoted(name)
            if name in of_events:
                events = quoted(f"events_{feature.history}")
                parts.append(f"SELECT {value} AS __value FROM {events} WHERE __available < {train}")
            else:
                parts.append(f"SELECT {value} AS __value FROM rows WHERE __time < {train}")
        counted = f"SELECT __value, count(*) AS __n FROM ({' UNION ALL '.join(parts)}) AS v GROUP BY __value"
        return (
            f"SELECT __value FROM ({counted}) AS c WHERE __value IS NOT NULL AND "
            f"__n >= {self.config.vocabularies.get(table, 1)} ORDER BY __n DESC, __value"
        )


def tables_of(config: BuildConfig) -> Mapping[str, FeatureConfig]:
    """The first feature of each table with vocabulary `file`."""
    tables: dict[str, FeatureConfig] = {}
    for name, feature in config.features.items():
        if feature.vocabulary == "file":
            tables.setdefault(feature.table or name, feature)
    return tables
