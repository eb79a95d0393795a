"""Writes request-level Parquet: one row per request, one folder per split."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_amort.batch import RequestBatch
from torchrec_amort.columns import typed_table
from torchrec_amort.data.counts import COUNTS_FILE, TRAIN, SplitCounts, read_counts, sizes
from torchrec_amort.data.events import StoredHistories, save_histories
from torchrec_amort.data.tables import of_sizes
from torchrec_amort.files import new_folder, write_json
from torchrec_amort.schema import RequestSchema, refuse_missing

ROWS_PER_GROUP = 512
ROWS_PER_FILE = 16_384


def write_requests(
    folder: str | Path,
    schema: RequestSchema,
    splits: Mapping[str, Iterable[pa.Table]],
    *,
    histories: StoredHistories | None = None,
    overwrite: bool = False,
    refuse_same_second: bool = False,
) -> dict[str, dict[str, int]]:
    """Write a prepared data folder: `schema.json`, `counts.json` and `SPLIT/part-00000.parquet`, ...

    Args:
        folder: the folder to make, whole or not at all.
        schema: what the requests are made of.
        splits: for each split, tables with the columns of `schema.arrow_schema()`.
        histories: those whose events are stored once. Tables then have their lists, and the `pointers` that are
            written in place of them. The files are moved into the folder.
        overwrite: replace a folder that is there.
        refuse_same_second: refuse a request with an event of its own second; such requests are counted, with a
            warning, unless it is set.

    Returns:
        dict: for each split, the number of `requests`, `candidates` and `users`; `counts.json` has more, see
            `SplitCounts.record`.

    Raises:
        InputError: the folder is there already, a request does not fit the schema, or one is to be refused.

    Example::

        write_requests("data/films", schema, {"train": [train_table], "test": [test_table]})
    """
    with new_folder(folder, overwrite) as temporary:
        counted = write_splits(temporary, schema, splits, histories=histories, refuse_same_second=refuse_same_second)
        schema.save(temporary)
        if histories is not None and histories.files:
            save_histories(temporary, {name: [file] for name, file in histories.save(temporary).items()})
        write_counts(temporary, counted)
    return sizes(read_counts(folder))


def write_splits(
    folder: Path,
    schema: RequestSchema,
    splits: Mapping[str, Iterable[pa.Table]],
    *,
    histories: StoredHistories | None = None,
    first_files: Mapping[str, int] | None = None,
    refuse_same_second: bool = False,
    is_finer: bool = False,
) -> dict[str, WrittenSplit]:
    """Write the Parquet files of requests.

    Args:
        folder: where a folder is made for each split.
        schema: what the requests are made of.
        splits: for each, tables; see `write_requests`.
        histories: those whose events are stored once.
        first_files: for each split, the number of its first file; 0 unless given.
        refuse_same_second: refuse a request with an event of its own second.
        is_finer: see `SplitCounts`.

    Returns:
        dict: for each split, what was written.

    Raises:
        InputError: a request does not fit the schema, or is to be refused.
    """
    written = {}
    for split, tables in splits.items():
        counts = SplitCounts(split, schema, refuse_same_second, is_finer)
        first_file = (first_files or {}).get(split, 0)
        files = _write_split(folder / split, schema, tables, counts, histories or StoredHistories({}), first_file)
        written[split] = WrittenSplit(counts, files)
    return written


@dataclass(frozen=True, eq=False)
class WrittenSplit:
    """A split, as it was written.

    Args:
        counts: of its requests.
        files: names of its files.
    """

    counts: SplitCounts
    files: list[str]


def write_counts(folder: Path, written: Mapping[str, WrittenSplit], *, names_files: bool = False) -> None:
    """Write `counts.json`.

    Args:
        folder: a prepared one.
        written: all of its splits.
        names_files: name the files, too: these and no others are then the requests of the folder.
    """
    train = written[TRAIN].counts.ids if TRAIN in written else None
    counts = {split: one.counts.record(train) for split, one in written.items()}
    if names_files:
        counts = {split: {**record, "files": written[split].files} for split, record in counts.items()}
    write_json(folder / COUNTS_FILE, counts)


def _write_split(
    folder: Path,
    schema: RequestSchema,
    tables: Iterable[pa.Table],
    counts: SplitCounts,
    histories: StoredHistories,
    first_file: int,
) -> list[str]:
    folder.mkdir()
    columns = histories.written(schema.arrow_schema().names)
    names: list[str] = []
    with ExitStack() as files:
        writer: pq.ParquetWriter | None = None
        for table in of_sizes(_typed(tables, schema, folder.name, columns), itertools.cycle(_group_sizes())):
            RequestBatch.from_arrow(table, schema, source=folder.name, first_row=counts.requests)
            if writer is None or counts.requests % ROWS_PER_FILE == 0:
                files.close()
                names.append(f"part-{first_file + len(names):05d}.parquet")
                writer = files.enter_context(pq.ParquetWriter(folder / names[-1], table.select(columns).schema))
            writer.write_table(table.select(columns))
            counts.add(table)
    return names


def _typed(tables: Iterable[pa.Table], schema: RequestSchema, split: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The tables in the types of the schema, whatever each has, and other columns that are written as they are."""
    names = schema.arrow_schema().names
    row = 0
    for table in tables:
        refuse_missing([*names, *columns], table.column_names, split)
        typed = typed_table(table, schema, split, row)
        for column in columns:
            typed = typed if column in names else typed.append_column(column, table[column])
        yield typed
        row += table.num_rows


def _group_sizes() -> list[int]:
    """Rows of the row groups of a file."""
    return [min(ROWS_PER_GROUP, ROWS_PER_FILE - start) for start in range(0, ROWS_PER_FILE, ROWS_PER_GROUP)]
