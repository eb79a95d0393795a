"""How much memory a process may still take."""

from __future__ import annotations

from pathlib import Path

from torchrec_amort.errors import InputError

# A package is read whole, and put into place table by table.
_TIMES_ITS_FILES = 1.5
_MEMINFO = Path("/proc/meminfo")
# Of a container: what it may have, and what it has.
_CGROUP = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def refuse_without_room(folder: Path, needed: int | None = None, *, available: int | None = None) -> None:
    """Refuse a package that does not fit beside what is in memory already.

    Args:
        folder: of the package, or of a delta.
        needed: bytes that it takes; those of all of its files, read and put into place, if None.
        available: bytes that may still be taken; what the system tells if None.

    Raises:
        InputError: names both numbers.

    Example::

        refuse_without_room(Path("packages/tuesday"))
    """
    available = available_bytes() if available is None else available
    if needed is None:
        needed = int(_TIMES_ITS_FILES * sum(path.stat().st_size for path in folder.iterdir()))
    if available is not None and needed > available:
        raise InputError(
            f"{folder}: needs {needed / 1e6:,.0f} MB beside the version that answers, but {available / 1e6:,.0f} MB "
            "are left: give the server more memory, or start it anew with this package"
        )


def available_bytes() -> int | None:
    """Bytes that this process may still take, of the machine and of its container; None where neither is told."""
    told = []
    if _MEMINFO.is_file():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        told.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = _CGROUP
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        told.append(int(most) - int(used.read_text()))
    return min(told, default=None)
