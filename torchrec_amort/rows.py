"""From the columns of a table to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_amort.columns import typed_table
from torchrec_amort.errors import InputError
from torchrec_amort.hashing import hash_ids
from torchrec_amort.schema import Feature, RequestSchema, Side, refuse_missing


class Rows:
    """Reads the columns of a table, one row per request, as the parts of a batch.

    Args:
        table: the columns of `schema.arrow_schema()`; see `RequestBatch.from_arrow` for those that may be absent.
        schema: what the requests are made of.
        source: where the table comes from, for error messages.
        first_row: number of the table's first row there, for error messages.

    Raises:
        InputError: a column is missing, has a null or a value that its type does not hold. The parts of the batch raise
            it for lists of one request that differ in length.
    """

    def __init__(self, table: pa.Table, schema: RequestSchema, source: str, first_row: int) -> None:
        self.schema = schema
        self.source = source
        self.first_row = first_row
        labels = {f.source for f in schema.of("candidate", "label")}
        scoring = not labels & set(table.column_names)
        needed = [f.source for f in schema.features if not (scoring and f.source in labels)]
        refuse_missing([*needed, *(["time"] if schema.needs_time else [])], table.column_names, source)
        self.table = typed_table(table, schema, source, first_row)
        self.num_candidates = self._lengths("candidate_item")

    def _array(self, column: str) -> pa.Array:
        return self.table.column(column).chunk(0)

    def _at(self, row: int) -> str:
        return f"{self.source}: request {self.first_row + row}"

    def scalars(self, column: str) -> np.ndarray:
        """A column with one value per request."""
        return self._array(column).to_numpy()

    def _lengths(self, column: str) -> np.ndarray:
        return self._array(column).value_lengths().to_numpy()

    def _lists(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Values and lengths of a column of lists."""
        return self._array(column).flatten().to_numpy(), self._lengths(column)

    def _refuse_other_lengths(self, column: str, lengths: np.ndarray, other: str) -> None:
        expected = self._lengths(other)
        if len(wrong := np.flatnonzero(lengths != expected)):
            row = int(wrong[0])
            raise InputError(
                f"{self._at(row)}: {column} lists {lengths[row]} entries but {other} lists {expected[row]}: "
                "they need one entry for each"
            )

    def _candidates(self, column: str) -> pa.Array:
        """The entries of a candidate column, one per candidate of all requests."""
        array = self._array(column)
        self._refuse_other_lengths(column, array.value_lengths().to_numpy(), "candidate_item")
        return array.flatten()

    def _entries(self, feature: Feature) -> pa.Array:
        """The entries of a feature: one per request, or one per candidate."""
        return self._array(feature.source) if feature.side == "request" else self._candidates(feature.source)

    def stack(self, features: Sequence[Feature]) -> Tensor:
        """Float columns side by side: [rows, len(features)]."""
        columns = [self._entries(feature).to_numpy() for feature in features]
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32, copy=False))

    def dense(self, side: Side) -> Tensor:
        """The dense features of a side: [rows, features]; it may have none."""
        if features := self.schema.of(side, "dense"):
            return self.stack(features)
        return torch.empty(self._stride(side), 0)

    def _stride(self, side: Side) -> int:
        return self.table.num_rows if side == "request" else int(self.num_candidates.sum())

    def sparse(self, side: Side) -> KeyedJaggedTensor:
        """The ids of a side."""
        values, lengths = [], []
        features = self.schema.of(side, "id", "ids")
        for feature in features:
            entries = self._entries(feature)
            if feature.kind == "ids":
                lengths.append(entries.value_lengths().to_numpy())
                entries = entries.flatten()
            else:
                lengths.append(np.ones(len(entries), dtype=np.int64))
            values.append(_table_rows(feature, entries.to_numpy()))
        return _keyed_jagged([f.name for f in features], values, lengths, self._stride(side))

    def sequences(self) -> KeyedJaggedTensor:
        """The events' features and the candidates' items."""
        features = self.schema.sequence_features
        columns = [self._sequence(feature) for feature in features]
        values, lengths = zip(*columns, strict=True)
        return _keyed_jagged([f.name for f in features], values, lengths, self.table.num_rows)

    def _sequence(self, feature: Feature) -> tuple[np.ndarray, np.ndarray]:
        values, lengths = self._lists(feature.source)
        if feature.side == "event":
            self._refuse_other_lengths(feature.source, lengths, "history_item")
        if feature.kind == "age":
            return self._age_buckets(values, lengths), lengths
        return _table_rows(feature, values), lengths

    def _age_buckets(self, event_times: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        times = np.repeat(self.scalars("time"), lengths)
        ages = times - event_times
        if len(wrong := np.flatnonzero(ages < 0)):
            event = int(wrong[0])
            row = int(np.searchsorted(np.cumsum(lengths), event, side="right"))
            raise InputError(
                f"{self._at(row)}: history_time has an event at {event_times[event]}, after the request's "
                f"time {times[event]}: a history is what was known at the request"
            )
        return np.frexp(ages.astype(np.float64))[1].astype(np.int64)


def _table_rows(feature: Feature, ids: np.ndarray) -> np.ndarray:
    """The row of the feature's table for each id; ids that are to be refused stay as they are."""
    table_size = feature.table_size or 0
    if feature.vocabulary == "hash":
        return hash_ids(ids, table_size)
    if feature.vocabulary == "unknown":
        return np.where((ids >= 0) & (ids < table_size), ids, 0)
    return ids


def _keyed_jagged(
    keys: list[str], values: Sequence[np.ndarray], lengths: Sequence[np.ndarray], stride: int
) -> KeyedJaggedTensor:
    empty = np.empty(0, dtype=np.int64)
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(np.concatenate([empty, *values]).astype(np.int64, copy=False)),
        lengths=torch.from_numpy(np.concatenate([empty, *lengths]).astype(np.int64, copy=False)),
        stride=stride,
    )
