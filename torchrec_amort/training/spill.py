"""Rows of a split beyond memory: dealt to buckets on this rank's disk, and brought together bucket by bucket.

Shape suffixes: R rows; B buckets.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from torchrec_amort.training.processes import exchange, sum_over_ranks

# Of rows that are in memory at once; for exchanges, of all ranks together.
MOST_ROWS = 2**20


class Spill:
    """Rows by bucket, in a temporary file of this rank (in `TMPDIR`) that goes when the object does.

    Args:
        dtype: of a row.
        num_buckets: B, 65,536 at most.

    Example::

        spill = Spill(np.dtype(np.int64), num_buckets=2)
        spill.add(np.array([1, 0, 1]), np.array([5, 6, 7]))
        np.concatenate(list(spill.rows(1, 2)))  # [5, 7]
    """

    def __init__(self, dtype: np.dtype, num_buckets: int) -> None:
        self.dtype, self._num_buckets = dtype, num_buckets
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the object is there
        self._buckets: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        # For each run of the file, whose rows are sorted by bucket, the place of each bucket's first row.
        self._starts: list[np.ndarray] = []
        self._num_written = 0

    def add(self, buckets_R: np.ndarray, rows_R: np.ndarray) -> None:
        """Take in rows of these buckets."""
        self._buckets.append(buckets_R.astype(np.uint16))
        self._rows.append(rows_R)
        if sum(map(len, self._rows)) >= MOST_ROWS:
            self._write()

    def _write(self) -> None:
        if not self._rows:
            return
        buckets, rows = np.concatenate(self._buckets), np.concatenate(self._rows)
        self._buckets, self._rows = [], []
        counts_B = np.bincount(buckets, minlength=self._num_buckets)
        self._starts.append(self._num_written + np.append(0, np.cumsum(counts_B)))
        self._file.write(rows[np.argsort(buckets, kind="stable")].view(np.uint8).data)
        self._num_written += len(rows)

    def counts(self) -> np.ndarray:
        """Rows of each bucket, int64 [B]."""
        self._write()
        return sum((np.diff(starts) for starts in self._starts), np.zeros(self._num_buckets, dtype=np.int64))

    def rows(self, first: int, stop: int) -> Iterator[np.ndarray]:
        """The rows of buckets from one to before another, some at a time."""
        self._write()
        for starts in self._starts:
            for start in range(starts[first], starts[stop], MOST_ROWS):
                self._file.seek(start * self.dtype.itemsize)
                count = min(MOST_ROWS, starts[stop] - start)
                yield np.frombuffer(self._file.read(count * self.dtype.itemsize), self.dtype)


def brought_together(spill: Spill) -> Iterator[tuple[int, np.ndarray]]:
    """Groups of whole buckets, each with its rows of all ranks on one of them. All ranks call it together.

    Args:
        spill: of this rank; the others have one like it.

    Yields:
        tuple: the place of a group of this rank, by the order of its buckets, and the group's rows, `MOST_ROWS` at most
        unless a single bucket has more.
    """
    return _together(spill, spill.dtype, lambda pieces: np.concatenate([np.empty(0, spill.dtype), *pieces]))


# A value, and how often it is there.
TALLY = np.dtype([("value", np.int64), ("count", np.int64)])


def tallied_together(spill: Spill) -> Iterator[tuple[int, np.ndarray]]:
    """As `brought_together`, of values that are counted before they travel, however many rows a bucket has.

    Args:
        spill: of int64.

    Yields:
        tuple: the place of a group, and of each of its values, in order, how often it is there, of `TALLY`.
    """
    for place, tally in _together(spill, TALLY, _tallied):
        yield place, _merged(tally)


def _tallied(pieces: Iterable[np.ndarray]) -> np.ndarray:
    tally = np.empty(0, TALLY)
    for values in pieces:
        tally = _merged(np.concatenate([tally, _tally(values, np.ones(len(values), dtype=np.int64))]))
    return tally


def _merged(tally: np.ndarray) -> np.ndarray:
    """Each value once, in order."""
    tally = tally[np.argsort(tally["value"], kind="stable")]
    values = tally["value"]
    firsts = np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])
    return _tally(values[firsts], np.add.reduceat(tally["count"], firsts)) if len(firsts) else tally


def _tally(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    tally = np.empty(len(values), TALLY)
    tally["value"], tally["count"] = values, counts
    return tally


def _together(
    spill: Spill, dtype: np.dtype, part_of: Callable[[Iterable[np.ndarray]], np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """Groups of this rank: their places, and what all ranks made of their rows in them."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    groups = _groups(sum_over_ranks(torch.from_numpy(spill.counts())).tolist())
    for start in range(0, len(groups), ranks):
        of_ranks = groups[start : start + ranks]
        parts = [part_of(spill.rows(*group)) for group in of_ranks]
        received = exchange(parts + [np.empty(0, dtype)] * (ranks - len(parts)))
        if rank < len(of_ranks):
            yield start + rank, np.concatenate(received)


def _groups(counts_B: Sequence[int]) -> list[tuple[int, int]]:
    """The first bucket of each group, and the one after its last: as many buckets as `MOST_ROWS` rows allow."""
    groups, first, rows = [], 0, 0
    for bucket, count in enumerate(counts_B):
        if rows and rows + count > MOST_ROWS:
            groups.append((first, bucket))
            first, rows = bucket, 0
        rows += count
    return [*groups, (first, len(counts_B))] if rows else groups
