"""The loss of next events is what plain loops say, on any number of ranks; it teaches histories, and costs elsewhere
nothing.
"""

import copy
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests import schemas
from tests.conftest import MAX_HISTORY, NUM_ITEMS, SCHEMA, make_requests
from tests.launch import torchrun
from tests.models.strangers import make_bags, make_events
from tests.models.test_rankers import OF_REQUEST, SIZES, make_batch
from tests.oracle import encode
from tests.schemas import THREE
from tests.training.test_training import arguments, cut_back, losses, quality
from torchrec_amort import AmortizedDLRMTrain, AmortizedHistoryArch, InputError, ModelConfig, RequestBatch, build_model
from torchrec_amort.apps import evaluate, train
from torchrec_amort.bench.speed import ways_to_train
from torchrec_amort.models.bags import averaged
from torchrec_amort.models.build import TowerConfig
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection
from torchrec_amort.models.ranker import encoders_of
from torchrec_amort.modules.losses import LossConfig, TaskLosses
from torchrec_amort.modules.next_action import NextAction, softmax_losses
from torchrec_amort.modules.tower import HistoryTower
from torchrec_amort.schema import RequestSchema
from torchrec_amort.training.loop import GlobalBatchTrain
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.processes import process_group, rows_of_all_ranks
from torchrec_amort.training.run import load_model
from torchrec_amort.training.sharding import shard

CAUSAL: dict[str, Any] = {"embedding_dim": 8, "history": "append_cross_causal", "over_layers": [8], "dense_layers": []}
# One tower that has no such loss among those that have.
TOWERS = {"clicks": TowerConfig(), "buys": TowerConfig(encoder="similarity"), "views": TowerConfig(vectors=2)}


def ranker_of(schema: RequestSchema, **options: Any) -> Any:
    options = {**CAUSAL, "history_length": MAX_HISTORY, **options}
    if schema is THREE:
        options = {"towers": TOWERS, **options}
    return build_model(schema, ModelConfig(**options), seed=1)


def requests_of(schema: RequestSchema, sizes: list[tuple[int, int]], seed: int) -> list[dict[str, Any]]:
    if schema is SCHEMA:
        return make_requests(sizes, seed)
    return schemas.make_requests(schema, [((n, 5 - n if n < 5 else 1, n // 2), m) for n, m in sizes], seed)


FILMS, TAGS = 6, 4
# What tells an item: its id; or its id, a list of tags, and a price.
LIKES = {"film": "seen_film", "tags": "seen_tags", "price": "seen_price"}
Items = list[list[tuple[Any, ...]]]


@st.composite
def drawn_items(draw: st.DrawFn) -> tuple[Items, Items]:
    """Of the events and of the candidates of some requests: a film, tags in any order, and a price."""
    tags = st.lists(st.integers(0, TAGS - 1), max_size=2).map(tuple)
    item = st.tuples(st.integers(0, FILMS - 1), tags, st.sampled_from([0.5, 2.0]))
    sizes = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=3))
    return tuple([draw(st.lists(item, min_size=s[i], max_size=s[i])) for s in sizes] for i in (0, 1))  # type: ignore[return-value]


class Float64:
    """A tower in float64, and what it reads; a collection would look up in float32."""

    def __init__(self, features: list[str]) -> None:
        torch.manual_seed(0)
        names = {"film": FILMS, "tags": TAGS}
        tables = [
            EmbeddingConfig(name=name, feature_names=[name, LIKES[name]], num_embeddings=rows, embedding_dim=8)
            for name, rows in names.items()
            if name in features
        ]
        self.tables = {
            name: torch.randn(rows, 8, dtype=torch.float64, requires_grad=True) for name, rows in names.items()
        }
        self.features, arch = features, AmortizedHistoryArch(8, num_heads=2, history_attention="causal", num_vectors=2)
        self.tower = HistoryTower(
            "clicks",
            arch,
            events=EmbeddingCollection(tables=tables),
            candidate_features={name: LIKES[name] for name in features},
            numbers={"price": 1, "seen_price": 1} if "price" in features else None,
        ).double()
        self.loss = NextAction([self.tower], weight=0.5)
        self.weights = [*self.tables.values(), *self.tower.encoder.parameters()]

    def values(self, name: str, items: list[tuple[Any, ...]]) -> list[Any]:
        return [item[list(LIKES).index(name)] for item in items]

    def vector(self, item: tuple[Any, ...]) -> Tensor:
        film, tags, price = item
        vector = self.tables["film"][film]
        if "tags" in self.features:
            vector = vector + sum(self.tables["tags"][tag] for tag in tags) / max(1, len(tags))
            vector = vector + self.tower.fit("price")(torch.tensor([[price]], dtype=torch.float64))[0]
        return vector

    def read(self, sides: tuple[Items, Items]) -> tuple[RequestBatch, dict[str, JaggedTensor]]:
        """A batch, and the rows of its features."""
        ids, numbers, counts, rows = {}, {}, {}, {}
        for name, side in [(name, side) for name in self.features for side in (0, 1)]:
            lengths = torch.tensor([len(items) for items in sides[side]])
            values = [value for items in sides[side] for value in self.values(name, items)]
            key = name if side else LIKES[name]
            if name == "price":
                numbers[key] = rows[key] = JaggedTensor(torch.tensor(values).double().view(-1, 1), lengths=lengths)
                continue
            if name == "tags":
                counts[key] = JaggedTensor(torch.tensor([len(tags) for tags in values]).long(), lengths=lengths)
                lengths = torch.tensor([sum(map(len, self.values(name, items))) for items in sides[side]])
                # In another order for candidates than for events.
                values = [tag for tags in values for tag in (tags[::-1] if side else tags)]
            ids[key] = JaggedTensor(torch.tensor(values).long(), lengths=lengths)
            rows[key] = JaggedTensor(self.tables[name][ids[key].values()], lengths=lengths)
            if name == "tags":
                rows[key] = averaged(rows[key], counts[key])
        num_candidates = torch.tensor([len(items) for items in sides[1]])
        empty = KeyedJaggedTensor.empty()
        dense = torch.zeros(len(num_candidates), 0), torch.zeros(int(num_candidates.sum()), 0)
        sequences = KeyedJaggedTensor.from_jt_dict(ids)
        batch = RequestBatch(*dense, empty, empty, sequences, num_candidates, dense_sequences=numbers, num_ids=counts)
        return batch, rows

    def value(self, sides: tuple[Items, Items]) -> Tensor:
        batch, rows = self.read(sides)
        self.tower(
            {LIKES[name]: rows[LIKES[name]] for name in self.features}, {name: rows[name] for name in self.features}
        )
        value, detached = self.loss(batch)
        assert float(detached) == float(value.detach())
        return value

    def in_loops(self, sides: tuple[Items, Items]) -> float:
        """Importance sampling as it is defined: negatives as often as they come, less the logarithm of Q each."""
        arch = copy.deepcopy(self.tower.encoder)
        arch.vectors = torch.nn.Identity()
        samples, negatives = [], [item for items in sides[1] for item in items]
        for items in sides[0]:
            events = [self.vector(item) for item in items]
            for place in range(len(items) - 1):
                # An event's row is that of a candidate which stands where the event does.
                samples.append((encode(arch, events[: place + 1], events[place]), items[place + 1]))
                negatives.append(items[place + 1])
        names = [self.name(item) for item in negatives]
        losses = []
        for row, item in samples:
            terms = [
                math.exp(float(row @ self.vector(other)) - math.log(names.count(name) / len(names)))
                for other, name in zip(negatives, names, strict=True)
                if name != self.name(item)
            ]
            positive = math.exp(float(row @ self.vector(item)))
            losses.append(-math.log(positive / (positive + sum(terms) / len(names))))
        return 0.5 * sum(losses) / len(losses) if losses else 0.0

    def name(self, item: tuple[Any, ...]) -> Any:
        return (item[0], sorted(item[1]), item[2]) if "tags" in self.features else item[0]


@pytest.mark.parametrize("features", [["film"], list(LIKES)], ids=["ids", "lists and numbers"])
@settings(max_examples=8)
@given(sides=drawn_items(), seed=st.integers(0, 99))
def test_the_loss_and_its_gradients_are_those_of_plain_loops(
    features: list[str], sides: tuple[Items, Items], seed: int
) -> None:
    model = Float64(features)
    value = model.value(sides)
    value.backward()
    generator = torch.Generator().manual_seed(seed)
    ways = [torch.randn(weight.shape, generator=generator, dtype=torch.float64) for weight in model.weights]
    slope = sum(
        float((weight.grad * way).sum())
        for weight, way in zip(model.weights, ways, strict=True)
        if weight.grad is not None
    )

    @torch.no_grad()
    def moved(step: float) -> float:
        for weight, way in zip(model.weights, ways, strict=True):
            weight.add_(way, alpha=step)
        return model.in_loops(sides)

    assert float(value.detach()) == pytest.approx(moved(0), rel=1e-9, abs=1e-12)
    above, below = moved(1e-6), moved(-2e-6)
    assert slope == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-6)


def test_requests_without_a_next_event_are_no_samples() -> None:
    ranker = ranker_of(SCHEMA)
    loss = NextAction(ranker.collection.towers, weight=1.0)
    for sizes in ([(0, 2)], [(1, 1), (0, 3)]):
        batch = RequestBatch.from_requests(make_requests(sizes), SCHEMA)
        ranker(batch)
        value, detached = loss(batch)
        value.backward()
        assert float(detached) == 0
        assert all(not w.grad.any() for w in ranker.parameters() if w.grad is not None)
    # The last item of these requests has no next one, and all others have but one item to be told from.
    same = [{**one, "history_item": [3, 3, 3], "candidate_item": [3, 3]} for one in make_requests([(3, 2)])]
    batch = RequestBatch.from_requests(same, SCHEMA)
    ranker(batch)
    value, detached = loss(batch)
    value.backward()
    assert float(detached) == 0
    assert all(w.grad.isfinite().all() for w in ranker.parameters() if w.grad is not None)


def test_drawn_negatives_stand_for_all_without_bias() -> None:
    torch.manual_seed(0)
    rows, items = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    following = torch.tensor([0, 2, 5])
    whole = softmax_losses(rows, items, following, torch.arange(6))
    for count in (2, 4):
        some = [
            softmax_losses(rows, items, following, torch.tensor(drawn)).exp()
            for drawn in itertools.combinations(range(6), count)
        ]
        torch.testing.assert_close(torch.stack(some).mean(0), whole.exp())


def test_the_loss_is_of_the_batch_that_was_read_last() -> None:
    ranker = ranker_of(SCHEMA)
    loss = NextAction(ranker.collection.towers, weight=1.0)
    batches = [RequestBatch.from_requests(make_requests([(5, 2), (4, 1)], seed), SCHEMA) for seed in range(2)]
    values = []
    for batch in (*batches, batches[0]):
        ranker(batch)
        values.append(float(loss(batch)[1]))
    assert values[0] == values[2] != values[1]
    with pytest.raises(ValueError, match="has read no batch in training since the last loss of next actions"):
        loss(batches[0])


@pytest.mark.parametrize("schema", [SCHEMA, THREE], ids=["one history", "three"])
def test_half_precision_has_the_loss_to_its_rounding(schema: RequestSchema) -> None:
    ranker, batch = ranker_of(schema), RequestBatch.from_requests(requests_of(schema, [(5, 2), (3, 1)], 0), schema)
    loss, values = NextAction(ranker.collection.towers, weight=1.0), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ranker(batch)
            value, _ = loss(batch)
        value.backward()
        assert value.dtype == torch.float32
        values.append(float(value.detach()))
    assert values[1] == pytest.approx(values[0], rel=0.05)


Refused = Callable[[], list[HistoryTower]]


def tower_of(**options: Any) -> HistoryTower:
    """Of tables that are not as wide as the encoder, so that layers fit them."""
    arch = AmortizedHistoryArch(16, num_heads=2, history_attention="causal")
    tower = HistoryTower("clicks", arch, events=make_events(), **options)
    AmortizedEmbeddingBagCollection(make_bags(), [tower], OF_REQUEST)
    return tower


@pytest.mark.parametrize(
    ("towers", "told"),
    [
        (lambda: [], "loss.next_action is 0.1, but no history of the model has causal attention, by which an event"),
        (lambda: ranker_of(SCHEMA, history="append_cross").collection.towers, "set model.history to append_cross_caus"),
        (lambda: ranker_of(SCHEMA, history="concatenation").collection.towers, "no history of the model has causal"),
        (
            lambda: ranker_of(SCHEMA, recent_events=3).collection.towers,
            "tower 'history' keeps 3 recent_events, and makes others of the older ones, which have no next: leave out",
        ),
        (
            lambda: [tower_of()],
            r"tower 'clicks': the candidate's 'candidate_item' is fitted like no feature of events, \['history_item'\]",
        ),
    ],
)
def test_models_whose_events_predict_no_next_one_are_refused(towers: Refused, told: str) -> None:
    with pytest.raises(InputError, match=told):
        NextAction(towers(), weight=0.1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"next_action": -1.0}, "loss.next_action is -1.0: give 0 or more"),
        ({"next_action_negatives": 0}, "loss.next_action_negatives is 0: give 1 or more"),
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        LossConfig(**options)


def test_candidates_that_are_fitted_like_events_predict_by_any_encoders_width() -> None:
    tower = tower_of(candidate_features={"candidate_item": "history_item"})
    sparse = AmortizedEmbeddingBagCollection(make_bags(), [tower], OF_REQUEST)
    loss, batch = NextAction([tower], weight=1.0), make_batch(SIZES)
    sparse(batch)
    assert float(loss(batch)[1]) > 0


def test_nothing_but_training_is_changed() -> None:
    batch = RequestBatch.from_requests(make_requests([(5, 2), (4, 1)]), SCHEMA)
    plain, other = ranker_of(SCHEMA), ranker_of(SCHEMA)
    module = AmortizedDLRMTrain(other, next_action=NextAction(other.collection.towers, weight=0.5))
    assert module.state_dict().keys() == AmortizedDLRMTrain(plain).state_dict().keys()
    encoder: Any = other.history_arch
    calls: list[int] = []
    encoder.layers[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    expected, (_, logits, _) = AmortizedDLRMTrain(plain.eval()).eval()(batch)
    loss, (_, other_logits, _) = module.eval()(batch)
    assert torch.equal(logits, other_logits)
    assert torch.equal(loss, expected)
    # The last layer was asked for candidates alone; in training, for events as well.
    assert len(calls) == 1
    assert float(module.train()(batch)[0]) > float(expected)
    assert len(calls) == 3


def test_steps_by_impressions_which_repeat_histories_are_not_timed() -> None:
    batch = RequestBatch.from_requests(make_requests([(5, 2)]), SCHEMA)
    with process_group() as device:
        for weight, ways in ((0.5, {"requests", "padded"}), (None, {"requests", "padded", "impressions"})):
            ranker = ranker_of(SCHEMA)
            loss = None if weight is None else NextAction(ranker.collection.towers, weight)
            module = GlobalBatchTrain(ranker, loss=TaskLosses(LossConfig(), SCHEMA), next_action=loss)
            model = shard(module, device=device, optimizer=OptimizerConfig(), batch_size=1)
            assert set(ways_to_train(model, batch)) == ways


def circle(size: int, step: int, random: np.random.Generator) -> list[int]:
    first = int(random.integers(NUM_ITEMS))
    return [(first + step * place) % NUM_ITEMS for place in range(size)]


def mean_rank(ranker: Any, requests: list[dict[str, Any]]) -> float:
    """How many items are thought likelier than the next one."""
    (tower,) = ranker.collection.towers
    with torch.no_grad():
        batch = RequestBatch.from_requests(requests, SCHEMA)
        embeddings = ranker.history_embedding_collection(batch.sequences)
        events_ND, items_ND = ranker.event_encoder(embeddings).values(), embeddings["history_item"].values()
        items_ID = ranker.history_embedding_collection.embeddings["item"].weight
        ranks, start = [], 0
        for request in requests:
            count = len(request["history_item"]) - 1
            row = encode(tower.encoder, list(events_ND[start : start + count]), events_ND[start + count - 1])
            ranks.append(int((items_ID @ row > items_ND[start + count] @ row).sum()))
            start += count + 1
    return sum(ranks) / len(ranks)


def test_histories_whose_next_item_follows_from_the_last_are_learned() -> None:
    random = np.random.default_rng(0)

    def drawn(count: int) -> list[dict[str, Any]]:
        made = make_requests([(MAX_HISTORY, 2)] * count, int(random.integers(1000)))
        return [{**one, "history_item": circle(MAX_HISTORY, 7, random)} for one in made]

    batches = [RequestBatch.from_requests(drawn(16), SCHEMA) for _ in range(6)]
    ranks, tested = [], drawn(6)
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        ranker = ranker_of(SCHEMA, embedding_dim=16, positions="none")
        module = AmortizedDLRMTrain(ranker, next_action=NextAction(ranker.collection.towers, weight))
        optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
        for batch in batches * 6:
            optimizer.zero_grad()
            module(batch)[0].backward()
            optimizer.step()
        ranks.append(mean_rank(ranker.eval(), tested))
    assert ranks[0] > 8
    assert ranks[1] < 2


# The schema, the negatives: fewer than there are items, too.
CASES: list[tuple[RequestSchema, int]] = [(SCHEMA, 5), (THREE, 1024)]
OF_RANKS = [(5, 2), (0, 1), (1, 3), (8, 4), (3, 1), (2, 2)]


def train_some_steps(schema: RequestSchema, num_negatives: int) -> dict[str, Any]:
    """Some steps on this rank's requests; losses of the global batch, and all logits."""
    ranker = ranker_of(schema)
    loss = NextAction(ranker.collection.towers, 0.5, num_negatives)
    model = shard(
        GlobalBatchTrain(ranker, next_action=loss),
        device=torch.device("cpu"),
        optimizer=OptimizerConfig(dense_lr=0.01),
        batch_size=4,
    )
    found = []
    for seed in range(3):
        batch = RequestBatch.from_requests(requests_of(schema, OF_RANKS, seed), schema)
        mine = batch.select(torch.arange(dist.get_rank(), len(batch), dist.get_world_size()))
        model.optimizer.zero_grad()
        value, (of_all, _, _) = model.module(mine)
        value.backward()
        model.optimizer.step()
        found.append(float(of_all))
    model.module.eval()
    with torch.no_grad():
        # Ranks look up together, each the whole last batch.
        return {"losses": found, "logits": model.module(batch)[1][1]}


def train_cases(folder: Path) -> None:
    records = [train_some_steps(*case) for case in CASES]
    if dist.get_rank() == 0:
        torch.save(records, folder / f"{dist.get_world_size()}.pt")


def test_any_number_of_ranks_trains_as_one(tmp_path: Path) -> None:
    with process_group():
        expected = [train_some_steps(*case) for case in CASES]
    torchrun(3, "tests.modules.test_next_action", str(tmp_path))
    for ranks in (2, 3):
        for one, other in zip(expected, torch.load(tmp_path / f"{ranks}.pt"), strict=True):
            assert other["losses"] == pytest.approx(one["losses"], rel=1e-6)
            torch.testing.assert_close(other["logits"], one["logits"], rtol=1e-5, atol=1e-5)


def test_a_run_is_stopped_resumed_and_served_without_it(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    causal = ("--model.history=append_cross_causal", "--model.dropout=0.1")
    options = (*causal, "--loss={next_action: 0.5, next_action_negatives: 20}")
    often = ("--loop.checkpoint_every=5", "--loop.keep_checkpoints=9")
    train.main(arguments(data_folder, whole, *options, *often))
    stopped = cut_back(whole, 10, tmp_path / "stopped")
    train.main(arguments(data_folder, stopped, *options, *often, "--resume=true"))
    assert losses(stopped) == losses(whole)
    (model, *_), (undisturbed, *_) = load_model(str(stopped)), load_model(str(whole))
    expected = undisturbed.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not any(encoder.keeps_events for encoder in encoders_of(model))
    evaluate.main(["--run_folder", str(stopped)])
    assert quality(stopped)["tasks"]["liked"].keys() >= {"auc", "ne"}
    with pytest.raises(SystemExit):
        train.main(arguments(data_folder, tmp_path / "refused", "--loss.next_action=0.5"))
    assert "loss.next_action is 0.5, but no history of the model has causal attention" in capsys.readouterr().err


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with process_group():
        rank = dist.get_rank()
        train_cases(folder)
        # The gradient of a row is the sum of what all ranks make of it.
        own = torch.full((rank + 1, 2), float(rank), requires_grad=True)
        gathered = rows_of_all_ranks(own)
        assert gathered[:, 0].tolist() == [0, 1, 1, 2, 2, 2]
        (gathered * (rank + 1)).sum().backward()
        assert own.grad is not None
        assert own.grad.eq(1 + 2 + 3).all()
    if rank < 2:
        # Two of them again, by themselves.
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
        train_cases(folder)
        dist.destroy_process_group()
