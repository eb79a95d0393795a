"""Quality of a trained model on a split."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from torchrec_amort.bounds import AT_LEAST_ONE, refuse_out_of_bounds
from torchrec_amort.data.counts import unknown_ids, unknown_in_words
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.errors import InputError
from torchrec_amort.files import write_json
from torchrec_amort.jobs.slices import HISTORY_LENGTH, slicings
from torchrec_amort.models.build import build_model
from torchrec_amort.modules.losses import TaskLosses
from torchrec_amort.schema import RequestSchema
from torchrec_amort.stores import location
from torchrec_amort.times import Span
from torchrec_amort.training.calibration import draw_calibration
from torchrec_amort.training.checkpoint import load_weights, refuse_ranks
from torchrec_amort.training.environment import track
from torchrec_amort.training.evaluation import EvaluateResult
from torchrec_amort.training.loop import GlobalBatchTrain, evaluate
from torchrec_amort.training.metrics import NAMES, SHOWN
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.predictions import PredictionFile
from torchrec_amort.training.processes import is_first
from torchrec_amort.training.run import TrainConfig, load_run
from torchrec_amort.training.sharding import shard


@dataclass(kw_only=True)
class EvaluateConfig:
    """Metrics of a run's best or, if it did not validate, last checkpoint on a split.

    GAUC is of users, weighted by their impressions. `docs/training.md` tells what each metric is.

    Args:
        run_folder: folder of a training run.
        data: prepared data folder; the one it was trained on unless given.
        split: `train`, `validation` or `test`.
        batch_size: requests in a global batch, all ranks together.
        history_length: keep at most this many events of each history, the latest ones; as many as it was trained with
            unless given.
        slice_by: tell the metrics that add up over requests of slices, too: by `history_length` (events of all
            histories together), by `unknown_candidates` (the share of the request's candidates that training did not
            read, for which the training split is read once), or by a feature of requests (the most frequent ids, or
            quantiles of a number).
        save_predictions: leave logits, labels, users and requests of all candidates in `predictions-SPLIT.npz`, too.
    """

    run_folder: str
    data: str | None = None
    split: str = "test"
    batch_size: int = 256
    history_length: int | None = None
    slice_by: list[str] = field(default_factory=lambda: [HISTORY_LENGTH])
    save_predictions: bool = False

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {AT_LEAST_ONE: ("batch_size",)})


def evaluate_run(config: EvaluateConfig, device: torch.device) -> None:
    """Evaluate, and leave the results in the run's folder. All ranks call it together.

    Args:
        config: what to evaluate on what.
        device: of this rank.

    Raises:
        InputError: it is no such folder, the data does not fit, `history_length` is above the model's, there is no such
            slice, or see `Evaluation.result`.
    """
    started = time.perf_counter()
    folder = Path(config.run_folder)
    predictions = folder / f"predictions-{config.split}.npz" if config.save_predictions else None
    run = load_run(config.run_folder, config.data)
    result, checkpoint = evaluate_split(config, run, device, predictions=predictions)
    if is_first():
        trained, data, schema = run
        read = schema.without(trained.model.leave_out)
        record = {
            "run": config.run_folder,
            "checkpoint": checkpoint,
            "data": data,
            "split": config.split,
            "history_length": _history_length(config, trained.model.longest_history(read)),
            "unknown_ids": unknown_ids(data, config.split, read),
            "world_size": dist.get_world_size(),
            "seconds": time.perf_counter() - started,
            **asdict(result),
        }
        _report(config, record)


def evaluate_split(
    config: EvaluateConfig,
    run: tuple[TrainConfig, str, RequestSchema],
    device: torch.device,
    *,
    predictions: Path | None = None,
    span: Span | None = None,
) -> tuple[EvaluateResult, str]:
    """Score a split by the checkpoint of a run that `load_weights` takes. All ranks call it together.

    Args:
        config: what to evaluate on what; its split may be `all` of them.
        run: what `load_run` tells of its run and data.
        device: of this rank.
        predictions: a file to leave all predictions in, if they are wanted.
        span: score the requests of these times alone; all if None.

    Returns:
        tuple: what was found, the same on all ranks, and the checkpoint's name.

    Raises:
        InputError: as `evaluate_run`.
    """
    trained, data, schema = run
    refuse_ranks(config.run_folder)
    read = schema.without(trained.model.leave_out)
    length = _history_length(config, trained.model.longest_history(read))
    lengths = trained.model.history_lengths(read, length)
    dataset = RequestDataset(
        data,
        config.split,
        batch_size=config.batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        history_length=lengths,
        schema=read,
        span=span,
    )
    ways = slicings(config.slice_by, read, data, lengths, config.batch_size)
    ranker = build_model(schema.without_pretrained(), trained.model)
    model = shard(
        GlobalBatchTrain(ranker, trained.loop.precision, TaskLosses(trained.loss, schema)),
        device=device,
        # Nothing is stepped; what trained it need not run on this device.
        optimizer=OptimizerConfig(),
        batch_size=config.batch_size,
        sharding=trained.sharding,
    ).module
    checkpoint = load_weights(config.run_folder, model)
    file = PredictionFile(len(schema.labels)) if predictions is not None else None
    loader = DataLoader(dataset, batch_size=None)
    result = evaluate(model, loader, device, trained.loss, slicings=ways, predictions=file)
    if file is not None and predictions is not None:
        file.write(predictions)
    return result, checkpoint.name


def _history_length(config: EvaluateConfig, longest: int) -> int:
    """How many events are kept of the longest history.

    Raises:
        InputError: the model knows no places for as many as are asked for.
    """
    if config.history_length is None:
        return longest
    if not 0 <= config.history_length <= longest:
        raise InputError(
            f"history_length is {config.history_length}, but the model of {config.run_folder} was trained with up to "
            f"{longest} events: ask for 0 to {longest}"
        )
    return config.history_length


def _report(config: EvaluateConfig, record: dict[str, Any]) -> None:
    path = Path(config.run_folder) / f"evaluate-{config.split}.json"
    write_json(path, record)
    track(config.run_folder, record)
    for task, values in record["tasks"].items():
        told = ", ".join(f"{NAMES[name]} {values[name]:.4f}" for name in (*SHOWN, "mse") if name in values)
        print(
            f"{config.run_folder} on {location(record['data']) / config.split} ({record['requests']:,} requests, "
            f"{record['candidates']:,} candidates), {task}: {told}"
        )
    print(f"unknown ids: {unknown_in_words(record['unknown_ids'])}")
    print(f"written to {path}")
    if find_spec("matplotlib") is None:
        print("calibration is not drawn: pip install 'torchrec-amort[report]'")
    elif record["calibration"]:
        draw_calibration(path.with_name(f"calibration-{config.split}.png"), record["calibration"])
