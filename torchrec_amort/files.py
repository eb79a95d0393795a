"""Files and folders that are either whole or not there."""

from __future__ import annotations

import errno
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torchrec_amort.errors import InputError
from torchrec_amort.stores import Location, local_path


@contextmanager
def new_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder under a temporary name; it gets its own name once all is written.

    Args:
        folder: the folder to make.
        overwrite: replace a folder that is there.

    Yields:
        Path: the temporary folder, beside the one to make; removed if the body raises.

    Raises:
        InputError: the folder is there and may not be replaced, or cannot be written, or is a URI.

    Example::

        with new_folder("data/films") as temporary:
            (temporary / "part.txt").write_text("all or nothing")
    """
    folder = local_path(folder)
    refuse_existing(folder, overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error}): choose another folder") from error
    replaced = temporary.with_name(f"{temporary.name}.replaced")
    try:
        temporary.chmod(0o755)
        yield temporary
        # Again and again: another process may have made the folder since it was looked for.
        while not _has_become(temporary, folder):
            if not overwrite:
                raise is_there(folder)
            shutil.rmtree(replaced, ignore_errors=True)
            # Out of the way as a whole, so that nobody reads half of it.
            with suppress(FileNotFoundError):
                folder.rename(replaced)
    finally:
        if replaced.exists() and not folder.exists():
            with suppress(OSError):
                replaced.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is there, unless it may be replaced."""
    if folder.exists() and not overwrite:
        raise is_there(folder)


def is_there(folder: Location) -> InputError:
    """What to say of a folder that was to be made."""
    return InputError(f"{folder}: is there already: choose another folder, or allow to overwrite it")


def _has_become(temporary: Path, folder: Path) -> bool:
    """Whether the temporary folder got its name, which nothing else had."""
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Fill a file under a temporary name; it gets its own name, and takes the place of one before, once it is whole.

    Args:
        path: the file to make; its folder is made if need be.

    Yields:
        Path: the temporary file, beside the one to make and with its suffix; removed if the body raises.

    Raises:
        InputError: it is a URI.

    Example::

        with new_file("data/films.npz") as temporary:
            np.savez(temporary, ids=ids_N)
    """
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its own for each writer, or two that write the same file at once would write into each other's.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all. Numbers that are not finite are refused."""
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def utc_now() -> str:
    """The time, to the second, as records have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
