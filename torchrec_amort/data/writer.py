"""Writes request-level Parquet: one row per request, one folder per split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_amort.batch import RequestBatch
from torchrec_amort.data.counts import COUNTS_FILE, TRAIN, SplitCounts, sizes
from torchrec_amort.files import new_folder, write_json, write_text
from torchrec_amort.schema import SCHEMA_FILE, RequestSchema

ROWS_PER_GROUP = 512
ROWS_PER_FILE = 16_384


def write_requests(
    folder: str | Path,
    schema: RequestSchema,
    splits: Mapping[str, Iterable[pa.Table]],
    *,
    overwrite: bool = False,
    refuse_same_second: bool = False,
) -> dict[str, dict[str, int]]:
    """Write a prepared data folder: `schema.json`, `counts.json` and `SPLIT/part-00000.parquet`, ...

    Args:
        folder: the folder to make, whole or not at all.
        schema: what the requests are made of.
        splits: for each split, tables with the columns of `schema.arrow_schema()`.
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
        counted = {split: SplitCounts(split, schema, refuse_same_second) for split in splits}
        for split, tables in splits.items():
            _write_split(temporary / split, schema, tables, counted[split])
        train = counted[TRAIN].ids if TRAIN in counted else None
        counts = {split: one.record(train) for split, one in counted.items()}
        write_text(temporary / SCHEMA_FILE, schema.to_json())
        write_json(temporary / COUNTS_FILE, counts)
    return sizes(counts)


def _write_split(folder: Path, schema: RequestSchema, tables: Iterable[pa.Table], counts: SplitCounts) -> None:
    folder.mkdir()
    for table in _of_size(tables, ROWS_PER_FILE):
        RequestBatch.from_arrow(table, schema, source=folder.name, first_row=counts.requests)
        written = table.cast(schema.arrow_schema())
        path = folder / f"part-{counts.requests // ROWS_PER_FILE:05d}.parquet"
        pq.write_table(written, path, row_group_size=ROWS_PER_GROUP)
        counts.add(written)


def _of_size(tables: Iterable[pa.Table], size: int) -> Iterable[pa.Table]:
    """The same rows in tables of `size` rows; the last may have fewer."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(t.num_rows for t in pending) >= size:
            joined = pa.concat_tables(pending)
            for start in range(0, joined.num_rows - size + 1, size):
                yield joined.slice(start, size)
            pending = [joined.slice(joined.num_rows - joined.num_rows % size)]
    if any(table.num_rows for table in pending):
        yield pa.concat_tables(pending)
