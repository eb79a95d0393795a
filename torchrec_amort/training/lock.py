"""A run's folder, held for all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from torchrec_amort.errors import InputError
from torchrec_amort.lock import FolderLock
from torchrec_amort.training.processes import is_first, restarts_of_all


@contextmanager
def run_lock(run: str | Path, device: torch.device) -> Iterator[FolderLock | None]:
    """Hold a run's folder, for as long as the ranks of this job write into it. All ranks call it together.

    Args:
        run: the run's folder.
        device: of this rank.

    Yields:
        FolderLock: on rank 0, which holds it for all; None on the others.

    Raises:
        InputError: another process holds it; on all ranks.

    Example::

        with run_lock("runs/first", device) as lock:
            train(model, data, config, Path("runs/first"), lock=lock)
    """
    is_restart = restarts_of_all(device) > 0
    lock = FolderLock(run, is_restart=is_restart) if is_first() else None
    refusal: InputError | OSError | None = None
    if lock is not None:
        try:
            lock.__enter__()
        except (InputError, OSError) as error:
            refusal = error
    refusals = [str(refusal) if refusal else None]
    dist.broadcast_object_list(refusals)
    if refusals[0] is not None:
        raise refusal or InputError(refusals[0])
    try:
        yield lock
    finally:
        if lock is not None:
            lock.__exit__()
