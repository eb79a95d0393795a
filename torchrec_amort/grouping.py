"""Impressions put together to requests.

Shape suffixes: B requests; C impressions, which are the requests' candidates; I dense inputs; V values of a feature; T
tasks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_amort.errors import InputError, one_line
from torchrec_amort.jagged_ids import rows_of, rows_of_all, select_rows, shallow_copy, span_of, taken
from torchrec_amort.lists import Layout, Lists, sums
from torchrec_amort.schema import RequestSchema


def whole_numbers(name: str, numbers: Tensor | Sequence[int]) -> Tensor:
    """One number of each impression, as int64 [C].

    Args:
        name: of the argument, for the error message.
        numbers: as they are given.

    Raises:
        InputError: they are not whole numbers of 64 bits, one after the other.
    """
    try:
        numbers_C = torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"impressions: {name} are not whole numbers of 64 bits: {one_line(error)}") from error
    is_whole = not (numbers_C.is_floating_point() or numbers_C.is_complex() or numbers_C.dtype == torch.bool)
    if numbers_C.dim() != 1 or not is_whole:
        raise InputError(
            f"impressions: {name} is {numbers_C.dtype} with shape {tuple(numbers_C.shape)}, not int64 [C]: give one "
            "whole number for each impression"
        )
    return numbers_C.long()


def first_rows(request_ids_C: Tensor) -> Tensor:
    """int64 [C]: the first row with the request id of each row."""
    _, places_C = torch.unique(request_ids_C, return_inverse=True)
    rows_C = torch.arange(places_C.numel(), device=places_C.device)
    first_of_place = torch.full_like(rows_C, rows_C.numel()).scatter_reduce_(0, places_C, rows_C, "amin")
    return first_of_place[places_C]


_HISTORY = "give rows with another history another request id"
_REQUEST = "give these rows request ids of their own"


@dataclass(frozen=True, eq=False)
class Keys:
    """Whose the keys of impressions are; other ids are the candidates'.

    Args:
        requests: ids of the requests that are bags.
        layout: whose those of the sequences are.
        item: ids of the candidates that are its `candidate_item`, too.
    """

    requests: Sequence[str]
    layout: Layout
    item: str | None = None

    @classmethod
    def named(
        cls,
        request_features: Sequence[str],
        event_features: Sequence[str] | Mapping[str, Sequence[str]],
        item: str | None,
        numbers: Collection[str],
    ) -> Keys:
        """What the arguments of `RequestBatch.from_impressions` say.

        Args:
            request_features: ids of the requests.
            event_features: of the events of one history, or of each history.
            item: the candidates'.
            numbers: keys of the dense sequences, which are the candidates' if they are of no events.
        """
        given = event_features if isinstance(event_features, Mapping) else {"history": event_features}
        histories = {name: tuple(keys) for name, keys in given.items()}
        of_events = {key for keys in histories.values() for key in keys}
        return cls(request_features, Layout(histories, tuple(key for key in numbers if key not in of_events)), item)

    @classmethod
    def of(cls, schema: RequestSchema) -> Keys:
        """What a schema says."""
        return cls([feature.name for feature in schema.bag_features["request"]], schema.layout)

    @property
    def of_requests(self) -> list[str]:
        """Keys of the sequences that rows of one request have alike."""
        return [*(key for keys in self.layout.histories.values() for key in keys), *self.layout.requests]


class Impressions:
    """Impressions, and which of them make one request.

    Requests are in the order of their first rows, their candidates in the order of their rows.

    Args:
        dense_features: float [C, I].
        sparse_features: ids, stride C.
        request_ids: int64 [C].
        request_dense: float [C, I_r]; none if None.
        dense_sequences: numbers of events, and of candidates, one row of C per impression.
        num_ids: of each key of ids whose entries have several or none: how many, one row of C per impression.

    Raises:
        InputError: there are none, or not as many everywhere.
    """

    def __init__(
        self,
        dense_features: Tensor,
        sparse_features: KeyedJaggedTensor,
        request_ids: Tensor | Sequence[int],
        request_dense: Tensor | None,
        dense_sequences: Mapping[str, JaggedTensor],
        num_ids: Mapping[str, JaggedTensor],
    ) -> None:
        self._refuse_other_numbers("dense_features", dense_features)
        if not len(dense_features):
            raise InputError("impressions: dense_features has 0 rows: a batch needs at least 1 request")
        self._dense_CI = dense_features
        self._features = self._checked(sparse_features)
        self._request_ids_C = self._numbers("request_ids", request_ids)
        self._firsts_C = first_rows(self._request_ids_C)
        self._order_C = torch.argsort(self._firsts_C, stable=True)
        self._firsts_B, self.num_candidates = torch.unique(self._firsts_C, return_counts=True)
        self._request_dense = dense_features[:, :0] if request_dense is None else request_dense
        self._refuse_other_numbers("request_dense", self._request_dense)
        self._refuse_other_rows("request_dense", len(self._request_dense))
        for name, jagged in dense_sequences.items():
            self._refuse_jagged(f"dense_sequences[{name!r}]", jagged, 2)
            if name in self._features.keys():
                raise InputError(
                    f"impressions: {name!r} is a key of sparse_features and of dense_sequences: rename one"
                )
        for name, jagged in num_ids.items():
            self._refuse_jagged(f"num_ids[{name!r}]", jagged, 1)
            self._refuse_other_counts(name, jagged)
        self._dense_sequences, self._num_ids = dense_sequences, num_ids

    @staticmethod
    def _refuse_other_numbers(name: str, numbers: Tensor) -> None:
        if numbers.dim() != 2 or not numbers.is_floating_point():
            raise InputError(
                f"impressions: {name} is {numbers.dtype} with shape {tuple(numbers.shape)}, not float [C, I]"
            )

    def _checked(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        keys, num_rows = list(features.keys()), len(self._dense_CI)
        if features.variable_stride_per_key():
            raise InputError(
                f"impressions: sparse_features has strides {features.stride_per_key()}, one for each key, but "
                f"dense_features has {num_rows} rows: give each key that many"
            )
        self._refuse_twice("sparse_features", keys)
        # Without keys there is nothing of which a row could be missing.
        if keys:
            self._refuse_other_rows("sparse_features", features.stride())
        features = shallow_copy(features)
        have = features.lengths().numel(), features.values().numel()
        expected = len(keys) * num_rows, int(features.lengths().sum())
        for what, number, other in zip(("lengths", "values"), have, expected, strict=True):
            if number != other:
                raise InputError(f"impressions: sparse_features has {number} {what}, but needs {other}")
        return features

    def _refuse_other_rows(self, name: str, num_rows: int) -> None:
        if num_rows != len(self._dense_CI):
            raise InputError(
                f"impressions: {name} has {num_rows} rows, but dense_features has {len(self._dense_CI)}: give one for "
                "each impression"
            )

    def _refuse_twice(self, name: str, keys: Sequence[str]) -> None:
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"impressions: {name}: {key!r} is there {keys.count(key)} times, not once")

    def _numbers(self, name: str, numbers: Tensor | Sequence[int]) -> Tensor:
        numbers_C = whole_numbers(name, numbers)
        self._refuse_other_rows(name, len(numbers_C))
        return numbers_C.to(self._dense_CI.device)

    def _refuse_jagged(self, name: str, jagged: JaggedTensor, dim: int) -> None:
        values, lengths_C = jagged.values(), jagged.lengths()
        self._refuse_other_rows(name, len(lengths_C))
        if values.dim() != dim or len(values) != int(lengths_C.sum()):
            raise InputError(
                f"impressions: {name} has values of shape {tuple(values.shape)}, but its lengths tell of "
                f"{int(lengths_C.sum())} entries: give each {'one number' if dim == 1 else 'a row of numbers'}"
            )

    def _refuse_other_counts(self, key: str, num_ids: JaggedTensor) -> None:
        if key not in self._features.keys():
            raise InputError(f"impressions: num_ids: no {key!r}: sparse_features has {self._features.keys()}")
        _, have_C = rows_of(self._features, key, 0, len(self._dense_CI))
        told_C = sums(num_ids.values(), num_ids.lengths())
        if len(wrong := (have_C != told_C).nonzero()):
            row = int(wrong[0])
            raise InputError(
                f"impressions: row {row}: {key!r} has {int(have_C[row])} ids, but num_ids tells of {int(told_C[row])}"
            )

    def refuse_keys(self, keys: Keys) -> None:
        """Refuse keys that are not there, or have two meanings.

        Raises:
            InputError: they are.
        """
        events = [key for of_history in keys.layout.histories.values() for key in of_history]
        items = [] if keys.item is None else [keys.item]
        named = {"request_features": keys.requests, "event_features": events, "item": items}
        for name, of_name in named.items():
            numbers = list(self._dense_sequences) if name == "event_features" else []
            for key in of_name:
                if key not in (*self._features.keys(), *numbers):
                    others = f" and dense_sequences {numbers}" if numbers else ""
                    raise InputError(
                        f"impressions: {name}: no {key!r}: sparse_features has {self._features.keys()}{others}"
                    )
        self._refuse_twice(", ".join(named), [key for of_name in named.values() for key in of_name])
        if "candidate_item" in events:
            raise InputError(
                "impressions: event_features: 'candidate_item' is what a batch calls the items of candidates: rename it"
            )

    def refuse_other_schema(self, schema: RequestSchema) -> None:
        """Refuse impressions that are not what a schema says.

        Raises:
            InputError: they are not.
        """
        of_sequences = {f.name: f for f in schema.sequence_features}
        ids = [*of_sequences, *(f.name for side in schema.bag_features.values() for f in side)]
        numbers = {f.name: f.num_inputs for f in schema.dense_sequence_features}
        lists = [f.name for f in of_sequences.values() if f.kind == "ids"]
        needed = {
            "sparse_features": (ids, self._features.keys()),
            "num_ids": (lists, self._num_ids),
            "dense_sequences": (numbers, self._dense_sequences),
        }
        for name, (of_schema, given) in needed.items():
            for key in of_schema:
                if key not in given:
                    raise InputError(f"impressions: {name}: no {key!r}, which schema {schema.dataset!r} has: add it")
        num_columns = {
            "dense_features": (self._dense_CI.shape[1], schema.num_dense["candidate"]),
            "request_dense": (self._request_dense.shape[1], schema.num_dense["request"]),
        }
        for name, size in numbers.items():
            num_columns[f"dense_sequences[{name!r}]"] = self._dense_sequences[name].values().shape[1], size
        for name, (have, expected) in num_columns.items():
            if have != expected:
                raise InputError(
                    f"impressions: {name} has {have} columns, but schema {schema.dataset!r} has {expected}"
                )

    def of_requests(self, keys: Sequence[str]) -> KeyedJaggedTensor:
        """Ids that all rows of a request have alike, stride B.

        Raises:
            InputError: a row has something else than the first row of its request.
        """
        for key in keys:
            self._refuse_unlike_ids(key, f"take it out of request_features, or {_REQUEST}")
        return select_rows(self._features, self._firsts_B, keys)

    def dense_of_requests(self) -> Tensor:
        """Numbers that all rows of a request have alike, float [B, I_r].

        Raises:
            InputError: a row has something else than the first row of its request.
        """
        numbers = self._request_dense
        widths_C = torch.full_like(self._firsts_C, numbers.shape[1])
        self._refuse_unlike("request_dense", "number", numbers.flatten(), widths_C, _REQUEST)
        return numbers[self._firsts_B]

    def lists(self, keys: Keys) -> Lists:
        """The sequences of B requests.

        Raises:
            InputError: a row has something else of its request or a history than the first row of its request, or not
                one entry of its candidate.
        """
        known = [*keys.of_requests, *keys.layout.candidates]
        for name, given in {"num_ids": self._num_ids, "dense_sequences": self._dense_sequences}.items():
            if unread := sorted(given.keys() - set(known)):
                raise InputError(f"impressions: {name}: {unread[0]!r} is not one of {known}: leave it out")
        for key in keys.of_requests:
            advice = _REQUEST if key in keys.layout.requests else _HISTORY
            if key in self._dense_sequences:
                numbers = self._dense_sequences[key]
                self._refuse_unlike(repr(key), "number", numbers.values(), numbers.lengths(), advice)
            else:
                self._refuse_unlike_ids(key, advice)
        in_order = [key for key in known if key in self._features.keys()]
        sequences = rows_of_all(self._features, 0, len(self._dense_CI), in_order)
        lists = Lists(sequences, self._dense_sequences, self._num_ids, keys.layout)
        for key in keys.layout.candidates:
            self._refuse_other_than_one(key, lists.num_entries(key), "entries: a candidate has one")
        return lists.put_together(self._firsts_B, self._order_C, self.num_candidates)

    def _refuse_unlike_ids(self, key: str, advice: str) -> None:
        """Refuse rows that do not have the ids of the first row of their request."""
        num_rows, weights = len(self._dense_CI), self._features.weights_or_none()
        if key in self._num_ids:
            num_ids = self._num_ids[key]
            self._refuse_unlike(repr(key), "number of ids", num_ids.values(), num_ids.lengths(), advice)
        ids, lengths_C = rows_of(self._features, key, 0, num_rows)
        self._refuse_unlike(repr(key), "id", ids, lengths_C, advice)
        if weights is not None:
            span = span_of(self._features, key, 0, num_rows)
            self._refuse_unlike(repr(key), "weight", weights[span], lengths_C, advice)

    def _refuse_unlike(self, name: str, what: str, values: Tensor, lengths_C: Tensor, advice: str) -> None:
        """Refuse rows whose values [V], or [V, their number], are not those of the first row of their request."""
        places, lengths_of_first = taken(lengths_C, self._firsts_C)
        if len(other := (lengths_C != lengths_of_first).nonzero()):
            row, entries = int(other[0]), "ids" if what == "id" else "entries"
            own, first = (f"{int(lengths[row])} {entries}" for lengths in (lengths_C, lengths_of_first))
            self._refuse_row(row, name, own, first, advice)
        of_first = values[places]
        # What is no number is no number in both.
        if len(other := ((values != of_first) & ~(values.isnan() & of_first.isnan())).nonzero()):
            position, *column = other[0].tolist()
            ends = torch.cumsum(lengths_C, 0)
            row = int(torch.searchsorted(ends, position, right=True))
            entry = position - int(ends[row] - lengths_C[row])
            at = (position, *column)
            where = f" as entry {entry}" + "".join(f", column {place}" for place in column)
            self._refuse_row(row, name, f"{what} {values[at].item()}", f"{what} {of_first[at].item()}{where}", advice)

    def _refuse_other_than_one(self, key: str, have_C: Tensor | None, told: str) -> None:
        if have_C is not None and len(other := (have_C != 1).nonzero()):
            row = int(other[0])
            raise InputError(f"impressions: row {row}: {key!r} has {int(have_C[row])} {told}")

    def _refuse_row(self, row: int, name: str, own: str, of_first: str, advice: str) -> None:
        raise InputError(
            f"impressions: request {int(self._request_ids_C[row])}: {name} has {of_first} in row "
            f"{int(self._firsts_C[row])} but {own} in row {row}: {advice}"
        )

    def of_candidates(self, but: Collection[str]) -> KeyedJaggedTensor:
        """All other ids, stride C."""
        return select_rows(self._features, self._order_C, [key for key in self._features.keys() if key not in but])

    def items(self, key: str) -> KeyedJaggedTensor:
        """The items of each request's candidates, as `candidate_item`, stride B.

        Raises:
            InputError: a row has not exactly one.
        """
        _, lengths_C = rows_of(self._features, key, 0, len(self._dense_CI))
        self._refuse_other_than_one(key, lengths_C, "ids, not 1: it is the item")
        items = select_rows(self._features, self._order_C, [key])
        return KeyedJaggedTensor(
            ["candidate_item"],
            items.values(),
            weights=items.weights_or_none(),
            lengths=self.num_candidates.to(lengths_C.dtype),
            stride=len(self.num_candidates),
        )

    def dense(self) -> Tensor:
        """float [C, I]."""
        return self._dense_CI[self._order_C]

    def weights(self, weights: Tensor) -> Tensor:
        """Weights of the candidates, as float [C].

        Raises:
            InputError: they are not.
        """
        if weights.dim() != 1:
            raise InputError(f"impressions: weights has shape {tuple(weights.shape)}, not [C]")
        self._refuse_other_rows("weights", len(weights))
        return weights.to(self._dense_CI.device, torch.float32)[self._order_C]

    def labels(self, labels: Tensor) -> Tensor:
        """Labels [C] or [C, T] as float [C, T].

        Raises:
            InputError: they are not.
        """
        if labels.dim() not in (1, 2):
            raise InputError(f"impressions: labels has shape {tuple(labels.shape)}, not [C] or [C, T]")
        self._refuse_other_rows("labels", len(labels))
        labels_CT = labels[:, None] if labels.dim() == 1 else labels
        return labels_CT.to(self._dense_CI.device, torch.float32)[self._order_C]

    def users(self, users: Tensor | Sequence[int]) -> Tensor:
        """Whose requests they are, int64 [B].

        Raises:
            InputError: they are not whole numbers, or rows of a request have different ones.
        """
        users_C = self._numbers("users", users)
        if len(other := (users_C != users_C[self._firsts_C]).nonzero()):
            row = int(other[0])
            first = int(users_C[self._firsts_C[row]])
            self._refuse_row(
                row, "users", str(int(users_C[row])), str(first), "give each user's rows request ids of their own"
            )
        return users_C[self._firsts_B]
