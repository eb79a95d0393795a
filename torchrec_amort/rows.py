"""From the columns of requests to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_amort.errors import InputError
from torchrec_amort.hashing import hash_ids, ids_of_text
from torchrec_amort.lists import sums
from torchrec_amort.schema import ANY_ID, KINDS_OF_TIMES, Feature, RequestSchema, Side


class Rows:
    """Reads columns, one row per request, as the parts of a batch.

    Args:
        columns: those of `schema.arrow_schema()`, in their types, with no nulls but ids; see `RequestBatch.from_arrow`
            for those that may be absent.
        schema: what the requests are made of.
        source: where the requests come from, for error messages.
        first_row: number of the first request there, for error messages.
    """

    def __init__(self, columns: Mapping[str, pa.Array], schema: RequestSchema, source: str, first_row: int) -> None:
        self.schema = schema
        self.source = source
        self.first_row = first_row
        self._columns = columns
        self._flat: dict[str, tuple[pa.Array, list[np.ndarray]]] = {}
        self.num_candidates = self._lengths(schema.candidate_column)

    def _at(self, row: int) -> str:
        return f"{self.source}: request {self.first_row + row}"

    def has(self, column: str) -> bool:
        """Whether a column is there."""
        return column in self._columns

    def scalars(self, column: str) -> np.ndarray:
        """A column with one value per request."""
        return self._columns[column].to_numpy()

    def _flattened(self, column: str) -> tuple[pa.Array, list[np.ndarray]]:
        """What the lists of a column hold, all together, and the lengths of the lists, int64, the outermost first."""
        if (flat := self._flat.get(column)) is None:
            array, lengths = self._columns[column], []
            while pa.types.is_list(array.type):
                offsets = array.offsets.to_numpy()
                lengths.append(np.subtract(offsets[1:], offsets[:-1], dtype=np.int64))
                array = array.values.slice(offsets[0], offsets[-1] - offsets[0])
            flat = self._flat[column] = array, lengths
        return flat

    def _lengths(self, column: str) -> np.ndarray:
        return self._flattened(column)[1][0]

    def _row_of(self, lengths: np.ndarray, entry: int) -> int:
        return int(np.searchsorted(np.cumsum(lengths), entry, side="right"))

    def _entries(self, feature: Feature) -> tuple[pa.Array, np.ndarray | None, np.ndarray]:
        """The values of a feature, all together, with how many each entry has if it has a list of them.

        Its entries are one for each request, candidate or event; how many each request has is told last.
        """
        values, lengths = self._flattened(feature.source)
        of_each = lengths[-1] if feature.kind in ("ids", "vector") else None
        if feature.side == "request":
            return values, of_each, np.ones(len(self.num_candidates), dtype=np.int64)
        schema = self.schema
        other = schema.event_columns[feature.history] if feature.side == "event" else schema.candidate_column
        expected = self._lengths(other)
        # Bytes are compared in a fraction of the time of a small array.
        if lengths[0] is not expected and lengths[0].tobytes() != expected.tobytes():
            row = int(np.flatnonzero(lengths[0] != expected)[0])
            raise InputError(
                f"{self._at(row)}: {feature.source} lists {lengths[0][row]} entries but {other} lists "
                f"{expected[row]}: they need one entry for each"
            )
        return values, of_each, lengths[0]

    def stack(self, features: Sequence[Feature]) -> Tensor:
        """Numbers side by side: [rows, their number]."""
        return torch.from_numpy(np.concatenate([self._numbers(feature)[0] for feature in features], axis=1))

    def _numbers(self, feature: Feature) -> tuple[np.ndarray, np.ndarray]:
        """float32 of each entry, [entries, their number], and how many entries each request has."""
        values, sizes, lengths = self._entries(feature)
        numbers = values.to_numpy()
        if sizes is not None:
            if len(wrong := np.flatnonzero(sizes != feature.size)):
                row = self._row_of(lengths, int(wrong[0]))
                raise InputError(
                    f"{self._at(row)}: {feature.source} has a vector of {sizes[wrong[0]]} numbers, but the schema says "
                    f"{feature.size}"
                )
            return numbers.reshape(-1, feature.size or 1), lengths
        if feature.kind in KINDS_OF_TIMES:
            seconds = self._seconds(feature, numbers, lengths)
            return np.log2(1.0 + seconds).astype(np.float32)[:, None], lengths
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
            sequences[feature.name] = _jagged(values.copy(), lengths)
        return sequences

    def weights(self) -> Tensor | None:
        """The weight of each candidate, its request's included: [C]; None if there is none."""
        columns = []
        for feature in self.schema.weight_features:
            if self.has(feature.source):
                weights = self._numbers(feature)[0][:, 0]
                columns.append(np.repeat(weights, self.num_candidates) if feature.side == "request" else weights)
        return torch.from_numpy(np.prod(columns, axis=0, dtype=np.float32)) if columns else None

    def _stride(self, side: Side) -> int:
        return len(self.num_candidates) if side == "request" else int(self.num_candidates.sum())

    def sparse(self, side: Side) -> KeyedJaggedTensor:
        """The ids of a side."""
        features = self.schema.bag_features[side]
        values, lengths = [], []
        for feature in features:
            rows, num_ids, _ = self._ids(feature)
            values.append(rows)
            lengths.append(np.ones(len(rows), dtype=np.int64) if num_ids is None else num_ids)
        return _keyed_jagged([f.name for f in features], values, lengths, self._stride(side))

    def sequences(self) -> tuple[KeyedJaggedTensor, dict[str, JaggedTensor]]:
        """Ids of events and of what shares their tables, and how many each entry has of those that have several."""
        features = self.schema.sequence_features
        values, lengths, num_ids = [], [], {}
        for feature in features:
            rows, of_entries, entries = self._ids(feature)
            values.append(rows)
            if of_entries is not None:
                of_each = num_ids[feature.name] = _jagged(of_entries.copy(), entries)
                entries = sums(of_each.values(), of_each.lengths()).numpy()
            lengths.append(entries)
        return _keyed_jagged([f.name for f in features], values, lengths, len(self.num_candidates)), num_ids

    def _ids(self, feature: Feature) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Rows of the feature's table, and the rest of `_entries`."""
        values, num_ids, lengths = self._entries(feature)
        if feature.kind in KINDS_OF_TIMES:
            seconds = self._seconds(feature, values.to_numpy(), lengths)
            return np.frexp(seconds.astype(np.float64))[1], num_ids, lengths
        return self._table_rows(feature, values), num_ids, lengths

    def _seconds(self, feature: Feature, times: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Seconds from each time to that of its request, or from that of the event before."""
        if feature.kind == "age":
            now = np.repeat(self.scalars("time"), lengths)
            seconds = now - times
            if seconds.min(initial=0) < 0:
                entry = int(np.argmax(seconds < 0))
                what = "event" if feature.side == "event" else feature.side
                raise InputError(
                    f"{self._at(self._row_of(lengths, entry))}: {feature.source} has an {what} at {times[entry]}, "
                    f"after the request's time {now[entry]}: a history is what was known at the request"
                )
            return seconds
        seconds = np.diff(times, prepend=0)
        firsts = (np.cumsum(lengths) - lengths)[lengths > 0]
        seconds[firsts] = 0
        if seconds.min(initial=0) < 0:
            event = int(np.argmax(seconds < 0))
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


def _jagged(values: np.ndarray, lengths: np.ndarray) -> JaggedTensor:
    # A copy: other columns have the same lengths.
    return JaggedTensor(torch.from_numpy(values), lengths=torch.from_numpy(lengths.copy()))


def _keyed_jagged(
    keys: list[str], values: Sequence[np.ndarray], lengths: Sequence[np.ndarray], stride: int
) -> KeyedJaggedTensor:
    empty = np.empty(0, dtype=np.int64)
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(np.concatenate([empty, *values])),
        lengths=torch.from_numpy(np.concatenate([empty, *lengths])),
        stride=stride,
    )
