"""From the columns of a table to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_amort.columns import typed_table
from torchrec_amort.errors import InputError
from torchrec_amort.hashing import hash_ids, ids_of_text
from torchrec_amort.lists import sums
from torchrec_amort.schema import ANY_ID, KINDS_OF_LABELS, KINDS_OF_TIMES, Feature, RequestSchema, Side, refuse_missing


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
        labels = {f.source for f in schema.of("candidate", *KINDS_OF_LABELS)}
        weights = {f.source for f in schema.features if f.kind == "weight"}
        scoring = not labels & set(table.column_names)
        needed = [f.source for f in schema.features if not (scoring and f.source in labels | weights)]
        refuse_missing([*needed, *(["time"] if schema.needs_time else [])], table.column_names, source)
        self.table = typed_table(table, schema, source, first_row)
        self.num_candidates = self._lengths(schema.candidate_column)

    def _array(self, column: str) -> pa.Array:
        return self.table.column(column).chunk(0)

    def _at(self, row: int) -> str:
        return f"{self.source}: request {self.first_row + row}"

    def scalars(self, column: str) -> np.ndarray:
        """A column with one value per request."""
        return self._array(column).to_numpy()

    def _lengths(self, column: str) -> np.ndarray:
        return self._array(column).value_lengths().to_numpy()

    def _row_of(self, lengths: np.ndarray, entry: int) -> int:
        return int(np.searchsorted(np.cumsum(lengths), entry, side="right"))

    def _entries(self, feature: Feature) -> tuple[pa.Array, np.ndarray]:
        """The entries of a feature, one for each request, candidate or event, and how many each request has."""
        array = self._array(feature.source)
        if feature.side == "request":
            return array, np.ones(len(array), dtype=np.int64)
        lengths = array.value_lengths().to_numpy().astype(np.int64, copy=False)
        schema = self.schema
        other = schema.event_columns[feature.history] if feature.side == "event" else schema.candidate_column
        if feature.source != other:
            expected = self._lengths(other)
            if len(wrong := np.flatnonzero(lengths != expected)):
                row = int(wrong[0])
                raise InputError(
                    f"{self._at(row)}: {feature.source} lists {lengths[row]} entries but {other} lists "
                    f"{expected[row]}: they need one entry for each"
                )
        return array.flatten(), lengths

    def stack(self, features: Sequence[Feature]) -> Tensor:
        """Numbers side by side: [rows, their number]."""
        return torch.from_numpy(np.concatenate([self._numbers(feature)[0] for feature in features], axis=1))

    def _numbers(self, feature: Feature) -> tuple[np.ndarray, np.ndarray]:
        """float32 of each entry, [entries, their number], and how many entries each request has."""
        entries, lengths = self._entries(feature)
        if feature.kind == "vector":
            sizes = entries.value_lengths().to_numpy()
            if len(wrong := np.flatnonzero(sizes != feature.size)):
                row = self._row_of(lengths, int(wrong[0]))
                raise InputError(
                    f"{self._at(row)}: {feature.source} has a vector of {sizes[wrong[0]]} numbers, but the schema says "
                    f"{feature.size}"
                )
            return entries.flatten().to_numpy().reshape(-1, feature.size), lengths
        if feature.kind in KINDS_OF_TIMES:
            seconds = self._seconds(feature, entries.to_numpy(), lengths)
            return np.log2(1.0 + seconds).astype(np.float32)[:, None], lengths
        numbers = entries.to_numpy().astype(np.float32, copy=False)
        if feature.kind == "count":
            if len(wrong := np.flatnonzero(numbers < 0)):
                entry = int(wrong[0])
                raise InputError(
                    f"{self._at(self._row_of(lengths, entry))}: {feature.source} has a count of {numbers[entry]}: "
                    "write 0 or more, or give it kind 'dense'"
                )
            numbers = np.log2(1.0 + numbers.astype(np.float64)).astype(np.float32)
        return numbers[:, None], lengths

    def dense(self, side: Side) -> Tensor:
        """The numbers of a side: [rows, their number]; it may have none."""
        if features := self.schema.dense_features[side]:
            return self.stack(features)
        return torch.empty(self._stride(side), 0)

    def dense_sequences(self) -> dict[str, JaggedTensor]:
        """The numbers of events, and the vectors of candidates like theirs."""
        sequences = {}
        for feature in self.schema.dense_sequence_features:
            values, lengths = self._numbers(feature)
            # A copy: what Arrow holds cannot be written to, and a tensor can.
            sequences[feature.name] = JaggedTensor(
                torch.from_numpy(values.copy()), lengths=torch.from_numpy(lengths.copy())
            )
        return sequences

    def weights(self) -> Tensor | None:
        """The weight of each candidate, its request's included: [C]; None if there is none."""
        columns = []
        for side in ("request", "candidate"):
            for feature in self.schema.of(side, "weight"):
                if feature.source in self.table.column_names:
                    weights = self._numbers(feature)[0][:, 0]
                    columns.append(np.repeat(weights, self.num_candidates) if side == "request" else weights)
        return torch.from_numpy(np.prod(columns, axis=0, dtype=np.float32)) if columns else None

    def _stride(self, side: Side) -> int:
        return self.table.num_rows if side == "request" else int(self.num_candidates.sum())

    def sparse(self, side: Side) -> KeyedJaggedTensor:
        """The ids of a side."""
        features = self.schema.bag_features[side]
        values, lengths = [], []
        for feature in features:
            rows, num_ids, _ = self._ids(feature)
            values.append(rows)
            lengths.append(num_ids)
        return _keyed_jagged([f.name for f in features], values, lengths, self._stride(side))

    def sequences(self) -> tuple[KeyedJaggedTensor, dict[str, JaggedTensor]]:
        """Ids of events and of what shares their tables, and how many each entry has of those that have several."""
        features = self.schema.sequence_features
        values, lengths, num_ids = [], [], {}
        for feature in features:
            rows, of_entries, entries = self._ids(feature)
            values.append(rows)
            if feature.kind == "ids":
                of_each = JaggedTensor(torch.from_numpy(of_entries), lengths=torch.from_numpy(entries))
                num_ids[feature.name] = of_each
                entries = sums(of_each.values(), of_each.lengths()).numpy()
            lengths.append(entries)
        return _keyed_jagged([f.name for f in features], values, lengths, self.table.num_rows), num_ids

    def _ids(self, feature: Feature) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the feature's table, how many each entry has, and how many entries each request has."""
        entries, lengths = self._entries(feature)
        num_ids = np.ones(len(entries), dtype=np.int64)
        if feature.kind == "ids":
            num_ids = entries.value_lengths().to_numpy().astype(np.int64, copy=False)
            entries = entries.flatten()
        if feature.kind in KINDS_OF_TIMES:
            seconds = self._seconds(feature, entries.to_numpy(), lengths)
            return np.frexp(seconds.astype(np.float64))[1].astype(np.int64), num_ids, lengths
        return self._table_rows(feature, entries), num_ids, lengths

    def _seconds(self, feature: Feature, times: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Seconds from each time to that of its request, or from that of the event before."""
        if feature.kind == "age":
            now = np.repeat(self.scalars("time"), lengths)
            seconds = now - times
            if len(wrong := np.flatnonzero(seconds < 0)):
                entry = int(wrong[0])
                what = "event" if feature.side == "event" else feature.side
                raise InputError(
                    f"{self._at(self._row_of(lengths, entry))}: {feature.source} has an {what} at {times[entry]}, "
                    f"after the request's time {now[entry]}: a history is what was known at the request"
                )
            return seconds
        seconds = np.diff(times, prepend=0)
        firsts = (np.cumsum(lengths) - lengths)[lengths > 0]
        seconds[firsts] = 0
        if len(wrong := np.flatnonzero(seconds < 0)):
            event = int(wrong[0])
            raise InputError(
                f"{self._at(self._row_of(lengths, event))}: {feature.source} has an event at {times[event]} after one "
                f"at {times[event - 1]}: list events with the oldest first"
            )
        return seconds

    def _table_rows(self, feature: Feature, array: pa.Array) -> np.ndarray:
        """The row of the feature's table for each id; ids that are to be refused stay as they are."""
        is_null = None
        if array.null_count:
            is_null = array.is_null().to_numpy(zero_copy_only=False)
            array = array.fill_null("" if feature.text else 0)
        ids = ids_of_text(array) if feature.text else array.to_numpy()
        table_size = feature.table_size or 0
        if feature.vocabulary == "hash":
            ids = hash_ids(ids, table_size)
        elif feature.vocabulary == "file":
            ids = self.schema.vocabularies[feature.table].rows(ids)
        elif feature.vocabulary == "unknown":
            ids = np.where((ids >= 0) & (ids < table_size), ids, 0)
        elif feature.text:
            # Of managed tables, ids are not negative.
            ids = np.minimum(ids & ANY_ID, ANY_ID - 1)
        return ids if is_null is None else np.where(is_null, 0, ids)


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
