"""`torchrec-amort evaluate`: quality of a trained model on a split."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch.utils.data import DataLoader

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.apps.train import load_run
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.files import write_json
from torchrec_amort.models.build import build_model
from torchrec_amort.training.checkpoint import last_checkpoint, load_weights
from torchrec_amort.training.loop import GlobalBatchTrain, predict
from torchrec_amort.training.processes import process_group
from torchrec_amort.training.sharding import shard


@dataclass(kw_only=True)
class EvaluateConfig:
    """AUC, GAUC (per user, weighted by impressions) and NE of a run's last checkpoint on a split.

    Args:
        run_folder: folder of a training run.
        data: prepared data folder; the one it was trained on unless given.
        split: `train`, `validation` or `test`.
        batch_size: requests in a global batch, all ranks together.
    """

    run_folder: str
    data: str | None = None
    split: str = "test"
    batch_size: int = 256


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; it leaves `evaluate-SPLIT.json` in the run's folder.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--run_folder", "runs/first", "--split", "validation"])
    """
    config = parse(EvaluateConfig, "evaluate", args)
    run_command(lambda: _evaluate(config))


def _evaluate(config: EvaluateConfig) -> None:
    with process_group() as device:
        trained, data, schema = load_run(config.run_folder, config.data)
        dataset = RequestDataset(
            data,
            config.split,
            batch_size=config.batch_size,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            history_length=trained.model.history_length,
        )
        model = shard(
            GlobalBatchTrain(build_model(schema, trained.model), trained.loop.precision),
            device=device,
            optimizer=trained.optimizer,
            batch_size=config.batch_size,
        ).module
        load_weights(config.run_folder, model)
        started = time.perf_counter()
        predictions = predict(model, DataLoader(dataset, batch_size=None), device)
        if predictions is not None:
            tasks = predictions.metrics(schema.labels)
            record = {
                "run": config.run_folder,
                "checkpoint": last_checkpoint(config.run_folder).name,
                "data": data,
                "split": config.split,
                "requests": predictions.requests,
                "candidates": len(predictions.labels),
                "users": len(np.unique(predictions.users)),
                "world_size": dist.get_world_size(),
                "seconds": time.perf_counter() - started,
                "tasks": tasks,
            }
            path = Path(config.run_folder) / f"evaluate-{config.split}.json"
            write_json(path, record)
            for task, values in tasks.items():
                print(
                    f"{config.run_folder} on {data}/{config.split} ({predictions.requests:,} requests, "
                    f"{len(predictions.labels):,} candidates), {task}: AUC {values['auc']:.4f}, "
                    f"GAUC {values['gauc']:.4f}, NE {values['ne']:.4f}"
                )
            print(f"written to {path}")


if __name__ == "__main__":
    main()
