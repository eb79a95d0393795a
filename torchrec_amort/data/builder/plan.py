"""The plan: SQL that puts logs in the order of what was known when.

It is written once, in DuckDB's dialect and of what all engines have; others get it translated. Instants are int64
microseconds since 1970 UTC. Names of its own start with two underscores.

All that has to do with time is one shape: two logs are merged by key and instant, and a window of running sums tells,
for each row of the one, how many rows of the other were available before. What has the same instant comes after, so it
never counts. A history is then the last rows before a place in the events of its user, and a count is that place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torchrec_amort.data.builder.config import (
    ActionConfig,
    BuildConfig,
    CountConfig,
    EventsConfig,
    FeatureConfig,
    JoinConfig,
    Unit,
)
from torchrec_amort.errors import InputError

MICROSECONDS = 1_000_000
MICROSECONDS_PER = {"s": MICROSECONDS, "ms": 1000, "us": 1}
SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = 86_400
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Step:
    """A table of the plan.

    Args:
        name: of the table.
        sql: its rows.
        kept: whether the engine works it out once, because several steps read it.
    """

    name: str
    sql: str
    kept: bool = False


@dataclass(frozen=True)
class Explode:
    """A table whose columns of lists are opened side by side: a row for each entry.

    Args:
        name: of the table.
        of: the table that has the lists.
        columns: the lists.
    """

    name: str
    of: str
    columns: Sequence[str]


@dataclass(frozen=True)
class Check:
    """Rows that there must not be.

    Args:
        sql: gives one of them, if there is one.
        what: what is wrong with it, and what to do; `{0}` and on are its values.
    """

    sql: str
    what: str


def quoted(name: str) -> str:
    """A name as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


def expression(given: str) -> str:
    """An SQL expression of the config; the name of a column may be any word."""
    is_name = re.fullmatch(r"[^\W\d]\w*", given) and given.lower() not in ("true", "false", "null")
    return quoted(given) if is_name else given


class Instant(Protocol):
    """SQL of an engine: the microseconds since 1970 UTC of a time."""

    def __call__(self, expression: str, unit: Unit, zone: str) -> str:
        """The SQL of it, int64."""


class Plan:
    """The steps from logs to rows of candidates in the order of their requests, and to events in that of their users.

    Args:
        config: what is built.
        until: the instants that end the splits train and validation.
        instant: of the engine.

    Raises:
        InputError: a source, column or history is named that there is not.
    """

    def __init__(self, config: BuildConfig, until: Sequence[int], instant: Instant) -> None:
        self.config, self._instant = config, instant
        self.until = until
        self._refuse_names()
        self._ids = [f"__id{place}" for place in range(len(self._id_expressions))]

    def _refuse_names(self) -> None:
        config = self.config
        named = {"requests.source": config.requests.source}
        named |= {f"labels.{name}.source": label.source for name, label in config.labels.items()}
        named |= {f"counts.{name}.source": count.source for name, count in config.counts.items()}
        for name, history in config.histories.items():
            named |= {f"histories.{name}.events[{i}].source": part.source for i, part in enumerate(history.events)}
        for name, source in config.sources.items():
            named |= {f"sources.{name}.join[{i}].source": join.source for i, join in enumerate(source.join)}
        for where, source_name in named.items():
            if source_name not in config.sources:
                raise InputError(f"{where} is {source_name!r}, but the sources are {list(config.sources)}")
        for where, source_name in named.items():
            source = config.sources[source_name]
            if ".join[" not in where and source.time is None:
                raise InputError(f"{where} is {source_name!r}, which has no time: give sources.{source_name}.time")
            if ".join[" not in where and not where.startswith("counts.") and source.user is None:
                raise InputError(f"{where} is {source_name!r}, which has no user: give sources.{source_name}.user")
        for name, feature in config.features.items():
            if feature.side == "event" and feature.history not in config.histories:
                raise InputError(
                    f"features.{name}: no history {feature.history!r}; the histories are {list(config.histories)}"
                )

    @property
    def _id_expressions(self) -> list[str]:
        return [quoted(name) for name in self.config.requests.id] or ["__user", "__time"]

    def features(self, side: str, history: str | None = None) -> dict[str, FeatureConfig]:
        """The features of a side, or of the events of a history."""
        return {
            name: feature
            for name, feature in self.config.features.items()
            if feature.side == side and (history is None or feature.history == history)
        }

    # ----- sources ----------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[Step | Explode | Check]:
        """All tables, each after those that it reads, and what is checked of them."""
        for name in self._ordered_sources():
            yield from self._source(name)
        yield from self._requests()
        for name in self.config.histories:
            yield from self._history(name)
        for name, count in self.config.counts.items():
            yield from self._count(name, count)
        for name, label in self.config.labels.items():
            yield self._label(name, label)

    def _ordered_sources(self) -> list[str]:
        """The sources, each after those that it joins."""
        ordered: list[str] = []

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                raise InputError(f"sources.{name}: joins itself, by {' -> '.join((*path, name))}")
            if name not in ordered:
                for join in self.config.sources[name].join:
                    visit(join.source, (*path, name))
                ordered.append(name)

        for name in self.config.sources:
            visit(name, ())
        return ordered

    def _source(self, name: str) -> Iterator[Step | Explode | Check]:
        source = self.config.sources[name]
        columns = [f"{expression(value)} AS {quoted(column)}" for column, value in source.columns.items()]
        raw = f"raw_{name}"
        if source.explode:
            yield from (_same_lengths(name, source.explode[0], other) for other in source.explode[1:])
            yield Explode(f"exploded_{name}", raw, source.explode)
            raw = f"exploded_{name}"
        sql = f"SELECT {', '.join(['*', *columns])} FROM {quoted(raw)}"
        own = []
        if source.user is not None:
            own.append(f"{expression(source.user)} AS __user")
        if source.time is not None:
            time, known = (
                self._instant(expression(value), source.unit, source.zone)
                for value in (source.time, source.available or source.time)
            )
            own += [f"{time} AS __time", f"{known} + {source.delay * MICROSECONDS} AS __available"]
        if own:
            sql = f"SELECT *, {', '.join(own)} FROM ({sql}) AS s"
        for join in source.join:
            yield self._one_row_for_each_key(name, join)
            sql = self._joined(sql, join)
        if source.where is not None:
            sql = f"SELECT * FROM ({sql}) AS s WHERE {source.where}"
        yield Step(_source(name), sql)
        for column, told in (("__user", "user"), ("__time", "time"), ("__available", "available")):
            if f" AS {column}" in " ".join(own):
                yield Check(
                    f"SELECT count(*) FROM {quoted(_source(name))} WHERE {column} IS NULL HAVING count(*) > 0",
                    f"sources.{name}: {told} is null in {{0}} rows: leave them out with where",
                )

    def _one_row_for_each_key(self, name: str, join: JoinConfig) -> Check:
        keys = ", ".join(quoted(key) for key in join.keys.values())
        valid = ", __available" if self.config.sources[join.source].time is not None else ""
        return Check(
            f"SELECT count(*), {keys} FROM {quoted(_source(join.source))} GROUP BY {keys}{valid} HAVING count(*) > 1 "
            f"ORDER BY {keys} LIMIT 1",
            f"sources.{name}.join: {{0}} rows of {join.source} have {', '.join(join.keys.values())} {{1}}: keep one "
            "for each, or give the time from which on each is valid",
        )

    def _joined(self, sql: str, join: JoinConfig) -> str:
        keys = [f"{quoted(key)} AS __key{i}" for i, key in enumerate(join.keys.values())]
        taken = [f"{expression(value)} AS {quoted(column)}" for column, value in join.columns.items()]
        on = [f"s.{quoted(mine)} = j.__key{i}" for i, mine in enumerate(join.keys)]
        table = quoted(_source(join.source))
        if self.config.sources[join.source].time is not None:
            partition = ", ".join(quoted(key) for key in join.keys.values())
            until = f"lead(__available) OVER (PARTITION BY {partition} ORDER BY __available)"
            taken += ["__available AS __from", f"{until} AS __until"]
            on += ["j.__from < s.__time", "(j.__until >= s.__time OR j.__until IS NULL)"]
        rows = f"SELECT {', '.join([*keys, *taken])} FROM {table}"
        columns = ", ".join(["s.*", *(f"j.{quoted(column)}" for column in join.columns)])
        return f"SELECT {columns} FROM ({sql}) AS s LEFT JOIN ({rows}) AS j ON {' AND '.join(on)}"

    # ----- requests ---------------------------------------------------------------------------------------------------

    def _requests(self) -> Iterator[Step | Explode | Check]:
        yield self._rows()
        is_null = " OR ".join(f"{name} IS NULL" for name in self._ids)
        yield Check(
            f"SELECT count(*) FROM rows WHERE {is_null} HAVING count(*) > 0",
            f"requests.id: {', '.join(self.config.requests.id)} is null in {{0}} rows of "
            f"{self.config.requests.source}: leave them out with where",
        )
        ids, shared = ", ".join(self._ids), self._of_requests
        values = [f"min({column}) AS {column}" for column in shared.values()]
        values += [f"max({column}) AS __most{place}" for place, column in enumerate(shared.values())]
        values += [f"count({column}) AS __known{place}" for place, column in enumerate(shared.values())]
        day = f"CAST(floor(min(__time) / {MICROSECONDS * SECONDS_PER_DAY}) AS BIGINT) AS __day"
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
        yield Step(
            "days",
            "SELECT __day, CAST(sum(__n) OVER (ORDER BY __day) - __n AS BIGINT) AS __before "
            "FROM (SELECT __day, count(*) AS __n FROM grouped GROUP BY __day) AS d",
        )
        columns = [f"g.{column}" for column in (*self._ids, *shared.values())]
        split = f"CASE WHEN g.__time < {self.until[0]} THEN 0 WHEN g.__time < {self.until[1]} THEN 1 ELSE 2 END"
        order = ", ".join(f"g.{column}" for column in ("__time", *self._ids))
        number = f"CAST(d.__before + row_number() OVER (PARTITION BY g.__day ORDER BY {order}) - 1 AS BIGINT)"
        columns += [f"{split} AS __split", f"{number} AS request_id"]
        yield Step(
            "requests", f"SELECT {', '.join(columns)} FROM grouped AS g JOIN days AS d ON g.__day = d.__day", True
        )

    def _rows(self) -> Step:
        """The candidates, with all that other steps read of them."""
        requests = self.config.requests
        columns = [f"{value} AS {name}" for value, name in zip(self._id_expressions, self._ids, strict=True)]
        columns += ["__user", "__time", *(f"{quoted(name)} AS {_on(name)}" for name in self._on_columns)]
        columns += [f"{quoted(key)} AS {_by(name)}" for name, (key, _) in self._counted.items()]
        for name, label in self.config.labels.items():
            columns += [f"{quoted(mine)} AS {_acted(name, place)}" for place, mine in enumerate(label.keys)]
        for name, feature in {**self.features("request"), **self.features("candidate")}.items():
            if name not in self.config.counts:
                columns.append(f"{expression(feature.of or name)} AS {quoted(name)}")
        columns += [f"{quoted(name)} AS __order{place}" for place, name in enumerate(requests.order)]
        return Step("rows", f"SELECT {', '.join(columns)} FROM {quoted(_source(requests.source))}", True)

    @property
    def _of_requests(self) -> dict[str, str]:
        """What rows of one request have alike, by what it is called in the config."""
        named = {"user": "__user", "time": "__time", **{name: _on(name) for name in self._on_columns}}
        return named | {name: quoted(name) for name in self.features("request")}

    @property
    def _on_columns(self) -> list[str]:
        return list(dict.fromkeys(name for history in self.config.histories.values() for name in history.keys))

    @property
    def _counted(self) -> dict[str, tuple[str, str]]:
        """Of each count, the column of candidates and what it equals."""
        counted = {}
        for name, count in self.config.counts.items():
            if len(count.by) != 1:
                raise InputError(f"counts.{name}.by names {len(count.by)} columns: name one of candidates")
            counted[name] = next((key, expression(value)) for key, value in count.by.items())
        return counted

    # ----- histories --------------------------------------------------------------------------------------------------

    def _history(self, name: str) -> Iterator[Step]:
        history = self.config.histories[name]
        keys = ["__user", *map(_on, history.keys)]
        parts = [self._part(name, part, place) for place, part in enumerate(history.events)]
        yield Step(f"events_{name}", " UNION ALL ".join(parts), True)
        events = quoted(f"events_{name}")
        partition = ", ".join(keys)
        yield Step(
            f"starts_{name}",
            f"SELECT {partition}, CAST(sum(__n) OVER (ORDER BY {partition}) - __n AS BIGINT) AS __start "
            f"FROM (SELECT {partition}, count(*) AS __n FROM {events} GROUP BY {partition}) AS k",
        )
        merged = (
            f"SELECT {partition}, __time AS __at, 0 AS __is_event, request_id FROM requests UNION ALL "
            f"SELECT {partition}, __available, 1, NULL FROM {events}"
        )
        same = " AND ".join(f"m.{key} = k.{key}" for key in keys)
        yield Step(
            f"ends_{name}",
            f"SELECT m.request_id, m.__seen, m.__seen + k.__start AS __stop FROM ({_seen(merged, partition)}) AS m "
            f"JOIN {quoted(f'starts_{name}')} AS k ON {same} WHERE m.__is_event = 0 AND m.__seen > 0",
            True,
        )

    def _part(self, name: str, part: EventsConfig, place: int) -> str:
        history = self.config.histories[name]
        columns = ["__user", *(f"{quoted(on)} AS {_on(on)}" for on in history.keys), "__time", "__available"]
        columns += [f"{place} AS __part", *(f"{quoted(order)} AS __order{i}" for i, order in enumerate(history.order))]
        for feature_name, feature in self.features("event", name).items():
            own_time = f"__time // {MICROSECONDS}" if feature.kind in ("age", "gap") else quoted(feature_name)
            given = part.columns.get(feature_name) or feature.of
            columns.append(f"{expression(given) if given else own_time} AS {quoted(feature_name)}")
        where = f" WHERE {part.where}" if part.where else ""
        return f"SELECT {', '.join(columns)} FROM {quoted(_source(part.source))}{where}"

    def events(self, name: str) -> str:
        """The events of a history, user by user, in the order in which they became available."""
        history = self.config.histories[name]
        features = [quoted(feature) for feature in self.features("event", name)]
        order = ["__user", *map(_on, history.keys), "__available", "__time", "__part"]
        order += [f"__order{place}" for place in range(len(history.order))]
        return f"SELECT {', '.join(features)} FROM {quoted(f'events_{name}')} ORDER BY {', '.join([*order, *features])}"

    # ----- counts and labels ------------------------------------------------------------------------------------------

    def _count(self, name: str, count: CountConfig) -> Iterator[Step]:
        key, by = _by(name), self._counted[name][1]
        where = f" WHERE {count.where}" if count.where else ""
        asked = f"SELECT DISTINCT {key}, __time FROM rows WHERE {key} IS NOT NULL"
        span = None if count.hours is None else round(count.hours * SECONDS_PER_HOUR * MICROSECONDS)
        merged = f"SELECT {key}, __time AS __at, 0 AS __is_event FROM ({asked}) AS a"
        if span is not None:
            merged += f" UNION ALL SELECT {key}, __time - {span}, 0 FROM ({asked}) AS b"
        merged += f" UNION ALL SELECT {by}, __available, 1 FROM {quoted(_source(count.source))}{where}"
        seen = f"SELECT DISTINCT {key}, __at, __seen FROM ({_seen(merged, key)}) AS m WHERE __is_event = 0"
        yield Step(f"seen_{name}", seen, span is not None)
        if span is None:
            sql = f"SELECT {key}, __at AS __time, __seen AS __count FROM {quoted(f'seen_{name}')}"
        else:
            sql = (
                f"SELECT now.{key}, now.__at AS __time, now.__seen - past.__seen AS __count "
                f"FROM {quoted(f'seen_{name}')} AS now JOIN {quoted(f'seen_{name}')} AS past "
                f"ON now.{key} = past.{key} AND now.__at - {span} = past.__at"
            )
        yield Step(f"count_{name}", sql)

    def _label(self, name: str, label: ActionConfig) -> Step:
        keys = ["__user", *(_acted(name, place) for place in range(len(label.keys)))]
        partition = ", ".join(keys)
        where = f" WHERE {label.where}" if label.where else ""
        merged = (
            f"SELECT DISTINCT {partition}, __time AS __at, 0 AS __is_action FROM rows UNION ALL "
            f"SELECT {', '.join(['__user', *map(expression, label.keys.values())])}, __time, 1 "
            f"FROM {quoted(_source(label.source))}{where}"
        )
        following = (
            f"min(CASE WHEN __is_action = 1 THEN __at END) OVER (PARTITION BY {partition} ORDER BY __at, __is_action "
            "ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING)"
        )
        followed = f"SELECT {partition}, __at, __is_action, {following} AS __next FROM ({merged}) AS m"
        within = label.within * MICROSECONDS
        return Step(
            f"label_{name}",
            f"SELECT {partition}, __at AS __time, CASE WHEN __next - __at <= {within} THEN 1.0 ELSE 0.0 END AS __label "
            f"FROM ({followed}) AS f WHERE __is_action = 0",
        )

    # ----- what comes out ---------------------------------------------------------------------------------------------

    def candidates(self) -> str:
        """Rows of candidates, request by request in order of time, with all that a request has."""
        columns = ["r.request_id", "r.__user", "r.__time", "r.__split"]
        columns += [f"r.{quoted(name)}" for name in self.features("request")]
        joins = []
        for place, name in enumerate(self.config.histories):
            table = f"h{place}"
            joins.append(f"LEFT JOIN {quoted(f'ends_{name}')} AS {table} ON r.request_id = {table}.request_id")
            columns += [f"coalesce({table}.__{end}, 0) AS {quoted(f'{name}_{end}')}" for end in ("seen", "stop")]
        candidate = [name for name in self.features("candidate") if name not in self.config.counts]
        columns += [f"x.{quoted(name)}" for name in candidate]
        for place, name in enumerate(self.config.counts):
            table = f"c{place}"
            same = f"x.{_by(name)} = {table}.{_by(name)} AND x.__time = {table}.__time"
            joins.append(f"LEFT JOIN {quoted(f'count_{name}')} AS {table} ON {same}")
            columns.append(f"coalesce({table}.__count, 0) AS {quoted(name)}")
        for place, (name, label) in enumerate(self.config.labels.items()):
            table = f"l{place}"
            keys = ["__user", *(_acted(name, i) for i in range(len(label.keys))), "__time"]
            same = " AND ".join(f"x.{key} = {table}.{key}" for key in keys)
            joins.append(f"LEFT JOIN {quoted(f'label_{name}')} AS {table} ON {same}")
            columns.append(f"coalesce({table}.__label, 0.0) AS {quoted(name)}")
        same = " AND ".join(f"x.{i} = r.{i}" for i in self._ids)
        order = ["r.request_id", *(f"x.__order{place}" for place in range(len(self.config.requests.order)))]
        order += [f"x.{quoted(name)}" for name in candidate]
        return (
            f"SELECT {', '.join(columns)} FROM rows AS x JOIN requests AS r ON {same} {' '.join(joins)} "
            f"ORDER BY {', '.join(order)}"
        )

    def lengths(self, name: str) -> str:
        """How many events each request could know of a history."""
        return (
            f"SELECT coalesce(h.__seen, 0) AS __seen FROM requests AS r LEFT JOIN {quoted(f'ends_{name}')} AS h "
            "ON r.request_id = h.request_id"
        )

    def same_instant(self, name: str) -> str:
        """How many requests have events of a history that became available at their very instant."""
        keys = ["__user", *map(_on, self.config.histories[name].keys)]
        events = f"SELECT DISTINCT {', '.join(keys)}, __available FROM {quoted(f'events_{name}')}"
        same = " AND ".join(f"r.{key} = e.{key}" for key in keys)
        return f"SELECT count(*) FROM requests AS r JOIN ({events}) AS e ON {same} AND r.__time = e.__available"

    def late(self, name: str) -> str:
        """How many events of a history became available after they had happened."""
        return f"SELECT count(*) FROM {quoted(f'events_{name}')} WHERE __available > __time"

    def unfinished(self, name: str) -> str:
        """How many requests are so late that the log of a label's actions ends before its time is up."""
        label = self.config.labels[name]
        last = f"SELECT max(__time) FROM {quoted(_source(label.source))}"
        return f"SELECT count(*) FROM requests WHERE __time + {label.within * MICROSECONDS} > ({last})"

    def vocabulary(self, table: str) -> str:
        """The ids of a table that are in train often enough, the most frequent first."""
        parts = []
        for name, feature in self.config.features.items():
            if (feature.table or name) != table or feature.kind not in ("id", "ids"):
                continue
            value = f"unnest({quoted(name)})" if feature.kind == "ids" else quoted(name)
            if feature.side == "event":
                events = quoted(f"events_{feature.history}")
                parts.append(f"SELECT {value} AS __value FROM {events} WHERE __available < {self.until[0]}")
            else:
                parts.append(f"SELECT {value} AS __value FROM rows WHERE __time < {self.until[0]}")
        counted = f"SELECT __value, count(*) AS __n FROM ({' UNION ALL '.join(parts)}) AS v GROUP BY __value"
        return (
            f"SELECT __value FROM ({counted}) AS c WHERE __value IS NOT NULL AND "
            f"__n >= {self.config.vocabularies.get(table, 1)} ORDER BY __n DESC, __value"
        )


def _same_lengths(name: str, first: str, other: str) -> Check:
    lengths = [f"array_length({quoted(column)})" for column in (first, other)]
    is_wrong = f"{lengths[0]} <> {lengths[1]} OR ({quoted(first)} IS NULL) <> ({quoted(other)} IS NULL)"
    return Check(
        f"SELECT {', '.join(lengths)} FROM {quoted(f'raw_{name}')} WHERE {is_wrong} LIMIT 1",
        f"sources.{name}: explode opens {first} and {other} side by side, but a row has {{0}} and {{1}} entries: mend "
        "the source, or leave one out",
    )


def _seen(merged: str, partition: str) -> str:
    """Of each row of a merged log, how many events came before: of one instant, the rows that ask come first."""
    window = f"PARTITION BY {partition} ORDER BY __at, __is_event ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW"
    return f"SELECT *, CAST(sum(__is_event) OVER ({window}) AS BIGINT) AS __seen FROM ({merged}) AS a"


def _source(name: str) -> str:
    return f"source_{name}"


def _on(name: str) -> str:
    return quoted(f"__on_{name}")


def _by(name: str) -> str:
    return quoted(f"__by_{name}")


def _acted(name: str, place: int) -> str:
    return quoted(f"__acted_{place}_{name}")


def tables_of(config: BuildConfig) -> Mapping[str, FeatureConfig]:
    """The first feature of each table with vocabulary `file`."""
    tables: dict[str, FeatureConfig] = {}
    for name, feature in config.features.items():
        if feature.vocabulary == "file":
            tables.setdefault(feature.table or name, feature)
    return tables
