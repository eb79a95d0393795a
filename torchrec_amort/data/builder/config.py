"""What a builder is told: logs and tables, which rows are requests, which events make a history, what is a feature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, refuse_out_of_bounds
from torchrec_amort.errors import InputError
from torchrec_amort.schema import HISTORY, Kind, Side, TableConfig

Unit = Literal["timestamp", "s", "ms", "us"]


@dataclass(kw_only=True)
class JoinConfig:
    """A table whose columns a source takes over, where keys are equal.

    If the table has a `time`, its row is the latest one that was available before the source's row; otherwise there is
    one row for each key. Without such a row the columns are null.

    Args:
        source: the table.
        keys: columns of the source, and the table's columns that they equal.
        columns: columns to take over: their names in the source, and SQL expressions of the table's columns.
    """

    source: str
    keys: dict[str, str]
    columns: dict[str, str]


@dataclass(kw_only=True)
class SourceConfig:
    """Rows of a log or a table.

    Args:
        files: Parquet or CSV, on this machine or a store: a file, a folder or a pattern, or several of these by name;
            column `part` then tells which one a row is of.
        types: of columns of CSV, in SQL, that are not as their first rows look: an id such as 00123 is VARCHAR.
        separator: of CSV; guessed unless given.
        names: of the columns of CSV that has no line of names.
        explode: columns of lists that are opened side by side: a row for each entry.
        columns: more columns: SQL expressions of those that are there.
        where: SQL condition of the rows that are kept.
        join: tables whose columns these rows take over.
        user: SQL expression of whose row it is.
        time: SQL expression of when it happened; of a table, from when on a row is valid.
        unit: of `time` and `available`: timestamps, or numbers of seconds, milliseconds or microseconds since 1970 UTC.
        zone: time zone of timestamps that tell none.
        available: SQL expression of when the row could be read, if that is later than `time`.
        delay: seconds from then on until it could be read.
    """

    files: str | dict[str, str]
    types: dict[str, str] = field(default_factory=dict)
    separator: str | None = None
    names: list[str] = field(default_factory=list)
    explode: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    where: str | None = None
    join: list[JoinConfig] = field(default_factory=list)
    user: str | None = None
    time: str | None = None
    unit: Unit = "timestamp"
    zone: str = "UTC"
    available: str | None = None
    delay: int = 0

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {NOT_NEGATIVE: ("delay",)})


@dataclass(kw_only=True)
class RequestsConfig:
    """Which rows are candidates, and of which request.

    Args:
        source: its rows are candidates.
        id: columns whose values together tell a request; user and time unless given.
        gap: seconds: rows of a user that follow each other that fast are of one session, which is a request of the time
            at which it began. Without `id`.
        order: columns by which the candidates of a request are put in order; then by their features.
    """

    source: str
    id: list[str] = field(default_factory=list)
    gap: int | None = None
    order: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {AT_LEAST_ONE: ("gap",)}, "requests.")
        if self.gap is not None and self.id:
            raise InputError(f"requests: gap is {self.gap} and id {self.id}: give one of them")


@dataclass(kw_only=True)
class EventsConfig:
    """Rows of a source that are events of a history.

    Args:
        source: the log.
        where: SQL condition of the rows that are.
        columns: SQL expressions of the history's features, those that are no column of that name.
    """

    source: str
    where: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class HistoryConfig:
    """The events of a history: those of the request's user that were available before the request.

    They stand in the order in which they became available, then of their times, then of `events`, then of `order`.

    Args:
        events: rows of one source, or of several.
        keys: columns that a request and its events have in common, beside the user.
        order: columns that put events of one instant in order; then by their features.
        length: events that are kept, the latest ones.
    """

    events: list[EventsConfig]
    keys: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    length: int = 100

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {AT_LEAST_ONE: ("length",)})


@dataclass(kw_only=True)
class CountConfig:
    """A column of candidates: how many rows of a log have the candidate's key, and were available before the request.

    Args:
        source: the log.
        by: a column of candidates, and the SQL expression of the log that it equals.
        where: SQL condition of the rows that count.
        hours: only rows that became available so many hours before the request, or later.
        half_life: hours after which a row counts half, in steps of a 64th of it; after 16 to 32 half-lives it counts no
            more.
    """

    source: str
    by: dict[str, str]
    where: str | None = None
    hours: float | None = None
    half_life: float | None = None

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {POSITIVE: ("hours", "half_life")}, "counts.")


@dataclass(kw_only=True)
class ActionConfig:
    """A label: whether an action on the candidate followed its impression.

    Args:
        source: the log of actions.
        keys: columns of candidates, and the SQL expressions of the log that they equal, beside the user.
        where: SQL condition of the rows that are such actions.
        within: seconds from the request, at most.
        attribution: an action is counted for `every` impression before it, or for the `latest` alone.
    """

    source: str
    keys: dict[str, str]
    within: int
    where: str | None = None
    attribution: Literal["every", "latest"] = "every"

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {AT_LEAST_ONE: ("within",)})


@dataclass(kw_only=True)
class FeatureConfig:
    """A feature of the requests that are made; see `Feature`.

    Args:
        side: the request's, the candidate's, or an event's.
        kind: its kind.
        of: SQL expression of the source's columns; the column of the feature's name unless given.
        table_size: rows of its table; that of the vocabulary unless given.
        table: name of its table.
        vocabulary: what becomes of an id outside the table.
        history: of an event.
        size: of a vector.
        text: ids are text.
        nullable: ids may be null.
    """

    side: Side
    kind: Kind
    of: str | None = None
    table_size: int | None = None
    table: str = ""
    vocabulary: Literal["refuse", "unknown", "hash", "file"] = "refuse"
    history: str = HISTORY
    size: int | None = None
    text: bool = False
    nullable: bool = False


@dataclass(kw_only=True)
class BuildConfig:
    """Write raw logs as request-level Parquet.

    Args:
        out: the data folder to make, on this machine or a store.
        sources: logs and tables, by name.
        requests: which rows are candidates.
        histories: by name.
        features: by name.
        train_until: time that ends the train split: that of later requests is validation. Times are UTC if they tell no
            zone.
        validation_until: time that ends the validation split: later requests are test.
        labels: labels by an action that followed; others are features.
        counts: columns of candidates that count what was known before.
        vocabularies: how often an id has to be in train to have a row of its own, by table with vocabulary `file`.
        tables: more of some tables; see `TableConfig`.
        pointers: store events once, and ranges of them with requests; in place of lists that repeat them.
        since: append the requests from this time on to the folder, which has those before it; nothing that is there is
            written again.
        until: time of the first request that is left out.
        dataset: name of the data set.
        engine: `duckdb` in this process, or `spark`.
        master: URL of Spark's cluster; all cores of this machine unless given.
        memory: what the engine may use, such as 4GB; it spills to disk beyond.
        threads: of the engine; all if None.
        overwrite: replace a folder that is there.
    """

    out: str
    sources: dict[str, SourceConfig]
    requests: RequestsConfig
    features: dict[str, FeatureConfig]
    train_until: str
    validation_until: str
    histories: dict[str, HistoryConfig] = field(default_factory=dict)
    labels: dict[str, ActionConfig] = field(default_factory=dict)
    counts: dict[str, CountConfig] = field(default_factory=dict)
    vocabularies: dict[str, int] = field(default_factory=dict)
    tables: dict[str, TableConfig] = field(default_factory=dict)
    pointers: bool = False
    since: str | None = None
    until: str | None = None
    dataset: str = "requests"
    engine: Literal["duckdb", "spark"] = "duckdb"
    master: str = "local[*]"
    memory: str = "4GB"
    threads: int | None = None
    overwrite: bool = False
