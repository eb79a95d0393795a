"""Rankers of other people's models train: on two ranks as on one, however tables are sharded, with all collections
pipelined, and wired as TorchRec's golden training is.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.launch import torchrun
from tests.models.strangers import DIN, MODELS, NUM_DENSE, TABLES, WIDE_TABLES, make_bags, make_events
from tests.models.test_rankers import OF_REQUEST, SIZES, call_mmoe, make_batch, make_tower
from tests.schemas import THREE, make_requests
from tests.training.test_attached import ADAGRAD, distributed, whole
from torchrec_amort import (
    AmortizedDLRMTrain,
    AmortizedEmbeddingBagCollection,
    ModelConfig,
    RequestBatch,
    ResidualHistory,
    build_model,
)
from torchrec_amort.models.build import TowerConfig
from torchrec_amort.models.collection import CandidateRows
from torchrec_amort.models.ranker import ModelRanker, Ranker, evaluating
from torchrec_amort.models.tables import tables_of
from torchrec_amort.training.checkpoint import CheckpointWriter, Position, load_weights
from torchrec_amort.training.loop import GlobalBatchTrain
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.processes import gather_on_first, process_group
from torchrec_amort.training.report import Report
from torchrec_amort.training.sharding import (
    ShardedModel,
    ShardingConfig,
    ShardingWay,
    TableSharding,
    shard,
)

CPU = torch.device("cpu")
STEPS = 4
# Of the tables of bags, and of those of sequences.
WAYS: list[tuple[ShardingWay, ShardingWay]] = [
    ("table_wise", "row_wise"),
    ("column_wise", "table_wise"),
    ("data_parallel", "column_wise"),
    ("table_wise", "table_wise"),
]
# Models of a schema of several histories, instead of a stranger's.
HISTORIES = "several histories"
COMPARED = "compared histories"
# Nothing trains the table of films, which one of these looks up.
TOWERS = {
    "clicks": TowerConfig(encoder="similarity", features=["clicks_tags", "clicks_content"]),
    "views": TowerConfig(encoder="matches", features=["views_film"]),
}
KINDS = ("own events", "shared table", "residual")


@dataclass(eq=False)
class ListBatch(RequestBatch):
    """A batch of a model that reads a list of each candidate beside its history."""

    lists: KeyedJaggedTensor = field(default_factory=KeyedJaggedTensor.empty)

    @classmethod
    def of(cls, batch: RequestBatch) -> ListBatch:
        lists = batch.to_impressions().sequences
        names = {"history_item": "seen", "candidate_item": "of_candidate"}
        lists = KeyedJaggedTensor([names[key] for key in lists.keys()], lists.values(), lengths=lists.lengths())
        return cls(**{f.name: getattr(batch, f.name) for f in fields(batch)}, lists=lists)


def call_din(model: nn.Module, batch: RequestBatch, rows: RequestBatch | CandidateRows | KeyedJaggedTensor) -> Tensor:
    assert isinstance(batch, ListBatch | torch.fx.Proxy)
    logits_CT: Tensor = model(batch.dense, rows, batch.lists)
    return logits_CT


@dataclass(frozen=True)
class Case:
    """A model, how it reads a history, and how its tables are sharded."""

    model: str
    kind: str
    ways: tuple[ShardingWay, ShardingWay]
    is_weighted: bool = False

    @property
    def num_tasks(self) -> int:
        return 2 if self.model == "MMoE" else 1

    def ranker(self) -> Ranker:
        if self.model == HISTORIES:
            return build_model(THREE, ModelConfig(embedding_dim=8, history_layers=1, over_layers=[8]), seed=1)
        if self.model == COMPARED:
            config = ModelConfig(embedding_dim=8, over_layers=[8], towers=TOWERS)
            return build_model(replace(THREE, tables={}), config, seed=1)
        torch.manual_seed(1)
        bags = make_bags(WIDE_TABLES if self.model == "MMoE" else TABLES, self.is_weighted)
        call: Any = {"MMoE": call_mmoe, "DIN": call_din}.get(self.model)
        tower = make_tower(self.kind == "shared table", width=16 if self.model == "MMoE" else 8)
        if self.kind == "residual":
            return ResidualHistory(self._model(bags), tower, call=call, num_tasks=self.num_tasks)
        return ModelRanker(self._model(AmortizedEmbeddingBagCollection(bags, [tower], OF_REQUEST)), call)

    def _model(self, bags: Any) -> nn.Module:
        if self.model != "DIN":
            return MODELS[self.model](bags)
        (table,) = make_events().embedding_configs()
        table.name, table.feature_names = "t_seen", ["seen", "of_candidate"]
        return DIN(bags, EmbeddingCollection(tables=[table]), NUM_DENSE)

    def batch(self, seed: int) -> RequestBatch:
        """The requests of this rank."""
        if self.model in (HISTORIES, COMPARED):
            sizes = [((3, 0, 2), 2), ((0, 1, 1), 1), ((5, 2, 0), 4), ((1, 1, 1), 3)]
            batch = RequestBatch.from_requests(make_requests(THREE, sizes, seed), THREE)
        else:
            batch = make_batch(SIZES, self.is_weighted, seed=seed)
        assert batch.labels is not None
        batch.labels = batch.labels.repeat(1, self.num_tasks)
        batch = batch.select(torch.arange(dist.get_rank(), len(batch), dist.get_world_size()))
        return ListBatch.of(batch) if self.model == "DIN" else batch

    def shard(self) -> ShardedModel:
        ranker = self.ranker()
        bags, sequences = (TableSharding(ways=[way], min_columns=4) for way in self.ways)
        collections = [module for module in ranker.modules() if isinstance(module, EmbeddingCollection)]
        of_sequences = [table.name for collection in collections for table in collection.embedding_configs()]
        model = shard(
            GlobalBatchTrain(ranker),
            device=CPU,
            optimizer=OptimizerConfig(dense_lr=0.01),
            batch_size=4,
            sharding=ShardingConfig(default=bags, tables=dict.fromkeys(of_sequences, sequences)),
        )
        for module in model.module.modules():
            # What depends on the rest of a rank's batch, or on chance, is not the same on two ranks.
            module.training = not isinstance(module, nn.BatchNorm1d | nn.Dropout)
        return model


def cases() -> dict[str, Case]:
    ways = itertools.cycle(WAYS)
    made = [Case(model, kind, next(ways)) for kind in KINDS for model in (*MODELS, "DIN")]
    made += [Case(HISTORIES, "own events", WAYS[0]), Case(HISTORIES, "own events", WAYS[1])]
    made.append(Case(COMPARED, "own events", WAYS[2]))
    made += [Case("DLRM", kind, next(ways), is_weighted=True) for kind in ("own events", "residual")]
    return {f"{case.model}, {case.kind}{', weighted' * case.is_weighted}, {case.ways}": case for case in made}


CASES = cases()


@torch.no_grad()
def logits_of(model: ShardedModel, batch: RequestBatch) -> Tensor:
    modes = {module: module.training for module in model.module.modules()}
    logits: Tensor = model.module.eval()(batch)[1][1].clone()
    for module, mode in modes.items():
        module.training = mode
    return logits


@torch.no_grad()
def logits_in_two_phases(model: ShardedModel, batch: RequestBatch) -> Tensor:
    (ranker,) = (module for module in model.module.modules() if isinstance(module, Ranker))
    with evaluating(ranker):
        return ranker.score_candidates(ranker.encode_request(batch), batch).clone()


def train_case(case: Case) -> dict[str, Any]:
    """Train by TorchRec's pipeline; losses, logits, and those of weights that were saved, trained on, and loaded."""
    model, batch = case.shard(), case.batch(seed=0)
    record: dict[str, Any] = {"before": logits_of(model, batch)}
    pipeline: Any = TrainPipelineSparseDist(model.module, model.optimizer, CPU)
    batches = iter([case.batch(seed) for seed in range(STEPS)])
    record["losses"] = [float(pipeline.progress(batches)[0]) for _ in range(STEPS)]
    sharded = {module for module in model.module.modules() if isinstance(module, ShardedModule)}
    assert set(pipeline._pipelined_modules) == sharded
    pipeline.detach()
    record["trained"] = logits_of(model, batch)
    saved = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    model.module(batch)[0].backward()
    model.optimizer.step()
    record["on"] = logits_of(model, batch)
    model.module.load_state_dict(saved)
    record["loaded"] = logits_of(model, batch)
    record["in two phases"] = logits_in_two_phases(model, batch)
    return record


def batch_norm(folder: Path) -> dict[str, Tensor]:
    """Train with batch norm and write a checkpoint; the running mean of this rank before."""
    case = Case("MMoE", "own events", WAYS[0])
    model = case.shard()
    model.module.train()
    for seed in range(2):
        model.module(case.batch(seed))[0].backward()
        model.optimizer.step()
    mean = model.module.state_dict()["model.model.norm.running_mean"].clone()
    with CheckpointWriter(folder, keep=1) as writer:
        writer.save(model, Position(total_steps=2), Report(folder, ("click", "buy"), 4, CPU))
    return {"mean": mean, "logits": logits_of(model, make_mmoe_batch())}


def make_mmoe_batch() -> RequestBatch:
    batch = make_batch(SIZES)
    assert batch.labels is not None
    batch.labels = batch.labels.repeat(1, 2)
    return batch


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, "tests.training.test_training_rankers", str(folder))
    return folder


@pytest.fixture(scope="module")
def records_of_two(two_ranks: Path) -> dict[str, list[dict[str, Any]]]:
    records: dict[str, list[dict[str, Any]]] = torch.load(two_ranks / "records.pt")
    return records


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_by_the_pipeline_and_their_state_dict_loads(
    name: str, records_of_two: dict[str, list[dict[str, Any]]]
) -> None:
    with process_group():
        one = train_case(CASES[name])
    for two in records_of_two[name]:
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    # Candidates of requests 0, 2 and of 1, 3.
    for rank, rows in enumerate(([0, 1, 3, 4, 5, 6], [2, 7, 8, 9])):
        for moment, logits in one.items():
            if moment != "losses":
                two = records_of_two[name][rank][moment]
                torch.testing.assert_close(two, logits[rows], rtol=0, atol=1e-5)
    assert not torch.allclose(one["trained"], one["before"], atol=1e-2)
    assert not torch.allclose(one["trained"], one["on"], atol=1e-3)
    assert torch.equal(one["trained"], one["loaded"])
    torch.testing.assert_close(one["in two phases"], one["loaded"], rtol=0, atol=1e-5)


def test_a_checkpoint_has_the_first_ranks_running_means(two_ranks: Path) -> None:
    first, second = torch.load(two_ranks / "batch_norm.pt")
    assert not torch.allclose(first["mean"], second["mean"], atol=1e-3)
    ranker = Case("MMoE", "own events", WAYS[0]).ranker()
    load_weights(two_ranks, AmortizedDLRMTrain(ranker))
    assert torch.equal(ranker.state_dict()["model.norm.running_mean"], first["mean"])
    with torch.no_grad():
        logits = ranker.eval()(make_mmoe_batch())
    for rank in (first, second):
        torch.testing.assert_close(rank["logits"], logits, rtol=0, atol=1e-5)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def golden_batches(count: int = 6) -> Iterator[Batch]:
    """A user's own impressions: only their ids are grouped, before they are put into TorchRec's batch."""
    for seed in range(count):
        made = make_batch(SIZES, seed=seed)
        impressions = made.to_impressions()
        ids = KeyedJaggedTensor.concat(
            [impressions.request_sparse, impressions.candidate_sparse, impressions.sequences]
        ).split([4, 2])
        events = ids[1].to_dict()["history_item"]
        ids = KeyedJaggedTensor.concat([ids[0], KeyedJaggedTensor.from_jt_dict({"history_item": events})])
        grouped = RequestBatch.from_impressions(
            impressions.dense,
            ids,
            torch.repeat_interleave(made.num_candidates),
            request_features=OF_REQUEST,
            event_features=["history_item"],
            item="item",
        )
        assert made.labels is not None
        yield Batch(impressions.dense, grouped, made.labels.squeeze(1))


def golden_train(shared: bool) -> DLRMTrain:
    torch.manual_seed(0)
    sparse = AmortizedEmbeddingBagCollection(make_bags(), [make_tower(shared)], OF_REQUEST)
    return DLRMTrain(DLRM(sparse, NUM_DENSE, [16, 8], [16, 1]))


def outer_optimizer(model: nn.Module) -> KeyedOptimizerWrapper:
    weights = dict(in_backward_optimizer_filter(model.named_parameters()))
    return KeyedOptimizerWrapper(weights, lambda parameters: torch.optim.Adagrad(parameters, lr=0.02))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("shared", [False, True], ids=["own events", "shared table"])
def test_golden_training_moves_tables_of_histories_as_those_of_bags(shared: bool) -> None:
    train = golden_train(shared)
    reference = copy.deepcopy(train)
    apply_optimizer_in_backward(RowWiseAdagrad, tables_of(train.model.sparse_arch), {**ADAGRAD})
    model = distributed(train)
    reference.load_state_dict(before := whole(model))
    others = [weight for name, weight in reference.named_parameters() if ".t_" not in name]
    optimizers = [RowWiseAdagrad(tables_of(reference), **ADAGRAD), torch.optim.Adagrad(others, lr=0.02)]
    pipeline: Any = TrainPipelineSparseDist(model, outer_optimizer(model), CPU)
    given = golden_batches()
    for batch in golden_batches():
        pipeline.progress(given)
        for one in optimizers:
            one.zero_grad()
        reference(batch)[0].backward()
        for one in optimizers:
            one.step()
    assert len(pipeline._pipelined_modules) == 3
    after, expected = whole(model), whole(reference)
    for name, weight in after.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in after if ".t_" in name}
    assert len(moved) == (4 if shared else 5)
    assert min(moved.values()) > 0.1, moved


@pytest.mark.usefixtures("one_rank")
def test_tables_without_an_optimizer_are_refused_by_paths_that_are_there() -> None:
    train = golden_train(shared=False)
    apply_optimizer_in_backward(RowWiseAdagrad, tables_of(train)[:4], {"lr": 0.05})
    model = distributed(train)
    with pytest.raises(ValueError, match=r"\['t_event'\] of sequences\.0 .*, embedding_bag_collection\.sequences\[0\]"):
        model(next(golden_batches()))
    for kind, path in (
        ("own events", "model.model.sparse_arch.embedding_bag_collection.sequences[0]"),
        ("residual", "model.histories.sequences[0]"),
    ):
        ranker = Case("DLRM", kind, WAYS[0]).ranker()
        apply_optimizer_in_backward(RowWiseAdagrad, tables_of(ranker)[:4], {"lr": 0.05})
        unwired = distributed(AmortizedDLRMTrain(ranker))
        with pytest.raises(ValueError, match=r"tables \['t_event'\] of ") as error:
            unwired(make_batch(SIZES))
        assert f"RowWiseAdagrad, {path}.parameters()" in str(error.value)
        assert len(list(eval(path, {"model": ranker}).parameters())) == 1


def focal_loss(logits_CT: Tensor, labels_CT: Tensor) -> Tensor:
    if logits_CT.shape[0] == 0:
        return logits_CT.sum()
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits_CT, labels_CT, reduction="none")
    return (cross_entropy * (labels_CT - logits_CT.sigmoid()).square()).mean()


class Weighted(nn.BCEWithLogitsLoss):
    """A loss with a weight of its own to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input * self.temperature, target)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("loss", [focal_loss, Weighted()], ids=["function", "module"])
def test_any_loss_trains_by_the_pipeline(loss: Any) -> None:
    ranker, batch = Case("DLRM", "own events", WAYS[0]).ranker(), make_batch(SIZES)
    with torch.no_grad():
        expected = float(loss(ranker(batch), batch.labels))
    apply_optimizer_in_backward(RowWiseAdagrad, tables_of(ranker), {"lr": 0.05})
    train = AmortizedDLRMTrain(ranker, loss)
    assert float(train(batch)[1][0]) == pytest.approx(expected, abs=1e-6)
    model = distributed(train)
    pipeline: Any = TrainPipelineSparseDist(model, outer_optimizer(model), CPU)
    batches = iter([batch] * 5)
    losses = [float(pipeline.progress(batches)[0]) for _ in range(5)]
    assert len(pipeline._pipelined_modules) == 3
    assert losses[-1] < losses[0]
    if isinstance(loss, Weighted):
        assert float(loss.temperature.detach()) != 1


if __name__ == "__main__":
    with process_group():
        folder = Path(sys.argv[1])
        records = {name: gather_on_first(train_case(case)) for name, case in CASES.items()}
        norms = gather_on_first(batch_norm(folder))
        if norms:
            torch.save(records, folder / "records.pt")
            torch.save(norms, folder / "batch_norm.pt")
