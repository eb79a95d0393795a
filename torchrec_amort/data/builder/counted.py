"""The steps that count what was before a request, and tell what followed it.

Both are the shape of histories: two logs merged by key and instant, and a window over them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchrec_amort.data.builder.config import BuildConfig, CountConfig
from torchrec_amort.data.builder.histories import seen
from torchrec_amort.data.builder.steps import (
    MICROSECONDS,
    MICROSECONDS_PER_HOUR,
    Step,
    at_least,
    expression,
    quoted,
    table_of,
    up_to_now,
    whether,
)
from torchrec_amort.errors import InputError

# Decay goes by 64ths of a half-life. Weights are integers, so that their sums are the same in any order, and below
# 2**53, so that they are the same as float64: a block of 16 half-lives, in which weights grow from 2**12 to 2**28, and
# the block before, whose weights count 2**16 times less.
TICKS, HALF_LIVES = 64, 16
BLOCK = TICKS * HALF_LIVES
UNIT = 2**12


def weight(tick: int) -> int:
    """What counts at a tick of its block, in units of what counts at the block's begin."""
    return round(UNIT * 2 ** (tick / TICKS))


def weights_step() -> Step:
    """The weights of the ticks of a block, which all decayed counts read."""
    weights = ", ".join(f"({place}, {weight(place)})" for place in range(BLOCK))
    return Step("weights", f"SELECT * FROM (VALUES {weights}) AS w(__place, __weight)", True)


def by(name: str) -> str:
    """The column of candidates that a count goes by."""
    return quoted(f"__by_{name}")


def counted_by(name: str, count: CountConfig) -> tuple[str, str]:
    """The column of candidates that a count goes by, and the SQL of the log's that it equals.

    Raises:
        InputError: there is not one, or the count is both of some hours and decayed.
    """
    if len(count.by) != 1:
        raise InputError(f"counts.{name}.by names {len(count.by)} columns: name one of candidates")
    if count.hours is not None and count.half_life is not None:
        raise InputError(f"counts.{name}: hours is {count.hours} and half_life {count.half_life}: give one of them")
    ((mine, other),) = count.by.items()
    return mine, expression(other)


def count_steps(name: str, count: CountConfig, since: int | None) -> Iterator[Step]:
    """A count, by candidates' key and time.

    Args:
        name: of the count.
        count: what it counts.
        since: the instant of the first request, if there are earlier ones: what is too old for it is not read.
    """
    key = by(name)
    asked = f"SELECT DISTINCT {key}, __time FROM rows WHERE {key} IS NOT NULL"
    log = f"SELECT {counted_by(name, count)[1]} AS {key}, __available AS __at FROM {table_of(count.source)}"
    span = None if count.hours is None else round(count.hours * MICROSECONDS_PER_HOUR)
    tick = None if count.half_life is None else max(1, round(count.half_life * MICROSECONDS_PER_HOUR / TICKS))
    oldest = span if tick is None else 2 * BLOCK * tick
    log += whether(count.where, at_least("__available", None if since is None or oldest is None else since - oldest))
    if tick is not None:
        yield from _decayed(name, asked, log, tick)
        return
    merged = f"SELECT {key}, __time AS __at, 0 AS __is_event FROM ({asked}) AS a"
    if span is not None:
        merged += f" UNION ALL SELECT {key}, __time - {span}, 0 FROM ({asked}) AS b"
    merged += f" UNION ALL SELECT {key}, __at, 1 FROM ({log}) AS l"
    of_instants = f"SELECT DISTINCT {key}, __at, __seen FROM ({seen(merged, key)}) AS m WHERE __is_event = 0"
    yield Step(f"seen_{name}", of_instants, span is not None)
    table = quoted(f"seen_{name}")
    sql = f"SELECT {key}, __at AS __time, __seen AS __count FROM {table}"
    if span is not None:
        sql = (
            f"SELECT now.{key}, now.__at AS __time, now.__seen - past.__seen AS __count FROM {table} AS now "
            f"JOIN {table} AS past ON now.{key} = past.{key} AND now.__at - {span} = past.__at"
        )
    yield Step(f"count_{name}", sql)


def _decayed(name: str, asked: str, log: str, tick: int) -> Iterator[Step]:
    key = by(name)
    place = f"(__at // {tick}) % {BLOCK}"
    block = f"__at // {tick * BLOCK}"
    both = f"SELECT {key}, __time AS __at, 0 AS __is_event FROM ({asked}) AS a UNION ALL "
    both += f"SELECT {key}, __at, 1 FROM ({log}) AS l"
    placed = f"SELECT {key}, __at, __is_event, {block} AS __block, {place} AS __place FROM ({both}) AS b"
    yield Step(
        f"weighed_{name}",
        f"SELECT p.{key}, p.__at, p.__is_event, p.__block, CAST(w.__weight AS BIGINT) AS __weight FROM ({placed}) AS p "
        "JOIN weights AS w ON p.__place = w.__place",
        True,
    )
    weighed = quoted(f"weighed_{name}")
    window = up_to_now(f"{key}, __block")
    now = f"SELECT *, sum(__is_event * __weight) OVER {window} AS __sum FROM {weighed}"
    past = (
        f"SELECT {key}, __block + 1 AS __block, sum(__weight) AS __sum FROM {weighed} WHERE __is_event = 1 "
        f"GROUP BY {key}, __block"
    )
    share = "CAST({} AS DOUBLE) / CAST({} AS DOUBLE)"
    of_now = share.format("n.__sum", "n.__weight")
    of_past = share.format("coalesce(p.__sum, 0)", f"n.__weight * {2**HALF_LIVES}")
    yield Step(
        f"count_{name}",
        f"SELECT n.{key}, n.__at AS __time, {of_now} + {of_past} AS __count FROM ({now}) AS n "
        f"LEFT JOIN ({past}) AS p ON n.{key} = p.{key} AND n.__block = p.__block WHERE n.__is_event = 0",
    )


def acted(name: str, place: int) -> str:
    """A column of candidates that a label's actions are matched by."""
    return quoted(f"__acted_{place}_{name}")


def label_step(config: BuildConfig, name: str, shown: str, time: str, since: int | None) -> Step:
    """Whether an action followed, by candidates' keys and time.

    Args:
        config: what is built.
        name: of the label.
        shown: all impressions, those of requests that are not made, too: an action may be one of theirs.
        time: column of when they were.
        since: the instant of the first request, if there are earlier ones: what is before it is not read.
    """
    label = config.labels[name]
    keys = [acted(name, place) for place in range(len(label.keys))]
    partition = ", ".join(["__user", *keys])
    columns = [f"{quoted(mine)} AS {key}" for mine, key in zip(label.keys, keys, strict=True)]
    of_impressions, of_actions = whether(at_least(time, since)), whether(label.where, at_least("__time", since))
    impressions = f"SELECT DISTINCT {', '.join(['__user', *columns])}, {time} AS __at, 0 AS __is_action FROM {shown}"
    actions = f"SELECT {', '.join(['__user', *map(expression, label.keys.values())])}, __time, 1"
    merged = f"{impressions}{of_impressions} UNION ALL {actions} FROM {table_of(label.source)}{of_actions}"
    over = f"OVER (PARTITION BY {partition} ORDER BY __at, __is_action"
    following = (
        f"min(CASE WHEN __is_action = 1 THEN __at END) {over} ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING)"
        if label.attribution == "every"
        # What comes next is another impression of the same, or the action.
        else f"CASE WHEN lead(__is_action) {over}) = 1 THEN lead(__at) {over}) END"
    )
    followed = f"SELECT {partition}, __at, __is_action, {following} AS __next FROM ({merged}) AS m"
    return Step(
        f"label_{name}",
        f"SELECT {partition}, __at AS __time, "
        f"CASE WHEN __next - __at <= {label.within * MICROSECONDS} THEN 1.0 ELSE 0.0 END AS __label "
        f"FROM ({followed}) AS f WHERE __is_action = 0",
    )


def unfinished(config: BuildConfig, name: str) -> str:
    """How many requests are so late that the log of a label's actions ends before its time is up."""
    label = config.labels[name]
    last = f"SELECT max(__time) FROM {table_of(label.source)}"
    return f"SELECT count(*) FROM requests WHERE __time + {label.within * MICROSECONDS} > ({last})"
