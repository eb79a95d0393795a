"""From rows in order to requests: lists of candidates and events, some thousand requests at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa

from torchrec_amort.data.builder.plan import SPLITS
from torchrec_amort.data.builder.steps import MICROSECONDS
from torchrec_amort.data.events import Events, pointers
from torchrec_amort.hashing import ids_of_text
from torchrec_amort.schema import RequestSchema


class Requests:
    """Requests of each split, out of rows of candidates.

    Args:
        rows: of the plan's candidates, in order.
        schema: what the requests are made of.
        events: of each history.
        lengths: events that are kept of each history.
        firsts: the place of the first of the events, for each history; 0 unless given.
    """

    def __init__(
        self,
        rows: Iterable[pa.Table],
        schema: RequestSchema,
        events: Mapping[str, Events],
        lengths: Mapping[str, int],
        firsts: Mapping[str, int],
    ) -> None:
        self._schema, self._events, self._lengths, self._firsts = schema, events, lengths, firsts
        self._tables = itertools.chain.from_iterable(map(self._of_splits, _whole_requests(rows)))
        self._next = next(self._tables, None)

    def of_split(self, split: str) -> Iterator[pa.Table]:
        """The requests of a split, which has to be asked for after those before it."""
        while self._next is not None and self._next[0] == split:
            yield self._next[1]
            self._next = next(self._tables, None)

    def _of_splits(self, rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
        """The requests of some rows, those of one split together."""
        bounds = _bounds(rows["request_id"].to_numpy())
        table = self._requests(rows, bounds)
        split_of_request = rows["__split"].to_numpy()[bounds[:-1]]
        for place, split in enumerate(SPLITS):
            start, stop = np.searchsorted(split_of_request, [place, place + 1])
            if stop > start:
                yield split, table.slice(start, stop - start)

    def _requests(self, rows: pa.Table, bounds: np.ndarray) -> pa.Table:
        firsts = rows.take(pa.array(bounds[:-1]))
        user = firsts["__user"].combine_chunks()
        columns = {
            "request_id": firsts["request_id"],
            "user": ids_of_text(user) if pa.types.is_string(user.type) else user.cast(pa.int64()),
            "time": pa.array(firsts["__time"].to_numpy() // MICROSECONDS),
        }
        columns |= {f.source: firsts[f.source] for f in self._schema.of("request")}
        for feature in self._schema.of("candidate"):
            values = rows[feature.source].combine_chunks()
            columns[feature.source] = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values)
        for name, events in self._events.items():
            stops = firsts[f"{name}_stop"].to_numpy()
            starts = stops - np.minimum(firsts[f"{name}_seen"].to_numpy(), self._lengths[name])
            columns |= dict(zip(pointers(name), map(pa.array, (starts, stops)), strict=True))
            # Of a request without events both are 0, wherever the first event is.
            first = np.minimum(self._firsts.get(name, 0), starts)
            columns |= events.lists(events.columns, starts - first, stops - first)
        return pa.table(columns)


def _whole_requests(rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables that no request spans two of."""
    pending: list[pa.Table] = []
    for table in rows:
        if not table.num_rows:
            continue
        ids = table["request_id"].to_numpy()
        last = int(np.searchsorted(ids, ids[-1]))
        is_new = not pending or pending[-1]["request_id"][-1].as_py() != ids[-1]
        if last or is_new:
            if whole := [*pending, *([table.slice(0, last)] if last else [])]:
                yield pa.concat_tables(whole).combine_chunks()
            pending = []
        pending.append(table.slice(last))
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def _bounds(request_ids: np.ndarray) -> np.ndarray:
    """Where each request begins, and the number of rows."""
    return np.concatenate([[0], np.flatnonzero(np.diff(request_ids)) + 1, [len(request_ids)]])
