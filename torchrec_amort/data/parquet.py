"""Which files of a folder are its data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

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
