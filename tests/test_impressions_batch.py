"""A user's own batch of impressions, put together to requests."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from tests.conftest import SCHEMA, make_requests, with_weights
from tests.schemas import THREE, Shapes
from tests.schemas import make_requests as requests_of
from tests.schemas import schemas as random_schemas
from tests.schemas import shapes as random_shapes
from tests.test_batch import assert_same, lists, shapes
from torchrec_amort import Feature, InputError, RequestBatch, RequestSchema

KEYS = ["user", "tags", "history", "actions", "film", "words"]
OWN = {"user", "tags"}
EVENTS = {"history", "actions"}


@dataclass
class Row:
    """An impression: its request, its ids, and a weight of each."""

    request: int
    ids: dict[str, list[int]]
    label: int = 0
    weight: dict[str, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        # An id of a key tells its weight, and a request's ids are alike.
        self.weight = {key: [i / 4 for i in of_key] for key, of_key in self.ids.items()}


def ids_of(size: st.SearchStrategy[int]) -> st.SearchStrategy[list[int]]:
    return size.flatmap(lambda n: st.lists(st.integers(0, 9), min_size=n, max_size=n))


@st.composite
def impressions(draw: st.DrawFn) -> list[Row]:
    """Rows of a few requests, in any order."""
    requests = draw(st.lists(st.sampled_from([-(2**63), -1, 0, 5, 2**63 - 1]), min_size=1, max_size=9))
    own: dict[int, dict[str, list[int]]] = {}
    rows = []
    for request in requests:
        if request not in own:
            events = st.just(draw(st.integers(0, 4)))
            own[request] = {
                "user": draw(ids_of(st.just(1))),
                "tags": draw(ids_of(st.integers(0, 3))),
                "history": draw(ids_of(events)),
                "actions": draw(ids_of(events)),
            }
        ids = own[request] | {"film": draw(ids_of(st.just(1))), "words": draw(ids_of(st.integers(0, 3)))}
        rows.append(Row(request, ids, draw(st.integers(0, 1))))
    return rows


def keyed(rows: Sequence[Row], *, weighted: bool = False) -> KeyedJaggedTensor:
    lists_ = [row.ids[key] for key in KEYS for row in rows]
    weights = [w for key in KEYS for row in rows for w in row.weight[key]]
    return KeyedJaggedTensor(
        KEYS,
        torch.tensor([i for ids in lists_ for i in ids], dtype=torch.int64),
        weights=torch.tensor(weights) if weighted else None,
        lengths=torch.tensor([len(ids) for ids in lists_], dtype=torch.int32),
        stride=len(rows),
    )


def dense(rows: Sequence[Row]) -> Tensor:
    return torch.arange(2.0 * len(rows)).view(-1, 2)


def group(rows: Sequence[Row], **changes: Any) -> RequestBatch:
    arguments: dict[str, Any] = {
        "dense_features": dense(rows),
        "sparse_features": keyed(rows),
        "request_ids": torch.tensor([row.request for row in rows]),
        "request_features": ["user", "tags"],
        "event_features": ["history", "actions"],
        "item": "film",
        **changes,
    }
    return RequestBatch.from_impressions(**arguments)


@given(impressions(), st.booleans())
def test_rows_of_one_id_are_one_request(rows: list[Row], weighted: bool) -> None:
    batch = group(
        rows,
        sparse_features=keyed(rows, weighted=weighted),
        labels=torch.tensor([row.label for row in rows]),
        users=[row.ids["user"][0] for row in rows],
    ).validate()

    requests: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        requests.setdefault(row.request, []).append(place)
    order = [place for places in requests.values() for place in places]
    first = [rows[places[0]] for places in requests.values()]
    candidates = [rows[place] for place in order]

    assert batch.num_candidates.tolist() == [len(places) for places in requests.values()]
    assert len(batch) == len(requests)
    assert batch.stride() == len(rows)
    assert batch.request_dense.shape == (len(requests), 0)
    assert torch.equal(batch.candidate_dense, dense(rows)[order])
    assert torch.equal(batch.dense, dense(rows)[order])
    assert lists(batch.request_sparse) == {key: [row.ids[key] for row in first] for key in ("user", "tags")}
    assert lists(batch.candidate_sparse) == {key: [row.ids[key] for row in candidates] for key in ("film", "words")}
    assert lists(batch.sequences) == {
        "history": [row.ids["history"] for row in first],
        "actions": [row.ids["actions"] for row in first],
        "candidate_item": [[rows[place].ids["film"][0] for place in places] for places in requests.values()],
    }
    for kjt in (batch.request_sparse, batch.candidate_sparse, batch.sequences):
        assert (kjt.weights_or_none() is not None) == weighted
        assert not weighted or torch.equal(kjt.weights(), kjt.values() / 4)
    assert batch.labels is not None
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [[row.label] for row in candidates]
    assert batch.users is not None
    assert batch.users.tolist() == [row.ids["user"][0] for row in first]
    assert RequestBatch.impression_order([row.request for row in rows]).tolist() == order


@given(impressions())
def test_rows_that_stand_together_do_not_move(rows: list[Row]) -> None:
    order = RequestBatch.impression_order([row.request for row in rows]).tolist()
    together = [rows[place] for place in order]
    assert_same_requests(group(together), group(rows, dense_features=dense(rows)[torch.argsort(torch.tensor(order))]))
    assert RequestBatch.impression_order([row.request for row in together]).tolist() == list(range(len(rows)))


def assert_same_requests(batch: RequestBatch, expected: RequestBatch) -> None:
    assert (batch.labels, batch.users) == (expected.labels, expected.users) == (None, None)
    labels, users = torch.zeros(batch.stride(), 1), torch.zeros(len(batch))
    assert_same(replace(batch, labels=labels, users=users), replace(expected, labels=labels, users=users))


@given(shapes, st.booleans(), st.integers(0, 2**20))
def test_the_impressions_of_a_batch_become_the_batch_again(
    sizes: list[tuple[int, int]], weighted: bool, seed: int
) -> None:
    batch = RequestBatch.from_requests(make_requests(sizes, seed), SCHEMA)
    if weighted:
        batch = with_weights(batch, lambda ids: ids + 0.25)
    alone = batch.to_impressions()
    assert alone.users is not None
    again = RequestBatch.from_impressions(
        batch.dense,
        KeyedJaggedTensor.concat([alone.request_sparse, alone.candidate_sparse, alone.sequences]),
        torch.repeat_interleave(batch.num_candidates),
        labels=alone.labels,
        request_features=batch.request_sparse.keys(),
        event_features=[key for key in batch.sequences.keys() if key != "candidate_item"],
        item="candidate_item",
        users=alone.users,
    ).validate(SCHEMA.table_sizes)
    assert torch.equal(again.dense, batch.dense)
    items = lists(alone.sequences)["candidate_item"]
    assert lists(again.candidate_sparse) == lists(batch.candidate_sparse) | {"candidate_item": items}
    kept = {name: getattr(batch, name) for name in ("request_dense", "candidate_dense", "candidate_sparse")}
    assert_same(replace(again, **kept), batch)
    for kjt in (again.request_sparse, again.candidate_sparse, again.sequences) if weighted else ():
        assert torch.equal(kjt.weights(), kjt.values() + 0.25)


def regrouped(alone: RequestBatch, request_ids: Tensor, **changes: Any) -> RequestBatch:
    """Requests of impressions whose request has one candidate each."""
    with_keys = [ids for ids in (alone.request_sparse, alone.candidate_sparse, alone.sequences) if ids.keys()]
    arguments: dict[str, Any] = {
        "dense_features": alone.candidate_dense,
        "sparse_features": KeyedJaggedTensor.concat(with_keys),
        "request_ids": request_ids,
        **{name: getattr(alone, name) for name in ("request_dense", "dense_sequences", "num_ids")},
        **{name: getattr(alone, name) for name in ("labels", "weights", "users")},
    }
    return RequestBatch.from_impressions(**(arguments | changes))


@given(random_schemas(), random_shapes(), st.randoms(use_true_random=False), st.integers(0, 2**20))
def test_the_impressions_of_any_schema_become_the_batch_again(
    schema: RequestSchema, sizes: Shapes, random: Any, seed: int
) -> None:
    batch = RequestBatch.from_requests(requests_of(schema, sizes, seed), schema)
    request_ids, alone = torch.repeat_interleave(batch.num_candidates), batch.to_impressions()
    again = regrouped(alone, request_ids, schema=schema)
    assert_same(again.validate(schema.table_sizes), batch)
    shuffled = torch.tensor(random.sample(range(batch.stride()), batch.stride()))
    order = RequestBatch.impression_order(request_ids[shuffled])
    mixed = regrouped(alone.select(shuffled), request_ids[shuffled], schema=schema)
    assert_same(mixed.to_impressions(), alone.select(shuffled[order]))
    assert len(mixed) == len(batch)


def test_several_histories_with_numbers_and_lists_are_given_by_name() -> None:
    batch = RequestBatch.from_requests(requests_of(THREE, [((3, 1, 0), 2), ((0, 2, 4), 3)], 0), THREE)
    alone, request_ids = batch.to_impressions(), torch.repeat_interleave(batch.num_candidates)
    histories = {name: [f.name for f in features] for name, features in THREE.histories.items()}
    named = regrouped(
        alone,
        request_ids,
        request_features=["user_id", "likes"],
        event_features=histories,
        item="film",
        num_ids={"clicks_tags": alone.num_ids["clicks_tags"]},
    ).validate()
    ids, expected = lists(named.sequences), lists(batch.sequences)
    events = [key for keys in histories.values() for key in keys if key in ids]
    assert ids == {key: expected[key] for key in events} | {"candidate_item": expected["film"]}
    assert named.dense_sequences.keys() == batch.dense_sequences.keys()
    latest, expected_latest = named.keep_latest({"clicks": 1}), batch.keep_latest({"clicks": 1})
    for key in events:
        assert lists(latest.sequences)[key] == lists(expected_latest.sequences)[key]
    for key, numbers in expected_latest.dense_sequences.items():
        assert torch.equal(latest.dense_sequences[key].values(), numbers.values())


def without(mapping: Any, key: str) -> dict[str, JaggedTensor]:
    return {name: value for name, value in mapping.items() if name != key}


def numbers_of(mapping: Any, key: str, change: Callable[[Tensor], Tensor]) -> dict[str, JaggedTensor]:
    """The same with other values of a key."""
    other = JaggedTensor(change(mapping[key].values()), lengths=mapping[key].lengths())
    return {**mapping, key: other}


def plus(row: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.index_add(0, torch.tensor([row]), torch.ones_like(values[:1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: {"dense_sequences": numbers_of(b.dense_sequences, "clicks_content", plus(4))},
            r"request 0: 'clicks_content' has number -?\d\.\d+ as entry 1, column 0 in row 0 but number .* in row 1: "
            "give rows with another history another request id",
        ),
        (
            lambda b: {"num_ids": numbers_of(b.num_ids, "clicks_tags", lambda v: v[[1, 0, *range(2, len(v))]])},
            r"request 0: 'clicks_tags' has number of ids \d as entry 0 in row 0 but number of ids \d in row 1",
        ),
        (
            lambda b: {
                "request_dense": torch.tensor([[0.5], [0.25], [1], [1], [1]]),
                "schema": RequestSchema("films", (*THREE.features, Feature("hour", "request", "dense"))),
            },
            "request 0: request_dense has number 0.5 as entry 0 in row 0 but number 0.25 in row 1: give these rows",
        ),
        (
            lambda b: {"num_ids": numbers_of(b.num_ids, "clicks_tags", plus(0))},
            r"row 0: 'clicks_tags' has \d ids, but num_ids tells of \d",
        ),
        (
            lambda b: {"num_ids": without(b.num_ids, "clicks_tags")},
            "num_ids: no 'clicks_tags', which schema 'films' has: add it",
        ),
        (
            lambda b: {"dense_sequences": without(b.dense_sequences, "content")},
            "dense_sequences: no 'content', which schema 'films' has: add it",
        ),
        (
            lambda b: {"dense_sequences": numbers_of(b.dense_sequences, "content", lambda v: v[:, :3])},
            r"dense_sequences\['content'\] has 3 columns, but schema 'films' has 4",
        ),
        (
            lambda b: {"dense_sequences": numbers_of(b.dense_sequences, "content", lambda v: v[:3])},
            r"dense_sequences\['content'\] has values of shape \(3, 4\), but its lengths tell of 5 entries",
        ),
        (
            lambda b: {"dense_sequences": {**b.dense_sequences, "rest": b.dense_sequences["content"]}},
            "dense_sequences: 'rest' is not one of .*: leave it out",
        ),
        (
            lambda b: {"dense_sequences": {**b.dense_sequences, "film": b.dense_sequences["content"]}},
            "'film' is a key of sparse_features and of dense_sequences: rename one",
        ),
        (lambda b: {"num_ids": {"rest": b.num_ids["tags"]}}, "num_ids: no 'rest': sparse_features has"),
        (lambda b: {"dense_features": torch.zeros(5, 2)}, "dense_features has 2 columns, but schema 'films' has 1"),
        (lambda b: {"request_dense": torch.zeros(5, 2)}, "request_dense has 2 columns, but schema 'films' has 0"),
        (lambda b: {"request_dense": torch.zeros(4, 0)}, "request_dense has 4 rows, but dense_features has 5"),
        (lambda b: {"request_dense": torch.zeros(5)}, r"request_dense is torch.float32 with shape \(5,\), not float"),
        (lambda b: {"weights": torch.zeros(4)}, "weights has 4 rows, but dense_features has 5"),
        (lambda b: {"weights": torch.zeros(5, 1)}, r"weights has shape \(5, 1\), not \[C\]"),
        (
            lambda b: {"item": "film"},
            "a schema is given, which says what request_features, event_features and item say",
        ),
        (
            lambda b: {"num_ids": numbers_of(b.num_ids, "tags", lambda v: v.new_zeros(5)), "labels": torch.zeros(5)},
            r"row \d: 'tags' has \d ids, but num_ids tells of 0",
        ),
    ],
)
def test_other_impressions_of_several_histories_are_refused(
    change: Callable[[RequestBatch], dict[str, Any]], message: str
) -> None:
    batch = RequestBatch.from_requests(requests_of(THREE, [((3, 1, 0), 2), ((0, 2, 4), 3)], 0), THREE)
    request_ids, alone = torch.repeat_interleave(batch.num_candidates), batch.to_impressions()
    with pytest.raises(InputError, match=f"impressions: {message}"):
        regrouped(alone, request_ids, **({"schema": THREE} | change(alone)))


def row(request: int, **ids: list[int]) -> Row:
    own = {"user": [1], "tags": [2, 3], "history": [4, 5], "actions": [6, 7], "film": [8], "words": []}
    return Row(request, own | ids)


ROWS = [row(7), row(9, film=[1]), row(7, film=[2], words=[3, 4])]


def test_a_batch_of_torchrec_with_nothing_but_candidates() -> None:
    impressions = Batch(dense(ROWS), keyed(ROWS), torch.tensor([1, 0, 1], dtype=torch.int32))
    batch = RequestBatch.from_impressions(
        impressions.dense_features, impressions.sparse_features, [7, 9, 7], labels=impressions.labels
    ).validate()
    assert batch.sequences.keys() == batch.request_sparse.keys() == []
    assert batch.sequences.stride() == 2
    assert batch.candidate_sparse.keys() == KEYS
    assert batch.labels is not None
    assert batch.labels.tolist() == [[1], [1], [0]]
    for other in (batch.to_impressions(), batch.select(torch.tensor([1, 0])), batch.part(1, 3), batch.keep_latest(1)):
        assert other.sequences.keys() == []
        assert other.sequences.stride() == len(other)


def test_events_without_an_item_and_with_any_name() -> None:
    batch = group(ROWS, item=None).validate()
    assert batch.sequences.keys() == ["history", "actions"]
    assert lists(batch.to_impressions().validate().sequences)["history"] == [[4, 5]] * 3
    assert lists(batch.part(0, 1).sequences) == lists(batch.sequences)


def test_dense_features_alone() -> None:
    batch = RequestBatch.from_impressions(dense(ROWS), KeyedJaggedTensor.empty(), torch.tensor([7, 9, 7])).validate()
    assert batch.dense.tolist() == dense(ROWS)[[0, 2, 1]].tolist()


@pytest.mark.parametrize("labels", [torch.ones(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.bool)])
def test_labels_of_several_tasks_and_any_type(labels: Tensor) -> None:
    batch = group(ROWS, labels=labels)
    assert batch.labels is not None
    assert (batch.labels.dtype, batch.labels.shape) == (torch.float32, (3, 2))


def test_request_ids_of_any_integer_type() -> None:
    assert_same_requests(group(ROWS, request_ids=torch.tensor([7, 9, 7], dtype=torch.int32)), group(ROWS))
    assert_same_requests(group(ROWS, request_ids=[7, 9, 7]), group(ROWS))


@pytest.mark.parametrize("given_by", ["lengths", "offsets"])
def test_what_is_given_is_not_changed(given_by: str) -> None:
    features = keyed(ROWS)
    if given_by == "offsets":
        features = KeyedJaggedTensor(KEYS, features.values(), offsets=features.offsets(), stride=3)
    with torch.inference_mode():
        group(ROWS, sparse_features=features)
    assert not features.offsets().is_inference()
    assert not features.lengths().is_inference()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_impressions_on_a_gpu() -> None:
    cuda = torch.device("cuda")
    batch = group(ROWS, dense_features=dense(ROWS).to(cuda), sparse_features=keyed(ROWS).to(cuda))
    assert_same_requests(batch.to(torch.device("cpu")), group(ROWS))
    with pytest.raises(InputError, match="'history' has id 5 as entry 1 in row 0 but id 6 in row 2"):
        rows = [*ROWS[:2], row(7, history=[4, 6])]
        group(rows, dense_features=dense(rows).to(cuda), sparse_features=keyed(rows).to(cuda))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            {"user": [5]},
            "request 7: 'user' has id 1 as entry 0 in row 0 but id 5 in row 2: take it out of request_features, or "
            "give these rows request ids of their own",
        ),
        ({"tags": [3, 2]}, "request 7: 'tags' has id 2 as entry 0 in row 0 but id 3 in row 2"),
        ({"tags": []}, "request 7: 'tags' has 2 ids in row 0 but 0 ids in row 2"),
        (
            {"history": [4, 5, 6]},
            "request 7: 'history' has 2 ids in row 0 but 3 ids in row 2: give rows with another history another "
            "request id",
        ),
        ({"actions": [6, 8]}, "request 7: 'actions' has id 7 as entry 1 in row 0 but id 8 in row 2"),
    ],
)
def test_rows_of_a_request_that_disagree_are_refused(ids: dict[str, list[int]], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"impressions: {message}")):
        group([row(7), row(9), row(7, **ids)])


def test_weights_of_a_request_that_disagree_are_refused() -> None:
    rows = [row(9, tags=[]), row(7), row(7)]
    rows[2].weight["tags"] = [0.5, 0.125]
    with pytest.raises(InputError, match=r"request 7: 'tags' has weight 0.75 as entry 1 in row 1 but weight 0.125 in"):
        group(rows, sparse_features=keyed(rows, weighted=True))


@given(impressions(), st.data())
def test_the_refusal_names_rows_that_disagree(rows: list[Row], data: st.DataObject) -> None:
    changed = data.draw(st.integers(0, len(rows) - 1))
    key = data.draw(st.sampled_from(sorted(OWN | EVENTS)))
    rows[changed] = Row(rows[changed].request, rows[changed].ids | {key: [*rows[changed].ids[key], 3]})
    of_request = [place for place, other in enumerate(rows) if other.request == rows[changed].request]
    if len(of_request) == 1:
        group(rows)
        return
    with pytest.raises(InputError) as refused:
        group(rows)
    found = re.search(
        r"request (-?\d+): '(\w+)' has (\d+) ids in row (\d+) but (\d+) ids in row (\d+)", f"{refused.value}"
    )
    assert found
    request, name, *numbers = found.groups()
    first_length, first, length, other = map(int, numbers)
    assert (int(request), name) == (rows[changed].request, key)
    assert changed in (first, other)
    assert first == of_request[0]
    assert other in of_request
    assert [first_length, length] == [len(rows[first].ids[key]), len(rows[other].ids[key])]


def variable_stride() -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        ["user", "film"], torch.arange(5), lengths=torch.ones(5, dtype=torch.int64), stride_per_key_per_rank=[[3], [2]]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_features": torch.zeros(3)}, "dense_features is torch.float32 with shape (3,), not float [C, I]"),
        ({"dense_features": torch.zeros(3, 2, dtype=torch.int64)}, "dense_features is torch.int64 with shape (3, 2)"),
        ({"dense_features": torch.zeros(0, 2)}, "dense_features has 0 rows: a batch needs at least 1 request"),
        ({"dense_features": torch.zeros(4, 2)}, "sparse_features has 3 rows, but dense_features has 4"),
        ({"request_ids": [7, 9]}, "request_ids has 2 rows, but dense_features has 3"),
        ({"request_ids": [7.0, 9.0, 7.0]}, "request_ids is torch.float32 with shape (3,), not int64 [C]"),
        ({"request_ids": torch.zeros(3, 1).long()}, "request_ids is torch.int64 with shape (3, 1), not int64 [C]"),
        ({"request_ids": ["a", "b", "a"]}, "request_ids are not whole numbers of 64 bits"),
        ({"request_ids": [2**64, 1, 2]}, "request_ids are not whole numbers of 64 bits"),
        ({"labels": torch.zeros(4)}, "labels has 4 rows, but dense_features has 3"),
        ({"labels": torch.zeros(3, 1, 1)}, "labels has shape (3, 1, 1), not [C] or [C, T]"),
        ({"users": [1, 2]}, "users has 2 rows, but dense_features has 3"),
        (
            {"users": [1, 2, 3]},
            "request 7: users has 1 in row 0 but 3 in row 2: give each user's rows request ids of their own",
        ),
        ({"request_features": ["age"]}, "request_features: no 'age': sparse_features has ['user', 'tags', "),
        ({"event_features": ["clicks"]}, "event_features: no 'clicks'"),
        ({"item": "films"}, "item: no 'films'"),
        ({"event_features": ["history", "tags"]}, "'tags' is there 2 times, not once"),
        ({"event_features": ["history", "history"]}, "'history' is there 2 times"),
        ({"item": "user"}, "request_features, event_features, item: 'user' is there 2 times"),
        ({"item": "words"}, "row 0: 'words' has 0 ids, not 1"),
        ({"sparse_features": variable_stride()}, "sparse_features has strides [3, 2], one for each key, but dense"),
        (
            {"sparse_features": KeyedJaggedTensor(["a", "a"], torch.arange(6), lengths=torch.ones(6).long())},
            "sparse_features: 'a' is there 2 times",
        ),
        (
            {"sparse_features": KeyedJaggedTensor(["a"], torch.arange(6), lengths=torch.ones(3).long())},
            "sparse_features has 6 values, but needs 3",
        ),
        (
            {"sparse_features": KeyedJaggedTensor(["a"], torch.arange(4), lengths=torch.ones(4).long(), stride=3)},
            "sparse_features has 4 lengths, but needs 3",
        ),
    ],
)
def test_other_impressions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape("impressions: ") + ".*" + re.escape(message)):
        group(ROWS, **changes)


def test_an_event_feature_may_not_take_the_name_of_the_items() -> None:
    features = KeyedJaggedTensor(["candidate_item"], torch.arange(3), lengths=torch.ones(3).long())
    with pytest.raises(InputError, match="event_features: 'candidate_item' is what a batch calls the items"):
        RequestBatch.from_impressions(dense(ROWS), features, [7, 9, 8], event_features=["candidate_item"])


class Reads(nn.Module):
    def forward(self, batch: RequestBatch) -> Tensor:
        return batch.dense.new_ones(batch.stride(), 1) + batch.dense.sum(1, keepdim=True)


class Builds(nn.Module):
    """Builds a batch of its own while it is traced."""

    def __init__(self, batch: RequestBatch) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, request_dense: Tensor, candidate_dense: Tensor, num_candidates: Tensor) -> Tensor:
        batch = replace(
            self.batch,
            request_dense=request_dense,
            candidate_dense=candidate_dense,
            num_candidates=num_candidates,
        )
        return batch.dense.new_ones(batch.stride(), 1) + batch.dense.sum(1, keepdim=True)


def test_its_number_of_candidates_and_dense_inputs_are_traced() -> None:
    batch, other = (RequestBatch.from_requests(make_requests(sizes), SCHEMA) for sizes in ([(2, 3), (0, 1)], [(1, 6)]))
    expected = 1 + batch.dense.sum(1, keepdim=True)
    assert batch.dense.tolist() == torch.cat([batch.to_impressions().request_dense, batch.candidate_dense], 1).tolist()
    assert torch.equal(torch.fx.symbolic_trace(Reads())(batch), expected)
    traced = torch.fx.symbolic_trace(Builds(other))
    assert torch.equal(traced(batch.request_dense, batch.candidate_dense, batch.num_candidates), expected)


@given(shapes, st.booleans(), st.data(), st.integers(0, 2**20))
def test_a_part_has_all_requests_and_some_candidates(
    sizes: list[tuple[int, int]], weighted: bool, data: st.DataObject, seed: int
) -> None:
    batch = RequestBatch.from_requests(make_requests(sizes, seed), SCHEMA)
    if weighted:
        batch = with_weights(batch, lambda ids: ids + 0.25)
    start = data.draw(st.integers(0, batch.stride() - 1))
    stop = data.draw(st.integers(start + 1, batch.stride()))
    part = batch.part(start, stop)

    requests = torch.repeat_interleave(batch.num_candidates)[start:stop]
    assert part.stride() == stop - start
    assert part.num_candidates.tolist() == [int((requests == row).sum()) for row in range(len(batch))]
    assert torch.equal(part.dense, batch.dense[start:stop])
    assert part.candidate_dense.untyped_storage().data_ptr() == batch.candidate_dense.untyped_storage().data_ptr()
    assert part.labels is not None and batch.labels is not None
    assert torch.equal(part.labels, batch.labels[start:stop])
    assert part.candidate_sparse.stride() == stop - start
    assert lists(part.candidate_sparse) == {key: of[start:stop] for key, of in lists(batch.candidate_sparse).items()}
    items = [i for of_request in lists(batch.sequences)["candidate_item"] for i in of_request][start:stop]
    of_part = lists(part.sequences)
    assert [len(of_request) for of_request in of_part["candidate_item"]] == part.num_candidates.tolist()
    assert [i for of_request in of_part["candidate_item"] for i in of_request] == items
    assert {k: v for k, v in of_part.items() if k != "candidate_item"} == {
        k: v for k, v in lists(batch.sequences).items() if k != "candidate_item"
    }
    assert (part.request_sparse.values() is batch.request_sparse.values()) and part.users is batch.users
    for kjt in (part.request_sparse, part.candidate_sparse, part.sequences) if weighted else ():
        assert torch.equal(kjt.weights(), kjt.values() + 0.25)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_a_part_without_candidates_of_the_batch_is_refused(start: int, stop: int) -> None:
    with pytest.raises(InputError, match=f"candidates {start} to {stop} of 4"):
        RequestBatch.from_requests(make_requests([(2, 3), (0, 1)]), SCHEMA).part(start, stop)
