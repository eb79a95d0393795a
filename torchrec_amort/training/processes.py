"""The processes of a job: one rank each, under torchrun or alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_amort.schema import InputError


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the job's process group: nccl on GPUs, gloo on CPUs.

    Under torchrun the ranks are those of its environment; without it, this process is the only one.

    After an error ranks do not leave it: one that fails shows its traceback before the others notice that it is gone.

    Yields:
        torch.device: this rank's device.

    Raises:
        InputError: torchrun may start the ranks of several nodes again, but keeps what they told each other before.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(
            backend, store=_store(), rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    has_failed = True
    try:
        yield device
        has_failed = False
    finally:
        if not has_failed or dist.get_world_size() == 1:
            dist.destroy_process_group()


def _store() -> dist.Store:
    """Where the ranks of this start of a job find each other.

    Torchrun keeps one store for all starts, and ranks that are started again wait for ever for those that they find
    there (pytorch/pytorch issue 135712). Its count of restarts tells starts apart, on one node.
    """
    env = os.environ
    is_kept = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if is_kept and env["WORLD_SIZE"] != env["LOCAL_WORLD_SIZE"]:
        raise InputError(
            f"torchrun may start these {env['WORLD_SIZE']} ranks of several nodes again, but keeps the store in which "
            "they find each other: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, or --max-restarts 0"
        )
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore(f"start-{env['TORCHELASTIC_RESTART_COUNT']}", store) if is_kept else store


def is_first() -> bool:
    """Whether this is rank 0, the one that talks and writes."""
    return dist.get_rank() == 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on each of them."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def gather_on_first(record: Any) -> list[Any]:
    """What every rank gives, in order of rank, on rank 0; nothing on the others."""
    records: list[Any] | None = [None] * dist.get_world_size() if is_first() else None
    dist.gather_object(record, records)
    return records or []


class Terminated(Exception):
    """The job was told to stop, as by a scheduler that wants its place, and did so in order."""


class TerminationRequests:
    """Takes note of SIGTERM instead of dying of it. All ranks make and ask it together.

    Example::

        with TerminationRequests() as requests:
            while not requests.any_rank_has_one():
                step()
    """

    def __init__(self) -> None:
        self._is_asked = False
        # On the host, so that asking does not wait for the GPU.
        self._group = dist.new_group(backend="gloo")

    def __enter__(self) -> TerminationRequests:
        """The requests from now on."""
        self._before = signal.signal(signal.SIGTERM, self._take_note)
        return self

    def __exit__(self, *_: object) -> None:
        """Die of SIGTERM again."""
        signal.signal(signal.SIGTERM, self._before)

    def _take_note(self, *_: object) -> None:
        self._is_asked = True

    def any_rank_has_one(self) -> bool:
        """Whether a rank was asked to stop: the same answer on all of them."""
        asked = torch.tensor([int(self._is_asked)])
        dist.all_reduce(asked, group=self._group)
        return bool(asked)
