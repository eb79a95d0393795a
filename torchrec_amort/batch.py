"""RequestBatch: the one thing that flows from the data to the model.

Shape suffixes: B requests; C candidates, N history events, all requests together; I dense inputs; T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from torchrec_amort.checks import Checks
from torchrec_amort.columns import MisfitError, column_of, typed_columns, wanted
from torchrec_amort.errors import InputError
from torchrec_amort.grouping import Impressions, Keys, first_rows, whole_numbers
from torchrec_amort.jagged_ids import rows_of_all, select_rows, shallow_copy, taken
from torchrec_amort.lists import Layout, Lists
from torchrec_amort.rows import Rows
from torchrec_amort.schema import RequestSchema, refuse_missing, refuse_missing_columns


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
        sequences: stride B: a list of ids per request for each feature of the events of its histories (oldest first),
            and for each of its candidates', or its own, that shares a table with them.
        num_candidates: int64 [B], each at least 1; their sum is C.
        labels: float [C, T], or None when scoring.
        users: int64 [B], or None: whose request it is. Never an input of the model: metrics group by it.
        dense_sequences: for each feature of events that is numbers, float [N, their number], with one row of B per
            request; and for each vector of candidates like one of events, [C, its size].
        num_ids: for each key of `sequences` whose events or candidates have several ids or none: how many, int64 [N] or
            [C], with one row of B per request.
        weights: float [C], or None: of each candidate's share of the loss.
        layout: whose the keys of `sequences` and `dense_sequences` are. Of keys that it does not name, `candidate_item`
            is the candidates', and the others are of events: with `history_item` of one history, without of one each.
        targets: bool [T], or None: which columns of `labels` may be any finite number; the others are from 0 to 1.

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
    dense_sequences: Mapping[str, JaggedTensor] = field(default_factory=dict)
    num_ids: Mapping[str, JaggedTensor] = field(default_factory=dict)
    weights: Tensor | None = None
    layout: Layout | None = None
    targets: Tensor | None = None

    @classmethod
    def from_requests(
        cls,
        requests: Iterable[Mapping[str, Any]],
        schema: RequestSchema,
        history_length: int | Mapping[str, int] | None = None,
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
        columns = _columns_of(requests, schema)
        refuse_missing_columns(schema, columns, "requests")
        batch = cls._of_rows(Rows(columns, schema, "requests", 0)).validate(schema.table_sizes, source="requests")
        return batch if history_length is None else batch.keep_latest(history_length)

    @classmethod
    def from_arrow(
        cls,
        table: pa.Table,
        schema: RequestSchema,
        history_length: int | Mapping[str, int] | None = None,
        *,
        source: str = "requests",
        first_row: int = 0,
        validate: bool = True,
    ) -> RequestBatch:
        """Build a batch from a table with one row per request.

        Args:
            table: the columns of `schema.arrow_schema()`, in any Arrow type that says the same. `request_id` and
                `user` may be absent, `time` if no feature needs it, and the labels, all together, when scoring. Times
                may be timestamps of any unit and time zone (UTC if they have none) and dates, whose fractions of
                seconds are cut, or whole seconds since 1970. Floats are rounded to float32.
            schema: what the requests are made of. By the vocabulary of its features, ids become rows of tables here
                and nowhere else: the ids of a batch are mapped already.
            history_length: keep at most this many events of each history, or of those named, the most recent ones.
            source: where the table comes from, for error messages.
            first_row: number of the table's first row there, for error messages.
            validate: whether to refuse what `validate` refuses; rows that are checked already need not be again.

        Raises:
            InputError: a column is missing, has a null or a value that its type does not hold (text or a boolean for
                an id, a time after the year 2200), lists of one request differ in length, or what `validate` refuses.
        """
        refuse_missing_columns(schema, table.schema.names, source)
        columns = typed_columns(table, schema, source, first_row)
        batch = cls._of_rows(Rows(columns, schema, source, first_row))
        if validate:
            batch.validate(schema.table_sizes, source=source, first_row=first_row)
        return batch if history_length is None else batch.keep_latest(history_length)

    @classmethod
    def _of_rows(cls, rows: Rows) -> RequestBatch:
        schema, labels = rows.schema, rows.schema.label_features
        sequences, num_ids = rows.sequences()
        return cls(
            request_dense=rows.dense("request"),
            candidate_dense=rows.dense("candidate"),
            request_sparse=rows.sparse("request"),
            candidate_sparse=rows.sparse("candidate"),
            sequences=sequences,
            num_candidates=torch.from_numpy(rows.num_candidates.copy()),
            labels=rows.stack(labels) if any(rows.has(label.source) for label in labels) else None,
            users=torch.from_numpy(rows.scalars("user").copy()) if rows.has("user") else None,
            dense_sequences=rows.dense_sequences(),
            num_ids=num_ids,
            weights=rows.weights(),
            layout=schema.layout,
            targets=_targets_of(schema),
        )

    @classmethod
    def from_impressions(
        cls,
        dense_features: Tensor,
        sparse_features: KeyedJaggedTensor,
        request_ids: Tensor | Sequence[int],
        *,
        labels: Tensor | None = None,
        request_features: Sequence[str] = (),
        event_features: Sequence[str] | Mapping[str, Sequence[str]] = (),
        item: str | None = None,
        users: Tensor | Sequence[int] | None = None,
        schema: RequestSchema | None = None,
        request_dense: Tensor | None = None,
        dense_sequences: Mapping[str, JaggedTensor] | None = None,
        num_ids: Mapping[str, JaggedTensor] | None = None,
        weights: Tensor | None = None,
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
            event_features: keys of ids of its history's events, the oldest first; of several histories, or of one with
                numbers, a mapping from the name of each history to its keys, of ids or of `dense_sequences`.
            item: key of the candidate's item, one id in each row. It becomes `candidate_item` of the sequences, and
                stays an id of the candidate. If None, the sequences have no `candidate_item`.
            users: int64 [C], or None: whose impressions they are.
            schema: says which keys are whose, in place of `request_features`, `event_features` and `item`: keys are the
                names of its features. Ids are rows of tables, and numbers what the model reads.
            request_dense: float [C, I_r], or None: dense inputs of the request.
            dense_sequences: numbers of events, and vectors of candidates, as the batch has them, with one row of C per
                impression. What is of no history is the candidates'.
            num_ids: for each key of ids whose events or candidates have several ids or none: how many, as the batch has
                them, with one row of C per impression.
            weights: float [C], or None: of each candidate's share of the loss.

        Raises:
            InputError: there are no rows, the arguments do not have the same number of rows, a key is missing or named
                twice, a row has not exactly one item, the schema has other features, or rows of one request do not
                agree on its ids, numbers, histories or user. The message then names the request, the key, the two rows
                and what each of them has.

        Example::

            batch = RequestBatch.from_impressions(
                impressions.dense_features,
                impressions.sparse_features,
                request_ids,
                labels=impressions.labels,
                request_features=["user", "country"],
                event_features={"clicks": ["clicked_item", "clicked_time"], "purchases": ["bought_item"]},
                item="item",
            )
        """
        numbers = dense_sequences or {}
        impressions = Impressions(dense_features, sparse_features, request_ids, request_dense, numbers, num_ids or {})
        if schema is not None:
            if request_features or event_features or item is not None:
                raise InputError(
                    "impressions: a schema is given, which says what request_features, event_features and item say: "
                    "leave them out"
                )
            impressions.refuse_other_schema(schema)
            keys = Keys.of(schema)
        else:
            keys = Keys.named(request_features, event_features, item, numbers)
            impressions.refuse_keys(keys)
        lists = impressions.lists(keys)
        sequences, layout = lists.sequences, lists.layout
        if item is not None:
            sequences = KeyedJaggedTensor.concat([sequences, impressions.items(item)])
        if schema is None and not isinstance(event_features, Mapping):
            # Of such keys, a batch knows itself whose they are.
            layout = replace(layout, histories={})
        return cls(
            request_dense=impressions.dense_of_requests(),
            candidate_dense=impressions.dense(),
            request_sparse=impressions.of_requests(keys.requests),
            candidate_sparse=impressions.of_candidates(but={*keys.requests, *lists.sequences.keys()}),
            sequences=sequences,
            num_candidates=impressions.num_candidates,
            labels=None if labels is None else impressions.labels(labels),
            users=None if users is None else impressions.users(users),
            dense_sequences=lists.dense,
            num_ids=lists.num_ids,
            weights=None if weights is None else impressions.weights(weights),
            layout=layout,
            targets=None if schema is None else _targets_of(schema),
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
            dense_sequences=_shallow_copies(self.dense_sequences),
            num_ids=_shallow_copies(self.num_ids),
        )

    def _map(self, function: Callable[[Any], Any]) -> RequestBatch:
        def mapped(value: Any) -> Any:
            if value is None or isinstance(value, Layout):
                return value
            if isinstance(value, Mapping):
                return {key: mapped(one) for key, one in value.items()}
            if isinstance(value, JaggedTensor):
                return JaggedTensor(function(value.values()), lengths=function(value.lengths()))
            return function(value)

        # Of the same class, which may have more fields.
        return replace(self, **{f.name: mapped(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device, non_blocking: bool = False) -> RequestBatch:
        """Copy the batch to a device."""
        # TorchRec would leave what it keeps of single keys on the old device.
        return self.shallow_copy()._map(lambda value: value.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> RequestBatch:
        """Copy the batch to page-locked memory, from where it moves to a GPU without blocking."""
        return self._map(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that a stream uses the batch."""

        def recorded(value: Any) -> Any:
            value.record_stream(stream)
            return value

        self._map(recorded)

    @property
    def request_lists(self) -> Lists:
        """All that the requests list."""
        return Lists(shallow_copy(self.sequences), self.dense_sequences, self.num_ids, self._layout())

    def _layout(self) -> Layout:
        """Whose all of the keys are."""
        return (self.layout or Layout({}, ())).with_usual(self.sequences.keys())

    def _with_lists(self, lists: Lists, **changed: Any) -> RequestBatch:
        return replace(self, sequences=lists.sequences, dense_sequences=lists.dense, num_ids=lists.num_ids, **changed)

    def keep_latest(self, history_length: int | Mapping[str, int]) -> RequestBatch:
        """The same requests with at most `history_length` events in each history, the latest ones.

        A model may be served with shorter histories than it was trained with.

        Args:
            history_length: of all histories, or of each that is named.

        Raises:
            InputError: `history_length` is below 0, or there is no such history.

        Example::

            logits_CT = model(batch.keep_latest(50))
        """
        lists = self.request_lists
        limits = history_length
        if not isinstance(limits, Mapping):
            limits = dict.fromkeys(lists.layout.histories, limits)
        for name, limit in limits.items():
            if name not in lists.layout.histories:
                raise InputError(f"history_length: no history {name!r}; there are {list(lists.layout.histories)}")
            if limit < 0:
                raise InputError(f"history_length is {limit}, not 0 or more")
        return self.shallow_copy()._with_lists(lists.keep_latest(limits))

    def select(self, requests: Tensor) -> RequestBatch:
        """Some of the requests, as a batch of their own; a copy.

        Args:
            requests: int64 [S], their rows in this batch, in the order that is wanted; at least one.

        Returns:
            RequestBatch: of S requests.

        Example::

            logits_CT = model(batch.select(torch.tensor([2, 0])))
        """
        candidates_C, counts_S = taken(self.num_candidates, requests)
        return self._with_lists(
            self.request_lists.select(requests),
            request_dense=self.request_dense[requests],
            candidate_dense=self.candidate_dense[candidates_C],
            request_sparse=select_rows(self.request_sparse, requests, self.request_sparse.keys()),
            candidate_sparse=select_rows(self.candidate_sparse, candidates_C, self.candidate_sparse.keys()),
            num_candidates=counts_S,
            labels=None if self.labels is None else self.labels[candidates_C],
            users=None if self.users is None else self.users[requests],
            weights=None if self.weights is None else self.weights[candidates_C],
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
        return batch._with_lists(
            self.request_lists.part(start, stop, num_candidates_B),
            candidate_dense=self.candidate_dense[start:stop],
            candidate_sparse=rows_of_all(batch.candidate_sparse, start, stop),
            num_candidates=num_candidates_B,
            labels=None if self.labels is None else self.labels[start:stop],
            weights=None if self.weights is None else self.weights[start:stop],
        )

    def to_impressions(self) -> RequestBatch:
        """The same data as C requests of one candidate each: what an ordinary DLRM scores.

        Returns:
            RequestBatch: each request's features and history repeated for each of its candidates, in
            the candidates' order. Scoring it is the baseline that amortizing is measured against.

        Example::

            torch.testing.assert_close(model(batch.to_impressions()), model(batch))
        """
        requests_C = torch.repeat_interleave(self.num_candidates, output_size=self.stride())
        return self._with_lists(
            self.request_lists.impressions(requests_C),
            request_dense=self.request_dense[requests_C],
            request_sparse=select_rows(self.request_sparse, requests_C, self.request_sparse.keys()),
            candidate_sparse=shallow_copy(self.candidate_sparse),
            num_candidates=torch.ones_like(requests_C),
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
        sizes = table_sizes or {}
        checks = Checks(source, first_row, self.num_candidates)
        batch = self.shallow_copy()
        for name, of_candidates in _FIELDS_OF_ROWS.items():
            if (value := getattr(batch, name)) is not None:
                checks.rows(name, value.shape[0], of_candidates)
        checks.ids("request_sparse", batch.request_sparse, False, sizes)
        checks.ids("candidate_sparse", batch.candidate_sparse, True, sizes)
        lengths = checks.ids("sequences", batch.sequences, False, sizes)
        entries = dict(lengths)
        of_ids = {}
        for key, num_ids in batch.num_ids.items():
            if key not in lengths:
                raise InputError(f"{source}: num_ids has {key!r}, but sequences has {list(lengths)}: leave it out")
            of_ids[key] = checks.num_ids(key, num_ids, lengths[key])
        for key, numbers in batch.dense_sequences.items():
            entries[key] = checks.jagged(f"dense_sequences[{key!r}]", numbers)
        checks.entries(batch._layout(), entries | of_ids)
        checks.finite("request_dense", self.request_dense, False)
        checks.finite("candidate_dense", self.candidate_dense, True)
        if self.labels is not None:
            checks.labels(self.labels, self.targets)
        if self.weights is not None:
            checks.between("weights", self.weights[:, None], 0, _GREATEST, "a finite number, 0 or more")
        return self


def _targets_of(schema: RequestSchema) -> Tensor | None:
    return torch.tensor([t in schema.targets for t in range(len(schema.labels))]) if schema.targets else None


def _shallow_copies(jagged: Mapping[str, JaggedTensor]) -> dict[str, JaggedTensor]:
    return {key: JaggedTensor(of_key.values(), lengths=of_key.lengths()) for key, of_key in jagged.items()}


# Whether they have a row for each candidate, or for each request.
_FIELDS_OF_ROWS = {"request_dense": False, "candidate_dense": True, "users": False, "labels": True, "weights": True}
_GREATEST = float(np.finfo(np.float32).max)


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


def _columns_of(requests: Sequence[Mapping[str, Any]], schema: RequestSchema) -> dict[str, pa.Array]:
    """The columns of requests that one of them has at least.

    Raises:
        InputError: a request lacks one, or has a value that its column cannot hold: the first of them is named, as if
            they were read one by one.
    """
    present = set(chain.from_iterable(requests))
    columns = [column for column in schema.arrow_schema() if column.name in present]
    names = [column.name for column in columns]
    needed = set(names)
    lacking = (row for row, request in enumerate(requests) if not needed <= request.keys())
    first_wrong, wrong = next(lacking, len(requests)), None
    arrays = {}
    for column in columns:
        name, content = column.name, schema.contents[column.name]
        values = [request[name] for request in requests[:first_wrong]]
        try:
            arrays[name] = column_of(values, column.type, content, column.nullable)
        except MisfitError as misfit:
            # Of other columns, only what is wrong in a request before this one comes first.
            first_wrong, wrong = misfit.place, misfit
            told = f"{name} {misfit}: write {wanted(column.type, content, column.nullable)}"
    if wrong is not None:
        raise InputError(f"requests: request {first_wrong}: {told}") from wrong
    if first_wrong < len(requests):
        refuse_missing(names, requests[first_wrong], f"requests: request {first_wrong}")
    return arrays


def refuse_missing_features(batch: RequestBatch, features: Mapping[str, Sequence[str]]) -> None:
    """Refuse a batch that lacks what a model reads.

    Args:
        batch: any.
        features: that are read of each of its fields.

    Raises:
        InputError: one is not there.
    """
    for part, names in features.items():
        have = list(getattr(batch, part).keys())
        for name in names:
            if name not in have:
                raise InputError(f"batch: {part} has {have}, but the model reads {name!r}, too: add it")


def refuse_unequal_events(batch: RequestBatch, events: Mapping[str, Sequence[str]]) -> None:
    """Refuse a batch of whose events a feature is missing.

    Args:
        batch: one that `RequestBatch.validate` let pass.
        events: features of the events that each tower reads.

    Raises:
        InputError: features of one tower differ in length.
    """
    lists = batch.request_lists
    for first, *others in events.values():
        if any(set(others) <= set(keys) for keys in lists.layout.histories.values() if first in keys):
            # Compared already.
            continue
        expected = lists.num_entries(first)
        for name in others:
            have = lists.num_entries(name)
            assert have is not None
            assert expected is not None
            if len(wrong := (have != expected).nonzero()):
                row = int(wrong[0])
                raise InputError(
                    f"batch: request {row}: sequences[{name!r}] has {int(have[row])} entries, but sequences[{first!r}] "
                    f"has {int(expected[row])}: each event needs all its features"
                )


def refuse_other_dtypes(batch: RequestBatch) -> None:
    """Refuse numbers that are not float32: compiled code would read their bytes as such.

    Args:
        batch: any.

    Raises:
        InputError: some are of another type.
    """
    numbers = {"request_dense": batch.request_dense, "candidate_dense": batch.candidate_dense}
    numbers |= {f"dense_sequences[{key!r}]": jagged.values() for key, jagged in batch.dense_sequences.items()}
    for name, values in numbers.items():
        if values.dtype != torch.float32:
            raise InputError(f"batch: {name} is {values.dtype}, but the scorer reads torch.float32: make it float()")


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
