"""Candidates per second in training, on this process alone or as one rank of torchrun."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from torchrec_amort.batch import RequestBatch
from torchrec_amort.bench.speed import ways_to_train
from torchrec_amort.bench.timing import Times
from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, refuse_out_of_bounds
from torchrec_amort.files import utc_now, write_json
from torchrec_amort.jobs.train import read_train_split, sharded_model
from torchrec_amort.progress import progress
from torchrec_amort.training.processes import ignore_stop_signals, is_first, process_group, sum_over_ranks
from torchrec_amort.training.run import TrainConfig, schema_of
from torchrec_amort.training.sharding import ShardedModel


@dataclass(kw_only=True)
class ThroughputConfig(TrainConfig):
    """Time reading and training steps of an untrained model: request by request, and impression by impression.

    Takes all that `train` takes; `run_folder` gets `throughput.json`.

    Args:
        steps: steps of training that are timed.
        warmup: steps before.
        reading_steps: steps that are read without training, at most an epoch.
    """

    steps: int = 60
    warmup: int = 5
    reading_steps: int = 3_000

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_out_of_bounds(self, {AT_LEAST_ONE: ("steps", "reading_steps"), NOT_NEGATIVE: ("warmup",)})


def measure_throughput(config: ThroughputConfig) -> None:
    """Time reading and training, and leave the rates in the run's folder. All ranks call it together.

    Args:
        config: what to train on what.

    Raises:
        InputError: the data is missing or does not fit.
    """
    with process_group() as device:
        schema = schema_of(config)
        dataset = read_train_split(config, schema)
        model = sharded_model(config, schema, device)
        data = DataLoader(dataset, batch_size=None, num_workers=config.num_workers, worker_init_fn=ignore_stop_signals)
        rates = {"reading": _reading(data, config.reading_steps)} | _training(model, data, config, device)
        if is_first():
            _report(config, config.model.longest_history(dataset.schema), rates, device)


def _reading(data: DataLoader[RequestBatch], steps: int) -> float:
    """Candidates per second of all ranks, if nothing but reading is done."""
    candidates, started = 0, time.perf_counter()
    steps = min(steps, len(data))
    with progress(total=steps, desc="reading", unit="steps", disable=not is_first()) as bar:
        for batch in islice(data, steps):
            candidates += int(batch.num_candidates.sum())
            bar.update()
    return float(sum_over_ranks(torch.tensor(candidates / (time.perf_counter() - started), dtype=torch.float64)))


def _training(
    model: ShardedModel, data: DataLoader[RequestBatch], config: ThroughputConfig, device: torch.device
) -> dict[str, float]:
    """Candidates per second of all ranks, by each way to train; the median over steps."""
    times, candidates = Times(config.warmup), []
    steps = config.warmup + config.steps
    with progress(total=steps, desc="throughput", unit="steps", disable=not is_first()) as bar:
        for batch in islice(chain.from_iterable(repeat(data)), steps):
            ways = ways_to_train(model, batch.to(device))
            times.take(ways)
            candidates.append(int(sum_over_ranks(batch.num_candidates.sum().to(device))))
            bar.update()
    return {way: times.median_rate(way, candidates[config.warmup :]) for way in ways}


def _report(config: ThroughputConfig, history_length: int, rates: dict[str, float], device: torch.device) -> None:
    ranks, threads = dist.get_world_size(), torch.get_num_threads()
    results = {
        "candidates_per_second": rates,
        "batch_size": config.batch_size,
        "history_length": history_length,
        "embedding_dim": None if config.model.build else config.model.embedding_dim,
        "world_size": ranks,
        "threads_per_rank": threads,
        "num_workers": config.num_workers,
        "device": device.type,
        "torch": torch.__version__,
        "finished": utc_now(),
    }
    path = Path(config.run_folder) / "throughput.json"
    write_json(path, results)
    print(f"candidates per second on {ranks} ranks of {threads} threads ({device.type}):")
    for way, rate in rates.items():
        print(f"  {way:<12} {rate:>10,.0f}")
    print(f"written to {path}")
