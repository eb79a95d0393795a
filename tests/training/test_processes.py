"""Ranks on hosts with GPUs, as far as a host without one can show it."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_amort.errors import InputError
from torchrec_amort.training.processes import process_group, sum_over_ranks


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """A group that has nccl's name, and the devices of what it was given; the meta device stands for the GPU."""
    summed: list[torch.device] = []
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    monkeypatch.setattr(dist, "all_reduce", lambda values: summed.append(values.device))
    yield summed


@pytest.mark.usefixtures("two_gpus")
def test_more_ranks_than_gpus_are_refused_before_cuda_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    message = r"4 ranks on this host but 2 GPUs: start 1 rank per GPU, or hide the GPUs \(CUDA_VISIBLE_DEVICES=\)"
    with pytest.raises(InputError, match=message), process_group():
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="but 1 GPU: start"), process_group():
        pass


@pytest.mark.parametrize("values", [torch.ones(2), torch.ones(2, device="meta")], ids=["cpu", "gpu"])
def test_sums_over_ranks_on_gpus_are_sums_of_what_is_on_gpus(values: Tensor, nccl: list[torch.device]) -> None:
    total = sum_over_ranks(values)
    assert nccl == [torch.device("meta")]
    assert total is not values
