"""DuckDB runs the plan in this process; what does not fit its memory is on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import pyarrow as pa
from fsspec import AbstractFileSystem

from torchrec_amort.data.builder.config import SourceConfig, Unit
from torchrec_amort.data.builder.steps import MICROSECONDS_PER, Explode, Step, quoted
from torchrec_amort.data.builder.tables import csv_reader, is_csv, text
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.stores import Location, Stored, StoredFile, location

ROWS_PER_BATCH = 65_536


class DuckDB:
    """An `Engine`.

    Args:
        folder: where it may write what does not fit its memory.
        memory: what it may use, such as `4GB`.
        threads: all if None.
    """

    def __init__(self, folder: Path, memory: str, threads: int | None) -> None:
        self._folder, self._memory, self._threads = folder, memory, threads

    def __enter__(self) -> DuckDB:
        self._folder.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {"memory_limit": self._memory, "temp_directory": str(self._folder / "spilled")}
        if self._threads is not None:
            settings["threads"] = self._threads
        try:
            self._connection = duckdb.connect(str(self._folder / "plan.duckdb"), config=settings)
        except duckdb.Error as error:
            raise InputError(f"memory is {self._memory!r}, threads {self._threads}: {one_line(error)}") from error
        self._stores = _Stores()
        self._connection.register_filesystem(self._stores)
        # Timestamps without a zone are UTC, as the sources say otherwise.
        self._connection.execute("SET TimeZone = 'UTC'")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()

    def read(self, name: str, files: Mapping[str, Sequence[str]], source: SourceConfig) -> None:
        parts = []
        for part, paths in files.items():
            named = [self._stores.named(path) for path in map(location, paths)]
            label = f", {text(part)} AS part" if part else ""
            if any(map(is_csv, named)):
                reader = csv_reader(source, named)
            else:
                reader = f"read_parquet([{', '.join(map(text, named))}], union_by_name = true)"
            parts.append(f"SELECT *{label} FROM {reader}")
        self.run(Step(name, " UNION ALL BY NAME ".join(parts)))

    @staticmethod
    def instant(expression: str, unit: Unit, zone: str) -> str:
        if unit != "timestamp":
            return f"CAST({expression} AS BIGINT) * {MICROSECONDS_PER[unit]}"
        return f"epoch_us(CAST({expression} AS TIMESTAMP) AT TIME ZONE '{zone}')"

    def run(self, step: Step) -> None:
        self._execute(f"CREATE {'TABLE' if step.kept else 'VIEW'} {quoted(step.name)} AS {step.sql}", step.name)

    def explode(self, step: Explode) -> None:
        opened = ", ".join(f"unnest({quoted(column)}) AS {quoted(column)}" for column in step.columns)
        others = ", ".join(map(quoted, step.columns))
        self.run(Step(step.name, f"SELECT * EXCLUDE ({others}), {opened} FROM {quoted(step.of)}"))

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self._execute(sql, "a check").fetchall()

    def batches(self, sql: str) -> Iterator[pa.Table]:
        try:
            reader = self._connection.sql(sql).to_arrow_reader(ROWS_PER_BATCH)
            yield reader.schema.empty_table()
            for batch in reader:
                yield pa.Table.from_batches([batch])
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise InputError(f"the plan could not be run to its end: {_told(error)}") from error

    def _execute(self, sql: str, what: str) -> Any:
        try:
            return self._connection.execute(sql)
        except duckdb.Error as error:
            raise InputError(f"{what}: {_told(error)}") from error


class _Stores(AbstractFileSystem):
    """Files of stores, as DuckDB asks for them: by names without options, each of one file."""

    cachable = False
    protocol = ("abfs", "abfss", "file", "gcs", "gs", "hdfs", "s3", "viewfs")

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[str, Stored] = {}

    def named(self, file: Location) -> str:
        """What a file is called here."""
        if isinstance(file, Path):
            return str(file)
        if self._files.setdefault(file.key, file) != file:
            raise InputError(f"{file}: is read with other options, too ({self._files[file.key]}): use the same")
        return file.key

    def glob(self, path: str) -> list[str]:
        """The file, whatever letters its name has."""
        return [path]

    def open(self, path: str, mode: str = "rb") -> StoredFile:
        """A file to read from."""
        return self._files[path].open()

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return int(self._files[path].info().size)

    def modified(self, path: str) -> datetime:
        """When a file was changed."""
        changed: datetime = self._files[path].info().mtime
        return changed


def _told(error: Exception) -> str:
    """What DuckDB says, without the plan's own SQL, which it marks, and without the lines of Python that refused."""
    told = str(error).partition("\nLINE ")[0].rpartition(f"{InputError.__name__}: ")[2]
    # Its advice is on settings that are not given here.
    told = " ".join(told.partition("\nPossible solutions")[0].split())
    return f"{told}: raise memory, or lower threads" if isinstance(error, duckdb.OutOfMemoryException) else told
