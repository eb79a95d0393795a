"""Which files of a folder are its data, and whether they have their columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from torchrec_amort.errors import InputError
from torchrec_amort.stores import Location, Stored

# Spark's leftovers (`_temporary`), macOS' `._part.parquet`, files that are being written: Hive, Spark and Arrow skip
# them, too.
HIDDEN = "_."

OneLocation = TypeVar("OneLocation", bound=Location)


def visible_files(found: Iterable[OneLocation], top: OneLocation, hidden: str = HIDDEN) -> list[OneLocation]:
    """The files that are data, in the order of their names.

    Args:
        found: paths below `top`.
        top: the folder that was given. Its own name, and those of its parents, tell nothing.
        hidden: first letters of names of files and folders that are skipped.

    Example::

        visible_files(Path("log").rglob("*.parquet"), Path("log"))
    """
    # What a store lists are files.
    files = {path.parts[len(top.parts) :]: path for path in found if isinstance(path, Stored) or path.is_file()}
    return [files[parts] for parts in sorted(files) if not any(part[0] in hidden for part in parts)]


def refuse_missing_columns(path: Path, columns: Iterable[str], present: Sequence[str]) -> None:
    """Raise an `InputError` that names the first of the columns that a published file does not have."""
    if missing := [column for column in columns if column not in present]:
        raise InputError(
            f"{path}: column {missing[0]!r} is missing (there are {list(present)}): take the file as published"
        )
