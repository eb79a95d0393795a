"""What is counted of a prepared folder: its requests, ids that training does not have, events that may leak."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_amort.columns import typed_table
from torchrec_amort.data.events import StoredHistories
from torchrec_amort.data.parquet import visible_files
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.hashing import ids_of_text
from torchrec_amort.schema import KINDS_OF_IDS, Feature, RequestSchema
from torchrec_amort.stores import Location, location, open_parquet, reading

COUNTS_FILE = "counts.json"
TRAIN = "train"
SIZES = ("requests", "candidates", "users")
MOST_WAITING = 2**20
_NUMBERS = ("requests", "candidates", "same_second")
_COUNTED = pa.schema({"column": pa.string(), "id": pa.int64(), "count": pa.int64()})

_logger = logging.getLogger(__name__)


class IdCounts:
    """Counts the ids of a split, some requests at a time, to tell which ones training does not have.

    Args:
        schema: what the requests are made of, and what becomes of ids outside its tables.

    Example::

        train, test = IdCounts(schema), IdCounts(schema)
        train.add(train_table)
        test.add(test_table)
        test.unknown_shares(train)["candidate_item"]
    """

    def __init__(self, schema: RequestSchema) -> None:
        self.features = [feature for feature in schema.features if feature.kind in KINDS_OF_IDS]
        self._vocabularies = schema.vocabularies
        self._columns = {feature.source: _Column() for feature in self.features}

    def add(self, table: pa.Table) -> None:
        """Count the ids of some requests, in columns of the schema's types."""
        for name, column in self._columns.items():
            ids = _entries(table[name])
            column.nulls += ids.null_count
            ids = ids.drop_null()
            column.add(ids_of_text(ids) if pa.types.is_string(ids.type) else ids.to_numpy())

    def counted(self) -> pa.Table:
        """How often each id came, by column; a row without an id tells of nulls."""
        parts = []
        for name, column in self._columns.items():
            ids, counts = column.counted()
            counted = pa.array(np.append(counts, column.nulls).astype(np.int64))
            with_null = pa.concat_arrays([pa.array(ids, pa.int64()), pa.nulls(1, pa.int64())])
            names = pa.repeat(pa.scalar(name), len(counted))
            parts.append(pa.table({"column": names, "id": with_null, "count": counted}))
        return pa.concat_tables(parts or [_COUNTED.empty_table()])

    def add_counted(self, table: pa.Table) -> None:
        """Count what another has counted, as `counted` gave it."""
        for name, column in self._columns.items():
            rows = table.filter(pc.equal(table["column"], name))
            is_null = rows["id"].is_null()
            column.nulls += pc.sum(rows.filter(is_null)["count"]).as_py() or 0
            rows = rows.filter(pc.invert(is_null))
            column.add_counted(rows["id"].to_numpy(), rows["count"].to_numpy())

    def unknown_shares(self, train: IdCounts | None) -> dict[str, float]:
        """The share of each feature's ids that a model does not know.

        Args:
            train: of the split that it is trained on; without it only a vocabulary makes an id unknown.

        Returns:
            dict: shares by feature, of ids that no feature of the same table has in training, that are the unknown
            id 0 of a vocabulary, or that are null.
        """
        return {feature.name: self._unknown_share(feature, train) for feature in self.features}

    def _unknown_share(self, feature: Feature, train: IdCounts | None) -> float:
        ids, counts = self._columns[feature.source].counted()
        is_unknown = np.zeros(len(ids), bool)
        if feature.vocabulary == "unknown":
            is_unknown = (ids <= 0) | (ids >= (feature.table_size or 0))
        elif feature.vocabulary == "hash" and not feature.text:
            is_unknown = ids == 0
        elif feature.vocabulary == "file":
            is_unknown = self._vocabularies[feature.table].rows(ids) == 0
        if train is not None:
            columns = {f.source for f in train.features if f.table == feature.table}
            known = [train._columns[column].counted()[0] for column in columns]
            is_unknown |= ~np.isin(ids, np.concatenate(known))
        nulls = self._columns[feature.source].nulls
        return float((counts[is_unknown].sum() + nulls) / max(1, counts.sum() + nulls))


class _Column:
    """The different ids of a column, in order, and how often each came."""

    def __init__(self) -> None:
        self._ids = self._counts = np.empty(0, np.int64)
        self._waiting: list[np.ndarray] = []
        self.nulls = 0
        self._num_waiting = 0

    def add_counted(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Add different ids that were counted elsewhere."""
        self._merge(ids, counts, *self.counted())

    def add(self, ids: np.ndarray) -> None:
        self._waiting.append(ids)
        self._num_waiting += len(ids)
        # As many as there are already, so that each is sorted a few times only.
        if self._num_waiting >= max(MOST_WAITING, len(self._ids)):
            self.counted()

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        if self._waiting:
            waiting = np.unique(np.concatenate(self._waiting), return_counts=True)
            self._waiting, self._num_waiting = [], 0
            self._merge(*waiting, self._ids, self._counts)
        return self._ids, self._counts

    def _merge(self, ids: np.ndarray, counts: np.ndarray, others: np.ndarray, other_counts: np.ndarray) -> None:
        self._ids, place = np.unique(np.concatenate([ids, others]), return_inverse=True)
        self._counts = np.bincount(place, np.concatenate([counts, other_counts]), minlength=len(self._ids))


class SplitCounts:
    """Counts the requests of a split, some at a time.

    Args:
        split: its name, for messages.
        schema: what the requests are made of.
        refuse_same_second: refuse a request with an event of its own second, instead of counting it.
        is_finer: events were kept by times that are finer than seconds: those of a request's second came before it.

    Example::

        train = SplitCounts("train", schema)
        train.add(train_table)
        train.record(train.ids)["requests"]
    """

    def __init__(
        self, split: str, schema: RequestSchema, refuse_same_second: bool = False, is_finer: bool = False
    ) -> None:
        self.split = split
        self.ids = IdCounts(schema)
        self._requests = self._candidates = 0
        self._users: set[int] = set()
        self._event_times = [feature.source for feature in schema.of("event", "age")]
        self._candidate_column = schema.candidate_column
        self._refuse_same_second, self._is_finer = refuse_same_second, is_finer
        self._same_second, self._example = 0, ""

    @property
    def requests(self) -> int:
        """How many there are."""
        return self._requests

    def add(self, table: pa.Table) -> None:
        """Count requests, in columns of the schema's types.

        Raises:
            InputError: a request has an event of its own second, if that is to be refused.
        """
        self._count_same_second(table)
        self._requests += table.num_rows
        self._candidates += pc.sum(pc.list_value_length(table[self._candidate_column])).as_py() or 0
        self._users.update(table["user"].to_pylist())
        self.ids.add(table)

    def save(self, path: Path) -> None:
        """Write all that is counted, for a build that goes on."""
        users = pa.array(sorted(self._users), pa.int64())
        none = pa.nulls(len(users), pa.int64())
        table = pa.concat_tables(
            [self.ids.counted(), pa.table({"column": pa.nulls(len(users), pa.string()), "id": users, "count": none})]
        )
        numbers = {name: str(getattr(self, f"_{name}")) for name in _NUMBERS}
        pq.write_table(table.replace_schema_metadata(numbers), path, compression="zstd")

    def add_saved(self, path: Path) -> None:
        """Count what an earlier build has counted.

        Raises:
            InputError: the file cannot be read.
        """
        with reading(path, "cannot be read", "copy the folder again"):
            table = pq.read_table(path)
        numbers = {key.decode(): int(value) for key, value in (table.schema.metadata or {}).items()}
        for name in _NUMBERS:
            setattr(self, f"_{name}", getattr(self, f"_{name}") + numbers[name])
        is_user = table["column"].is_null()
        self._users.update(table.filter(is_user)["id"].to_pylist())
        self.ids.add_counted(table.filter(pc.invert(is_user)))

    def _count_same_second(self, table: pa.Table) -> None:
        times = table["time"].to_numpy()
        is_same = np.zeros(len(times), bool)
        for column in self._event_times:
            events = table[column].combine_chunks()
            request_of_event = np.repeat(np.arange(len(times)), events.value_lengths().to_numpy())
            rows = request_of_event[events.flatten().to_numpy() == times[request_of_event]]
            if not len(rows):
                continue
            row = int(rows[0])
            if self._refuse_same_second:
                raise InputError(
                    f"{self.split}: request {self._requests + row}: {column} has an event at {times[row]}, the "
                    "request's own second: keep events strictly before their request"
                )
            self._example = self._example or f"request {self._requests + row} has one in {column}"
            is_same[rows] = True
        self._same_second += int(is_same.sum())

    def record(self, train: IdCounts | None) -> dict[str, Any]:
        """The counts, for `counts.json`; warnings tell what looks wrong.

        Args:
            train: of the split that models are trained on, if there is one.

        Returns:
            dict: `requests`, `candidates`, `users`; `unknown_ids`, see `IdCounts.unknown_shares`; and
            `same_second_requests`, those with an event of their own second.
        """
        unknown = self.ids.unknown_shares(train)
        warn_of_unknown(unknown, self.split)
        if self._same_second and not self._is_finer:
            _logger.warning(
                "%s: %s of %s requests have events of their own second (%s): a log that was joined with <= tells "
                "what was shown; keep events strictly before their request, or refuse these requests",
                self.split,
                f"{self._same_second:,}",
                f"{self._requests:,}",
                self._example,
            )
        return {
            "requests": self._requests,
            "candidates": self._candidates,
            "users": len(self._users),
            "unknown_ids": unknown,
            "same_second_requests": self._same_second,
        }


def warn_of_unknown(shares: Mapping[str, float], where: str) -> None:
    """Warn of features all of whose ids are unknown.

    Args:
        shares: of unknown ids, by feature.
        where: the split.
    """
    if features := [name for name, share in shares.items() if share == 1.0]:
        _logger.warning("%s: all ids of %s are unknown: a model cannot tell them apart", where, ", ".join(features))


def unknown_in_words(shares: Mapping[str, float]) -> str:
    """The features that have unknown ids, those with the largest share first.

    Example::

        unknown_in_words({"user_id": 0.19, "hour": 0.0})  # "user_id 19.0%"
    """
    some = sorted(((share, name) for name, share in shares.items() if share > 0), reverse=True)
    return ", ".join(f"{name} {share:.1%}" for share, name in some) or "none"


def split_table(counts: Mapping[str, Mapping[str, Any]]) -> str:
    """What `counts.json` tells of each split, as text."""
    lines = [f"{'split':<12}{'requests':>12}{'candidates':>14}{'users':>10}  unknown ids"]
    for split, count in counts.items():
        row = f"{split:<12}{count['requests']:>12,}{count['candidates']:>14,}{count['users']:>10,}"
        lines.append(f"{row}  {unknown_in_words(count.get('unknown_ids', {}))}")
    return "\n".join(lines)


def unknown_ids(folder: str | Location, split: str, schema: RequestSchema) -> dict[str, float]:
    """The share of each feature's ids that a model that is trained on a folder does not know; it warns of whole ones.

    Args:
        folder: prepared data folder.
        split: whose ids.
        schema: what the model reads. The ids are counted again if its tables are not the folder's, or if an earlier
            version prepared the folder.

    Returns:
        dict: see `IdCounts.unknown_shares`.

    Raises:
        InputError: there are no counts, or no such split.

    Example::

        unknown_ids("data/movielens-1m", "test", schema)["candidate_item"]
    """
    counts, prepared = read_counts(folder), RequestSchema.load(folder)
    if split not in counts:
        raise InputError(
            f"{location(folder) / COUNTS_FILE}: no split {split!r}, but {list(counts)}: choose one of these"
        )
    features = [feature.name for feature in IdCounts(schema).features]
    if set(schema.features) <= set(prepared.features) and "unknown_ids" in counts[split]:
        shares = {name: counts[split]["unknown_ids"][name] for name in features}
    else:
        train = _counted(folder, TRAIN, schema) if TRAIN in counts else None
        shares = _counted(folder, split, schema).unknown_shares(train)
    warn_of_unknown(shares, str(location(folder) / split))
    return shares


def _counted(folder: str | Location, split: str, schema: RequestSchema) -> IdCounts:
    counts = IdCounts(schema)
    columns = list(dict.fromkeys(feature.source for feature in counts.features))
    histories = StoredHistories.load(folder)
    for path in files_of(folder, split):
        with reading(path, "not a complete Parquet file", "copy it again"), open_parquet(path) as file:
            for batch in file.iter_batches(columns=histories.written(columns)):
                table = histories.with_lists(pa.Table.from_batches([batch]), columns)
                counts.add(typed_table(table, schema, str(path)))
    return counts


def sizes(counts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """The numbers of requests, candidates and users of each split, of all that `counts.json` tells."""
    return {split: {name: count[name] for name in SIZES} for split, count in counts.items()}


def read_counts(folder: str | Location) -> dict[str, dict[str, Any]]:
    """The counts of each split of a prepared folder.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    path = location(folder) / COUNTS_FILE
    try:
        counts: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}): prepare the data again") from error
    return counts


def files_of(folder: str | Location, split: str) -> list[Location]:
    """The Parquet files of a split: those that `counts.json` names, or all that are there if it names none."""
    counts, files = location(folder) / COUNTS_FILE, location(folder) / split
    named = read_counts(folder).get(split, {}).get("files") if counts.is_file() else None
    return visible_files(files.glob("*.parquet"), files) if named is None else [files / name for name in named]


def _entries(column: pa.ChunkedArray) -> pa.Array:
    """All ids of a column, lists opened."""
    array = column.combine_chunks()
    while pa.types.is_list(array.type):
        array = array.flatten()
    return array
