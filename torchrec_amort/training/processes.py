"""The processes of a job: one rank each, under torchrun or alone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_amort.errors import InputError


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the job's process group: nccl on GPUs, gloo on CPUs.

    Under torchrun the ranks are those of its environment; without it, this process is the only one.

    After an error ranks do not leave it: one that fails shows its traceback before the others notice that it is gone.

    Yields:
        torch.device: this rank's device.

    Raises:
        InputError: this host has fewer GPUs than ranks; or torchrun may start the ranks of several nodes again, but
            keeps what they told each other before.
    """
    device = _device()
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


def _device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > gpus:
        raise InputError(
            f"{ranks} ranks on this host but {gpus} GPU{'s' * (gpus > 1)}: start 1 rank per GPU, or hide the GPUs "
            "(CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


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
    """The sum of a tensor over all ranks, on each of them; on the rank's GPU if there is one, wherever it was."""
    total = values.to(_device_of_backend(values.device), copy=True)
    dist.all_reduce(total)
    return total


class _RowsOfAllRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
        sizes[dist.get_rank()] = len(rows)
        ctx.sizes = sum_over_ranks(sizes).tolist()
        padded = rows.new_zeros(max(ctx.sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        of_ranks = [torch.empty_like(padded) for _ in ctx.sizes]
        dist.all_gather(of_ranks, padded)
        return torch.cat([of_rank[:size] for of_rank, size in zip(of_ranks, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0].contiguous()).split(ctx.sizes)[dist.get_rank()]


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks, in order of rank, on each of them. All ranks call it together.

    Ranks may have different numbers of rows. Their gradient is the sum of all ranks' gradients.

    Args:
        rows: of this rank, on its device.
    """
    gathered: Tensor = _RowsOfAllRanks.apply(rows)
    return gathered


def _device_of_backend(otherwise: torch.device | str = "cpu") -> torch.device | str | int:
    """Where tensors have to be that ranks tell each other: nccl takes those of its GPU alone."""
    return torch.cuda.current_device() if dist.get_backend() == "nccl" else otherwise


def gather_on_first(record: Any) -> list[Any]:
    """What every rank gives, in order of rank, on rank 0; nothing on the others."""
    records: list[Any] | None = [None] * dist.get_world_size() if is_first() else None
    dist.gather_object(record, records)
    return records or []


def exchange(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Give each rank a part, and get the parts that all have for this one. All ranks call it together.

    Args:
        parts: one for each rank, of one dimension and one dtype.

    Returns:
        list: of each rank, in order.
    """
    device = _device_of_backend()
    sizes = torch.tensor([part.nbytes for part in parts], device=device)
    sizes_of_mine = torch.empty_like(sizes)
    dist.all_to_all_single(sizes_of_mine, sizes)
    sent = torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts])).to(device)
    received = sent.new_empty(int(sizes_of_mine.sum()))
    dist.all_to_all_single(received, sent, sizes_of_mine.tolist(), sizes.tolist())
    return [part.numpy().view(parts[0].dtype) for part in received.cpu().split(sizes_of_mine.tolist())]


def restarts() -> int:
    """How often torchrun has started this node's ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def restarts_of_all(device: torch.device) -> int:
    """The restarts of all ranks: each node counts its own, and one of them was the first to restart."""
    return int(sum_over_ranks(torch.tensor(restarts(), device=device)))


# SIGHUP is what the processes of a terminal that is closed get, as at the end of an ssh connection.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Under torchrun one Ctrl-C may come twice, from the terminal and from torchrun; a person takes longer.
SECONDS_TO_SECOND_CTRL_C = 1.0


class Stopped(BaseException):
    """A signal told the process to stop: SIGTERM, as of a scheduler that wants its place, or Ctrl-C.

    No `Exception`, as KeyboardInterrupt is none: what handles errors and goes on must not take it for one.

    Args:
        number: the signal.
        message: what became of the work.
    """

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def stop_signals(take: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Give the first of the signals that stop a process to a function, instead of dying of it.

    Later ones are ignored, but for a second Ctrl-C that is a person's: it raises KeyboardInterrupt. A signal that the
    process was started to ignore, as under nohup, stays ignored; outside of the main thread nothing changes, as Python
    has it.

    Args:
        take: called in the main thread, between any two of its instructions.

    Example::

        with stop_signals(lambda number: print(number.name)):
            model(batch)
    """
    taken_at: float | None = None

    def handle(number: int, _: object) -> None:
        nonlocal taken_at
        if taken_at is None:
            taken_at = time.monotonic()
            take(signal.Signals(number))
        elif number == signal.SIGINT and time.monotonic() - taken_at > SECONDS_TO_SECOND_CTRL_C:
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    handled = [number for number in STOP_SIGNALS if is_main and signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None is a handler that was not set in Python, which cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore_stop_signals(_: int) -> None:
    """Leave it to the rank when to stop: for the `worker_init_fn` of a DataLoader.

    Ctrl-C, and torchrun's signals, go to all processes of a group, and a rank whose workers died cannot finish its
    step. Workers end when their rank is done with them, or is gone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequests:
    """Takes note of SIGTERM and Ctrl-C instead of dying of them. All ranks make and ask it together.

    Example::

        with StopRequests() as requests:
            while requests.of_any_rank() is None:
                step()
    """

    def __init__(self) -> None:
        self._number = 0
        # On the host, so that asking does not wait for the GPU.
        self._group = dist.new_group(backend="gloo")

    def __enter__(self) -> StopRequests:
        """The requests from now on."""
        self._signals = stop_signals(self._take_note)
        self._signals.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave signals to who took them before."""
        self._signals.__exit__(*error)

    def _take_note(self, number: signal.Signals) -> None:
        self._number = number

    def of_any_rank(self) -> signal.Signals | None:
        """The signal that a rank was asked to stop by, if one was: the same answer on all of them."""
        number = torch.tensor([self._number])
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(int(number)) if int(number) else None
