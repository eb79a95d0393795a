"""What a request is made of: features, kinds, table sizes, file format version."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa

FORMAT_VERSION = 1
SCHEMA_FILE = "schema.json"

Side = Literal["request", "candidate", "event"]
Kind = Literal["id", "ids", "item", "age", "dense", "label"]
Vocabulary = Literal["refuse", "unknown", "hash", "managed"]
Content = Literal["id", "time", "number"]

# What may stand on which side; `item` is the one id that history and candidates share a table for.
KINDS_OF_SIDE: dict[str, tuple[str, ...]] = {
    "request": ("id", "ids", "dense"),
    "candidate": ("item", "id", "ids", "dense", "label"),
    "event": ("item", "id", "age"),
}
KINDS_WITH_TABLE = ("id", "ids", "item", "age")
KINDS_OF_IDS = ("id", "ids", "item")
VOCABULARIES_OF_KIND: dict[str, tuple[str, ...]] = {
    "id": ("refuse", "unknown", "hash"),
    "ids": ("refuse", "unknown", "hash"),
    "item": get_args(Vocabulary),
}

# The columns that every data set has besides its features.
OWN_COLUMNS: dict[str, Content] = {"request_id": "id", "user": "id", "time": "time"}

# An age of s seconds falls into bucket s.bit_length(): one bucket an octave, and 63 holds any int64.
AGE_BUCKETS = 64

# Ids run from 0 to this less 1 where no table limits them.
ANY_ID = 2**63 - 1


class InputError(ValueError):
    """Bad input, told in one line: where, which field, the two numbers that disagree, what to do."""


def one_line(error: Exception) -> str:
    """The message of another error on one line, to be told in an `InputError`."""
    return " ".join(str(error).split())


@dataclass(frozen=True)
class Feature:
    """One input of the model, or one label.

    Args:
        name: key of the feature in a batch, and of its embedding table.
        side: whose feature it is: the request's, each candidate's, or each history event's.
        kind: `id` (one id), `ids` (a list of ids, pooled), `item` (the item id, looked up in the table
            that history and candidates share), `age` (read from an event time in seconds, becomes the
            bucketed time from the event to the request), `dense` (a float) or `label`.
        table_size: number of rows of the embedding table; ids run from 0 to `table_size - 1`.
            Only for kinds that are looked up.
        column: the column it is read from, if not `name`.
        vocabulary: what becomes of an id outside the table: `refuse` (an error) or `unknown` (it becomes 0, the
            unknown id). With `hash`, ids are any int64: each goes to the row that `hash_ids` says. Only for ids. With
            `managed`, ids are 0 to 2**63 - 2, and the model learns which ones get a row. Only for `item`.

    Raises:
        InputError: the kind does not exist on that side, the table size is missing or too small, or there is no such
            vocabulary for the kind.
    """

    name: str
    side: Side
    kind: Kind
    table_size: int | None = None
    column: str | None = None
    vocabulary: Vocabulary = "refuse"

    def __post_init__(self) -> None:
        if self.side not in get_args(Side) or self.kind not in KINDS_OF_SIDE[self.side]:
            raise InputError(
                f"feature {self.name!r}: no kind {self.kind!r} on side {self.side!r}; "
                f"the kinds of each side are {KINDS_OF_SIDE}"
            )
        if self.kind in KINDS_WITH_TABLE and (self.table_size is None or self.table_size < 1):
            raise InputError(f"feature {self.name!r} of kind {self.kind!r} needs a table_size of 1 or more")
        if self.kind not in KINDS_WITH_TABLE and self.table_size is not None:
            raise InputError(f"feature {self.name!r} of kind {self.kind!r} has no table: leave out table_size")
        words = VOCABULARIES_OF_KIND.get(self.kind, ("refuse",))
        if self.vocabulary not in words:
            raise InputError(
                f"feature {self.name!r} of kind {self.kind!r}: no vocabulary {self.vocabulary!r}; there is "
                f"{', '.join(words)}"
            )
        if self.vocabulary == "hash" and self.table_size == 1:
            raise InputError(
                f"feature {self.name!r}: vocabulary 'hash' needs a table_size of 2 or more, not 1: row 0 is the "
                "unknown id's"
            )

    @property
    def table(self) -> str:
        """Name of its embedding table, if it has one."""
        return "item" if self.kind == "item" else self.name

    @property
    def source(self) -> str:
        """The column the feature is read from."""
        return self.column or self.name

    @property
    def content(self) -> Content:
        """What the values of the feature's column are."""
        return "time" if self.kind == "age" else "id" if self.kind in KINDS_OF_IDS else "number"

    @property
    def arrow_type(self) -> pa.DataType:
        """The Arrow type of the feature's column, one row per request."""
        scalar = pa.float32() if self.content == "number" else pa.int64()
        per_row = pa.list_(scalar) if self.kind == "ids" else scalar
        return per_row if self.side == "request" else pa.list_(per_row)


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Another size and vocabulary of the table of a feature's ids.

    Args:
        rows: number of its rows.
        vocabulary: what becomes of an id outside it: `refuse`, `unknown`, `hash` or `managed`; see `Feature`.
    """

    rows: int
    vocabulary: Vocabulary


@dataclass(frozen=True)
class RequestSchema:
    """The features of a data set, in the order the model reads them.

    Args:
        dataset: name of the data set, for people.
        features: all features. A schema has exactly one `item` feature on the candidate side, named
            `candidate_item`; event features, if there are any, include the `item` feature
            `history_item`, with the same table size and vocabulary.
        format_version: version of the file format this schema was written with.

    Raises:
        InputError: two features have one name, an item feature is missing, table sizes or vocabularies of the two
            differ, or a column is read as two types.

    Example::

        schema = RequestSchema(
            dataset="films",
            features=(
                Feature("user_id", "request", "id", table_size=100),
                Feature("candidate_item", "candidate", "item", table_size=50),
                Feature("history_item", "event", "item", table_size=50),
                Feature("liked", "candidate", "label"),
            ),
        )
        schema.table_sizes["history_item"]  # 50
    """

    dataset: str
    features: tuple[Feature, ...]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.features]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"schema {self.dataset!r}: feature {twice[0]!r} is there twice; rename one")
        items = {f.name: f for f in self.features if f.kind == "item"}
        expected = {"candidate_item", "history_item"} if self.of("event") else {"candidate_item"}
        if set(items) != expected:
            raise InputError(
                f"schema {self.dataset!r}: the features of kind 'item' are {sorted(items)}, not {sorted(expected)}"
            )
        for field in ("table_size", "vocabulary"):
            values = {name: getattr(feature, field) for name, feature in items.items()}
            if len(set(values.values())) != 1:
                raise InputError(
                    f"schema {self.dataset!r}: one table serves history and candidates, but {field} is "
                    f"{values['history_item']} for history_item and {values['candidate_item']} for candidate_item"
                )
        types = dict.fromkeys(OWN_COLUMNS, pa.int64())
        for feature in self.features:
            if not (have := types.setdefault(feature.source, feature.arrow_type)).equals(feature.arrow_type):
                raise InputError(
                    f"schema {self.dataset!r}: feature {feature.name!r} reads column {feature.source!r} as "
                    f"{feature.arrow_type}, but it is {have} already: give the feature a column of its own"
                )

    def of(self, side: Side, *kinds: Kind) -> tuple[Feature, ...]:
        """The features of one side, in order; of the given kinds only, if any are given."""
        return tuple(f for f in self.features if f.side == side and (not kinds or f.kind in kinds))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, which are the T tasks."""
        return tuple(f.name for f in self.of("candidate", "label"))

    @property
    def sequence_features(self) -> tuple[Feature, ...]:
        """The keys of `RequestBatch.sequences`: all event features, then `candidate_item`."""
        return self.of("event") + self.of("candidate", "item")

    @property
    def table_sizes(self) -> dict[str, int]:
        """Ids that each feature that is looked up may have, the rows of its table or any if that is managed."""
        sizes = {f.name: ANY_ID if f.vocabulary == "managed" else f.table_size for f in self.features}
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def needs_time(self) -> bool:
        """Whether the request's time is read, to tell how old its events are."""
        return bool(self.of("event", "age"))

    def without(self, names: Iterable[str]) -> RequestSchema:
        """The schema less some features.

        Raises:
            InputError: there is no such feature, or it cannot be left out: a batch has items, dense features and
                labels in any case.
        """
        left_out = set(names)
        optional = {f.name for f in self.features if f.kind in ("id", "ids", "age")}
        if unknown := sorted(left_out - optional):
            raise InputError(
                f"schema {self.dataset!r}: {unknown[0]!r} cannot be left out: the features that can are "
                f"{sorted(optional)}"
            )
        return replace(self, features=tuple(f for f in self.features if f.name not in left_out))

    def with_tables(self, tables: Mapping[str, TableConfig]) -> RequestSchema:
        """The schema with other tables for some ids, so that a run reads the same data into smaller ones.

        Args:
            tables: by the name of the table: the feature's, or `item` for the one that history and candidates share.

        Raises:
            InputError: there is no such table, or it refuses ids that the schema allows.

        Example::

            schema.with_tables({"user_id": TableConfig(rows=100_000, vocabulary="hash")})
        """
        known = dict.fromkeys(f.table for f in self.features if f.kind in KINDS_OF_IDS)
        if unknown := sorted(tables.keys() - known.keys()):
            raise InputError(f"schema {self.dataset!r}: no table {unknown[0]!r} of ids; there are {list(known)}")
        features = list(self.features)
        for place, feature in enumerate(features):
            if feature.kind in KINDS_OF_IDS and (table := tables.get(feature.table)):
                features[place] = replace(feature, table_size=table.rows, vocabulary=table.vocabulary)
        changed = replace(self, features=tuple(features))
        changed.refuse_other_data(self, f"schema {self.dataset!r}")
        return changed

    def refuse_other_data(self, data: RequestSchema, source: str = "data") -> None:
        """Refuse data of a schema whose rows cannot be read by this one.

        Its features may differ in their tables, if this schema's take all ids that the data may have.

        Args:
            data: the schema that the data was prepared with.
            source: where the data is, for error messages.

        Raises:
            InputError: names the first feature that the data does not have, or has other ids for.

        Example::

            trained.refuse_other_data(RequestSchema.load("data/films"), "data/films")
        """
        given = {(f.name, f.side, f.kind, f.source): f for f in data.features}
        for feature in self.features:
            other = given.get((feature.name, feature.side, feature.kind, feature.source))
            if other is None:
                raise InputError(
                    f"{source}: the model reads {feature}, which this data set does not have: use data prepared in "
                    "the same way"
                )
            is_larger = (other.table_size or 0) > (feature.table_size or 0)
            if feature.vocabulary == "refuse" and (is_larger or other.vocabulary != "refuse"):
                raise InputError(
                    f"{source}: {feature.name} has {other.table_size} rows and vocabulary {other.vocabulary!r}, but "
                    f"the model's table for it has {feature.table_size} and refuses other ids: train with vocabulary "
                    "'unknown' or 'hash' for it, or with rows for all ids"
                )

    def arrow_schema(self) -> pa.Schema:
        """The columns of a request-level Parquet file: one row per request."""
        columns = dict.fromkeys(OWN_COLUMNS, pa.int64()) | {f.source: f.arrow_type for f in self.features}
        return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])

    @property
    def contents(self) -> dict[str, Content]:
        """What the values of each column of `arrow_schema()` are; times, if any feature reads them as such."""
        contents = dict(OWN_COLUMNS)
        for feature in self.features:
            if contents.setdefault(feature.source, feature.content) != "time":
                contents[feature.source] = feature.content
        return contents

    def to_json(self) -> str:
        """The schema as readable JSON, features without the fields that have their default."""
        record, defaults = asdict(self), {field.name: field.default for field in fields(Feature)}
        record["features"] = [{k: v for k, v in f.items() if v != defaults[k]} for f in record["features"]]
        return json.dumps(record, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "schema") -> RequestSchema:
        """Read a schema back from `to_json`.

        Args:
            text: the JSON.
            source: where it comes from, for error messages.

        Raises:
            InputError: not such JSON, or written by a newer version of the format.
        """
        try:
            record: dict[str, Any] = json.loads(text)
            version = record["format_version"]
            if version > FORMAT_VERSION:
                raise InputError(
                    f"{source}: format_version is {version}, this torchrec-amort reads up to "
                    f"{FORMAT_VERSION}: upgrade it, or prepare the data again"
                )
            features = tuple(Feature(**feature) for feature in record.pop("features"))
            return cls(features=features, **record)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{source}: not a request schema ({error}): prepare the data again") from error

    @classmethod
    def load(cls, folder: str | Path) -> RequestSchema:
        """Read `schema.json` of a prepared data folder.

        Raises:
            InputError: the folder has none, or one that cannot be read.
        """
        path = Path(folder) / SCHEMA_FILE
        if not path.is_file():
            raise InputError(f"{path}: no such file: prepare the data first (torchrec-amort prepare --help)")
        return cls.from_json(path.read_text(encoding="utf-8"), source=str(path))


def refuse_missing(columns: Iterable[str], present: Iterable[str], source: str) -> None:
    """Raise an `InputError` that names the first of `columns` that is not `present`."""
    have = list(present)
    for column in columns:
        if column not in have:
            raise InputError(f"{source}: column {column!r} is missing (there are {have}): prepare the data again")
