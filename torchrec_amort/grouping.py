"""Impressions put together to requests.

Shape suffixes: B requests; C impressions, which are the requests' candidates; I dense inputs; T tasks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_amort.errors import InputError, one_line
from torchrec_amort.jagged_ids import rows_of, rows_of_all, select_rows, shallow_copy


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


class Impressions:
    """Impressions, and which of them make one request.

    Requests are in the order of their first rows, their candidates in the order of their rows.

    Args:
        dense_features: float [C, I].
        sparse_features: ids, stride C.
        request_ids: int64 [C].

    Raises:
        InputError: there are none, or not as many everywhere.
    """

    def __init__(
        self, dense_features: Tensor, sparse_features: KeyedJaggedTensor, request_ids: Tensor | Sequence[int]
    ) -> None:
        if dense_features.dim() != 2 or not dense_features.is_floating_point():
            raise InputError(
                f"impressions: dense_features is {dense_features.dtype} with shape {tuple(dense_features.shape)}, not "
                "float [C, I]"
            )
        if not len(dense_features):
            raise InputError("impressions: dense_features has 0 rows: a batch needs at least 1 request")
        self._dense_CI = dense_features
        self._features = self._checked(sparse_features)
        self._request_ids_C = self._numbers("request_ids", request_ids)
        self._firsts_C = first_rows(self._request_ids_C)
        self._order_C = torch.argsort(self._firsts_C, stable=True)
        self._firsts_B, self.num_candidates = torch.unique(self._firsts_C, return_counts=True)

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

    def refuse_keys(self, request_features: Sequence[str], event_features: Sequence[str], item: str | None) -> None:
        """Refuse keys that are not there, or have two meanings.

        Raises:
            InputError: they are.
        """
        items = [] if item is None else [item]
        named = {"request_features": request_features, "event_features": event_features, "item": items}
        for name, keys in named.items():
            for key in keys:
                if key not in self._features.keys():
                    raise InputError(f"impressions: {name}: no {key!r}: sparse_features has {self._features.keys()}")
        self._refuse_twice(", ".join(named), [key for keys in named.values() for key in keys])
        if "candidate_item" in event_features:
            raise InputError(
                "impressions: event_features: 'candidate_item' is what a batch calls the items of candidates: rename it"
            )

    def of_requests(self, keys: Sequence[str], advice: str) -> KeyedJaggedTensor:
        """Ids that all rows of a request have alike, stride B.

        Args:
            keys: which ids.
            advice: what to do if they are not alike, for the error message.

        Raises:
            InputError: a row has something else than the first row of its request.
        """
        own = rows_of_all(self._features, 0, len(self._dense_CI), keys)
        of_first = select_rows(self._features, self._firsts_C, keys)
        if (difference := _difference(own, of_first)) is not None:
            place, in_own, in_first = difference
            key, row = divmod(place, len(self._dense_CI))
            self._refuse_row(row, repr(keys[key]), in_own, in_first, advice)
        return select_rows(self._features, self._firsts_B, keys)

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
        if len(other := (lengths_C != 1).nonzero()):
            row = int(other[0])
            raise InputError(f"impressions: row {row}: {key!r} has {int(lengths_C[row])} ids, not 1: it is the item")
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


def _difference(own: KeyedJaggedTensor, other: KeyedJaggedTensor) -> tuple[int, str, str] | None:
    """The place of the first list of ids that is not the same in both, and what each of them has there."""
    own_lengths, lengths = own.lengths(), other.lengths()
    if not torch.equal(own_lengths, lengths):
        place = int((own_lengths != lengths).nonzero()[0])
        return place, f"{int(own_lengths[place])} ids", f"{int(lengths[place])} ids"
    pairs = [("id", own.values(), other.values())]
    if own.weights_or_none() is not None:
        pairs.append(("weight", own.weights(), other.weights()))
    for what, own_values, values in pairs:
        if not torch.equal(own_values, values):
            position, ends = (own_values != values).nonzero()[0], torch.cumsum(lengths, 0)
            place = int(torch.searchsorted(ends, position, right=True))
            entry = int(position - ends[place] + lengths[place])
            return place, f"{what} {own_values[position].item()}", f"{what} {values[position].item()} as entry {entry}"
    return None
