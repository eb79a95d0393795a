import json
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import schemas as kinds
from tests.conftest import SCHEMA, make_table
from torchrec_amort.data import impressions, kuairand, log, mind, movielens, writer
from torchrec_amort.data.counts import read_counts, sizes
from torchrec_amort.data.impressions import to_impressions, to_requests
from torchrec_amort.data.log import SPLITS, candidate_columns, impression_schema
from torchrec_amort.data.sample import random_requests
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError
from torchrec_amort.schema import AGE_BUCKETS, Feature, RequestSchema

Row = dict[str, Any]


def impressions_of(requests: pa.Table, schema: RequestSchema = SCHEMA) -> list[Row]:
    """A row for each candidate, in plain Python."""
    of_candidates = candidate_columns(schema)
    return [
        {name: value[place] if name in of_candidates else value for name, value in request.items()}
        for request in requests.to_pylist()
        for place in range(len(request[schema.candidate_column]))
    ]


def in_request_order(rows: list[Row]) -> list[Row]:
    """The rows of each request together, requests in the order of their first rows."""
    requests: dict[int, list[Row]] = {}
    for row in rows:
        requests.setdefault(row["request_id"], []).append(row)
    return [row for request in requests.values() for row in request]


def write_log(path: Path, rows: list[Row], schema: RequestSchema = SCHEMA, **columns: pa.Array) -> Path:
    """A log with other columns in the place of some of the schema's, or besides them."""
    table = pa.Table.from_pylist(rows, impression_schema(schema))
    for name, column in columns.items():
        place = table.column_names.index(name) if name in table.column_names else table.num_columns
        table = table.drop_columns([name] if name in table.column_names else []).add_column(place, name, [column])
    pq.write_table(table, path, row_group_size=7)
    return path


def rows_of(folder: Path) -> list[Row]:
    """The rows of a split's files."""
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def column(rows: list[Row], name: str, change: dict[int, Any], kind: pa.DataType) -> pa.Array:
    """A column of the rows, with other values in some of them."""
    return pa.array([change.get(place, row[name]) for place, row in enumerate(rows)], kind)


ROWS = impressions_of(make_table(12))


@pytest.fixture(autouse=True)
def small_steps() -> Iterator[None]:
    """Batches and buckets of a few rows, so that small logs take many."""
    with (
        patch.object(log, "ROWS_PER_BATCH", 3),
        patch.object(impressions, "ROWS_PER_BATCH", 4),
        patch.object(impressions, "ROWS_PER_BUCKET", 5),
    ):
        yield


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made" / "films"


@st.composite
def schemas(draw: st.DrawFn) -> RequestSchema:
    """Any features on each side, with or without a history."""
    size = st.integers(1, 9)
    features = [Feature("candidate_item", "candidate", "item", table_size=5)]
    for side, prefix in (("request", "r"), ("candidate", "c")):
        for place, kind in enumerate(draw(st.lists(st.sampled_from(["id", "ids", "dense"]), max_size=3))):
            table_size = None if kind == "dense" else draw(size)
            features.append(Feature(f"{prefix}{place}", side, kind, table_size=table_size))  # type: ignore[arg-type]
    if draw(st.booleans()):
        features.append(Feature("shown_id", "candidate", "id", table_size=5, column="candidate_item"))
    if draw(st.booleans()):
        features.append(Feature("history_item", "event", "item", table_size=5))
        if draw(st.booleans()):
            features.append(Feature("action", "event", "id", table_size=draw(size)))
        if draw(st.booleans()):
            features.append(Feature("age", "event", "age", table_size=AGE_BUCKETS, column="history_time"))
    features += [Feature(f"label{place}", "candidate", "label") for place in range(draw(st.integers(1, 2)))]
    return RequestSchema("any", tuple(draw(st.permutations(features))))


@st.composite
def requests(draw: st.DrawFn, schema: RequestSchema) -> pa.Table:
    """Requests of 0 to 4 events and 1 to 9 candidates."""
    shapes = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=12))
    seed = draw(st.integers(0, 2**32 - 1))
    table = random_requests(schema, [s[0] for s in shapes], [s[1] for s in shapes], seed=seed)
    random = np.random.default_rng(seed)
    labels = {name: [random.random(s[1], dtype=np.float32) for s in shapes] for name in schema.labels}
    columns = {name: pa.array(values, pa.list_(pa.float32())) for name, values in labels.items()}
    ids = random.permutation(len(shapes)) + draw(st.integers(-(2**40), 2**40))
    columns |= {name: table[name] for name in table.column_names} | {"request_id": pa.array(ids)}
    arrow_schema = schema.arrow_schema()
    return pa.table({name: columns[name] for name in arrow_schema.names}).cast(arrow_schema)


@given(st.data())
@settings(max_examples=30)
def test_requests_to_impressions_and_back_is_the_same_folder(data: st.DataObject) -> None:
    schema = data.draw(schemas())
    tables = {split: data.draw(requests(schema)) for split in data.draw(st.sampled_from([SPLITS[:1], SPLITS[::2]]))}
    first_id = 0
    for split, table in tables.items():
        ids = pa.array(np.arange(first_id, first_id + table.num_rows))
        tables[split] = table.set_column(0, schema.arrow_schema().field("request_id"), ids)
        first_id += table.num_rows
    with tempfile.TemporaryDirectory() as folder:
        given_, log_, back = (Path(folder) / name for name in ("given", "log", "back"))
        counts = write_requests(given_, schema, {split: [table] for split, table in tables.items()})
        there = to_impressions(given_, log_)
        for split, table in tables.items():
            assert rows_of(log_ / split) == impressions_of(table, schema)
        again = to_requests({split: log_ / split for split in tables}, schema, back)
        for split, table in tables.items():
            assert pq.read_table(back / split).equals(table)
        assert RequestSchema.load(back) == RequestSchema.load(log_) == schema
        assert read_counts(back) == read_counts(given_)
        assert sizes(read_counts(back)) == counts
        for name in ("columns", "arrow_bytes", "splits", "candidates_per_request", "users"):
            assert there[name] == again[name]


@given(kinds.schemas(), kinds.shapes(), st.randoms(use_true_random=False), st.integers(0, 2**20))
@settings(max_examples=6)
def test_features_of_every_kind_go_to_impressions_and_back(
    schema: RequestSchema, shapes: kinds.Shapes, random: Random, seed: int
) -> None:
    table = pa.Table.from_pylist(kinds.make_requests(schema, shapes, seed), schema.arrow_schema())
    with tempfile.TemporaryDirectory() as folder:
        given_, log_, back = (Path(folder) / name for name in ("given", "log", "back"))
        write_requests(given_, schema, {"train": [table]})
        to_impressions(given_, log_)
        written = pq.read_table(given_ / "train")
        rows = rows_of(log_ / "train")
        assert rows == impressions_of(written, schema)
        random.shuffle(rows)
        shuffled = write_log(Path(folder) / "shuffled.parquet", rows, schema)
        to_requests({"train": shuffled}, schema, back)
        assert impressions_of(pq.read_table(back / "train"), schema) == in_request_order(rows)
        assert RequestSchema.load(back) == schema


@given(st.data())
@settings(max_examples=30)
def test_a_log_in_any_order_comes_back_row_by_row_in_request_order(data: st.DataObject) -> None:
    schema = data.draw(schemas())
    rows = data.draw(st.permutations(impressions_of(data.draw(requests(schema)), schema)))
    cut = data.draw(st.integers(0, len(rows)))
    buckets = data.draw(st.sampled_from([1, 3, 1000]))
    with tempfile.TemporaryDirectory() as folder, patch.object(impressions, "MOST_BUCKETS", buckets):
        parts = Path(folder) / "log"
        parts.mkdir()
        for name, part in {"a": rows[:cut], "b": rows[cut:]}.items():
            write_log(parts / f"{name}.parquet", part, schema)
        to_requests({"train": parts}, schema, Path(folder) / "requests")
        to_impressions(Path(folder) / "requests", Path(folder) / "back")
        assert rows_of(Path(folder) / "back" / "train") == in_request_order(rows)
        # Row by row the same, so a second time nothing moves, to the last byte.
        to_requests({"train": Path(folder) / "back" / "train"}, schema, Path(folder) / "again")
        name = "train/part-00000.parquet"
        assert (Path(folder) / "again" / name).read_bytes() == (Path(folder) / "requests" / name).read_bytes()


def test_one_log_is_split_by_time_whole_requests(tmp_path: Path, out: Path) -> None:
    # Request 0 is the latest; of the log's 20 rows the requests have 2 each.
    rows = [{**ROWS[0], "request_id": i, "time": 2_000_000 - i, "user": i % 3} for i in [*range(10), *range(10)]]
    report = to_requests(write_log(tmp_path / "log.parquet", rows), SCHEMA, out)
    ids = {split: [row["request_id"] for row in rows_of(out / split)] for split in SPLITS}
    assert ids == {"train": [2, 3, 4, 5, 6, 7, 8, 9], "validation": [1], "test": [0]}
    assert report["splits"]["train"] == {"requests": 8, "candidates": 16, "users": 3}


def test_a_named_key_tells_requests_that_are_numbered_by_their_first_rows(tmp_path: Path, out: Path) -> None:
    rows = [{**row, "time": 5_000_000 + row["request_id"] % 5} for row in ROWS[::-1]]
    seen: dict[tuple[int, int], int] = {}
    expected = [{**row, "request_id": seen.setdefault((row["user"], row["time"]), len(seen))} for row in rows]
    session = pa.array([f"{row['user']}/{row['time']}" for row in rows]).dictionary_encode()
    rows = [{**row, **{n: rows[0][n] for n in ("user_id", "interests", "hour")}} for row in rows]
    expected = [{**row, **{n: rows[0][n] for n in ("user_id", "interests", "hour")}} for row in expected]
    history = {name: rows[0][name] for name in ("history_item", "history_action", "history_time")}
    rows, expected = [{**row, **history} for row in rows], [{**row, **history} for row in expected]
    path = write_log(tmp_path / "log.parquet", rows, session=session)
    for key in (["user", "time"], ["session"], ["session", "user"]):
        to_requests(
            {"test": path}, SCHEMA, out, request_key=key, drop=["request_id", "session"], overwrite=out.exists()
        )
        to_impressions(out, tmp_path / "back", overwrite=True)
        assert rows_of(tmp_path / "back" / "test") == in_request_order(expected)


def test_the_report_tells_what_was_stored_once(tmp_path: Path, out: Path) -> None:
    path = write_log(tmp_path / "log.parquet", ROWS, shop=pa.array(["a"] * len(ROWS)))
    report = to_requests({"train": path}, SCHEMA, out, drop=["shop"])
    assert json.loads((out / "migration.json").read_text()) == report
    table = make_table(12)
    sizes = [len(items) for items in table["candidate_item"].to_pylist()]
    assert (report["requests"], report["impressions"]) == (12, sum(sizes))
    assert report["users"] == len(set(table["user"].to_pylist()))
    assert report["candidates_per_request"] == {
        "mean": np.mean(sizes),
        "median": np.median(sizes),
        "max": max(sizes),
    }
    assert {name for name, c in report["columns"].items() if not c["deduplicated"]} == set(candidate_columns(SCHEMA))
    events = [len(items) for items in table["history_item"].to_pylist()]
    history = report["columns"]["history_item"]
    assert history["values"] == {"impressions": int(np.dot(sizes, events)), "requests": sum(events)}
    # 8 bytes of each id, 4 of the end of each list.
    assert history["arrow_bytes"] == {
        "impressions": 8 * int(np.dot(sizes, events)) + 4 * sum(sizes),
        "requests": 8 * sum(events) + 4 * 12,
    }
    assert report["arrow_bytes"]["requests"] == sum(c["arrow_bytes"]["requests"] for c in report["columns"].values())
    assert report["file_bytes"]["impressions"] == path.stat().st_size
    assert report["file_bytes"]["requests"] == (out / "train" / "part-00000.parquet").stat().st_size
    of_columns = sum(c["file_bytes"]["impressions"] for c in report["columns"].values())
    assert 0 < report["dropped_file_bytes"] < path.stat().st_size - of_columns
    assert (report["dropped"], report["log"]) == (["shop"], {"train": [str(path)]})


def test_other_types_are_taken_if_each_value_is_the_same(tmp_path: Path, out: Path) -> None:
    events = [[1, 2] for _ in ROWS]
    rows = [{**row, "history_item": [1, 2], "history_action": [1, 2]} for row in ROWS]
    rows = [{**row, "history_time": [5, 6], "price": 0.5, "liked": 1.0, "hour": 3.0} for row in rows]
    path = write_log(
        tmp_path / "log.parquet",
        rows,
        request_id=column(rows, "request_id", {}, pa.uint64()),
        user_id=column(rows, "user_id", {}, pa.float64()),
        candidate_item=column(rows, "candidate_item", {}, pa.int8()).dictionary_encode(),
        price=pa.array(np.full(len(rows), 0.5, np.float16)),
        liked=pa.array([True] * len(rows)),
        hour=pa.array([3] * len(rows), pa.int16()),
        history_item=pa.array(events, pa.large_list(pa.uint32())),
        history_action=pa.array(events, pa.list_(pa.float64(), 2)),
        history_time=pa.array([[5, 6] for _ in rows], pa.list_(pa.int32())),
    )
    to_requests({"train": path}, SCHEMA, out)
    to_impressions(out, tmp_path / "back")
    assert rows_of(tmp_path / "back" / "train") == rows


N = len(ROWS)
MISFITS = [
    ("user", pa.array([2**63 + 5] * N, pa.uint64()), f"row 0: user is {2**63 + 5}, which int64 does not hold exactly"),
    ("user_id", column(ROWS, "user_id", {4: 1.5}, pa.float64()), "row 4: user_id is 1.5, which int64 does not"),
    ("user_id", column(ROWS, "user_id", {4: 2.0**63}, pa.float64()), r"row 4: user_id is 9.223\S*, which int64 does"),
    ("user_id", pa.array(["7"] * N), "row 0: user_id is string, not a number"),
    ("user_id", pa.array([True] * N), "row 0: user_id is bool, not a number"),
    ("user", pa.array([0] * N, pa.timestamp("s")), r"row 0: user is timestamp\[.*\], not a number"),
    ("time", pa.array([0] * N, pa.duration("s")), r"row 0: time is duration\[s\], not a time"),
    ("time", pa.array([1_600_000_000_000] * N), "row 0: time is 1600000000000, after .* divide it by 1,000"),
    (
        "time",
        column(ROWS, "time", {i: 10**12 + (i == 4) for i in range(N)}, pa.timestamp("ms")),
        "row 4: time is 2001-09-09T01:46:40.001, not a whole second: .* name .* in rounded, to cut it",
    ),
    ("candidate_item", column(ROWS, "candidate_item", {5: None}, pa.int64()), "row 5: candidate_item is null"),
    ("liked", column(ROWS, "liked", {2: None}, pa.float32()), "row 2: liked is null"),
    ("liked", column(ROWS, "liked", {2: np.nan}, pa.float32()), "row 2: liked is nan, not a finite number"),
    ("hour", column(ROWS, "hour", {3: np.inf}, pa.float64()), "row 3: hour is inf, not a finite number"),
    ("price", pa.array([0.1] * N, pa.float64()), "row 0: price is 0.1, which float32 does not .* name .* in rounded"),
    ("price", pa.array([2**53 + 1] * N, pa.int64()), f"row 0: price is {2**53 + 1}, which float32 does not hold"),
    ("genres", pa.array([1] * N), "row 0: genres is int64, not a list"),
    ("genres", column(ROWS, "genres", {6: [1, None]}, pa.list_(pa.int64())), "row 6: genres has a null"),
    ("interests", column(ROWS, "interests", {6: None}, pa.list_(pa.int64())), "row 6: interests is null"),
    (
        "history_item",
        column(ROWS, "history_item", {8: [1, 2.5]}, pa.list_(pa.float64())),
        "row 8: history_item has an entry that is 2.5, which int64 does not hold exactly",
    ),
]  # fmt: skip


@pytest.mark.parametrize("name, values, message", MISFITS)
def test_a_value_that_its_type_does_not_hold_is_refused(
    tmp_path: Path, out: Path, name: str, values: pa.Array, message: str
) -> None:
    path = write_log(tmp_path / "log.parquet", ROWS, **{name: values})
    with pytest.raises(InputError, match=rf"log\.parquet: {message}"):
        to_requests({"train": path}, SCHEMA, out)
    assert list(out.parent.iterdir()) == []


def test_floats_are_rounded_if_that_is_asked_for(tmp_path: Path, out: Path) -> None:
    prices = np.random.default_rng(0).random(N)
    path = write_log(tmp_path / "log.parquet", ROWS, price=pa.array(prices))
    assert to_requests({"train": path}, SCHEMA, out, rounded=["price"])["rounded"] == ["price"]
    to_impressions(out, tmp_path / "back")
    expected = [{**row, "price": float(np.float32(p))} for row, p in zip(ROWS, prices, strict=True)]
    assert rows_of(tmp_path / "back" / "train") == expected
    write_log(path, ROWS, price=pa.array([1e39] * N))
    with pytest.raises(InputError, match=r"row 0: price is 1e\+39, which float32 does not hold exactly: mend the log$"):
        to_requests({"train": path}, SCHEMA, out, rounded=["price"], overwrite=True)
    with pytest.raises(InputError, match=r"rounded: 'user_id' is no column of floats or times; .*'price'"):
        to_requests({"train": path}, SCHEMA, out, rounded=["user_id"], overwrite=True)


def changed(change: dict[int, dict[str, Any]]) -> list[Row]:
    return [{**row, **change.get(place, {})} for place, row in enumerate(ROWS)]


LONGEST = [place for place, row in enumerate(ROWS) if len(row["history_item"]) > 5][:2]


def test_rows_of_one_request_that_disagree_are_named_and_counted(tmp_path: Path, out: Path) -> None:
    assert ROWS[LONGEST[0]]["request_id"] == ROWS[LONGEST[1]]["request_id"]
    before, row = LONGEST
    request, items = ROWS[row]["request_id"], ROWS[row]["history_item"]
    other = [*items[:3], (items[3] + 1) % 40, *items[4:]]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"history_item": other}, f"history_item has {items[3]} at entry 3 in the one and {other[3]} in the other"),
        ({"history_item": items[:-1]}, f"history_item lists {len(items)} entries in the one and {len(items) - 1} in"),
        ({"user_id": 77}, f"user_id is {ROWS[row]['user_id']} in the one and 77 in the other"),
        ({"interests": [6, 6, 6, 6]}, r"interests lists \d entries in the one and 4 in the other"),
    ]
    for change, message in cases:
        path = write_log(tmp_path / "log.parquet", changed({row: change}))
        where = (
            rf"log\.parquet: row {before} and \S*log\.parquet: row {row} are of one request \(request_id {request}\)"
        )
        with pytest.raises(InputError, match=rf"{where}, but {message}.* rows of 1 of 12 requests: mend the log"):
            to_requests({"train": path}, SCHEMA, out)
        assert list(out.parent.iterdir()) == []


OF_KINDS = RequestSchema(
    "films",
    (
        Feature("film", "candidate", "id", 30),
        Feature("country", "request", "id", 11, vocabulary="hash", text=True, nullable=True),
        Feature("likes", "request", "ids", 9, nullable=True),
        Feature("taste", "request", "vector", size=2),
        Feature("clicks", "event", "ids", 9, vocabulary="hash", text=True, nullable=True, history="clicks"),
        Feature("buys", "event", "vector", size=2, history="buys"),
        Feature("liked", "candidate", "label"),
    ),
)
OF_REQUEST: Row = {
    "request_id": 3,
    "user": 1,
    "time": 100,
    "country": "DK",
    "likes": [1, None],
    "taste": [0.5, 1.0],
    "clicks": [["a"], [], ["b", None]],
    "buys": [[0.0, 0.5], [0.5, 0.5]],
}


@pytest.mark.parametrize(
    ("column", "other", "told"),
    [
        ("country", None, "is DK in the one and None"),
        ("country", "SE", "is DK in the one and SE"),
        ("likes", [1, 0], "has None at entry 1 in the one and 0"),
        ("taste", [0.5, 2.0], "has 1.0 at entry 1 in the one and 2.0"),
        ("clicks", [["a"], [], ["b", "c"]], r"has \['b', None\] at entry 2 in the one and \['b', 'c'\]"),
        ("clicks", [["a"], ["b"], [None]], r"has \[\] at entry 1 in the one and \['b'\]"),
        ("clicks", [["a"], []], "lists 3 entries in the one and 2"),
        ("buys", [[0.0, 0.5], [0.5, 0.0]], r"has \[0.5, 0.5\] at entry 1 in the one and \[0.5, 0.0\]"),
    ],
)
def test_rows_that_disagree_in_text_lists_vectors_or_nulls_are_refused(
    column: str, other: Any, told: str, tmp_path: Path, out: Path
) -> None:
    rows = [{**OF_REQUEST, "film": film, "liked": 1.0} for film in (4, 5, 6)]
    to_requests({"train": write_log(tmp_path / "log.parquet", rows, OF_KINDS)}, OF_KINDS, out)
    assert len(rows_of(out / "train")) == 1
    wrong = write_log(tmp_path / "log.parquet", [*rows[:2], {**rows[2], column: other}], OF_KINDS)
    with pytest.raises(
        InputError, match=rf"row 1 and .* row 2 are of one request .*, but {column} {told} in the other"
    ):
        to_requests({"train": wrong}, OF_KINDS, out, overwrite=True)


def test_disagreements_far_apart_and_in_all_splits_are_counted(tmp_path: Path, out: Path) -> None:
    # The rows of each request are as far apart as can be, and each request's last row has another hour.
    rows = sorted(ROWS, key=lambda row: row["candidate_item"])
    last = {row["request_id"]: place for place, row in enumerate(rows)}
    several = [request for request in last if sum(row["request_id"] == request for row in rows) > 1]
    rows = [{**row, "hour": 9.0} if last[row["request_id"]] == place else row for place, row in enumerate(rows)]
    halves = {
        "train": [row for row in rows if row["request_id"] < 6],
        "test": [row for row in rows if row["request_id"] >= 6],
    }
    logs = {split: write_log(tmp_path / f"{split}.parquet", part) for split, part in halves.items()}
    count = rf"so are rows of {len(several)} of 12 requests"
    with pytest.raises(InputError, match=rf"train\.parquet: row \d+ .* but hour is .* and 9\.0 in the other; {count}"):
        to_requests(logs, SCHEMA, out)


def test_a_request_in_two_splits_is_refused(tmp_path: Path, out: Path) -> None:
    train = write_log(tmp_path / "train.parquet", [row for row in ROWS if row["request_id"] < 8])
    test = write_log(tmp_path / "test.parquet", [row for row in ROWS if row["request_id"] > 4])
    message = r"train\.parquet: row \d+ and \S*test\.parquet: row 0 are of one request \(request_id 5\) in two splits, "
    with pytest.raises(InputError, match=message + "as are rows of 3 of 12 requests"):
        to_requests({"train": train, "test": test}, SCHEMA, out)
    with pytest.raises(InputError, match="no split 'training': the splits are train, validation, test"):
        to_requests({"training": train}, SCHEMA, out)


def test_columns_that_would_be_lost_or_are_missing_are_named(tmp_path: Path, out: Path) -> None:
    ones = pa.array([1] * N)
    path = write_log(tmp_path / "log.parquet", ROWS, shop=ones, page=ones)
    with pytest.raises(InputError, match=r"does not name the columns \['shop', 'page'\], .* drop \[shop,page\]"):
        to_requests({"train": path}, SCHEMA, out)
    with pytest.raises(InputError, match=r"does not name the columns \['page'\]"):
        to_requests({"train": path}, SCHEMA, out, drop=["shop"])
    with pytest.raises(InputError, match="drop: 'price' is a column of the schema"):
        to_requests({"train": path}, SCHEMA, out, drop=["shop", "page", "price"])
    with pytest.raises(InputError, match="drop: 'shops' is no column of the log"):
        to_requests({"train": path}, SCHEMA, out, drop=["shops", "page"])
    for name in ("candidate_item", "time", "history_action"):
        pq.write_table(pq.read_table(path).drop_columns(["shop", "page", name]), tmp_path / "less.parquet")
        with pytest.raises(InputError, match=rf"less\.parquet: column '{name}' is missing"):
            to_requests({"train": tmp_path / "less.parquet"}, SCHEMA, out)


def test_folders_below_the_given_one_are_partitions_and_no_others(tmp_path: Path, out: Path) -> None:
    log_ = tmp_path / "run=7" / "log"
    (log_ / "day=3").mkdir(parents=True)
    file = write_log(log_ / "day=3" / "a.parquet", ROWS)
    for given_ in (log_, log_.parent / "*" / "day=*" / "*.parquet", log_ / "day=*", log_ / "**"):
        with pytest.raises(InputError, match=r"a\.parquet: the schema does not name the columns \['day'\]"):
            to_requests({"train": given_}, SCHEMA, out)
        to_requests({"train": given_}, SCHEMA, out, drop=["day"], overwrite=True)
        assert len(rows_of(out / "train")) == 12
        shutil.rmtree(out)
    for given_ in (file, file.parent, file.parent / "*.parquet"):
        to_requests({"train": given_}, SCHEMA, out, overwrite=True)
        assert len(rows_of(out / "train")) == 12


def test_leftovers_in_a_folder_are_no_part_of_the_log(tmp_path: Path, out: Path) -> None:
    log_ = tmp_path / "_logs" / ".today"
    (log_ / "_temporary" / "0").mkdir(parents=True)
    (log_ / "day").mkdir()
    write_log(log_ / "day" / "a.parquet", ROWS)
    write_log(log_ / "_temporary" / "0" / "a.parquet", ROWS)
    (log_ / "day" / "._a.parquet").write_bytes(b"macOS")
    (log_ / "day" / "folder.parquet").mkdir()
    for given_ in (log_, log_ / "*" / "*.parquet", log_ / "**" / "*.parquet", log_ / "*"):
        report = to_requests({"train": given_}, SCHEMA, out, overwrite=True)
        assert report["log"] == {"train": [str(log_ / "day" / "a.parquet")]}
    named = to_requests({"train": log_ / "_temp*" / "*" / "*.parquet"}, SCHEMA, out, overwrite=True)
    assert named["log"] == {"train": [str(log_ / "_temporary" / "0" / "a.parquet")]}
    with pytest.raises(InputError, match="no Parquet files there"):
        to_requests({"train": log_ / "_temporary" / "*.parquet"}, SCHEMA, out, overwrite=True)
    to_requests({"train": log_}, SCHEMA, out, overwrite=True)
    (out / "train" / "._part-00000.parquet").write_bytes(b"macOS")
    to_impressions(out, tmp_path / "back")
    assert len(rows_of(tmp_path / "back" / "train")) == N


def test_times_are_cut_to_whole_seconds_if_that_is_asked_for(tmp_path: Path, out: Path) -> None:
    times = pa.array([row["time"] * 1000 + 999 for row in ROWS], pa.timestamp("ms", tz="Europe/Berlin"))
    path = write_log(tmp_path / "log.parquet", ROWS, time=times)
    to_requests({"train": path}, SCHEMA, out, rounded=["time"])
    to_impressions(out, tmp_path / "back")
    assert rows_of(tmp_path / "back" / "train") == ROWS


def test_a_log_in_layouts_of_all_kinds_is_read_as_it_is(tmp_path: Path, out: Path) -> None:
    """Parquet keeps the Arrow type; list views with lists in any order, some read twice."""
    rows = [{**row, "history_item": [5, 6], "history_action": [1, 2], "history_time": [7, 86_400]} for row in ROWS]
    values = pa.array([6, 5, 5, 6])
    offsets, sizes = pa.array([2] * N, pa.int32()), pa.array([2] * N, pa.int32())
    path = write_log(
        tmp_path / "log.parquet",
        rows,
        history_item=pa.ListViewArray.from_arrays(offsets, sizes, values),
        history_action=pa.array([[1, 2]] * N, pa.list_(pa.int8(), 2)),
        history_time=pa.array([[7 * 10**9, 86_400 * 10**9]] * N, pa.large_list(pa.timestamp("ns"))),
        time=pa.array([row["time"] * 10**6 for row in rows], pa.timestamp("us", tz="UTC")),
        genres=column(rows, "genres", {}, pa.large_list_view(pa.int32())),
    )
    to_requests({"train": path}, SCHEMA, out)
    to_impressions(out, tmp_path / "back")
    assert rows_of(tmp_path / "back" / "train") == rows
    for kind in (pa.map_(pa.int64(), pa.int64()), pa.struct({"a": pa.int64()})):
        values = pa.array([{"a": 1}] * N, kind) if pa.types.is_struct(kind) else pa.array([[(1, 2)]] * N, kind)
        write_log(path, rows, history_item=values)
        with pytest.raises(InputError, match=r"log\.parquet: row 0: history_item is (map|struct)<.*, not a list"):
            to_requests({"train": path}, SCHEMA, out, overwrite=True)


def peak(function: Callable[[], Any]) -> int:
    """Most bytes that Arrow and numpy together had at once, at most."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        function()
        return int(pool.max_memory()) + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def test_memory_does_not_grow_with_the_length_of_histories(tmp_path: Path, out: Path) -> None:
    """A small file, as histories that repeat take no space in Parquet, and the rows of a request are far apart."""
    events, places = 5_000, list(range(24)) * 5
    row = {**ROWS[0], "history_item": [1] * events, "history_action": [2] * events, "history_time": [3] * events}
    types = impression_schema(SCHEMA)
    columns = {name: pa.array([value], types.field(name).type).take(pa.array([0] * 120)) for name, value in row.items()}
    columns["request_id"] = pa.array(places)
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table(columns), path)
    size = pa.table(columns).nbytes
    assert path.stat().st_size < 2**18 < size / 50
    del columns, row
    with (
        patch.object(log, "ROWS_PER_BATCH", 16_384),
        patch.object(impressions, "ROWS_PER_BATCH", 16_384),
        patch.object(impressions, "ROWS_PER_BUCKET", 65_536),
        patch.object(log, "BYTES_PER_BATCH", 2**19, create=True),
        patch.object(impressions, "BYTES_PER_BATCH", 2**19, create=True),
        patch.object(impressions, "BYTES_PER_MERGE", 2**19, create=True),
        patch.object(writer, "ROWS_PER_GROUP", 4),
    ):
        there = peak(lambda: to_requests({"train": path}, SCHEMA, out))
        back = peak(lambda: to_impressions(out, tmp_path / "back"))
    assert max(there, back) < size / 2, (there, back)
    assert len(rows_of(tmp_path / "back" / "train")) == 120


def test_keys_that_do_not_tell_requests_are_refused(tmp_path: Path, out: Path) -> None:
    path = write_log(tmp_path / "log.parquet", ROWS)
    with pytest.raises(InputError, match=r"request_key is \['user'\], but the log has a request_id"):
        to_requests({"train": path}, SCHEMA, out, request_key=["user"])
    with pytest.raises(InputError, match=r"no column request_id: name the columns that tell a request in request_key"):
        to_requests({"train": path}, SCHEMA, out, drop=["request_id"])
    with pytest.raises(InputError, match="column 'session' is missing"):
        to_requests({"train": path}, SCHEMA, out, request_key=["session"], drop=["request_id"])
    with pytest.raises(InputError, match=r"interests: is list<.*>, which cannot tell a request"):
        to_requests({"train": path}, SCHEMA, out, request_key=["interests"], drop=["request_id"])
    write_log(path, ROWS, request_id=column(ROWS, "request_id", {9: None}, pa.int64()))
    with pytest.raises(InputError, match=r"log\.parquet: row 9: request_id is null, but tells the request"):
        to_requests({"train": path}, SCHEMA, out)


def test_files_that_are_no_log_are_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such file, folder or pattern"):
        to_requests({"train": tmp_path / "nowhere"}, SCHEMA, out)
    path = write_log(tmp_path / "log.parquet", [])
    with pytest.raises(InputError, match=r"log\.parquet: no rows"):
        to_requests({"train": path}, SCHEMA, out)
    path.write_bytes(b"not Parquet")
    with pytest.raises(InputError, match=r"log\.parquet: not a complete Parquet file"):
        to_requests({"train": str(tmp_path / "*.parquet")}, SCHEMA, out)
    column_twice = pa.table([pa.array([1]), pa.array([2])], names=["user", "user"])
    pq.write_table(column_twice, path)
    with pytest.raises(InputError, match="column 'user' is there twice"):
        to_requests({"train": path}, SCHEMA, out)
    write_log(path, [{**row, "user_id": 20} for row in ROWS])
    with pytest.raises(InputError, match="train: request 0: .*'user_id'.* has id 20, not 0 to 19"):
        to_requests({"train": path}, SCHEMA, out)
    assert list(out.parent.iterdir()) == []


def test_an_empty_split_stays_empty(tmp_path: Path, out: Path) -> None:
    logs = {"train": write_log(tmp_path / "a.parquet", ROWS), "test": write_log(tmp_path / "b.parquet", [])}
    assert to_requests(logs, SCHEMA, out)["splits"]["test"] == {"requests": 0, "candidates": 0, "users": 0}
    to_impressions(out, tmp_path / "back")
    assert [rows_of(tmp_path / "back" / split) for split in ("train", "test")] == [ROWS, []]


def test_a_folder_is_replaced_only_if_allowed_and_never_the_one_that_is_read(tmp_path: Path, out: Path) -> None:
    path = write_log(tmp_path / "log.parquet", ROWS)
    to_requests({"train": path}, SCHEMA, out)
    with pytest.raises(InputError, match="films: is there already"):
        to_requests({"train": path}, SCHEMA, out)
    with pytest.raises(InputError, match=r"holds what is read \(.*log\.parquet\): choose another folder"):
        to_requests({"train": path}, SCHEMA, tmp_path, overwrite=True)
    with pytest.raises(InputError, match="films: holds what is read"):
        to_impressions(out, out, overwrite=True)
    write_log(path, ROWS[:1])
    to_requests({"train": path}, SCHEMA, out, overwrite=True)
    assert len(rows_of(out / "train")) == 1
    to_impressions(out, tmp_path / "back")
    with pytest.raises(InputError, match="back: is there already"):
        to_impressions(out, tmp_path / "back")


def test_a_prepared_folder_that_would_lose_something_is_refused(tmp_path: Path, out: Path) -> None:
    write_requests(out, SCHEMA, {"train": [make_table(12)], "test": [make_table(3)]})
    back = tmp_path / "back" / "log"
    with pytest.raises(InputError, match="films: request_id 0 is that of 2 requests, and so are 3 ids in all"):
        to_impressions(out, back)
    assert list(back.parent.iterdir()) == []
    part = out / "train" / "part-00000.parquet"
    pq.write_table(make_table(12).append_column("shop", pa.array([1] * 12)), part)
    with pytest.raises(InputError, match=r"does not name the columns \['shop'\]"):
        to_impressions(out, back)
    pq.write_table(make_table(11), part)
    with pytest.raises(InputError, match=r"train: the files have 11 requests, but counts\.json tells of 12"):
        to_impressions(out, back)
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"part-00000\.parquet: not a complete Parquet file"):
        to_impressions(out, back)
    (out / "counts.json").unlink()
    with pytest.raises(InputError, match=r"counts\.json: cannot be read"):
        to_impressions(out, back)
    write_requests(out, SCHEMA, {"train": []}, overwrite=True)
    with pytest.raises(InputError, match="films: no requests"):
        to_impressions(out, back)


PUBLIC = {
    "mind": (mind.prepare, "mind-small-train-5000/behaviors.tsv"),
    "movielens-1m": (movielens.prepare, "ml-1m/ml-1m.zip"),
    "kuairand": (kuairand.prepare, "kuairand-pure"),
}
PARTS = [("mind", None), ("kuairand", 1000)]


@pytest.mark.parametrize(
    "name, requests_per_split",
    PARTS + [pytest.param(name, None, marks=pytest.mark.slow) for name in ("movielens-1m", "kuairand")],
)
def test_public_data_goes_to_impressions_and_back_without_loss(
    name: str, requests_per_split: int | None, shared_data: Path, tmp_path: Path
) -> None:
    prepared, part, there, back, again = (tmp_path / step for step in ("prepared", "part", "there", "back", "again"))
    prepare, source = PUBLIC[name]
    prepare(shared_data / source, prepared)
    schema = RequestSchema.load(prepared)
    requests = {split: pq.read_table(prepared / split).slice(0, requests_per_split) for split in SPLITS}
    counts = write_requests(part, schema, {split: [table] for split, table in requests.items()})
    with (
        patch.object(log, "ROWS_PER_BATCH", 16_384),
        patch.object(impressions, "ROWS_PER_BATCH", 16_384),
        patch.object(impressions, "ROWS_PER_BUCKET", 65_536),
    ):
        to_impressions(part, there)
        to_requests({split: there / split for split in SPLITS}, schema, back)
        to_impressions(back, again)
    for split in SPLITS:
        assert pq.read_table(back / split).equals(requests[split])
        first, second = (pq.read_table(folder / split) for folder in (there, again))
        assert first.num_rows == counts[split]["candidates"]
        assert second.equals(first)
