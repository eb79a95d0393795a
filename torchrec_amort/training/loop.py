"""The training loop and the evaluation loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchrec.distributed.train_pipeline import TrainPipeline, TrainPipelineBase, TrainPipelineSparseDist

from torchrec_amort.batch import RequestBatch
from torchrec_amort.bounds import AT_LEAST_ONE, BELOW_ONE, refuse_out_of_bounds
from torchrec_amort.errors import InputError
from torchrec_amort.lock import FolderLock
from torchrec_amort.models.dlrm import AmortizedDLRMTrain
from torchrec_amort.models.ranker import Ranker
from torchrec_amort.modules.losses import BatchLoss, Loss, LossConfig
from torchrec_amort.modules.next_action import NextAction
from torchrec_amort.progress import progress
from torchrec_amort.training.checkpoint import Best, CheckpointWriter, Position, load_checkpoint
from torchrec_amort.training.evaluation import EvaluateResult, Evaluation, Slicing
from torchrec_amort.training.metrics import MORE_IS_BETTER, Metric
from torchrec_amort.training.predictions import PredictionFile
from torchrec_amort.training.processes import Stopped, StopRequests, is_first, rows_of_all_ranks, sum_over_ranks
from torchrec_amort.training.report import Report
from torchrec_amort.training.sharding import ShardedModel

Precision = Literal["float32", "bfloat16"]
# Steps between two times that ranks ask each other whether one of them was told to stop.
AGREE_EVERY = 10


@dataclass(kw_only=True)
class LoopConfig:
    """How long and how to train.

    Args:
        epochs: times that the training split is read.
        precision: `float32`, or `bfloat16` for autocast; tables stay in float32.
        average_decay: keep a moving average of all weights, tables too, that decays by this much a step, and
            evaluate with it; no average unless given.
        log_every: steps between two reports.
        checkpoint_every: steps between two checkpoints; there is one after each epoch in any case, and one of each
            model that is the best so far.
        keep_checkpoints: how many checkpoints stay, the latest ones; that of the best model stays besides.
        validate_every: steps between two validations; none unless given.
        validate_requests: how many requests of the validation split a validation scores, the first ones.
        validate_metric: by which models are compared: its mean over the tasks that have it.
        patience: validations without a better model that end the training; it goes on to its last step unless given.
    """

    epochs: int = 2
    precision: Precision = "float32"
    average_decay: float | None = None
    log_every: int = 50
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    validate_every: int | None = None
    validate_requests: int = 10_000
    validate_metric: Metric = "ne"
    patience: int | None = None

    def __post_init__(self) -> None:
        refuse_out_of_bounds(
            self,
            {
                AT_LEAST_ONE: (
                    "epochs",
                    "log_every",
                    "checkpoint_every",
                    "keep_checkpoints",
                    "validate_every",
                    "validate_requests",
                    "patience",
                ),
                BELOW_ONE: ("average_decay",),
            },
            "loop.",
        )
        if self.patience is not None and self.validate_every is None:
            raise InputError(f"loop.patience is {self.patience}, but nothing is validated: give loop.validate_every")


class GlobalBatchTrain(AmortizedDLRMTrain):
    """AmortizedDLRMTrain whose gradients, averaged over ranks, are those of the global batch's loss.

    Ranks differ in their numbers of candidates, pairs and requests; the mean of their means would weigh these
    unequally.
    The loss it returns first is this rank's share; the detached one is the global batch's loss.

    Args:
        model: the ranker to train.
        precision: of the forward and backward pass.
        loss: see `AmortizedDLRMTrain`; a function is a mean over candidates.
        next_action: see `AmortizedDLRMTrain`.
    """

    def __init__(
        self,
        model: Ranker,
        precision: Precision = "float32",
        loss: Loss | BatchLoss = F.binary_cross_entropy_with_logits,
        next_action: NextAction | None = None,
    ) -> None:
        super().__init__(model, loss, next_action)
        self.loss.over_ranks = sum_over_ranks
        if next_action is not None:
            next_action.over_ranks, next_action.of_all_ranks = sum_over_ranks, rows_of_all_ranks
        self.autocast = precision == "bfloat16"

    def forward(self, batch: RequestBatch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """See `AmortizedDLRMTrain.forward`; all ranks call it together."""
        device = next(self.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            return super().forward(batch)


@dataclass
class TrainResult:
    """What a training did: for `train.json` and the summary on the screen.

    Args:
        steps: steps made, those before a resume included.
        seconds: of this process' training, checkpoints and validations included.
        candidates: trained on in that time, all ranks together.
        losses: the mean loss of each report's steps in this process, nats.
        best_checkpoint: name of the best model's checkpoint, if the run validated.
        best_value: of the metric that it validated by.
        stopped_early: whether it ended since no better model was found.
    """

    steps: int = 0
    seconds: float = 0.0
    candidates: int = 0
    losses: list[float] = field(default_factory=list)
    best_checkpoint: str | None = None
    best_value: float | None = None
    stopped_early: bool = False


def train(
    model: ShardedModel,
    data: DataLoader[RequestBatch],
    config: LoopConfig,
    run: Path,
    *,
    validation: DataLoader[RequestBatch] | None = None,
    loss: LossConfig | None = None,
    resume: bool = False,
    lock: FolderLock | None = None,
) -> TrainResult:
    """Train over the epochs that are left, with reports and checkpoints. All ranks call it together.

    Args:
        model: of a `GlobalBatchTrain`.
        data: over a `RequestDataset`.
        config: how long and how.
        run: folder for `metrics.jsonl`, TensorBoard events and checkpoints.
        validation: over a `RequestDataset` of what a validation scores, if there is to be any.
        loss: that the model has, which says what a validation measures; the default if None.
        resume: go on from the run's last good checkpoint.
        lock: of the run's folder, on rank 0; once it is lost, no checkpoint is written any more.

    Returns:
        TrainResult: of this rank.

    Raises:
        FloatingPointError: the loss is not finite.
        InputError: a checkpoint could not be loaded or written, or what is validated has no such metric.
        Stopped: a rank was asked to stop; there is a checkpoint of where it was.
    """
    device = model.module.device
    dataset: Any = data.dataset
    steps_per_epoch = len(dataset)
    report = Report(run, dataset.schema.labels, dataset.batch_size, device, dataset.schema.targets)
    position, best = load_checkpoint(run, model, report) if resume else (Position(), Best())
    report.forget_after(position.total_steps)
    pipeline = _pipeline(model, device)
    result = TrainResult()
    model.module.train()
    started = time.perf_counter()
    with (
        StopRequests() as requests,
        CheckpointWriter(run, config.keep_checkpoints, lock) as checkpoints,
        progress(
            total=config.epochs * steps_per_epoch,
            initial=position.total_steps,
            desc="train",
            unit="steps",
            disable=not is_first(),
        ) as bar,
    ):
        while position.epoch < config.epochs and not _is_exhausted(best, config):
            dataset.set_position(epoch=position.epoch, step=position.step)
            batches = _Batches(data)
            for step in range(position.step, steps_per_epoch):
                model.before_step(position.total_steps + 1)
                step_loss, logits_CT, labels_CT = pipeline.progress(batches)
                report.add(step_loss, logits_CT, labels_CT, batches.waited())
                bar.update()
                position = Position(position.epoch, step + 1, position.total_steps + 1)
                model.after_step(position.total_steps)
                ended = step + 1 == steps_per_epoch
                if ended:
                    position = Position(position.epoch + 1, 0, position.total_steps)
                found: dict[str, float] = {}
                if validation is not None and position.total_steps % (config.validate_every or math.inf) == 0:
                    with report.paused():
                        value = _validate(model, pipeline, validation, config.validate_metric, loss)
                    best = best.after(
                        position.total_steps, value, more_is_better=MORE_IS_BETTER[config.validate_metric]
                    )
                    found = {f"validation/{config.validate_metric}": value}
                if ended or found or position.total_steps % config.log_every == 0:
                    result.losses.append(report.write(position.total_steps, bar, found))
                stop = requests.of_any_rank() if position.total_steps % AGREE_EVERY == 0 else None
                is_best, is_exhausted = best.step == position.total_steps, _is_exhausted(best, config)
                is_due = position.total_steps % (config.checkpoint_every or math.inf) == 0
                if ended or stop or is_due or is_best or is_exhausted:
                    checkpoints.save(model, position, report, best)
                if stop:
                    checkpoints.wait()
                    raise Stopped(stop, f"{run}: stopped after step {position.total_steps}, which has a checkpoint")
                if is_exhausted:
                    break
            pipeline.reset()
    result.seconds = time.perf_counter() - started
    result.steps = position.total_steps
    if best.step:
        result.best_checkpoint, result.best_value = best.checkpoint, best.value
        result.stopped_early = _is_exhausted(best, config)
    result.candidates = int(sum_over_ranks(torch.tensor([report.candidates], device=device)))
    report.close()
    return result


def _is_exhausted(best: Best, config: LoopConfig) -> bool:
    """Whether training ends since validations found no better model for long enough."""
    return config.patience is not None and best.since >= config.patience


def _validate(
    model: ShardedModel,
    pipeline: TrainPipeline[RequestBatch, Any],
    data: DataLoader[RequestBatch],
    metric: Metric,
    loss: LossConfig | None,
) -> float:
    """The metric of the weights that a checkpoint of now would be used with, the same on every rank."""
    # What a checkpoint gets.
    model.broadcast_buffers()
    # Between two steps: a pipelined module takes lookups of its pipeline only.
    is_ahead = isinstance(pipeline, TrainPipelineSparseDist)
    if is_ahead:
        pipeline.detach()
    with nullcontext() if model.average is None else model.average.in_place():
        result = evaluate(model.module, data, model.module.device, loss, shows_progress=False)
    if is_ahead:
        pipeline.attach()
    model.module.train()
    values = [task[metric] for task in result.tasks.values() if metric in task]
    if not values:
        raise InputError(f"loop.validate_metric: no task has {metric}")
    value = torch.tensor(np.mean(values), device=model.module.device)
    # Sums over ranks may round in another way on each.
    dist.broadcast(value, 0)
    return float(value)


def _pipeline(model: ShardedModel, device: torch.device) -> TrainPipeline[RequestBatch, Any]:
    """On a GPU the next batches are copied, and their ids sent, while this one is trained on."""
    kind = TrainPipelineSparseDist if device.type == "cuda" else TrainPipelineBase
    return kind(model.module, model.optimizer, device)


class _Batches(Iterator[RequestBatch]):
    """The batches of an epoch, and how long they were waited for."""

    def __init__(self, data: DataLoader[RequestBatch]) -> None:
        self._batches, self._seconds = iter(data), 0.0

    def __next__(self) -> RequestBatch:
        started = time.perf_counter()
        batch = next(self._batches)
        self._seconds += time.perf_counter() - started
        return batch

    def waited(self) -> float:
        """Seconds since it was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@torch.no_grad()
def evaluate(
    module: torch.nn.Module,
    data: DataLoader[RequestBatch],
    device: torch.device,
    loss: LossConfig | None = None,
    *,
    slicings: Mapping[str, Slicing] | None = None,
    predictions: PredictionFile | None = None,
    shows_progress: bool = True,
) -> EvaluateResult:
    """Score every candidate of a split. All ranks call it together.

    Args:
        module: a sharded `AmortizedDLRMTrain`.
        data: over a `RequestDataset`.
        device: of this rank.
        loss: that was trained with; the default if None.
        slicings: ways to tell requests apart, by name.
        predictions: takes in all of them, if given.
        shows_progress: whether the first rank shows a line of it.

    Raises:
        InputError: see `Evaluation.result`.
    """
    module.eval()
    dataset: Any = data.dataset
    evaluation = Evaluation(dataset.schema.labels, loss, slicings)
    with progress(
        total=len(dataset), desc="evaluate", unit="steps", disable=not (shows_progress and is_first())
    ) as bar:
        for batch in data:
            _, (_, logits_CT, _) = module(batch.to(device))
            logits = logits_CT.float().cpu().numpy()
            evaluation.add(logits, batch)
            if predictions is not None:
                predictions.add(logits, batch)
            bar.update()
    return evaluation.result()
