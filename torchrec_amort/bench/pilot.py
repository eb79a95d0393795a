"""Two arms replay the same logged requests; latency, quality and cost side by side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from torchrec_amort.bench.arms import Arm, ArmConfig, load_arm
from torchrec_amort.bench.pilot_analysis import (
    CONTROL,
    TREATMENT,
    by_size,
    cost_model,
    largest_difference,
    latency,
    metrics_of,
    processor_cost,
    quality,
    sizing,
)
from torchrec_amort.bench.pilot_report import write_report
from torchrec_amort.bench.replay import Log, Replayed, replay, replay_memory, score_shorter, time_shapes
from torchrec_amort.bench.timing import machine
from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, refuse_out_of_bounds
from torchrec_amort.data.counts import unknown_ids
from torchrec_amort.data.sample import drawn_requests
from torchrec_amort.errors import InputError
from torchrec_amort.files import utc_now
from torchrec_amort.lock import FolderLock
from torchrec_amort.progress import progress
from torchrec_amort.schema import RequestSchema
from torchrec_amort.training.environment import git_commit
from torchrec_amort.training.run import load_run
from torchrec_amort.versions import installed_versions

MEMORY_REQUESTS = 1000
SHARES_OF_LONGEST = (0, 0.1, 0.25, 0.5, 1)


@dataclass(kw_only=True)
class PilotConfig:
    """Replay the same logged requests through two arms, and report latency, quality and cost side by side.

    Args:
        control: what there is now.
        treatment: what is to be tried.
        out: folder of the results: `pilot.html`, `pilot.json` and `pilot.txt`.
        data: prepared data folder; the one that the control was trained on unless given.
        split: of that data.
        requests: at most so many requests of it are replayed, drawn at random.
        bootstrap_samples: resamples of users for all intervals.
        history_lengths: events of each history, of the requests of given shapes that are timed; an eighth, a quarter, a
            half and all of the longest that there is unless given.
        candidates: candidates of those.
        turns: requests of each shape.
        rates: requests a second to size for.
        utilization: share of its time that a core may be busy. At 0.5, waiting stays short.
        warmup: requests before the clock starts.
        threads: CPU threads; torch's choice unless given.
        seed: of all draws.
    """

    control: ArmConfig
    treatment: ArmConfig
    out: str
    data: str | None = None
    split: str = "test"
    requests: int = 20_000
    bootstrap_samples: int = 1000
    history_lengths: list[int] = field(default_factory=list)
    candidates: list[int] = field(default_factory=lambda: [8, 32, 128, 512])
    turns: int = 20
    rates: list[float] = field(default_factory=lambda: [100.0, 1000.0])
    utilization: float = 0.5
    warmup: int = 50
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("requests", "bootstrap_samples", "candidates", "turns", "threads")
        not_negative = ("history_lengths", "warmup", "seed")
        refuse_out_of_bounds(self, {AT_LEAST_ONE: at_least_one, NOT_NEGATIVE: not_negative, POSITIVE: ("rates",)})
        if not 0 < self.utilization <= 1:
            raise InputError(f"utilization is {self.utilization}: give a share above 0 and up to 1")


def run_pilot(config: PilotConfig) -> None:
    """Replay, and leave the results in the folder.

    Args:
        config: which arms, on what.

    Raises:
        InputError: there is no such run or data, or the arms cannot be compared on it.
    """
    with FolderLock(config.out):
        _replay_and_report(config)


def _replay_and_report(config: PilotConfig) -> None:
    _, data, _ = load_run(config.control.run_folder, config.data)
    arms = _load_arms(config, data)
    requests = drawn_requests(data, config.split, config.requests, seed=config.seed)
    log = Log.of(requests, RequestSchema.load(data))
    shapes = _shapes(config, log, arms)
    replayed = replay(arms, requests, config.warmup)
    record = {
        **_what_was_run(config, data, arms, log),
        **_findings(config, arms[CONTROL].schema.labels, log, replayed),
        "shorter_histories": _shorter_histories(arms, requests, log),
        **_cost(config, data, arms, requests, log, replayed, shapes),
    }
    write_report(Path(config.out), record)


def _load_arms(config: PilotConfig, data: str) -> dict[str, Arm]:
    arms = {}
    for name, arm in ((CONTROL, config.control), (TREATMENT, config.treatment)):
        load_run(arm.run_folder, data)
        arms[name] = load_arm(arm)
    labels = [arm.schema.labels for arm in arms.values()]
    if labels[0] != labels[1]:
        raise InputError(
            f"the control predicts {list(labels[0])} and the treatment {list(labels[1])}: give two runs of one data set"
        )
    return arms


def _shapes(config: PilotConfig, log: Log, arms: Mapping[str, Arm]) -> list[tuple[int, int]]:
    """Events and candidates of the requests of given shapes; refused, if they are, before anything is measured."""
    # So many requests at least have that many events in each history.
    most = np.sort(log.events.min(1))[-min(config.turns, len(log.events))]
    longest = int(min(most, max(arm.history_length for arm in arms.values())))
    lengths = sorted(set(config.history_lengths or [-(-longest * share // 8) for share in (1, 2, 4, 8)]))
    if lengths[-1] > longest:
        raise InputError(
            f"history_lengths has {lengths[-1]}, but {config.turns} requests of at least that many events are needed, "
            f"which models and requests have for up to {longest}: ask for shorter ones, or fewer turns"
        )
    shapes = list(itertools.product(lengths, sorted(set(config.candidates))))
    # Half of them are held back; five coefficients, two without events, are to be told by the others.
    needed = 10 if longest > 0 else 4
    if len(shapes) < needed:
        raise InputError(
            f"{len(lengths)} history_lengths and {len(set(config.candidates))} candidates are {len(shapes)} shapes: "
            f"the cost model needs {needed} or more"
        )
    return shapes


def _what_was_run(config: PilotConfig, data: str, arms: Mapping[str, Arm], log: Log) -> dict[str, Any]:
    return {
        "finished": utc_now(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
        "git_commit": git_commit(),
        "config": asdict(config),
        "data": data,
        "split": config.split,
        "requests": len(log.users),
        "candidates": len(log.labels),
        "users": int(log.users.max()) + 1,
        "unknown_ids": unknown_ids(data, config.split, arms[CONTROL].schema),
        "arms": {
            name: {
                **asdict(arm.config),
                "history": arm.history,
                "history_length": arm.history_length,
                "device": arm.device.type,
                "parameter_bytes": arm.parameter_bytes,
            }
            for name, arm in arms.items()
        },
    }


def _findings(config: PilotConfig, tasks: Sequence[str], log: Log, replayed: Mapping[str, Replayed]) -> dict[str, Any]:
    logits = {name: arm.logits for name, arm in replayed.items()}
    samples, seed = config.bootstrap_samples, config.seed
    return {
        "largest_difference": largest_difference(logits),
        "quality": quality(log, logits, tasks, samples=samples, seed=seed),
        "latency": latency(log, replayed, samples=samples, seed=seed),
        "by_history_length": by_size(log, log.num_events, replayed, tasks),
        "by_candidates": by_size(log, log.num_candidates, replayed, tasks),
    }


def _shorter_histories(arms: Mapping[str, Arm], requests: pa.Table, log: Log) -> list[dict[str, Any]]:
    """Quality of each arm with histories cut to fewer and fewer events, scored many requests at a time."""
    longest = min(int(log.events.max()), max(arm.history_length for arm in arms.values()))
    lengths = sorted({round(share * longest) for share in SHARES_OF_LONGEST})
    found = []
    with progress(total=len(lengths) * len(arms), desc="shorter histories", unit="passes") as bar:
        for length in lengths:
            tasks: dict[str, Any] = {}
            for name, arm in arms.items():
                tasks[name] = metrics_of(log, score_shorter(arm, requests, length), arm.schema.labels)
                bar.update()
            found.append({"history_length": length, "arms": tasks})
    return found


def _cost(
    config: PilotConfig,
    data: str,
    arms: Mapping[str, Arm],
    requests: pa.Table,
    log: Log,
    replayed: Mapping[str, Replayed],
    shapes: Sequence[tuple[int, int]],
) -> dict[str, Any]:
    memory = {name: replay_memory(arm, requests.slice(0, MEMORY_REQUESTS)) for name, arm in arms.items()}
    points = time_shapes(arms, data, config.split, shapes, turns=config.turns, seed=config.seed)
    models = {name: cost_model(points, name) for name in arms}
    longest = max(arm.history_length for arm in arms.values())
    is_on_gpu = any(arm.device.type == "cuda" for arm in arms.values())
    processor = processor_cost(log, replayed, samples=config.bootstrap_samples, seed=config.seed)
    return {
        "cost": {
            "cpu_seconds": processor,
            "peak_bytes": memory,
            "memory_requests": min(MEMORY_REQUESTS, requests.num_rows),
            "gpu_seconds": {name: float(1e3 * arm.seconds.mean()) for name, arm in replayed.items()}
            if is_on_gpu
            else None,
        },
        "shapes": points,
        "sizing": {
            "models": {
                name: {
                    "coefficients": model.by_term,
                    "error_on_fitted": model.error,
                    "error_on_held_back": error,
                }
                for name, (model, error) in models.items()
            },
            "utilization": config.utilization,
            "rows": sizing(
                log, {name: model for name, (model, _) in models.items()}, config.rates, config.utilization, longest
            ),
        },
    }
