"""Attached models in scripts as TorchRec and MLPerf publish them, which give the bags alone an optimizer."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ModuleSharder
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.conftest import MAX_HISTORY, SCHEMA, make_requests
from tests.models.test_attach import SIZES, attach, make_batch, make_dlrm
from torchrec_amort import AmortizedDLRMTrain, ModelConfig, RequestBatch, build_model
from torchrec_amort.models.tables import tables_of
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.sharding import shard

CPU = torch.device("cpu")
# TorchRec changes what it is given: a copy for each call.
ADAGRAD = {"lr": 0.05, "eps": 1e-8}
STEPS = 6
SEQUENCES = r"model\.sparse_arch\.embedding_bag_collection\.sequences"
NO_OPTIMIZER = rf"tables \['action', 'item'\] of {SEQUENCES}\.0 were sharded without an optimizer"


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_train() -> AmortizedDLRMTrain:
    torch.manual_seed(0)
    return AmortizedDLRMTrain(attach(make_dlrm()))


def batches() -> Iterator[RequestBatch]:
    return iter([make_batch(SIZES, seed=step) for step in range(STEPS)])


def distributed(
    train: nn.Module, sharders: list[ModuleSharder[nn.Module]] | None = None, way: str = "table_wise"
) -> DistributedModelParallel:
    """As golden training calls it, with a plan for the number of ranks."""
    bags = [module for module in train.modules() if isinstance(module, EmbeddingBagCollection)]
    sequences = [module for module in train.modules() if isinstance(module, EmbeddingCollection)]
    names = [table.name for collection in bags for table in collection.embedding_bag_configs()]
    names += [table.name for collection in sequences for table in collection.embedding_configs()]
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        constraints={name: ParameterConstraints(sharding_types=[way]) for name in names},
    )
    sharders = sharders or [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]
    return DistributedModelParallel(train, device=CPU, plan=planner.plan(train, sharders), sharders=sharders)


def golden_training(
    train: AmortizedDLRMTrain, more: Callable[[AmortizedDLRMTrain], Iterable[nn.Parameter]] = lambda _: []
) -> tuple[DistributedModelParallel, KeyedOptimizerWrapper]:
    """The wiring: a fused optimizer of the first bags, another one of what is left, and tables of `more` if wanted."""
    first = next(module for module in train.modules() if isinstance(module, EmbeddingBagCollection))
    apply_optimizer_in_backward(RowWiseAdagrad, first.parameters(), {**ADAGRAD})
    apply_optimizer_in_backward(RowWiseAdagrad, more(train), {**ADAGRAD})
    model = distributed(train)
    optimizer = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.02),
    )
    return model, optimizer


def history_tables(train: AmortizedDLRMTrain) -> Iterable[nn.Parameter]:
    (sequences,) = (module for module in train.modules() if isinstance(module, EmbeddingCollection))
    return sequences.parameters()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model that is sharded over one rank, or not at all."""
    return {
        name: (weight.local_shards()[0].tensor if isinstance(weight, ShardedTensor) else weight).detach().clone()
        for name, weight in model.state_dict().items()
    }


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("pipeline", [TrainPipelineBase, TrainPipelineSparseDist])
def test_the_wiring_of_golden_training_trains_history_tables_as_the_bags_or_not_at_all(pipeline: Any) -> None:
    model, optimizer = golden_training(make_train())
    before = whole(model)
    with pytest.raises(ValueError, match=NO_OPTIMIZER + rf".*RowWiseAdagrad, model\.{SEQUENCES}\[0\]\.param"):
        pipeline(model, optimizer, CPU).progress(batches())
    after = whole(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())

    reference = make_train()
    model, optimizer = golden_training(copy.deepcopy(reference), history_tables)
    reference.load_state_dict(before := whole(model))
    tables = tables_of(reference)
    others = [weight for weight in reference.parameters() if all(weight is not table for table in tables)]
    optimizers = [RowWiseAdagrad(tables, **ADAGRAD), torch.optim.Adagrad(others, lr=0.02)]
    steps, given = pipeline(model, optimizer, CPU), batches()
    for batch in batches():
        steps.progress(given)
        for one in optimizers:
            one.zero_grad()
        reference(batch)[0].backward()
        for one in optimizers:
            one.step()
    after, expected = whole(model), whole(reference)
    for name, weight in after.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)
    names = [name for name in after if ".embeddings." in name or ".embedding_bags." in name]
    moved = {name: float((after[name] - before[name]).abs().max()) for name in names}
    assert len(moved) == 4
    assert min(moved.values()) > 0.1, moved


@pytest.mark.usefixtures("one_rank")
def test_every_collection_of_the_model_is_looked_at() -> None:
    config = ModelConfig(embedding_dim=8, history_length=MAX_HISTORY)
    train = AmortizedDLRMTrain(build_model(SCHEMA, config, seed=0))
    model, _ = golden_training(train, history_tables)
    batch = RequestBatch.from_requests(make_requests([(3, 2), (0, 1)]), SCHEMA)
    with pytest.raises(
        ValueError, match=r"\['interests', 'user_id'\] of request_sparse_arch\.embedding_bag_collection"
    ):
        model(batch)


def by_sgd() -> nn.Module:
    train = make_train()
    apply_optimizer_in_backward(torch.optim.SGD, train.parameters(), {"lr": 0.01})
    return distributed(train)


def by_the_sharders() -> nn.Module:
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05}
    return distributed(make_train(), [EmbeddingBagCollectionSharder(fused), EmbeddingCollectionSharder(fused)])


def by_the_outer_optimizer() -> nn.Module:
    train = make_train()
    apply_optimizer_in_backward(RowWiseAdagrad, history_tables(train), {**ADAGRAD})
    # Bags only: fbgemm has no data-parallel lookup of sequences for CPUs.
    return distributed(train, [EmbeddingBagCollectionSharder()], "data_parallel")


def by_our_own() -> nn.Module:
    return shard(make_train(), device=CPU, optimizer=OptimizerConfig(), batch_size=4).module


def evaluated() -> nn.Module:
    return golden_training(make_train())[0].eval()


# DistributedDataParallel makes a stream for optimizers in backward, which a CUDA build without a GPU cannot.
needs_stream = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(), reason="a CUDA build of torch, but no GPU"
)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "make",
    [
        make_train,
        pytest.param(by_sgd, marks=needs_stream),
        by_the_sharders,
        pytest.param(by_the_outer_optimizer, marks=needs_stream),
        by_our_own,
        evaluated,
    ],
    ids=lambda m: m.__name__,
)
def test_what_has_an_optimizer_or_needs_none_is_not_refused(make: Callable[[], nn.Module]) -> None:
    assert make()(make_batch(SIZES))[0].isfinite()
