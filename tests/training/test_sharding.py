from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from torchrec_amort.training.sharding import OptimizerConfig, shard

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
