"""`torchrec-amort train`: one training run, on this process alone or as one rank of torchrun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader

from torchrec_amort.apps.command import (
    CONFIG_FILE,
    load_config,
    parse,
    refuse_other_schema,
    run_command,
    save_config,
)
from torchrec_amort.apps.environment import is_restart_of, track, write_environment
from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, refuse_out_of_bounds
from torchrec_amort.data.counts import TRAIN, read_counts
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.files import utc_now, write_json, write_text
from torchrec_amort.models.build import ModelConfig, build_model
from torchrec_amort.models.dlrm import AmortizedDLRM, AmortizedDLRMTrain
from torchrec_amort.schema import SCHEMA_FILE, InputError, RequestSchema, TableConfig
from torchrec_amort.training.checkpoint import CHECKPOINTS, has_checkpoint, load_weights
from torchrec_amort.training.lock import FolderLock, run_lock
from torchrec_amort.training.loop import GlobalBatchTrain, LoopConfig, TrainResult, train
from torchrec_amort.training.processes import ignore_stop_signals, is_first, process_group
from torchrec_amort.training.sharding import OptimizerConfig, ShardedModel, ShardingConfig, shard


@dataclass(kw_only=True)
class TrainConfig:
    """Train a model on the train split of a prepared data folder.

    Args:
        data: prepared data folder.
        run_folder: folder for config, plan, checkpoints, metrics and TensorBoard events.
        model: size and kind of the model.
        optimizer: learning rates.
        loop: how long and how.
        sharding: how tables are spread over ranks.
        batch_size: requests in a global batch, all ranks together.
        seed: of the initial weights and the order of the data.
        tables: other sizes and vocabularies of tables of ids than the data's, by the name of the table: the feature's,
            or `item` for the one that history and candidates share. `docs/data.md` tells of vocabularies.
        unknown_rate: for a request id, the share of training requests in which it is replaced by 0, the
            unknown id.
        num_workers: processes of each rank that read data.
        resume: go on from the run's last good checkpoint if it has one; without it, a run that has one is refused,
            unless torchrun started this job's ranks again.
    """

    data: str
    run_folder: str
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    batch_size: int = 32
    seed: int = 0
    tables: dict[str, TableConfig] = field(default_factory=dict)
    unknown_rate: dict[str, float] = field(default_factory=dict)
    num_workers: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {AT_LEAST_ONE: ("batch_size",), NOT_NEGATIVE: ("seed", "num_workers")})


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--data", "data/movielens-1m", "--run_folder", "runs/first", "--loop.epochs", "1"])
    """
    config = parse(TrainConfig, "train", args)
    run_command(lambda: _train(config), "train")


@record
def _train(config: TrainConfig) -> None:
    with process_group() as device:
        train_run(config, device)


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


def _train_locked(config: TrainConfig, device: torch.device, lock: FolderLock | None) -> None:
    run = Path(config.run_folder)
    resume = _refuse_or_resume(config, run, device)
    schema = RequestSchema.load(run) if resume else RequestSchema.load(config.data).with_tables(config.tables)
    dataset = read_train_split(config, schema)
    model = sharded_model(config, schema, device)
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
    result = train(model, data, config.loop, run, resume=resume, lock=lock)
    if is_first():
        _write_result(run, result, device)


def _write_result(run: Path, result: TrainResult, device: torch.device) -> None:
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
    print(
        f"{run}: {result.steps} steps, {last}{speed:,.0f} candidates/s on {dist.get_world_size()} ranks of "
        f"{torch.get_num_threads()} threads ({device.type}), {result.seconds:.0f} s; checkpoints in {run / CHECKPOINTS}"
    )


def load_run(run_folder: str, data: str | None) -> tuple[TrainConfig, str, RequestSchema]:
    """What a run was trained with, and the data folder to use it on.

    Args:
        run_folder: folder of a training run.
        data: prepared data folder; the one it was trained on if None.

    Returns:
        tuple: the run's config, the data folder and the schema of both.

    Raises:
        InputError: it is no such folder, or the data has other features.
    """
    trained = load_config(run_folder, TrainConfig, "train")
    data = data or trained.data
    refuse_other_schema(run_folder, data)
    return trained, data, RequestSchema.load(run_folder)


def load_model(run_folder: str) -> tuple[AmortizedDLRM, TrainConfig, RequestSchema]:
    """A run's model with the weights of its last checkpoint, for inference in this process.

    Args:
        run_folder: folder of a training run.

    Returns:
        tuple: the model, the run's config and its schema.

    Raises:
        InputError: it is no such folder.
    """
    trained, schema = load_config(run_folder, TrainConfig, "train"), RequestSchema.load(run_folder)
    model = build_model(schema, trained.model)
    load_weights(run_folder, AmortizedDLRMTrain(model))
    return model.eval(), trained, schema


def _refuse_or_resume(config: TrainConfig, run: Path, device: torch.device) -> bool:
    """Whether the run goes on; refuses to mix it with another run or another model."""
    if not ((run / CONFIG_FILE).exists() and has_checkpoint(run)):
        return False
    if not config.resume and not is_restart_of(run, device):
        raise InputError(f"{run}: has a checkpoint already: go on with --resume true, or choose another run folder")
    saved = load_config(run, TrainConfig, "train")
    for name, value in asdict(saved.model).items():
        if value != getattr(config.model, name):
            raise InputError(
                f"{run}: its checkpoint is of a model with model.{name}={value}, the config says "
                f"{getattr(config.model, name)}: use the same, or choose another run folder"
            )
    if saved.tables != config.tables:
        raise InputError(
            f"{run}: its checkpoint is of a model with tables={saved.tables}, the config says {config.tables}: use the "
            "same, or choose another run folder"
        )
    return True


def read_train_split(config: TrainConfig, schema: RequestSchema) -> RequestDataset:
    """This rank's part of the training requests, read by a schema."""
    return RequestDataset(
        config.data,
        "train",
        batch_size=config.batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        seed=config.seed,
        history_length=config.model.history_length,
        unknown_rate=config.unknown_rate,
        schema=schema,
    )


def sharded_model(config: TrainConfig, schema: RequestSchema, device: torch.device) -> ShardedModel:
    """The untrained model, its tables spread over all ranks."""
    world_size = dist.get_world_size()
    counts = read_counts(config.data)[TRAIN]
    events = {feature.name: float(config.model.history_length) for feature in schema.of("event")}
    candidates = {feature.name: counts["candidates"] / counts["requests"] for feature in schema.of("candidate")}
    return shard(
        GlobalBatchTrain(build_model(schema, config.model, seed=config.seed), config.loop.precision),
        device=device,
        optimizer=config.optimizer,
        batch_size=-(-config.batch_size // world_size),
        sharding=config.sharding,
        average_decay=config.loop.average_decay,
        ids_per_request=events | candidates | {"item": float(config.model.history_length)},
    )


def _write_run(
    config: TrainConfig, run: Path, schema: RequestSchema, model: ShardedModel, device: torch.device
) -> None:
    save_config(run, config, "train")
    write_text(run / SCHEMA_FILE, schema.to_json())
    write_text(run / "plan.txt", f"{model.plan}\n")
    write_environment(run, device)
    # Before any step: a tracker that cannot be written must not be found out after hours of training.
    track(run, {"started": utc_now()})
    print(model.plan)


if __name__ == "__main__":
    main()
