"""Trains as `torchrec-amort train` does, but the first rank waits in its first step until it is let go on.

The folder `PAUSED_TRAIN` gets a file `PID.waits`, and `goes_on` ends the wait.
"""

import os
import time
from pathlib import Path
from typing import Any

from torchrec.distributed.train_pipeline import TrainPipelineBase

from torchrec_amort.apps import train

_progress = TrainPipelineBase.progress
_folder = Path(os.environ["PAUSED_TRAIN"])


def progress(pipeline: Any, batches: Any) -> Any:
    loss = _progress(pipeline, batches)
    if os.environ.get("RANK", "0") == "0":
        (_folder / f"{os.getpid()}.waits").touch()
        while not (_folder / "goes_on").exists():
            time.sleep(0.01)
    return loss


if __name__ == "__main__":
    TrainPipelineBase.progress = progress
    train.main()
