"""The steps from raw tables to sources: columns, joins as of a time, whose rows they are and when they were known."""

from __future__ import annotations

from collections.abc import Iterator

from torchrec_amort.data.builder.config import BuildConfig, JoinConfig
from torchrec_amort.data.builder.steps import MICROSECONDS, Check, Explode, Instant, Step, expression, quoted, table_of
from torchrec_amort.errors import InputError


def source_steps(config: BuildConfig, instant: Instant) -> Iterator[Step | Explode | Check]:
    """All sources, each after those that it joins, and what is checked of them.

    Args:
        config: what is built.
        instant: of the engine.

    Raises:
        InputError: a source joins itself, or is asked for something that it does not tell.
    """
    _refuse_names(config)
    for name in _ordered(config):
        yield from _source(config, name, instant)


def _refuse_names(config: BuildConfig) -> None:
    """Refuse what names a source that there is not, or that does not tell whose its rows are, or of when."""
    timed = {"requests.source": config.requests.source}
    timed |= {f"labels.{name}.source": label.source for name, label in config.labels.items()}
    for name, history in config.histories.items():
        timed |= {f"histories.{name}.events[{i}].source": part.source for i, part in enumerate(history.events)}
    owned = set(timed)
    timed |= {f"counts.{name}.source": count.source for name, count in config.counts.items()}
    named = dict(timed)
    for name, source in config.sources.items():
        named |= {f"sources.{name}.join[{i}].source": join.source for i, join in enumerate(source.join)}
    for where, source_name in named.items():
        if source_name not in config.sources:
            raise InputError(f"{where} is {source_name!r}, but the sources are {list(config.sources)}")
        source = config.sources[source_name]
        if where in timed and source.time is None:
            raise InputError(f"{where} is {source_name!r}, which has no time: give sources.{source_name}.time")
        if where in owned and source.user is None:
            raise InputError(f"{where} is {source_name!r}, which has no user: give sources.{source_name}.user")
    for name, feature in config.features.items():
        if feature.side == "event" and feature.history not in config.histories:
            raise InputError(
                f"features.{name}: no history {feature.history!r}; the histories are {list(config.histories)}"
            )


def _ordered(config: BuildConfig) -> list[str]:
    ordered: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise InputError(f"sources.{name}: joins itself, by {' -> '.join((*path, name))}")
        if name not in ordered:
            for join in config.sources[name].join:
                visit(join.source, (*path, name))
            ordered.append(name)

    for name in config.sources:
        visit(name, ())
    return ordered


def _source(config: BuildConfig, name: str, instant: Instant) -> Iterator[Step | Explode | Check]:
    source = config.sources[name]
    columns = [f"{expression(value)} AS {quoted(column)}" for column, value in source.columns.items()]
    raw = f"raw_{name}"
    if source.explode:
        yield from (_same_lengths(name, source.explode[0], other) for other in source.explode[1:])
        yield Explode(f"exploded_{name}", raw, source.explode)
        raw = f"exploded_{name}"
    sql = f"SELECT {', '.join(['*', *columns])} FROM {quoted(raw)}"
    own = {}
    if source.user is not None:
        own["user"] = expression(source.user)
    if source.time is not None:
        own["time"] = instant(expression(source.time), source.unit, source.zone)
        known = instant(expression(source.available or source.time), source.unit, source.zone)
        own["available"] = f"{known} + {source.delay * MICROSECONDS}"
    if own:
        added = ", ".join(f"{value} AS __{told}" for told, value in own.items())
        sql = f"SELECT *, {added} FROM ({sql}) AS s"
    for join in source.join:
        yield _one_row_for_each_key(config, name, join)
        sql = _joined(config, sql, join)
    yield Step(f"source_{name}", sql if source.where is None else f"SELECT * FROM ({sql}) AS s WHERE {source.where}")
    for told in own:
        yield Check(
            f"SELECT count(*) FROM {table_of(name)} WHERE __{told} IS NULL HAVING count(*) > 0",
            f"sources.{name}: {told} is null in {{0}} rows: leave them out with where",
        )


def _one_row_for_each_key(config: BuildConfig, name: str, join: JoinConfig) -> Check:
    keys = ", ".join(quoted(key) for key in join.keys.values())
    valid = ", __available" if config.sources[join.source].time is not None else ""
    return Check(
        f"SELECT count(*), {keys} FROM {table_of(join.source)} GROUP BY {keys}{valid} HAVING count(*) > 1 "
        f"ORDER BY {keys} LIMIT 1",
        f"sources.{name}.join: {{0}} rows of {join.source} have {', '.join(join.keys.values())} {{1}}: keep one "
        "for each, or give the time from which on each is valid",
    )


def _joined(config: BuildConfig, sql: str, join: JoinConfig) -> str:
    keys = [f"{quoted(key)} AS __key{i}" for i, key in enumerate(join.keys.values())]
    taken = [f"{expression(value)} AS {quoted(column)}" for column, value in join.columns.items()]
    on = [f"s.{quoted(mine)} = j.__key{i}" for i, mine in enumerate(join.keys)]
    if config.sources[join.source].time is not None:
        partition = ", ".join(quoted(key) for key in join.keys.values())
        until = f"lead(__available) OVER (PARTITION BY {partition} ORDER BY __available)"
        taken += ["__available AS __from", f"{until} AS __until"]
        on += ["j.__from < s.__time", "(j.__until >= s.__time OR j.__until IS NULL)"]
    rows = f"SELECT {', '.join([*keys, *taken])} FROM {table_of(join.source)}"
    columns = ", ".join(["s.*", *(f"j.{quoted(column)}" for column in join.columns)])
    return f"SELECT {columns} FROM ({sql}) AS s LEFT JOIN ({rows}) AS j ON {' AND '.join(on)}"


def _same_lengths(name: str, first: str, other: str) -> Check:
    lengths = [f"array_length({quoted(column)})" for column in (first, other)]
    is_wrong = f"{lengths[0]} <> {lengths[1]} OR ({quoted(first)} IS NULL) <> ({quoted(other)} IS NULL)"
    return Check(
        f"SELECT {', '.join(lengths)} FROM {quoted(f'raw_{name}')} WHERE {is_wrong} LIMIT 1",
        f"sources.{name}: explode opens {first} and {other} side by side, but a row has {{0}} and {{1}} entries: mend "
        "the source, or leave one out",
    )
