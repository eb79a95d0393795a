"""Trains as `torchrec-amort train` does, but the second rank of the first start ends in its fifteenth step.

The first argument says how: `raises`, or `is_killed`, once there is a checkpoint.
"""

import os
import signal
import sys
import time
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


if __name__ == "__main__":
    TrainPipelineBase.progress = progress
    train.main(sys.argv[2:])
