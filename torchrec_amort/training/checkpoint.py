"""Checkpoints of a run: written whole or not at all, by all ranks together."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from torchrec_amort.schema import InputError
from torchrec_amort.training.processes import is_first
from torchrec_amort.training.sharding import ShardedModel

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Position:
    """Where in its training a model is: the next step of an epoch, and the steps made in all."""

    epoch: int = 0
    step: int = 0
    total_steps: int = 0


def save_checkpoint(run: str | Path, model: ShardedModel, position: Position) -> Path:
    """Write weights, their average if there is one, optimizers' states and the position. All ranks call it together.

    Args:
        run: the run's folder.
        model: what to save.
        position: where its training is.

    Returns:
        Path: the checkpoint's folder; it replaces those before it.
    """
    folder = Path(run) / CHECKPOINTS
    final = folder / f"step-{position.total_steps:09d}"
    temporary = folder / f".{final.name}.tmp"
    if is_first():
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    state = {**_training_state(model), "model": model.module.state_dict(), "position": _to_tensors(position)}
    dcp.save(_flat(state), checkpoint_id=temporary, planner=DefaultSavePlanner(flatten_state_dict=False))
    if is_first():
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in folder.iterdir():
            if old != final:
                shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(run: str | Path, model: ShardedModel) -> Position:
    """Take up weights and optimizers of a run's last checkpoint, saved by any number of ranks.

    Args:
        run: the run's folder.
        model: gets the weights.

    Returns:
        Position: from where to go on.

    Raises:
        InputError: there is no checkpoint, or it is of another model.
    """
    # AdamW has no state to load into before its first step, so TorchRec makes one with gradients of zero.
    model.optimizer.init_state()
    state, position = _training_state(model), _to_tensors(Position())
    _load(last_checkpoint(run), model.module, {**state, "position": position})
    model.module.fused_optimizer.load_state_dict(
        {**model.module.fused_optimizer.state_dict(), "state": state["table_optimizer"]}
    )
    model.optimizer.load_state_dict({**model.optimizer.state_dict(), "state": state["dense_optimizer"]})
    return Position(**{name: int(value) for name, value in position.items()})


def load_weights(run: str | Path, model: nn.Module) -> None:
    """Load the weights of a run's last checkpoint, averaged if it has an average, into a model, sharded or not.

    Args:
        run: the run's folder.
        model: an `AmortizedDLRMTrain` of the run's config, sharded on all ranks or whole in one process.

    Raises:
        InputError: there is no checkpoint, or it is of another model.
    """
    folder = last_checkpoint(run)
    is_averaged = any(key.startswith("average/") for key in _saved_keys(folder))
    _load(folder, model, {}, "average" if is_averaged else "model")


def last_checkpoint(run: str | Path) -> Path:
    """The folder of a run's last checkpoint.

    Raises:
        InputError: the run has none.
    """
    folders = sorted((Path(run) / CHECKPOINTS).glob("step-*"))
    if not folders:
        raise InputError(f"{run}: no checkpoint in {CHECKPOINTS}/: train first, or give another run")
    return folders[-1]


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


def _load(folder: Path, module: nn.Module, others: dict[str, Any], weights_name: str = "model") -> None:
    """Load a module's weights, and other tensors in place."""
    weights = module.state_dict()
    state = _flat({**others, weights_name: weights})
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    try:
        for key in sorted(_saved_keys(folder)):
            if key.startswith(f"{weights_name}/") and key not in state:
                raise ValueError(f"it has {key}, which the model has not")
        dcp.load(state, checkpoint_id=folder, planner=planner, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise _unusable(folder, error) from error
    module.load_state_dict(weights)


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
