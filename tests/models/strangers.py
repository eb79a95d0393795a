"""Ranking models as their users write them: none knows of requests, candidates or histories."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
    KeyedTensor,
)
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection
from torchrec.modules.mlp import MLP

NUM_DENSE = 3
# Rows and columns of each table.
TABLES = {"user": (20, 8), "country": (5, 8), "item": (30, 8), "tags": (12, 8)}
WIDE_TABLES = {"user": (20, 64), "country": (5, 8), "item": (30, 16), "tags": (12, 8)}


def make_bags(tables: dict[str, tuple[int, int]] = TABLES, is_weighted: bool = False) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"t_{name}", feature_names=[name], num_embeddings=rows, embedding_dim=columns, init_fn=_normal
            )
            for name, (rows, columns) in tables.items()
        ],
        is_weighted=is_weighted,
    )


def make_events(dim: int = 8) -> EmbeddingCollection:
    item = EmbeddingConfig(
        name="t_event",
        feature_names=["history_item", "candidate_item"],
        num_embeddings=TABLES["item"][0],
        embedding_dim=dim,
        init_fn=_normal,
    )
    return EmbeddingCollection(tables=[item])


def _normal(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=0.5)


def _features(bags: EmbeddingBagCollection) -> list[str]:
    return [name for table in bags.embedding_bag_configs() for name in table.feature_names]


def _in_order(bags: KeyedTensor, features: Sequence[str]) -> list[Tensor]:
    # `values()` of TorchRec's own collection has another order once its tables are sharded.
    return [bags[name] for name in features]


class MMoE(nn.Module):
    """Two tasks of experts and gates over everything (Ma et al., KDD 2018), with batch norm and dropout."""

    def __init__(self, bags: EmbeddingBagCollection, num_dense: int) -> None:
        super().__init__()
        self.bags, self.features = bags, _features(bags)
        width = num_dense + sum(c.embedding_dim * len(c.feature_names) for c in bags.embedding_bag_configs())
        self.norm = nn.BatchNorm1d(width)
        self.experts = nn.ModuleList(MLP(width, [16, 8]) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(width, 3) for _ in range(2))
        self.heads = nn.ModuleList(nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 1)) for _ in range(2))

    def forward(self, sparse: KeyedJaggedTensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(torch.cat([*_in_order(self.bags(sparse), self.features), dense], dim=1))
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        mixed = [(gate(x).softmax(1).unsqueeze(2) * experts).sum(1) for gate in self.gates]
        click, buy = (head(one).squeeze(1) for head, one in zip(self.heads, mixed, strict=True))
        return click, buy


class DIN(nn.Module):
    """A candidate's weights over the events of a list (Zhou et al., KDD 2018), from a collection of its own."""

    def __init__(self, bags: EmbeddingBagCollection, events: EmbeddingCollection, num_dense: int) -> None:
        super().__init__()
        self.bags, self.events, self.features = bags, events, _features(bags)
        width = num_dense + sum(c.embedding_dim * len(c.feature_names) for c in bags.embedding_bag_configs())
        self.pooling = Pooling(8)
        self.mlp = nn.Sequential(nn.Linear(width + 8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor, lists: KeyedJaggedTensor) -> Tensor:
        looked_up = self.events(lists)
        pooled = self.pooling(looked_up["seen"], looked_up["of_candidate"].values())
        bags = _in_order(self.bags(sparse), self.features)
        logits: Tensor = self.mlp(torch.cat([*bags, pooled, dense], dim=1))
        return logits


class Pooling(nn.Module):
    """DIN's weighted sum of events; a module, which pipelines do not trace."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(3 * dim, 1)

    def forward(self, seen: JaggedTensor, item: Tensor) -> Tensor:
        rows = torch.repeat_interleave(torch.arange(len(item)), seen.lengths())
        event, mine = seen.values(), item[rows]
        weights = self.weigh(torch.cat([event, mine, event * mine], dim=1)).sigmoid()
        return torch.zeros_like(item).index_add(0, rows, weights * event)


class OwnForward(DLRM):
    """A DLRM whose dense vector is also added to the logits, and that scales them."""

    def __init__(self, bags: EmbeddingBagCollection) -> None:
        super().__init__(bags, NUM_DENSE, [16, 8], [16, 1])
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        dense = self.dense_arch(dense_features)
        logits: Tensor = self.over_arch(self.inter_arch(dense, self.sparse_arch(sparse_features)))
        return self.scale * logits + dense.mean(1, keepdim=True)


MODELS: dict[str, Callable[[EmbeddingBagCollection], nn.Module]] = {
    "DLRM": lambda bags: DLRM(bags, NUM_DENSE, [16, 8], [16, 1]),
    "DLRM_DCN": lambda bags: DLRM_DCN(bags, NUM_DENSE, [16, 8], [16, 1], 2, 4),
    "DLRM_Projection": lambda bags: DLRM_Projection(bags, NUM_DENSE, [16, 8], [16, 1], [16, 16], [16, 16]),
    "SimpleDeepFMNN": lambda bags: SimpleDeepFMNN(NUM_DENSE, bags, 12, 6),
    "MMoE": lambda bags: MMoE(bags, NUM_DENSE),
    "OwnForward": OwnForward,
}


def jagged(lists: Sequence[Sequence[int]]) -> JaggedTensor:
    values = [value for one in lists for value in one]
    return JaggedTensor(torch.tensor(values, dtype=torch.int64), lengths=torch.tensor([len(one) for one in lists]))
