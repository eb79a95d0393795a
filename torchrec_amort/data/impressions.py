"""From a log of impressions to request-level Parquet and back, without loss.

A log of impressions has one row for each candidate that was shown, and repeats the request's features and its
history in each of them.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from torchrec_amort.batch import RequestBatch
from torchrec_amort.columns import typed_table
from torchrec_amort.data.counts import COUNTS_FILE, files_of, read_counts, sizes
from torchrec_amort.data.events import StoredHistories
from torchrec_amort.data.log import (
    BYTES_PER_BATCH,
    ROWS_PER_BATCH,
    SPLITS,
    ImpressionLog,
    Paths,
    batches_of,
    candidate_columns,
    impression_schema,
    open_file,
    refuse_columns,
)
from torchrec_amort.data.splits import lists_of, ranges, split_bounds
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError
from torchrec_amort.files import new_folder, write_json
from torchrec_amort.progress import progress
from torchrec_amort.schema import RequestSchema
from torchrec_amort.stores import Location, local_path, location, open_parquet, size_of

REPORT_FILE = "migration.json"

# The log is sorted by dealing it to buckets of neighbouring requests, each a file that is open, and then one by one.
ROWS_PER_BUCKET = 65_536
MOST_BUCKETS = 128
# Of a bucket, as many requests as have about that many bytes are put together at once.
BYTES_PER_MERGE = 64 * 2**20

PLACE, ROW = ".place", ".row"


def to_requests(
    log: Paths | Mapping[str, Paths],
    schema: RequestSchema,
    out: str | Path,
    *,
    request_key: Sequence[str] | None = None,
    drop: Collection[str] = (),
    rounded: Collection[str] = (),
    overwrite: bool = False,
    refuse_same_second: bool = False,
) -> dict[str, Any]:
    """Write the impressions of a log as a prepared data folder.

    Requests come in the order of their first row in the log, split by split; their candidates in the log's order.
    Rows of one request need not be neighbours.

    Args:
        log: the Parquet file, the folder of such files or the pattern (`log/*.parquet`) of each split. If there is only
            one for all, it is split in order of the requests' times: the first 80% of its rows are train, the next
            10% validation.
        schema: what the requests are made of.
        out: the folder to make, whole or not at all.
        request_key: the columns whose values together tell a request; `request_id` unless given. With a key, the log
            has no `request_id`, or it is dropped: requests are numbered in the order of their first rows.
        drop: columns of the log that are left out.
        rounded: columns of floats that may be rounded to float32, and of times that may be cut to whole seconds.
        overwrite: replace a folder that is there.
        refuse_same_second: see `write_requests`.

    Returns:
        dict: what is written to `migration.json`: counts, and sizes in both forms.

    Raises:
        InputError: the log cannot be read, or something of it would be lost: a column that the schema does not name, a
            value that its type does not hold exactly, rows of one request that differ in what is the request's, a
            request in two splits.

    Example::

        to_requests({"train": "log/train.parquet", "test": "log/test.parquet"}, schema, "data/films")
    """
    started = time.perf_counter()
    with new_folder(out, overwrite) as temporary:
        source = ImpressionLog(log, schema, request_key, drop, rounded)
        _refuse_replacing(Path(out), source.paths)
        requests = _Requests(source)
        merged = _Merged(source, requests, temporary)
        with progress(total=len(requests.sizes), desc="write", unit="requests") as bar:
            # Takes the place of the temporary folder, and of the merged requests' files within it.
            counts = write_requests(
                temporary, schema, merged.tables(bar), overwrite=True, refuse_same_second=refuse_same_second
            )
        report = {
            "log": source.paths_by_split,
            "request_key": source.key,
            "dropped": sorted(drop),
            "rounded": sorted(rounded),
            **_counts(counts, requests.sizes, merged.users),
            **_sizes(schema, merged.impressions, source.paths, merged.requests, _parts(temporary, counts)),
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_json(temporary / REPORT_FILE, report)
    return report


def to_impressions(folder: str | Location, out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a prepared data folder as a log of impressions: a folder for each split, a row for each candidate.

    Args:
        folder: prepared data folder, on this machine or a store.
        out: the folder to make, whole or not at all: `SPLIT/part-00000.parquet`, ..., and the schema to go back with.
        overwrite: replace a folder that is there.

    Returns:
        dict: what is written to `migration.json`: counts, and sizes in both forms.

    Raises:
        InputError: the folder is not whole, has a column that its schema does not name, or has a request id twice.

    Example::

        to_impressions("data/movielens-1m", "data/movielens-1m-impressions")
    """
    started = time.perf_counter()
    folder, out = location(folder), local_path(out)
    schema = RequestSchema.load(folder)
    counts = sizes(read_counts(folder))
    if isinstance(folder, Path):
        _refuse_replacing(out, [folder])
    if not (parts := _parts(folder, counts)):
        raise InputError(f"{folder}: no requests: prepare the data again")
    with new_folder(out, overwrite) as temporary:
        exploded = _Exploded(schema, StoredHistories.load(folder))
        with progress(total=sum(c["requests"] for c in counts.values()), desc="write", unit="requests") as bar:
            for split, count in counts.items():
                exploded.write_split(folder / split, temporary / split, count, bar)
        exploded.refuse_repeated_ids(folder)
        report = {
            "data": str(folder),
            **_counts(counts, exploded.num_candidates(), exploded.users),
            **_sizes(schema, exploded.impressions, _parts(temporary, counts), exploded.requests, parts),
            "seconds": round(time.perf_counter() - started, 1),
        }
        schema.save(temporary)
        write_json(temporary / REPORT_FILE, report)
    return report


def _refuse_replacing(out: Path, sources: Iterable[Path]) -> None:
    for source in sources:
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise InputError(f"{out}: holds what is read ({source}): choose another folder")


# ----- the requests of the log --------------------------------------------------------------------------------------


class _Requests:
    """Which rows of the log are one request, and where it goes.

    `place_of_row` is the place of each row's request in the order in which requests are written: [rows];
    `sizes` the number of rows of the request at each place, `ids` its id, `bucket` its bucket: [requests].
    """

    def __init__(self, log: ImpressionLog) -> None:
        keys = log.keys()
        number = _number(keys)
        first_row = np.flatnonzero(np.diff(np.maximum.accumulate(number), prepend=-1))
        sizes = np.bincount(number)
        split = self._by_time(log, first_row, sizes) if log.by_time else self._by_file(log, number, first_row)
        order = np.argsort(split, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self.place_of_row = place[number]
        self.sizes = sizes[order]
        self.ids = order
        names = SPLITS if log.by_time else log.splits
        ends = np.cumsum(np.bincount(split, minlength=len(names)))
        self.bounds = dict(zip(names, zip([0, *ends[:-1]], ends, strict=True), strict=True))
        self.bucket = self._buckets(split[order])

    def _by_file(self, log: ImpressionLog, number: np.ndarray, first_row: np.ndarray) -> np.ndarray:
        """The split that holds each request."""
        split_of_row = log.split_of_rows()
        split = split_of_row[first_row]
        if len(wrong := np.flatnonzero(split_of_row != split[number])):
            row = int(wrong[0])
            raise InputError(
                f"{log.at(int(first_row[number[row]]))} and {log.at(row)} are of one request ({log.key_of(row)}) in "
                f"two splits, as are rows of {len(np.unique(number[wrong])):,} of {len(split):,} requests: keep each "
                "request in one split, or name a finer request_key"
            )
        return split

    def _by_time(self, log: ImpressionLog, first_row: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The split that each request falls into by its time."""
        times = np.concatenate([batch["time"].to_numpy() for _, batch in log.batches(["time"])])
        order = np.argsort(times[first_row], kind="stable")
        split = np.empty(len(order), np.int8)
        for place, (start, stop) in enumerate(split_bounds(sizes[order]).values()):
            split[order[start:stop]] = place
        return split

    def _buckets(self, split: np.ndarray) -> np.ndarray:
        """The bucket of each request: neighbours of one split, up to a number of rows."""
        rows_before = np.cumsum(self.sizes) - self.sizes
        rows_per_bucket = max(ROWS_PER_BUCKET, -(-int(self.sizes.sum()) // MOST_BUCKETS))
        return np.cumsum((np.diff(rows_before // rows_per_bucket, prepend=0) != 0) | (np.diff(split, prepend=0) != 0))


def _number(keys: pa.Table) -> np.ndarray:
    """The number of each row's key, in the order of their first rows: [rows]."""
    number = np.zeros(keys.num_rows, np.int64)
    for name in keys.column_names:
        try:
            codes = _codes(keys[name])
        except pa.ArrowNotImplementedError as error:
            raise InputError(f"{name}: is {keys[name].type}, which cannot tell a request: name another key") from error
        # Both are below 2**31, as Arrow numbers values.
        number = _codes(pa.chunked_array([number * (codes.max() + 1) + codes]))
    return number


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    encoded = pc.dictionary_encode(values)
    return np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks]).astype(np.int64)


# ----- from impressions to requests ---------------------------------------------------------------------------------


class _Disagreements:
    """Rows of one request that differ in what is the request's."""

    def __init__(self) -> None:
        self.places: set[int] = set()
        self.first: tuple[tuple[int, int], str, int, Any, Any] | None = None

    def find(self, name: str, array: pa.Array, place: np.ndarray, row: np.ndarray) -> None:
        """Look for them in a column whose rows are in the order of their requests."""
        same_request = np.flatnonzero(np.diff(place) == 0) + 1
        wrong = _differing(array, same_request)
        if not len(wrong):
            return
        self.places.update(place[wrong].tolist())
        at = int(wrong[0])
        where = (int(place[at]), int(row[at]))
        if self.first is None or where < self.first[0]:
            self.first = (where, name, int(row[at - 1]), array[at - 1].as_py(), array[at].as_py())

    def refuse(self, log: ImpressionLog, num_requests: int) -> None:
        """Raise an `InputError` if there are any."""
        if self.first is None:
            return
        (_, row), name, row_before, value_before, value = self.first
        have, other = _difference(value_before, value)
        raise InputError(
            f"{log.at(row_before)} and {log.at(row)} are of one request ({log.key_of(row)}), but {name} {have} in the "
            f"one and {other} in the other; so are rows of {len(self.places):,} of {num_requests:,} requests: mend the "
            "log, or name a finer request_key"
        )


def _differing(array: pa.Array, rows: np.ndarray) -> np.ndarray:
    """Those of the rows that differ from the row before them."""
    return rows[~_equal(array, rows, rows - 1)]


def _equal(array: pa.Array, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each of the rows is what the other one is; a null is what a null is: bool [rows]."""
    is_null = array.is_null().to_numpy(zero_copy_only=False)
    if not pa.types.is_list(array.type):
        one, other = array.take(pa.array(rows)), array.take(pa.array(others))
        return pc.fill_null(pc.equal(one, other), False).to_numpy(zero_copy_only=False) | (
            is_null[rows] & is_null[others]
        )
    lengths = _lengths(array)
    starts = np.cumsum(lengths) - lengths
    is_equal = (lengths[rows] == lengths[others]) & (is_null[rows] == is_null[others])
    rows, others = rows[is_equal], others[is_equal]
    ends, entries = ranges(starts[rows], starts[rows] + lengths[rows])
    _, other_entries = ranges(starts[others], starts[others] + lengths[others])
    wrong = np.flatnonzero(~_equal(array.flatten(), entries, other_entries))
    is_equal[np.flatnonzero(is_equal)[np.searchsorted(ends, wrong, side="right") - 1]] = False
    return is_equal


def _difference(first: Any, second: Any) -> tuple[str, str]:
    """What two values are, told by the first entry that differs if they are lists."""
    if not isinstance(first, list) or second is None:
        return f"is {first}", str(second)
    if len(first) != len(second):
        return f"lists {len(first)} entries", str(len(second))
    entry = next(place for place, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    return f"has {first[entry]} at entry {entry}", str(second[entry])


class _Merged:
    """The requests of a log: rows of one request are put together, batch by batch and then bucket by bucket.

    What a batch has of a request is stored once in the bucket's file; a bucket puts together what the batches had.
    """

    def __init__(self, log: ImpressionLog, requests: _Requests, folder: Path) -> None:
        self.log = log
        self.places = requests
        self.bytes = np.zeros(len(requests.sizes), np.int64)
        self.folder = folder / "buckets"
        self.candidate_columns = candidate_columns(log.schema)
        self.disagreements = _Disagreements()
        self.impressions, self.requests = _Sizes(), _Sizes()
        self.users: set[int] = set()
        self._deal()

    def _deal(self) -> None:
        """Write each bucket's part of each batch to the bucket's file."""
        self.folder.mkdir()
        writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
        with progress(total=self.log.num_rows, desc="read", unit="rows") as bar:
            try:
                for first_row, batch in self.log.batches(list(self.log.fields)):
                    self.impressions.add(batch)
                    table = self._merge(self._single_candidates(batch, first_row))
                    place = table[PLACE].to_numpy()
                    self.bytes[place] += _bytes_of_rows(table)
                    buckets = self.places.bucket[place]
                    starts = np.flatnonzero(np.diff(buckets, prepend=-1))
                    for start, stop in itertools.pairwise([*starts.tolist(), table.num_rows]):
                        bucket = int(buckets[start])
                        if bucket not in writers:
                            options = pa.ipc.IpcWriteOptions(compression="lz4")
                            writers[bucket] = pa.ipc.new_file(str(self._path(bucket)), table.schema, options=options)
                        writers[bucket].write_table(table.slice(start, stop - start))
                    bar.update(batch.num_rows)
            finally:
                for writer in writers.values():
                    writer.close()

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket}.arrow"

    def _single_candidates(self, batch: pa.Table, first_row: int) -> pa.Table:
        """Impressions as requests of one candidate, with their rows and the places of their requests."""
        rows = np.arange(first_row, first_row + batch.num_rows)
        ones = np.ones(batch.num_rows, np.int64)
        columns = {
            name: lists_of(ones, _array(batch, name)) if name in self.candidate_columns else batch[name]
            for name in batch.column_names
        }
        return pa.table({PLACE: self.places.place_of_row[rows], ROW: rows, **columns})

    def _merge(self, table: pa.Table) -> pa.Table:
        """Put the rows of each request together, in the order of requests; its candidates stay in order."""
        place = table[PLACE].to_numpy()
        if (np.diff(place) < 0).any():
            order = np.argsort(place, kind="stable")
            table, place = table.take(order), place[order]
        row = table[ROW].to_numpy()
        starts = np.flatnonzero(np.diff(place, prepend=-1))
        columns = {}
        for name in table.column_names:
            array = _array(table, name)
            if name in self.candidate_columns:
                sizes = np.add.reduceat(_lengths(array), starts)
                columns[name] = lists_of(sizes, array.flatten())
            else:
                if name not in (PLACE, ROW):
                    self.disagreements.find(name, array, place, row)
                columns[name] = array.take(pa.array(starts))
        return pa.table(columns)

    def tables(self, bar: tqdm[Any]) -> dict[str, Iterator[pa.Table]]:
        """For each split, tables of whole requests; to be read in this order."""
        return {split: self._split_tables(start, stop, bar) for split, (start, stop) in self.places.bounds.items()}

    def _split_tables(self, start: int, stop: int, bar: tqdm[Any]) -> Iterator[pa.Table]:
        schema = self.log.schema.arrow_schema()
        for bucket in np.unique(self.places.bucket[start:stop]).tolist():
            for merged in self._bucket_tables(bucket):
                requests = merged if self.log.has_id else self._with_ids(merged)
                requests = requests.select(schema.names)
                self.requests.add(requests)
                self.users.update(requests["user"].to_pylist())
                yield requests
                bar.update(requests.num_rows)
            self._path(bucket).unlink()

    def _with_ids(self, table: pa.Table) -> pa.Table:
        return table.append_column("request_id", pa.array(self.places.ids[table[PLACE].to_numpy()]))

    def _bucket_tables(self, bucket: int) -> Iterator[pa.Table]:
        """The requests of a bucket, some at a time, each whole."""
        first, stop = np.searchsorted(self.places.bucket, [bucket, bucket + 1]).tolist()
        size_before = np.cumsum(self.bytes[first:stop]) - self.bytes[first:stop]
        starts = first + np.flatnonzero(np.diff(size_before // BYTES_PER_MERGE, prepend=-1))
        with pa.ipc.open_file(str(self._path(bucket))) as reader:
            for low, high in itertools.pairwise([*starts.tolist(), stop]):
                parts = [_rows_of_places(reader.get_batch(i), low, high) for i in range(reader.num_record_batches)]
                table = self._merge(pa.Table.from_batches(parts, reader.schema))
                if high == len(self.places.sizes):
                    # Not before, to tell how many there are.
                    self.disagreements.refuse(self.log, len(self.places.sizes))
                yield table


def _rows_of_places(batch: pa.RecordBatch, low: int, high: int) -> pa.RecordBatch:
    """The rows of some requests out of a batch in the order of requests; a copy, unless it is the whole batch."""
    start, stop = np.searchsorted(batch[PLACE].to_numpy(), [low, high]).tolist()
    return batch if stop - start == batch.num_rows else batch.take(pa.array(np.arange(start, stop)))


def _bytes_of_rows(table: pa.Table) -> np.ndarray:
    """About how many bytes each row takes: [rows]."""
    sizes = np.zeros(table.num_rows, np.int64)
    for name in table.column_names:
        sizes += _bytes_of_values(_array(table, name))
    return sizes


def _bytes_of_values(array: pa.Array) -> np.ndarray:
    """Bytes of each value, with those of the ends of lists and text: [values]."""
    if pa.types.is_list(array.type):
        bytes_before = np.concatenate([[0], np.cumsum(_bytes_of_values(array.flatten()))])
        return np.diff(bytes_before[np.cumsum(_lengths(array))], prepend=0) + _BYTES_OF_END
    if pa.types.is_string(array.type):
        return pc.fill_null(pc.binary_length(array), 0).to_numpy().astype(np.int64) + _BYTES_OF_END
    return np.full(len(array), array.type.bit_width // 8)


_BYTES_OF_END = 4


def _lengths(array: pa.Array) -> np.ndarray:
    """Entries of each list, 0 of a null: int64 [lists]."""
    return pc.fill_null(array.value_lengths(), 0).to_numpy().astype(np.int64)


def _array(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece."""
    return table[name].combine_chunks()


# ----- from requests to impressions ---------------------------------------------------------------------------------


class _Exploded:
    """Writes the requests of a prepared folder as impressions."""

    def __init__(self, schema: RequestSchema, histories: StoredHistories) -> None:
        self.schema, self._histories = schema, histories
        self.candidate_columns = candidate_columns(schema)
        self.impressions, self.requests = _Sizes(), _Sizes()
        self.users: set[int] = set()
        self._sizes: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []

    def num_candidates(self, first_table: int = 0) -> np.ndarray:
        """Candidates of each request seen, from one table on: [requests]."""
        return np.concatenate([np.empty(0, np.int64), *self._sizes[first_table:]])

    def write_split(self, folder: Location, out: Path, count: Mapping[str, int], bar: tqdm[Any]) -> None:
        """Write the files of a split, each as one of impressions."""
        out.mkdir()
        first_table = len(self._sizes)
        for path in files_of(folder.parent, folder.name):
            with pq.ParquetWriter(out / path.name, impression_schema(self.schema)) as writer:
                for table in self._read(path):
                    for piece in self._pieces(table):
                        writer.write_table(piece)
                    bar.update(table.num_rows)
        sizes = self.num_candidates(first_table)
        for what, have in (("requests", len(sizes)), ("candidates", int(sizes.sum()))):
            if have != count[what]:
                raise InputError(
                    f"{folder}: the files have {have:,} {what}, but {COUNTS_FILE} tells of {count[what]:,}: copy the "
                    "folder again, or prepare the data again"
                )

    def _read(self, path: Location) -> Iterator[pa.Table]:
        """The requests of a file, checked, some at a time."""
        names = self.schema.arrow_schema().names
        columns = self._histories.written(names)
        refuse_columns(path, open_file(path, path.parent)[1], columns, ())
        row = 0
        for batch in batches_of(path, columns):
            table = typed_table(self._histories.with_lists(batch, names), self.schema, str(path), row)
            RequestBatch.from_arrow(table, self.schema, source=str(path), first_row=row)
            row += table.num_rows
            yield table

    def _pieces(self, table: pa.Table) -> Iterator[pa.Table]:
        """The impressions of requests, as many at a time as a batch has rows or bytes."""
        self.requests.add(table)
        self.users.update(table["user"].to_pylist())
        self._ids.append(table["request_id"].to_numpy())
        sizes = pc.list_value_length(table[self.schema.candidate_column]).to_numpy().astype(np.int64)
        self._sizes.append(sizes)
        request_of_row = np.repeat(np.arange(table.num_rows), sizes)
        bytes_of_row = _bytes_of_rows(table.drop_columns(self.candidate_columns))[request_of_row]
        size_before = np.cumsum(bytes_of_row) - bytes_of_row
        is_first = np.diff(size_before // BYTES_PER_BATCH, prepend=-1) != 0
        starts = np.flatnonzero(is_first | (np.arange(len(is_first)) % ROWS_PER_BATCH == 0))
        for start, stop in itertools.pairwise([*starts.tolist(), len(request_of_row)]):
            piece = self._explode(table, request_of_row[start:stop], start)
            self.impressions.add(piece)
            yield piece

    def _explode(self, table: pa.Table, request_of_row: np.ndarray, first_row: int) -> pa.Table:
        """Rows for some of the candidates of all requests, from one candidate on."""
        columns = [
            _array(table, name).flatten().slice(first_row, len(request_of_row))
            if name in self.candidate_columns
            else _array(table, name).take(pa.array(request_of_row))
            for name in table.column_names
        ]
        return pa.table(columns, impression_schema(self.schema))

    def refuse_repeated_ids(self, folder: Location) -> None:
        """Refuse requests whose impressions could not be told apart."""
        ids, counts = np.unique(np.concatenate(self._ids), return_counts=True)
        if len(repeated := np.flatnonzero(counts > 1)):
            raise InputError(
                f"{folder}: request_id {ids[repeated[0]]} is that of {counts[repeated[0]]} requests, and so are "
                f"{len(repeated):,} ids in all: impressions of such requests could not be told apart, number them anew"
            )


def _parts(folder: Location, splits: Iterable[str]) -> list[Location]:
    return [path for split in splits for path in files_of(folder, split)]


# ----- the report ---------------------------------------------------------------------------------------------------


class _Sizes:
    """Values and bytes of columns in Arrow's memory."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, table: pa.Table) -> None:
        """Add the rows of a table."""
        for name in table.column_names:
            array = _array(table, name)
            self.values[name] += _num_values(array)
            self.bytes[name] += int(_bytes_of_values(array).sum())


def _num_values(array: pa.Array) -> int:
    return _num_values(array.flatten()) if pa.types.is_list(array.type) else len(array)


def _counts(
    splits: Mapping[str, Mapping[str, int]], num_candidates: np.ndarray, users: Collection[int]
) -> dict[str, Any]:
    return {
        "requests": len(num_candidates),
        "impressions": int(num_candidates.sum()),
        "users": len(users),
        "candidates_per_request": {
            "mean": float(num_candidates.mean()),
            "median": float(np.median(num_candidates)),
            "max": int(num_candidates.max()),
        },
        "splits": {split: dict(count) for split, count in splits.items()},
    }


def _sizes(
    schema: RequestSchema, impressions: _Sizes, log: Sequence[Location], requests: _Sizes, parts: Sequence[Location]
) -> dict[str, Any]:
    """What each column takes in both forms: values, bytes in Arrow's memory, and bytes in the files."""
    names, of_candidates = schema.arrow_schema().names, candidate_columns(schema)
    in_log, in_parts = _file_bytes(log, names), _file_bytes(parts, names)
    columns = {
        name: {
            "deduplicated": name not in of_candidates,
            "values": {"impressions": impressions.values[name], "requests": requests.values[name]},
            "arrow_bytes": {"impressions": impressions.bytes[name], "requests": requests.bytes[name]},
            "file_bytes": {"impressions": in_log[name], "requests": in_parts[name]},
        }
        for name in names
    }
    return {
        "columns": columns,
        "arrow_bytes": {"impressions": impressions.bytes.total(), "requests": requests.bytes.total()},
        "file_bytes": {
            "impressions": sum(map(size_of, log)),
            "requests": sum(map(size_of, parts)),
        },
        "dropped_file_bytes": in_log[""],
    }


def _file_bytes(paths: Iterable[Location], names: Sequence[str]) -> Counter[str]:
    """Compressed bytes of each column in Parquet files; of all other columns under no name."""
    sizes: Counter[str] = Counter()
    for path in paths:
        with open_parquet(path) as file:
            metadata = file.metadata
        for group, place in itertools.product(range(metadata.num_row_groups), range(metadata.num_columns)):
            chunk = metadata.row_group(group).column(place)
            leaf = chunk.path_in_schema
            name = next((name for name in names if leaf == name or leaf.startswith(f"{name}.")), "")
            sizes[name] += chunk.total_compressed_size
    return sizes
