"""How many CPU cores this process may use: a container's quota is often smaller than its host."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath


@cache
def usable_cores(root: Path = Path("/")) -> int:
    """CPU cores that the process may use at the same time, by its affinity and the quotas of its control groups.

    More threads than these would wait for each other. It is read once.

    Args:
        root: where `proc` and `sys` are.

    Returns:
        int: 1 or more; a part of a core counts as one.

    Example::

        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    """
    # The process', where the calling thread may be bound to fewer.
    of_process = len(os.sched_getaffinity(os.getpid())) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([of_process, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Cores that each control group of the process is limited to, from its own up to the root."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(path.lstrip("/"))
        # Where the group's own folder is not to be seen, as in a container, the root is the container's.
        for level in (group, *group.parents):
            if controllers:
                folder = mounts / controllers / level
                quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            else:
                quota, _, period = _read(mounts / level / "cpu.max").partition(" ")
            if quota and period and quota not in ("max", "-1"):
                yield int(quota) / int(period)


def _read(path: Path) -> str:
    """A file's text; none if there is no such file here."""
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
