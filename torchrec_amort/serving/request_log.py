"""RequestLog: a random share of the requests that were scored, in files that `load` and data readers take as they are.

Shape suffixes: m candidates of one request, C of several; T tasks.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_amort.columns import typed_table
from torchrec_amort.data.splits import lists_of, vectors_of
from torchrec_amort.data.writer import ROWS_PER_GROUP
from torchrec_amort.errors import InputError, place_of
from torchrec_amort.files import new_file
from torchrec_amort.schema import KINDS_NOT_READ, SCHEMA_FILE, RequestSchema, refuse_missing
from torchrec_amort.serving.versions import Requests, Scored, table_of
from torchrec_amort.stores import local_path

logger = logging.getLogger(__name__)

# Columns of the log beside those of the schema: what was answered, and by which version.
LOGITS, VERSION = "amort_logits", "amort_version"
# The split that `load` and `pilot` read unless told otherwise.
SPLIT = "test"

_SECONDS_PER_DAY = 86_400
_SECONDS_BETWEEN_SWEEPS = 60
_MOST_BYTES = 2**26
# When its first request was logged, the process' place, and what tells files of one second apart. One that is being
# written begins with a dot, and has more digits.
_NAME = re.compile(r"\.?part-(\d+)-(\d+)-[0-9a-f]{8}(?:\.[0-9a-f]{8})?\.parquet")
_PRIVATE_FOLDER, _PRIVATE_FILE = 0o700, 0o600


Result = TypeVar("Result")


@dataclass
class LogCounters:
    """What became of the requests that were drawn, and what was removed.

    Args:
        written: requests that are, or were, in files.
        dropped: not taken, since too many waited to be written.
        unfit: without a column of the schema, `request_id`, `user` and `time` among them, or with another type in it.
        failed: lost, since a file could not be written.
        forgotten: users removed by `forget`.
        expired: files removed for age.
    """

    written: int = 0
    dropped: int = 0
    unfit: int = 0
    failed: int = 0
    forgotten: int = 0
    expired: int = 0


@dataclass(frozen=True, eq=False)
class _Call:
    """Requests that came together, and which of them are logged."""

    requests: Requests
    scored: Scored
    rows: Sequence[int]
    schema: RequestSchema
    num_bytes: int


class RequestLog:
    """Writes a random share of requests, with their scores, into files that are whole or not there.

    A thread of its own writes; who scores does not wait for it, and nothing that fails here fails an answer. Requests
    wait in memory until a file is full, or its time is over, and are in it then: those of the last minutes are lost if
    the process is killed. A folder in `folder` is made for each schema that versions have, with `schema.json` and
    files in `test`, as prepared data has them, but without labels and weights. Only the owner may read them. All
    methods may be called by several threads.

    Args:
        folder: of this log alone; made unless it is there.
        share: of the requests, each drawn by itself: above 0 and up to 1.
        days: after which a file is removed, counted from its first request.
        place: of the process among those that write into the folder.
        num_places: how many of them there are.
        rows_per_file: requests of a file, or those of one call more.
        seconds_per_file: after which a file is written that is not full.
        max_waiting: calls that may wait for the thread; requests of any more are dropped, and counted.
        seed: of the draws; another one each time if None.
        clock: seconds since 1970.

    Raises:
        InputError: the folder cannot be made, or others than its owner may read it.

    Example::

        log = RequestLog("logs", share=0.01, days=30)
        log.put(test_table, Scored(torch.zeros(15, 1), [3] * 5, "monday"), schema)
        log.look()  # from time to time
        log.close()
    """

    def __init__(
        self,
        folder: str | Path,
        share: float,
        days: float,
        *,
        place: int = 0,
        num_places: int = 1,
        rows_per_file: int = 4096,
        seconds_per_file: float = 600,
        max_waiting: int = 1024,
        seed: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._share, self._seconds_kept = local_path(folder), share, days * _SECONDS_PER_DAY
        self._place, self._rows_per_file, self._seconds_per_file = place, rows_per_file, seconds_per_file
        self._max_waiting, self._clock, self._random = max_waiting, clock, random.Random(seed)
        self._lock = threading.Lock()
        self._counters = LogCounters()
        self._num_waiting = self._num_bytes_waiting = 0
        self._is_closed = self._is_failing = False
        # Of the requests that are in no file yet; these, and all files, are the thread's own.
        self._part: list[pa.Table] = []
        self._part_rows = self._part_bytes = 0
        # As versions have it, and of what is sent to be scored.
        self._scored_by: RequestSchema | None = None
        self._schema: RequestSchema | None = None
        self._part_since = self._swept = 0.0
        _refuse_open(self._folder)
        self._remove_unfinished(num_places)
        self._sweep()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="request-log")

    def counters(self) -> dict[str, int]:
        """What became of the requests so far: see `LogCounters`."""
        with self._lock:
            return asdict(self._counters)

    def put(self, requests: Requests, scored: Scored, schema: RequestSchema, num_bytes: int = 0) -> None:
        """Draw those of some requests that are logged, and have them written; it does not wait.

        Args:
            requests: that came together, with whole histories.
            scored: their scores.
            schema: of the version that answers.
            num_bytes: of mappings: what they take while they wait.
        """
        rows = [row for row in range(len(scored.num_candidates)) if self._random.random() < self._share]
        if not rows:
            return
        size = requests.get_total_buffer_size() if isinstance(requests, pa.Table) else num_bytes
        with self._lock:
            is_full = self._num_waiting >= self._max_waiting or self._num_bytes_waiting + size > _MOST_BYTES
            if is_full or self._is_closed:
                self._counters.dropped += len(rows)
                return
            self._num_waiting += 1
            self._num_bytes_waiting += size
            self._thread.submit(self._take, _Call(requests, scored, rows, schema, size))

    def look(self) -> None:
        """Write what has waited for its time, remove files whose time is over, and return when that is done."""
        self._done(self._look)

    def forget(self, user: int) -> bool:
        """Remove a user's requests, of all processes' files and of what is in no file yet, and return then.

        A file that cannot be written anew without them is removed as a whole.

        Args:
            user: whom to forget.

        Returns:
            bool: whether there was anything.

        Raises:
            OSError: a file can be neither written nor removed.
        """
        return self._done(partial(self._forget, user))

    def close(self) -> None:
        """Take no more requests, and return when those that were taken are in files."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._thread.submit(self._write)
        self._thread.shutdown()

    def _done(self, order: Callable[[], Result]) -> Result:
        """What an order returns, which the thread does after all that came before; after the end, whoever asks."""
        with self._lock:
            done = None if self._is_closed else self._thread.submit(order)
        if done is None:
            self._thread.shutdown()
            return order()
        return done.result()

    def _take(self, call: _Call) -> None:
        try:
            self._append(_logged(call, self._schema_of(call)))
        except InputError:
            self._count("unfit", len(call.rows))
        except Exception as error:  # noqa: BLE001 - others are logged all the same
            self._failed(len(call.rows), error)
        finally:
            with self._lock:
                self._num_waiting -= 1
                self._num_bytes_waiting -= call.num_bytes
        self._look()

    def _schema_of(self, call: _Call) -> RequestSchema:
        """Of the columns that are logged; what waits is of one schema."""
        if self._schema is None or call.schema is not self._scored_by:
            self._write()
            self._scored_by, self._schema = call.schema, _without_labels(call.schema)
        return self._schema

    def _append(self, rows: pa.Table) -> None:
        if not self._part:
            self._part_since = self._clock()
        self._part.append(rows)
        self._part_rows += rows.num_rows
        self._part_bytes += rows.nbytes

    def _look(self) -> None:
        now = self._clock()
        is_full = self._part_rows >= self._rows_per_file or self._part_bytes >= _MOST_BYTES
        # A clock may be set back, too.
        if is_full or abs(now - self._part_since) >= self._seconds_per_file:
            self._write()
        if abs(now - self._swept) >= _SECONDS_BETWEEN_SWEEPS:
            self._sweep()

    def _write(self) -> None:
        if not self._part or self._schema is None:
            return
        table = pa.concat_tables(self._part)
        self._part, self._part_rows, self._part_bytes = [], 0, 0
        name = f"part-{int(self._part_since):010d}-{self._place}-{secrets.token_hex(4)}.parquet"
        try:
            _save(table, _folder_for(self._schema, self._folder) / name)
        except OSError as error:
            self._failed(table.num_rows, error)
        else:
            self._is_failing = False
            self._count("written", table.num_rows)

    def _failed(self, num_rows: int, error: Exception) -> None:
        """Count requests that are lost; the first error is logged, and once more after a file that was written."""
        self._count("failed", num_rows)
        if not self._is_failing:
            number = error.errno if isinstance(error, OSError) else None
            logger.error("requests are not logged: %s, number %s", place_of(error), number)
        self._is_failing = True

    def _count(self, name: str, number: int) -> None:
        with self._lock:
            setattr(self._counters, name, getattr(self._counters, name) + number)

    def _files(self) -> Iterator[tuple[Path, re.Match[str]]]:
        """The files of all processes, with what their names tell; no other file is touched."""
        for path in sorted(self._folder.glob(f"*/{SPLIT}/*")):
            if match := _NAME.fullmatch(path.name):
                yield path, match

    def _remove_unfinished(self, num_places: int) -> None:
        """Remove what a process that was killed had not written to its end, or one whose place is not there now."""
        for path, match in self._files():
            if path.name.startswith(".") and int(match[2]) % num_places == self._place:
                path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove files whose time is over."""
        self._swept = self._clock()
        for path, match in self._files():
            if int(match[1]) + self._seconds_kept > self._swept:
                continue
            try:
                path.unlink(missing_ok=True)
                self._count("expired", 1)
            except OSError as error:
                self._failed(0, error)

    def _forget(self, user: int) -> bool:
        self._count("forgotten", 1)
        others = [_without(table, user) for table in self._part]
        self._part = [table for table in others if table.num_rows]
        num_rows = sum(table.num_rows for table in self._part)
        found, self._part_rows = num_rows < self._part_rows, num_rows
        for path, _ in self._files():
            # One that is being written is of a process that takes out the user itself, when it has been written.
            if not path.name.startswith("."):
                found |= _take_out(path, user)
        return found


def _logged(call: _Call, schema: RequestSchema) -> pa.Table:
    """Rows of the log.

    Raises:
        InputError: requests lack a column, or have one that is not of its type.
    """
    requests = table_of(call.requests, schema)
    refuse_missing(schema.arrow_schema().names, requests.column_names, "requests")
    # Copied, not to keep the whole message.
    rows = typed_table(requests, schema).take(call.rows)
    logits_CT = call.scored.logits_CT.float().numpy()
    parts_mT = np.split(logits_CT, np.cumsum(call.scored.num_candidates)[:-1])
    logits = [parts_mT[row] for row in call.rows]
    rows = rows.append_column(LOGITS, lists_of([len(part) for part in logits], vectors_of(np.concatenate(logits))))
    return rows.append_column(VERSION, pa.array([call.scored.versions[row] for row in call.rows]))


def _without_labels(schema: RequestSchema) -> RequestSchema:
    """The schema of what is sent to be scored."""
    return replace(schema, features=tuple(f for f in schema.features if f.kind not in KINDS_NOT_READ))


def _folder_for(schema: RequestSchema, folder: Path) -> Path:
    """The folder of the files of a schema, made unless it is there: another schema has another one."""
    digest = hashlib.sha256(schema.to_json().encode()).hexdigest()[:8]
    top = folder / f"{quote(schema.dataset, safe='')}-{digest}"
    for made in (folder, top, top / SPLIT):
        made.mkdir(mode=_PRIVATE_FOLDER, exist_ok=True)
    if not (top / SCHEMA_FILE).is_file():
        schema.save(top)
    return top / SPLIT


def _refuse_open(folder: Path) -> None:
    try:
        folder.mkdir(mode=_PRIVATE_FOLDER, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"request_log: {folder}: cannot be made ({error}): choose another folder") from error
    if (mode := folder.stat().st_mode & 0o777) & 0o077:
        raise InputError(
            f"request_log: {folder}: has mode {mode:o}, but requests are personal data: give a folder of mode 700"
        )


def _save(table: pa.Table, path: Path) -> None:
    with new_file(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE_FILE)
        with os.fdopen(descriptor, "wb") as file:
            pq.write_table(table, file, row_group_size=ROWS_PER_GROUP)


def _without(table: pa.Table, user: int) -> pa.Table:
    return table.filter(pa.array(table["user"].to_numpy() != user))


def _take_out(path: Path, user: int) -> bool:
    """Remove a user's requests from a file; whether it had any, or could not tell."""
    try:
        with pq.ParquetFile(path) as file:
            if user not in file.read(columns=["user"])["user"].to_pylist():
                return False
            others = _without(file.read(), user)
        if others.num_rows:
            _save(others, path)
            return True
    except FileNotFoundError:
        # Its time was over, and another process removed it.
        return False
    except (OSError, pa.ArrowException):
        logger.error("%s: cannot be written without a user's requests: it has to go", path)
    path.unlink(missing_ok=True)
    return True
