"""Where files are: on this machine, or on a store that Arrow has a file system for, such as S3.

A location is a `Path`, or a `Stored`: a URI, which has of a `Path` what reading needs. Arrow reads its options from the
URI's query and from the environment.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from torchrec_amort.errors import InputError, one_line

# Of one request to S3. They are further and further apart: some 15 s in all if none succeeds.
ATTEMPTS = 6
# What the SDK of S3 says of an answer that is longer than what was asked for, such as "slow down" in place of a small
# file. It does not try again then, as it does otherwise.
_LONGER_ANSWER = "Failed to flush response stream"
# Also of what `Path` leaves of a URI: it cuts a slash off.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclass(frozen=True)
class Stored:
    """A file or folder on a store.

    Args:
        uri: such as `s3://bucket/data?region=eu-west-1`, or one of `gs`, `hdfs` and the others of
            `pyarrow.fs.FileSystem.from_uri`. Names in it are percent-encoded where a URI needs it.

    Raises:
        InputError: it holds a password, which configs and messages would show.

    Example::

        (Stored("s3://films/data") / "schema.json").read_text()
    """

    uri: str

    def __post_init__(self) -> None:
        if self._url.password is not None:
            shown = self._url._replace(netloc=f"...@{self._url.netloc.rpartition('@')[2]}").geturl()
            raise InputError(
                f"{shown}: has a password, which configs and reports would show: leave it out, and set it in the "
                "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Stored:
        return self._with_path(f"{self._url.path.rstrip('/')}/{quote(name)}")

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.parts[-1]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its path."""
        return PurePosixPath(unquote(self._url.path)).parts

    @property
    def parent(self) -> Stored:
        """The folder that it is in."""
        return self._with_path(str(PurePosixPath(self._url.path).parent))

    @property
    def key(self) -> str:
        """The URI without options. Two of different options may have one."""
        return f"{self._url.scheme}://{self._url.netloc}{unquote(self._url.path)}"

    @property
    def version(self) -> str:
        """Its ETag, or its size and time if the store has none. Another content has another one."""
        with self._asking() as (system, path), system.open_input_file(path) as file:
            etag = (file.metadata() or {}).get("ETag")
        return str(etag or f"{(found := self.info()).size} {found.mtime_ns}")

    def info(self) -> Any:
        """Arrow's `FileInfo`: type, size and time.

        Raises:
            InputError: the store does not tell, or has no such bucket.
        """
        with self._asking() as (system, path):
            found, missing, bucket = system.get_file_info(path), fs.FileType.NotFound, path.partition("/")[0]
            if found.type is missing and bucket and system.get_file_info(bucket).type is missing:
                raise FileNotFoundError(f"there is no bucket {bucket!r}")
            return found

    def is_file(self) -> bool:
        """Whether there is such a file."""
        return bool(self.info().is_file)

    def is_dir(self) -> bool:
        """Whether there is such a folder."""
        return bool(self.info().type is fs.FileType.Directory)

    def glob(self, pattern: str) -> list[Stored]:
        """The files that a pattern such as `*.parquet` or `2026/*.parquet` names from here on."""
        depth = len(PurePosixPath(pattern).parts)
        found = self._below(recursive=depth > 1)
        return [self / str(file) for file in found if len(file.parts) == depth and file.match(pattern)]

    def rglob(self, pattern: str) -> list[Stored]:
        """The files of such names, in this folder or one within it."""
        return [self / str(file) for file in self._below(recursive=True) if file.match(pattern)]

    def open(self) -> StoredFile:
        """The file, to read any part of."""
        with self._asking() as (system, path):
            return StoredFile(self, system.open_input_file(path))

    def read_text(self, encoding: str = "utf-8") -> str:
        """A whole file."""
        return self.open().read().decode(encoding)

    def put(self, file: Path) -> None:
        """Write what a local file has."""
        with self._asking() as (system, path):
            if path.startswith("/"):  # A store of buckets has no folders to be made.
                system.create_dir(str(PurePosixPath(path).parent))
            fs.copy_files(str(file), path, fs.LocalFileSystem(), system)

    def put_folder(self, folder: Path, *, first: str) -> None:
        """Write a local folder in place of what is there.

        Args:
            folder: whose files are written.
            first: name of the file without which nobody reads the folder. While others change, it is not there.
        """
        names = files_below(folder)
        old = {str(file) for file in self._below(recursive=True)}
        for name in sorted((old - {*names}) | (old & {first}), key=lambda name: name != first):
            (self / name)._delete()
        self.put_files(folder, names, last=first)

    def put_files(self, folder: Path, names: Iterable[str], *, last: str) -> None:
        """Write files of a local folder.

        Args:
            folder: which one.
            names: of its files.
            last: of them.
        """
        for name in sorted(names, key=lambda name: (name == last, name)):
            (self / name).put(folder / name)

    def _delete(self) -> None:
        with self._asking() as (system, path):
            system.delete_file(path)

    def _below(self, *, recursive: bool) -> list[PurePosixPath]:
        """The files of a folder, by their paths from it on; none if there is no such folder."""
        with self._asking() as (system, path):
            found = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
        return sorted(PurePosixPath(info.path).relative_to(path) for info in found if info.is_file)

    @property
    def _url(self) -> Any:
        return urlsplit(self.uri)

    def _with_path(self, path: str) -> Stored:
        return Stored(self._url._replace(path=path).geturl())

    @contextmanager
    def _asking(self) -> Iterator[tuple[Any, str]]:
        """The file system, and the path there; a store's refusal is told on one line."""
        try:
            system, root = _system(self._url._replace(path="/").geturl(), os.getpid())
            yield system, f"{root.rstrip('/')}{unquote(self._url.path).rstrip('/')}" or "/"
        except (pa.ArrowException, OSError) as error:
            raise _refused(self, error) from error


Location = Path | Stored


class StoredFile:
    """A file on a store that is open, as Arrow and DuckDB read one of Python's.

    Args:
        stored: which one.
        file: Arrow's.
    """

    def __init__(self, stored: Stored, file: Any) -> None:
        self._stored, self._file = stored, file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return bool(self._file.closed)

    def read(self, size: int = -1) -> bytes:
        """The next bytes, to the end unless a size is given.

        Raises:
            InputError: the store does not give them.
        """
        start = self.tell()
        for attempt in range(ATTEMPTS):
            try:
                return bytes(self._file.read(None if size < 0 else size))
            except OSError as error:
                if _LONGER_ANSWER not in str(error) or attempt + 1 == ATTEMPTS:
                    raise _refused(self._stored, error) from error
                time.sleep(random.random() * 2**attempt)
                self.seek(start)
        raise AssertionError("there is a last attempt")


# Each process has its own connections: those of a parent are of no use in what it forks.
@lru_cache(maxsize=64)
def _system(root: str, process: int) -> tuple[Any, str]:
    system, path = fs.FileSystem.from_uri(root)
    if system.type_name == "s3":
        # Arrow reads the options, but a URI has no word for how often to try.
        (options,) = system.__reduce__()[1]
        system = fs.S3FileSystem(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS))
    return system, path


def _refused(where: Stored, error: Exception) -> InputError:
    return InputError(
        f"{where}: the store does not give it ({one_line(error)}): check the URI, the credentials in the environment "
        "(such as AWS_ACCESS_KEY_ID) and the network"
    )


def location(given: str | Location) -> Location:
    """What a path or a URI names.

    Args:
        given: a URI is text, since `Path("s3://films")` is `s3:/films`.

    Raises:
        InputError: it is a `Path` of a URI.

    Example::

        location("s3://films/data") / "train"
    """
    if isinstance(given, Stored):
        return given
    if isinstance(given, str) and "://" in given:
        return Stored(given)
    if _URI.match(str(given)):
        raise InputError(f"{given}: a Path cuts a slash off a URI: give the URI as text")
    return Path(given)


def local_path(given: str | Path) -> Path:
    """The path of what has to be on this machine.

    Raises:
        InputError: it is a URI.
    """
    if _URI.match(str(given)):
        raise InputError(
            f"{given}: has to be on this machine: what may be on a store is prepared data that is read, and "
            "the sources and out of a build"
        )
    return Path(given)


@contextmanager
def reading(where: Location, what: str, advice: str) -> Iterator[None]:
    """Tell on one line what is wrong with a file that cannot be read.

    Args:
        where: the file.
        what: is wrong with its content.
        advice: what to do about that.

    Raises:
        InputError: the body could not read it.

    Example::

        film = Path("film.txt")
        film.write_text("7")
        with reading(film, "not text", "copy it again"):
            number = int(film.read_text())
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where}: {what} ({one_line(error)}): {advice}") from error


def files_below(folder: Path) -> list[str]:
    """The names of a local folder's files, from it on."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def size_of(where: Location) -> int:
    """Bytes of a file."""
    return where.stat().st_size if isinstance(where, Path) else int(where.info().size)


def open_parquet(where: Location) -> pq.ParquetFile:
    """A Parquet file, of which only what is asked for is read."""
    return pq.ParquetFile(where if isinstance(where, Path) else where.open())
