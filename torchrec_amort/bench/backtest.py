"""Training day after day on logged requests: from the day before, anew each day, or never again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist

from torchrec_amort.bench.backtest_report import write_report
from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, refuse_out_of_bounds
from torchrec_amort.config import with_overrides
from torchrec_amort.data.reader import ALL, pieces_of
from torchrec_amort.errors import InputError
from torchrec_amort.files import write_json
from torchrec_amort.jobs.evaluate import EvaluateConfig, evaluate_split
from torchrec_amort.jobs.train import train_if_needed
from torchrec_amort.models.build import ModelConfig
from torchrec_amort.modules.losses import LossConfig
from torchrec_amort.schema import RequestSchema, TableConfig
from torchrec_amort.stores import location
from torchrec_amort.times import Span
from torchrec_amort.training.bootstrap import UserWeightedMetrics, paired_differences
from torchrec_amort.training.lock import run_lock
from torchrec_amort.training.loop import LoopConfig
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.processes import is_first, process_group
from torchrec_amort.training.run import TrainConfig, load_run
from torchrec_amort.training.sharding import ShardingConfig

Arm = Literal["cold", "warm", "stale"]


@dataclass(kw_only=True)
class BacktestConfig:
    """Train on logged requests up to a day, test on that day, and go on to the next one.

    The requests before the first of `cuts` are the first window, on which all arms train. Those from one cut to the
    next are a day, on which all arms are tested; after that, `cold` trains anew on all requests until then, `warm` on
    those of the day alone, starting with its weights of the day before, and `stale` not at all. A backtest that was
    stopped goes on where it was.

    Args:
        data: prepared data folder, whose requests are taken by their times, whatever split they are in.
        out: folder for all runs, and for backtest.json, backtest.md and backtest.png.
        cuts: times that end the first window and each day, in order; UTC if they tell no zone.
        since: time of the first request that is trained on; the first one of all unless given.
        window: days that `cold` trains on, the latest ones; all before unless given, and the first window with them.
        arms: of `cold`, `warm` and `stale`.
        reference: the arm that the others are compared with.
        warm: fields of `train` in which the training of a day differs, as `warm_start_optimizer: 0.5`.
        model: of all arms.
        loss: what is minimized.
        optimizer: how weights are moved.
        loop: how long to train on a window.
        sharding: how tables are spread over ranks.
        batch_size: requests in a global batch, all ranks together.
        seed: of the initial weights and the order of the data.
        tables: as for `train`.
        unknown_rate: as for `train`.
        num_workers: processes of each rank that read data.
        bootstrap_samples: resamples of users for the intervals of differences.
    """

    data: str
    out: str
    cuts: list[str]
    since: str | None = None
    window: int | None = None
    arms: list[Arm] = field(default_factory=lambda: list(get_args(Arm)))
    reference: Arm = "cold"
    warm: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    batch_size: int = 32
    seed: int = 0
    tables: dict[str, TableConfig] = field(default_factory=dict)
    unknown_rate: dict[str, float] = field(default_factory=dict)
    num_workers: int = 0
    bootstrap_samples: int = 1000

    def __post_init__(self) -> None:
        at_least_one = ("window", "batch_size", "bootstrap_samples")
        refuse_out_of_bounds(self, {AT_LEAST_ONE: at_least_one, NOT_NEGATIVE: ("seed", "num_workers")})
        if len(self.cuts) < 2:
            raise InputError(f"cuts is {self.cuts}: give the end of the first window and that of a day, at least")
        if self.reference not in self.arms:
            raise InputError(f"reference: {self.reference!r} is none of the arms {', '.join(self.arms)}")

    @property
    def days(self) -> list[Span]:
        """What is tested on, one after the other."""
        return [Span(since, until) for since, until in pairwise(self.cuts)]


def run_backtest(config: BacktestConfig) -> None:
    """Train and test all arms, day by day, and leave what was found in the folder. All ranks call it together.

    Args:
        config: which days, and what to train.

    Raises:
        InputError: the data is missing or does not fit, a day has no requests, or the folder has runs of another
            backtest.
    """
    runs = {arm: [_run(config, arm, day) for day in range(len(config.days))] for arm in config.arms}
    schema = RequestSchema.load(config.data)
    schema.refuse_targets("backtest")
    for span in (runs[config.reference][0].span, *config.days):
        # Refused, if one is, before hours of training.
        pieces_of(location(config.data), ALL, schema, span)
    with process_group() as device, run_lock(config.out, device):
        tested: dict[str, list[dict[str, Any]]] = {arm: [] for arm in config.arms}
        for day, span in enumerate(config.days):
            for arm in config.arms:
                tested[arm].append(_tested(runs[arm][day], span, device))
        if is_first():
            write_report(Path(config.out), _record(config, runs, tested, schema.labels))


def _run(config: BacktestConfig, arm: Arm, day: int) -> TrainConfig:
    """What an arm is trained with before a day; on the first one, that is the same for all."""
    shared = ("model", "loss", "optimizer", "loop", "sharding", "batch_size", "seed", "tables", "unknown_rate")
    first = TrainConfig(
        data=config.data,
        run_folder=f"{config.out}/first",
        since=config.since,
        until=config.cuts[0],
        resume=True,
        num_workers=config.num_workers,
        **{name: getattr(config, name) for name in shared},
    )
    if day == 0 or arm == "stale":
        return first
    changed: dict[str, Any] = {"run_folder": f"{config.out}/{arm}/day-{day:03d}", "until": config.cuts[day]}
    if arm == "warm":
        changed |= {"since": config.cuts[day - 1], "warm_start": _run(config, arm, day - 1).run_folder, **config.warm}
    elif config.window is not None and config.window <= day:
        changed["since"] = config.cuts[day - config.window]
    return with_overrides(first, changed, "train")


def _tested(run: TrainConfig, day: Span, device: torch.device) -> dict[str, Any]:
    """Metrics of each task on a day; the run is trained and tested if it is not yet."""
    instead = "use the same, or choose another folder for all runs"
    train_if_needed(run, device, told="the config says", instead=instead)
    path = _test_file(run, day)
    asked = {"data": run.data, "since": day.since, "until": day.until}
    record = json.loads(path.read_text()) if path.exists() else {}
    is_there = all(record.get(name) == value for name, value in asked.items())
    # All ranks have looked at what is there before the first one writes.
    dist.barrier()
    if is_there:
        return dict(record)
    evaluate = EvaluateConfig(run_folder=run.run_folder, split=ALL, slice_by=[])
    loaded = load_run(run.run_folder, None)
    result, _ = evaluate_split(evaluate, loaded, device, predictions=path.with_suffix(".npz"), span=day)
    if is_first():
        counts = {"requests": result.requests, "candidates": result.candidates}
        write_json(path, {**asked, **counts, "tasks": result.tasks})
    dist.barrier()
    return dict(json.loads(path.read_text()))


def _test_file(run: TrainConfig, day: Span) -> Path:
    return Path(run.run_folder) / f"test-{day.start:.0f}.json"


def _record(
    config: BacktestConfig,
    runs: dict[Arm, list[TrainConfig]],
    tested: dict[str, list[dict[str, Any]]],
    tasks: Sequence[str],
) -> dict[str, Any]:
    """What `backtest.json` tells."""
    trained = {arm: [_cost(run, of_arm[:day]) for day, run in enumerate(of_arm)] for arm, of_arm in runs.items()}
    of_days, of_all = _differences(config, runs, tasks)
    days = [
        {
            "since": span.since,
            "until": span.until,
            "requests": tested[config.reference][day]["requests"],
            "candidates": tested[config.reference][day]["candidates"],
            "arms": {arm: {"trained": trained[arm][day], "tasks": tested[arm][day]["tasks"]} for arm in config.arms},
            "differences": of_days[day],
        }
        for day, span in enumerate(config.days)
    ]
    sums = {
        arm: {name: sum(cost[name] for cost in costs) for name in ("candidates", "seconds")}
        for arm, costs in trained.items()
    }
    means = {arm: _means([one["tasks"] for one in of_arm]) for arm, of_arm in tested.items()}
    record = {
        "data": config.data,
        "reference": config.reference,
        "config": asdict(config),
        "days": days,
        "arms": {arm: {"trained": sums[arm], "tasks": means[arm]} for arm in config.arms},
        "differences": of_all,
    }
    if {"stale", "warm"} <= set(config.arms):
        stale, warm = ([one["tasks"] for one in tested[arm]] for arm in ("stale", "warm"))
        record["drift"] = {
            task: [one[task]["log_loss"] - two[task]["log_loss"] for one, two in zip(stale, warm, strict=True)]
            for task in tasks
        }
    return record


def _cost(run: TrainConfig, before: Sequence[TrainConfig]) -> dict[str, float]:
    """What a run took; nothing if an earlier day has told of it."""
    if run in before:
        return {"candidates": 0, "seconds": 0.0}
    record = json.loads((Path(run.run_folder) / "train.json").read_text())
    return {"candidates": record["candidates"], "seconds": record["seconds"]}


def _means(days: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The mean over days of the metrics that each of them has."""
    return {
        task: {
            metric: float(np.mean([day[task][metric] for day in days]))
            for metric in days[0][task]
            if all(metric in day[task] for day in days)
        }
        for task in days[0]
    }


class _OfDay:
    """The metrics of a day whose users are the first of those of all days, or some of them.

    Args:
        metrics: of the day.
        num_users: that it knows.
    """

    def __init__(self, metrics: UserWeightedMetrics, num_users: int) -> None:
        self._metrics, self._num_users = metrics, num_users

    def at(self, weights_U: np.ndarray) -> dict[str, float]:
        """See `UserWeighted`."""
        return self._metrics.at(weights_U[: self._num_users])


def _differences(
    config: BacktestConfig, runs: dict[Arm, list[TrainConfig]], tasks: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """For each task, how each arm differs from the reference on each day, and in the mean over days."""
    predictions = {
        arm: [np.load(_test_file(run, day).with_suffix(".npz")) for run, day in zip(of_arm, config.days, strict=True)]
        for arm, of_arm in runs.items()
    }
    users = np.unique(np.concatenate([one["users"] for one in predictions[config.reference]]))
    of_days: list[dict[str, Any]] = [{} for _ in config.days]
    of_all = {}
    for t, task in enumerate(tasks):
        metrics: dict[str, list[_OfDay]] = {arm: [] for arm in predictions}
        for arm, of_arm in predictions.items():
            for one in of_arm:
                places = np.searchsorted(users, one["users"])
                of_day = UserWeightedMetrics(one["logits"][:, t], one["labels"][:, t], places, one["requests"])
                metrics[arm].append(_OfDay(of_day, int(places.max()) + 1))
        for day, differences in enumerate(of_days):
            differences[task] = _versus(config, {arm: [of_arm[day]] for arm, of_arm in metrics.items()}, len(users))
        of_all[task] = _versus(config, metrics, len(users))
    return of_days, of_all


def _versus(config: BacktestConfig, metrics: dict[str, list[_OfDay]], num_users: int) -> dict[str, Any]:
    """How the other arms differ from the reference, by the metrics that all days have."""
    others = {arm: of_arm for arm, of_arm in metrics.items() if arm != config.reference}
    found = paired_differences(
        metrics[config.reference], others, num_users=num_users, samples=config.bootstrap_samples, seed=0
    )
    return {
        arm: {name: bounds for name, bounds in of_arm.items() if np.isfinite(list(bounds.values())).all()}
        for arm, of_arm in found.items()
    }
