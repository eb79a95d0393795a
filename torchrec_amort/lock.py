"""A folder that one process at a time writes into, on any file system that several hosts may share."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from torchrec_amort.errors import InputError
from torchrec_amort.files import new_file, utc_now
from torchrec_amort.stores import local_path

LOCK_FILE = ".lock"
SECONDS_BETWEEN_SIGNS = 5.0
# Without a sign of life for so long, a process on another host is dead.
SECONDS_TO_DEATH = 30.0
# An earlier start of the same job is given so long to end.
SECONDS_TO_END = 60.0
SECONDS_BETWEEN_LOOKS = 0.5


def job_name() -> str | None:
    """Torchrun's name of the job, the same for all starts of its ranks; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def _process_space() -> str | None:
    """What tells whose process ids are comparable: this boot of this host, and its container; None if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """When a process of this host started, in ticks since it was booted; None if that is unknown."""
    stat = _stat(pid)
    return int(stat[19]) if stat else None


def _stat(pid: int) -> list[str]:
    """The kernel's figures of a process, from its state on; nothing if they may not be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a folder, as its lock file tells it: this one, unless given.

    Args:
        host: its name.
        pid: of the process, there.
        space: tells where `pid` means this process.
        started: the process' start, by which it is told from a later one with its `pid`.
        job: torchrun's name of the job.
        since: when it took the folder, UTC.
        token: of this lock alone.
    """

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    space: str | None = field(default_factory=_process_space)
    started: int | None = field(default_factory=lambda: _started(os.getpid()))
    job: str | None = field(default_factory=job_name)
    since: str = field(default_factory=utc_now)
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def is_alive(self) -> bool | None:
        """Whether the process is there; None if that cannot be told from here."""
        if self.space is None or self.space != _process_space():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # It is there, and somebody else's.
        stat = _stat(self.pid)
        is_zombie = bool(stat) and stat[0] in "ZX"
        return not is_zombie and _started(self.pid) in (None, self.started)

    def __str__(self) -> str:
        """Who it is, for a message."""
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


@dataclass(frozen=True)
class _Seen:
    """A lock file as it was read: its owner, if it is whole, and all that a sign of life changes."""

    owner: Owner | None
    alive: str
    content: bytes
    modified: int

    @property
    def token(self) -> str:
        return self.owner.token if self.owner else "unreadable"

    def __str__(self) -> str:
        return f"{self.owner}, last sign of life {self.alive}" if self.owner else "a process that has just begun"


def _read(path: Path) -> _Seen | None:
    """A lock file, None if there is none. Opened, as on NFS only that asks the server what is there."""
    try:
        with path.open("rb") as file:
            content, modified = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    try:
        record = json.loads(content)
        owner = Owner(**{f.name: record[f.name] for f in fields(Owner)})
        return _Seen(owner, record["alive"], content, modified)
    except (ValueError, KeyError, TypeError):
        # Its process is about to write it, or died then.
        return _Seen(None, "", content, modified)


class FolderLock:
    """Lets one process at a time write into a folder; whoever comes while it does is refused.

    The lock is a file of its own in the folder, made only if there is none (O_EXCL), as every file system can; its
    owner rewrites it every few seconds. One whose owner is dead is taken over: at once if the process was of this host,
    else when it has shown no sign of life for a while by the clock of who waits, so that hosts' clocks may differ.

    Args:
        folder: made if need be, and removed afterwards if nothing was written into it.
        owner: this process unless given.
        is_restart: whether torchrun has started this job's ranks again: an earlier start of it is waited for.
        clock: seconds, as of `time.monotonic`.
        sleep: waits some seconds.

    Example::

        with FolderLock("runs/first") as lock:
            write_requests("runs/first/data", schema, {"train": [train_table]})
            lock.refuse_lost()
    """

    def __init__(
        self,
        folder: str | Path,
        owner: Owner | None = None,
        *,
        is_restart: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder = local_path(folder)
        self._path = self._folder / LOCK_FILE
        self._owner = owner or Owner()
        self._is_restart = is_restart
        self._clock, self._sleep = clock, sleep
        self._made: list[Path] = []
        self._is_over = threading.Event()

    def __enter__(self) -> FolderLock:
        """Take the folder.

        Raises:
            InputError: another process holds it.
        """
        self._made = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        try:
            while not self._has_taken():
                pass
        except BaseException:
            self._give_back()
            raise
        self._signs = threading.Thread(target=self._show_signs, daemon=True)
        self._signs.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the folder back."""
        self._is_over.set()
        self._signs.join()
        self._give_back()

    def _give_back(self) -> None:
        with suppress(OSError):
            if self._is_mine():
                self._path.unlink()
            for folder in self._made:
                folder.rmdir()

    def refuse_lost(self) -> None:
        """Refuse to go on writing into a folder that is another process' by now.

        Raises:
            InputError: the lock was removed, or taken over since this process was taken for dead.
        """
        if not self._is_mine():
            seen = _read(self._path)
            raise InputError(
                f"{self._folder}: this process held it since {self._owner.since}, but its lock {self._path} "
                f"{f'is of {seen} now' if seen else 'was removed'}: see that nobody else writes there, then go on from "
                "the last checkpoint with --resume true"
            )

    def _is_mine(self) -> bool:
        seen = _read(self._path)
        return seen is not None and seen.token == self._owner.token

    def _has_taken(self) -> bool:
        """Whether the lock is this process' now; if not, it was let go, and may be there for the taking."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._has_made(self._path):
            return True
        if (seen := _read(self._path)) is None:
            return False
        if not self._is_dead(self._path, seen):
            return False
        # Whoever makes the file that is named after the dead one's lock takes its place; nobody else may.
        claim = self._path.with_name(f"{LOCK_FILE}.{seen.token}")
        if not self._has_made(claim):
            self._sleep(SECONDS_BETWEEN_LOOKS)
            with suppress(InputError):
                if (other := _read(claim)) is not None and self._is_dead(claim, other):
                    claim.unlink(missing_ok=True)
            return False
        try:
            # Claims go after the lock has changed: if it is the dead one's still, nobody was faster.
            now = _read(self._path)
            if now is None or now.token != seen.token:
                return False
            with new_file(self._path) as temporary:
                temporary.write_bytes(self._content())
            return True
        finally:
            claim.unlink(missing_ok=True)

    def _has_made(self, path: Path) -> bool:
        """Whether a file that names this process was made, since there was none."""
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except (FileExistsError, FileNotFoundError):
            # Or its folder, which was empty, has just been removed.
            return False
        try:
            with open(file, "wb") as opened:
                opened.write(self._content())
        except BaseException:
            # The disk is full, for instance: a file that names nobody would be waited for.
            path.unlink(missing_ok=True)
            raise
        return True

    def _content(self) -> bytes:
        # Of one length, so that it can be rewritten in place.
        return (json.dumps({**asdict(self._owner), "alive": utc_now()}) + "\n").encode()

    def _is_dead(self, path: Path, seen: _Seen) -> bool:
        """Whether the process that holds a lock is dead; False if it let it go while it was watched.

        Raises:
            InputError: it is alive.
        """
        is_earlier_start = bool(seen.owner and self._is_restart and seen.owner.job == self._owner.job)
        began = quiet_since = self._clock()
        has_told = False
        while True:
            is_alive = seen.owner.is_alive() if seen.owner else None
            if is_alive is False or (is_alive is None and self._clock() - quiet_since >= SECONDS_TO_DEATH):
                return True
            if is_alive and not is_earlier_start:
                raise self._refusal(path, seen)
            if not has_told and self._clock() - began > SECONDS_BETWEEN_LOOKS:
                has_told = True
                sys.stderr.write(f"{self._folder}: is held by {seen}: waiting to see whether it is still there\n")
            self._sleep(SECONDS_BETWEEN_LOOKS)
            now = _read(path)
            if now is None or now.token != seen.token:
                return False
            if now != seen:
                if not is_earlier_start:
                    raise self._refusal(path, now)
                seen, quiet_since = now, self._clock()
            if self._clock() - began >= SECONDS_TO_END:
                raise self._refusal(path, seen)

    def _refusal(self, path: Path, seen: _Seen) -> InputError:
        return InputError(
            f"{self._folder}: is written by {seen}: wait until that ends, end it, or choose another folder (if it is "
            f"certain that it is dead, remove {path})"
        )

    def _show_signs(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_SIGNS):
            # What fails now, as a server that is away, may succeed the next time; a lock that is lost is found out by
            # `refuse_lost`.
            with suppress(OSError), self._path.open("r+b") as file:
                if self._owner.token.encode() in file.read():
                    file.seek(0)
                    file.write(self._content())
