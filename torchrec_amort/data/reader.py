"""Reads request-level Parquet into RequestBatches: sharded, shuffled, the same steps on every rank.

The requests of a split are dealt to a fixed number of *lanes*, and every global batch takes its share from
each lane. Ranks own lanes, so a rank reads its part of the files only, and yet the global batches do not
depend on how many ranks or workers there are.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import IterableDataset, get_worker_info

from torchrec_amort.batch import RequestBatch
from torchrec_amort.columns import typed_table
from torchrec_amort.data.counts import COUNTS_FILE, files_of
from torchrec_amort.data.events import StoredHistories
from torchrec_amort.data.tables import of_sizes
from torchrec_amort.errors import InputError
from torchrec_amort.schema import RequestSchema, refuse_missing
from torchrec_amort.stores import Location, location, open_parquet, reading
from torchrec_amort.times import Span

# The requests of all splits.
ALL = "all"
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of one row group of a file."""

    path: Location
    row_group: int
    first_row: int
    start: int
    stop: int
    histories: StoredHistories

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


class RequestDataset(IterableDataset[RequestBatch]):
    """The requests of one split, in batches.

    Every rank and every epoch has `len(dataset)` steps; every request is in exactly one batch of an epoch.
    The global batches of an epoch have as equal a number of requests, about `batch_size`, as can be. Which
    requests depends on the seed, the epoch, `batch_size`, `num_lanes` and `balance_work`, not on ranks or workers.

    With `balance_work`, it is their work that is as equal as can be: the numbers of their candidates and events, and
    so, at each step, that of the ranks. A request of more work than a lane's share of a step, the mean work of
    `batch_size / num_lanes` requests, is alone in its lane at its step.

    Memory is bounded by `shuffle_rows` requests and one row group for each of the rank's lanes.

    Args:
        folder: a prepared data folder, on this machine or a store.
        split: `train`, `validation`, `test`, or `all` of them.
        batch_size: requests in a global batch, all ranks together.
        rank: this process.
        world_size: all processes; at most `num_lanes` and at most `batch_size`.
        seed: shuffles row groups, and the rows of `shuffle_rows` neighbours; in file order if None.
        history_length: keep at most this many events of each history, or of those named, the latest ones; all if None.
        unknown_rate: for a request id feature, the share of requests whose id is replaced by 0, the
            unknown id, so that the model learns to score those it will not know. Needs a seed.
        schema: what to read the requests by, such as a run's with tables of its own; the folder's if None.
        num_lanes: lanes that the requests are dealt to.
        shuffle_rows: requests that are shuffled at once, and dealt by their work, all lanes together.
        balance_work: whether batches have equal work, and not equal numbers of requests. Needs a seed.
        max_requests: read the first ones of the split alone; all if None.
        span: read the requests of these times alone; all if None. Files should be in order of time: each run of such
            requests is read by itself.

    Raises:
        InputError: the folder, split or a file is missing or damaged, a column is missing, the schema reads other
            data, there are fewer requests, lanes or places in a batch than ranks, or no seed where one is needed.

    Example::

        dataset = RequestDataset("data/movielens-1m", "train", batch_size=32, seed=0)
        dataset.set_position(epoch=1)
        for batch in DataLoader(dataset, batch_size=None):
            ...
    """

    def __init__(
        self,
        folder: str | Location,
        split: str,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        history_length: int | Mapping[str, int] | None = None,
        unknown_rate: Mapping[str, float] | None = None,
        schema: RequestSchema | None = None,
        num_lanes: int = 12,
        shuffle_rows: int = 65_536,
        balance_work: bool = False,
        max_requests: int | None = None,
        span: Span | None = None,
    ) -> None:
        folder = location(folder)
        prepared = RequestSchema.load(folder)
        self.schema = schema or prepared
        self.schema.refuse_other_data(prepared, str(folder))
        self.batch_size = batch_size
        self.history_length = history_length
        self.seed = seed
        self.unknown_rate = self._unknown_rate_of_column(prepared, unknown_rate or {})
        self.balance_work = balance_work
        if balance_work and seed is None:
            raise InputError("balance_work: the order of batches of equal work is drawn at random: give a seed")
        self._row_groups = pieces_of(folder, split, self.schema, span)
        if max_requests is not None:
            self._row_groups = list(_cut(self._row_groups, 0, max_requests))
        num_requests = sum(piece.num_rows for piece in self._row_groups)
        if num_requests == 0:
            raise InputError(_empty(folder, split))
        self._num_lanes = min(num_lanes, batch_size, num_requests)
        if not 0 <= rank < world_size <= self._num_lanes:
            raise InputError(
                f"{folder / split}: {num_requests} requests in batches of {batch_size} and {num_lanes} lanes "
                f"cannot be shared by {world_size} ranks: use at most {self._num_lanes} ranks, or raise "
                "batch_size and num_lanes"
            )
        self._lanes = range(rank, self._num_lanes, world_size)
        self.num_requests = num_requests
        self._num_steps = min(-(-num_requests // batch_size), num_requests // self._num_lanes)
        self._window_rows = max(1, shuffle_rows // self._num_lanes)
        self.set_position(epoch=0)

    def set_position(self, *, epoch: int, step: int = 0) -> None:
        """Choose the epoch to iterate, and the step to start from."""
        self._epoch, self._first_step = epoch, step

    def __len__(self) -> int:
        """Steps in an epoch, the same on every rank."""
        return self._num_steps

    def __iter__(self) -> Iterator[RequestBatch]:
        worker = get_worker_info()
        first, stride = self._first_step, 1
        if worker is not None:
            first, stride = first + worker.id, worker.num_workers
        pieces = self._ordered_pieces()
        lanes = [self._lane_steps(pieces, lane) for lane in self._lanes]
        steps = zip(*lanes, strict=True)
        for tables in itertools.islice(steps, first, None, stride):
            # Its rows were checked when they were read.
            table = pa.concat_tables(tables)
            yield RequestBatch.from_arrow(table, self.schema, self.history_length, validate=False)

    def _unknown_rate_of_column(self, prepared: RequestSchema, unknown_rate: Mapping[str, float]) -> dict[str, float]:
        features = {feature.name: feature for feature in prepared.of("request", "id")}
        for name, rate in unknown_rate.items():
            if name not in features or not 0 <= rate <= 1:
                raise InputError(
                    f"unknown_rate: {name}={rate} is not a share from 0 to 1 of one of the request ids {list(features)}"
                )
            if features[name].text and not features[name].nullable:
                raise InputError(
                    f"unknown_rate: {name} is text, which has no unknown id but null: give the feature nullable=True, "
                    "or leave out its rate"
                )
        if unknown_rate and self.seed is None:
            raise InputError("unknown_rate: which requests it picks is drawn at random: give a seed")
        # What the model leaves out is not read.
        read = self.schema.arrow_schema().names
        sources = {features[name].source: rate for name, rate in unknown_rate.items()}
        return {column: rate for column, rate in sources.items() if column in read}

    def _ordered_pieces(self) -> list[Piece]:
        if self.seed is None:
            return self._row_groups
        order = np.random.default_rng([self.seed, self._epoch]).permutation(len(self._row_groups))
        return [self._row_groups[place] for place in order]

    def _lane_steps(self, pieces: Sequence[Piece], lane: int) -> Iterator[pa.Table]:
        """For each step, the lane's requests of that step."""
        first, stop = (self.num_requests * bound // self._num_lanes for bound in (lane, lane + 1))
        rows = _cut(pieces, first, stop)
        if self.balance_work:
            return self._balanced_steps(rows, lane, stop - first)
        sizes = self._rows_between(range(self._num_steps + 1), lane, stop - first)
        return of_sizes(self._windows(rows, lane), sizes)

    def _balanced_steps(self, pieces: Iterator[Piece], lane: int, num_rows: int) -> Iterator[pa.Table]:
        """The lane's steps, to which the requests of a window of several steps are dealt by their work."""
        order, unknown = self._draws(lane)
        # In steps, not rows: all lanes have the same windows.
        most = max(1, self._window_rows * self._num_steps // -(-self.num_requests // self._num_lanes))
        num_windows = -(-self._num_steps // most)
        cuts = [self._num_steps * window // num_windows for window in range(num_windows + 1)]
        tables = of_sizes(map(self._read, pieces), self._rows_between(cuts, lane, num_rows))
        for window, (table, (start, stop)) in enumerate(zip(tables, itertools.pairwise(cuts), strict=True)):
            # Large requests are dealt to the first steps. All lanes mix their steps alike, but each starts at another
            # one, so that large requests of several lanes do not meet in one global batch.
            mixed = np.random.default_rng([self.seed or 0, self._epoch, window, 2]).permutation(stop - start)
            steps = np.roll(mixed, lane * (stop - start) // self._num_lanes)
            rows = order.permutation(table.num_rows)
            steps_of_rows = steps[_dealt(self._work(table)[rows], stop - start)]
            shuffled = self._shuffled(table, rows[np.argsort(steps_of_rows, kind="stable")], unknown)
            yield from of_sizes(iter([shuffled]), np.bincount(steps_of_rows).tolist())

    def _work(self, table: pa.Table) -> np.ndarray:
        """Of each request, the candidates and the events that are read."""
        work = _lengths(table, self.schema.candidate_column)
        for history, column in self.schema.event_columns.items():
            limit = self.history_length
            if isinstance(limit, Mapping):
                limit = limit.get(history)
            events = _lengths(table, column)
            work = work + (events if limit is None else np.minimum(events, limit))
        return work

    def _rows_between(self, steps: Iterable[int], lane: int, num_rows: int) -> Iterator[int]:
        """Rows of a lane from each step to the next of these."""
        bounds = (self._bound(num_rows, lane, step) for step in steps)
        return (stop - start for start, stop in itertools.pairwise(bounds))

    def _bound(self, num_rows: int, lane: int, step: int) -> int:
        """Rows of a lane before a step: an equal share, rounded so that all lanes together come out even.

        By Hermite's identity the lanes' floor(x + lane / lanes) add up to floor(lanes * x).
        """
        return (num_rows * step * self._num_lanes + lane * self._num_steps) // (self._num_steps * self._num_lanes)

    def _windows(self, pieces: Iterator[Piece], lane: int) -> Iterator[pa.Table]:
        """The lane's requests, shuffled within windows of several pieces."""
        order, unknown = self._draws(lane)
        window: list[Piece] = []
        for piece in itertools.chain(pieces, [None]):
            if window and (piece is None or sum(p.num_rows for p in window) >= self._window_rows):
                table = pa.concat_tables(self._read(p) for p in window)
                yield table if self.seed is None else self._shuffled(table, order.permutation(table.num_rows), unknown)
                window = []
            if piece is not None:
                window.append(piece)

    def _draws(self, lane: int) -> tuple[np.random.Generator, np.random.Generator]:
        """What draws a lane's order, and what draws its unknown ids."""
        order, unknown = (np.random.default_rng([self.seed or 0, self._epoch, lane, draw]) for draw in (0, 1))
        return order, unknown

    def _shuffled(self, table: pa.Table, rows: np.ndarray, unknown: np.random.Generator) -> pa.Table:
        table = table.take(rows)
        for column, rate in self.unknown_rate.items():
            field = self.schema.arrow_schema().field(column)
            unknown_id = pa.scalar(None if field.nullable else 0, field.type)
            ids = pc.if_else(pa.array(unknown.random(table.num_rows) < rate), unknown_id, table[column])
            table = table.set_column(table.column_names.index(column), field, ids)
        return table

    def _read(self, piece: Piece) -> pa.Table:
        table = read_piece(piece, self.schema)
        # Checked here, where file and row are known; a batch mixes requests of many files.
        RequestBatch.from_arrow(table, self.schema, source=str(piece.path), first_row=piece.first_row + piece.start)
        return table


def read_piece(piece: Piece, schema: RequestSchema) -> pa.Table:
    """The rows of a piece, in the types of the schema.

    Raises:
        InputError: the file is damaged, or a value is null or not of its column's type: names the file, the request
            and the column.
    """
    names = schema.arrow_schema().names
    what = f"request {piece.first_row} and the next cannot be read"
    with (
        reading(piece.path, what, "copy the file again, or prepare the data again"),
        open_parquet(piece.path) as file,
    ):
        table = file.read_row_group(piece.row_group, columns=piece.histories.written(names))
    table = piece.histories.with_lists(table.slice(piece.start, piece.num_rows), names)
    return typed_table(table, schema, str(piece.path), piece.first_row + piece.start)


def pieces_of(folder: Location, split: str, schema: RequestSchema, span: Span | None = None) -> list[Piece]:
    """The requests of a split, or of `all`, and of some times alone if a span is given.

    Raises:
        InputError: as `row_groups`, or there is no request of those times.
    """
    splits = [name for name in _SPLITS if files_of(folder, name)] if split == ALL else [split]
    pieces = [piece for name in splits for piece in row_groups(folder / name, schema)]
    if span is None:
        return pieces
    pieces = list(_within(pieces, span))
    if not pieces:
        raise InputError(f"{folder}: no request of split {split!r} is {span}: give other times")
    return pieces


def row_groups(folder: Location, schema: RequestSchema) -> list[Piece]:
    """All row groups of a split, from the footers of its files.

    Raises:
        InputError: the folder has no Parquet files, or one is damaged or lacks a column.
    """
    paths = files_of(folder.parent, folder.name)
    if not paths:
        if folder.is_dir() and (folder.parent / COUNTS_FILE).is_file():
            raise InputError(_empty(folder.parent, folder.name))
        raise InputError(f"{folder}: no Parquet files: prepare the data first (torchrec-amort prepare --help)")
    histories = StoredHistories.load(folder.parent)
    needed = histories.written(schema.arrow_schema().names)
    pieces = []
    for path in paths:
        with (
            reading(path, "not a complete Parquet file", "copy it again, or prepare the data again"),
            open_parquet(path) as file,
        ):
            metadata, names = file.metadata, file.schema_arrow.names
        refuse_missing(needed, names, str(path))
        row = 0
        for group in range(metadata.num_row_groups):
            num_rows = metadata.row_group(group).num_rows
            pieces.append(Piece(path, group, row, 0, num_rows, histories))
            row += num_rows
    return pieces


def _empty(folder: Location, split: str) -> str:
    """What to say of a split without requests."""
    file = folder / COUNTS_FILE
    counts = json.loads(file.read_text()) if file.is_file() else {}
    sizes = "".join(f", {name} has {count['requests']:,}" for name, count in counts.items() if name != split)
    return f"{folder / split}: has no requests{sizes}: take another split, or prepare a log of more requests"


def _cut(pieces: Sequence[Piece], first: int, stop: int) -> Iterator[Piece]:
    """The parts of the pieces that hold rows `first` to `stop` of all of them, one after the other."""
    row = 0
    for piece in pieces:
        low, high = max(first - row, 0), min(stop - row, piece.num_rows)
        if low < high:
            yield replace(piece, start=piece.start + low, stop=piece.start + high)
        row += piece.num_rows


def _within(pieces: Iterable[Piece], span: Span) -> Iterator[Piece]:
    """The parts of the pieces that are of some times."""
    for piece in pieces:
        with (
            reading(piece.path, "the times cannot be read", "copy the file again, or prepare the data again"),
            open_parquet(piece.path) as file,
        ):
            times = file.read_row_group(piece.row_group, columns=["time"])["time"].to_numpy()
        is_within = (times >= span.start) & (times < span.stop)
        edges = np.flatnonzero(np.diff(is_within, prepend=False, append=False))
        for start, stop in edges.reshape(-1, 2).tolist():
            yield replace(piece, start=start, stop=stop)


def _lengths(table: pa.Table, column: str) -> np.ndarray:
    return pc.list_value_length(table[column]).to_numpy()


def _dealt(work: np.ndarray, num_steps: int) -> np.ndarray:
    """The step of each request: the largest first, each to the step that has the least work so far.

    Every request has work, so no step is without one if there are as many requests as steps.
    """
    steps = np.empty(len(work), dtype=np.int64)
    least = [(0, step) for step in range(num_steps)]
    for request in np.argsort(-work, kind="stable").tolist():
        sum_of_step, step = least[0]
        steps[request] = step
        heapq.heapreplace(least, (sum_of_step + int(work[request]), step))
    return steps
