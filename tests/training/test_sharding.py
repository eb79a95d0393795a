import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.types import ShardingPlan

from tests.launch import torchrun
from tests.training.every_way import WAYS, train_every_way
from tests.training.test_training import ROUNDING
from torchrec_amort.errors import InputError
from torchrec_amort.training import sharding as sharding_module
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.sharding import ShardingConfig, TableSharding, shard

ROWS, DIM = 6, 4


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Lookup(nn.Module):
    """One table of each kind."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"num_embeddings": ROWS, "embedding_dim": DIM, "feature_names": ["f"]}
        self.bags = EmbeddingBagCollection(tables=[EmbeddingBagConfig(name="bag", **sizes)])
        self.sequences = EmbeddingCollection(tables=[EmbeddingConfig(name="sequence", **sizes)])
        self.dense = nn.Linear(1, 1)

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        bags, sequences = self.bags(ids).values(), self.sequences(ids)["f"].values()
        total: Tensor = (bags * 0.3).sum() + (sequences * 0.7).sum() + 0 * self.dense.weight.sum()
        return total


@pytest.mark.usefixtures("one_rank")
def test_tables_move_by_row_wise_adagrad() -> None:
    torch.manual_seed(0)
    model = Lookup()
    expected = {name: weight.clone() for name, weight in model.state_dict().items() if "dense" not in name}
    optimizer = OptimizerConfig(table_lr=0.1)
    module = shard(model, device=torch.device("cpu"), optimizer=optimizer, batch_size=2).module
    ids = KeyedJaggedTensor(["f"], torch.tensor([1, 3]), lengths=torch.tensor([1, 1]))
    for _ in range(3):
        module(ids).backward()
    for name, slope in (("bags.embedding_bags.bag.weight", 0.3), ("sequences.embeddings.sequence.weight", 0.7)):
        weight, squares = expected[name], torch.zeros(ROWS)
        for _ in range(3):
            for row in (1, 3):
                squares[row] += slope**2
                weight[row] -= 0.1 * slope / (squares[row].sqrt() + 1e-8)
        (shards,) = module.state_dict()[name].local_shards()
        torch.testing.assert_close(shards.tensor, weight)


def reports(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k == "loss" or k.startswith("ne/")} for line in lines]


def test_losses_and_metrics_are_the_same_on_1_2_and_3_ranks_for_every_way(data_folder: Path, tmp_path: Path) -> None:
    train_every_way(str(data_folder), str(tmp_path / "1"))
    for ranks in (2, 3):
        torchrun(ranks, "tests.training.every_way", str(data_folder), str(tmp_path / str(ranks)))
    for way, kinds in WAYS.items():
        expected = reports(tmp_path / "1" / way)
        assert len(expected) == 3
        for ranks in (2, 3):
            run = tmp_path / str(ranks) / way
            plan = (run / "plan.txt").read_text()
            assert all(f" {kind} " in plan for kind in kinds), plan
            for line, same in zip(reports(run), expected, strict=True):
                assert line == pytest.approx(same, rel=ROUNDING)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        (ShardingConfig(tables={"sequences": TableSharding()}), "no table 'sequences', but ['bag', 'sequence']"),
        (
            ShardingConfig(default=TableSharding(ways=["grid_shard"])),
            "table 'bag' of the EmbeddingBagCollection may be ['grid_shard'], but ranks on cpu can make it",
        ),
        # It runs, but fbgemm's lookup would add up the ids of a sequence.
        (
            ShardingConfig(tables={"sequence": TableSharding(ways=["data_parallel"])}),
            "['table_wise', 'row_wise', 'column_wise'] only",
        ),
        (ShardingConfig(wire="bfloat16"), "sharding.wire is bfloat16, but ranks on cpu send float32 only"),
    ],
)
def test_what_cannot_be_is_refused(sharding: ShardingConfig, message: str) -> None:
    with pytest.raises(InputError) as error:
        shard(Lookup(), device=torch.device("cpu"), optimizer=OptimizerConfig(), batch_size=2, sharding=sharding)
    assert message in str(error.value)


@pytest.mark.usefixtures("one_rank")
def test_tables_that_are_one_are_refused_by_both_names() -> None:
    model = Lookup()
    model.sequences.embeddings["sequence"].weight = model.bags.embedding_bags["bag"].weight
    both = "bags.embedding_bags.bag.weight and sequences.embeddings.sequence.weight are one table"
    with pytest.raises(ValueError, match=both):
        shard(model, device=torch.device("cpu"), optimizer=OptimizerConfig(), batch_size=2)


class Reached(Exception):
    """Sharding went on."""


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("decay", "average", "option"),
    [(0.1, None, "optimizer.table_weight_decay"), (0.0, 0.9, "loop.average_decay"), (0.0, None, None)],
)
def test_a_cached_table_is_neither_decayed_nor_averaged(
    decay: float, average: float | None, option: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = EmbeddingShardingPlanner.collective_plan

    def cached(planner: EmbeddingShardingPlanner, *arguments: Any) -> ShardingPlan:
        plan = planned(planner, *arguments)
        plan.plan["sequences"]["sequence"].compute_kernel = "fused_uvm_caching"
        return plan

    def distributed(*_: Any, **__: Any) -> None:
        raise Reached

    monkeypatch.setattr(EmbeddingShardingPlanner, "collective_plan", cached)
    monkeypatch.setattr(sharding_module, "DistributedModelParallel", distributed)
    with pytest.raises(Reached if option is None else InputError) as error:
        shard(
            Lookup(),
            device=torch.device("cpu"),
            optimizer=OptimizerConfig(table_weight_decay=decay),
            batch_size=2,
            average_decay=average,
        )
    if option is not None:
        assert "table 'sequence' would be fused_uvm_caching" in str(error.value)
        assert f"what {option} does" in str(error.value)
        assert f"in sharding.tables.sequence.kernels, or leave {option} out" in str(error.value)


@pytest.mark.usefixtures("one_rank")
def test_the_planner_knows_the_memory_of_gpu_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Planner:
        def __init__(self, topology: Topology, **_: Any) -> None:
            storage = {(device.storage.hbm, device.storage.ddr) for device in topology.devices}
            assert storage == {(80 * 2**30, pages * os.sysconf("SC_PAGE_SIZE") // 4)}
            raise Reached

    pages = os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30 + device.index)
    )
    monkeypatch.setattr(sharding_module, "EmbeddingShardingPlanner", Planner)
    with pytest.raises(Reached):
        shard(Lookup(), device=torch.device("cuda", 0), optimizer=OptimizerConfig(), batch_size=2)
