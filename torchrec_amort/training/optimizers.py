"""What moves weights: optimizers of tables and of all else, and their learning rates over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import LAMB, Adam, PartialRowWiseAdam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_amort.bounds import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, POSITIVE, refuse_out_of_bounds
from torchrec_amort.errors import InputError

TableOptimizer = Literal["rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb"]
DenseOptimizer = Literal["adamw", "adam", "sgd"]
Decay = Literal["constant", "linear", "cosine", "step"]

_OF_TABLES: dict[TableOptimizer, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": Adam,
    "partial_rowwise_adam": PartialRowWiseAdam,
    "lamb": LAMB,
}
_OF_DENSE: dict[DenseOptimizer, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


@dataclass(kw_only=True)
class ScheduleConfig:
    """How a learning rate changes over the steps of all epochs.

    Args:
        warmup_steps: steps in which the rate rises linearly; the last of them is the first with the whole rate.
        decay: how the rate falls after them: `constant`, not at all; `linear` or `cosine`, to `end_factor` of it at
            `end_step`; `step`, by `step_factor` every `step_size` steps.
        end_step: steps after which the rate changes no more, the warm-up included; needed unless `decay` is
            `constant`.
        end_factor: share of the rate that a `linear` or `cosine` decay leaves.
        step_size: steps from one fall to the next, for `step`.
        step_factor: share of the rate that a fall leaves, for `step`.

    Raises:
        InputError: `end_step` is missing, not after the warm-up, or without a decay that ends there.

    Example::

        ScheduleConfig(warmup_steps=1000, decay="cosine", end_step=20_000, end_factor=0.1).factor(1)  # 0.001
    """

    warmup_steps: int = 0
    decay: Decay = "constant"
    end_step: int | None = None
    end_factor: float = 0.0
    step_size: int = 1000
    step_factor: float = 0.5

    def __post_init__(self) -> None:
        refuse_out_of_bounds(
            self,
            {
                NOT_NEGATIVE: ("warmup_steps",),
                AT_LEAST_ONE: ("end_step", "step_size"),
                BELOW_ONE: ("end_factor", "step_factor"),
            },
            "schedule.",
        )
        if (self.decay == "constant") != (self.end_step is None):
            raise InputError(
                f"schedule.decay is {self.decay} and schedule.end_step {self.end_step}: a decay needs the step at "
                "which it ends, and constant has none"
            )
        if self.end_step is not None and self.end_step <= self.warmup_steps:
            raise InputError(
                f"schedule.end_step is {self.end_step}, but the warm-up takes {self.warmup_steps} steps: give more"
            )

    def factor(self, step: int) -> float:
        """The share of the rate that a step is made with, the first one being 1."""
        before = step - 1
        if before < self.warmup_steps:
            return step / self.warmup_steps
        if self.end_step is None:
            return 1.0
        decayed = min(before, self.end_step) - self.warmup_steps
        if self.decay == "step":
            return float(self.step_factor ** (decayed // self.step_size))
        share = decayed / (self.end_step - self.warmup_steps)
        left = 1 - share if self.decay == "linear" else (1 + math.cos(math.pi * share)) / 2
        return self.end_factor + (1 - self.end_factor) * left


@dataclass(kw_only=True)
class ParameterGroup:
    """Weights that are no tables, and how the optimizer treats them otherwise than the rest.

    Args:
        pattern: of the weights' names in the model's state dict, as `*.bias`; `*` stands for anything.
        lr: their learning rate, to which `dense_schedule` applies too; `dense_lr` unless given.
        weight_decay: theirs; that of the rest unless given.
    """

    pattern: str
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {NOT_NEGATIVE: ("lr", "weight_decay")}, "optimizer.groups.")


@dataclass(kw_only=True)
class OptimizerConfig:
    """How weights are moved.

    Args:
        table_optimizer: of the embedding tables, fused with their lookup: `rowwise_adagrad`, or on CUDA `adam`,
            `partial_rowwise_adam` or `lamb`, too.
        table_lr: its learning rate.
        table_eps: its epsilon.
        table_schedule: how that rate changes over the steps.
        table_weight_decay: share by which all rows of the tables shrink in a step.
        dense_optimizer: of all other weights: `adamw`, `adam` or `sgd`.
        dense_lr: its learning rate.
        dense_schedule: how that rate changes over the steps.
        weight_decay: weight decay of all other weights: decoupled from the gradient by `adamw`, added to it by the
            others.
        groups: weights with another rate or weight decay; the first one whose pattern a name has counts.
        clip_norm: the norm of the gradient of all other weights together, above which it is scaled down to it; not
            bounded unless given.
    """

    table_optimizer: TableOptimizer = "rowwise_adagrad"
    table_lr: float = 0.05
    table_eps: float = 1e-8
    table_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    table_weight_decay: float = 0.0
    dense_optimizer: DenseOptimizer = "adamw"
    dense_lr: float = 2e-3
    dense_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    weight_decay: float = 0.01
    groups: list[ParameterGroup] = field(default_factory=list)
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        refuse_out_of_bounds(
            self,
            {
                NOT_NEGATIVE: ("table_lr", "table_eps", "dense_lr", "weight_decay"),
                BELOW_ONE: ("table_weight_decay",),
                POSITIVE: ("clip_norm",),
            },
            "optimizer.",
        )


class LearningRates:
    """The learning rates of a model's optimizers, as their schedules have them. They depend on the step alone.

    Args:
        scheduled: optimizers with the rates that schedules start from, each with its schedule.

    Example::

        rates = LearningRates([(optimizer, ScheduleConfig(warmup_steps=100))])
        for step in range(1, 1001):
            rates.set(step)
            train_step()
    """

    def __init__(self, scheduled: Sequence[tuple[KeyedOptimizer, ScheduleConfig]]) -> None:
        self._groups: list[tuple[dict[str, Any], float, ScheduleConfig]] = [
            (group, group["lr"], schedule) for optimizer, schedule in scheduled for group in optimizer.param_groups
        ]
        self._fused = [fused for optimizer, _ in scheduled for fused in _fused_optimizers(optimizer)]

    def set(self, step: int) -> None:
        """Set the rates that a step is made with, the first one being 1."""
        for group, rate, schedule in self._groups:
            group["lr"] = rate * schedule.factor(step)
        for fused in self._fused:
            # The lookup steps in backward, with the rate that it was given last.
            fused.step()
            # It counts its own calls, those that evaluate too, and its count is in no state dict.
            for count in (fused._emb_module.iter, fused._emb_module.iter_cpu):
                count.fill_(step - 1)


def _fused_optimizers(optimizer: KeyedOptimizer) -> Iterator[EmbeddingFusedOptimizer]:
    """The optimizers of single lookups of fbgemm."""
    if isinstance(optimizer, EmbeddingFusedOptimizer):
        yield optimizer
    elif isinstance(optimizer, CombinedOptimizer):
        for _, part in optimizer.optimizers:
            yield from _fused_optimizers(part)


def fuse_table_optimizer(tables: Iterable[nn.Parameter], config: OptimizerConfig, device: torch.device) -> None:
    """Have tables stepped in backward once they are sharded.

    Args:
        tables: before they are sharded.
        config: their optimizer and its rate.
        device: of the lookups.

    Raises:
        InputError: fbgemm has no such optimizer on that device.
    """
    if device.type == "cpu" and config.table_optimizer != "rowwise_adagrad":
        raise InputError(
            f"optimizer.table_optimizer is {config.table_optimizer}, which fbgemm does not have on a CPU: use "
            "rowwise_adagrad, or train on CUDA"
        )
    apply_optimizer_in_backward(
        _OF_TABLES[config.table_optimizer], tables, {"lr": config.table_lr, "eps": config.table_eps}
    )


def copied_table_optimizer(tables: Mapping[str, Tensor], config: OptimizerConfig) -> KeyedOptimizer:
    """Steps data-parallel tables as the fused optimizer would.

    Args:
        tables: by their keys in the state dict.
        config: their optimizer and its rate.

    Raises:
        InputError: PyTorch has no optimizer that does the same.
    """
    if config.table_optimizer != "rowwise_adagrad":
        table = next(iter(tables)).rsplit(".", 2)[1]
        raise InputError(
            f"optimizer.table_optimizer is {config.table_optimizer}, but table {table!r} is data_parallel, which "
            f"rowwise_adagrad alone steps: use it, or allow another way in sharding.tables.{table}.ways"
        )
    return KeyedOptimizerWrapper(tables, lambda rows: RowWiseAdagrad(rows, lr=config.table_lr, eps=config.table_eps))


def dense_optimizer(weights: Mapping[str, Tensor], config: OptimizerConfig) -> KeyedOptimizer:
    """Steps all weights that are not tables.

    DistributedDataParallel gives all ranks the same gradients, so the norm that clips them is that of all ranks.

    Args:
        weights: by their keys in the state dict.
        config: their optimizer, its rate and groups, and the bound of the norm.

    Raises:
        InputError: a group has no weight.
    """
    groups = _groups(weights, config.groups)
    optimizer: KeyedOptimizer = KeyedOptimizerWrapper(
        weights,
        lambda _: _OF_DENSE[config.dense_optimizer](groups, lr=config.dense_lr, weight_decay=config.weight_decay),
    )
    if config.clip_norm is None:
        return optimizer
    return GradientClippingOptimizer(optimizer, GradientClipping.NORM, max_gradient=config.clip_norm)


def _groups(weights: Mapping[str, Tensor], groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """The groups of a PyTorch optimizer: the rest, and each that is configured."""
    options = [{name: getattr(group, name) for name in ("lr", "weight_decay")} for group in groups]
    found: list[dict[str, Any]] = [
        {"params": [], **{name: value for name, value in of_group.items() if value is not None}}
        for of_group in [*options, {}]
    ]
    for name, weight in weights.items():
        places = [place for place, group in enumerate(groups) if fnmatchcase(name, group.pattern)]
        found[places[0] if places else -1]["params"].append(weight)
    for group, of_group in zip(groups, found, strict=False):
        if not of_group["params"]:
            raise InputError(
                f"optimizer.groups: no weight is left for the pattern {group.pattern!r}; the weights are "
                f"{', '.join(sorted(weights)[:5])}, …: correct it, or leave it out"
            )
    return found
