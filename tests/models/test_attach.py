import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline.tracing import Tracer, _get_leaf_module_names
from torchrec.distributed.types import ShardedModule
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain
from torchrec.modules.crossnet import CrossNet
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.launch import torchrun
from torchrec_amort import (
    AmortizedDLRM,
    AmortizedDLRMTrain,
    AmortizedHistoryArch,
    AmortizedScorer,
    EventEncoder,
    RequestBatch,
    attach_history,
)
from torchrec_amort.models.attach import AttachedDLRM
from torchrec_amort.training.loop import GlobalBatchTrain
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.processes import gather_on_first, process_group
from torchrec_amort.training.sharding import shard

KINDS = ["dot", "dcn"]
NUM_ITEMS = 30
SIZES = [(5, 3), (0, 2), (8, 1), (2, 4)]

# The over arch's first layer, and the collection.
FIRST, COLLECTION = "model.over_arch.model.0._mlp.0._linear", "model.sparse_arch.embedding_bag_collection"

kinds = pytest.mark.parametrize("kind", KINDS)


def make_dlrm(
    kind: str = "dot",
    dim: int = 8,
    num_features: int = 2,
    num_dense: int = 3,
    layers: tuple[int, ...] = (16,),
    device: torch.device | None = None,
) -> DLRM:
    # The first table has the name of one of the history's.
    names = ["item", *(f"t{i}" for i in range(1, num_features))]
    tables = [
        EmbeddingBagConfig(name=names[i], feature_names=[f"f{i}"], num_embeddings=NUM_ITEMS, embedding_dim=dim)
        for i in range(num_features)
    ]
    parts: dict[str, Any] = {
        "embedding_bag_collection": EmbeddingBagCollection(tables=tables, device=device),
        "dense_in_features": num_dense,
        "dense_arch_layer_sizes": [7, dim],
        "over_arch_layer_sizes": [*layers, 2],
        "dense_device": device,
    }
    return DLRM(**parts) if kind == "dot" else DLRM_DCN(**parts, dcn_num_layers=2, dcn_low_rank_dim=3)


def make_collection(
    dim: int = 8, features: tuple[str, ...] = ("history_item", "candidate_item"), device: torch.device | None = None
) -> EmbeddingCollection:
    item = EmbeddingConfig(name="item", feature_names=[*features], num_embeddings=NUM_ITEMS, embedding_dim=dim)
    action = EmbeddingConfig(name="action", feature_names=["history_action"], num_embeddings=4, embedding_dim=dim)
    tables = [item, action] if "history_item" in features else [item]
    return EmbeddingCollection(tables=tables, device=device)


def attach(dlrm: DLRM, **options: Any) -> AttachedDLRM:
    dim = dlrm.sparse_arch.D
    return attach_history(dlrm, make_collection(dim), AmortizedHistoryArch(dim, num_heads=1, **options))


def keyed(lists: dict[str, list[list[int]]]) -> KeyedJaggedTensor:
    rows = [row for of_key in lists.values() for row in of_key]
    return KeyedJaggedTensor(
        keys=list(lists),
        values=torch.tensor([value for row in rows for value in row], dtype=torch.int64),
        lengths=torch.tensor([len(row) for row in rows], dtype=torch.int64),
        stride=len(next(iter(lists.values()))),
    )


def make_batch(sizes: list[tuple[int, int]], num_features: int = 2, num_dense: int = 3, seed: int = 0) -> RequestBatch:
    """A random batch of requests with the given numbers of events and candidates."""
    random = np.random.default_rng(seed)

    def ids(limit: int, counts: list[int]) -> list[list[int]]:
        return [random.integers(limit, size=count).tolist() for count in counts]

    events, candidates = [n for n, _ in sizes], [m for _, m in sizes]
    total = sum(candidates)
    sequences = {
        "history_item": ids(NUM_ITEMS, events),
        "history_action": ids(4, events),
        "candidate_item": ids(NUM_ITEMS, candidates),
    }
    bags = {f"f{i}": ids(NUM_ITEMS, random.integers(4, size=total).tolist()) for i in range(num_features)}
    return RequestBatch(
        request_dense=torch.from_numpy(random.random((len(sizes), 1), dtype=np.float32)),
        candidate_dense=torch.from_numpy(random.random((total, num_dense), dtype=np.float32)),
        request_sparse=keyed({"user_id": ids(9, [1] * len(sizes))}),
        candidate_sparse=keyed(bags),
        sequences=keyed(sequences),
        num_candidates=torch.tensor(candidates),
        labels=torch.from_numpy(random.integers(2, size=(total, 2)).astype(np.float32)),
    ).validate()


def old_scores(dlrm: DLRM, batch: RequestBatch) -> Tensor:
    scores: Tensor = dlrm(batch.candidate_dense, batch.candidate_sparse)
    return scores


def disturb(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def history_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "history" in name or "sequences" in name}


@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 90)), min_size=1, max_size=4),
    st.integers(2, 33),
    st.integers(1, 6),
    st.integers(0, 13),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=30)
@example("dot", [(3, 1)], 2, 1, 1, [1], 1, False)
@example("dcn", [(0, 1)], 2, 1, 1, [1], 1, False)
@example("dot", [(9, 511)], 32, 26, 13, [64, 32], 2, True)
@example("dcn", [(9, 511)], 32, 26, 13, [64, 32], 2, True)
def test_scores_are_those_of_the_dlrm_to_the_last_bit(
    kind: str,
    sizes: list[tuple[int, int]],
    dim: int,
    num_features: int,
    num_dense: int,
    layers: list[int],
    num_vectors: int,
    has_summary: bool,
) -> None:
    dlrm = make_dlrm(kind, dim, num_features, num_dense, tuple(layers)).eval()
    batch = make_batch(sizes, num_features, num_dense)
    expected = old_scores(dlrm, batch)
    attached = attach(dlrm, num_vectors=num_vectors, has_summary=has_summary)
    assert torch.equal(attached(batch), expected)
    assert torch.equal(old_scores(dlrm, batch), expected)


@kinds
def test_it_shares_all_weights_of_the_dlrm_and_has_its_mode(kind: str) -> None:
    dlrm = make_dlrm(kind).eval()
    old = {name: value.clone() for name, value in dlrm.state_dict().items()}
    attached = attach(dlrm)
    assert [name for name, module in attached.named_modules() if module.training] == []
    names = attached.renamed()
    for name, parameter in dlrm.named_parameters():
        assert attached.get_parameter(names[name]) is parameter, name
        assert torch.equal(parameter, old[name]), name
    assert set(old) <= set(names)
    assert list(names.values()) == list(attached.state_dict())
    assert all(module.training for module in attach(make_dlrm(kind).train()).modules())


def widened(attached: AttachedDLRM, kind: str) -> AmortizedDLRM:
    """The usual model with the history among its slots, its matrices put together of the attached one's."""
    dlrm: Any = attached.model
    (tower,) = attached.collection.towers
    first, bags = dlrm.over_arch.model[0]._mlp[0]._linear, attached.collection.candidate_bags
    assert bags is not None
    dim, num_slots = tower.encoder.embedding_dim, len(bags.embedding_bag_configs())
    wide = AmortizedDLRM(
        candidate_embedding_bag_collection=bags,
        request_embedding_bag_collection=None,
        dense_in_features=3,
        dense_arch_layer_sizes=[7, dim],
        over_arch_layer_sizes=[16, 2],
        history_embedding_collection=tower.events,
        event_encoder=tower.event_encoder,
        history_arch=tower.encoder,
        interaction=kind,
        dcn_low_rank_dim=3,
    )
    weights = attached.state_dict()
    state = {old: weights[new] for old, new in attached.renamed().items() if old in wide.state_dict()}
    columns = torch.cat([first.weight, first.history_columns.weight], dim=1)
    if kind == "dot":
        num_vectors = 1 + num_slots + tower.encoder.num_slots
        pairs = [(i, j) for i in range(1 + num_slots) for j in range(i + 1, 1 + num_slots)]
        pairs += [(i, j) for j in range(1 + num_slots, num_vectors) for i in range(j)]
        order = [pairs.index((int(i), int(j))) for i, j in torch.triu_indices(num_vectors, num_vectors, 1).T]
        columns = columns[:, [*range(dim), *(dim + place for place in order)]]
    else:
        crossnet: Any = dlrm.inter_arch.crossnet
        for layer in range(2):
            W, V = crossnet.history_W_kernels[layer], crossnet.history_V_kernels[layer]
            prefix = "inter_arch.crossnet"
            state[f"{prefix}.W_kernels.{layer}"] = torch.cat([crossnet.W_kernels[layer], W.weight])
            state[f"{prefix}.V_kernels.{layer}"] = torch.cat([crossnet.V_kernels[layer], V.weight], dim=1)
            state[f"{prefix}.bias.{layer}"] = torch.cat([crossnet.bias[layer], W.bias])
    state["over_arch.model.0._mlp.0._linear.weight"] = columns
    wide.load_state_dict(state)
    return wide.eval()


@kinds
@pytest.mark.parametrize("options", [{}, {"num_vectors": 2, "has_summary": True}])
def test_it_computes_what_a_dlrm_with_wider_matrices_computes(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dlrm = make_dlrm(kind).eval()
    attached = attach(dlrm, **options)
    disturb(history_parameters(attached).values())
    disturb(p for name, p in attached.named_parameters() if "crossnet.bias" in name)
    batch = make_batch(SIZES)
    scores = attached(batch)
    assert not torch.allclose(scores, old_scores(dlrm, batch), atol=1e-2)
    batch.request_dense = batch.request_dense[:, :0]
    torch.testing.assert_close(scores, widened(attached, kind)(batch), rtol=1e-5, atol=1e-5)


@kinds
@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_the_dlrm_loads(kind: str, strict: bool) -> None:
    torch.manual_seed(0)
    trained, fresh = make_dlrm(kind).eval(), make_dlrm(kind).eval()
    batch = make_batch(SIZES)
    attached = attach(fresh)
    before = {name: parameter.clone() for name, parameter in history_parameters(attached).items()}
    state = trained.state_dict()
    # In a model around it, as in training, its keys have a prefix.
    around = {f"model.{name}": value for name, value in state.items()}
    for model, weights in ((attached, state), (AmortizedDLRMTrain(attached), around)):
        disturb(fresh.parameters())
        assert not torch.equal(attached(batch), old_scores(trained, batch))
        result = model.load_state_dict(weights, strict=strict)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert torch.equal(attached(batch), old_scores(trained, batch))
        assert all(torch.equal(parameter, before[name]) for name, parameter in history_parameters(attached).items())
    assert list(state) == list(trained.state_dict())


@kinds
def test_a_checkpoint_of_the_attached_model_loads_whole_or_not_at_all(kind: str) -> None:
    torch.manual_seed(0)
    first, second = attach(make_dlrm(kind).eval()), attach(make_dlrm(kind).eval())
    disturb(first.parameters())
    second.load_state_dict(first.state_dict())
    batch = make_batch(SIZES)
    assert torch.equal(second(batch), first(batch))
    damaged = first.state_dict()
    del damaged[f"{FIRST}.history_columns.weight"]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{FIRST}.history_columns.weight"):
        second.load_state_dict(damaged)
    without_old = first.state_dict()
    del without_old["model.over_arch.model.1.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*model.over_arch.model.1.bias"):
        second.load_state_dict(without_old)


def old_names(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of `attach(make_dlrm(kind))` in version 0.1."""
    layer = {
        "attention_norm.weight": (8,),
        "attention_norm.bias": (8,),
        "query.weight": (8, 8),
        "key_value.weight": (16, 8),
        "output.weight": (8, 8),
        "feedforward_norm.weight": (8,),
        "feedforward_norm.bias": (8,),
        "feedforward.0.weight": (16, 8),
        "feedforward.0.bias": (16,),
        "feedforward.2.weight": (8, 16),
        "feedforward.2.bias": (8,),
    }
    names: dict[str, tuple[int, ...]] = {
        "sparse_arch.embedding_bag_collection.embedding_bags.item.weight": (30, 8),
        "sparse_arch.embedding_bag_collection.embedding_bags.t1.weight": (30, 8),
        "history_embedding_collection.embeddings.item.weight": (30, 8),
        "history_embedding_collection.embeddings.action.weight": (4, 8),
        "event_encoder.recency.weight": (20, 8),
        **{f"history_arch.layers.{place}.{name}": shape for place in range(2) for name, shape in layer.items()},
        "history_arch.output_norm.weight": (8,),
        "history_arch.output_norm.bias": (8,),
        "dense_arch.model._mlp.0._linear.weight": (7, 3),
        "dense_arch.model._mlp.0._linear.bias": (7,),
        "dense_arch.model._mlp.1._linear.weight": (8, 7),
        "dense_arch.model._mlp.1._linear.bias": (8,),
        "over_arch.model.0._mlp.0._linear.bias": (16,),
        "over_arch.model.1.weight": (2, 16),
        "over_arch.model.1.bias": (2,),
    }
    if kind == "dot":
        of_over: dict[str, tuple[int, ...]] = {
            "over_arch.model.0._mlp.0._linear.weight": (16, 11),
            "over_arch.history_columns.weight": (16, 3),
        }
        return names | of_over
    for place in range(2):
        names |= {
            f"inter_arch.crossnet.W_kernels.{place}": (24, 3),
            f"inter_arch.crossnet.V_kernels.{place}": (3, 24),
            f"inter_arch.crossnet.bias.{place}": (24,),
            f"inter_arch.crossnet.history_W_kernels.{place}.weight": (8, 3),
            f"inter_arch.crossnet.history_W_kernels.{place}.bias": (8,),
            f"inter_arch.crossnet.history_V_kernels.{place}.weight": (3, 8),
        }
    return names | {
        "over_arch.model.0._mlp.0._linear.weight": (16, 24),
        "over_arch.history_columns.weight": (16, 8),
    }


@kinds
def test_weights_of_version_0_1_load_strictly_by_state_dict_and_by_distributed_checkpoint(
    kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    saved = {name: torch.randn(shape) for name, shape in old_names(kind).items()}
    around = {f"model.{name}": weight for name, weight in saved.items()}
    events = EventEncoder(["history_item", "history_action"], 8, max_length=20)

    def fresh() -> AttachedDLRM:
        arch = AmortizedHistoryArch(8, num_heads=1)
        return attach_history(make_dlrm(kind).eval(), make_collection(), arch, event_encoder=copy.deepcopy(events))

    first, second, by_checkpoint = fresh(), fresh(), fresh()
    assert first.load_state_dict(saved) == ([], [])
    assert AmortizedDLRMTrain(second).load_state_dict(around) == ([], [])
    dcp.save({"model": saved}, checkpoint_id=tmp_path, no_dist=True)
    weights = by_checkpoint.state_dict()
    state = {"model": {old: weights[new] for old, new in by_checkpoint.renamed().items()}}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    for model in (first, second, by_checkpoint):
        assert model.renamed().keys() == saved.keys()
        for old, new in model.renamed().items():
            assert torch.equal(model.state_dict()[new], saved[old]), old
    without = {name: weight for name, weight in saved.items() if name != "history_arch.output_norm.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key.*towers\.history\.encoder\.output_norm\.bias"):
        fresh().load_state_dict(without)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*history_arch\.other"):
        fresh().load_state_dict({**saved, "history_arch.other": torch.zeros(1)})


@kinds
def test_training_moves_first_the_new_columns_then_the_history(kind: str) -> None:
    torch.manual_seed(0)
    dlrm = make_dlrm(kind)
    model = attach(dlrm)
    batch = make_batch(SIZES)
    before = old_scores(dlrm, batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    start = {name: parameter.clone() for name, parameter in history_parameters(model).items()}
    moved, losses = [], []
    for _ in range(20):
        optimizer.zero_grad()
        loss, _ = AmortizedDLRMTrain(model)(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        moved.append({name for name, p in history_parameters(model).items() if not torch.equal(p, start[name])})
    assert f"{FIRST}.history_columns.weight" in moved[0]
    assert not any("towers" in name or "sequences" in name for name in moved[0])
    assert moved[-1] == set(start)
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.allclose(old_scores(dlrm, batch), before)


@kinds
def test_every_parameter_takes_part_even_if_all_histories_are_empty(kind: str) -> None:
    model = attach(make_dlrm(kind))
    AmortizedDLRMTrain(model)(make_batch([(0, 2), (0, 1)]))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@kinds
def test_new_parameters_have_the_device_and_dtype_of_the_over_arch(kind: str) -> None:
    batch = make_batch(SIZES)
    batch.candidate_dense = batch.candidate_dense.double()
    dlrm = make_dlrm(kind).double().eval()
    assert torch.equal(attach(dlrm)(batch), old_scores(dlrm, batch))
    real = attach(make_dlrm(kind).eval())
    disturb(real.parameters())
    meta = torch.device("meta")
    on_meta = attach_history(
        make_dlrm(kind, device=meta).eval(),
        make_collection(device=meta),
        AmortizedHistoryArch(8, num_heads=1, device=meta),
    )
    assert {parameter.device for parameter in history_parameters(on_meta).values()} == {meta}
    on_meta.load_state_dict(real.state_dict(), assign=True)
    batch = make_batch(SIZES)
    assert torch.equal(on_meta(batch), real(batch))


def test_events_are_the_sum_of_all_features_unless_an_encoder_is_given() -> None:
    torch.manual_seed(0)
    parts = make_dlrm().eval(), make_collection(), AmortizedHistoryArch(8, num_heads=1)
    both, items = attach_history(*parts), attach_history(*parts, event_encoder=EventEncoder(["history_item"], 8))
    for model in (both, items):
        nn.init.ones_(model.get_parameter(f"{FIRST}.history_columns.weight"))
    batch = make_batch([(5, 3)])
    other_actions = make_batch([(5, 3)])
    other_actions.sequences["history_action"].values().add_(1).remainder_(4)
    assert not torch.allclose(both(batch), both(other_actions))
    assert torch.equal(items(batch), items(other_actions))


class Other(DLRM):
    """A forward that is scaled, and a copy of how DLRM's calls its parts."""

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        dense = self.dense_arch(dense_features)
        logits: Tensor = self.over_arch(self.inter_arch(dense, self.sparse_arch(sparse_features)))
        return dense.sum(1, keepdim=True) - 2 * logits


class OfPart(DLRM):
    """A forward that reads the slots beside the interaction."""

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        logits: Tensor = super().forward(dense_features, sparse_features)
        return logits + self.sparse_arch(sparse_features).square().sum((1, 2)).unsqueeze(1)


def projection() -> DLRM:
    ebc = make_dlrm().sparse_arch.embedding_bag_collection
    return DLRM_Projection(
        embedding_bag_collection=ebc,
        dense_in_features=3,
        dense_arch_layer_sizes=[8],
        over_arch_layer_sizes=[4, 1],
        interaction_branch1_layer_sizes=[8],
        interaction_branch2_layer_sizes=[8],
    )


def with_other_crossnet() -> DLRM:
    dlrm = make_dlrm("dcn")
    dlrm.inter_arch.crossnet = CrossNet(24, 1)
    return dlrm


def compiled() -> DLRM:
    dlrm = make_dlrm()
    dlrm.dense_arch = torch.compile(dlrm.dense_arch)
    return dlrm


def with_a_backward_hook() -> DLRM:
    dlrm = make_dlrm()
    dlrm.sparse_arch.embedding_bag_collection.register_full_backward_hook(lambda *_: None)
    return dlrm


def other(kind: str = "dot", cls: type[DLRM] = Other) -> DLRM:
    dlrm = make_dlrm(kind)
    dlrm.__class__ = cls
    return dlrm


def hooked() -> DLRM:
    dlrm = make_dlrm()
    dlrm.register_forward_hook(lambda module, args, output: 3 * output)
    return dlrm


ANY_KINDS = {
    "projection": projection,
    "own forward": other,
    "own forward, dcn": lambda: other("dcn"),
    "a hook": hooked,
}


@pytest.mark.parametrize("options", [{}, {"num_vectors": 2, "has_summary": True}], ids=["one vector", "three"])
@pytest.mark.parametrize("request_features", [(), ("f1",)], ids=["", "request side"])
@pytest.mark.parametrize("what", [*ANY_KINDS, "dot", "dcn"])
def test_any_dlrm_scores_to_the_last_bit_until_the_history_moves_it(
    what: str, request_features: tuple[str, ...], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    dlrm = (ANY_KINDS[what]() if what in ANY_KINDS else make_dlrm(what)).eval()
    arch = AmortizedHistoryArch(8, num_heads=1, **options)
    attached = attach_history(dlrm, make_collection(), arch, request_features=request_features)
    batch = make_batch(SIZES)
    of_requests = batch.request_sparse
    batch.request_dense = batch.request_dense[:, :0]
    if request_features:
        of_requests = keyed({"f1": [[1, 2], [], [4], [5, 6, 7]]})
        batch = replace(batch, request_sparse=of_requests, candidate_sparse=batch.candidate_sparse.split([1, 1])[0])
    else:
        batch = replace(batch, request_sparse=batch.request_sparse.split([0, 1])[0])
    expected = dlrm(batch.dense, batch.sparse if request_features else batch.candidate_sparse)
    assert torch.equal(attached(batch), expected)
    columns = [parameter for name, parameter in attached.named_parameters() if "history_columns" in name]
    disturb(columns)
    disturb([p for name, p in attached.named_parameters() if "crossnet.history" in name])
    moved = attached(batch)
    assert not torch.allclose(moved, expected)
    torch.testing.assert_close(AmortizedScorer(attached, 3).score(batch), moved, rtol=0, atol=1e-5)
    torch.testing.assert_close(attached(batch.to_impressions()), moved, rtol=0, atol=1e-5)


def test_tables_of_another_width_are_fitted_and_names_of_the_dlrm_are_left_to_it() -> None:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=NUM_ITEMS, embedding_dim=8)
        for name in ("history", "history_1")
    ]
    dlrm = DLRM(EmbeddingBagCollection(tables=tables), 3, [7, 8], [16, 2]).eval()
    batch = make_batch(SIZES)
    ids = batch.candidate_sparse.to_dict()
    bags = KeyedJaggedTensor.from_jt_dict({"history": ids["f0"], "history_1": ids["f1"]})
    batch = replace(batch, candidate_sparse=bags, request_sparse=batch.request_sparse.split([0, 1])[0])
    attached = attach_history(dlrm, make_collection(12), AmortizedHistoryArch(8, num_heads=1))
    assert torch.equal(attached(batch), old_scores(dlrm, batch))
    disturb(history_parameters(attached).values())
    assert not torch.allclose(attached(batch), old_scores(dlrm, batch), atol=1e-3)


def test_tables_may_be_on_meta_until_they_are_sharded() -> None:
    dlrm = make_dlrm()
    dlrm.sparse_arch.to("meta")
    attached = attach_history(dlrm, make_collection(device=torch.device("meta")), AmortizedHistoryArch(8, num_heads=1))
    assert {name for name, weight in attached.named_parameters() if weight.is_meta} == {
        f"{COLLECTION}.candidate_bags.embedding_bags.item.weight",
        f"{COLLECTION}.candidate_bags.embedding_bags.t1.weight",
        f"{COLLECTION}.sequences.0.embeddings.item.weight",
        f"{COLLECTION}.sequences.0.embeddings.action.weight",
    }


def test_attaching_draws_no_random_number_of_its_caller() -> None:
    dlrm, collection, arch = other().eval(), make_collection(), AmortizedHistoryArch(8, num_heads=1)
    events = EventEncoder(["history_item"], 8)
    attach_history(dlrm, collection, arch, event_encoder=events)
    before = torch.get_rng_state()
    attach_history(dlrm, collection, arch, event_encoder=events, request_features=["f1"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("what", ANY_KINDS)
def test_a_checkpoint_of_any_dlrm_loads_and_leaves_the_history(what: str) -> None:
    torch.manual_seed(0)
    trained, fresh = ANY_KINDS[what]().eval(), ANY_KINDS[what]().eval()
    attached = attach_history(fresh, make_collection(), AmortizedHistoryArch(8, num_heads=1), request_features=["f1"])
    disturb(history_parameters(attached).values())
    before = {name: p.clone() for name, p in history_parameters(attached).items()}
    attached.load_state_dict(trained.state_dict())
    for name, weight in trained.named_parameters():
        assert torch.equal(fresh.get_parameter(name), weight), name
    for name, weight in before.items():
        assert torch.equal(attached.get_parameter(name), weight), name
    # A state dict whose grown layers are the DLRM's own, with the new columns beside their weights.
    former = {name.replace("._linear.linear.", "._linear."): w.clone() for name, w in attached.state_dict().items()}
    assert former.keys() != attached.state_dict().keys()
    disturb(attached.parameters())
    assert attached.load_state_dict(former) == ([], [])
    for name, weight in trained.named_parameters():
        assert torch.equal(fresh.get_parameter(name), weight), name
    bias = "dense_arch.model._mlp.0._linear.bias"
    with pytest.raises(RuntimeError, match="size mismatch"):
        attached.load_state_dict({**trained.state_dict(), bias: torch.zeros(1)})
    with pytest.raises(RuntimeError, match=f"Missing key.*model.{bias}"):
        attached.load_state_dict({name: w for name, w in trained.state_dict().items() if name != bias})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "is a Linear, not a DLRM or DLRM_DCN"),
        (lambda: DLRMTrain(make_dlrm()), "is a DLRMTrain, not a DLRM or DLRM_DCN: attach once, and before"),
        (lambda: attach(make_dlrm()), "is a AttachedDLRM, not a DLRM or DLRM_DCN: attach once"),
        (
            lambda: other(cls=OfPart),
            "a OfPart scores otherwise, by .*: its forward reads its parts",
        ),
        (with_a_backward_hook, r"^sparse_arch\.embedding_bag_collection has a backward hook"),
        (with_other_crossnet, "has a CrossNet where LowRankCrossNet is known"),
        (compiled, "has a OptimizedModule where .* attach before sharding, compiling"),
    ],
)
def test_models_of_another_kind_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_history(make(), make_collection(), AmortizedHistoryArch(8))


def test_parts_that_do_not_fit_are_refused() -> None:
    arch = AmortizedHistoryArch(8)
    with pytest.raises(ValueError, match="history_arch has embedding_dim 12, but the DLRM's tables have 8"):
        attach_history(make_dlrm(), make_collection(), AmortizedHistoryArch(12))
    with pytest.raises(ValueError, match=r"has \['history_item', 'history_action'\]: it needs 'candidate_item'"):
        attach_history(make_dlrm(), make_collection(features=("history_item",)), arch)
    with pytest.raises(ValueError, match="no feature but 'candidate_item': it needs one of events"):
        attach_history(make_dlrm(), make_collection(features=("candidate_item",)), arch)


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("meta")])
def test_a_table_that_two_collections_share_is_refused(device: torch.device) -> None:
    dlrm, collection = make_dlrm(device=device), make_collection(device=device)
    collection.embeddings["item"].weight = dlrm.sparse_arch.embedding_bag_collection.embedding_bags["item"].weight
    with pytest.raises(
        ValueError,
        match=r"candidate_bags\.embedding_bags\.item\.weight and sequences\.0\.embeddings\.item\.weight are one table, "
        "and sharding would make two",
    ):
        attach_history(dlrm, collection, AmortizedHistoryArch(8, num_heads=1, device=device))


def train_on_this_rank(kind: str, device: torch.device) -> list[dict[str, Tensor]]:
    """Attach, shard and train; each rank's scores before and after, on rank 0."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    dlrm = make_dlrm(kind)
    old_state = {f"model.{name}": value.clone() for name, value in dlrm.state_dict().items()}
    attached = attach(dlrm)
    # The first step has no history at all; rank 0 of 2 has the requests at even places.
    all_sizes = [[(0, 3), (0, 2), (0, 1), (0, 4)]] + [[(5, 3), (0, 2), (8, 1), (2, 4)]] * 4
    batches = [one_ranks_share(make_batch(sizes, seed=step), rank, ranks) for step, sizes in enumerate(all_sizes)]
    batch = batches[-1]
    expected = old_scores(dlrm, batch)
    sharded = shard(GlobalBatchTrain(attached), device=device, optimizer=OptimizerConfig(dense_lr=0.01), batch_size=2)
    module = sharded.module
    with pytest.raises(ValueError, match="is a DistributedModelParallel, .* before sharding"):
        attach_history(module, make_collection(), AmortizedHistoryArch(8))
    with pytest.raises(ValueError, match="a DistributedModelParallel around a ranker: .* sharded, score with it"):
        AmortizedScorer(module)
    with pytest.raises(ValueError, match=r"a ShardedEmbeddingBagCollection, sharded .*: score with the model"):
        AmortizedScorer(attached)
    refuse_other_inputs_of_collections(attached)
    unwired = DistributedModelParallel(AmortizedDLRMTrain(attach(make_dlrm(kind))), device=device)
    with pytest.raises(ValueError, match=rf"of {COLLECTION}\.sequences\.0 were sharded without an optimizer"):
        unwired(batch)

    def scores() -> Tensor:
        with torch.no_grad():
            logits: Tensor = module.eval()(batch)[1][1]
        module.train()
        return logits

    torch.testing.assert_close(scores(), expected, rtol=1e-6, atol=1e-6)
    for step_batch in batches:
        sharded.optimizer.zero_grad()
        module(step_batch)[0].backward()
        sharded.optimizer.step()
    trained = scores()
    # Sharding gave the attached model tables of its own.
    for name, value in dlrm.sparse_arch.state_dict(prefix="model.sparse_arch.").items():
        assert torch.equal(value, old_state[name]), name
    result = module.load_state_dict(old_state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    return gather_on_first({"before": expected, "trained": trained, "reloaded": scores()})


def one_ranks_share(batch: RequestBatch, rank: int, ranks: int) -> RequestBatch:
    """The requests of this rank, every `ranks`-th."""
    requests = torch.arange(rank, len(batch), ranks)
    of_candidate = torch.repeat_interleave(batch.num_candidates)
    candidates = torch.nonzero(torch.isin(of_candidate, requests)).flatten()

    def rows(kjt: KeyedJaggedTensor, wanted: Tensor) -> KeyedJaggedTensor:
        return keyed({k: [kjt[k].to_dense()[int(row)].tolist() for row in wanted] for k in kjt.keys()})

    assert batch.labels is not None
    return RequestBatch(
        request_dense=batch.request_dense[requests],
        candidate_dense=batch.candidate_dense[candidates],
        request_sparse=rows(batch.request_sparse, requests),
        candidate_sparse=rows(batch.candidate_sparse, candidates),
        sequences=rows(batch.sequences, requests),
        num_candidates=batch.num_candidates[requests],
        labels=batch.labels[candidates],
    )


def refuse_other_inputs_of_collections(model: nn.Module) -> None:
    """Trace as TrainPipelineSparseDist does: it prefetches a collection that reads an attribute of the batch."""
    graph = Tracer(leaf_modules=_get_leaf_module_names(model)).trace(model)
    sharded = {name for name, child in model.named_modules() if isinstance(child, ShardedModule)}
    inputs = {node.target: node.args[0] for node in graph.nodes if node.op == "call_module" and node.target in sharded}
    (batch,) = [node for node in graph.nodes if node.op == "placeholder"]
    assert {name: (node.target, node.args) for name, node in inputs.items()} == {
        f"{COLLECTION}.candidate_bags": (getattr, (batch, "candidate_sparse")),
        f"{COLLECTION}.sequences.0": (getattr, (batch, "sequences")),
    }


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    torchrun(2, "tests.models.test_attach", str(tmp_path))
    for kind in KINDS:
        with process_group() as device:
            (one,) = train_on_this_rank(kind, device)
        two = torch.load(tmp_path / f"{kind}.pt")
        for name, whole in one.items():
            # Candidates of requests 0, 2 and of 1, 3.
            shares = [whole[[0, 1, 2, 5]], whole[[3, 4, 6, 7, 8, 9]]]
            for share, rank in zip(shares, two, strict=True):
                torch.testing.assert_close(rank[name], share, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one["trained"], one["before"], atol=1e-2)
        assert not torch.allclose(one["trained"], one["reloaded"], atol=1e-2)


if __name__ == "__main__":
    with process_group() as device:
        for kind in KINDS:
            records = train_on_this_rank(kind, device)
            if records:
                torch.save(records, Path(sys.argv[1]) / f"{kind}.pt")
