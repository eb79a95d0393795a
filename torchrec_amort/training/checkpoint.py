"""Checkpoints of a run: written whole or not at all, by all ranks together, while training goes on."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from torchrec_amort.errors import InputError
from torchrec_amort.files import write_json
from torchrec_amort.lock import FolderLock
from torchrec_amort.models.managed import refuse_other_ranks
from torchrec_amort.stores import local_path
from torchrec_amort.training.processes import is_first
from torchrec_amort.training.report import Report
from torchrec_amort.training.sharding import ShardedModel

CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums.json"
READ_BYTES = 2**20

Result = TypeVar("Result")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where in its training a model is: the next step of an epoch, and the steps made in all."""

    epoch: int = 0
    step: int = 0
    total_steps: int = 0


class CheckpointWriter:
    """Writes a run's checkpoints in the background. All ranks make and call it together.

    A checkpoint gets its name when all ranks have written it and the checksums of its files are there; older ones go
    then. Tensors are copied to the host first, which is what training waits for.

    Args:
        run: the run's folder.
        keep: how many checkpoints stay, the latest ones.
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

    def save(self, model: ShardedModel, position: Position, report: Report) -> None:
        """Start to write a checkpoint; waits for the one before.

        Args:
            model: weights, their average if there is one, and optimizers' states.
            position: where its training is.
            report: what has not been reported yet.

        Raises:
            InputError: the one before could not be written, or the run's folder is not this job's any more.
        """
        self.wait()
        final = self._folder / f"step-{position.total_steps:09d}"
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
        self._writing = self._thread.submit(self._finish, cast("Future[object]", saved), temporary, final)

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

    def _finish(self, saved: Future[object], temporary: Path, final: Path) -> None:
        """Once all ranks have written, the rest is the first one's work."""
        if not self._is_first:
            saved.result()
            return
        try:
            saved.result()
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
            if folder not in kept:
                shutil.rmtree(folder)


def load_checkpoint(run: str | Path, model: ShardedModel, report: Report) -> Position:
    """Take up all that a run's last good checkpoint has, saved by any number of ranks.

    A managed table goes on on the same number of ranks only.

    Random numbers go on where they were on the same number of ranks only.

    Args:
        run: the run's folder.
        model: gets weights, their average and optimizers' states.
        report: gets what had not been reported yet.

    Returns:
        Position: from where to go on.

    Raises:
        InputError: there is no checkpoint, or none that is whole and of this model.
    """
    # AdamW has no state to load into before its first step, so TorchRec makes one with gradients of zero.
    model.optimizer.init_state()
    state, position, random = _training_state(model), _to_tensors(Position()), _random_state()
    unreported = report.state()
    others = _flat({**state, "position": position, "report": unreported, "random": random})

    def load(folder: Path) -> None:
        saved = _saved_keys(folder)
        # Another number of ranks left no random numbers for this one.
        wanted = {key: value for key, value in others.items() if key in saved or not key.startswith("random/")}
        _load(folder, model.module, wanted)

    _last_good(run, load)
    model.module.fused_optimizer.load_state_dict(
        {**model.module.fused_optimizer.state_dict(), "state": state["table_optimizer"]}
    )
    model.optimizer.load_state_dict({**model.optimizer.state_dict(), "state": state["dense_optimizer"]})
    report.load_state(unreported)
    _set_random_state(random)
    return Position(**{name: int(value) for name, value in position.items()})


def load_weights(run: str | Path, model: nn.Module) -> Path:
    """Load the weights of a run's last good checkpoint, averaged if it has an average, into a model, sharded or not.

    Args:
        run: the run's folder.
        model: an `AmortizedDLRMTrain` of the run's config, sharded on all ranks or whole in one process.

    Returns:
        Path: the checkpoint's folder.

    Raises:
        InputError: there is no checkpoint, or none that is whole and of this model.
    """

    def load(folder: Path) -> None:
        is_averaged = any(key.startswith("average/") for key in _saved_keys(folder))
        _load(folder, model, {}, "average" if is_averaged else "model")

    return _last_good(run, load)[1]


def has_checkpoint(run: str | Path) -> bool:
    """Whether a run has a checkpoint, whole or damaged."""
    return bool(_newest_first(local_path(run) / CHECKPOINTS))


def _newest_first(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.glob("step-*"), reverse=True)


def _last_good(run: str | Path, load: Callable[[Path], Result]) -> tuple[Result, Path]:
    """What `load` makes of the newest checkpoint that it does not refuse, and that checkpoint."""
    folders = _newest_first(local_path(run) / CHECKPOINTS)
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
    """For each optimizer, parameter and name, a tensor; this rank has those of its own tables only.

    And the averaged weights, if there are any.
    """
    state = {
        "table_optimizer": model.module.fused_optimizer.state_dict()["state"],
        "dense_optimizer": model.optimizer.state_dict()["state"],
    }
    return state if model.average is None else {**state, "average": model.average.weights}


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


def _load(folder: Path, module: nn.Module, others: Mapping[str, Any], weights_name: str = "model") -> None:
    """Load a module's weights, and other tensors in place."""
    _refuse_damage(folder)
    weights = module.state_dict()
    state = _flat({**others, weights_name: weights})
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    try:
        for key in sorted(_saved_keys(folder)):
            if key.startswith(f"{weights_name}/") and key not in state:
                raise ValueError(f"it has {key}, which the model has not")
        with warnings.catch_warnings():
            # One process without a group, as one that serves, is as meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, checkpoint_id=folder, planner=planner, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise _unusable(folder, error) from error
    refuse_other_ranks(weights, str(folder))
    module.load_state_dict(weights)


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
    except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
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
