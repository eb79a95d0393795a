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
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_amort.data.splits import lists_of
from torchrec_amort.progress import progress
from torchrec_amort.schema import InputError, RequestSchema, one_line

SPLITS = ("train", "validation", "test")
ROWS_PER_BATCH = 16_384

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
            pa.field(field.name, field.type.value_type if field.name in candidate else field.type, nullable=False)
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
        rounded: columns of floats that may be rounded to float32.

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
            for path in _expand(given[split]):
                num_rows, names[path] = open_file(path)
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
        self.types = {name: types.field(name).type for name in columns}
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
        floats = [f.source for f in self.schema.features if f.kind in ("dense", "label")]
        if others := sorted(set(rounded) - set(floats)):
            raise InputError(f"rounded: {others[0]!r} is no column of floats; there are {floats}")

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
                batches = [_decoded(batch) for batch in batches_of(file.path, self.key, ROWS_PER_BATCH)]
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
        for batch in batches_of(file.path, self.key, ROWS_PER_BATCH):
            if skipped < batch.num_rows:
                return ", ".join(f"{name} {value}" for name, value in batch.slice(skipped, 1).to_pylist()[0].items())
            skipped -= batch.num_rows
        raise InputError(f"{file.path}: changed while it was read: read it again")

    def batches(self, names: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Some thousand rows at a time of some columns, after the number of the first of them.

        Raises:
            InputError: a value that its type does not hold exactly: names the file, the row and the value.
        """
        for file in self.files:
            row = file.first_row
            for batch in batches_of(file.path, names, ROWS_PER_BATCH):
                yield row, pa.table({name: self._exact(name, batch[name].combine_chunks(), row) for name in names})
                row += batch.num_rows

    def _exact(self, name: str, array: pa.Array, first_row: int) -> pa.Array:
        try:
            return _exact(array, self.types[name], name in self.rounded)
        except _MisfitError as misfit:
            where = self.at(first_row + misfit.place)
            raise InputError(f"{where}: {name} {misfit}: mend the log{misfit.advice}") from misfit


def _expand(given: Paths) -> list[Path]:
    """The Parquet files of a file, folder or pattern, in the order of their names."""
    path = Path(given)
    if path.is_file():
        return [path]
    found = sorted(
        path.rglob("*.parquet") if path.is_dir() else (Path(p) for p in glob.glob(str(given), recursive=True))
    )
    if not found:
        raise InputError(f"{given}: no such file, folder or pattern, or no Parquet files there")
    return found


def open_file(path: Path) -> tuple[int, list[str]]:
    """Number of rows and columns of a file; those that the names of its folders tell are columns, too."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            num_rows = file.metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a complete Parquet file ({one_line(error)}): copy it again") from error
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path}: column {twice[0]!r} is there twice: rename one")
    return num_rows, [*names, *(part.partition("=")[0] for part in path.parent.parts if "=" in part)]


def refuse_columns(path: Path, present: Sequence[str], wanted: Sequence[str], drop: Collection[str]) -> None:
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


def batches_of(path: Path, names: Sequence[str], size: int) -> Iterator[pa.Table]:
    """Columns of a file, some rows at a time."""
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(size, columns=list(names)):
                yield pa.Table.from_batches([batch]).select(list(names))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}): copy it again") from error


def _decoded(table: pa.Table) -> pa.Table:
    """The table without dictionaries."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table[field.name].cast(field.type.value_type))
    return table


# ----- exact values -------------------------------------------------------------------------------------------------


class _MisfitError(Exception):
    """A value that its type cannot hold, at a place of an array."""

    def __init__(self, place: int, what: str, advice: str = "") -> None:
        super().__init__(what)
        self.place, self.advice = place, advice


_KINDS_OF_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def _exact(array: pa.Array, expected: pa.DataType, rounded: bool) -> pa.Array:
    """The same values in another type, floats rounded to it only if allowed."""
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if array.null_count:
        raise _MisfitError(int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0]), "is null")
    if not pa.types.is_list(expected):
        return _exact_numbers(array, expected, rounded)
    if not any(is_kind(array.type) for is_kind in _KINDS_OF_LISTS):
        raise _MisfitError(0, f"is {array.type}, not a list")
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    try:
        entries = _exact(array.flatten(), expected.value_type, rounded)
    except _MisfitError as misfit:
        row = int(np.searchsorted(np.cumsum(lengths), misfit.place, side="right"))
        raise _MisfitError(row, f"has an entry that {misfit}", misfit.advice) from misfit
    return lists_of(lengths, entries)


def _exact_numbers(array: pa.Array, expected: pa.DataType, rounded: bool) -> pa.Array:
    kind = array.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        advice = ", with times as whole seconds since 1970" if pa.types.is_temporal(kind) else ""
        raise _MisfitError(0, f"is {kind}, not a number", advice)
    if kind.equals(pa.int64()) and pa.types.is_integer(expected):
        return array
    values, dtype = array.to_numpy(zero_copy_only=False), expected.to_pandas_dtype()
    fits = _fits_integer(values) if pa.types.is_integer(expected) else _fits_float(values, rounded)
    if len(wrong := np.flatnonzero(~fits)):
        value, holder = values[wrong[0]].item(), dtype.__name__
        if not np.isfinite(value):
            raise _MisfitError(int(wrong[0]), f"is {value}, not a finite number")
        can_round = pa.types.is_floating(expected) and not rounded
        advice = ", or name the column in rounded, to round it" if can_round else ""
        raise _MisfitError(int(wrong[0]), f"is {value}, which {holder} does not hold exactly", advice)
    return pa.array(values.astype(dtype, copy=False))


def _fits_integer(values: np.ndarray) -> np.ndarray:
    """Which numbers int64 holds exactly."""
    if values.dtype.kind == "f":
        # As float64 the greatest int64 is 2**63, which is none.
        return np.isfinite(values) & (values == np.floor(values)) & (values >= -(2.0**63)) & (values < 2.0**63)
    if values.dtype.kind == "u":
        return values.astype(np.uint64) < np.uint64(2**63)
    return np.ones(len(values), bool)


def _fits_float(values: np.ndarray, rounded: bool) -> np.ndarray:
    """Which numbers are finite as float32, and the same unless they may be rounded."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if rounded:
        return np.isfinite(narrow)
    wide = values.astype(np.float64)
    # Beyond 2**53, float64 does not tell whole numbers apart.
    is_told = (np.abs(wide) < 2.0**53) | (values.dtype.kind == "f")
    return np.isfinite(narrow) & (narrow == wide) & is_told
