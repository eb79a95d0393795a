"""Histories by pointer: events are stored once, user by user, and a request has a range of them.

`events.json` of a prepared folder names the Parquet files of each history's events, one for each build that added
some: they are never written again. A request's row has columns `HISTORY start` and `HISTORY stop` in place of lists:
places in all files of its history, one after the other. What reads requests maps the events into memory, from an Arrow
file that is made once on each machine, in the user's cache folder: any range of them is there at once, and processes
share it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_amort.data.tables import of_sizes
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.files import new_file, write_json
from torchrec_amort.stores import Location, Stored, local_path, location, open_parquet, reading

EVENTS_FILE = "events.json"
EVENTS_FOLDER = "events"
EVENTS_PER_GROUP, EVENTS_PER_BATCH = 131_072, 2**20


def pointers(history: str) -> tuple[str, str]:
    """The columns of the range of a request's events, from the first to the one after the last."""
    return f"{history} start", f"{history} stop"


class Events:
    """The events of a history, any range of which is there at once.

    Args:
        paths: of Parquet files, whose events stand one after the other.
        cache: folder of the Arrow file that is mapped; the user's cache folder unless given.

    Raises:
        InputError: there is none, it is damaged, or the cache folder cannot be written.

    Example::

        Events(["data/films/events/0-0001.parquet"]).lists(["film"], np.array([0, 2]), np.array([2, 5]))
    """

    def __init__(self, paths: Sequence[str | Location], cache: Path | None = None) -> None:
        self._table = pa.concat_tables(_table(location(path), cache) for path in paths)

    @property
    def columns(self) -> list[str]:
        """Names of its columns."""
        return list(self._table.column_names)

    def lists(self, names: Iterable[str], starts: np.ndarray, stops: np.ndarray) -> dict[str, pa.Array]:
        """Columns of some ranges.

        Args:
            names: of the columns.
            starts: int64 [requests].
            stops: int64 [requests].

        Returns:
            dict: by column, a list for each range.
        """
        ends = pa.array(np.concatenate([[0], np.cumsum(stops - starts)]), pa.int32())
        ranges = list(zip(starts.tolist(), (stops - starts).tolist(), strict=True))
        found = {}
        for name in names:
            column = self._table[name]
            # Slices are views: what is copied is the ranges alone, however large the file.
            chunks = [chunk for start, length in ranges if length for chunk in column.slice(start, length).chunks]
            found[name] = pa.ListArray.from_arrays(ends, pa.concat_arrays(chunks or [pa.array([], column.type)]))
        return found


def write_events(path: Path, tables: Iterable[pa.Table]) -> Events:
    """Write events in their order, and map them beside their file, which may be a temporary one.

    Args:
        path: of the file to make.
        tables: one or more, all of one schema.
    """
    given = iter(tables)
    first = next(given)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        # Cut anew, whatever the engine gave at a time: the same events are the same file.
        for table in of_sizes(itertools.chain([first], given), itertools.repeat(EVENTS_PER_GROUP)):
            writer.write_table(table.combine_chunks())
    return Events([path], path.parent)


def _table(path: Location, cache: Path | None) -> pa.Table:
    with _reading(path):
        return pa.ipc.open_file(pa.memory_map(str(_mapped(path, cache)))).read_all()


def _mapped(path: Location, cache: Path | None) -> Path:
    """The Arrow file of a Parquet file, made if this machine has none."""
    named = f"{path.resolve() if isinstance(path, Path) else path} {_version(path)}"
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchrec-amort"
    mapped = cache / f"{hashlib.sha256(named.encode()).hexdigest()}.arrow"
    if not mapped.is_file():
        with (
            open_parquet(path) as file,
            new_file(mapped) as temporary,
            pa.ipc.new_file(str(temporary), file.schema_arrow) as writer,
        ):
            # Few pieces: to find a place takes as many steps as there are.
            for batch in file.iter_batches(EVENTS_PER_BATCH):
                writer.write_batch(batch)
    return mapped


class StoredHistories:
    """The histories of a prepared folder that its requests point to.

    Args:
        files: of each such history, the files of its events.
    """

    def __init__(self, files: Mapping[str, Sequence[str | Location]]) -> None:
        self.files = {history: tuple(map(location, of_history)) for history, of_history in files.items()}
        # Asked once: a store would be waited for at every use.
        self._versions: dict[Location, str] = {}
        for file in itertools.chain.from_iterable(self.files.values()):
            with _reading(file):
                self._versions[file] = _version(file)

    @classmethod
    def load(cls, folder: str | Location) -> StoredHistories:
        """Those of a folder; none if all its histories are lists.

        Raises:
            InputError: `events.json` cannot be read.
        """
        path = location(folder) / EVENTS_FILE
        if not path.is_file():
            return cls({})
        try:
            files: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({one_line(error)}): copy it again") from error
        return cls({history: [path.parent / file for file in named] for history, named in files.items()})

    def num_events(self) -> dict[str, int]:
        """Of each history."""
        return {history: sum(map(_num_rows, files)) for history, files in self.files.items()}

    def save(self, folder: Path, number: int = 1) -> dict[str, str]:
        """Move the files of a build into a folder.

        Args:
            folder: a prepared one.
            number: of the build.

        Returns:
            dict: of each history, the new file's name there.
        """
        if self.files:
            (folder / EVENTS_FOLDER).mkdir(exist_ok=True)
        names = {}
        for place, (history, (file,)) in enumerate(self.files.items()):
            names[history] = f"{EVENTS_FOLDER}/{place}-{number:04d}.parquet"
            local_path(str(file)).rename(folder / names[history])
        return names

    def written(self, names: Sequence[str]) -> list[str]:
        """The columns that files of requests have, for those of a table of requests."""
        firsts = [files[0] for files in self.files.values()]
        of_events = {name for file in firsts for name in _columns_as_of(file, self._versions[file])}
        kept = [name for name in names if name not in of_events]
        return [*kept, *(column for history in self.files for column in pointers(history))]

    def with_lists(self, table: pa.Table, names: Sequence[str]) -> pa.Table:
        """Requests with the lists that they point to.

        Args:
            table: of the columns `written(names)`.
            names: of the columns to give.
        """
        columns = {name: table[name] for name in names if name in table.column_names}
        for history, files in self.files.items():
            starts, stops = (table[column].to_numpy() for column in pointers(history))
            events = _opened_as_of(files, tuple(self._versions[file] for file in files))
            columns |= events.lists([name for name in events.columns if name in names], starts, stops)
        return pa.table({name: columns[name] for name in names})


def save_histories(folder: Path, files: Mapping[str, Sequence[str]]) -> None:
    """Write `events.json`: of each history that is stored once, the names of its files in the folder."""
    write_json(folder / EVENTS_FILE, {history: list(names) for history, names in files.items()})


@lru_cache(maxsize=64)
def _opened_as_of(files: tuple[Location, ...], versions: tuple[str, ...]) -> Events:
    """The events of files, opened once in each process unless others have taken their names."""
    return Events(files)


@lru_cache(maxsize=64)
def _columns_as_of(file: Location, version: str) -> list[str]:
    """Names of a file's columns, which are read without its events."""
    with _reading(file), open_parquet(file) as opened:
        return list(opened.schema_arrow.names)


def _num_rows(file: Location) -> int:
    with _reading(file), open_parquet(file) as opened:
        return int(opened.metadata.num_rows)


def _version(file: Location) -> str:
    """Another one once the file has another content."""
    if isinstance(file, Stored):
        return file.version
    found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _reading(path: Location) -> AbstractContextManager[None]:
    return reading(path, "events cannot be read", "copy the file again")
