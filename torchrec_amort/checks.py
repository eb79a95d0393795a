"""Checks of a batch's parts; a message names the source, the field, the request and the two numbers that disagree.

Shape suffixes: B requests; K keys; R rows of a field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_amort.errors import InputError
from torchrec_amort.lists import Layout, sums
from torchrec_amort.schema import ANY_ID


class Checks:
    """Refuses what cannot be part of a batch.

    Args:
        source: where the batch comes from, for error messages.
        first_row: number of the first request there, for error messages.
        num_candidates: [B].

    Raises:
        InputError: `num_candidates` is not of one or more for each request.
    """

    def __init__(self, source: str, first_row: int, num_candidates: Tensor) -> None:
        self._source, self._first_row = source, first_row
        if num_candidates.dim() != 1 or num_candidates.dtype != torch.int64:
            raise InputError(
                f"{source}: num_candidates is {num_candidates.dtype} with shape {tuple(num_candidates.shape)}, not "
                "int64 [B]"
            )
        self._num_candidates = array_of(num_candidates)
        self._total = int(self._num_candidates.sum())
        if len(empty := np.flatnonzero(self._num_candidates < 1)):
            row = int(empty[0])
            raise InputError(
                f"{self._request(row)}: num_candidates is {self._num_candidates[row]}, not 1 or more: leave the "
                "request out"
            )

    def _request(self, row: int) -> str:
        return f"{self._source}: request {self._first_row + row}"

    def _candidate(self, candidate: int) -> str:
        row = int(np.searchsorted(np.cumsum(self._num_candidates), candidate, side="right"))
        return f"{self._request(row)}, candidate {candidate - int(self._num_candidates[:row].sum())}"

    def _where(self, row: int, per_candidate: bool) -> str:
        return self._candidate(row) if per_candidate else self._request(row)

    def rows(self, name: str, have: int, per_candidate: bool) -> None:
        """Refuse a field that has not a row for each request, or for each candidate."""
        requests, candidates = len(self._num_candidates), self._total
        expected = candidates if per_candidate else requests
        if have != expected:
            raise InputError(
                f"{self._source}: {name} has {have} rows, but num_candidates tells of {requests} requests and "
                f"{candidates} candidates, so {expected} are needed"
            )

    def ids(
        self, name: str, kjt: KeyedJaggedTensor, per_candidate: bool, table_sizes: Mapping[str, int]
    ) -> dict[str, np.ndarray]:
        """Refuse ids that do not add up, or are outside of their tables, and weights that are not finite.

        Returns:
            dict: of each key, [R] how many ids each row has.
        """
        if not (keys := list(kjt.keys())):
            # Without keys there is nothing of which a row could be missing.
            return {}
        self.rows(name, kjt.stride(), per_candidate)
        lengths, values = array_of(kjt.lengths()), array_of(kjt.values())
        if lengths.size != len(keys) * kjt.stride():
            raise InputError(
                f"{self._source}: {name} has {lengths.size} lengths for {len(keys)} keys of {kjt.stride()} rows, "
                f"not {len(keys) * kjt.stride()}"
            )
        lengths = lengths.reshape(len(keys), kjt.stride())
        if lengths.min(initial=0) < 0:
            key, row = np.argwhere(lengths < 0)[0].tolist()
            raise InputError(f"{self._request(row)}: {name}[{keys[key]!r}] has length {lengths[key, row]}, below 0")
        counts = lengths.sum(1)
        if counts.sum() != values.size:
            raise InputError(
                f"{self._source}: the lengths of {name} add up to {counts.sum()}, but it has {values.size} values"
            )
        sizes = np.array([table_sizes.get(key, ANY_ID) for key in keys])
        if not _are_ids(counts, values, sizes):
            self._refuse_id(name, keys, lengths, values, sizes, per_candidate)
        if (weights := kjt.weights_or_none()) is not None:
            self._weights(name, keys, lengths, weights, per_candidate)
        return dict(zip(keys, lengths, strict=True))

    def _refuse_id(
        self,
        name: str,
        keys: list[str],
        lengths: np.ndarray,
        values: np.ndarray,
        sizes: np.ndarray,
        per_candidate: bool,
    ) -> None:
        sizes = np.repeat(sizes, lengths.sum(1))
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
                f"{self._source}: the weights of {name} are {weights.dtype} with shape {tuple(weights.shape)}, but it "
                f"has {num_values} values: give each its weight, a float"
            )
        if len(wrong := np.flatnonzero(~np.isfinite(array := array_of(weights)))):
            entry = self._entry(name, keys, lengths, int(wrong[0]), per_candidate)
            raise InputError(f"{entry} has weight {array[wrong[0]]}, not a finite number")

    def _entry(self, name: str, keys: list[str], lengths: np.ndarray, position: int, per_candidate: bool) -> str:
        """Where the value at a position of a field is."""
        place = int(np.searchsorted(np.cumsum(lengths), position, side="right"))
        key, row = divmod(place, lengths.shape[1])
        return f"{self._where(row, per_candidate)}: {name}[{keys[key]!r}]"

    def num_ids(self, key: str, num_ids: JaggedTensor, num_values: np.ndarray) -> np.ndarray:
        """Refuse numbers of ids of a key's entries that do not add up to its ids.

        Args:
            key: of the sequences.
            num_ids: of each entry, one row per request.
            num_values: [B], ids of each request.

        Returns:
            np.ndarray: [B], entries of each request.
        """
        counts, lengths = array_of(num_ids.values()), array_of(num_ids.lengths())
        self.rows(f"num_ids[{key!r}]", len(lengths), False)
        if lengths.min(initial=0) < 0 or lengths.sum() != len(counts) or counts.min(initial=0) < 0:
            raise InputError(
                f"{self._source}: num_ids[{key!r}] has {len(counts)} numbers for {lengths.sum()} entries: give each "
                "entry one, 0 or more"
            )
        totals = array_of(sums(num_ids.values(), num_ids.lengths()))
        self._lengths(key, num_values, f"num_ids[{key!r}]", totals)
        return lengths

    def entries(self, layout: Layout, entries: Mapping[str, np.ndarray]) -> None:
        """Refuse features of one history, of the candidates or of the requests that differ in their entries.

        Args:
            layout: whose they are.
            entries: of each feature, [B] how many each request has.
        """
        groups = [(layout.candidates, "num_candidates", self._num_candidates)]
        groups.append((layout.requests, "a request", np.ones_like(self._num_candidates)))
        for keys in layout.histories.values():
            if present := tuple(key for key in keys if key in entries):
                groups.append((present[1:], f"sequences[{present[0]!r}]", entries[present[0]]))
        for keys, other, expected in groups:
            for key in keys:
                if key in entries:
                    self._lengths(key, entries[key], other, expected)

    def _lengths(self, key: str, have: np.ndarray, other: str, expected: np.ndarray) -> None:
        """Refuse a key of the sequences with more or fewer entries than another field tells of.

        Args:
            key: of the sequences.
            have: [B], its entries.
            other: the field.
            expected: [B], what it tells.
        """
        if (is_wrong := have != expected).any():
            row = int(np.argmax(is_wrong))
            told = f"{other} tells of {expected[row]}"
            raise InputError(f"{self._request(row)}: sequences[{key!r}] has {have[row]} entries, but {told}")

    def jagged(self, name: str, jagged: JaggedTensor) -> np.ndarray:
        """Refuse numbers of entries that do not add up, or are not finite.

        Returns:
            np.ndarray: [B], entries of each request.
        """
        values, lengths = jagged.values(), array_of(jagged.lengths())
        self.rows(name, len(lengths), False)
        if values.dim() != 2 or not values.is_floating_point():
            raise InputError(
                f"{self._source}: {name} is {values.dtype} with shape {tuple(values.shape)}, not float [entries, "
                "their numbers]"
            )
        if lengths.min(initial=0) < 0 or lengths.sum() != len(values):
            raise InputError(
                f"{self._source}: the lengths of {name} add up to {lengths.sum()}, but it has {len(values)} entries"
            )
        if not _is_finite(array := array_of(values)):
            entry = int(np.argwhere(~np.isfinite(array))[0, 0])
            row = int(np.searchsorted(np.cumsum(lengths), entry, side="right"))
            column = int(np.flatnonzero(~np.isfinite(array[entry]))[0])
            raise InputError(
                f"{self._request(row)}: {name} column {column} is {array[entry, column]}, not a finite number"
            )
        return lengths

    def finite(self, name: str, values: Tensor, per_candidate: bool) -> None:
        """Refuse numbers that are not finite."""
        array = array_of(values)
        if not _is_finite(array):
            self._refuse(name, array, np.isfinite(array), per_candidate, "a finite number")

    def labels(self, labels_CT: Tensor, targets_T: Tensor | None) -> None:
        """Refuse labels that are not from 0 to 1, and targets that are not finite.

        Args:
            labels_CT: of the candidates.
            targets_T: bool, which of them are targets; none if None.
        """
        array = array_of(labels_CT)
        is_target = np.array(False) if targets_T is None else array_of(targets_T)
        self._refuse("labels", array, np.isfinite(array) | ~is_target, True, "a finite number")
        self._refuse("labels", array, ((array >= 0) & (array <= 1)) | is_target, True, "a number from 0 to 1")

    def between(self, name: str, values: Tensor, low: float, high: float, expected: str) -> None:
        """Refuse numbers of candidates [C, columns] below or above two others.

        Args:
            name: of the field.
            values: its numbers.
            low: the least of them.
            high: the greatest.
            expected: what they should be, for the message.
        """
        array = array_of(values)
        self._refuse(name, array, (array >= low) & (array <= high), True, expected)

    def _refuse(self, name: str, values: np.ndarray, right: np.ndarray, per_candidate: bool, expected: str) -> None:
        """Refuse the first of the values [rows, columns] that is not right."""
        if not right.all():
            row, column = np.argwhere(~right)[0].tolist()
            raise InputError(
                f"{self._where(row, per_candidate)}: {name} column {column} is {values[row, column]}, not {expected}"
            )


def array_of(tensor: Tensor) -> np.ndarray:
    """As numpy, whose small operations take a fraction of the time of torch's: a service checks every request."""
    if not tensor.is_cpu or tensor.requires_grad:
        tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _are_ids(counts: np.ndarray, values: np.ndarray, sizes: np.ndarray) -> bool:
    if values.size == 0:
        return True
    starts = counts.cumsum() - counts
    if counts.min() == 0:
        sizes, starts = sizes[counts > 0], starts[counts > 0]
    # The greatest id of each key, without an array of the size of the batch.
    return bool(values.min() >= 0 and (np.maximum.reduceat(values, starts) < sizes).all())


def _is_finite(array: np.ndarray) -> bool:
    # The sum of what is not finite is not finite, either, and needs no array of the size of the batch.
    with np.errstate(invalid="ignore"):
        return math.isfinite(array.sum(dtype=np.float64))
