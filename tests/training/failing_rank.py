"""Trains as `torchrec-amort train` does, but something fails.

The first argument says what: the second rank of the first start `raises` in its fifteenth step or `is_killed` there,
once there is a checkpoint, or each rank `has_a_full_disk`.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrec.distributed.train_pipeline import TrainPipelineBase

from torchrec_amort.apps import train

_progress = TrainPipelineBase.progress
_steps = iter(range(14))


def progress(pipeline: Any, batches: Any) -> Any:
    is_to_fail = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if is_to_fail and next(_steps, None) is None:
        fail()
    return _progress(pipeline, batches)


def fail() -> None:
    if sys.argv[1] == "raises":
        raise RuntimeError("a cosmic ray")
    checkpoints = Path(sys.argv[sys.argv.index("--run_folder") + 1], "checkpoints")
    # Checkpoints are written in the background.
    while not list(checkpoints.glob("step-*")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on the size of files stands for the disk's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


if __name__ == "__main__":
    if sys.argv[1] == "has_a_full_disk":
        with full_disk():
            train.main(sys.argv[2:])
    else:
        TrainPipelineBase.progress = progress
        train.main(sys.argv[2:])
