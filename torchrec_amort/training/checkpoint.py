"""Checkpoints of a run: written whole or not at all, by all ranks together, while training goes on."""

from __future__ import annotations

import json
import logging
import math
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from torchrec_amort.errors import InputError
from torchrec_amort.files import write_json
from torchrec_amort.lock import FolderLock
from torchrec_amort.models.managed import FIRST_ROWS, refuse_other_ranks
from torchrec_amort.stores import local_path
from torchrec_amort.training.average import local_tensors
from torchrec_amort.training.processes import is_first
from torchrec_amort.training.report import Report
from torchrec_amort.training.sharding import ShardedModel

CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums.json"
BEST = "best.json"
READ_BYTES = 2**20

# What reading the metadata of a damaged checkpoint raises.
_UNREADABLE = (OSError, ValueError, EOFError, pickle.UnpicklingError)

Result = TypeVar("Result")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where in its training a model is: the next step of an epoch, and the steps made in all."""

    epoch: int = 0
    step: int = 0
    total_steps: int = 0


@dataclass(frozen=True)
class Best:
    """The best model that validations of a run have found.

    Args:
        step: it was made with; 0 before the first validation.
        value: of the metric.
        since: validations after it.
    """

    step: int = 0
    value: float = math.nan
    since: int = 0

    @property
    def checkpoint(self) -> str:
        """Name of its checkpoint."""
        return _name(self.step)

    def after(self, step: int, value: float, *, more_is_better: bool) -> Best:
        """The best one after a validation."""
        if not self.step or (value > self.value if more_is_better else value < self.value):
            return Best(step, value)
        return replace(self, since=self.since + 1)


class CheckpointWriter:
    """Writes a run's checkpoints in the background. All ranks make and call it together.

    A checkpoint gets its name when all ranks have written it and the checksums of its files are there; older ones go
    then. Tensors are copied to the host first, which is what training waits for.

    Args:
        run: the run's folder.
        keep: how many checkpoints stay, the latest ones; that of the best model stays besides.
        lock: of the run's folder, on rank 0; once it is lost, no checkpoint is written any more.

    Example::

        with CheckpointWriter("runs/first", keep=2) as writer:
            writer.save(model, Position(epoch=0, step=100, total_steps=100), report)
    """

    def __init__(self, run: str | Path, keep: int, lock: FolderLock | None = None) -> None:
        self._folder, self._keep, self._lock = local_path(run) / CHECKPOINTS, keep, lock
        self._is_first = is_first()
        # Of its own, so that what is written in the background does not meet what training sends.
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        """The writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last checkpoint; whether it is written matters only if training did not fail."""
        if kind is None:
            self.wait()
        self._thread.shutdown()

    def save(self, model: ShardedModel, position: Position, report: Report, best: Best | None = None) -> None:
        """Start to write a checkpoint; waits for the one before.

        Args:
            model: weights, their average if there is one, and optimizers' states.
            position: where its training is.
            report: what has not been reported yet.
            best: what its validations have found, if there were any.

        Raises:
            InputError: the one before could not be written, or the run's folder is not this job's any more.
        """
        self.wait()
        final = self._folder / _name(position.total_steps)
        temporary = self._folder / f".{final.name}.tmp"
        self._raise_together(self._make_room(temporary))
        # Of what each rank has a copy, any one's may be written.
        model.broadcast_buffers()
        state = {
            **_training_state(model),
            "model": model.module.state_dict(),
            "position": _to_tensors(position),
            "report": report.state(),
            "random": _random_state(),
        }
        saved = dcp.async_save(
            _flat(state),
            checkpoint_id=temporary,
            process_group=self._group,
            planner=DefaultSavePlanner(flatten_state_dict=False),
            async_stager=BlockingAsyncStager(),
        )
        self._writing = self._thread.submit(
            self._finish, cast("Future[object]", saved), temporary, final, best or Best()
        )

    def wait(self) -> None:
        """Wait until the checkpoint that is being written has its name.

        Raises:
            InputError: it could not be written: the disk is full, for instance. All ranks raise it.
        """
        if self._writing is None:
            return
        error = self._writing.exception()
        self._writing = None
        self._raise_together(error)

    def _make_room(self, temporary: Path) -> InputError | None:
        """Remove what an earlier process left where a checkpoint is to be written; why not, if that may not be."""
        try:
            if self._lock is not None:
                self._lock.refuse_lost()
        except InputError as error:
            return error
        if self._is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        return None

    def _raise_together(self, error: BaseException | None) -> None:
        """Raise on all ranks if one of them has an error; all of them come here before one goes on."""
        failed = torch.tensor([int(error is not None)])
        dist.all_reduce(failed, group=self._group)
        if isinstance(error, InputError):
            raise error
        if int(failed):
            reason = _reason(error) if error else "on another rank"
            raise InputError(
                f"{self._folder}: a checkpoint could not be written ({reason}): "
                "make room or choose another folder, then go on from the last one with --resume true"
            ) from error

    def _finish(self, saved: Future[object], temporary: Path, final: Path, best: Best) -> None:
        """Once all ranks have written, the rest is the first one's work."""
        if not self._is_first:
            saved.result()
            return
        try:
            saved.result()
            if best.step:
                write_json(temporary / BEST, asdict(best))
            write_json(temporary / CHECKSUMS, {path.name: _checksum(path) for path in sorted(temporary.iterdir())})
            if self._lock is not None:
                self._lock.refuse_lost()
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        # Later ones were skipped for damage; their steps are made anew.
        kept = [folder for folder in _newest_first(self._folder) if folder.name <= final.name][: self._keep]
        for folder in self._folder.iterdir():
            if folder not in kept and folder.name != best.checkpoint:
                shutil.rmtree(folder)


def load_checkpoint(run: str | Path, model: ShardedModel, report: Report) -> tuple[Position, Best]:
    """Take up all that a run's last good checkpoint has, saved by any number of ranks.

    A managed table goes on on the same number of ranks only.

    Random numbers go on where they were on the same number of ranks only.

    Args:
        run: the run's folder.
        model: gets weights, their average and optimizers' states.
        report: gets what had not been reported yet.

    Returns:
        tuple: from where to go on, and the best model until then.

    Raises:
        InputError: there is no checkpoint, or none that is whole and of this model.
    """
    _init_optimizers(model)
    state, position, random = _training_state(model), _to_tensors(Position()), _random_state()
    unreported = report.state()
    others = _flat({**state, "position": position, "report": unreported, "random": random})

    def load(folder: Path) -> None:
        saved = _saved_keys(folder)
        # Another number of ranks left no random numbers for this one.
        wanted = {key: value for key, value in others.items() if key in saved or not key.startswith("random/")}
        _load(folder, model.module, wanted)

    folders = _newest_first(local_path(run) / CHECKPOINTS)
    _, folder = _first_good(run, folders, load)
    _set_optimizers(model, state)
    report.load_state(unreported)
    _set_random_state(random)
    return Position(**{name: int(value) for name, value in position.items()}), _best(folder)


def load_start(run: str | Path, model: ShardedModel, grown: Collection[str], optimizer: float) -> Path:
    """Take up weights, and optimizers' states, of another run, sharded in any way. All ranks call it together.

    Rows that a table has more than the other run's stay as they are. The checkpoint is that of `load_weights`.

    Args:
        run: the other run's folder.
        model: gets the weights, averaged if there is an average, and optimizers' states.
        grown: names of tables that have more rows.
        optimizer: 0 for no state; else all are taken over, and row-wise Adagrad's sums times this.

    Returns:
        Path: the checkpoint's folder.

    Raises:
        InputError: there is no checkpoint, or none that is whole and fits the model.
    """
    state: dict[str, Any] = {}
    if optimizer:
        _init_optimizers(model)
        state = _optimizers_state(model)
    states = _flat(state)

    def load(folder: Path) -> None:
        _load(folder, model.module, states, _weights_name(folder), _GrownTables(grown))

    _, folder = _first_good(run, _best_first(_newest_first(local_path(run) / CHECKPOINTS)), load)
    if optimizer:
        # In fbgemm's words, and in those of TorchRec's optimizer of data-parallel tables.
        sums = {key: sum_ for key, sum_ in states.items() if key.endswith((".momentum1", "/sum"))}
        for of_rank in local_tensors(sums):
            of_rank.mul_(optimizer)
        _set_optimizers(model, state)
    return folder


class _GrownTables(DefaultLoadPlanner):
    """Reads tables into ones of more rows: each rank what is there of its own rows.

    Args:
        tables: their names.
    """

    def __init__(self, tables: Collection[str]) -> None:
        super().__init__(flatten_state_dict=False)
        self._weights = tuple(f".{table}.weight" for table in tables)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Have each such table, and its optimizer's states, pass for one of as many rows as there are now."""
        assert metadata is not None
        saved = dict(metadata.state_dict_metadata)
        for key, tensor in state_dict.items():
            of_key = saved.get(key)
            is_grown = any(f"{weight}/" in f"{key}/" for weight in self._weights)
            if is_grown and isinstance(of_key, TensorStorageMetadata) and of_key.size[1:] == tensor.size()[1:]:
                saved[key] = replace(of_key, size=tensor.size())
        super().set_up_planner(state_dict, replace(metadata, state_dict_metadata=saved), is_coordinator)


def load_weights(run: str | Path, model: nn.Module) -> Path:
    """Load the weights of a run into a model, sharded or not, averaged if there is an average.

    They are those of the best checkpoint if the run validated, else of the last one; of the last good one if that is
    damaged.

    Args:
        run: the run's folder.
        model: an `AmortizedDLRMTrain` of the run's config, sharded on all ranks or whole in one process.

    Returns:
        Path: the checkpoint's folder.

    Raises:
        InputError: there is no checkpoint, or none that is whole and of this model.
    """

    def load(folder: Path) -> None:
        _load(folder, model, {}, _weights_name(folder))

    return _first_good(run, _best_first(_newest_first(local_path(run) / CHECKPOINTS)), load)[1]


def refuse_ranks(run: str | Path) -> None:
    """Refuse a run whose managed tables are spread over another number of ranks, before any model is built.

    A run that has no checkpoint which can be read is left to who loads it.

    Args:
        run: the run's folder.

    Raises:
        InputError: they are.
    """
    for folder in _newest_first(local_path(run) / CHECKPOINTS):
        try:
            saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
            maps: dict[str, Any] = {
                key: torch.empty(tensor.size, dtype=tensor.properties.dtype)
                for key, tensor in saved.items()
                if FIRST_ROWS.search(key) and isinstance(tensor, TensorStorageMetadata)
            }
            if maps:
                _read(maps, folder, alone=True)
        except (*_UNREADABLE, CheckpointException):
            continue
        refuse_other_ranks(maps, str(folder))
        return


def _weights_name(folder: Path) -> str:
    """What a checkpoint calls the weights that it is used with."""
    return "average" if any(key.startswith("average/") for key in _saved_keys(folder)) else "model"


def has_checkpoint(run: str | Path) -> bool:
    """Whether a run has a checkpoint, whole or damaged."""
    return bool(_newest_first(local_path(run) / CHECKPOINTS))


def _newest_first(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.glob("step-*"), reverse=True)


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _best(folder: Path) -> Best:
    """The best model when a checkpoint was written."""
    path = folder / BEST
    return Best(**json.loads(path.read_text())) if path.exists() else Best()


def _best_first(newest_first: list[Path]) -> list[Path]:
    """Checkpoints in the order in which to take them for use."""
    for folder in newest_first:
        try:
            best = _best(folder)
        except (OSError, ValueError, TypeError):
            continue  # damaged, as whoever loads it is told
        if not best.step:
            break
        first = folder.with_name(best.checkpoint)
        return [first, *(other for other in newest_first if other != first)]
    return newest_first


def _first_good(run: str | Path, folders: Sequence[Path], load: Callable[[Path], Result]) -> tuple[Result, Path]:
    """What `load` makes of the first checkpoint that it does not refuse, and that checkpoint."""
    if not folders:
        raise InputError(f"{run}: no checkpoint in {CHECKPOINTS}/: train first, or give another run")
    errors: list[InputError] = []
    for folder in folders:
        try:
            result = load(folder)
        except InputError as error:
            errors.append(error)
            continue
        for skipped in errors if not dist.is_initialized() or is_first() else ():
            _logger.warning("%s; %s is used instead", skipped, folder.name)
        return result, folder
    raise errors[0]


def _to_tensors(position: Position) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in vars(position).items()}


def _training_state(model: ShardedModel) -> dict[str, Any]:
    """The state of the optimizers, and the averaged weights if there are any."""
    state = _optimizers_state(model)
    return state if model.average is None else {**state, "average": model.average.weights}


def _init_optimizers(model: ShardedModel) -> None:
    # AdamW has no state to load into before its first step, so TorchRec makes one with gradients of zero.
    model.optimizer.init_state()


def _optimizers_state(model: ShardedModel) -> dict[str, Any]:
    """For each optimizer, parameter and name, a tensor; this rank has those of its own tables only."""
    return {
        "table_optimizer": model.module.fused_optimizer.state_dict()["state"],
        "dense_optimizer": model.optimizer.state_dict()["state"],
    }


def _set_optimizers(model: ShardedModel, state: Mapping[str, Any]) -> None:
    model.module.fused_optimizer.load_state_dict(
        {**model.module.fused_optimizer.state_dict(), "state": state["table_optimizer"]}
    )
    model.optimizer.load_state_dict({**model.optimizer.state_dict(), "state": state["dense_optimizer"]})


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tensors of a tree of mappings by their paths.

    torch flattens too, but takes a rank that does not have all of a checkpoint's keys, as one without another
    rank's table has not, for one that reads an old format.
    """
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def _random_state() -> dict[str, Tensor]:
    """State of this rank's random numbers, which nobody else has a use for."""
    key = f"{dist.get_rank()}_of_{dist.get_world_size()}"
    state = {f"cpu_{key}": torch.get_rng_state()}
    return state | ({f"cuda_{key}": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        (torch.cuda.set_rng_state if name.startswith("cuda") else torch.set_rng_state)(value)


def _load(
    folder: Path,
    module: nn.Module,
    others: Mapping[str, Any],
    weights_name: str = "model",
    planner: DefaultLoadPlanner | None = None,
) -> None:
    """Load a module's weights, and other tensors in place."""
    _refuse_damage(folder)
    weights = module.state_dict()
    state = _flat({**others, weights_name: weights})
    planner = planner or DefaultLoadPlanner(flatten_state_dict=False)
    try:
        for key in sorted(_saved_keys(folder)):
            if key.startswith(f"{weights_name}/") and key not in state:
                raise ValueError(f"it has {key}, which the model has not")
        _read(state, folder, planner, alone=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise _unusable(folder, error) from error
    refuse_other_ranks(weights, str(folder))
    module.load_state_dict(weights)


def _read(state: dict[str, Any], folder: Path, planner: DefaultLoadPlanner | None = None, *, alone: bool) -> None:
    """Read tensors of a checkpoint in place: all ranks together, or this process alone."""
    with warnings.catch_warnings():
        # One process without a group, as one that serves, is as meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder, planner=planner, no_dist=alone)


def _refuse_damage(folder: Path) -> None:
    """Refuse files that are not what was written; each rank looks at some of them."""
    try:
        written = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        raise _unusable(folder, error) from error
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = [name for name in sorted(written)[rank::world_size] if _checksum(folder / name) != written[name]]
    damaged: list[list[str]] = [[] for _ in range(world_size)]
    if dist.is_initialized():
        dist.all_gather_object(damaged, mine)
    if files := sum(damaged, mine):
        raise _unusable(folder, ValueError(f"{files[0]} is not what was written"))


def _checksum(path: Path) -> int | None:
    """CRC-32 of a file, None if there is none."""
    if not path.is_file():
        return None
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _saved_keys(folder: Path) -> set[str]:
    try:
        return set(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    except _UNREADABLE as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: BaseException) -> InputError:
    return InputError(
        f"{folder}: the checkpoint is damaged or does not fit the model ({_reason(error)}): "
        "use the config it was trained with, or another run"
    )


def _reason(error: BaseException) -> str:
    """The first sentence of the innermost message of an error."""
    lines = [line for line in str(error).splitlines() if "Error" in line or "mismatch" in line] or [str(error)]
    return lines[-1].strip().split(". ")[0].rstrip(".")
