"""Any model that is built on an AmortizedEmbeddingBagCollection scores in two phases, as it does impression by
impression.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
    KeyedTensor,
)
from torchrec.models.dlrm import DLRM

from tests.models.strangers import DIN, MODELS, NUM_DENSE, TABLES, WIDE_TABLES, MMoE, jagged, make_bags, make_events
from torchrec_amort import AmortizedHistoryArch, RequestBatch
from torchrec_amort.jagged_ids import keyed, rows_of
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection, CandidateRows
from torchrec_amort.models.ranker import ModelRanker, Ranker, ranker_of
from torchrec_amort.modules.rivals import Concatenation
from torchrec_amort.modules.tower import HistoryTower

Sizes = Sequence[tuple[int, int]]
SIZES = ((3, 2), (0, 1), (5, 4), (1, 3))
OF_REQUEST = ["user", "country"]


def make_batch(sizes: Sizes, is_weighted: bool = False, seed: int = 0) -> RequestBatch:
    """Requests of so many events and candidates each."""
    generator = torch.Generator().manual_seed(seed)

    def ids(name: str, counts: Sequence[int]) -> list[list[int]]:
        return [torch.randint(TABLES[name][0], (count,), generator=generator).tolist() for count in counts]

    def keyed(lists: dict[str, list[list[int]]], is_weighted: bool = is_weighted) -> KeyedJaggedTensor:
        tensor = KeyedJaggedTensor.from_jt_dict({name: jagged(of) for name, of in lists.items()})
        if not is_weighted:
            return tensor
        weights = torch.rand(tensor.values().shape, generator=generator)
        return KeyedJaggedTensor(tensor.keys(), tensor.values(), weights, tensor.lengths())

    num_events, num_candidates = [n for n, _ in sizes], [m for _, m in sizes]
    total = sum(num_candidates)
    items = ids("item", [1] * total)
    flat = iter([item for (item,) in items])
    of_requests = [list(itertools.islice(flat, count)) for count in num_candidates]
    sequences = keyed({"history_item": ids("item", num_events), "candidate_item": of_requests}, is_weighted=False)
    return RequestBatch(
        request_dense=torch.rand(len(sizes), 1, generator=generator),
        candidate_dense=torch.rand(total, NUM_DENSE - 1, generator=generator),
        request_sparse=keyed({"user": ids("user", [1] * len(sizes)), "country": ids("country", [1] * len(sizes))}),
        candidate_sparse=keyed({"item": items, "tags": ids("tags", [row % 3 for row in range(total)])}),
        sequences=sequences,
        num_candidates=torch.tensor(num_candidates),
        labels=torch.randint(2, (total, 1), generator=generator).float(),
    )


def make_tower(shared: bool = False, name: str = "clicks", dim: int = 8, width: int = 8) -> HistoryTower:
    arch = AmortizedHistoryArch(dim, num_layers=1, num_heads=2, num_vectors=2)
    if shared:
        return HistoryTower(name, arch, item="item", width=width, starts_at_zero=False)
    return HistoryTower(name, arch, events=make_events(dim), width=width, starts_at_zero=False)


def call_mmoe(model: nn.Module, batch: RequestBatch, rows: RequestBatch | CandidateRows) -> Tensor:
    return torch.stack(model(rows, batch.dense), dim=1)


def make_ranker(name: str, *towers: HistoryTower, is_weighted: bool = False) -> Ranker:
    torch.manual_seed(1)
    tables = WIDE_TABLES if name == "MMoE" else TABLES
    sparse = AmortizedEmbeddingBagCollection(make_bags(tables, is_weighted), towers or [make_tower()], OF_REQUEST)
    return ModelRanker(MODELS[name](sparse), call_mmoe if name == "MMoE" else None).eval()


def refuse_differences(ranker: Ranker, batch: RequestBatch) -> Tensor:
    """Whole, in two phases, in parts and as impressions: one function; its logits."""
    with torch.no_grad():
        logits = ranker(batch)
        torch.testing.assert_close(ranker(batch.to_impressions()), logits, rtol=0, atol=1e-6)
        state = ranker.encode_request(batch)
        assert len(state) == len(batch)
        torch.testing.assert_close(ranker.score_candidates(state, batch), logits, rtol=0, atol=1e-6)
        parts = [(0, 1), (1, logits.shape[0])] if logits.shape[0] > 1 else [(0, 1)]
        scored = [ranker.score_candidates(state, batch.part(start, stop)) for start, stop in parts]
        torch.testing.assert_close(torch.cat(scored), logits, rtol=0, atol=1e-6)
    return logits


@pytest.mark.parametrize("shared", [False, True], ids=["own events", "shared table"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_any_class_scores_in_two_phases_as_impression_by_impression(name: str, shared: bool) -> None:
    width = 16 if name == "MMoE" else 8
    ranker = make_ranker(name, make_tower(shared, width=width))
    logits = refuse_differences(ranker, make_batch(SIZES))
    assert logits.shape == (10, 2 if name == "MMoE" else 1)
    changed = make_batch(SIZES)
    changed.sequences.values()[0] += 1
    with torch.no_grad():
        assert not torch.allclose(ranker(changed)[:2], logits[:2])
        torch.testing.assert_close(ranker(changed)[2:], logits[2:])


def in_float64(ranker: ModelRanker) -> ModelRanker:
    """All after lookups in float64: TorchRec's collections return float32 whatever their tables are."""
    collection = ranker.double().collection
    for bags in (collection.request_bags, collection.candidate_bags):
        if bags is not None:
            bags.register_forward_hook(
                lambda _, args, bags: KeyedTensor(bags.keys(), bags.length_per_key(), bags.values().double())
            )
    for sequences in collection.sequences:
        sequences.register_forward_hook(
            lambda _, args, rows: {
                name: JaggedTensor(of.values().double(), lengths=of.lengths()) for name, of in rows.items()
            }
        )
    return ranker


@pytest.mark.parametrize("shared", [False, True], ids=["own events", "shared table"])
@pytest.mark.parametrize("name", MODELS)
def test_in_float64_two_phases_are_the_model_called_for_one_impression_after_the_other(name: str, shared: bool) -> None:
    ranker = make_ranker(name, make_tower(shared, width=16 if name == "MMoE" else 8))
    assert isinstance(ranker, ModelRanker)
    batch = make_batch(SIZES)
    batch.request_dense, batch.candidate_dense = batch.request_dense.double(), batch.candidate_dense.double()
    impressions = batch.to_impressions()
    with torch.no_grad():
        in_float64(ranker)
        each = [ranker(impressions.select(torch.tensor([row]))) for row in range(len(impressions))]
        logits = ranker.score_candidates(ranker.encode_request(batch), batch)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, torch.cat(each), rtol=0, atol=1e-10)


@given(sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=4))
def test_any_sizes_score_alike(sizes: Sizes) -> None:
    ranker = make_ranker("SimpleDeepFMNN", make_tower(), make_tower(name="again"))
    refuse_differences(ranker, make_batch(sizes))


def test_weighted_bags_score_in_two_phases() -> None:
    batch = make_batch(SIZES, is_weighted=True)
    logits = refuse_differences(make_ranker("DLRM", is_weighted=True), batch)
    assert not torch.allclose(logits, refuse_differences(make_ranker("DLRM"), make_batch(SIZES)))


def test_a_model_with_a_collection_of_its_own_and_din_pooling_scores_in_two_phases() -> None:
    torch.manual_seed(1)
    sparse = AmortizedEmbeddingBagCollection(make_bags(), [make_tower()], OF_REQUEST)
    own = make_events()
    (table,) = own.embedding_configs()
    table.feature_names = ["seen", "of_candidate"]
    model = DIN(sparse, EmbeddingCollection(tables=[table]), NUM_DENSE)

    def call(model: nn.Module, batch: RequestBatch, rows: RequestBatch | CandidateRows) -> Tensor:
        lists = batch.to_impressions().sequences
        lists = KeyedJaggedTensor(["seen", "of_candidate"], lists.values(), lengths=lists.lengths())
        logits_CT: Tensor = model(batch.dense, rows, lists)
        return logits_CT

    refuse_differences(ModelRanker(model, call).eval(), make_batch(SIZES))


def test_requests_are_looked_up_once_and_events_once() -> None:
    ranker = make_ranker("DLRM", make_tower(), make_tower(shared=True, name="shared"))
    assert isinstance(ranker, ModelRanker)
    read: dict[str, list[int]] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda module, args, *_: read.setdefault(name, []).append(args[0].values().numel())

    for name in ("request_bags", "candidate_bags", "sequences.0", "sequences.1"):
        ranker.collection.get_submodule(name).register_forward_hook(count(name))
    batch = make_batch(SIZES)
    ranker(batch)
    candidates = batch.candidate_sparse.values().numel()
    assert read == {"request_bags": [8], "candidate_bags": [candidates], "sequences.0": [19], "sequences.1": [19]}
    read.clear()
    state = ranker.encode_request(batch)
    assert read == {"request_bags": [8], "sequences.0": [9], "sequences.1": [9]}
    read.clear()
    ranker.score_candidates(state, batch)
    assert read == {"candidate_bags": [candidates], "sequences.0": [10], "sequences.1": [10]}


def test_the_tables_are_the_models_own_and_its_state_dict_loads() -> None:
    bags = make_bags()
    sparse = AmortizedEmbeddingBagCollection(bags, [make_tower(shared=True)], OF_REQUEST)
    mine = dict(sparse.named_parameters())
    assert {weight.data_ptr() for weight in bags.parameters()} < {weight.data_ptr() for weight in mine.values()}
    other = make_bags()
    state = DLRM(other, NUM_DENSE, [16, 8], [16, 1]).state_dict()
    model = MODELS["DLRM"](sparse)
    of_bags = {name: weight for name, weight in state.items() if "embedding_bags" in name}
    assert not model.load_state_dict(of_bags, strict=False).unexpected_keys
    for name, weight in other.named_parameters():
        assert torch.equal(dict(bags.named_parameters())[name], weight)


def bad_collections() -> dict[str, tuple[Callable[[], object], str]]:
    def make(**changed: object) -> AmortizedEmbeddingBagCollection:
        arguments = {"embedding_bag_collection": make_bags(), "towers": [make_tower()], "request_features": OF_REQUEST}
        return AmortizedEmbeddingBagCollection(**arguments | changed)

    def table_of_both_sides() -> EmbeddingBagCollection:
        bags = make_bags()
        bags.embedding_bag_configs()[0].feature_names = ["user", "author"]
        return EmbeddingBagCollection(tables=bags.embedding_bag_configs())

    hooked = make_bags()
    hooked.register_forward_hook(lambda *_: None)
    return {
        "an unknown feature": (
            lambda: make(request_features=["age"]),
            "request_features has 'age', but the bags",
        ),
        "a table of both sides": (
            lambda: make(embedding_bag_collection=table_of_both_sides()),
            r"'t_user' is read by \['user'\] of the request and \['author'\] of the candidate: leave",
        ),
        "a hook": (lambda: make(embedding_bag_collection=hooked), "has a forward hook: give it as TorchRec makes it"),
        "two towers of one name": (lambda: make(towers=[make_tower(), make_tower()]), "'clicks' is there 2 times"),
        "a name of no module": (lambda: make(towers=[make_tower(name="items")]), "tower 'items': a module cannot have"),
        "a name of a feature": (lambda: make(towers=[make_tower(name="item")]), "'item' is there 2 times"),
        "an item nowhere": (
            lambda: make(towers=[HistoryTower("clicks", AmortizedHistoryArch(8), item="film")]),
            "item 'film' is read by 0 tables",
        ),
        "a weighted shared table": (
            lambda: make(embedding_bag_collection=make_bags(is_weighted=True), towers=[make_tower(shared=True)]),
            "'t_item' cannot serve events as well: its ids have weights",
        ),
        "no collection": (
            lambda: ModelRanker(DLRM(make_bags(), 1, [8], [8, 1])),
            "the DLRM has 0 Amortized.* build it on one",
        ),
        "a ranker called": (lambda: ranker_of(make_ranker("DLRM"), call_mmoe), "leave call out"),
    }


@pytest.mark.parametrize("what", bad_collections())
def test_what_cannot_be_is_refused(what: str) -> None:
    make, said = bad_collections()[what]
    with pytest.raises(ValueError, match=said):
        make()


def test_an_encoder_without_two_phases_trains_and_is_refused_in_two() -> None:
    tower = HistoryTower("clicks", Concatenation(8, 1, 2), events=make_events())
    ranker, batch = make_ranker("DLRM", tower), make_batch(SIZES)
    assert ranker(batch).isfinite().all()
    with pytest.raises(ValueError, match="Concatenation encodes a history for every candidate anew"):
        ranker.encode_request(batch)


def test_training_steps_move_all_weights_of_two_tasks() -> None:
    ranker = make_ranker("MMoE", make_tower(width=16)).train()
    assert isinstance(ranker.model, MMoE)
    before = {name: weight.clone() for name, weight in ranker.named_parameters()}
    optimizer = torch.optim.Adam(ranker.parameters(), lr=0.01)
    for seed in range(3):
        batch = make_batch(SIZES, seed=seed)
        optimizer.zero_grad()
        logits = ranker(batch)
        assert batch.labels is not None
        nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.expand_as(logits)).backward()
        optimizer.step()
    for name, weight in ranker.named_parameters():
        assert not torch.equal(weight, before[name]), name


def test_features_may_have_names_that_modules_cannot() -> None:
    names = ["type", "a.b"]
    tables = [
        EmbeddingConfig(name=f"t_{i}", feature_names=[name], num_embeddings=9, embedding_dim=4)
        for i, name in enumerate(names)
    ]
    item = EmbeddingConfig(name="t_item", feature_names=["candidate_item"], num_embeddings=9, embedding_dim=4)
    events = EmbeddingCollection(tables=[*tables, item])
    ranker = make_ranker("DLRM", HistoryTower("clicks", AmortizedHistoryArch(8), events=events, starts_at_zero=False))
    batch = make_batch(SIZES)
    sequences = batch.sequences
    of_events = [
        keyed({name: (ids % 9, lengths)}, len(batch))
        for name in names
        for ids, lengths in [rows_of(sequences, "history_item", 0, len(batch))]
    ]
    items = keyed({"candidate_item": (sequences["candidate_item"].values() % 9, batch.num_candidates)}, len(batch))
    refuse_differences(ranker, replace(batch, sequences=KeyedJaggedTensor.concat([*of_events, items])))


def test_a_model_without_histories_reads_the_ids_of_candidates_and_their_requests() -> None:
    for is_weighted in (False, True):
        batch = make_batch(SIZES, is_weighted)
        read, impressions = batch.sparse, batch.to_impressions()
        assert read.stride() == batch.stride()
        for ids in (impressions.request_sparse, impressions.candidate_sparse):
            for key in ids.keys():
                assert torch.equal(read[key].values(), ids[key].values())
                assert torch.equal(read[key].lengths(), ids[key].lengths())
                if is_weighted:
                    assert torch.equal(read[key].weights(), ids[key].weights())


def test_a_batch_without_ids_has_none_for_a_model_without_histories() -> None:
    batch = make_batch(SIZES)
    none = KeyedJaggedTensor([], torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int64))
    assert not replace(batch, request_sparse=none, candidate_sparse=none).sparse.keys()
