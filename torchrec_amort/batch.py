"""RequestBatch: the one thing that flows from the data to the model.

Shape suffixes: B requests; C candidates, N history events, all requests together; I dense inputs; T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from torchrec_amort.columns import MisfitError, array_of, wanted
from torchrec_amort.errors import InputError
from torchrec_amort.grouping import Impressions, first_rows, whole_numbers
from torchrec_amort.jagged_ids import rows_of_all, select_rows, shallow_copy, span_of
from torchrec_amort.rows import Rows
from torchrec_amort.schema import ANY_ID, Content, RequestSchema, refuse_missing


@dataclass(eq=False)
class RequestBatch(Pipelineable):
    """B requests with all their candidates and histories.

    Ids may have weights, which go where their ids go. No method changes the batch, or what its jagged tensors keep of
    what they once worked out.

    Args:
        request_dense: float [B, I_r]; I_r may be 0.
        candidate_dense: float [C, I_c]; I_c may be 0.
        request_sparse: ids of the request, stride B.
        candidate_sparse: ids of each candidate, stride C.
        sequences: stride B: a list of ids per request for each feature of its history events
            (`history_item`, ...; oldest first) and for its candidates' items (`candidate_item`). If `history_item` is
            there, all other features of events have as many.
        num_candidates: int64 [B], each at least 1; their sum is C.
        labels: float [C, T], or None when scoring.
        users: int64 [B], or None: whose request it is. Never an input of the model: metrics group by it.

    Example::

        batch = RequestBatch.from_requests(
            [{"user_id": 7, "history_item": [3, 4], "candidate_item": [5, 6, 8]}], schema
        )
        logits_CT = model(batch)
    """

    request_dense: Tensor
    candidate_dense: Tensor
    request_sparse: KeyedJaggedTensor
    candidate_sparse: KeyedJaggedTensor
    sequences: KeyedJaggedTensor
    num_candidates: Tensor
    labels: Tensor | None = None
    users: Tensor | None = None

    @classmethod
    def from_requests(
        cls, requests: Iterable[Mapping[str, Any]], schema: RequestSchema, history_length: int | None = None
    ) -> RequestBatch:
        """Build a batch from plain Python requests.

        Args:
            requests: one mapping per request from column to value: a number, or a list with one entry per
                event or candidate. Labels may be left out, by all requests alike. Times are whole seconds since 1970,
                or dates and times of Python, numpy or pandas; see `from_arrow`.
            schema: what the requests are made of.
            history_length: see `from_arrow`.

        Raises:
            InputError: a request does not fit the schema; see `validate`.

        Example::

            RequestBatch.from_requests([{"user_id": 7, "history_item": [3, 4], "candidate_item": [5]}], schema)
        """
        requests = _listed(requests)
        if not requests:
            raise InputError("requests: an empty list: a batch needs at least 1 request")
        known = [field for field in schema.arrow_schema() if any(field.name in request for request in requests)]
        contents = schema.contents
        rows = [_to_arrow(request, known, contents, row) for row, request in enumerate(requests)]
        return cls.from_arrow(pa.concat_tables(rows), schema, history_length)

    @classmethod
    def from_arrow(
        cls,
        table: pa.Table,
        schema: RequestSchema,
        history_length: int | None = None,
        *,
        source: str = "requests",
        first_row: int = 0,
    ) -> RequestBatch:
        """Build a batch from a table with one row per request.

        Args:
            table: the columns of `schema.arrow_schema()`, in any Arrow type that says the same. `request_id` and
                `user` may be absent, `time` if no feature needs it, and the labels, all together, when scoring. Times
                may be timestamps of any unit and time zone (UTC if they have none) and dates, whose fractions of
                seconds are cut, or whole seconds since 1970. Floats are rounded to float32.
            schema: what the requests are made of. By the vocabulary of its features, ids become rows of tables here
                and nowhere else: the ids of a batch are mapped already.
            history_length: keep at most this many events of each history, the most recent ones.
            source: where the table comes from, for error messages.
            first_row: number of the table's first row there, for error messages.

        Raises:
            InputError: a column is missing, has a null or a value that its type does not hold (text or a boolean for
                an id, a time after the year 2200), lists of one request differ in length, or what `validate` refuses.
        """
        rows = Rows(table, schema, source, first_row)
        labels = [f for f in schema.of("candidate", "label") if f.source in table.column_names]
        batch = cls(
            request_dense=rows.dense("request"),
            candidate_dense=rows.dense("candidate"),
            request_sparse=rows.sparse("request"),
            candidate_sparse=rows.sparse("candidate"),
            sequences=rows.sequences(),
            num_candidates=torch.tensor(rows.num_candidates, dtype=torch.int64),
            labels=rows.stack(schema.of("candidate", "label")) if labels else None,
            users=torch.from_numpy(rows.scalars("user").copy()) if "user" in table.column_names else None,
        )
        batch.validate(schema.table_sizes, source=source, first_row=first_row)
        return batch if history_length is None else batch.keep_latest(history_length)

    @classmethod
    def from_impressions(
        cls,
        dense_features: Tensor,
        sparse_features: KeyedJaggedTensor,
        request_ids: Tensor | Sequence[int],
        *,
        labels: Tensor | None = None,
        request_features: Sequence[str] = (),
        event_features: Sequence[str] = (),
        item: str | None = None,
        users: Tensor | Sequence[int] | None = None,
    ) -> RequestBatch:
        """Build a batch from impressions, as `torchrec.datasets.utils.Batch` holds them.

        Rows with the same request id are one request, and each row is one of its candidates. The request's own ids
        and its history are kept once. Requests are in the order of their first rows and candidates in the order of
        their rows, so that nothing moves if the rows of each request stand together; logits come in that order, which
        `impression_order` tells. Ids and numbers are taken as they are: `validate` checks them.

        Args:
            dense_features: float [C, I]: dense inputs of the candidates.
            sparse_features: ids, stride C, with weights or without. Those that no other argument names are ids of the
                candidates.
            request_ids: int64 [C].
            labels: [C] or [C, T], of any type of number, or None when scoring.
            request_features: keys of ids of the request.
            event_features: keys of ids of its history's events, the oldest first.
            item: key of the candidate's item, one id in each row. It becomes `candidate_item` of the sequences, and
                stays an id of the candidate. If None, the sequences have no `candidate_item`.
            users: int64 [C], or None: whose impressions they are.

        Raises:
            InputError: there are no rows, the arguments do not have the same number of rows, a key is missing or named
                twice, a row has not exactly one item, or rows of one request do not agree on its ids, history or user.
                The message then names the request, the key, the two rows and what each of them has.

        Example::

            batch = RequestBatch.from_impressions(
                impressions.dense_features,
                impressions.sparse_features,
                request_ids,
                labels=impressions.labels,
                request_features=["user", "country"],
                event_features=["history_item"],
                item="item",
            )
        """
        impressions = Impressions(dense_features, sparse_features, request_ids)
        impressions.refuse_keys(request_features, event_features, item)
        sequences = impressions.of_requests(event_features, "give rows with another history another request id")
        if item is not None:
            sequences = KeyedJaggedTensor.concat([sequences, impressions.items(item)])
        return cls(
            request_dense=dense_features.new_empty(len(impressions.num_candidates), 0),
            candidate_dense=impressions.dense(),
            request_sparse=impressions.of_requests(
                request_features, "take it out of request_features, or give these rows request ids of their own"
            ),
            candidate_sparse=impressions.of_candidates(but={*request_features, *event_features}),
            sequences=sequences,
            num_candidates=impressions.num_candidates,
            labels=None if labels is None else impressions.labels(labels),
            users=None if users is None else impressions.users(users),
        )

    @staticmethod
    def impression_order(request_ids: Tensor | Sequence[int]) -> Tensor:
        """The rows of impressions in the order in which `from_impressions` makes candidates of them.

        Args:
            request_ids: int64 [C].

        Returns:
            Tensor: int64 [C]; 0, 1, 2, ... if the rows of each request stand together.

        Raises:
            InputError: the ids are not whole numbers.

        Example::

            order_C = RequestBatch.impression_order(request_ids)
            weights_C = weights_of_impressions_C[order_C]  # in the order of the batch
            logits_of_impressions_CT = model(batch)[torch.argsort(order_C)]  # in the order of the impressions
        """
        return torch.argsort(first_rows(whole_numbers("request_ids", request_ids)), stable=True)

    def __len__(self) -> int:
        """The number of requests, B."""
        return self.num_candidates.numel()

    def stride(self) -> int:
        """The number of candidates, C: the rows that a model makes of the batch.

        A batch may stand where a model had a `KeyedJaggedTensor` of C rows, and is asked for as many.

        Example::

            assert model(batch).shape[0] == batch.stride()
        """
        return self.candidate_dense.shape[0]

    @property
    def dense(self) -> Tensor:
        """Dense inputs of each candidate, those of its request first, float [C, I_r + I_c]."""
        of_requests = torch.repeat_interleave(
            self.request_dense, self.num_candidates, dim=0, output_size=self.candidate_dense.shape[0]
        )
        return torch.cat([of_requests, self.candidate_dense], dim=1)

    @property
    def sparse(self) -> KeyedJaggedTensor:
        """Ids of each candidate and its request, in C rows, which a model without histories reads."""
        requests_C = torch.repeat_interleave(self.num_candidates, output_size=self.candidate_dense.shape[0])
        of_requests = select_rows(self.request_sparse, requests_C, self.request_sparse.keys())
        with_keys = [ids for ids in (of_requests, self.candidate_sparse) if ids.keys()]
        return KeyedJaggedTensor.concat(with_keys) if with_keys else of_requests

    def shallow_copy(self) -> RequestBatch:
        """The same tensors, in jagged tensors of its own.

        A `KeyedJaggedTensor` keeps offsets once it has worked them out. Those of inference mode cannot be trained with,
        so whoever scores somebody else's batch scores a shallow copy.

        Example::

            with torch.inference_mode():
                logits_CT = model(batch.shallow_copy())
        """
        return replace(
            self,
            request_sparse=shallow_copy(self.request_sparse),
            candidate_sparse=shallow_copy(self.candidate_sparse),
            sequences=shallow_copy(self.sequences),
        )

    def _map(self, function: Callable[[Any], Any]) -> RequestBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: None if v is None else function(v) for name, v in values.items()}
        # Of the same class, which may have more fields.
        return replace(self, **moved)

    def to(self, device: torch.device, non_blocking: bool = False) -> RequestBatch:
        """Copy the batch to a device."""
        # TorchRec would leave what it keeps of single keys on the old device.
        return self.shallow_copy()._map(lambda value: value.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> RequestBatch:
        """Copy the batch to page-locked memory, from where it moves to a GPU without blocking."""
        return self._map(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that a stream uses the batch."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value.record_stream(stream)

    def keep_latest(self, history_length: int) -> RequestBatch:
        """The same requests with at most `history_length` events in each history, the latest ones.

        A model may be served with shorter histories than it was trained with.

        Raises:
            InputError: `history_length` is below 0.

        Example::

            logits_CT = model(batch.keep_latest(50))
        """
        if history_length < 0:
            raise InputError(f"history_length is {history_length}, not 0 or more")
        batch = self.shallow_copy()
        keys, lengths, weights = batch.sequences.keys(), batch.sequences.lengths(), batch.sequences.weights_or_none()
        is_event = torch.tensor([key != "candidate_item" for key in keys], dtype=torch.bool, device=lengths.device)
        limited = lengths.clamp(max=history_length)
        kept = torch.where(is_event.repeat_interleave(len(self)), limited, lengths)
        ends = torch.cumsum(lengths, 0).repeat_interleave(lengths)
        recency = ends - 1 - torch.arange(ends.numel(), device=ends.device)
        is_kept = recency < kept.repeat_interleave(lengths)
        batch.sequences = KeyedJaggedTensor(
            keys=keys,
            values=batch.sequences.values()[is_kept],
            weights=None if weights is None else weights[is_kept],
            lengths=kept,
            stride=len(self),
        )
        return batch

    def select(self, requests: Tensor) -> RequestBatch:
        """Some of the requests, as a batch of their own; a copy.

        Args:
            requests: int64 [S], their rows in this batch, in the order that is wanted; at least one.

        Returns:
            RequestBatch: of S requests.

        Example::

            logits_CT = model(batch.select(torch.tensor([2, 0])))
        """
        counts_S = self.num_candidates[requests]
        first_S = torch.cumsum(self.num_candidates, 0)[requests] - torch.cumsum(counts_S, 0)
        candidates_C = torch.repeat_interleave(first_S, counts_S)
        candidates_C = candidates_C + torch.arange(candidates_C.numel(), device=requests.device)
        return RequestBatch(
            request_dense=self.request_dense[requests],
            candidate_dense=self.candidate_dense[candidates_C],
            request_sparse=select_rows(self.request_sparse, requests, self.request_sparse.keys()),
            candidate_sparse=select_rows(self.candidate_sparse, candidates_C, self.candidate_sparse.keys()),
            sequences=select_rows(self.sequences, requests, self.sequences.keys()),
            num_candidates=counts_S,
            labels=None if self.labels is None else self.labels[candidates_C],
            users=None if self.users is None else self.users[requests],
        )

    def part(self, start: int, stop: int) -> RequestBatch:
        """All requests, with some of their candidates only; a request may have none of them.

        Args:
            start: the first candidate of the batch that is taken.
            stop: where they end.

        Returns:
            RequestBatch: of B requests and `stop - start` candidates. It shares its dense inputs and labels, and all
            that is the requests' own but their sequences, with this batch.

        Raises:
            InputError: there are no such candidates.

        Example::

            logits_CT = torch.cat([model(batch.part(0, 10)), model(batch.part(10, batch.stride()))])
        """
        if not 0 <= start < stop <= self.stride():
            raise InputError(f"batch: candidates {start} to {stop} of {self.stride()}: there are no such candidates")
        batch = self.shallow_copy()
        ends_B = torch.cumsum(self.num_candidates, 0)
        starts_B = ends_B - self.num_candidates
        num_candidates_B = ends_B.clamp(start, stop) - starts_B.clamp(start, stop)
        events = rows_of_all(batch.sequences, 0, len(self), _event_features(batch.sequences))
        return replace(
            batch,
            candidate_dense=self.candidate_dense[start:stop],
            candidate_sparse=rows_of_all(batch.candidate_sparse, start, stop),
            sequences=_with_items(events, batch.sequences, start, stop, num_candidates_B),
            num_candidates=num_candidates_B,
            labels=None if self.labels is None else self.labels[start:stop],
        )

    def to_impressions(self) -> RequestBatch:
        """The same data as C requests of one candidate each: what an ordinary DLRM scores.

        Returns:
            RequestBatch: each request's features and history repeated for each of its candidates, in
            the candidates' order. Scoring it is the baseline that amortizing is measured against.

        Example::

            torch.testing.assert_close(model(batch.to_impressions()), model(batch))
        """
        num_impressions = self.candidate_dense.shape[0]
        requests_C = torch.repeat_interleave(self.num_candidates, output_size=num_impressions)
        ones_C = torch.ones_like(requests_C)
        sequences = shallow_copy(self.sequences)
        events = select_rows(sequences, requests_C, _event_features(sequences))
        return RequestBatch(
            request_dense=self.request_dense[requests_C],
            candidate_dense=self.candidate_dense,
            request_sparse=select_rows(self.request_sparse, requests_C, self.request_sparse.keys()),
            candidate_sparse=shallow_copy(self.candidate_sparse),
            sequences=_with_items(events, sequences, 0, num_impressions, ones_C),
            num_candidates=ones_C,
            labels=self.labels,
            users=None if self.users is None else self.users[requests_C],
        )

    def validate(
        self, table_sizes: Mapping[str, int] | None = None, *, source: str = "batch", first_row: int = 0
    ) -> RequestBatch:
        """Refuse a malformed batch.

        Args:
            table_sizes: rows of the embedding table of each feature (`RequestSchema.table_sizes`). Without
                it, only negative ids are refused.
            source: where the batch comes from, for error messages.
            first_row: number of the first request there, for error messages.

        Returns:
            RequestBatch: this batch.

        Raises:
            InputError: lengths do not add up, a candidate count does not match, a request has no
                candidate, an id is outside its table, or a dense feature, a weight or a label is not finite.
                The message names the source, the field, the request and the two numbers that disagree.

        Example::

            model(batch.validate(schema.table_sizes))
        """
        _Check(self, table_sizes or {}, source, first_row).run()
        return self


def _listed(requests: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Requests that are given as mappings, each read once.

    Args:
        requests: a list, or anything else that yields them.

    Raises:
        InputError: they are not mappings, or are one mapping.
    """
    if isinstance(requests, Mapping):
        raise InputError("requests: one mapping by itself: give a list of requests: [request]")
    if isinstance(requests, (str, bytes)) or not isinstance(requests, Iterable):
        raise InputError(f"requests: a {type(requests).__name__}: give a list of mappings, one for each request")
    listed = list(requests)
    for row, request in enumerate(listed):
        if not isinstance(request, Mapping):
            raise InputError(f"requests: request {row} is a {type(request).__name__}, not a mapping of its columns")
    return listed


def _to_arrow(
    request: Mapping[str, Any], columns: Sequence[pa.Field], contents: Mapping[str, Content], row: int
) -> pa.Table:
    """One request as a table of one row."""
    refuse_missing([column.name for column in columns], request, f"requests: request {row}")
    arrays = {}
    for column in columns:
        name, content = column.name, contents[column.name]
        try:
            arrays[name] = array_of(request[name], column.type, content)
        except MisfitError as misfit:
            raise InputError(
                f"requests: request {row}: {name} {misfit}: write {wanted(column.type, content)}"
            ) from misfit
    return pa.table(arrays)


def refuse_missing_features(batch: RequestBatch, features: Mapping[str, Sequence[str]]) -> None:
    """Refuse a batch that lacks what a model reads.

    Args:
        batch: any.
        features: that are read of each of its fields.

    Raises:
        InputError: one is not there.
    """
    for field, names in features.items():
        have = getattr(batch, field).keys()
        for name in names:
            if name not in have:
                raise InputError(f"batch: {field} has {list(have)}, but the model reads {name!r}, too: add it")


def refuse_unequal_events(batch: RequestBatch, events: Mapping[str, Sequence[str]]) -> None:
    """Refuse a batch of whose events a feature is missing.

    Args:
        batch: any.
        events: features of the events of each history.

    Raises:
        InputError: features of one history differ in length.
    """
    for first, *others in events.values():
        expected = batch.sequences[first].lengths()
        for name in others:
            have = batch.sequences[name].lengths()
            if len(wrong := (have != expected).nonzero()):
                row = int(wrong[0])
                raise InputError(
                    f"batch: request {row}: sequences[{name!r}] has {int(have[row])} entries, but sequences[{first!r}] "
                    f"has {int(expected[row])}: each event needs all its features"
                )


def refuse_weights(name: str, features: KeyedJaggedTensor, is_weighted: bool) -> None:
    """Refuse ids with weights where a collection of bags does not read weights, and ids without where it does.

    Args:
        name: of the field, for the error message.
        features: ids.
        is_weighted: whether the collection reads weights.

    Raises:
        InputError: the ids do not go with the collection.
    """
    has_weights = features.weights_or_none() is not None
    if has_weights and not is_weighted:
        # Alone, TorchRec's collection leaves such weights out; sharded, it applies them.
        raise InputError(
            f"batch: {name} has weights, but the model's collection of bags is not weighted: build it with "
            "is_weighted=True, or take the weights off the batch"
        )
    if is_weighted and not has_weights:
        raise InputError(
            f"batch: {name} has no weights, but the model's collection of bags is weighted: give each id its weight, "
            "1.0 where there is none"
        )


def _event_features(sequences: KeyedJaggedTensor) -> list[str]:
    return [key for key in sequences.keys() if key != "candidate_item"]


def _with_items(
    events: KeyedJaggedTensor, sequences: KeyedJaggedTensor, start: int, stop: int, num_candidates: Tensor
) -> KeyedJaggedTensor:
    """Histories together with the items of the candidates from `start` to `stop`, if the sequences have items."""
    if "candidate_item" not in sequences.keys():
        return events
    span, weights = span_of(sequences, "candidate_item", 0, sequences.stride()), sequences.weights_or_none()
    items = KeyedJaggedTensor(
        ["candidate_item"],
        sequences.values()[span][start:stop],
        weights=None if weights is None else weights[span][start:stop],
        lengths=num_candidates.to(sequences.lengths().dtype),
        stride=num_candidates.numel(),
    )
    return KeyedJaggedTensor.concat([events, items])


def _array(tensor: Tensor) -> np.ndarray:
    """As numpy, whose small operations take a fraction of the time of torch's: a service checks every request."""
    if not tensor.is_cpu or tensor.requires_grad:
        tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


class _Check:
    """The checks of `RequestBatch.validate`, in the order in which one makes the next meaningful."""

    def __init__(self, batch: RequestBatch, table_sizes: Mapping[str, int], source: str, first_row: int) -> None:
        self.batch = batch.shallow_copy()
        self.table_sizes = table_sizes
        self.source = source
        self.first_row = first_row
        self.num_candidates = _array(batch.num_candidates)

    def run(self) -> None:
        self._counts()
        self._rows()
        for name, kjt, per_candidate in (
            ("request_sparse", self.batch.request_sparse, False),
            ("candidate_sparse", self.batch.candidate_sparse, True),
            ("sequences", self.batch.sequences, False),
        ):
            self._keyed(name, kjt, per_candidate)
        self._finite("request_dense", self.batch.request_dense, False)
        self._finite("candidate_dense", self.batch.candidate_dense, True)
        if self.batch.labels is not None:
            labels = _array(self.batch.labels)
            self._refuse("labels", labels, (labels >= 0) & (labels <= 1), True, "a number from 0 to 1")

    def _request(self, row: int) -> str:
        return f"{self.source}: request {self.first_row + row}"

    def _candidate(self, candidate: int) -> str:
        row = int(np.searchsorted(np.cumsum(self.num_candidates), candidate, side="right"))
        return f"{self._request(row)}, candidate {candidate - int(self.num_candidates[:row].sum())}"

    def _counts(self) -> None:
        counts = self.batch.num_candidates
        if counts.dim() != 1 or counts.dtype != torch.int64:
            raise InputError(
                f"{self.source}: num_candidates is {counts.dtype} with shape {tuple(counts.shape)}, not int64 [B]"
            )
        if len(empty := np.flatnonzero(self.num_candidates < 1)):
            row = int(empty[0])
            raise InputError(
                f"{self._request(row)}: num_candidates is {self.num_candidates[row]}, not 1 or more: leave the "
                "request out"
            )

    def _rows(self) -> None:
        batch, requests = self.batch, len(self.batch)
        candidates = int(self.num_candidates.sum())
        rows = {
            "request_dense": (batch.request_dense.shape[0], requests),
            "request_sparse": (batch.request_sparse.stride(), requests),
            "sequences": (batch.sequences.stride(), requests),
            "candidate_dense": (batch.candidate_dense.shape[0], candidates),
            "candidate_sparse": (batch.candidate_sparse.stride(), candidates),
        }
        if batch.users is not None:
            rows["users"] = (batch.users.shape[0], requests)
        if batch.labels is not None:
            rows["labels"] = (batch.labels.shape[0], candidates)
        for name in ("request_sparse", "candidate_sparse", "sequences"):
            # Without keys there is nothing of which a row could be missing.
            if not getattr(batch, name).keys():
                del rows[name]
        for name, (have, expected) in rows.items():
            if have != expected:
                raise InputError(
                    f"{self.source}: {name} has {have} rows, but num_candidates tells of {requests} requests "
                    f"and {candidates} candidates, so {expected} are needed"
                )

    def _keyed(self, name: str, kjt: KeyedJaggedTensor, per_candidate: bool) -> None:
        if not (keys := list(kjt.keys())):
            return
        lengths, values = _array(kjt.lengths()), _array(kjt.values())
        if lengths.size != len(keys) * kjt.stride():
            raise InputError(
                f"{self.source}: {name} has {lengths.size} lengths for {len(keys)} keys of {kjt.stride()} rows, "
                f"not {len(keys) * kjt.stride()}"
            )
        lengths = lengths.reshape(len(keys), kjt.stride())
        if lengths.min(initial=0) < 0:
            key, row = np.argwhere(lengths < 0)[0].tolist()
            raise InputError(f"{self._request(row)}: {name}[{keys[key]!r}] has length {lengths[key, row]}, below 0")
        counts = lengths.sum(1)
        if counts.sum() != values.size:
            raise InputError(
                f"{self.source}: the lengths of {name} add up to {counts.sum()}, but it has {values.size} values"
            )
        if not self._are_ids(keys, counts, values):
            self._refuse_id(name, keys, lengths, values, per_candidate)
        if (weights := kjt.weights_or_none()) is not None:
            self._weights(name, keys, lengths, weights, per_candidate)
        if name == "sequences":
            self._sequence_lengths(keys, lengths)

    def _are_ids(self, keys: list[str], counts: np.ndarray, values: np.ndarray) -> bool:
        if values.size == 0:
            return True
        sizes, starts = self._sizes(keys), np.cumsum(counts) - counts
        if counts.min() == 0:
            sizes, starts = sizes[counts > 0], starts[counts > 0]
        # The greatest id of each key, without an array of the size of the batch.
        return bool(values.min() >= 0 and (np.maximum.reduceat(values, starts) < sizes).all())

    def _sizes(self, keys: list[str]) -> np.ndarray:
        return np.array([self.table_sizes.get(key, ANY_ID) for key in keys])

    def _refuse_id(
        self, name: str, keys: list[str], lengths: np.ndarray, values: np.ndarray, per_candidate: bool
    ) -> None:
        sizes = np.repeat(self._sizes(keys), lengths.sum(1))
        position = int(np.flatnonzero((values < 0) | (values >= sizes))[0])
        limit = "0 to 2**63 - 2" if sizes[position] == ANY_ID else f"0 to {sizes[position] - 1}, the rows of its table"
        raise InputError(
            f"{self._entry(name, keys, lengths, position, per_candidate)} has id {values[position]}, not {limit}: map "
            "the id, enlarge the table, or give the feature vocabulary 'unknown' or 'hash'"
        )

    def _weights(self, name: str, keys: list[str], lengths: np.ndarray, weights: Tensor, per_candidate: bool) -> None:
        num_values = int(lengths.sum())
        if not weights.is_floating_point() or weights.shape != (num_values,):
            raise InputError(
                f"{self.source}: the weights of {name} are {weights.dtype} with shape {tuple(weights.shape)}, but it "
                f"has {num_values} values: give each its weight, a float"
            )
        if len(wrong := np.flatnonzero(~np.isfinite(array := _array(weights)))):
            entry = self._entry(name, keys, lengths, int(wrong[0]), per_candidate)
            raise InputError(f"{entry} has weight {array[wrong[0]]}, not a finite number")

    def _entry(self, name: str, keys: list[str], lengths: np.ndarray, position: int, per_candidate: bool) -> str:
        """Where the value at a position of a field is."""
        place = int(np.searchsorted(np.cumsum(lengths), position, side="right"))
        key, row = divmod(place, lengths.shape[1])
        return f"{self._candidate(row) if per_candidate else self._request(row)}: {name}[{keys[key]!r}]"

    def _sequence_lengths(self, keys: list[str], lengths: np.ndarray) -> None:
        for key, have in zip(keys, lengths, strict=True):
            if key == "candidate_item":
                expected, other = self.num_candidates, "num_candidates"
            elif "history_item" in keys:
                expected, other = lengths[keys.index("history_item")], "sequences['history_item']"
            else:
                # No name tells which of the other keys are of one history.
                continue
            if len(wrong := np.flatnonzero(have != expected)):
                row = int(wrong[0])
                raise InputError(
                    f"{self._request(row)}: sequences[{key!r}] has {have[row]} entries, but {other} tells of "
                    f"{expected[row]}"
                )

    def _finite(self, name: str, values: Tensor, per_candidate: bool) -> None:
        array = _array(values)
        # The sum of what is not finite is not finite, either, and needs no array of the size of the batch.
        with np.errstate(invalid="ignore"):
            total = array.sum(dtype=np.float64)
        if not np.isfinite(total):
            self._refuse(name, array, np.isfinite(array), per_candidate, "a finite number")

    def _refuse(self, name: str, values: np.ndarray, right: np.ndarray, per_candidate: bool, expected: str) -> None:
        """Refuse the first of the values [rows, columns] that is not right."""
        if not right.all():
            row, column = np.argwhere(~right)[0].tolist()
            where = self._candidate(row) if per_candidate else self._request(row)
            raise InputError(f"{where}: {name} column {column} is {values[row, column]}, not {expected}")
