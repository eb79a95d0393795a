"""Quality of a trained model on a split."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from torchrec_amort.bounds import AT_LEAST_ONE, refuse_out_of_bounds
from torchrec_amort.data.counts import unknown_ids, unknown_in_words
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.errors import InputError
from torchrec_amort.files import write_json
from torchrec_amort.models.build import build_model
from torchrec_amort.modules.losses import TaskLosses
from torchrec_amort.stores import location
from torchrec_amort.times import Span
from torchrec_amort.training.checkpoint import load_weights, refuse_ranks
from torchrec_amort.training.environment import track
from torchrec_amort.training.loop import GlobalBatchTrain, Predictions, predict
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.run import load_run
from torchrec_amort.training.sharding import shard


@dataclass(kw_only=True)
class EvaluateConfig:
    """AUC, GAUC, mean AUC of requests and NE of a run's best or, if it did not validate, last checkpoint on a split.

    GAUC is of users, weighted by their impressions.

    Args:
        run_folder: folder of a training run.
        data: prepared data folder; the one it was trained on unless given.
        split: `train`, `validation` or `test`.
        batch_size: requests in a global batch, all ranks together.
        history_length: keep at most this many events of each history, the latest ones; as many as it was trained with
            unless given.
        save_predictions: leave logits, labels, users and requests of all candidates in `predictions-SPLIT.npz`, too.
    """

    run_folder: str
    data: str | None = None
    split: str = "test"
    batch_size: int = 256
    history_length: int | None = None
    save_predictions: bool = False

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {AT_LEAST_ONE: ("batch_size",)})


def evaluate_run(config: EvaluateConfig, device: torch.device) -> None:
    """Evaluate, and leave the results in the run's folder. All ranks call it together.

    Args:
        config: what to evaluate on what.
        device: of this rank.

    Raises:
        InputError: as `predict_split`.
    """
    started = time.perf_counter()
    predictions, checkpoint = predict_split(
        config.run_folder,
        config.split,
        device,
        data=config.data,
        batch_size=config.batch_size,
        history_length=config.history_length,
    )
    if predictions is not None:
        _report(config, predictions, checkpoint.name, time.perf_counter() - started)


def predict_split(
    run_folder: str,
    split: str,
    device: torch.device,
    *,
    data: str | None = None,
    batch_size: int = 256,
    history_length: int | None = None,
    span: Span | None = None,
) -> tuple[Predictions | None, Path]:
    """Score a split by the checkpoint of a run that `load_weights` takes. All ranks call it together.

    Args:
        run_folder: folder of a training run.
        split: `train`, `validation`, `test`, or `all` of them.
        device: of this rank.
        data: prepared data folder; the one it was trained on unless given.
        batch_size: requests in a global batch, all ranks together.
        history_length: keep at most this many events of each history; the length it was trained with unless given.
        span: score the requests of these times alone; all if None.

    Returns:
        tuple: the predictions of all ranks on rank 0, None on the others; and the checkpoint's folder.

    Raises:
        InputError: it is no such folder, the data does not fit, or `history_length` is above the model's.
    """
    trained, data, schema = load_run(run_folder, data)
    refuse_ranks(run_folder)
    read = schema.without(trained.model.leave_out)
    longest = trained.model.longest_history(read)
    if history_length is not None and not 0 <= history_length <= longest:
        raise InputError(
            f"history_length is {history_length}, but the model of {run_folder} was trained with up to {longest} "
            f"events: ask for 0 to {longest}"
        )
    dataset = RequestDataset(
        data,
        split,
        batch_size=batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        history_length=trained.model.history_lengths(read, history_length),
        schema=read,
        span=span,
    )
    ranker = build_model(schema.without_pretrained(), trained.model)
    model = shard(
        GlobalBatchTrain(ranker, trained.loop.precision, TaskLosses(trained.loss, schema)),
        device=device,
        # Nothing is stepped; what trained it need not run on this device.
        optimizer=OptimizerConfig(),
        batch_size=batch_size,
        sharding=trained.sharding,
    ).module
    checkpoint = load_weights(run_folder, model)
    return predict(model, DataLoader(dataset, batch_size=None), device), checkpoint


# Metrics of a task that are told on the screen.
_SHOWN = {"auc": "AUC", "gauc": "GAUC", "request_auc": "AUC of requests", "ne": "NE", "mse": "mean squared error"}


def _report(config: EvaluateConfig, predictions: Predictions, checkpoint: str, seconds: float) -> None:
    trained, data, schema = load_run(config.run_folder, config.data)
    tasks = predictions.metrics(schema.labels, trained.loss)
    read = schema.without(trained.model.leave_out)
    unknown = unknown_ids(data, config.split, read)
    results = {
        "run": config.run_folder,
        "checkpoint": checkpoint,
        "data": data,
        "split": config.split,
        "history_length": trained.model.longest_history(read)
        if config.history_length is None
        else config.history_length,
        "requests": predictions.num_requests,
        "candidates": len(predictions.labels),
        "users": len(np.unique(predictions.users)),
        "unknown_ids": unknown,
        "world_size": dist.get_world_size(),
        "seconds": seconds,
        "tasks": tasks,
    }
    if config.save_predictions:
        predictions.save(Path(config.run_folder) / f"predictions-{config.split}.npz")
    path = Path(config.run_folder) / f"evaluate-{config.split}.json"
    write_json(path, results)
    track(config.run_folder, results)
    for task, values in tasks.items():
        told = ", ".join(f"{shown} {values[name]:.4f}" for name, shown in _SHOWN.items() if name in values)
        print(
            f"{config.run_folder} on {location(data) / config.split} ({predictions.num_requests:,} requests, "
            f"{len(predictions.labels):,} candidates), {task}: {told}"
        )
    print(f"unknown ids: {unknown_in_words(unknown)}")
    print(f"written to {path}")
