"""What the public data sets share: splits in order of time, lists cut out of arrays, numbered values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_amort.progress import progress
from torchrec_amort.schema import RequestSchema

TRAIN_SHARE, VALIDATION_SHARE = 0.8, 0.9
REQUESTS_PER_TABLE = 4096


def split_bounds(num_candidates: np.ndarray) -> dict[str, tuple[int, int]]:
    """Where each split starts and stops among requests in order of time.

    Args:
        num_candidates: int64 [requests], how many candidates each has.

    Returns:
        dict: for each split, its first request and the one after its last: train ends with the last
        request that is whole within the first 80% of the candidates, validation within 90%.

    Example::

        split_bounds(np.ones(10))  # {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}
    """
    seen = np.cumsum(num_candidates)
    total = seen[-1] if len(seen) else 0
    train_end, validation_end = (
        int(np.searchsorted(seen, share * total, side="right")) for share in (TRAIN_SHARE, VALIDATION_SHARE)
    )
    return {
        "train": (0, train_end),
        "validation": (train_end, validation_end),
        "test": (validation_end, len(num_candidates)),
    }


def split_tables(
    bounds: Mapping[str, tuple[int, int]],
    schema: RequestSchema,
    columns: Callable[[int, int], Mapping[str, Any]],
) -> dict[str, Iterator[pa.Table]]:
    """Tables of the requests of each split, some thousand requests at a time.

    Args:
        bounds: of each split.
        schema: what the requests are made of.
        columns: gives the columns, all but `request_id`, of the requests from one up to another.

    Returns:
        dict: for each split, tables with the columns of `schema.arrow_schema()`; the id of a request is
        its place in order of time.

    Example::

        write_requests("data/films", schema, split_tables(bounds, schema, columns))
    """
    return {split: _tables(split, start, stop, schema, columns) for split, (start, stop) in bounds.items()}


def _tables(
    split: str, first: int, end: int, schema: RequestSchema, columns: Callable[[int, int], Mapping[str, Any]]
) -> Iterator[pa.Table]:
    arrow_schema = schema.arrow_schema()
    with progress(total=end - first, desc=split, unit="requests") as bar:
        for start in range(first, end, REQUESTS_PER_TABLE):
            stop = min(start + REQUESTS_PER_TABLE, end)
            yield pa.table({"request_id": np.arange(start, stop), **columns(start, stop)}, arrow_schema)
            bar.update(stop - start)


def lists(values: np.ndarray | pa.Array, starts: np.ndarray, stops: np.ndarray) -> pa.ListArray:
    """The lists `values[start:stop]`, one for each start and stop.

    Args:
        values: what the lists are cut out of; they may overlap.
        starts: int64 [lists].
        stops: int64 [lists], none before its start.

    Returns:
        pa.ListArray: one list for each start and stop.

    Example::

        lists(np.array([5, 6, 7]), np.array([0, 0]), np.array([1, 3]))  # [[5], [5, 6, 7]]
    """
    offsets, places = ranges(starts, stops)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values).take(pa.array(places)))


def ranges(starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places from each start to its stop, one range after the other: where each range begins, and the places."""
    offsets = np.concatenate([[0], np.cumsum(stops - starts)])
    return offsets, np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], stops - starts)


def lists_of(lengths: Sequence[int] | np.ndarray, entries: np.ndarray | pa.Array) -> pa.ListArray:
    """The entries as lists of some lengths: int [lists]."""
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), pa.array(entries))


def vectors_of(rows: np.ndarray) -> pa.ListArray:
    """The rows of a matrix as lists."""
    return lists_of(np.full(len(rows), rows.shape[1]), rows.ravel())


def number(values: np.ndarray | pa.Array, known: np.ndarray | pa.Array) -> np.ndarray:
    """The ids of values: the place among the known ones, from 1, and 0 for any other.

    Args:
        values: what is numbered; may have nulls, which get 0.
        known: the values that have an id, each once and none null.

    Returns:
        np.ndarray: int64, one id for each value.

    Example::

        number(np.array([7, 9, 8]), known=np.array([9, 7]))  # [2, 1, 0]
    """
    places = pc.index_in(values, value_set=pa.array(known))
    return pc.add(places.cast(pa.int64()), 1).fill_null(0).to_numpy(zero_copy_only=False)
