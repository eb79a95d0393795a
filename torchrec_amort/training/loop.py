"""The training loop and the evaluation loop."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchrec.distributed.train_pipeline import TrainPipelineBase
from torchrec.metrics.metrics_config import RecTaskInfo
from torchrec.metrics.ne import NEMetric
from tqdm import tqdm

from torchrec_amort.batch import RequestBatch
from torchrec_amort.files import write_text
from torchrec_amort.models.dlrm import AmortizedDLRM, AmortizedDLRMTrain
from torchrec_amort.progress import progress
from torchrec_amort.schema import RequestSchema
from torchrec_amort.training.checkpoint import Position, save_checkpoint
from torchrec_amort.training.metrics import auc, grouped_auc, log_loss, normalized_entropy
from torchrec_amort.training.processes import gather_on_first, is_first, sum_over_ranks
from torchrec_amort.training.sharding import ShardedModel

Precision = Literal["float32", "bfloat16"]
METRICS_FILE = "metrics.jsonl"


@dataclass(kw_only=True)
class LoopConfig:
    """How long and how to train.

    Args:
        epochs: times that the training split is read.
        precision: `float32`, or `bfloat16` for autocast; tables stay in float32.
        average_decay: keep a moving average of all weights, tables too, that decays by this much a step, and
            evaluate with it; no average unless given.
        log_every: steps between two reports.
        checkpoint_every: steps between two checkpoints; there is one after each epoch in any case.
    """

    epochs: int = 2
    precision: Precision = "float32"
    average_decay: float | None = None
    log_every: int = 50
    checkpoint_every: int | None = None


class GlobalBatchTrain(AmortizedDLRMTrain):
    """AmortizedDLRMTrain whose gradients, averaged over ranks, are those of the global batch's mean loss.

    Ranks differ in their numbers of candidates; the mean of their means would weigh candidates unequally.
    The loss it returns first is this rank's share; the detached one is the global batch's mean.

    Args:
        model: the model to train.
        precision: of the forward and backward pass.
    """

    def __init__(self, model: AmortizedDLRM, precision: Precision = "float32") -> None:
        super().__init__(model)
        self.autocast = precision == "bfloat16"

    def forward(self, batch: RequestBatch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """See `AmortizedDLRMTrain.forward`; all ranks call it together."""
        device = batch.num_candidates.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            loss, (detached, logits_CT, labels_CT) = super().forward(batch)
        candidates = labels_CT.shape[0]
        total_loss, total_candidates = sum_over_ranks(
            torch.stack([detached.double() * candidates, detached.new_tensor(candidates).double()])
        )
        share = dist.get_world_size() * candidates / total_candidates
        return loss * share.to(loss.dtype), (total_loss / total_candidates, logits_CT, labels_CT)


@dataclass
class TrainResult:
    """What a training did: for `train.json` and the summary on the screen.

    Args:
        steps: steps made, those before a resume included.
        seconds: of this process' training, checkpoints included.
        candidates: trained on in that time, all ranks together.
        losses: the mean loss of each report's steps in this process, nats.
    """

    steps: int = 0
    seconds: float = 0.0
    candidates: int = 0
    losses: list[float] = field(default_factory=list)


def train(
    model: ShardedModel,
    data: DataLoader[RequestBatch],
    config: LoopConfig,
    run: Path,
    start: Position,
) -> TrainResult:
    """Train over the epochs that are left, with reports and checkpoints. All ranks call it together.

    Args:
        model: of a `GlobalBatchTrain`.
        data: over a `RequestDataset`.
        config: how long and how.
        run: folder for `metrics.jsonl`, TensorBoard events and checkpoints.
        start: where to go on.

    Returns:
        TrainResult: of this rank.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = model.module.device
    dataset: Any = data.dataset
    steps_per_epoch = len(dataset)
    pipeline: TrainPipelineBase[RequestBatch, Any] = TrainPipelineBase(model.module, model.optimizer, device)
    result, position = TrainResult(steps=start.total_steps), start
    report = _Report(run, dataset.schema, dataset.batch_size, device, start.total_steps)
    model.module.train()
    started = time.perf_counter()
    with progress(
        total=config.epochs * steps_per_epoch,
        initial=start.total_steps,
        desc="train",
        unit="steps",
        disable=not is_first(),
    ) as bar:
        while position.epoch < config.epochs:
            dataset.set_position(epoch=position.epoch, step=position.step)
            batches = iter(data)
            for step in range(position.step, steps_per_epoch):
                report.add(*pipeline.progress(batches))
                bar.update()
                position = Position(position.epoch, step + 1, position.total_steps + 1)
                model.after_step(position.total_steps)
                ended = step + 1 == steps_per_epoch
                if ended:
                    position = Position(position.epoch + 1, 0, position.total_steps)
                if ended or position.total_steps % config.log_every == 0:
                    result.losses.append(report.write(position.total_steps, bar))
                if ended or position.total_steps % (config.checkpoint_every or math.inf) == 0:
                    save_checkpoint(run, model, position)
            pipeline.reset()
    result.seconds = time.perf_counter() - started
    result.steps, result.candidates = position.total_steps, report.close()
    return result


class _Report:
    """Loss, NE and speed since the last report: on the progress line, in TensorBoard and in a file."""

    def __init__(
        self, run: Path, schema: RequestSchema, batch_size: int, device: torch.device, total_steps: int
    ) -> None:
        self.tasks = schema.labels
        self.device = device
        self.candidates = 0
        self.file = run / METRICS_FILE
        self.tensorboard = SummaryWriter(str(run / "tensorboard")) if is_first() else None
        self.ne = NEMetric(
            world_size=dist.get_world_size(),
            my_rank=dist.get_rank(),
            batch_size=batch_size,
            # Only the whole time between two reports is read, but a window must hold a batch.
            window_size=batch_size * dist.get_world_size(),
            tasks=[RecTaskInfo(name=task, label_name=task, prediction_name=task) for task in self.tasks],
            compute_on_all_ranks=True,
        ).to(device)
        if is_first():
            self._forget_after(total_steps)
        self._restart()

    def _forget_after(self, total_steps: int) -> None:
        """Drop what a run that was resumed from an earlier checkpoint had already reported."""
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        write_text(self.file, "".join(line for line in lines if json.loads(line)["step"] <= total_steps))

    def _restart(self) -> None:
        self.ne.reset()
        self.loss, self.steps = torch.zeros((), dtype=torch.float64, device=self.device), 0
        self.since, self.candidates_before = time.perf_counter(), self.candidates

    def add(self, loss: Tensor, logits_CT: Tensor, labels_CT: Tensor) -> None:
        self.loss += loss
        self.steps += 1
        self.candidates += labels_CT.shape[0]
        predictions = torch.sigmoid(logits_CT.double())
        self.ne.update(
            predictions={task: predictions[:, t] for t, task in enumerate(self.tasks)},
            labels={task: labels_CT[:, t] for t, task in enumerate(self.tasks)},
            weights={task: torch.ones_like(labels_CT[:, t]) for t, task in enumerate(self.tasks)},
        )

    def write(self, total_steps: int, bar: tqdm[Any]) -> float:
        seconds = time.perf_counter() - self.since
        candidates = int(sum_over_ranks(torch.tensor([self.candidates - self.candidates_before], device=self.device)))
        record = {
            "step": total_steps,
            "loss": float(self.loss) / self.steps,
            "candidates_per_second": candidates / seconds,
        }
        for name, value in self.ne.compute().items():
            task, metric = name.split("-", 1)[1].split("|")
            if metric == "lifetime_ne":
                record[f"ne/{task}"] = float(value)
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(
                f"step {total_steps}: the loss is {record['loss']}: lower the learning rates, or look at the data"
            )
        if self.tensorboard is not None:
            for name, value in record.items():
                self.tensorboard.add_scalar(name, value, total_steps)
            with self.file.open("a") as file:
                file.write(json.dumps(record) + "\n")
        shown = {"loss": f"{record['loss']:.4f}", "cand/s": f"{record['candidates_per_second']:.0f}"}
        bar.set_postfix(shown | {k: f"{v:.4f}" for k, v in record.items() if k.startswith("ne/")}, refresh=False)
        self._restart()
        return record["loss"]

    def close(self) -> int:
        """Candidates seen by all ranks."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        return int(sum_over_ranks(torch.tensor([self.candidates], device=self.device)))


@dataclass(frozen=True)
class Predictions:
    """What a model makes of all candidates of a split.

    Args:
        logits: float32 [R, T].
        labels: float32 [R, T].
        users: int64 [R].
        requests: how many there were.
    """

    logits: np.ndarray
    labels: np.ndarray
    users: np.ndarray
    requests: int

    def save(self, path: Path) -> None:
        """Write the arrays as an npz file, whole or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, logits=self.logits, labels=self.labels, users=self.users)
        temporary.rename(path)

    def metrics(self, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """AUC, GAUC, NE, log loss and positive rate of each task.

        Raises:
            ValueError: a task has labels of one kind only.
        """
        return {
            task: {
                "auc": auc(self.logits[:, t], self.labels[:, t]),
                "gauc": grouped_auc(self.logits[:, t], self.labels[:, t], self.users),
                "ne": normalized_entropy(self.logits[:, t], self.labels[:, t]),
                "log_loss": log_loss(self.logits[:, t], self.labels[:, t]),
                "positive_rate": float(self.labels[:, t].mean(dtype=np.float64)),
            }
            for t, task in enumerate(tasks)
        }


@torch.no_grad()
def predict(module: torch.nn.Module, data: DataLoader[RequestBatch], device: torch.device) -> Predictions | None:
    """Score every candidate of a split. All ranks call it together.

    Args:
        module: a sharded `AmortizedDLRMTrain`.
        data: over a `RequestDataset`.
        device: of this rank.

    Returns:
        Predictions: of all ranks, on rank 0; None on the others.
    """
    module.eval()
    mine: list[tuple[np.ndarray, ...]] = []
    dataset: Any = data.dataset
    with progress(total=len(dataset), desc="evaluate", unit="steps", disable=not is_first()) as bar:
        for batch in data:
            _, (_, logits_CT, labels_CT) = module(batch.to(device))
            users_C = batch.users.repeat_interleave(batch.num_candidates)
            mine.append((logits_CT.float().cpu().numpy(), labels_CT.cpu().numpy(), users_C.numpy()))
            bar.update()
    logits, labels, users = (np.concatenate(parts) for parts in zip(*mine, strict=True))
    everyone = gather_on_first((logits, labels, users))
    if not is_first():
        return None
    logits, labels, users = (np.concatenate(parts) for parts in zip(*everyone, strict=True))
    return Predictions(logits, labels, users, dataset.num_requests)
