"""Which files of a folder are its data, and whether they have their columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torchrec_amort.errors import InputError

# Spark's leftovers (`_temporary`), macOS' `._part.parquet`, files that are being written: Hive, Spark and Arrow skip
# them, too.
HIDDEN = "_."


def visible_files(found: Iterable[Path], top: Path, hidden: str = HIDDEN) -> list[Path]:
    """The files that are data, in the order of their names.

    Args:
        found: paths below `top`.
        top: the folder that was given. Its own name, and those of its parents, tell nothing.
        hidden: first letters of names of files and folders that are skipped.

    Example::

        visible_files(Path("log").rglob("*.parquet"), Path("log"))
    """
    return sorted(
        path for path in found if path.is_file() and not any(p[0] in hidden for p in path.relative_to(top).parts)
    )


def refuse_missing_columns(path: Path, columns: Iterable[str], present: Sequence[str]) -> None:
    """Raise an `InputError` that names the first of the columns that a published file does not have."""
    if missing := [column for column in columns if column not in present]:
        raise InputError(
            f"{path}: column {missing[0]!r} is missing (there are {list(present)}): take the file as published"
        )
