"""Trains as `torchrec-amort train` does, but the second rank fails in its third step."""

import os
from typing import Any

from torchrec.distributed.train_pipeline import TrainPipelineBase

from torchrec_amort.apps import train

_progress = TrainPipelineBase.progress
_steps = iter(range(2))


def progress(pipeline: Any, batches: Any) -> Any:
    if os.environ["RANK"] == "1" and next(_steps, None) is None:
        raise RuntimeError("a cosmic ray")
    return _progress(pipeline, batches)


if __name__ == "__main__":
    TrainPipelineBase.progress = progress
    train.main()
