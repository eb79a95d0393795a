"""History encoders on one data set, over several seeds, with one budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from torchrec_amort.bench.compare_report import write_report
from torchrec_amort.bench.speed import SpeedConfig, measure_speed, requests_to_score
from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, refuse_out_of_bounds
from torchrec_amort.config import flat_fields, with_overrides
from torchrec_amort.data.counts import unknown_ids
from torchrec_amort.errors import InputError
from torchrec_amort.jobs.evaluate import EvaluateConfig, evaluate_run
from torchrec_amort.jobs.train import train_if_needed
from torchrec_amort.models.build import ENCODERS, Encoder, ModelConfig, build_model
from torchrec_amort.modules.losses import LossConfig
from torchrec_amort.schema import RequestSchema
from torchrec_amort.training.bootstrap import UserWeightedMetrics, paired_differences
from torchrec_amort.training.lock import run_lock
from torchrec_amort.training.loop import LoopConfig
from torchrec_amort.training.metrics import MORE_IS_BETTER, Metric
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.processes import is_first, process_group
from torchrec_amort.training.run import TrainConfig

META = torch.device("meta")


@dataclass(kw_only=True)
class CompareConfig:
    """Train and test several history encoders on one data set, and say how good and how fast each is.

    Each arm tries every setting of `grid` with the first seed; the one with the best `choose_by` on the validation
    split, the mean over tasks, is trained with all seeds and tested. A comparison that was stopped goes on where it
    was.

    Args:
        data: prepared data folder.
        out: folder for all runs, and for compare.json, compare.md and compare.png.
        encoders: arms that differ in `model.history` alone; all but `matches`, which reads one feature, unless given.
        variants: further arms: a name, and the fields in which it differs, as `model.history_length: 200`.
        reference: the arm that the others are compared with.
        controls: for an arm, the one that it is compared with beside the reference, such as that of other users'
            histories.
        seeds: of initial weights and of the order of the data.
        grid: settings that each arm tries on the validation split: fields and their values.
        choose_by: the metric by which an arm chooses one of them.
        model: what all arms have in common.
        loss: what is minimized.
        optimizer: how weights are moved.
        loop: the budget: how long to train.
        batch_size: requests in a global batch, all ranks together.
        unknown_rate: as for `train`.
        num_workers: processes of each rank that read data.
        bootstrap_samples: resamples of users for the intervals of differences.
        speed: what training and scoring speed are measured on.
    """

    data: str
    out: str
    encoders: list[Encoder] = field(default_factory=lambda: [word for word in ENCODERS if word != "matches"])
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference: str = "append_cross"
    controls: dict[str, str] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    grid: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    choose_by: Metric = "ne"
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    batch_size: int = 32
    unknown_rate: dict[str, float] = field(default_factory=dict)
    num_workers: int = 0
    bootstrap_samples: int = 1000
    speed: SpeedConfig = field(default_factory=SpeedConfig)

    def __post_init__(self) -> None:
        at_least_one = ("batch_size", "bootstrap_samples")
        refuse_out_of_bounds(self, {AT_LEAST_ONE: at_least_one, NOT_NEGATIVE: ("seeds", "num_workers")})


def run_comparison(config: CompareConfig) -> None:
    """Train, test and time all arms, and leave what was found in the folder. All ranks call it together.

    Args:
        config: what to compare.

    Raises:
        InputError: the data is missing or does not fit, or the folder has runs of another comparison.
    """
    arms = _arms(config)
    schema = RequestSchema.load(config.data)
    schema.refuse_targets("compare")
    longest = max(_longest(setting, schema) for settings in arms.values() for setting in settings)
    # Refused, if it is, before hours of training.
    requests = requests_to_score(config.data, config.speed, longest)
    with process_group() as device, run_lock(config.out, device):
        chosen, tuning = {}, {}
        for name, settings in arms.items():
            tuning[name], chosen[name] = _tune(name, settings, config, device)
        results = {name: [_evaluated(run, "test", device) for run in _runs(chosen[name], config)] for name in arms}
        speed = measure_speed(chosen, requests, config.speed, device)
        if is_first():
            record = {
                "data": config.data,
                "seeds": config.seeds,
                "reference": config.reference,
                "config": asdict(config),
                "arms": {
                    name: {
                        "setting": _difference(arms[name][0], chosen[name]),
                        "is_amortizable": build_model(schema, chosen[name].model, device=META).is_amortizable,
                        f"validation_{config.choose_by}": tuning[name],
                        "test": [result["tasks"] for result in results[name]],
                        "slices": [result["slices"] for result in results[name]],
                    }
                    for name in arms
                },
                **_differences(chosen, config),
                "unknown_ids": unknown_ids(config.data, "test", schema),
                "speed": speed,
            }
            write_report(Path(config.out), record)


def _arms(config: CompareConfig) -> dict[str, list[TrainConfig]]:
    """For each arm, what it is to be trained with in each setting of the grid."""
    base = TrainConfig(
        data=config.data,
        run_folder=config.out,
        model=config.model,
        loss=config.loss,
        optimizer=config.optimizer,
        loop=config.loop,
        batch_size=config.batch_size,
        unknown_rate=config.unknown_rate,
        num_workers=config.num_workers,
        resume=True,
    )
    if config.model.build is not None and config.encoders:
        raise InputError(
            f"model.build is {config.model.build!r}, and encoders differ in model.history, which it does not "
            "read: give encoders [], and model.build in variants"
        )
    arms: dict[str, dict[str, Any]] = {word: {"model.history": word} for word in config.encoders}
    if twice := sorted(arms.keys() & config.variants.keys()):
        raise InputError(f"variants: {twice[0]!r} is an encoder's name: choose another one")
    arms |= config.variants
    if config.reference not in arms:
        raise InputError(f"reference: {config.reference!r} is none of the arms {', '.join(arms)}")
    if not config.seeds or not config.grid:
        raise InputError("seeds and grid need one entry at least; a grid of one empty setting is [{}]")
    settings = {
        name: [with_overrides(base, {**overrides, **setting}, "train") for setting in config.grid]
        for name, overrides in arms.items()
    }
    if other := sorted({*config.controls, *config.controls.values()} - arms.keys()):
        raise InputError(f"controls: {other[0]!r} is none of the arms {', '.join(arms)}")
    return settings


def _longest(config: TrainConfig, schema: RequestSchema) -> int:
    return config.model.longest_history(schema.without(config.model.leave_out))


def _difference(first: TrainConfig, other: TrainConfig) -> dict[str, Any]:
    """The fields of the chosen setting that are not those of the arm's first one."""
    flat = [flat_fields(asdict(config)) for config in (first, other)]
    return {name: value for name, value in flat[1].items() if value != flat[0].get(name) and name != "run_folder"}


def _tune(
    name: str, settings: Sequence[TrainConfig], config: CompareConfig, device: torch.device
) -> tuple[list[float], TrainConfig]:
    """The metric of each setting on the validation split, the mean over tasks, and the best setting, its folder set."""
    placed = [_placed(setting, Path(config.out) / name / f"setting-{k}") for k, setting in enumerate(settings)]
    if len(placed) == 1:
        return [], placed[0]
    values = [_mean_over_tasks(_run(setting, config.seeds[0]), config.choose_by, device) for setting in placed]
    return values, placed[int(np.argmax(values) if MORE_IS_BETTER[config.choose_by] else np.argmin(values))]


def _placed(config: TrainConfig, folder: Path) -> TrainConfig:
    return with_overrides(config, {"run_folder": str(folder)}, "train")


def _run(setting: TrainConfig, seed: int) -> TrainConfig:
    folder = f"{setting.run_folder}/seed-{seed}"
    return with_overrides(setting, {"seed": seed, "run_folder": folder}, "train")


def _runs(setting: TrainConfig, config: CompareConfig) -> list[TrainConfig]:
    return [_run(setting, seed) for seed in config.seeds]


def _mean_over_tasks(run: TrainConfig, metric: Metric, device: torch.device) -> float:
    """The metric on the validation split, of the tasks that have it."""
    tasks = _evaluated(run, "validation", device)["tasks"].values()
    values = [metrics[metric] for metrics in tasks if metric in metrics]
    if not values:
        raise InputError(f"choose_by: no task of {run.run_folder} has {metric} on the validation split: choose another")
    return float(np.mean(values))


def _evaluated(run: TrainConfig, split: str, device: torch.device) -> dict[str, Any]:
    """What `evaluate` found on a split; the run is trained and evaluated if it is not yet."""
    instead = "ask for the same, or choose another --out"
    train_if_needed(run, device, told="the comparison asks for", instead=instead)
    path = Path(run.run_folder) / f"evaluate-{split}.json"
    if not _is_evaluated(run, split):
        evaluate = EvaluateConfig(run_folder=run.run_folder, split=split, save_predictions=split == "test")
        evaluate_run(evaluate, device)
    # All ranks have looked at what is there before the next one writes.
    dist.barrier()
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def _is_evaluated(run: TrainConfig, split: str) -> bool:
    """Whether the results are there, of the run's own data and history length, with predictions if needed."""
    path = Path(run.run_folder) / f"evaluate-{split}.json"
    if not path.exists() or (split == "test" and not path.with_name("predictions-test.npz").exists()):
        return False
    record = json.loads(path.read_text())
    # Earlier versions told fewer metrics, and no slices.
    if "slices" not in record:
        return False
    return (record["data"], record["history_length"]) == (run.data, _longest(run, RequestSchema.load(run.data)))


def _differences(chosen: Mapping[str, TrainConfig], config: CompareConfig) -> dict[str, Any]:
    """For each task, how arms differ from the reference and from their controls: paired bootstrap over users."""
    predictions = {
        name: [np.load(f"{run.run_folder}/predictions-test.npz") for run in _runs(setting, config)]
        for name, setting in chosen.items()
    }
    order_of_user, users = np.unique(predictions[config.reference][0]["users"], return_inverse=True)
    paired = partial(paired_differences, num_users=len(order_of_user), samples=config.bootstrap_samples, seed=0)
    found: dict[str, Any] = {"differences": {}, "differences_from_controls": {}}
    for t, task in enumerate(RequestSchema.load(config.data).labels):
        metrics = {
            name: [
                UserWeightedMetrics(one["logits"][:, t], one["labels"][:, t], users, one["requests"]) for one in runs
            ]
            for name, runs in predictions.items()
        }
        found["differences_from_controls"][task] = {
            name: paired(metrics[control], {name: metrics[name]})[name] for name, control in config.controls.items()
        }
        found["differences"][task] = paired(metrics.pop(config.reference), metrics)
    return found
