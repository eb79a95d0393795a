"""Writes request-level Parquet: one row per request, one folder per split."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_amort.batch import RequestBatch
from torchrec_amort.columns import typed_table
from torchrec_amort.data.counts import COUNTS_FILE, TRAIN, SplitCounts, sizes
from torchrec_amort.data.events import StoredHistories
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
    histories = histories or StoredHistories({})
    with new_folder(folder, overwrite) as temporary:
        counted = {split: SplitCounts(split, schema, refuse_same_second) for split in splits}
        for split, tables in splits.items():
            _write_split(temporary / split, schema, tables, counted[split], histories)
        train = counted[TRAIN].ids if TRAIN in counted else None
        counts = {split: one.record(train) for split, one in counted.items()}
        schema.save(temporary)
        if histories.files:
            histories.save(temporary)
        write_json(temporary / COUNTS_FILE, counts)
    return sizes(counts)


def _write_split(
    folder: Path, schema: RequestSchema, tables: Iterable[pa.Table], counts: SplitCounts, histories: StoredHistories
) -> None:
    folder.mkdir()
    columns = histories.written(schema.arrow_schema().names)
    with ExitStack() as files:
        writer: pq.ParquetWriter | None = None
        for table in of_sizes(_typed(tables, schema, folder.name, columns), itertools.cycle(_group_sizes())):
            RequestBatch.from_arrow(table, schema, source=folder.name, first_row=counts.requests)
            if writer is None or counts.requests % ROWS_PER_FILE == 0:
                files.close()
                path = folder / f"part-{counts.requests // ROWS_PER_FILE:05d}.parquet"
                writer = files.enter_context(pq.ParquetWriter(path, table.select(columns).schema))
            writer.write_table(table.select(columns))
            counts.add(table)


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
