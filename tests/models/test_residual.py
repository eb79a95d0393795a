"""A history is added to the logits of models that cannot be rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingCollection
from torchrec.inference.modules import quantize_embeddings
from torchrec.models.dlrm import DLRM
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection

from tests.models.strangers import MODELS, NUM_DENSE, TABLES, WIDE_TABLES, MMoE, make_bags, make_events
from tests.models.test_rankers import (
    SIZES,
    call_mmoe,
    make_batch,
    make_ranker,
    make_tower,
    refuse_differences,
)
from torchrec_amort import AmortizedDLRMTrain, AmortizedHistoryArch, HistoryTower, RequestBatch, ResidualHistory
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection
from torchrec_amort.models.ranker import ModelRanker
from torchrec_amort.modules.rivals import TargetAttention
from torchrec_amort.training.loop import GlobalBatchTrain
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.sharding import shard


def make_model(name: str = "DLRM", is_weighted: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name](make_bags(WIDE_TABLES if name == "MMoE" else TABLES, is_weighted)).eval()


def make_towers(starts_at_zero: bool = False) -> list[HistoryTower]:
    """Two histories, one of them narrower than its tables and its vectors."""
    arch = AmortizedHistoryArch(8, num_layers=1, num_heads=2, num_vectors=2)
    narrow = HistoryTower("bought", TargetAttention(4), events=make_events(6), width=5, starts_at_zero=starts_at_zero)
    return [HistoryTower("clicks", arch, events=make_events(8), starts_at_zero=starts_at_zero), narrow]


def make_residual(name: str = "DLRM", starts_at_zero: bool = False, is_weighted: bool = False) -> ResidualHistory:
    model, towers = make_model(name, is_weighted), make_towers(starts_at_zero)
    if name == "MMoE":
        return ResidualHistory(model, *towers, call=call_mmoe, num_tasks=2)
    return ResidualHistory(model, *towers)


def disturb(*modules: nn.Module) -> None:
    """Weights as of training."""
    for weight in (weight for module in modules for weight in module.parameters()):
        nn.init.normal_(weight, std=0.5)


def logits_of_model(model: nn.Module, batch: RequestBatch) -> Tensor:
    if isinstance(model, MMoE):
        return torch.stack(model(batch.sparse, batch.dense), dim=1)
    logits: Tensor = model(batch.dense, batch.sparse)
    return logits


@pytest.mark.parametrize("starts_at_zero", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_at_first_the_logits_are_those_of_the_model_to_the_last_bit(name: str, starts_at_zero: bool) -> None:
    ranker, batch = make_residual(name, starts_at_zero), make_batch(SIZES)
    old = logits_of_model(ranker.model, batch)
    assert torch.equal(ranker(batch), old)
    assert torch.equal(ranker.score_candidates(ranker.encode_request(batch), batch), old)
    assert [module for module in ranker.modules() if module.training] == []


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_it_scores_in_two_phases_as_impression_by_impression(name: str, is_weighted: bool) -> None:
    ranker, batch = make_residual(name, is_weighted=is_weighted), make_batch(SIZES, is_weighted)
    disturb(ranker.histories, ranker.term)
    logits = refuse_differences(ranker, batch)
    assert not torch.allclose(logits, logits_of_model(ranker.model, batch), atol=0.05)
    changed = make_batch(SIZES, is_weighted)
    changed.sequences.values()[0] += 1
    assert not torch.allclose(ranker(changed)[:2], logits[:2])
    torch.testing.assert_close(ranker(changed)[2:], logits[2:])


@pytest.mark.parametrize("starts_at_zero", [False, True])
def test_training_moves_every_weight(starts_at_zero: bool) -> None:
    train = AmortizedDLRMTrain(make_residual("MMoE", starts_at_zero)).train()
    before = {name: weight.clone() for name, weight in train.state_dict().items()}
    optimizer = torch.optim.Adam(train.parameters(), lr=0.01)
    for seed in range(4):
        batch = make_batch(SIZES, seed=seed)
        assert batch.labels is not None
        batch.labels = batch.labels.repeat(1, 2)
        optimizer.zero_grad()
        train(batch)[0].backward()
        optimizer.step()
    for name, weight in train.state_dict().items():
        assert not torch.equal(weight, before[name]), name


def test_the_mode_of_the_models_parts_stays() -> None:
    model = make_model("MMoE").train()
    model.get_submodule("norm").eval()
    ranker = ResidualHistory(model, *make_towers(), call=call_mmoe, num_tasks=2)
    assert [name for name, module in ranker.named_modules() if not module.training] == ["model.norm"]


class Around(nn.Module):
    """A model whose part has the name that the ranker gives the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.tensor(2.0))

    def forward(self, dense: Tensor, sparse: Any) -> Tensor:
        logits: Tensor = self.scale * self.model(dense, sparse)
        return logits


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("around", [Around, nn.Identity], ids=["of one name", "as it is"])
def test_a_state_dict_of_the_model_loads(around: Any, strict: bool) -> None:
    def make(seed: int) -> nn.Module:
        model = make_model(seed=seed)
        return Around(model) if around is Around else model

    trained, batch = make(1), make_batch(SIZES)
    ranker = ResidualHistory(make(2), *make_towers())
    disturb(ranker.histories, ranker.term)
    term = ranker(batch) - ranker.model(batch.dense, batch.sparse)
    state = trained.state_dict()
    for holder, weights in (
        (ranker, state),
        (AmortizedDLRMTrain(ranker), {f"model.{name}": value for name, value in state.items()}),
    ):
        disturb(ranker.model)
        result = holder.load_state_dict(weights, strict=strict)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        torch.testing.assert_close(ranker(batch), trained(batch.dense, batch.sparse) + term)
    assert list(state) == list(trained.state_dict())
    other = ResidualHistory(make(3), *make_towers())
    other.load_state_dict(ranker.state_dict())
    assert torch.equal(other(batch), ranker(batch))
    damaged = ranker.state_dict()
    del damaged["term.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*term.weight"):
        other.load_state_dict(damaged)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*unknown"):
        other.load_state_dict({**state, "unknown": term})


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_state_dict_of_the_model_loads_into_the_sharded_one() -> None:
    trained, batch = make_model(seed=1), make_batch(SIZES)
    train = GlobalBatchTrain(ResidualHistory(make_model(seed=2), make_tower()))
    sharded = shard(train, device=torch.device("cpu"), optimizer=OptimizerConfig(), batch_size=4).module.eval()
    old = trained(batch.dense, batch.sparse)
    assert not torch.allclose(sharded(batch)[1][1], old)
    result = sharded.load_state_dict({f"model.{name}": value for name, value in trained.state_dict().items()})
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    torch.testing.assert_close(sharded(batch)[1][1], old, rtol=1e-6, atol=1e-6)


def bad_residuals() -> dict[str, tuple[Callable[[], object], str]]:
    def tied() -> ResidualHistory:
        model, events = make_model(), make_events()
        bags: Any = model.get_submodule("sparse_arch.embedding_bag_collection")
        events.embeddings["t_event"].weight = bags.embedding_bags["t_item"].weight
        return ResidualHistory(model, HistoryTower("clicks", AmortizedHistoryArch(8), events=events))

    sparse = AmortizedEmbeddingBagCollection(make_bags(), [make_tower()])
    reads_histories = DLRM(sparse, NUM_DENSE, [16, 8], [16, 1])
    return {
        "no tower": (lambda: ResidualHistory(make_model()), "there is no tower"),
        "an item of the model": (
            lambda: ResidualHistory(make_model(), make_tower(shared=True)),
            "'clicks' would share the table of 'item', but there are no bags to share it: give the tower `events` with "
            "'candidate_item'",
        ),
        "a table of the model": (tied, r"embedding_bags\.t_item\.weight and .*t_event\.weight are one table"),
        "a model with histories": (
            lambda: ResidualHistory(reads_histories, make_tower()),
            "the DLRM reads histories already: give its collection one tower more",
        ),
        "a ranker": (lambda: ResidualHistory(ModelRanker(reads_histories), make_tower()), "reads histories already"),
    }


@pytest.mark.parametrize("what", bad_residuals())
def test_what_cannot_be_is_refused(what: str) -> None:
    make, said = bad_residuals()[what]
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("num_tasks", "call", "said"),
    [
        (1, call_mmoe, r"logits of \(2,\) for each candidate, but the term of its history is of \(1,\)"),
        (3, call_mmoe, r"of \(2,\) .* of \(3,\): give num_tasks as many"),
        # Broadcasting would make [C, C] of it.
        (1, lambda model, batch, ids: model(ids, batch.dense)[0], r"of \(\) .* of \(1,\)"),
    ],
)
def test_logits_of_another_width_are_refused(num_tasks: int, call: Any, said: str) -> None:
    ranker = ResidualHistory(make_model("MMoE"), make_tower(), call=call, num_tasks=num_tasks)
    with pytest.raises(ValueError, match=said):
        ranker(make_batch(SIZES))


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("kind", ["own events", "shared table", "residual"])
def test_quantized_tables_score_in_two_phases_close_to_float(kind: str, is_weighted: bool) -> None:
    if kind == "residual":
        ranker: Any = make_residual(is_weighted=is_weighted)
        disturb(ranker.histories, ranker.term)
    else:
        shared = kind == "shared table" and not is_weighted
        ranker = make_ranker("DLRM", make_tower(shared), is_weighted=is_weighted)
    batch = make_batch(SIZES, is_weighted)
    expected = ranker(batch).detach()
    quantized: Any = quantize_embeddings(
        ranker,
        torch.qint8,
        inplace=False,
        additional_qconfig_spec_keys=[EmbeddingCollection],
        additional_mapping={EmbeddingCollection: QuantEmbeddingCollection},
    )
    assert any(isinstance(module, QuantEmbeddingCollection) for module in quantized.modules())
    scores = refuse_differences(quantized, batch)
    assert not torch.equal(scores, expected)
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.02)
