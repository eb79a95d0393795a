"""Reads a log of impressions in the types of a schema, and refuses what would be lost."""

from __future__ import annotations

import glob
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_amort.columns import MisfitError, decoded, typed
from torchrec_amort.data.parquet import HIDDEN, visible_files
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.progress import progress
from torchrec_amort.schema import RequestSchema
from torchrec_amort.stores import Location, local_path, open_parquet, reading

SPLITS = ("train", "validation", "test")
# A batch has at most as many rows, and about as many bytes: a row of a long history may have a hundred kilobytes.
ROWS_PER_BATCH = 16_384
BYTES_PER_BATCH = 32 * 2**20
# Rows of a file are not alike, and what is decoded at once is of one number of rows for the whole file.
_MOST_ROWS_AT_ONCE = 128

Paths = str | Path


def impression_schema(schema: RequestSchema) -> pa.Schema:
    """The columns of a log of impressions: one row per candidate.

    Args:
        schema: what the requests are made of.

    Returns:
        pa.Schema: those of `schema.arrow_schema()`, a candidate's features without the list around them.

    Example::

        impression_schema(schema).field("candidate_item").type  # int64
    """
    candidate = candidate_columns(schema)
    return pa.schema(
        [
            pa.field(field.name, field.type.value_type if field.name in candidate else field.type, field.nullable)
            for field in schema.arrow_schema()
        ]
    )


def candidate_columns(schema: RequestSchema) -> list[str]:
    """The columns that differ between the candidates of a request."""
    return list(dict.fromkeys(feature.source for feature in schema.of("candidate")))


@dataclass(frozen=True)
class _File:
    """A file of the log, and the number of its first row among all rows."""

    path: Path
    split: str
    first_row: int
    num_rows: int


class ImpressionLog:
    """The rows of all splits, one after the other, in the types of the schema. Rows are numbered from 0.

    Args:
        log: the Parquet file, folder of such files or pattern of each split, or only one, to be split by time.
        schema: what the requests are made of.
        request_key: the columns whose values together tell a request; `request_id` if None.
        drop: columns that are left out.
        rounded: columns of floats that may be rounded to float32, and of times that may be cut to whole seconds.

    Raises:
        InputError: a file cannot be read, a column is missing, or one would be lost.

    Example::

        log = ImpressionLog({"train": "log/train.parquet"}, schema)
        for first_row, table in log.batches(["user", "time"]):
            ...
    """

    def __init__(
        self,
        log: Paths | Mapping[str, Paths],
        schema: RequestSchema,
        request_key: Sequence[str] | None = None,
        drop: Collection[str] = (),
        rounded: Collection[str] = (),
    ) -> None:
        self.schema = schema
        self.by_time = not isinstance(log, Mapping)
        given = log if isinstance(log, Mapping) else {"": log}
        if unknown := [split for split in given if split not in SPLITS and not self.by_time]:
            raise InputError(f"log: no split {unknown[0]!r}: the splits are {', '.join(SPLITS)}")
        self.splits = [split for split in ("", *SPLITS) if split in given]
        self.files: list[_File] = []
        names: dict[Path, list[str]] = {}
        for split in self.splits:
            for path, top in _expand(given[split]):
                num_rows, names[path] = open_file(path, top)
                self.files.append(_File(path, split, self.num_rows, num_rows))
        if not self.num_rows:
            raise InputError(f"{', '.join(str(path) for path in self.paths)}: no rows: give a log that has some")
        self.has_id = "request_id" not in drop and any("request_id" in columns for columns in names.values())
        self.key = self._key(request_key)
        columns = [name for name in schema.arrow_schema().names if name != "request_id" or self.has_id]
        self._refuse_options(columns, drop, rounded, names)
        for path, present in names.items():
            refuse_columns(path, present, [*columns, *self.key], drop)
        types = impression_schema(schema)
        self.fields = {name: types.field(name) for name in columns}
        self.contents = schema.contents
        self.rounded = rounded

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return self.files[-1].first_row + self.files[-1].num_rows if self.files else 0

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [file.path for file in self.files]

    @property
    def paths_by_split(self) -> dict[str, list[str]]:
        """The files of each split, for the report."""
        return {
            split or "by time": [str(file.path) for file in self.files if file.split == split] for split in self.splits
        }

    def _key(self, request_key: Sequence[str] | None) -> list[str]:
        if self.has_id and request_key not in (None, ["request_id"]):
            raise InputError(
                f"request_key is {list(request_key or [])}, but the log has a request_id: leave out request_key, or "
                "name request_id in drop"
            )
        if not self.has_id and not request_key:
            raise InputError(
                f"{self.files[0].path}: no column request_id: name the columns that tell a request in request_key, "
                "[user, time] for example"
            )
        return list(request_key or ["request_id"])

    def _refuse_options(
        self,
        columns: Sequence[str],
        drop: Collection[str],
        rounded: Collection[str],
        names: Mapping[Path, Sequence[str]],
    ) -> None:
        if needed := sorted(set(drop) & set(columns)):
            raise InputError(f"drop: {needed[0]!r} is a column of the schema: take it out of the schema, or keep it")
        if absent := sorted(set(drop) - set(itertools.chain(*names.values()))):
            raise InputError(f"drop: {absent[0]!r} is no column of the log")
        can_round = [name for name, content in self.schema.contents.items() if content != "id"]
        if others := sorted(set(rounded) - set(can_round)):
            raise InputError(f"rounded: {others[0]!r} is no column of floats or times; there are {can_round}")

    def at(self, row: int) -> str:
        """Where a row is, for messages."""
        file = next(file for file in self.files if row < file.first_row + file.num_rows)
        return f"{file.path}: row {row - file.first_row}"

    def split_of_rows(self) -> np.ndarray:
        """The number of each row's split: [rows]."""
        splits = [self.splits.index(file.split) for file in self.files]
        return np.repeat(np.array(splits, np.int8), [file.num_rows for file in self.files])

    def keys(self) -> pa.Table:
        """The key of all rows."""
        tables = []
        with progress(total=self.num_rows, desc="read keys", unit="rows") as bar:
            for file in self.files:
                batches = [_decoded(batch) for batch in batches_of(file.path, self.key)]
                tables += [pa.concat_tables(batches)] if batches else []
                bar.update(file.num_rows)
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(f"{self.key}: is not of one type in all files of the log ({one_line(error)})") from error
        for name in self.key:
            if table[name].null_count:
                row = int(np.flatnonzero(table[name].is_null().to_numpy())[0])
                raise InputError(f"{self.at(row)}: {name} is null, but tells the request: write a value")
        return table

    def key_of(self, row: int) -> str:
        """The key of one row, for messages."""
        file = next(file for file in self.files if row < file.first_row + file.num_rows)
        skipped = row - file.first_row
        for batch in batches_of(file.path, self.key):
            if skipped < batch.num_rows:
                return ", ".join(f"{name} {value}" for name, value in batch.slice(skipped, 1).to_pylist()[0].items())
            skipped -= batch.num_rows
        raise InputError(f"{file.path}: changed while it was read: read it again")

    def batches(self, names: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Some thousand rows at a time of some columns, fewer if they are long, after the number of the first of them.

        Raises:
            InputError: a value that its type does not hold exactly: names the file, the row and the value.
        """
        for file in self.files:
            row = file.first_row
            for batch in batches_of(file.path, names):
                yield row, pa.table({name: self._exact(name, batch[name], row) for name in names})
                row += batch.num_rows

    def _exact(self, name: str, column: pa.ChunkedArray, first_row: int) -> pa.Array:
        field, content, rounded = self.fields[name], self.contents[name], name in self.rounded
        try:
            return typed(column, field.type, content, rounded=rounded, finite=True, nullable=field.nullable)
        except MisfitError as misfit:
            where = self.at(first_row + misfit.place)
            advice = f", or name the column in rounded, {misfit.if_rounded}" if misfit.if_rounded else ""
            raise InputError(f"{where}: {name} {misfit}: mend the log{advice}") from misfit


def _expand(given: Paths) -> list[tuple[Path, Path]]:
    """The Parquet files of a file, folder or pattern, in the order of their names, each with the folder that is given.

    A pattern's is what stands before the first wildcard.
    """
    path = local_path(given)
    if path.is_file():
        return [(path, path.parent)]
    if path.is_dir():
        top, found = path, visible_files(path.rglob("*.parquet"), path)
    else:
        fixed = next((place for place, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts))
        top, free = Path(*path.parts[:fixed]), path.parts[fixed:]
        matched = [Path(name) for name in glob.glob(str(given), recursive=True)]
        files = {file for match in matched for file in (match.rglob("*.parquet") if match.is_dir() else [match])}
        # What the pattern itself names is meant.
        found = visible_files(files, top, "".join(set(HIDDEN) - {part[0] for part in free}))
    if not found:
        raise InputError(f"{given}: no such file, folder or pattern, or no Parquet files there")
    return [(file, top) for file in found]


def open_file(path: Location, top: Location) -> tuple[int, list[str]]:
    """Number of rows and columns of a file; what the names of folders below the given one tell are columns, too."""
    with reading(path, "not a complete Parquet file", "copy it again"), open_parquet(path) as file:
        names = file.schema_arrow.names
        num_rows = file.metadata.num_rows
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path}: column {twice[0]!r} is there twice: rename one")
    folders = path.parent.parts[len(top.parts) :]
    return num_rows, [*names, *(folder.partition("=")[0] for folder in folders if "=" in folder)]


def refuse_columns(path: Location, present: Sequence[str], wanted: Sequence[str], drop: Collection[str]) -> None:
    """Refuse a file that lacks a column, or has one that is neither wanted nor dropped."""
    if missing := [name for name in wanted if name not in present]:
        raise InputError(
            f"{path}: column {missing[0]!r} is missing (there are {list(present)}): rename the log's column, or take "
            "the feature out of the schema"
        )
    if others := [name for name in present if name not in wanted and name not in drop]:
        raise InputError(
            f"{path}: the schema does not name the columns {others}, they would be lost: add features for them, or "
            f"leave them out by name: drop [{','.join(others)}]"
        )


def batches_of(path: Location, names: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of a file, as many rows at a time as `ROWS_PER_BATCH` and `BYTES_PER_BATCH` allow, at least one."""
    pending: list[pa.RecordBatch] = []
    with reading(path, "cannot be read", "copy it again"), open_parquet(path) as file:
        for batch in file.iter_batches(_rows_at_once(file.metadata, names), columns=list(names)):
            pending.append(batch)
            rows, size = sum(b.num_rows for b in pending), sum(b.nbytes for b in pending)
            if rows >= ROWS_PER_BATCH or size >= BYTES_PER_BATCH:
                yield pa.Table.from_batches(pending).select(list(names))
                pending = []
        if pending:
            yield pa.Table.from_batches(pending).select(list(names))


def _rows_at_once(metadata: pq.FileMetaData, names: Sequence[str]) -> int:
    """How many rows of a file are decoded at once: of the longest row group, a batch's bytes on average.

    Compressed and encoded sizes tell nothing of that, a history that repeats takes no space; numbers of values do.
    """
    bytes_per_row = 1.0
    for group in (metadata.row_group(place) for place in range(metadata.num_row_groups)):
        leaves = (group.column(place) for place in range(group.num_columns))
        values = sum(leaf.num_values for leaf in leaves if leaf.path_in_schema.partition(".")[0] in names)
        bytes_per_row = max(bytes_per_row, 8 * values / max(group.num_rows, 1))
    return max(1, min(_MOST_ROWS_AT_ONCE, int(BYTES_PER_BATCH / bytes_per_row)))


def _decoded(table: pa.Table) -> pa.Table:
    """The table without dictionaries."""
    return pa.table(
        {name: pa.chunked_array([decoded(chunk) for chunk in table[name].chunks]) for name in table.column_names}
    )
