"""Prepared requests with the histories of other users: a control, which tells what of a gain is of the own history."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_amort.data.counts import read_counts
from torchrec_amort.data.reader import Piece, pieces_of, read_piece
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError
from torchrec_amort.schema import RequestSchema
from torchrec_amort.stores import location


def prepare(source: str | Path | None, out: str | Path, *, overwrite: bool = False) -> dict[str, dict[str, int]]:
    """Write a prepared data folder once more, each request with the histories of the latest one of another user.

    All else is equal, so what a model gains by its own histories over these is of the user. The first requests of a
    split, up to the first of a second user, have empty histories.

    Args:
        source: a prepared data folder.
        out: the data folder to make.
        overwrite: replace a folder that is there.

    Returns:
        dict: requests, candidates and users of each split.

    Raises:
        InputError: there is no source, it is no prepared folder, its requests are not in order of time or have no
            history, or `out` is there already.

    Example::

        prepare("data/movielens-1m", "data/movielens-1m-another-user")
    """
    if source is None:
        raise InputError("another-user: no source: give a prepared data folder with --source")
    folder = location(source)
    schema = RequestSchema.load(folder)
    if not schema.of("event"):
        raise InputError(f"{source}: its requests have no history that another user's could take the place of")
    splits = {split: _exchanged(pieces_of(folder, split, schema), schema) for split in read_counts(source)}
    return write_requests(out, schema, splits, overwrite=overwrite)


def _exchanged(pieces: Iterable[Piece], schema: RequestSchema) -> Iterator[pa.Table]:
    """The requests of a split, in which events are those of another user."""
    columns = sorted({feature.source for feature in schema.of("event")})
    before: pa.Table | None = None
    for piece in pieces:
        table = read_piece(piece, schema)
        all_rows = table if before is None else pa.concat_tables([before, table])
        _refuse_disorder(all_rows, piece)
        others = _latest_of_another(all_rows["user"].to_numpy())
        places = others[len(all_rows) - len(table) :]
        indices = pa.array(places, mask=places < 0)
        for column in columns:
            kind = schema.arrow_schema().field(column).type
            events = pc.coalesce(all_rows[column].take(indices), pa.scalar([], kind))
            table = table.set_column(table.column_names.index(column), schema.arrow_schema().field(column), events)
        yield table
        # What later requests may need: the last one, and the one whose histories it has.
        before = all_rows.take([place for place in (int(others[-1]), len(all_rows) - 1) if place >= 0])


def _latest_of_another(users: np.ndarray) -> np.ndarray:
    """int64: the place of the latest row before each that is of another user; -1 if there is none."""
    places = np.arange(len(users))
    starts_run = np.diff(users, prepend=users[:1]) != 0
    return np.maximum.accumulate(np.where(starts_run, places, 0)) - 1


def _refuse_disorder(rows: pa.Table, piece: Piece) -> None:
    """Refuse a request that is before the one above it: its user would have events of later ones."""
    steps = np.diff(rows["time"].to_numpy())
    if len(steps) and steps.min() < 0:
        row = int(steps.argmin()) + 1
        times = rows["time"].to_pylist()
        request = piece.first_row + piece.start + row - (len(rows) - piece.num_rows)
        raise InputError(
            f"{piece.path}: request {request} is of time {times[row]}, after one of {times[row - 1]}: write the "
            "requests in order of time first"
        )
