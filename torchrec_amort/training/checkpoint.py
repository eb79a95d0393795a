"""Checkpoints of a run: written whole or not at all, by all ranks together."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

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
    """Write weights, both optimizers' states and the position. All ranks call it together.

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
    dcp.save({**_state(model), "position": vars(position)}, checkpoint_id=temporary)
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
    state: dict[str, Any] = {**_state(model), "position": vars(Position())}
    _load(last_checkpoint(run), state)
    model.module.load_state_dict(state["model"])
    model.module.fused_optimizer.load_state_dict(state["table_optimizer"])
    model.optimizer.load_state_dict(state["dense_optimizer"])
    return Position(**state["position"])


def load_weights(run: str | Path, model: nn.Module) -> None:
    """Load the weights of a run's last checkpoint into a model, sharded or not.

    Args:
        run: the run's folder.
        model: an `AmortizedDLRMTrain` of the run's config, sharded on all ranks or whole in one process.

    Raises:
        InputError: there is no checkpoint, or it is of another model.
    """
    state = {"model": model.state_dict()}
    _load(last_checkpoint(run), state)
    model.load_state_dict(state["model"])


def last_checkpoint(run: str | Path) -> Path:
    """The folder of a run's last checkpoint.

    Raises:
        InputError: the run has none.
    """
    folders = sorted((Path(run) / CHECKPOINTS).glob("step-*"))
    if not folders:
        raise InputError(f"{run}: no checkpoint in {CHECKPOINTS}/: train first, or give another run")
    return folders[-1]


def _state(model: ShardedModel) -> dict[str, Any]:
    return {
        "model": model.module.state_dict(),
        "table_optimizer": model.module.fused_optimizer.state_dict(),
        "dense_optimizer": model.optimizer.state_dict(),
    }


def _load(folder: Path, state: dict[str, Any]) -> None:
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        reasons = [line for line in str(error).splitlines() if "Error" in line or "mismatch" in line]
        raise InputError(
            f"{folder}: the checkpoint does not fit the model ({(reasons or [str(error)])[-1].strip()}): "
            "use the config it was trained with, or another run"
        ) from error
