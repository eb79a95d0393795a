"""Files and folders that are either whole or not there."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrec_amort.schema import InputError


@contextmanager
def new_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder under a temporary name; it gets its own name once all is written.

    Args:
        folder: the folder to make.
        overwrite: replace a folder that is there.

    Yields:
        Path: the temporary folder, beside the one to make; removed if the body raises.

    Raises:
        InputError: the folder is there and may not be replaced, or cannot be written.

    Example::

        with new_folder("data/films") as temporary:
            (temporary / "part.txt").write_text("all or nothing")
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise InputError(f"{folder}: is there already: choose another folder, or allow to overwrite it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error}): choose another folder") from error
    try:
        temporary.chmod(0o755)
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file under a temporary name, then give it its own."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all. Numbers that are not finite are refused."""
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
