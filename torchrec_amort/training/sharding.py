"""From a model to its sharded, optimized form: planner, DistributedModelParallel, optimizers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType
from torchrec.distributed.types import ShardedModule as TorchRecShardedModule
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_amort.bounds import AT_LEAST_ONE, POSITIVE, refuse_out_of_bounds
from torchrec_amort.errors import InputError
from torchrec_amort.models.managed import MAP, TABLE, ManagedCollection, ManagedCollectionSharder
from torchrec_amort.models.tables import refuse_tied_tables
from torchrec_amort.training.average import TableDecay, WeightAverage
from torchrec_amort.training.optimizers import (
    LearningRates,
    OptimizerConfig,
    copied_table_optimizer,
    dense_optimizer,
    fuse_table_optimizer,
)

ShardingWay = Literal[
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
]
Kernel = Literal["fused", "fused_uvm", "fused_uvm_caching"]
Wire = Literal["float32", "float16", "bfloat16"]
Collection: TypeAlias = EmbeddingBagCollection | EmbeddingCollection | ManagedCollection


@dataclass(kw_only=True)
class TableSharding:
    """What the planner may do with a table; among what it may, it takes what it estimates to be fastest.

    Args:
        ways: how its rows or columns may be spread over ranks; `docs/training.md` tells which run on which device.
        kernels: where its rows may be, unless it is `data_parallel`: `fused` in the device's memory, and on CUDA
            `fused_uvm` in the host's, or `fused_uvm_caching` there with a cache on the device, which goes with
            neither decay nor average.
        pooling_factor: ids that a request looks up in it on average; counted in the data unless given.
        min_columns: columns of a piece, at least, if it is spread by columns.
    """

    ways: list[ShardingWay] = field(default_factory=lambda: ["table_wise", "row_wise"])
    kernels: list[Kernel] = field(default_factory=lambda: ["fused"])
    pooling_factor: float | None = None
    min_columns: int | None = None

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {POSITIVE: ("pooling_factor",), AT_LEAST_ONE: ("min_columns",)}, "sharding.")


@dataclass(kw_only=True)
class ShardingConfig:
    """How the planner spreads tables over ranks.

    Args:
        default: for all tables that are not named.
        tables: for some tables, by their names.
        wire: type of embeddings and their gradients between ranks; other than `float32` on nccl only.
    """

    default: TableSharding = field(default_factory=TableSharding)
    tables: dict[str, TableSharding] = field(default_factory=dict)
    wire: Wire = "float32"


@dataclass(frozen=True)
class ShardedModel:
    """A model whose tables are spread over all ranks, and what moves its weights.

    Args:
        module: the DistributedModelParallel.
        plan: where each table went.
        optimizer: steps the weights that are not tables; tables are stepped in backward.
        rates: of both optimizers, as their schedules have them.
        decay: of the tables.
        average: of the weights over the steps of training, if wanted.
    """

    module: DistributedModelParallel
    plan: ShardingPlan
    optimizer: KeyedOptimizer
    rates: LearningRates
    decay: TableDecay
    average: WeightAverage | None

    def before_step(self, step: int) -> None:
        """Do what precedes a step, the first one being 1: set the learning rates."""
        self.rates.set(step)

    def after_step(self, step: int) -> None:
        """Do what follows a step, the first one being 1: shrink the tables, move the average."""
        self.decay.update(step)
        if self.average is not None:
            self.average.update(step)

    def broadcast_buffers(self) -> None:
        """Give all ranks the buffers of the first one, in the average, too. All ranks call it together.

        Running means of batch norm are of each rank's own batches. Buffers of sharded modules stay: each rank has its
        share of them.
        """
        average = {} if self.average is None else self.average.weights
        for name, buffer in _unsharded_buffers(self.module.module):
            for tensor in (buffer, average.get(name)):
                if tensor is not None:
                    dist.broadcast(tensor, 0)


def _unsharded_buffers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    yield from module.named_buffers(prefix, recurse=False)
    for name, child in module.named_children():
        if not isinstance(child, TorchRecShardedModule):
            yield from _unsharded_buffers(child, f"{prefix}.{name}" if prefix else name)


def shard(
    model: nn.Module,
    *,
    device: torch.device,
    optimizer: OptimizerConfig,
    batch_size: int,
    sharding: ShardingConfig | None = None,
    ids_per_request: Mapping[str, float] | None = None,
    average_decay: float | None = None,
    frozen: frozenset[str] = frozenset(),
) -> ShardedModel:
    """Spread the tables of a model over the ranks of the default process group, weights unchanged.

    The tables get an optimizer, fused with their lookup unless they are data-parallel, all other weights another one.

    Args:
        model: unsharded, the same on every rank.
        device: of this rank.
        optimizer: how weights are moved.
        batch_size: requests in a rank's batch, for the planner's estimates.
        sharding: what the planner may do; the defaults if None.
        ids_per_request: ids that a request looks up in a table on average, for the planner's estimates;
            1 for tables that are not named.
        average_decay: decay of the weights' moving average at each step; no average if None.
        frozen: names of tables that training leaves as they are.

    Returns:
        ShardedModel: of this rank.

    Raises:
        InputError: a table that is named does not exist, the device does nothing of what is allowed for it, it is
            cached and to be decayed or averaged, its optimizer is none of the device, or a group has no weight.
        ValueError: two tables are one.
    """
    refuse_tied_tables(model)
    sharding = sharding or ShardingConfig()
    collections = {
        name: m for name, m in model.named_modules() if isinstance(m, Collection) and not name.endswith(TABLE)
    }
    tables = {
        f"{path}.{name}": parameter
        for path, collection in collections.items()
        for name, parameter in collection.named_parameters()
    }
    sharders = _sharders(device, sharding.wire)
    constraints = _constraints(collections, sharders, device, sharding, ids_per_request or {})
    planner = EmbeddingShardingPlanner(
        topology=_topology(device),
        batch_size=batch_size,
        constraints=constraints,
    )
    plan = planner.collective_plan(model, list(sharders.values()), dist.group.WORLD)
    moved_beside = {"optimizer.table_weight_decay": optimizer.table_weight_decay, "loop.average_decay": average_decay}
    _refuse_cached(plan, [option for option, value in moved_beside.items() if value])
    copies = _data_parallel(plan, tables)
    moved = {name: parameter for name, parameter in tables.items() if name.rsplit(".", 2)[1] not in frozen}
    fuse_table_optimizer([parameter for name, parameter in moved.items() if name not in copies], optimizer, device)
    # fbgemm's tables have an optimizer in any case.
    kept = [parameter for name, parameter in tables.items() if name not in moved and name not in copies]
    apply_optimizer_in_backward(torch.optim.SGD, kept, {"lr": 0.0})
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if MAP not in name}
    module = DistributedModelParallel(model, device=device, plan=plan, sharders=list(sharders.values()))
    # TorchRec draws the shards of an EmbeddingBagCollection anew, on each rank for itself.
    module.load_state_dict({**module.state_dict(), **weights})
    weights_beside = dict(in_backward_optimizer_filter(module.named_parameters()))
    dense = dense_optimizer({name: weight for name, weight in weights_beside.items() if name not in copies}, optimizer)
    scheduled = [(module.fused_optimizer, optimizer.table_schedule), (dense, optimizer.dense_schedule)]
    stepped = dense
    if moved_copies := {name: weight for name, weight in weights_beside.items() if name in copies & moved.keys()}:
        of_copies = copied_table_optimizer(moved_copies, optimizer)
        scheduled.append((of_copies, optimizer.table_schedule))
        stepped = CombinedOptimizer([dense, of_copies])
    return ShardedModel(
        module,
        plan,
        stepped,
        LearningRates(scheduled),
        TableDecay(module, moved, optimizer.table_weight_decay),
        None if average_decay is None else WeightAverage(module, average_decay),
    )


def _topology(device: torch.device) -> Topology:
    """The ranks and what memory each has; TorchRec would assume 32 GiB of a GPU and 128 of the host."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return Topology(
        world_size=dist.get_world_size(),
        local_world_size=ranks,
        compute_device=device.type,
        hbm_cap=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        ddr_cap=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks,
    )


def _refuse_cached(plan: ShardingPlan, options: list[str]) -> None:
    """Refuse what writes to tables beside their lookups, where fbgemm's cache has newer rows and writes them back."""
    kernels = {table: sharding.compute_kernel for tables in plan.plan.values() for table, sharding in tables.items()}
    cached = [table for table, kernel in kernels.items() if kernel == EmbeddingComputeKernel.FUSED_UVM_CACHING.value]
    if cached and options:
        raise InputError(
            f"sharding: table {cached[0]!r} would be fused_uvm_caching, whose cache does not see what {options[0]} "
            f"does: allow fused or fused_uvm for it in sharding.tables.{cached[0]}.kernels, or leave {options[0]} out"
        )


def _sharders(device: torch.device, wire: Wire) -> dict[type[nn.Module], ModuleSharder[nn.Module]]:
    registry = None
    if wire != "float32":
        if device.type != "cuda":
            raise InputError(f"sharding.wire is {wire}, but ranks on {device.type} send float32 only: leave it out")
        precision = {"float16": CommType.FP16, "bfloat16": CommType.BF16}[wire]
        codecs = QCommsConfig(forward_precision=precision, backward_precision=precision)
        registry = get_qcomm_codecs_registry(codecs, device=device)
    # fbgemm has no CPU kernel that removes duplicate ids.
    return {
        EmbeddingBagCollection: EmbeddingBagCollectionSharder(qcomm_codecs_registry=registry),
        EmbeddingCollection: EmbeddingCollectionSharder(
            qcomm_codecs_registry=registry, use_index_dedup=device.type == "cuda"
        ),
        ManagedCollection: ManagedCollectionSharder(registry),
    }


def _constraints(
    collections: Mapping[str, Collection],
    sharders: Mapping[type[nn.Module], ModuleSharder[nn.Module]],
    device: torch.device,
    sharding: ShardingConfig,
    ids_per_request: Mapping[str, float],
) -> dict[str, ParameterConstraints]:
    """What the planner may do with each table."""
    tables = {table.name: (type(c), table) for c in collections.values() for table in _tables(c)}
    if unknown := sorted(set(sharding.tables) - set(tables)):
        raise InputError(f"sharding.tables: the model has no table {unknown[0]!r}, but {sorted(tables)}")
    constraints = {}
    for name, (kind, table) in tables.items():
        wanted = sharding.tables.get(name, sharding.default)
        possible = _ways(kind, sharders[kind], device)
        ways = [way for way in wanted.ways if way in possible]
        if not ways:
            raise InputError(
                f"sharding: table {name!r} of the {kind.__name__} may be {wanted.ways}, but ranks on {device.type} can "
                f"make it {possible} only: allow one of these for it in sharding.tables"
            )
        ids = wanted.pooling_factor or ids_per_request.get(name, 1.0)
        constraints[name] = ParameterConstraints(
            sharding_types=ways,
            compute_kernels=[*wanted.kernels, EmbeddingComputeKernel.DENSE.value],
            pooling_factors=[ids] * len(table.feature_names),
            min_partition=wanted.min_columns,
        )
    return constraints


def _ways(kind: type[nn.Module], sharder: ModuleSharder[nn.Module], device: torch.device) -> list[str]:
    """How ranks can spread a collection's tables."""
    possible = [way for way in get_args(ShardingWay) if way in sharder.sharding_types(device.type)]
    if kind is EmbeddingCollection and device.type == "cpu":
        # fbgemm's dense lookup on a CPU adds up the ids of a list, where a sequence needs each.
        possible.remove(ShardingType.DATA_PARALLEL.value)
    return possible


def _tables(collection: Collection) -> list[BaseEmbeddingConfig]:
    if isinstance(collection, EmbeddingBagCollection):
        return list(collection.embedding_bag_configs())
    return list(collection.embedding_configs())


def _data_parallel(plan: ShardingPlan, tables: Iterable[str]) -> set[str]:
    """The tables, by their keys in the state dict, of which each rank has a copy."""
    copies = set()
    for key in tables:
        path, _, table, _ = key.rsplit(".", 3)
        if plan.plan[path.removesuffix(TABLE)][table].sharding_type == ShardingType.DATA_PARALLEL.value:
            copies.add(key)
    return copies
