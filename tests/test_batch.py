import dataclasses
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.conftest import HASHED, NUM_ITEMS, SCHEMA, make_requests, spread_ids, with_weights
from torchrec_amort import InputError, RequestBatch, TableConfig, hash_ids

shapes = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=5)


def lists(kjt: KeyedJaggedTensor) -> dict[str, list[list[int]]]:
    return {key: [row.tolist() for row in kjt[key].values().split(kjt[key].lengths().tolist())] for key in kjt.keys()}


@given(shapes, st.integers(0, 2**20))
def test_holds_what_the_requests_say(sizes: list[tuple[int, int]], seed: int) -> None:
    requests = make_requests(sizes, seed)
    batch = RequestBatch.from_requests(requests, SCHEMA)
    assert len(batch) == len(requests)
    assert batch.num_candidates.tolist() == [m for _, m in sizes]
    assert lists(batch.request_sparse) == {
        "user_id": [[r["user_id"]] for r in requests],
        "interests": [r["interests"] for r in requests],
    }
    assert lists(batch.candidate_sparse) == {
        "movie_id": [[item] for r in requests for item in r["candidate_item"]],
        "genres": [genres for r in requests for genres in r["genres"]],
    }
    assert lists(batch.sequences) == {
        "history_item": [r["history_item"] for r in requests],
        "history_action": [r["history_action"] for r in requests],
        "history_age": [[(r["time"] - t).bit_length() for t in r["history_time"]] for r in requests],
        "candidate_item": [r["candidate_item"] for r in requests],
    }
    assert batch.request_dense.flatten().tolist() == pytest.approx([r["hour"] for r in requests])
    assert batch.candidate_dense.flatten().tolist() == pytest.approx([p for r in requests for p in r["price"]])
    assert batch.labels is not None
    assert batch.labels[:, 1].tolist() == [b for r in requests for b in r["bought"]]
    assert batch.users is not None
    assert batch.users.tolist() == [r["user"] for r in requests]


@given(shapes, st.integers(0, 2**20))
def test_impressions_are_the_requests_one_candidate_each(sizes: list[tuple[int, int]], seed: int) -> None:
    requests = make_requests(sizes, seed)
    per_candidate = ("candidate_item", "genres", "price", "liked", "bought")
    alone = [
        {**r, **{name: [r[name][c]] for name in per_candidate}}
        for r in requests
        for c in range(len(r["candidate_item"]))
    ]
    assert_same(
        RequestBatch.from_requests(requests, SCHEMA).to_impressions(),
        RequestBatch.from_requests(alone, SCHEMA),
    )


def assert_same(batch: RequestBatch, expected: RequestBatch) -> None:
    for field in dataclasses.fields(RequestBatch):
        value, other = getattr(batch, field.name), getattr(expected, field.name)
        if isinstance(value, KeyedJaggedTensor):
            assert value.stride() == other.stride(), field.name
            assert lists(value) == lists(other), field.name
        elif isinstance(value, dict):
            assert value.keys() == other.keys(), field.name
            for key, jagged in value.items():
                assert torch.equal(jagged.values(), other[key].values()), key
                assert torch.equal(jagged.lengths(), other[key].lengths()), key
        elif field.name == "layout":
            assert batch.request_lists.layout == expected.request_lists.layout
        elif value is None:
            assert other is None, field.name
        else:
            assert torch.equal(value, other), field.name


@given(shapes, st.data(), st.integers(0, 2**20))
def test_selected_requests_are_those_requests_alone(
    sizes: list[tuple[int, int]], data: st.DataObject, seed: int
) -> None:
    requests = make_requests(sizes, seed)
    rows = data.draw(st.lists(st.integers(0, len(requests) - 1), min_size=1))
    batch = RequestBatch.from_requests(requests, SCHEMA)
    expected = RequestBatch.from_requests([requests[row] for row in rows], SCHEMA)
    assert_same(batch.select(torch.tensor(rows)), expected)
    batch.labels = batch.users = None
    selected = batch.select(torch.tensor(rows))
    assert selected.labels is None
    assert selected.users is None


def test_impressions_of_a_batch_without_request_features() -> None:
    schema = dataclasses.replace(SCHEMA, features=tuple(f for f in SCHEMA.features if f.side != "request"))
    batch = RequestBatch.from_requests(make_requests([(2, 3), (0, 1)]), schema)
    impressions = batch.to_impressions().validate(schema.table_sizes)
    assert impressions.request_sparse.stride() == 4
    assert impressions.request_dense.shape == (4, 0)
    assert batch.select(torch.tensor([1])).validate(schema.table_sizes).request_sparse.stride() == 1


def test_keeps_the_latest_events_of_a_long_history() -> None:
    requests = make_requests([(6, 1), (2, 2), (0, 1)])
    batch = RequestBatch.from_requests(requests, SCHEMA, history_length=4)
    assert lists(batch.sequences)["history_item"] == [r["history_item"][-4:] for r in requests]
    assert lists(batch.sequences)["candidate_item"] == [r["candidate_item"] for r in requests]


def test_scoring_needs_no_labels_no_user_and_no_request_id() -> None:
    spare = ("liked", "bought", "user", "request_id")
    requests = [{k: v for k, v in r.items() if k not in spare} for r in make_requests([(2, 3)])]
    batch = RequestBatch.from_requests(requests, SCHEMA)
    assert batch.labels is None
    assert batch.users is None
    assert batch.to_impressions().labels is None


@given(shapes, st.data(), st.integers(0, 7), st.integers(0, 2**20))
def test_weights_go_where_their_ids_go(
    sizes: list[tuple[int, int]], data: st.DataObject, history_length: int, seed: int
) -> None:
    # An id tells its weight, so that whatever becomes of a batch can be checked.
    batch = with_weights(RequestBatch.from_requests(make_requests(sizes, seed), SCHEMA), lambda ids: ids + 0.25)
    wanted = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1))
    made = [batch.to(torch.device("cpu")), batch.keep_latest(history_length), batch.select(torch.tensor(wanted))]
    for other in (*made, *[part.to_impressions() for part in made]):
        for kjt in (other.request_sparse, other.candidate_sparse, other.sequences):
            assert torch.equal(kjt.weights(), kjt.values() + 0.25)


def test_what_is_kept_of_single_keys_moves_too() -> None:
    batch = RequestBatch.from_requests(make_requests([(2, 3), (0, 1)]), SCHEMA)
    batch.candidate_sparse.to_dict()
    moved = batch.to(torch.device("meta")).candidate_sparse
    assert {of_key.values().device.type for of_key in moved.to_dict().values()} == {"meta"}


@pytest.mark.parametrize("given_by", ["lengths", "offsets"])
def test_no_method_leaves_tensors_of_inference_mode_in_the_batch(given_by: str) -> None:
    batch = RequestBatch.from_requests(make_requests([(2, 3), (0, 1)]), SCHEMA)
    if given_by == "offsets":
        for name in ("request_sparse", "candidate_sparse", "sequences"):
            of = getattr(batch, name)
            setattr(batch, name, KeyedJaggedTensor(of.keys(), of.values(), offsets=of.offsets(), stride=of.stride()))
    expected = RequestBatch.from_requests(make_requests([(2, 3), (0, 1)]), SCHEMA)
    with torch.inference_mode():
        batch.validate(SCHEMA.table_sizes)
        made = [batch.select(torch.tensor([1])), batch.to_impressions(), batch.keep_latest(1), batch.shallow_copy()]
        for other in [batch.to(torch.device("cpu")), *made]:
            for kjt in (other.request_sparse, other.candidate_sparse, other.sequences):
                kjt.sync()
                kjt.to_dict()
                kjt.offsets()
    for kjt in (batch.request_sparse, batch.candidate_sparse, batch.sequences):
        kept = [kjt.offsets(), kjt.lengths(), *(tensor for of in kjt.to_dict().values() for tensor in (of.offsets(),))]
        assert not any(tensor.is_inference() for tensor in kept)
    assert_same(batch, expected)


def test_moves_as_a_whole() -> None:
    batch = RequestBatch.from_requests(make_requests([(2, 3), (0, 1)]), SCHEMA)
    assert_same(batch.to(torch.device("cpu"), non_blocking=True), batch)
    moved = batch.to(torch.device("meta"))
    values = [getattr(moved, field.name) for field in dataclasses.fields(moved)]
    devices = {value.device for value in values if hasattr(value, "device")}
    assert {str(d() if callable(d) else d) for d in devices} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pins_and_moves_to_a_gpu() -> None:
    batch = RequestBatch.from_requests(make_requests([(2, 3), (0, 1)]), SCHEMA)
    moved = batch.pin_memory().to(torch.device("cuda"), non_blocking=True)
    moved.record_stream(torch.cuda.current_stream())
    assert_same(moved.to(torch.device("cpu")), batch)


def hashed(ids: list[int], feature: str) -> list[int]:
    return hash_ids(np.array(ids, dtype=np.int64), HASHED.table_sizes[feature]).tolist()


@given(shapes, st.integers(0, 2**20))
def test_ids_of_any_size_are_hashed_into_their_tables(sizes: list[tuple[int, int]], seed: int) -> None:
    requests = spread_ids(make_requests(sizes, seed))
    batch = RequestBatch.from_requests(requests, HASHED)
    assert lists(batch.request_sparse) == {
        "user_id": [hashed([r["user_id"]], "user_id") for r in requests],
        "interests": [hashed(r["interests"], "interests") for r in requests],
    }
    assert lists(batch.candidate_sparse) == {
        "movie_id": [hashed([item], "movie_id") for r in requests for item in r["candidate_item"]],
        "genres": [hashed(genres, "genres") for r in requests for genres in r["genres"]],
    }
    assert lists(batch.sequences) == {
        "history_item": [hashed(r["history_item"], "history_item") for r in requests],
        "history_action": [hashed(r["history_action"], "history_action") for r in requests],
        "history_age": [[(r["time"] - t).bit_length() for t in r["history_time"]] for r in requests],
        "candidate_item": [hashed(r["candidate_item"], "candidate_item") for r in requests],
    }
    batch.validate(HASHED.table_sizes)


@given(shapes, st.integers(0, 2**20))
def test_ids_are_hashed_alike_at_once_or_one_by_one_from_requests_or_tables(
    sizes: list[tuple[int, int]], seed: int
) -> None:
    requests = spread_ids(make_requests(sizes, seed))
    batch = RequestBatch.from_requests(requests, HASHED)
    table = pa.Table.from_pylist(requests, HASHED.arrow_schema())
    assert_same(RequestBatch.from_arrow(table, HASHED), batch)
    pieces = [RequestBatch.from_arrow(table.slice(row, 1), HASHED) for row in range(len(requests))]
    for name in ("request_sparse", "candidate_sparse", "sequences"):
        joined = {
            key: [row for piece in pieces for row in lists(getattr(piece, name))[key]]
            for key in getattr(batch, name).keys()
        }
        assert joined == lists(getattr(batch, name))


def test_neighbours_beyond_the_integers_of_a_double_are_told_apart() -> None:
    schema = SCHEMA.with_tables({"user_id": TableConfig(rows=10**9, vocabulary="hash")})
    batch = RequestBatch.from_requests([request(user_id=2**53 + i) for i in range(4)], schema)
    assert len(set(batch.request_sparse.values()[:4].tolist())) == 4


@given(st.lists(st.one_of(st.integers(-2, 45), st.integers(-(2**63), 2**63 - 1)), max_size=8))
def test_ids_outside_a_table_become_the_unknown_one(ids: list[int]) -> None:
    schema = SCHEMA.with_tables({"item": TableConfig(rows=NUM_ITEMS, vocabulary="unknown")})
    times = [1_000] * len(ids)
    batch = RequestBatch.from_requests(
        [request(history_item=ids, history_action=[1] * len(ids), history_time=times)], schema
    )
    assert lists(batch.sequences)["history_item"] == [[i if 0 <= i < NUM_ITEMS else 0 for i in ids]]


def request(**changes: Any) -> dict[str, Any]:
    return {**make_requests([(3, 2)])[0], **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"candidate_item": [], "genres": [], "price": [], "liked": [], "bought": []},
            "num_candidates is 0, not 1",
        ),
        ({"genres": [[1]]}, "genres lists 1 entries but candidate_item lists 2"),
        ({"history_action": [1, 2]}, "history_action lists 2 entries but history_item lists 3"),
        (
            {"candidate_item": [1, NUM_ITEMS]},
            r"candidate 1: candidate_sparse\['movie_id'\] has id 40, not 0 to 39.* vocabulary 'unknown' or 'hash'",
        ),
        ({"user_id": 20}, r"request_sparse\['user_id'\] has id 20, not 0 to 19"),
        ({"history_item": [1, 2, -1]}, r"sequences\['history_item'\] has id -1, not 0 to 39"),
        ({"genres": [[0], [5]]}, r"candidate 1: candidate_sparse\['genres'\] has id 5, not 0 to 4"),
        ({"history_time": [1, 2, 1_000_001]}, "event at 1000001, after the request's time 1000000"),
        ({"price": [0.5, float("nan")]}, "candidate 1: candidate_dense column 0 is nan"),
        ({"liked": [0.0, float("inf")]}, "candidate 1: labels column 0 is inf"),
        ({"liked": [0.0, 2.0]}, "candidate 1: labels column 0 is 2.0, not a number from 0 to 1"),
        ({"hour": float("inf")}, "request_dense column 0 is inf"),
        ({"user_id": "seven"}, "user_id is string, not a number: write integers"),
        ({"user_id": 3.5}, "user_id is 3.5, which int64 does not hold exactly: write integers"),
        ({"history_item": None}, "history_item is null"),
        ({"history_item": [1, None, 2]}, "history_item has a null"),
        ({"genres": [[1], [None]]}, "genres has a null"),
    ],
)
def test_bad_requests_are_refused_with_field_request_and_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"request 1.*{message}"):
        RequestBatch.from_requests([request(), request(**changes)], SCHEMA)


def test_a_missing_column_is_named() -> None:
    incomplete = {k: v for k, v in request().items() if k != "genres"}
    with pytest.raises(InputError, match="request 1: column 'genres' is missing"):
        RequestBatch.from_requests([request(), incomplete], SCHEMA)
    with pytest.raises(InputError, match="column 'genres' is missing"):
        RequestBatch.from_requests([incomplete], SCHEMA)
    with pytest.raises(InputError, match="column 'bought' is missing"):
        RequestBatch.from_requests([{k: v for k, v in request().items() if k != "bought"}], SCHEMA)
    with pytest.raises(InputError, match="an empty list"):
        RequestBatch.from_requests([], SCHEMA)


def test_a_table_of_other_integers_is_taken_but_no_fraction() -> None:
    requests = make_requests([(2, 1)])
    table = pa.Table.from_pylist(requests, SCHEMA.arrow_schema())
    place = table.column_names.index("history_item")
    small = table.set_column(place, "history_item", table["history_item"].cast(pa.list_(pa.int16())))
    assert_same(RequestBatch.from_arrow(small, SCHEMA), RequestBatch.from_arrow(table, SCHEMA))
    fractions = table.set_column(place, "history_item", pa.array([[0.5, 1.0]]))
    with pytest.raises(InputError, match="request 0: history_item has an entry that is 0.5, which int64 does not hold"):
        RequestBatch.from_arrow(fractions, SCHEMA)


def broken(field: str, value: Any) -> RequestBatch:
    batch = RequestBatch.from_requests(make_requests([(2, 3), (1, 1)]), SCHEMA)
    return dataclasses.replace(batch, **{field: value})


def kjt(values: list[int], lengths: list[int], keys: list[str], stride: int, weights: Any = None) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys, torch.tensor(values), lengths=torch.tensor(lengths), stride=stride, weights=weights)


NAN = torch.tensor([1.0, 1.0, torch.nan])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_candidates", torch.tensor([3, 0]), "request 1: num_candidates is 0"),
        ("num_candidates", torch.tensor([3.0, 1.0]), "num_candidates is torch.float32"),
        ("num_candidates", torch.tensor([2, 1]), "candidate_dense has 4 rows.*3 candidates"),
        ("request_dense", torch.zeros(3, 1), "request_dense has 3 rows.*2 requests"),
        ("labels", torch.zeros(5, 2), "labels has 5 rows.*4 candidates"),
        ("users", torch.zeros(1), "users has 1 rows"),
        ("request_sparse", kjt([1, 2, 3], [1, 1, 1], ["user_id"], 3), "request_sparse has 3 rows"),
        (
            "request_sparse",
            kjt([1, 2], [1, 2], ["user_id"], 2),
            "lengths of request_sparse add up to 3, but it has 2",
        ),
        ("request_sparse", kjt([1, 2], [3, -1], ["user_id"], 2), "request 1: request_sparse.*length -1"),
        (
            "request_sparse",
            kjt([1, 2], [1, 1, 0], ["user_id"], 2),
            "request_sparse has 3 lengths for 1 keys of 2",
        ),
        (
            "sequences",
            kjt([1, 1, 1, 1, 1], [0, 1, 2, 2], ["history_item", "candidate_item"], 2),
            r"request 0: sequences\['candidate_item'\] has 2 entries, but num_candidates tells of 3",
        ),
        (
            "sequences",
            kjt([1, 1, 1, 1], [1, 0, 1, 2], ["clicks", "history_item"], 2),
            r"request 1: sequences\['clicks'\] has 0 entries, but sequences\['history_item'\] tells of 2",
        ),
        (
            "sequences",
            kjt([1, 1, 1, -1], [1, 0, 1, 2], ["clicks", "likes"], 2),
            r"request 1: sequences\['likes'\] has id -1",
        ),
        (
            "request_sparse",
            kjt([1, 2, 3], [1, 0, 0, 2], ["user_id", "interests"], 2, weights=NAN),
            r"request 1: request_sparse\['interests'\] has weight nan, not a finite number",
        ),
        (
            "candidate_sparse",
            kjt([1, 2, 3], [0, 0, 2, 1], ["genres"], 4, weights=NAN),
            r"request 1, candidate 0: candidate_sparse\['genres'\] has weight nan",
        ),
        (
            "candidate_sparse",
            kjt([1, 2, 3], [0, 0, 2, 1], ["genres"], 4, weights=torch.ones(2)),
            r"weights of candidate_sparse are torch.float32 with shape \(2,\), but it has 3 values",
        ),
        (
            "sequences",
            kjt(
                [1, 2, 3], [0, 0, 2, 1], ["history_item", "candidate_item"], 2, weights=torch.ones(3, dtype=torch.int64)
            ),
            "weights of sequences are torch.int64",
        ),
    ],
)
def test_malformed_batches_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        broken(field, value).validate(SCHEMA.table_sizes)


def test_histories_of_other_names_may_have_any_lengths() -> None:
    sequences = kjt([1, 1, 1, 1], [1, 0, 1, 2], ["clicks", "likes"], 2)
    kept = broken("sequences", sequences).validate().keep_latest(1)
    assert lists(kept.sequences) == {"clicks": [[1], []], "likes": [[1], [1]]}


def test_an_error_names_the_source_and_counts_rows_from_its_first() -> None:
    table = pa.Table.from_pylist([request(), request(user_id=99)], SCHEMA.arrow_schema())
    with pytest.raises(InputError, match=re.escape("part-0.parquet: request 101: request_sparse['user_id']")):
        RequestBatch.from_arrow(table, SCHEMA, source="part-0.parquet", first_row=100)


def test_ages_fall_into_octaves_without_a_limit() -> None:
    ages = [0, 1, 2, 3, 4, 2**31 - 1, 2**31, 2**50]
    requests = [
        request(time=2**32, history_item=[1] * 8, history_action=[1] * 8, history_time=[2**32 - a for a in ages])
    ]
    batch = RequestBatch.from_requests(requests, SCHEMA)
    assert lists(batch.sequences)["history_age"] == [[a.bit_length() for a in ages]]
    assert np.all(np.array(lists(batch.sequences)["history_age"]) < 64)


@given(shapes, st.integers(0, 7))
def test_keeping_the_latest_events_is_as_if_there_had_been_no_others(
    sizes: list[tuple[int, int]], history_length: int
) -> None:
    requests = make_requests(sizes)
    batch = RequestBatch.from_requests(requests, SCHEMA)
    for request in requests:
        for column in ("history_item", "history_action", "history_time"):
            request[column] = request[column][max(0, len(request[column]) - history_length) :]
    expected = RequestBatch.from_requests(requests, SCHEMA)
    kept = batch.keep_latest(history_length)
    assert kept.sequences.keys() == expected.sequences.keys()
    assert torch.equal(kept.sequences.lengths(), expected.sequences.lengths())
    assert torch.equal(kept.sequences.values(), expected.sequences.values())


def test_a_history_of_fewer_than_no_events_is_refused() -> None:
    with pytest.raises(InputError, match="history_length is -1"):
        RequestBatch.from_requests(make_requests([(2, 1)]), SCHEMA).keep_latest(-1)
