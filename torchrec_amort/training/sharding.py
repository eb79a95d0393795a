"""From a model to its sharded, optimized form: planner, DistributedModelParallel, optimizers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_amort.training.average import TableDecay, WeightAverage


@dataclass(kw_only=True)
class OptimizerConfig:
    """How weights are moved.

    Args:
        table_lr: learning rate of the fused row-wise Adagrad of the embedding tables.
        table_eps: its epsilon.
        table_weight_decay: share by which all rows of the tables shrink in a step.
        dense_lr: learning rate of the AdamW of all other weights.
        weight_decay: weight decay of that AdamW.
    """

    table_lr: float = 0.05
    table_eps: float = 1e-8
    table_weight_decay: float = 0.0
    dense_lr: float = 2e-3
    weight_decay: float = 0.01


@dataclass(frozen=True)
class ShardedModel:
    """A model whose tables are spread over all ranks, and what moves its weights.

    Args:
        module: the DistributedModelParallel.
        plan: where each table went.
        optimizer: steps the weights that are not tables; tables are stepped in backward.
        decay: of the tables.
        average: of the weights over the steps of training, if wanted.
    """

    module: DistributedModelParallel
    plan: ShardingPlan
    optimizer: KeyedOptimizer
    decay: TableDecay
    average: WeightAverage | None

    def after_step(self, step: int) -> None:
        """Do what follows a step, the first one being 1: shrink the tables, move the average."""
        self.decay.update(step)
        if self.average is not None:
            self.average.update(step)


def shard(
    model: nn.Module,
    *,
    device: torch.device,
    optimizer: OptimizerConfig,
    batch_size: int,
    ids_per_request: Mapping[str, float] | None = None,
    average_decay: float | None = None,
) -> ShardedModel:
    """Spread the tables of a model over the ranks of the default process group, weights unchanged.

    The tables get TorchRec's fused row-wise Adagrad, all other weights AdamW.

    Args:
        model: unsharded, the same on every rank.
        device: of this rank.
        optimizer: learning rates.
        batch_size: requests in a rank's batch, for the planner's estimates.
        ids_per_request: ids that a request looks up in a table on average, for the planner's estimates;
            1 for tables that are not named.
        average_decay: decay of the weights' moving average at each step; no average if None.

    Returns:
        ShardedModel: of this rank.
    """
    collections = [m for m in model.modules() if isinstance(m, EmbeddingBagCollection | EmbeddingCollection)]
    for collection in collections:
        apply_optimizer_in_backward(
            RowWiseAdagrad, collection.parameters(), {"lr": optimizer.table_lr, "eps": optimizer.table_eps}
        )
    table_parameters = {id(parameter) for collection in collections for parameter in collection.parameters()}
    tables = {name for name, parameter in model.named_parameters() if id(parameter) in table_parameters}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sharders = _sharders(device)
    plan = _plan(model, collections, sharders, device, batch_size, ids_per_request or {})
    module = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    # TorchRec draws the shards of an EmbeddingBagCollection anew, on each rank for itself.
    module.load_state_dict(weights)
    dense = dict(in_backward_optimizer_filter(module.named_parameters()))
    return ShardedModel(
        module,
        plan,
        KeyedOptimizerWrapper(
            dense,
            lambda parameters: torch.optim.AdamW(
                parameters, lr=optimizer.dense_lr, weight_decay=optimizer.weight_decay
            ),
        ),
        TableDecay(module, tables, optimizer.table_weight_decay),
        None if average_decay is None else WeightAverage(module, average_decay),
    )


def _sharders(device: torch.device) -> list[ModuleSharder[nn.Module]]:
    # fbgemm has no CPU kernel that removes duplicate ids.
    return [
        EmbeddingBagCollectionSharder(),
        EmbeddingCollectionSharder(use_index_dedup=device.type == "cuda"),
    ]


def _plan(
    model: nn.Module,
    collections: Iterable[EmbeddingBagCollection | EmbeddingCollection],
    sharders: list[ModuleSharder[nn.Module]],
    device: torch.device,
    batch_size: int,
    ids_per_request: Mapping[str, float],
) -> ShardingPlan:
    """TorchRec's planner's choice, the same on every rank."""
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=[ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value],
            compute_kernels=[EmbeddingComputeKernel.FUSED.value],
            pooling_factors=[ids_per_request.get(table.name, 1.0)] * len(table.feature_names),
        )
        for collection in collections
        for table in _tables(collection)
    }
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=dist.get_world_size(),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
            compute_device=device.type,
        ),
        batch_size=batch_size,
        constraints=constraints,
    )
    return planner.collective_plan(model, sharders, dist.group.WORLD)


def _tables(collection: EmbeddingBagCollection | EmbeddingCollection) -> list[BaseEmbeddingConfig]:
    if isinstance(collection, EmbeddingBagCollection):
        return list(collection.embedding_bag_configs())
    return list(collection.embedding_configs())
