"""What a request is made of: features, kinds, table sizes, file format version."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_amort.errors import InputError, one_line
from torchrec_amort.files import write_text
from torchrec_amort.hashing import Vocabulary
from torchrec_amort.lists import Layout
from torchrec_amort.stores import Location, local_path, location, open_parquet, reading

FORMAT_VERSION = 2
SCHEMA_FILE = "schema.json"

Side = Literal["request", "candidate", "event"]
Kind = Literal["id", "ids", "item", "dense", "count", "vector", "age", "gap", "weight", "label", "target"]
VocabularyKind = Literal["refuse", "unknown", "hash", "file", "managed"]
Content = Literal["id", "text", "time", "number"]

# What may stand on which side.
KINDS_OF_SIDE: dict[str, tuple[str, ...]] = {
    "request": ("id", "ids", "dense", "count", "vector", "age", "weight"),
    "candidate": ("item", "id", "ids", "dense", "count", "vector", "age", "weight", "label", "target"),
    "event": ("item", "id", "ids", "dense", "count", "vector", "age", "gap"),
}
KINDS_OF_IDS = ("id", "ids", "item")
KINDS_OF_TIMES = ("age", "gap")
# What a model is trained to predict.
KINDS_OF_LABELS: tuple[Kind, ...] = ("label", "target")
# What a model does not read.
KINDS_NOT_READ: tuple[Kind, ...] = (*KINDS_OF_LABELS, "weight")
# Vocabularies of text: others take numbers for rows.
_VOCABULARIES_OF_TEXT = ("hash", "file", "managed")

_SIDES_OF_BAGS: tuple[Side, ...] = ("request", "candidate")

# The history of events that name none.
HISTORY = "history"
# The table of features of kind `item`.
ITEM_TABLE = "item"
# That of another feature of this name, beside it.
OTHER_ITEM = "item (id)"

# The columns that every data set has besides its features.
OWN_COLUMNS: dict[str, Content] = {"request_id": "id", "user": "id", "time": "time"}

# An age of s seconds falls into bucket s.bit_length(): one bucket an octave, and 63 holds any int64.
AGE_BUCKETS = 64

# Ids run from 0 to this less 1 where no table limits them.
ANY_ID = 2**63 - 1


@dataclass(frozen=True)
class Feature:
    """One input of the model, one label, or one weight.

    Args:
        name: key of the feature in a batch.
        side: whose feature it is: the request's, each candidate's, or each history event's.
        kind: what its column has for each request, candidate or event: `id` (one id), `ids` (a list of ids, whose
            vectors are averaged), `dense` (a number), `count` (a number of 0 or more, read as log2(1 + it)), `vector`
            (a list of `size` numbers), `age` (a time, read as the seconds from then to the request), `gap` (an event's
            time, read as the seconds from the event before; 0 for the first), `label` (a number from 0 to 1), `target`
            (a label that may be any number, such as seconds watched), `weight` (of the request's or the candidate's
            share of the loss, 0 or more) or `item` (the same as `id` with `table="item"`).
        table_size: number of rows of the embedding table; ids run from 0 to `table_size - 1`. For ids, and for times
            that are looked up: s seconds are row s.bit_length(), of `AGE_BUCKETS`. Times without one are the number
            log2(1 + s).
        column: the column it is read from, if not `name`.
        vocabulary: of ids: what becomes of an id outside the table: `refuse` (an error) or `unknown` (it becomes 0, the
            unknown id). With `hash`, ids are any int64: each goes to the row that `hash_ids` says. With `file`, the
            `vocabularies` of the schema say which ids have a row. With `managed`, ids are 0 to 2**63 - 2, and the model
            learns which ones get a row; of events and candidates only, in one table.
        history: the history that an event is of.
        table: name of the embedding table, if not `name`; features that name one share it. Vectors that name one share
            what the model makes of them.
        size: numbers of a `vector`.
        text: ids are text. `hash_text` makes each an int64.
        nullable: a null id becomes 0, the unknown id, and a null list of ids an empty one. Otherwise nulls are refused.

    Raises:
        InputError: the kind does not exist on that side, an argument is missing, too small or of no use for the kind,
            or there is no such vocabulary for it.
    """

    name: str
    side: Side
    kind: Kind
    table_size: int | None = None
    column: str | None = None
    vocabulary: VocabularyKind = "refuse"
    history: str = HISTORY
    table: str = ""
    size: int | None = None
    text: bool = False
    nullable: bool = False

    def __post_init__(self) -> None:
        if self.side not in get_args(Side) or self.kind not in KINDS_OF_SIDE[self.side]:
            raise InputError(
                f"feature {self.name!r}: no kind {self.kind!r} on side {self.side!r}; "
                f"the kinds of each side are {KINDS_OF_SIDE}"
            )
        self._refuse_sizes()
        self._refuse_vocabulary()
        if self.history != HISTORY and self.side != "event":
            raise InputError(f"feature {self.name!r}: side {self.side!r} has no history: leave out {self.history!r}")
        if self.table and self.kind == "item" and self.table != ITEM_TABLE:
            raise InputError(
                f"feature {self.name!r}: kind 'item' is of table 'item': give kind 'id' table {self.table!r}"
            )
        if self.table and not (self.is_looked_up or self.kind == "vector"):
            raise InputError(f"feature {self.name!r} of kind {self.kind!r} has no table: leave out {self.table!r}")
        object.__setattr__(self, "table", self.table or self._own_table)

    def _refuse_sizes(self) -> None:
        told = f"feature {self.name!r} of kind {self.kind!r}"
        if self.is_looked_up and (self.table_size is None or self.table_size < 1):
            raise InputError(f"{told} needs a table_size of 1 or more")
        if not self.is_looked_up and self.table_size is not None:
            raise InputError(f"{told} has no table: leave out table_size")
        if self.kind == "vector" and (self.size is None or self.size < 1):
            raise InputError(f"{told} needs a size of 1 or more: how many numbers it has")
        if self.kind != "vector" and self.size is not None:
            raise InputError(f"{told} is no vector: leave out size")

    def _refuse_vocabulary(self) -> None:
        told = f"feature {self.name!r} of kind {self.kind!r}"
        words = get_args(VocabularyKind) if self.kind in KINDS_OF_IDS else ("refuse",)
        if self.side == "request" or self.kind == "ids":
            words = tuple(word for word in words if word != "managed")
        if self.vocabulary not in words:
            raise InputError(f"{told}: no vocabulary {self.vocabulary!r}; there is {', '.join(words)}")
        if self.vocabulary == "hash" and self.table_size == 1:
            raise InputError(
                f"feature {self.name!r}: vocabulary 'hash' needs a table_size of 2 or more, not 1: row 0 is the "
                "unknown id's"
            )
        if self.text and self.vocabulary not in _VOCABULARIES_OF_TEXT:
            of_ids = self.kind in KINDS_OF_IDS
            what = f"a vocabulary of {', '.join(_VOCABULARIES_OF_TEXT)}" if of_ids else "ids"
            raise InputError(f"{told}: text needs {what}")
        if self.nullable and (self.kind not in KINDS_OF_IDS or self.vocabulary == "managed"):
            raise InputError(f"{told}: only ids of a table with an unknown id may be null")

    @property
    def _own_table(self) -> str:
        return ITEM_TABLE if self.kind == "item" else self.name

    @property
    def is_looked_up(self) -> bool:
        """Whether the model reads an id, or some."""
        return self.kind in KINDS_OF_IDS or (self.kind in KINDS_OF_TIMES and self.table_size is not None)

    @property
    def num_inputs(self) -> int:
        """Numbers that the model reads of it as they are; 0 if it is looked up, and of labels and weights."""
        if self.kind in KINDS_NOT_READ or self.is_looked_up:
            return 0
        return self.size or 1

    @property
    def source(self) -> str:
        """The column the feature is read from."""
        return self.column or self.name

    @property
    def content(self) -> Content:
        """What the values of the feature's column are."""
        if self.kind in KINDS_OF_IDS:
            return "text" if self.text else "id"
        return "time" if self.kind in KINDS_OF_TIMES else "number"

    @property
    def arrow_type(self) -> pa.DataType:
        """The Arrow type of the feature's column, one row per request."""
        scalar = {"number": pa.float32(), "text": pa.string()}.get(self.content, pa.int64())
        per_entry = pa.list_(scalar) if self.kind in ("ids", "vector") else scalar
        return per_entry if self.side == "request" else pa.list_(per_entry)

    def record(self) -> dict[str, Any]:
        """Its fields for JSON, without those that have their default."""
        return _unusual(self, {"table": self._own_table})


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """What a table of ids is, beside what its features say.

    Args:
        rows: number of its rows, if not the features' `table_size`.
        vocabulary: what becomes of an id outside it, if not what the features say; see `Feature`.
        width: of its vectors; the model's `embedding_dim` unless given.
        pretrained: a file of its initial vectors: `.npy`, a row for each of the table's, or Parquet of columns `id` and
            `vector`, whose other rows are zero. Random unless given.
        trains: whether training changes it.
    """

    rows: int | None = None
    vocabulary: VocabularyKind | None = None
    width: int | None = None
    pretrained: str | None = None
    trains: bool = True

    def record(self) -> dict[str, Any]:
        """Its fields for JSON, without those that have their default."""
        return _unusual(self, {})


@dataclass(frozen=True)
class RequestSchema:
    """The features of a data set, in the order the model reads them.

    Args:
        dataset: name of the data set, for people.
        features: all features, of which the candidate has one at least that is no label and no weight.
        format_version: version of the file format that it is written with.
        tables: more of some tables of ids, by their names. Rows and vocabularies become the features'.
        vocabularies: of the tables whose vocabulary is `file`: which ids have a row.

    Raises:
        InputError: two features have one name, features of one table do not agree, a column is read as two types, or
            there is no such table.

    Example::

        schema = RequestSchema(
            dataset="films",
            features=(
                Feature("user_id", "request", "id", table_size=100),
                Feature("film", "candidate", "id", table_size=50, table="film"),
                Feature("clicked_film", "event", "id", table_size=50, table="film", history="clicks"),
                Feature("bought_film", "event", "id", table_size=50, table="film", history="purchases"),
                Feature("liked", "candidate", "label"),
            ),
        )
        schema.table_sizes["bought_film"]  # 50
    """

    dataset: str
    features: tuple[Feature, ...]
    format_version: int = FORMAT_VERSION
    tables: Mapping[str, TableConfig] = field(default_factory=dict)
    vocabularies: Mapping[str, Vocabulary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._take_tables()
        names = [feature.name for feature in self.features]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"schema {self.dataset!r}: feature {twice[0]!r} is there twice; rename one")
        if not any(feature.kind not in KINDS_NOT_READ for feature in self.of("candidate")):
            raise InputError(f"schema {self.dataset!r}: no feature of the candidate: it needs one, to be told apart")
        for side in ("request", "candidate"):
            if len(weights := self.of(side, "weight")) > 1:
                raise InputError(
                    f"schema {self.dataset!r}: weights of one {side} are {[f.name for f in weights]}: keep one"
                )
        self._refuse_tables()
        self._refuse_columns()

    def _take_tables(self) -> None:
        """Give rows and vocabularies of tables to their features."""
        features, tables = list(self.features), {}
        if any(feature.kind == "item" for feature in features):
            # A feature that is called so has a table of its own, and not that of the items.
            is_other = [f.name == f.table == ITEM_TABLE and f.kind != "item" for f in features]
            features = [
                replace(f, table=OTHER_ITEM) if other else f for f, other in zip(features, is_other, strict=True)
            ]
        known = dict.fromkeys(f.table for f in features if f.kind in KINDS_OF_IDS)
        if unknown := sorted(self.tables.keys() - known.keys()):
            raise InputError(f"schema {self.dataset!r}: no table {unknown[0]!r} of ids; there are {list(known)}")
        for place, feature in enumerate(features):
            if feature.kind in KINDS_OF_IDS and (table := self.tables.get(feature.table)):
                rows, vocabulary = table.rows or feature.table_size, table.vocabulary or feature.vocabulary
                features[place] = replace(feature, table_size=rows, vocabulary=vocabulary)
        for name, table in self.tables.items():
            if (rest := replace(table, rows=None, vocabulary=None)) != TableConfig():
                tables[name] = rest
        object.__setattr__(self, "features", tuple(features))
        object.__setattr__(self, "tables", tables)

    def _refuse_tables(self) -> None:
        """Refuse features of one table that do not agree."""
        of_tables: dict[str, Feature] = {}
        for feature in self.features:
            if not (feature.is_looked_up or feature.kind == "vector"):
                continue
            first = of_tables.setdefault(feature.table, feature)
            for name in ("content", "table_size", "vocabulary", "size"):
                if (one := getattr(first, name)) != (other := getattr(feature, name)):
                    raise InputError(
                        f"schema {self.dataset!r}: features of table {feature.table!r} do not agree: {name} is {one} "
                        f"for {first.name} and {other} for {feature.name}"
                    )
        for feature in of_tables.values():
            vocabulary = self.vocabularies.get(feature.table)
            if feature.vocabulary == "file" and vocabulary is None:
                raise InputError(
                    f"schema {self.dataset!r}: table {feature.table!r} has vocabulary 'file', but the schema has no "
                    "vocabulary of it: load the schema from its folder, or give vocabularies"
                )
            if feature.vocabulary == "file" and len(vocabulary or ()) >= (feature.table_size or 0):
                raise InputError(
                    f"schema {self.dataset!r}: the vocabulary of table {feature.table!r} has {len(vocabulary or ())} "
                    f"ids, but {feature.name} has table_size {feature.table_size}: it needs a row more than ids"
                )
        managed = dict.fromkeys(f.table for f in self.features if f.vocabulary == "managed")
        if len(managed) > 1:
            raise InputError(
                f"schema {self.dataset!r}: tables {list(managed)} are managed, but one can be: hash others"
            )
        for name in managed:
            if (table := self.tables.get(name, TableConfig())).pretrained or not table.trains:
                raise InputError(
                    f"schema {self.dataset!r}: table {name!r} is managed, and rows that change hands start at random: "
                    "leave out pretrained and trains, or give another vocabulary"
                )

    def _refuse_columns(self) -> None:
        """Refuse a column that is read as two types."""
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

    @cached_property
    def label_features(self) -> tuple[Feature, ...]:
        """The labels, which are the T tasks, targets among them."""
        return self.of("candidate", *KINDS_OF_LABELS)

    @cached_property
    def weight_features(self) -> tuple[Feature, ...]:
        """The weights, that of the request first."""
        return (*self.of("request", "weight"), *self.of("candidate", "weight"))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels."""
        return tuple(f.name for f in self.label_features)

    @property
    def targets(self) -> tuple[int, ...]:
        """Places, among the T tasks, of the labels that are targets and may be any number."""
        return tuple(t for t, f in enumerate(self.label_features) if f.kind == "target")

    def refuse_targets(self, command: str) -> None:
        """Refuse labels that are any number, where all are compared by how they rank candidates.

        Args:
            command: that compares them, for the error message.

        Raises:
            InputError: the schema has targets.
        """
        if self.targets:
            raise InputError(
                f"schema {self.dataset!r}: {self.labels[self.targets[0]]!r} is a target, and {command} compares labels "
                "from 0 to 1: give it data without targets"
            )

    @cached_property
    def histories(self) -> dict[str, tuple[Feature, ...]]:
        """The features of the events of each history."""
        names = dict.fromkeys(f.history for f in self.of("event"))
        return {name: tuple(f for f in self.of("event") if f.history == name) for name in names}

    @cached_property
    def candidate_column(self) -> str:
        """The column of the candidate's item, or of its first feature, whose entries are counted as candidates."""
        return _counted(self.of("candidate"))

    @cached_property
    def event_columns(self) -> dict[str, str]:
        """For each history, the column of its item, or of its first feature, whose entries are counted as events."""
        return {name: _counted(features) for name, features in self.histories.items()}

    @cached_property
    def sequence_features(self) -> tuple[Feature, ...]:
        """The keys of `RequestBatch.sequences`: events' ids, and then the other ids of tables that sides share."""
        sides: dict[str, set[str]] = {}
        for feature in self.features:
            if feature.is_looked_up:
                sides.setdefault(feature.table, set()).add(feature.side)
        shared = [f for f in self.features if f.is_looked_up and (len(sides[f.table]) > 1 or f.kind == "item")]
        events = [f for f in self.of("event") if f.is_looked_up]
        return (*events, *(f for f in shared if f.side == "request"), *(f for f in shared if f.side == "candidate"))

    @cached_property
    def dense_sequence_features(self) -> tuple[Feature, ...]:
        """The keys of `RequestBatch.dense_sequences`: numbers of events, and vectors of candidates like theirs."""
        events = tuple(f for f in self.of("event") if f.num_inputs)
        of_events = {f.table for f in events if f.kind == "vector"}
        return events + tuple(f for f in self.of("candidate", "vector") if f.table in of_events)

    @cached_property
    def layout(self) -> Layout:
        """Whose the keys of a batch's sequences are."""
        keys = [*self.sequence_features, *self.dense_sequence_features]
        candidates, requests = (tuple(f.name for f in keys if f.side == side) for side in ("candidate", "request"))
        events = {name: tuple(f.name for f in features) for name, features in self.histories.items()}
        return Layout(events, candidates, requests)

    @cached_property
    def bag_features(self) -> dict[str, tuple[Feature, ...]]:
        """The keys of `RequestBatch.request_sparse` and `candidate_sparse`, by their side."""
        others = [f for f in self.features if f.is_looked_up and f not in self.sequence_features]
        return {side: tuple(f for f in others if f.side == side) for side in _SIDES_OF_BAGS}

    @cached_property
    def dense_features(self) -> dict[str, tuple[Feature, ...]]:
        """What the columns of `RequestBatch.request_dense` and `candidate_dense` are of, by their side."""
        others = [f for f in self.features if f.num_inputs and f not in self.dense_sequence_features]
        return {side: tuple(f for f in others if f.side == side) for side in _SIDES_OF_BAGS}

    @cached_property
    def num_dense(self) -> dict[str, int]:
        """Columns of `RequestBatch.request_dense` and `candidate_dense`, by their side."""
        return {side: sum(f.num_inputs for f in features) for side, features in self.dense_features.items()}

    @cached_property
    def table_sizes(self) -> dict[str, int]:
        """Ids that each feature that is looked up may have, the rows of its table or any if that is managed."""
        sizes = {f.name: ANY_ID if f.vocabulary == "managed" else f.table_size for f in self.features}
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def needs_time(self) -> bool:
        """Whether the request's time is read, to tell how old something is."""
        return any(feature.kind == "age" for feature in self.features)

    def without(self, names: Iterable[str]) -> RequestSchema:
        """The schema less some features.

        Raises:
            InputError: there is no such feature, or it cannot be left out: a batch has items, dense inputs, labels and
                weights in any case.
        """
        left_out = set(names)
        by_name = (*self.bag_features["request"], *self.bag_features["candidate"], *self.sequence_features)
        optional = {f.name for f in (*by_name, *self.dense_sequence_features) if f.kind != "item"}
        if unknown := sorted(left_out - optional):
            raise InputError(
                f"schema {self.dataset!r}: {unknown[0]!r} cannot be left out: the features that can are "
                f"{sorted(optional)}"
            )
        features = tuple(f for f in self.features if f.name not in left_out)
        of_ids = {f.table for f in features if f.kind in KINDS_OF_IDS}
        tables = {name: table for name, table in self.tables.items() if name in of_ids}
        return replace(self, features=features, tables=tables)

    def without_pretrained(self) -> RequestSchema:
        """The schema with tables that start at random, of a model whose weights are loaded."""
        # No file, and not None: a model has other parts where a table has more than rows, and keeps them.
        tables = {name: replace(table, pretrained=table.pretrained and "") for name, table in self.tables.items()}
        return replace(self, tables=tables)

    def with_tables(self, tables: Mapping[str, TableConfig]) -> RequestSchema:
        """The schema with other tables for some ids, so that a run reads the same data into smaller ones.

        Args:
            tables: by the name of the table.

        Raises:
            InputError: there is no such table, or it refuses ids that the schema allows.

        Example::

            schema.with_tables({"user_id": TableConfig(rows=100_000, vocabulary="hash")})
        """
        changed = replace(self, tables={**self.tables, **tables})
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
        given = {_read_as(f): f for f in data.features}
        for feature in self.features:
            other = given.get(_read_as(feature))
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
        return self._arrow_schema

    @cached_property
    def _arrow_schema(self) -> pa.Schema:
        columns = dict.fromkeys(OWN_COLUMNS, pa.int64()) | {f.source: f.arrow_type for f in self.features}
        nullable = {f.source for f in self.features if f.nullable}
        return pa.schema([pa.field(name, kind, name in nullable) for name, kind in columns.items()])

    @cached_property
    def contents(self) -> dict[str, Content]:
        """What the values of each column of `arrow_schema()` are; times, if any feature reads them as such."""
        contents = dict(OWN_COLUMNS)
        for feature in self.features:
            if contents.setdefault(feature.source, feature.content) != "time":
                contents[feature.source] = feature.content
        return contents

    def to_json(self) -> str:
        """The schema as readable JSON, features without the fields that have their default."""
        record: dict[str, Any] = {"dataset": self.dataset, "features": [feature.record() for feature in self.features]}
        record["format_version"] = FORMAT_VERSION
        if self.tables:
            record["tables"] = {name: table.record() for name, table in self.tables.items()}
        return json.dumps(record, indent=2) + "\n"

    @classmethod
    def from_json(
        cls, text: str, source: str = "schema", vocabularies: Mapping[str, Vocabulary] | None = None
    ) -> RequestSchema:
        """Read a schema back from `to_json`.

        Args:
            text: the JSON.
            source: where it comes from, for error messages.
            vocabularies: of the tables that have one.

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
            features = tuple(Feature(**feature) for feature in record["features"])
            tables = {name: TableConfig(**table) for name, table in record.get("tables", {}).items()}
            return cls(record["dataset"], features, tables=tables, vocabularies=vocabularies or {})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{source}: not a request schema ({error}): prepare the data again") from error

    @classmethod
    def load(cls, folder: str | Location) -> RequestSchema:
        """Read `schema.json` of a prepared data folder.

        Raises:
            InputError: the folder has none, or one that cannot be read.
        """
        path = location(folder) / SCHEMA_FILE
        if not path.is_file():
            raise InputError(f"{path}: no such file: prepare the data first (torchrec-amort prepare --help)")
        return cls.from_json(path.read_text(encoding="utf-8"), str(path), load_vocabularies(path.parent))

    def save(self, folder: str | Path) -> None:
        """Write `schema.json`, and the vocabularies beside it, into a folder.

        Example::

            schema.save("data/films")
        """
        for table, vocabulary in self.vocabularies.items():
            path = local_path(folder) / vocabulary_file(quote(table, safe=""))
            pq.write_table(pa.table({"value": vocabulary.values}), path)
        write_text(local_path(folder) / SCHEMA_FILE, self.to_json())


def load_vocabularies(folder: Location) -> dict[str, Vocabulary]:
    """The vocabularies that are in a folder, by their tables.

    Args:
        folder: that of a `schema.json`.

    Raises:
        InputError: a file is none.
    """
    vocabularies = {}
    found: Iterable[Location] = folder.glob(vocabulary_file("*"))
    for file in sorted(found, key=str):
        with reading(file, "not a vocabulary", "copy it again"), open_parquet(file) as opened:
            values = opened.read()
        try:
            vocabulary = Vocabulary(values["value"].combine_chunks())
        except (KeyError, ValueError) as error:
            raise InputError(f"{file}: not a vocabulary ({one_line(error)}): copy it again") from error
        vocabularies[unquote(file.name.removeprefix("vocabulary-").removesuffix(".parquet"))] = vocabulary
    return vocabularies


def vocabulary_file(table: str) -> str:
    """Name of the file of a table's vocabulary, beside `schema.json`."""
    return f"vocabulary-{table}.parquet"


def _unusual(config: Feature | TableConfig, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that do not have their default, or the one that is given for it."""
    usual = {field.name: field.default for field in fields(config)} | dict(defaults)
    return {name: value for name, value in asdict(config).items() if value != usual[name]}


def _counted(features: Iterable[Feature]) -> str:
    inputs = [feature for feature in features if feature.kind not in KINDS_NOT_READ]
    return next((feature for feature in inputs if feature.kind == "item"), inputs[0]).source


def _read_as(feature: Feature) -> tuple[object, ...]:
    """What makes two features the same input of a model."""
    shape = feature.size, feature.is_looked_up, feature.text
    return feature.name, feature.side, feature.kind, feature.source, feature.history, shape


def refuse_missing(columns: Iterable[str], present: Iterable[str], source: str) -> None:
    """Raise an `InputError` that names the first of `columns` that is not `present`."""
    have = list(present)
    for column in columns:
        if column not in have:
            raise InputError(f"{source}: column {column!r} is missing (there are {have}): give it with every request")


def refuse_missing_columns(schema: RequestSchema, present: Iterable[str], source: str) -> None:
    """Raise an `InputError` that names the first column that a schema reads and that is not `present`.

    Without labels, none of weights is read, either.
    """
    have = list(present)
    columns = [feature.source for feature in schema.features]
    if not any(feature.source in have for feature in schema.label_features):
        unread = {feature.source for feature in (*schema.label_features, *schema.weight_features)}
        columns = [column for column in columns if column not in unread]
    refuse_missing([*columns, *(["time"] if schema.needs_time else [])], have, source)
