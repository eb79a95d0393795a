"""Requests of a wanted shape, made of real ones or at random: for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_amort.columns import typed_table
from torchrec_amort.data.reader import Piece, read_piece, row_groups
from torchrec_amort.data.splits import lists_of
from torchrec_amort.errors import InputError
from torchrec_amort.schema import KINDS_NOT_READ, Feature, RequestSchema
from torchrec_amort.stores import Location, location


def sample_requests(
    folder: str | Location, split: str, *, num_requests: int, num_candidates: int | None, history_length: int, seed: int
) -> pa.Table:
    """Real requests with long enough histories, each with candidates drawn from those of the whole split.

    Args:
        folder: prepared data folder.
        split: of it.
        num_requests: rows of the table.
        num_candidates: candidates of each request; its own if None.
        history_length: least number of events of each history.
        seed: of the draw.

    Returns:
        pa.Table: columns of the schema, without labels and weights.

    Raises:
        InputError: too few requests have a history that long.

    Example::

        table = sample_requests(
            "data/movielens-1m", "test", num_requests=100, num_candidates=128, history_length=100, seed=0
        )
    """
    schema = RequestSchema.load(folder)
    table = pa.concat_tables(read_piece(piece, schema) for piece in _pieces(folder, split, schema)).combine_chunks()
    random = np.random.default_rng(seed)
    pools = {
        f.source: pc.list_flatten(table[f.source]).combine_chunks()
        for f in schema.features
        if f.side == "candidate" and f.kind not in KINDS_NOT_READ
    }
    long_enough = np.arange(table.num_rows)
    if columns := list(schema.event_columns.values()):
        lengths = np.stack([pc.list_value_length(table[column]).to_numpy() for column in columns])
        long_enough = np.flatnonzero((lengths >= history_length).all(0))
    if len(long_enough) < num_requests:
        each = f" in each of {', '.join(schema.histories)}" if len(columns) > 1 else ""
        raise InputError(
            f"{location(folder) / split}: {len(long_enough)} requests have {history_length} events or more{each}, not "
            f"{num_requests}: ask for fewer requests or shorter histories"
        )
    table = inputs_of(table.take(np.sort(random.choice(long_enough, num_requests, replace=False))), schema)
    if num_candidates is None:
        return table
    pool_size = len(pools[schema.candidate_column])
    drawn = random.integers(pool_size, size=num_requests * num_candidates)
    offsets = pa.array(np.arange(num_requests + 1) * num_candidates, pa.int32())
    drawn_of: dict[str, Any] = {name: table[name] for name in table.column_names}
    for name, pool in pools.items():
        drawn_of[name] = pa.ListArray.from_arrays(offsets, pool.take(drawn))
    return pa.table(drawn_of)


def inputs_of(requests: pa.Table, schema: RequestSchema) -> pa.Table:
    """Requests without their labels and weights.

    Args:
        requests: with the columns of `schema.arrow_schema()`.
        schema: what they are made of.

    Example::

        requests = first_requests("data/movielens-1m", "test", 100)
        table = inputs_of(requests, RequestSchema.load("data/movielens-1m"))
    """
    read = {f.source for f in schema.features if f.kind not in KINDS_NOT_READ}
    left_out = {f.source for f in schema.features} - read
    return requests.select([name for name in schema.arrow_schema().names if name not in left_out])


def latest_events(requests: pa.Table, schema: RequestSchema, history_length: int) -> pa.Table:
    """Requests with at most so many events of each history, the latest ones.

    Args:
        requests: one row per request.
        schema: what they are made of.
        history_length: the limit.

    Example::

        requests = first_requests("data/movielens-1m", "test", 100)
        table = latest_events(requests, RequestSchema.load("data/movielens-1m"), 20)
    """
    for name in {f.source for f in schema.features if f.side == "event"}:
        histories = requests[name].combine_chunks()
        starts, stops = histories.offsets[:-1].to_numpy(), histories.offsets[1:].to_numpy()
        starts = np.maximum(starts, stops - history_length)
        kept = [np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)]
        offsets = pa.array(np.concatenate([[0], np.cumsum(stops - starts)]), pa.int32())
        latest = pa.ListArray.from_arrays(offsets, histories.values.take(pa.array(np.concatenate(kept))))
        requests = requests.set_column(requests.column_names.index(name), name, latest)
    return requests


def first_requests(folder: str | Location, split: str, num_requests: int) -> pa.Table:
    """The first requests of a split, as they are.

    Args:
        folder: prepared data folder.
        split: of it.
        num_requests: at most so many.

    Raises:
        InputError: there is no such split.

    Example::

        table = first_requests("data/movielens-1m", "test", 100)
    """
    schema = RequestSchema.load(folder)
    tables, have = [schema.arrow_schema().empty_table()], 0
    for piece in _pieces(folder, split, schema):
        if have < num_requests:
            tables.append(read_piece(piece, schema))
            have += piece.num_rows
    return pa.concat_tables(tables).slice(0, num_requests)


def drawn_requests(folder: str | Location, split: str, num_requests: int, *, seed: int) -> pa.Table:
    """Requests of a split as they are, drawn at random if there are more than wanted, in the order of the split.

    Args:
        folder: prepared data folder.
        split: of it.
        num_requests: at most so many.
        seed: of the draw.

    Raises:
        InputError: there is no such split.

    Example::

        table = drawn_requests("data/movielens-1m", "test", 1000, seed=0)
    """
    schema = RequestSchema.load(folder)
    pieces = _pieces(folder, split, schema)
    have = sum(piece.num_rows for piece in pieces)
    rows = np.arange(have)
    if have > num_requests:
        rows = np.sort(np.random.default_rng(seed).choice(have, num_requests, replace=False))
    tables, first = [schema.arrow_schema().empty_table()], 0
    for piece in pieces:
        of_piece = rows[(rows >= first) & (rows < first + piece.num_rows)] - first
        tables.append(read_piece(piece, schema).take(pa.array(of_piece)))
        first += piece.num_rows
    return pa.concat_tables(tables).combine_chunks()


def _pieces(folder: str | Location, split: str, schema: RequestSchema) -> list[Piece]:
    path = location(folder) / split
    if not path.is_dir():
        raise InputError(f"{path}: no such split: prepare the data first (torchrec-amort prepare --help)")
    return row_groups(path, schema)


def random_requests(
    schema: RequestSchema, num_events: Sequence[int], num_candidates: Sequence[int], *, seed: int
) -> pa.Table:
    """Requests of random ids, text, numbers and times.

    Args:
        schema: what they are made of.
        num_events: length of each request's histories.
        num_candidates: candidates of each request.
        seed: of the draw.

    Returns:
        pa.Table: columns of the schema, without labels and weights.

    Example::

        table = random_requests(schema, num_events=[256], num_candidates=[512], seed=0)
        batch = RequestBatch.from_arrow(table, schema)
    """
    random = np.random.default_rng(seed)
    lengths = {"request": [1] * len(num_events), "event": num_events, "candidate": num_candidates}
    users = random.integers(2**40, size=len(num_events))
    columns: dict[str, Any] = {"request_id": np.arange(len(num_events)), "time": np.full(len(num_events), _NOW)}
    for feature in schema.features:
        if feature.kind in KINDS_NOT_READ or feature.source in columns:
            continue
        entries = _random_entries(feature, int(np.sum(lengths[feature.side])), random)
        columns[feature.source] = entries if feature.side == "request" else lists_of(lengths[feature.side], entries)
    # Unless a feature reads it, whose table has fewer rows.
    columns.setdefault("user", users)
    return typed_table(pa.table(columns), schema)


_NOW = 1_000_000_000
MOST_IDS = 3


def _random_entries(feature: Feature, count: int, random: np.random.Generator) -> Any:
    if feature.kind in ("dense", "count"):
        return random.random(count, dtype=np.float32)
    if feature.kind == "vector":
        size = feature.size or 1
        return lists_of([size] * count, random.standard_normal(size * count, dtype=np.float32))
    if feature.kind == "age":
        return _NOW - random.integers(1, 10**7, size=count)
    if feature.kind == "gap":
        # In order, whichever request they fall to.
        return _NOW - np.sort(random.integers(1, 10**7, size=count))[::-1]
    if feature.kind == "ids":
        lengths = random.integers(MOST_IDS + 1, size=count)
        return lists_of(lengths, _random_ids(feature, int(lengths.sum()), random))
    return _random_ids(feature, count, random)


def _random_ids(feature: Feature, count: int, random: np.random.Generator) -> pa.Array:
    ids = random.integers(feature.table_size or 1, size=count)
    return pa.array(ids).cast(pa.string()) if feature.text else pa.array(ids)
