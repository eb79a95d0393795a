"""Training and scoring speed of several models on the same batches, measured in turns in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import pyarrow as pa
import torch

from torchrec_amort.batch import RequestBatch
from torchrec_amort.bench.timing import Times, threads
from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, refuse_out_of_bounds
from torchrec_amort.data.sample import sample_requests
from torchrec_amort.jobs.train import read_train_split, sharded_model
from torchrec_amort.models.build import build_model
from torchrec_amort.models.ranker import Ranker, encoders_of
from torchrec_amort.modules.losses import TaskLosses
from torchrec_amort.modules.next_action import NextAction
from torchrec_amort.ops.attention import Backend
from torchrec_amort.progress import progress
from torchrec_amort.training.processes import is_first
from torchrec_amort.training.run import TrainConfig, schema_of
from torchrec_amort.training.sharding import ShardedModel


@dataclass(kw_only=True)
class SpeedConfig:
    """What speed is measured on.

    Args:
        train_steps: steps of training that are timed, on the data set's own batches.
        requests: requests that are scored one at a time.
        candidates: candidates of each of them.
        history_length: events of each of them; the models' longest unless given.
        warmup: turns before the clock starts.
        threads: CPU threads; torch's choice unless given.
    """

    train_steps: int = 40
    requests: int = 50
    candidates: int = 128
    history_length: int | None = None
    warmup: int = 3
    threads: int | None = None

    def __post_init__(self) -> None:
        at_least_one = ("train_steps", "requests", "candidates", "threads")
        refuse_out_of_bounds(self, {AT_LEAST_ONE: at_least_one, NOT_NEGATIVE: ("history_length", "warmup")}, "speed.")


def requests_to_score(data: str, config: SpeedConfig, history_length: int) -> pa.Table:
    """The requests of the test split that scoring is timed on.

    Args:
        data: prepared data folder.
        config: what to measure on.
        history_length: events of each request, if the config does not say.

    Raises:
        InputError: too few requests have histories that long.
    """
    return sample_requests(
        data,
        "test",
        num_requests=config.requests,
        num_candidates=config.candidates,
        history_length=config.history_length or history_length,
        seed=0,
    )


def measure_speed(
    arms: Mapping[str, TrainConfig], requests: pa.Table, config: SpeedConfig, device: torch.device
) -> dict[str, Any]:
    """Time training steps and single requests of untrained models, in turns. All ranks call it together.

    Training goes request by request, `padded` (all requests of a batch to the longest one) and impression by
    impression, which are the same updates; encoders that cannot be amortized train impression by impression inside.

    Args:
        arms: what to build and train, by name; all on one data set.
        requests: to score; see `requests_to_score`.
        config: what to measure on.
        device: of this rank.

    Returns:
        dict: `threads`, `scoring` (the requests' `candidates` and `history_length`, and for each arm `requests_ms`
        and `impressions_ms`, medians) and `training` (for each arm candidates per second, the median over steps, by
        `requests`, `padded` and `impressions`), a method being absent where it is no other one.
    """
    with threads(config.threads):
        return {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "training": _training(arms, config, device),
            "scoring": _scoring(arms, requests, config, device),
        }


def _training(arms: Mapping[str, TrainConfig], config: SpeedConfig, device: torch.device) -> dict[str, Any]:
    models = {name: sharded_model(arm, schema_of(arm), device) for name, arm in arms.items()}
    steps = config.warmup + config.train_steps
    # The same requests in the same order, each as its model reads it; no more of them than are read, for all arms have
    # them in memory at once.
    datasets = [
        chain.from_iterable(repeat(read_train_split(arm, schema_of(arm), steps * arm.batch_size)))
        for arm in arms.values()
    ]
    candidates: dict[str, list[int]] = {name: [] for name in arms}
    times = Times(config.warmup)
    with progress(total=steps, desc="training speed", unit="steps", disable=not is_first()) as bar:
        for batches in islice(zip(*datasets, strict=True), steps):
            methods: dict[str, Callable[[], object]] = {}
            for (name, model), batch in zip(models.items(), batches, strict=True):
                candidates[name].append(int(batch.num_candidates.sum()))
                ways = ways_to_train(model, batch.to(device))
                methods |= {f"{name}/{way}": step for way, step in ways.items()}
            times.take(methods)
            bar.update()
    speeds: dict[str, dict[str, float]] = {name: {} for name in arms}
    for method in methods:
        name, way = method.rsplit("/", 1)
        speeds[name][way] = times.median_rate(method, candidates[name][config.warmup :])
    return speeds


def ways_to_train(model: ShardedModel, batch: RequestBatch) -> dict[str, Callable[[], object]]:
    """Ways to make one training step: by `requests`, and where that is not the same, `impressions` and `padded`."""
    ways: dict[str, Callable[[], object]] = {"requests": partial(_step, model, batch)}
    ranker = _of(model)
    encoders = encoders_of(ranker)
    modules = list(model.module.modules())
    loss = next(module for module in modules if isinstance(module, TaskLosses))
    # Impressions repeat the samples of a history.
    is_of_histories = any(isinstance(module, NextAction) for module in modules)
    if encoders and ranker.is_amortizable and not loss.is_of_requests and not is_of_histories:
        ways["impressions"] = partial(_step, model, batch.to_impressions())
    if any(hasattr(encoder, "backend") for encoder in encoders):
        ways["padded"] = partial(_step, model, batch, "padded")
    return ways


def _of(model: ShardedModel) -> Ranker:
    return next(module for module in model.module.modules() if isinstance(module, Ranker))


def _step(model: ShardedModel, batch: RequestBatch, backend: Backend = "packed") -> None:
    with _attention_backend(_of(model), backend):
        model.optimizer.zero_grad()
        loss, _ = model.module(batch)
        loss.backward()
        model.optimizer.step()


@contextmanager
def _attention_backend(model: Ranker, backend: Backend) -> Iterator[None]:
    encoders: Sequence[Any] = [module for module in model.modules() if hasattr(module, "backend")]
    for encoder in encoders:
        encoder.backend = backend
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.backend = "packed"


@torch.no_grad()
def _scoring(
    arms: Mapping[str, TrainConfig], requests: pa.Table, config: SpeedConfig, device: torch.device
) -> dict[str, Any]:
    schemas = {name: schema_of(arm) for name, arm in arms.items()}
    reads = {name: schemas[name].without(arm.model.leave_out) for name, arm in arms.items()}
    longest = max(arm.model.longest_history(reads[name]) for name, arm in arms.items())
    history_length = config.history_length or longest
    limits = {name: arm.model.history_lengths(reads[name], history_length) for name, arm in arms.items()}
    models = {
        name: build_model(schemas[name], arm.model, seed=arm.seed).eval().to(device) for name, arm in arms.items()
    }
    times = Times(config.warmup)
    rows = [*islice(chain.from_iterable(repeat(range(requests.num_rows))), config.warmup), *range(requests.num_rows)]
    with progress(total=len(rows), desc="scoring speed", unit="requests", disable=not is_first()) as bar:
        for row in rows:
            methods: dict[str, Callable[[], object]] = {}
            for name, model in models.items():
                batch = RequestBatch.from_arrow(requests.slice(row, 1), reads[name], limits[name]).to(device)
                methods[f"{name}/requests_ms"] = partial(model, batch)
                if encoders_of(model) and model.is_amortizable:
                    methods[f"{name}/impressions_ms"] = partial(model, batch.to_impressions())
            times.take(methods)
            bar.update()
    latencies: dict[str, dict[str, float]] = {name: {} for name in arms}
    for method in methods:
        name, way = method.rsplit("/", 1)
        latencies[name][way] = times.median(method) * 1e3
    return {"candidates": config.candidates, "history_length": history_length, "median_ms": latencies}
