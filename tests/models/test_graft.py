"""Trained models get histories: their scores stay, and their tables and optimizers go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec import EmbeddingBagCollection, EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.models.experimental.transformerdlrm import DLRM_Transformer
from torchrec.modules.crossnet import CrossNet, LowRankMixtureCrossNet, VectorCrossNet
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.launch import torchrun
from tests.models.strangers import DIN, MODELS, NUM_DENSE, TABLES, WIDE_TABLES, make_bags, make_events
from tests.models.test_rankers import OF_REQUEST, call_mmoe, make_batch
from torchrec_amort import AmortizedHistoryArch, RequestBatch, graft
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection
from torchrec_amort.models.graft import old_optimizer_state_dict, old_state_dict
from torchrec_amort.models.ranker import Call, call_model
from torchrec_amort.modules.tower import HistoryTower
from torchrec_amort.training.processes import process_group

SIZES = ((3, 2), (0, 1), (5, 4), (1, 3), (6, 9))
# Sums of more columns add up in another order.
ROUNDING = 2e-7
Make = Callable[[EmbeddingBagCollection], nn.Module]


class Crossed(nn.Module):
    """Everything side by side, through a network of the same width, to one layer."""

    def __init__(self, bags: EmbeddingBagCollection, cross: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.bags = bags
        width = NUM_DENSE + sum(table.embedding_dim for table in bags.embedding_bag_configs())
        self.cross, self.over = cross(width), nn.Linear(width, 1)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        logits: Tensor = self.over(self.cross(torch.cat([dense, self.bags(sparse).values()], dim=1)))
        return logits


class Fields(nn.Module):
    """A layer over the bags as rows, whose input has them in the dimension before the last one."""

    def __init__(self, bags: EmbeddingBagCollection) -> None:
        super().__init__()
        self.bags, self.num_bags = bags, len(bags.embedding_bag_configs())
        self.mix = nn.Conv1d(self.num_bags, 5, 1)
        self.over = nn.Linear(5 * 8 + NUM_DENSE, 1)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        bags = self.bags(sparse).values().unflatten(1, (self.num_bags, 8))
        logits: Tensor = self.over(torch.cat([dense, self.mix(bags).relu().flatten(1)], dim=1))
        return logits


class Mean(nn.Module):
    """A mean of all bags: no layer grows."""

    def __init__(self, bags: EmbeddingBagCollection) -> None:
        super().__init__()
        self.bags, self.over = bags, nn.Linear(8, 1)

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        logits: Tensor = self.over(self.bags(sparse).values().unflatten(1, (-1, 8)).mean(1))
        return logits


def transformer(bags: EmbeddingBagCollection, batch_first: bool) -> DLRM_Transformer:
    """TorchRec's own attends to the batch, not to the bags, as its encoder takes the first dimension for the bags."""
    model = DLRM_Transformer(bags, NUM_DENSE, [16, 8], [16, 1], nhead=2, ntransformer_layers=1)
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=batch_first)
    model.inter_arch.interarch_TE = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return model


def crossed(cross: Callable[[int], nn.Module]) -> Make:
    return lambda bags: Crossed(bags, cross)


GRAFTED: dict[str, Make] = MODELS | {
    "CrossNet": crossed(lambda width: CrossNet(width, 2)),
    "LowRankMixtureCrossNet": crossed(lambda width: LowRankMixtureCrossNet(width, 2, num_experts=2, low_rank=3)),
    "VectorCrossNet": crossed(lambda width: VectorCrossNet(width, 2)),
    "batch norm and a square layer": crossed(
        lambda width: nn.Sequential(nn.BatchNorm1d(width), nn.PReLU(width), nn.Linear(width, width))
    ),
    "a square layer without bias": crossed(lambda width: nn.Linear(width, width, bias=False)),
    "Fields": Fields,
    "DLRM_Transformer": lambda bags: transformer(bags, batch_first=False),
}
# Histories get to the logits beside all layers.
NOT_FROM_ZERO = {"SimpleDeepFMNN"}


def tables_of(name: str) -> dict[str, tuple[int, int]]:
    return WIDE_TABLES if name == "MMoE" else TABLES


def call_of(name: str) -> Call:
    return call_mmoe if name == "MMoE" else call_model


def make_tower(
    name: str = "clicks", shared: bool = False, width: int = 8, starts_at_zero: bool = True, num_vectors: int = 1
) -> HistoryTower:
    arch = AmortizedHistoryArch(8, num_layers=1, num_heads=2, num_vectors=num_vectors)
    if shared:
        return HistoryTower(name, arch, item="item", width=width, starts_at_zero=starts_at_zero)
    return HistoryTower(name, arch, events=make_events(), width=width, starts_at_zero=starts_at_zero)


def train(model: nn.Module, call: Call, is_weighted: bool = False) -> None:
    """A few steps, with or without histories."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
    with_histories = any(isinstance(module, AmortizedEmbeddingBagCollection) for module in model.modules())
    for seed in range(4):
        batch = make_batch(SIZES, is_weighted, seed)
        rows: Any = batch if with_histories else batch.sparse
        optimizer.zero_grad()
        logits = call(model, batch, rows)
        assert batch.labels is not None
        nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.expand_as(logits)).backward()
        optimizer.step()


def make_trained(make: Make, call: Call = call_model, tables: dict[str, tuple[int, int]] = TABLES) -> nn.Module:
    torch.manual_seed(1)
    trained = make(make_bags(tables))
    train(trained, call)
    return trained


def widened(make: Make, *towers: HistoryTower, bags: EmbeddingBagCollection | None = None) -> nn.Module:
    return make(AmortizedEmbeddingBagCollection(bags or make_bags(), towers, OF_REQUEST))


def logits_of(model: nn.Module, call: Call, batch: RequestBatch, rows: Any) -> Tensor:
    with torch.no_grad():
        return call(model.eval(), batch, rows)


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in state.items()}


@pytest.mark.parametrize("starts_at_zero", [True, False], ids=["from zero", "not from zero"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared table", "own events"])
@pytest.mark.parametrize("name", GRAFTED)
def test_scores_stay_and_training_moves_all_that_is_new(name: str, shared: bool, starts_at_zero: bool) -> None:
    if name in NOT_FROM_ZERO and not starts_at_zero:
        pytest.skip("histories get to the logits beside all layers, which is refused")
    call, tables = call_of(name), tables_of(name)
    trained = make_trained(GRAFTED[name], call, tables)
    width = 16 if name == "MMoE" else 8
    towers = [
        make_tower("clicks", shared, width, starts_at_zero, num_vectors=2),
        make_tower("buys", shared, width, starts_at_zero),
    ]
    model = widened(GRAFTED[name], *towers, bags=make_bags(tables))
    assert graft(model, trained, make_batch(SIZES, seed=5), call=call) <= ROUNDING

    batch = make_batch(SIZES, seed=6)
    expected = logits_of(trained, call, batch, batch.sparse)
    torch.testing.assert_close(logits_of(model, call, batch, batch), expected, rtol=0, atol=ROUNDING)
    before = copied(dict(model.named_parameters()))
    train(model, call)
    old = dict(trained.named_parameters())
    for path, weight in model.named_parameters():
        is_old = torch.isin(before[path], old[path]) if path in old else torch.zeros_like(weight, dtype=torch.bool)
        if not is_old.all():
            assert not torch.equal(weight[~is_old], before[path][~is_old]), path
    assert not torch.allclose(logits_of(model, call, batch, batch), expected, atol=1e-3)


def test_a_tower_that_starts_at_zero_learns_beside_one_that_does_not() -> None:
    trained = make_trained(GRAFTED["DLRM"])
    model = widened(GRAFTED["DLRM"], make_tower("clicks"), make_tower("buys", starts_at_zero=False))
    assert graft(model, trained, make_batch(SIZES)) <= ROUNDING
    train(model, call_model)
    gate = model.get_parameter("sparse_arch.embedding_bag_collection.bags.towers.clicks.gate")
    assert float(gate.abs()) > 1e-3


def test_weighted_bags_keep_their_scores() -> None:
    torch.manual_seed(1)
    trained = MODELS["DLRM"](make_bags(is_weighted=True))
    train(trained, call_model, is_weighted=True)
    model = widened(MODELS["DLRM"], make_tower(), bags=make_bags(is_weighted=True))
    assert graft(model, trained, make_batch(SIZES, is_weighted=True)) <= ROUNDING


def test_a_model_with_a_collection_of_its_own_keeps_its_scores() -> None:
    def make(bags: EmbeddingBagCollection) -> DIN:
        own = make_events()
        (table,) = own.embedding_configs()
        table.feature_names = ["seen", "of_candidate"]
        return DIN(bags, EmbeddingCollection(tables=[table]), NUM_DENSE)

    def call(model: nn.Module, batch: RequestBatch, rows: Any) -> Tensor:
        lists = batch.to_impressions().sequences
        lists = KeyedJaggedTensor(["seen", "of_candidate"], lists.values(), lengths=lists.lengths())
        logits_CT: Tensor = model(batch.dense, rows, lists)
        return logits_CT

    trained = make_trained(make, call)
    for starts_at_zero in (True, False):
        model = widened(make, make_tower(starts_at_zero=starts_at_zero))
        assert graft(model, trained, make_batch(SIZES), call=call) <= ROUNDING


@pytest.mark.parametrize("shared", [True, False], ids=["shared table", "own events"])
def test_tables_that_the_models_share_stay_shared_and_others_are_copied(shared: bool) -> None:
    trained = make_trained(MODELS["DLRM"])
    before = copied(trained.state_dict())
    bags = trained.get_submodule("sparse_arch.embedding_bag_collection")
    assert isinstance(bags, EmbeddingBagCollection)
    model, apart = (widened(MODELS["DLRM"], make_tower(shared=shared), bags=of) for of in (bags, None))
    for one in (model, apart):
        graft(one, trained, make_batch(SIZES))
    tables = {weight.data_ptr() for weight in bags.parameters()}
    assert tables < {weight.data_ptr() for weight in model.parameters()}
    assert not {weight.data_ptr() for weight in trained.parameters()} & {w.data_ptr() for w in apart.parameters()}
    train(apart, call_model)
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, before[name])


def test_modes_and_hooks_are_left_as_they_were() -> None:
    trained = make_trained(MODELS["MMoE"], call_mmoe, WIDE_TABLES)
    model = widened(MODELS["MMoE"], make_tower(width=16), bags=make_bags(WIDE_TABLES))
    for one in (trained, model):
        one.train().get_submodule("heads").eval()
    modes = [module.training for one in (trained, model) for module in one.modules()]
    statistics = copied(dict(trained.named_buffers()))
    graft(model, trained, make_batch(SIZES), call=call_mmoe)
    assert modes == [module.training for one in (trained, model) for module in one.modules()]
    for name, value in statistics.items():
        assert torch.equal(trained.get_buffer(name), value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def refused() -> dict[str, tuple[Make, Make, bool, str]]:
    """How the trained model is made and the other one, whether its tower starts at zero, and what is said."""
    doubled = crossed(lambda width: nn.Linear(width, 2 * width))
    return {
        "attention between bags": (
            lambda bags: transformer(bags, batch_first=True),
            lambda bags: transformer(bags, batch_first=True),
            True,
            r"over_arch.* has grown from 40 to 48 columns, but 0 of its columns do not depend .* by ResidualHistory",
        ),
        "a layer norm over all bags": (
            crossed(nn.LayerNorm),
            crossed(nn.LayerNorm),
            True,
            "over.weight has grown from 35 to 43 columns, but 0 of its columns",
        ),
        "a mean of all bags": (
            Mean,
            Mean,
            True,
            r"logits differ by \d\.\d+e-\d+, more than 1e-05, and nothing .* Residual",
        ),
        "sums that do not start at zero": (
            MODELS["SimpleDeepFMNN"],
            MODELS["SimpleDeepFMNN"],
            False,
            "logits differ by .* Let all towers start at zero",
        ),
        "two sizes that grow": (
            doubled,
            doubled,
            True,
            r"cross.weight is \[70, 35\] in .* and \[86, 43\] in the other",
        ),
        "another class": (
            MODELS["DLRM"],
            Mean,
            True,
            r"sparse_arch.*t_user.weight of the trained model is not in the Mean",
        ),
        "a layer that shrinks": (
            crossed(lambda width: nn.Linear(width, width)),
            crossed(lambda width: nn.Linear(width, 7)),
            True,
            r"cross.weight is \[35, 35\] in the trained model and \[7, 43\] in the other: only inputs may grow",
        ),
        "a table of another size": (
            MODELS["DLRM"],
            MODELS["DLRM"],
            True,
            "t_user.weight has grown from 20 to 21 columns, but no module is called with 21 columns of it",
        ),
    }


@pytest.mark.parametrize("what", refused())
def test_what_cannot_keep_its_scores_is_refused_and_nothing_is_changed(what: str) -> None:
    make_old, make_new, starts_at_zero, said = refused()[what]
    trained = make_old(make_bags())
    rows = TABLES | ({"user": (21, 8)} if what == "a table of another size" else {})
    model = widened(make_new, make_tower(starts_at_zero=starts_at_zero), bags=make_bags(rows)).train()
    before = copied(model.state_dict())
    with pytest.raises(ValueError, match=said):
        graft(model, trained, make_batch(SIZES))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# The shared table is on one rank before, and spread by rows after.
OLD_WAYS = dict.fromkeys(["t_user", "t_country", "t_item", "t_tags"], "table_wise")
NEW_WAYS = OLD_WAYS | {"t_item": "row_wise", "t_event": "row_wise"}


def distributed(model: nn.Module, ways: Mapping[str, str]) -> DistributedModelParallel:
    """With fused row-wise Adagrad of all tables, on the ranks of the default process group."""
    tables = [
        weight
        for module in model.modules()
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection)
        for weight in module.parameters()
    ]
    apply_optimizer_in_backward(RowWiseAdagrad, tables, {"lr": 0.05, "eps": 1e-8})
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        constraints={
            name: ParameterConstraints(sharding_types=[way], compute_kernels=["fused"]) for name, way in ways.items()
        },
    )
    sharders = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder(use_index_dedup=False)]
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def step(model: nn.Module, seed: int, with_history: bool) -> None:
    """One step of the tables, on each rank by requests of its own."""
    batch = make_batch(SIZES, seed=10 * seed + dist.get_rank())
    logits = model(batch.dense, batch if with_history else batch.sparse)
    assert batch.labels is not None
    nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()


def save(folder: Path, model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)


def train_before_and_after(folder: Path) -> None:
    """Train and save the old model; load into the new one, before and after sharding; a step more of both."""
    torch.manual_seed(0)
    before = distributed(MODELS["DLRM"](make_bags()), OLD_WAYS)
    for seed in range(3):
        step(before, seed, with_history=False)
    save(folder / "old", before.state_dict(), before.fused_optimizer.state_dict())

    trained = MODELS["DLRM"](make_bags())
    dcp.load({"model": trained.state_dict()}, checkpoint_id=folder / "old")
    model = widened(MODELS["DLRM"], make_tower(shared=True), make_tower("buys"))
    assert graft(model, trained, make_batch(SIZES)) <= ROUNDING
    after = distributed(model, NEW_WAYS)
    trained.to("meta")
    state = {"model": old_state_dict(after, trained), "optimizer": old_optimizer_state_dict(after, trained)}
    dcp.load(state, checkpoint_id=folder / "old")
    save(folder / "new", old_state_dict(after, trained), old_optimizer_state_dict(after, trained))

    step(before, 3, with_history=False)
    step(after, 3, with_history=True)
    save(folder / "old later", before.state_dict(), before.fused_optimizer.state_dict())
    save(folder / "new later", old_state_dict(after, trained), old_optimizer_state_dict(after, trained))


def saved(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(kind.size) for name, kind in found.items() if isinstance(kind, TensorStorageMetadata)}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def test_tables_and_fused_optimizers_of_an_old_checkpoint_go_on_on_two_ranks(tmp_path: Path) -> None:
    torchrun(2, "tests.models.test_graft", str(tmp_path))
    old, new = saved(tmp_path / "old"), saved(tmp_path / "new")
    grown = "model.over_arch.model.0._mlp.0._linear.weight"
    assert set(old) - set(new) == {grown}
    assert sum("momentum" in name for name in new) == len(TABLES)
    for name, value in new.items():
        assert torch.equal(value, old[name]), name
        assert value.any(), name
    old_later, new_later = saved(tmp_path / "old later"), saved(tmp_path / "new later")
    for name, value in new_later.items():
        torch.testing.assert_close(value, old_later[name], rtol=1e-5, atol=1e-6)
        if "sparse_arch" in name:
            assert not torch.equal(value, new[name]), name


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_what_cannot_be_loaded_is_refused_by_name() -> None:
    model, trained = widened(MODELS["DLRM"], make_tower(shared=True)), MODELS["DLRM"](make_bags())
    larger = MODELS["DLRM"](make_bags(TABLES | {"item": (31, 8)}))
    with pytest.raises(ValueError, match=r"t_item.weight is \[31, 8\] and .*sequences.0.*t_item.weight \[30, 8\]"):
        old_state_dict(model, larger)
    other = MODELS["DLRM"](make_bags(TABLES | {"city": (5, 8)}))
    with pytest.raises(ValueError, match="t_city.weight of the trained model is not in the DLRM"):
        old_state_dict(model, other)
    module = distributed(model, NEW_WAYS)
    with pytest.raises(ValueError, match="t_city.weight of the trained model is not in the DLRM"):
        old_optimizer_state_dict(module, other)
    with pytest.raises(ValueError, match="is a ShardedTensor, not a plain tensor: graft before sharding"):
        graft(module, trained, make_batch(SIZES))
    plain = DistributedModelParallel(widened(MODELS["DLRM"], make_tower(shared=True)), device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"tables \['t_item'\] of .*sequences.0 were sharded without an optimizer"):
        old_optimizer_state_dict(plain, trained)


if __name__ == "__main__":
    with process_group():
        train_before_and_after(Path(sys.argv[1]))
