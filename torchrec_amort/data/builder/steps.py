"""What a plan consists of, and the names in it.

SQL is written once, in DuckDB's dialect and of what all engines have; others get it translated. Instants are int64
microseconds since 1970 UTC. Names of the plan's own start with two underscores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torchrec_amort.data.builder.config import Unit

MICROSECONDS = 1_000_000
MICROSECONDS_PER = {"s": MICROSECONDS, "ms": 1000, "us": 1}
MICROSECONDS_PER_HOUR = 3600 * MICROSECONDS
MICROSECONDS_PER_DAY = 24 * MICROSECONDS_PER_HOUR


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


class Instant(Protocol):
    """SQL of an engine: the microseconds since 1970 UTC of a time."""

    def __call__(self, expression: str, unit: Unit, zone: str) -> str:
        """The SQL of it, int64."""


def quoted(name: str) -> str:
    """A name as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


def expression(given: str) -> str:
    """An SQL expression of the config; the name of a column may be any word."""
    is_name = re.fullmatch(r"[^\W\d]\w*", given) and given.lower() not in ("true", "false", "null")
    return quoted(given) if is_name else given


def table_of(source: str) -> str:
    """The table of a source."""
    return quoted(f"source_{source}")


def key_of(name: str) -> str:
    """The column of candidates that a column of a history's keys is in."""
    return quoted(f"__on_{name}")


def whether(*conditions: str | None) -> str:
    """A WHERE clause of the conditions that there are."""
    given = [f"({condition})" for condition in conditions if condition]
    return f" WHERE {' AND '.join(given)}" if given else ""


def at_least(column: str, bound: int | None) -> str | None:
    """The condition that a column is not below a bound, if there is one."""
    return None if bound is None else f"{column} >= {bound}"


def up_to_now(partition: str) -> str:
    """The window of what a row of a merged log comes after, itself included: of one instant, what asks comes first."""
    return f"(PARTITION BY {partition} ORDER BY __at, __is_event ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)"
