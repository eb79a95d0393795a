"""Tables of requests that are cut anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa


def of_sizes(tables: Iterator[pa.Table], sizes: Iterable[int]) -> Iterator[pa.Table]:
    """The same rows in tables of those sizes, 1 or more each; the last may have fewer.

    Args:
        tables: are read as they are needed.
        sizes: may go on beyond the rows.

    Example::

        of_sizes(iter([pa.table({"user": [1, 2]}), pa.table({"user": [3]})]), [1, 2])  # of users [1] and [2, 3]
    """
    pending: list[pa.Table] = []
    for size in sizes:
        while sum(table.num_rows for table in pending) < size and (table := next(tables, None)) is not None:
            pending.append(table)
        if not any(table.num_rows for table in pending):
            return
        joined = pa.concat_tables(pending)
        yield joined.slice(0, size)
        pending = [joined.slice(size)]
