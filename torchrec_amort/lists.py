"""What a request lists: the events of its histories, and what of its candidates is looked up or read beside them.

Shape suffixes: B requests; C candidates, N events of one history, all requests together; V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_amort.errors import InputError
from torchrec_amort.jagged_ids import rows_of, span_of, taken


@dataclass(frozen=True)
class Layout:
    """Whose the keys of a batch's sequences are.

    Args:
        histories: features of the events of each.
        candidates: features of the candidates.
        requests: features of the requests, with one entry for each.

    Example::

        Layout({"clicks": ("clicked_film", "clicked_age")}, ("film",))
    """

    histories: Mapping[str, tuple[str, ...]]
    candidates: tuple[str, ...]
    requests: tuple[str, ...] = ()

    def with_usual(self, keys: Sequence[str]) -> Layout:
        """The same with the keys that it does not name; see `RequestBatch`."""
        named = {*self.candidates, *self.requests, *(key for keys in self.histories.values() for key in keys)}
        others = [key for key in keys if key not in named]
        if not others:
            return self
        events = tuple(key for key in others if key != "candidate_item")
        one: dict[str, tuple[str, ...]] = {key: (key,) for key in events}
        if "history_item" in keys:
            name = self.history_of("history_item") or "history"
            one = {name: (*self.histories.get(name, ()), *events)}
        items = ("candidate_item",) if "candidate_item" in others else ()
        return Layout({**self.histories, **one}, (*self.candidates, *items), self.requests)

    def limits(self, features: Mapping[str, Sequence[str]], limits: Mapping[str, int | None]) -> dict[str, int]:
        """Events that are kept of each history, so that towers that read it know their places.

        Args:
            features: of the events that each tower reads.
            limits: of each tower; None if it knows any number, and takes those that others keep.

        Raises:
            InputError: towers of one history have other limits.
        """
        kept: dict[str, int] = {}
        for tower, (first, *_) in features.items():
            history, limit = self.history_of(first), limits[tower]
            if history is not None and limit is not None and kept.setdefault(history, limit) != limit:
                raise InputError(
                    f"batch: towers read history {history!r}, one knows places for {kept[history]} events and "
                    f"{tower!r} for {limit}: say in the batch's layout which features are of which history"
                )
        return kept

    def history_of(self, key: str) -> str | None:
        """The history whose events a key is of; None if it is of none."""
        return next((name for name, keys in self.histories.items() if key in keys), None)


@dataclass(frozen=True, eq=False)
class Entries:
    """What the events, candidates or requests of one feature have.

    Args:
        values: ids [V], or numbers [N, their number].
        lengths: [B], entries of each request.
        num_ids: [N], ids of each entry, if they have several or none.
    """

    values: Tensor
    lengths: Tensor
    num_ids: Tensor | None = None

    @property
    def num_values(self) -> Tensor:
        """Ids of each request, [B]."""
        return self.lengths if self.num_ids is None else sums(self.num_ids, self.lengths)

    def after(self, first: int) -> Entries:
        """The entries from one on, of a single request.

        Args:
            first: the place of that entry.
        """
        lengths = self.lengths - first
        if self.num_ids is None:
            return Entries(self.values[first:], lengths)
        return Entries(self.values[int(self.num_ids[:first].sum()) :], lengths, self.num_ids[first:])


@dataclass(frozen=True, eq=False)
class Lists:
    """All that B requests list.

    Args:
        sequences: ids, stride B; it may keep offsets.
        dense: numbers of each entry, [entries, their number], with one row of B per request.
        num_ids: of each key of `sequences` whose entries have several ids or none: how many, with one row of B per
            request.
        layout: whose the keys are.
    """

    sequences: KeyedJaggedTensor
    dense: Mapping[str, JaggedTensor]
    num_ids: Mapping[str, JaggedTensor]
    layout: Layout

    def keys(self) -> list[str]:
        """Of `sequences` and of `dense`."""
        return [*self.sequences.keys(), *self.dense]

    def num_entries(self, key: str) -> Tensor | None:
        """int64 [B]: events, candidates or requests that a key has something of; None if it is not there."""
        for jagged in (self.num_ids, self.dense):
            if key in jagged:
                return jagged[key].lengths()
        if key not in self.sequences.keys():
            return None
        first = self.sequences.keys().index(key) * self.sequences.stride()
        return self.sequences.lengths()[first : first + self.sequences.stride()]

    def entries(self, key: str, start: int = 0, stop: int | None = None) -> Entries:
        """What some of the requests have of a key; views.

        Args:
            key: of `sequences` or `dense`.
            start: the first request.
            stop: where they end; the last if None.
        """
        stop = self.sequences.stride() if stop is None else stop
        if key in self.dense:
            lengths = self.dense[key].lengths()
            first, last = (int(lengths[:place].sum()) for place in (start, stop))
            return Entries(self.dense[key].values()[first:last], lengths[start:stop])
        ids, lengths = rows_of(self.sequences, key, start, stop)
        if key not in self.num_ids:
            return Entries(ids, lengths)
        entries = self.num_ids[key].lengths()
        first, last = (int(entries[:place].sum()) for place in (start, stop))
        return Entries(ids, entries[start:stop], self.num_ids[key].values()[first:last])

    def select(self, requests: Tensor) -> Lists:
        """Some of the requests; one may be taken many times.

        Args:
            requests: int64 [S], their rows.
        """
        return self._of_entries(requests.numel(), lambda _, lengths_B: taken(lengths_B, requests))

    def keep_latest(self, limits: Mapping[str, int]) -> Lists:
        """The same with at most so many events of each history, the latest ones.

        Args:
            limits: of histories; others are kept whole.
        """

        def kept(key: str, lengths_B: Tensor) -> tuple[Tensor | slice, Tensor]:
            history = self.layout.history_of(key)
            if history is None or history not in limits:
                return slice(None), lengths_B
            ends_N = torch.cumsum(lengths_B, 0).repeat_interleave(lengths_B)
            later_N = ends_N - 1 - torch.arange(ends_N.numel(), device=ends_N.device)
            return (later_N < limits[history]).nonzero().flatten(), lengths_B.clamp(max=limits[history])

        return self._of_entries(self.sequences.stride(), kept)

    def part(self, start: int, stop: int, num_candidates_B: Tensor) -> Lists:
        """The same with some of the candidates.

        Args:
            start: the first that is taken.
            stop: where they end.
            num_candidates_B: int64 [B], how many each request has of them.
        """

        def cut(key: str, lengths_B: Tensor) -> tuple[slice, Tensor]:
            if key in self.layout.candidates:
                return slice(start, stop), num_candidates_B
            return slice(None), lengths_B

        return self._of_entries(num_candidates_B.numel(), cut)

    def impressions(self, requests_C: Tensor) -> Lists:
        """Those of C requests of one candidate each.

        Args:
            requests_C: int64 [C], the request of each candidate.
        """
        ones_C = torch.ones_like(requests_C)

        def repeated(key: str, lengths_B: Tensor) -> tuple[Tensor | slice, Tensor]:
            if key in self.layout.candidates:
                return slice(None), ones_C
            return taken(lengths_B, requests_C)

        return self._of_entries(requests_C.numel(), repeated)

    def put_together(self, firsts_B: Tensor, order_C: Tensor, num_candidates_B: Tensor) -> Lists:
        """Those of impressions as B requests, which undoes `impressions`.

        Args:
            firsts_B: int64, the first row of each request.
            order_C: int64, the rows in the order of their candidates, of which each has one.
            num_candidates_B: int64, how many of them each request has.
        """

        def together(key: str, lengths_C: Tensor) -> tuple[Tensor, Tensor]:
            return (order_C, num_candidates_B) if key in self.layout.candidates else taken(lengths_C, firsts_B)

        return self._of_entries(firsts_B.numel(), together)

    def _of_entries(self, stride: int, choose: Callable[[str, Tensor], tuple[Tensor | slice, Tensor]]) -> Lists:
        """Some entries of each key.

        Args:
            stride: rows of the result.
            choose: given a key and its entries per request, which of all its entries, and how many of each row.
        """
        values, lengths, weights, num_ids = [], [], [], {}
        for key, ids, of_each, of_weights in self._keys():
            entries = self.num_entries(key)
            assert entries is not None
            places, rows = choose(key, entries)
            if of_each is not None:
                num_ids[key] = JaggedTensor(of_each[places], lengths=rows)
                rows = sums(of_each[places], rows)
                places = _ids_of(of_each, places)
            values.append(ids[places])
            lengths.append(rows.to(self.sequences.lengths().dtype))
            weights += [] if of_weights is None else [of_weights[places]]
        dense = {}
        for key, jagged in self.dense.items():
            places, rows = choose(key, jagged.lengths())
            dense[key] = JaggedTensor(jagged.values()[places], lengths=rows)
        sequences = KeyedJaggedTensor(
            self.sequences.keys(),
            torch.cat([self.sequences.values()[:0], *values]),
            weights=torch.cat(weights) if weights else self.sequences.weights_or_none(),
            lengths=torch.cat([self.sequences.lengths()[:0], *lengths]),
            stride=stride,
        )
        return Lists(sequences, dense, num_ids, self.layout)

    def _keys(self) -> Iterator[tuple[str, Tensor, Tensor | None, Tensor | None]]:
        """Each key of the sequences, its ids, how many each entry has, and the ids' weights."""
        sequences, weights = self.sequences, self.sequences.weights_or_none()
        for key in sequences.keys():
            span = span_of(sequences, key, 0, sequences.stride())
            of_each = self.num_ids[key].values() if key in self.num_ids else None
            yield key, sequences.values()[span], of_each, None if weights is None else weights[span]


def _ids_of(num_ids: Tensor, entries: Tensor | slice) -> Tensor | slice:
    """Where the ids of some entries are."""
    if isinstance(entries, Tensor):
        return taken(num_ids, entries)[0]
    start, stop, _ = entries.indices(len(num_ids))
    return slice(int(num_ids[:start].sum()), int(num_ids[:stop].sum()))


def sums(counts: Tensor, rows: Tensor) -> Tensor:
    """Sums of so many counts for each row."""
    totals = torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0)])
    ends = torch.cumsum(rows, 0)
    return totals[ends] - totals[ends - rows]


def shortest(limits: Iterable[int | None]) -> int | None:
    """The least of some limits; None if there is none.

    Args:
        limits: numbers of events; None is none.
    """
    return min((limit for limit in limits if limit is not None), default=None)
