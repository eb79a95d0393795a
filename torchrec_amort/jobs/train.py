"""Trains a run on the train split of a prepared data folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from torchrec_amort.batch import RequestBatch
from torchrec_amort.config import CONFIG_FILE, load_config, save_config
from torchrec_amort.data.counts import TRAIN, read_counts
from torchrec_amort.data.reader import ALL, RequestDataset, pieces_of, read_piece
from torchrec_amort.errors import InputError
from torchrec_amort.files import utc_now, write_json, write_text
from torchrec_amort.lock import FolderLock
from torchrec_amort.models.build import build_model
from torchrec_amort.models.ranker import CollectionRanker, Ranker
from torchrec_amort.modules.losses import LossConfig, TaskLosses
from torchrec_amort.modules.next_action import NextAction
from torchrec_amort.schema import RequestSchema
from torchrec_amort.stores import location
from torchrec_amort.training.checkpoint import CHECKPOINTS, has_checkpoint, refuse_ranks
from torchrec_amort.training.environment import is_restart_of, track, write_environment
from torchrec_amort.training.lock import run_lock
from torchrec_amort.training.loop import GlobalBatchTrain, LoopConfig, TrainResult, train
from torchrec_amort.training.numbers import measure_numbers
from torchrec_amort.training.processes import ignore_stop_signals, is_first
from torchrec_amort.training.run import TrainConfig, refuse_other, refuse_other_config, schema_of
from torchrec_amort.training.sharding import ShardedModel, shard
from torchrec_amort.training.warm_start import WarmStart


def train_run(config: TrainConfig, device: torch.device) -> None:
    """Train, and leave all there is to know in the run's folder. All ranks call it together.

    Args:
        config: what and how to train.
        device: of this rank.

    Raises:
        InputError: the data is missing or does not fit, the run cannot go on, or another process writes into its
            folder.
    """
    with run_lock(config.run_folder, device) as lock:
        _train_locked(config, device, lock)


def train_if_needed(config: TrainConfig, device: torch.device, *, told: str, instead: str) -> None:
    """Train a run unless that is done, and go on with it if it was stopped. All ranks call it together.

    Args:
        config: with `resume`.
        device: of this rank.
        told: who asks for it, for error messages; see `refuse_other_config`.
        instead: what to do.

    Raises:
        InputError: the run was trained with another config, or as `train_run`.
    """
    run = Path(config.run_folder)
    if (run / CONFIG_FILE).exists():
        refuse_other_config(run, load_config(run, TrainConfig, "train"), config, told=told, instead=instead)
    if not (run / "train.json").exists():
        train_run(config, device)
    dist.barrier()


def _train_locked(config: TrainConfig, device: torch.device, lock: FolderLock | None) -> None:
    run = Path(config.run_folder)
    resume = _refuse_or_resume(config, run, device)
    if resume:
        refuse_ranks(run)
    schema = RequestSchema.load(run) if resume else schema_of(config)
    start = None if resume or config.warm_start is None else WarmStart(config, schema)
    dataset = read_train_split(config, schema)
    validation = _validation_requests(config, schema)
    initial = schema.without_pretrained() if resume else schema if start is None else start.initial
    model = sharded_model(config, initial, device, is_loaded=resume or start is not None)
    if start is not None:
        checkpoint = start.load(model)
        if is_first():
            print(f"{run}: starts with {checkpoint}")
    # No rank may write before all have looked at what is there.
    dist.barrier()
    if is_first():
        _write_run(config, run, schema, model, device)
    dist.barrier()
    # Dropout differs from rank to rank.
    torch.manual_seed(int(np.random.SeedSequence([config.seed, dist.get_rank()]).generate_state(1)[0]))
    data = DataLoader(
        dataset,
        batch_size=None,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
        # Of its own: what dropout draws must not depend on where an epoch was started from.
        generator=torch.Generator(),
        worker_init_fn=ignore_stop_signals,
    )
    result = train(model, data, config.loop, run, validation=validation, loss=config.loss, resume=resume, lock=lock)
    if is_first():
        _write_result(run, config.loop, result, device)


def _write_result(run: Path, config: LoopConfig, result: TrainResult, device: torch.device) -> None:
    """Leave what the training did in `train.json`, on the screen, and with the job's TorchX trackers."""
    speed = result.candidates / max(result.seconds, 1e-9)
    results = {
        **asdict(result),
        "candidates_per_second": speed,
        "world_size": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
        "device": device.type,
        "torch": torch.__version__,
        "finished": utc_now(),
    }
    write_json(run / "train.json", results)
    track(run, results)
    last = f"loss {result.losses[-1]:.4f}, " if result.losses else ""
    if result.best_checkpoint is not None:
        ended = ", and no better one was found" if result.stopped_early else ""
        print(f"{run}: {result.best_checkpoint} is the best{ended}: {config.validate_metric} {result.best_value:.4f}")
    print(
        f"{run}: {result.steps} steps, {last}{speed:,.0f} candidates/s on {dist.get_world_size()} ranks of "
        f"{torch.get_num_threads()} threads ({device.type}), {result.seconds:.0f} s; checkpoints in {run / CHECKPOINTS}"
    )


def _refuse_or_resume(config: TrainConfig, run: Path, device: torch.device) -> bool:
    """Whether the run goes on; refuses to mix it with another run, another model or other batches."""
    if not ((run / CONFIG_FILE).exists() and has_checkpoint(run)):
        return False
    if not config.resume and not is_restart_of(run, device):
        raise InputError(f"{run}: has a checkpoint already: go on with --resume true, or choose another run folder")
    saved = load_config(run, TrainConfig, "train")
    of_run, of_model = "its checkpoint is of a run with", "its checkpoint is of a model with model."
    batches = ("batch_size", "balance_work", "seed", "since", "until")
    refuse_other(run, saved, config, batches, f"{of_run} ", ", which are other batches")
    refuse_other(run, saved.loss, config.loss, ("weighting",), f"{of_run} loss.", ", which has other weights")
    if saved.loop.validate_every is not None:
        names = ("validate_metric", "validate_requests")
        refuse_other(run, saved.loop, config.loop, names, "its best model is that of loop.")
    refuse_other(run, saved, config, ("warm_start",), "its checkpoint is of a run with ", ", which is another start")
    names = ("table_optimizer", "dense_optimizer")
    refuse_other(run, saved.optimizer, config.optimizer, names, "its checkpoint has the state of optimizer.")
    refuse_other(run, saved.model, config.model, [field.name for field in fields(saved.model)], of_model)
    if saved.tables != config.tables:
        of_checkpoint, of_config = (
            {name: table.record() for name, table in tables.items()} for tables in (saved.tables, config.tables)
        )
        raise InputError(
            f"{run}: its checkpoint is of a model with tables={of_checkpoint}, the config says {of_config}: use the "
            "same, or choose another run folder"
        )
    return True


def read_train_split(config: TrainConfig, schema: RequestSchema, max_requests: int | None = None) -> RequestDataset:
    """This rank's part of the training requests, all or the first ones, as the config's model reads them."""
    read = schema.without(config.model.leave_out)
    return RequestDataset(
        config.data,
        _split(config),
        span=config.span,
        batch_size=config.batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        seed=config.seed,
        history_length=config.model.history_lengths(read),
        unknown_rate=config.unknown_rate,
        schema=read,
        balance_work=config.balance_work,
        max_requests=max_requests,
    )


def _split(config: TrainConfig) -> str:
    """The split that is trained on."""
    return TRAIN if config.span is None else ALL


def _validation_requests(config: TrainConfig, schema: RequestSchema) -> DataLoader[RequestBatch] | None:
    """This rank's part of the requests that are validated on, if the config wants that."""
    if config.loop.validate_every is None:
        return None
    read = schema.without(config.model.leave_out)
    dataset = RequestDataset(
        config.data,
        "validation",
        batch_size=config.batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        history_length=config.model.history_lengths(read),
        schema=read,
        max_requests=config.loop.validate_requests,
    )
    # Of its own: what dropout draws must not depend on validations.
    return DataLoader(dataset, batch_size=None, generator=torch.Generator())


def sharded_model(
    config: TrainConfig, schema: RequestSchema, device: torch.device, *, is_loaded: bool = False
) -> ShardedModel:
    """The model, its tables spread over all ranks: untrained; if a checkpoint is to be loaded, nothing is measured."""
    world_size = dist.get_world_size()
    of_splits = read_counts(config.data)
    counted = [of_splits[TRAIN]] if config.span is None else list(of_splits.values())
    counts = {name: sum(count[name] for count in counted) for name in ("requests", "candidates")}
    loss = TaskLosses(config.loss, schema)
    loss.refuse_impressions(counts["requests"], counts["candidates"], str(location(config.data) / _split(config)))
    read = schema.without(config.model.leave_out)
    lengths = config.model.history_lengths(read)
    events = {feature.name: float(lengths[feature.history]) for feature in read.of("event")}
    candidates = {feature.name: counts["candidates"] / counts["requests"] for feature in schema.of("candidate")}
    frozen = frozenset(name for name, table in schema.tables.items() if not table.trains)
    model = build_model(schema, config.model, seed=config.seed)
    if not is_loaded:
        measure_numbers(model, _some_batches(config, read), read)
    return shard(
        GlobalBatchTrain(model, config.loop.precision, loss, _next_action(config.loss, model)),
        device=device,
        optimizer=config.optimizer,
        batch_size=-(-config.batch_size // world_size),
        sharding=config.sharding,
        average_decay=config.loop.average_decay,
        ids_per_request=events | candidates | {"item": float(config.model.history_length)},
        frozen=frozen,
    )


def _next_action(config: LossConfig, model: Ranker) -> NextAction | None:
    """The loss of a model's histories, if the config wants it."""
    if config.next_action == 0:
        return None
    towers = model.collection.towers if isinstance(model, CollectionRanker) else []
    return NextAction(towers, config.next_action, config.next_action_negatives)


# Requests that numbers are measured on, from all over the split.
_MEASURED = 8192


def _some_batches(config: TrainConfig, schema: RequestSchema) -> Iterator[RequestBatch]:
    """Training requests, the same on every rank."""
    pieces = pieces_of(location(config.data), _split(config), schema, config.span)
    step = max(1, sum(piece.num_rows for piece in pieces) // _MEASURED)
    for piece in pieces[::step]:
        yield RequestBatch.from_arrow(read_piece(piece, schema), schema, validate=False)


def _write_run(
    config: TrainConfig, run: Path, schema: RequestSchema, model: ShardedModel, device: torch.device
) -> None:
    save_config(run, config, "train")
    schema.save(run)
    write_text(run / "plan.txt", f"{model.plan}\n")
    write_environment(run, device)
    # Before any step: a tracker that cannot be written must not be found out after hours of training.
    track(run, {"started": utc_now()})
    print(model.plan)
