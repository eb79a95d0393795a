"""Columns of all Arrow types and layouts, read as what they say or refused."""

import re
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SCHEMA, make_requests, make_table
from torchrec_amort import Feature, InputError, RequestBatch
from torchrec_amort.columns import LATEST_TIME, typed_table
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.data.sample import drawn_requests, first_requests, sample_requests
from torchrec_amort.data.writer import write_requests
from torchrec_amort.schema import RequestSchema

ENTRIES = st.one_of(st.integers(0, 39), st.none()) | st.integers(0, 39)


def view_of(draw: st.DrawFn, rows: list[Any], depth: int, large: bool) -> pa.Array:
    """A list view whose lists lie in any order, with gaps, and equal ones at the same place."""
    gap: list[Any] = [[] if depth > 1 else 0] * draw(st.integers(0, 2))
    entries: list[Any] = []
    start_of: dict[str, int] = {}
    for row in draw(st.permutations(rows)):
        if repr(row) not in start_of:
            start_of[repr(row)] = len(entries) + len(gap)
            entries += [*gap, *(row or [])]
    kind, index = (pa.LargeListViewArray, pa.int64()) if large else (pa.ListViewArray, pa.int32())
    return kind.from_arrays(
        pa.array([start_of[repr(row)] for row in rows], index),
        pa.array([len(row or []) for row in rows], index),
        layout_of(draw, entries, depth - 1),
        mask=pa.array([row is None for row in rows], pa.bool_()),
    )


def layout_of(draw: st.DrawFn, rows: list[Any], depth: int) -> pa.Array:
    """The rows as an array of any layout: numbers if depth is 0, else lists of so many levels."""
    padding = draw(st.integers(0, min(2, len(rows))))
    rows = [*rows[:padding], *rows]
    layouts = ["plain", "dictionary", "runs"] if depth == 0 else ["list", "large", "view", "large view", "dictionary"]
    if depth and rows and None not in rows and len({len(row) for row in rows}) == 1:
        layouts.append("fixed")
    layout = draw(st.sampled_from(layouts))
    if layout == "dictionary":
        known = list({repr(row): row for row in rows}.values())
        places = pa.array([next(p for p, k in enumerate(known) if repr(k) == repr(row)) for row in rows], pa.int32())
        return pa.DictionaryArray.from_arrays(places, plain(draw, known, depth)).slice(padding)
    if layout == "runs":
        ends = pa.array(np.arange(1, len(rows) + 1), pa.int32())
        return pa.RunEndEncodedArray.from_arrays(ends, plain(draw, rows, 0)).slice(padding)
    if depth == 0:
        return plain(draw, rows, 0).slice(padding)
    if layout.endswith("view"):
        return view_of(draw, rows, depth, layout == "large view").slice(padding)
    entries = layout_of(draw, [entry for row in rows for entry in row or []], depth - 1)
    sizes = [0 if row is None else len(row) for row in rows]
    mask = pa.array([row is None for row in rows], pa.bool_())
    if layout in ("list", "large"):
        kind, index = (pa.ListArray, pa.int32()) if layout == "list" else (pa.LargeListArray, pa.int64())
        array = kind.from_arrays(pa.array(np.cumsum([0, *sizes]), index), entries, mask=mask)
    elif sizes[0]:
        array = pa.FixedSizeListArray.from_arrays(entries, sizes[0])
    else:
        array = pa.array(rows, pa.list_(pa.int64() if depth == 1 else pa.list_(pa.int64()), 0))
    return array.slice(padding)


def plain(draw: st.DrawFn, rows: list[Any], depth: int) -> pa.Array:
    kind = draw(st.sampled_from([pa.int8(), pa.uint16(), pa.int64(), pa.float64(), pa.float16(), pa.uint64()]))
    for _ in range(depth):
        kind = draw(st.sampled_from([pa.list_, pa.large_list, pa.list_view]))(kind)
    return pa.array(rows, kind)


@st.composite
def columns(draw: st.DrawFn) -> tuple[list[Any], int, pa.ChunkedArray]:
    """Rows of numbers, lists or lists of lists, and the same as a column of one layout in several chunks."""
    depth = draw(st.integers(0, 2))
    strategy: st.SearchStrategy[Any] = draw(st.sampled_from([st.integers(0, 39), ENTRIES]))
    for _ in range(depth):
        length = draw(st.sampled_from([(0, 3), (2, 2)]))
        strategy = st.lists(strategy, min_size=length[0], max_size=length[1])
        strategy = draw(st.sampled_from([strategy, strategy, st.one_of(strategy, st.none())]))
    rows = draw(st.lists(strategy, min_size=1, max_size=6))
    array = layout_of(draw, rows, depth)
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=2)))
    chunks = [array.slice(a, b - a) for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    return rows, depth, pa.chunked_array(chunks)


FEATURES = {
    0: Feature("x", "request", "id", table_size=40),
    1: Feature("x", "request", "ids", table_size=40),
    2: Feature("x", "candidate", "ids", table_size=40),
}


@given(columns())
@settings(max_examples=100)
def test_a_column_of_any_layout_says_what_its_rows_say_or_names_the_first_null(
    column: tuple[list[Any], int, pa.ChunkedArray],
) -> None:
    rows, depth, array = column
    assert array.to_pylist() == rows
    schema = RequestSchema("any", (Feature("candidate_item", "candidate", "item", table_size=5), FEATURES[depth]))
    null = next((place for place, row in enumerate(rows) if has_null(row)), None)
    if null is None:
        typed = typed_table(pa.table({"x": array}), schema)["x"]
        assert typed.type.equals(FEATURES[depth].arrow_type)
        typed.validate(full=True)
        assert typed.to_pylist() == rows
    else:
        with pytest.raises(InputError, match=r"film: request \d+: x (is|has a) null") as refused:
            typed_table(pa.table({"x": array}), schema, "film", 100)
        # A null at the top is found before one within a list, chunk by chunk.
        row = int(re.findall(r"request (\d+)", str(refused.value))[0]) - 100
        assert has_null(rows[row])


def has_null(row: Any) -> bool:
    return row is None or (isinstance(row, list) and any(has_null(entry) for entry in row))


# ----- times --------------------------------------------------------------------------------------------------------

NOW = 1_600_000_000
DAY = NOW - NOW % 86_400
AGES = [0, 1, 5, 90_000, 10**7]
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def spellings(seconds: list[int]) -> dict[str, tuple[pa.Array, list[int] | None]]:
    """An array of the same times in each unit, and the seconds it has to be read as; None if it is refused."""
    forms: dict[str, tuple[pa.Array, list[int] | None]] = {
        f"int {unit}": (pa.array([s * ticks for s in seconds]), seconds if ticks == 1 else None)
        for unit, ticks in UNITS.items()
    }
    for unit, ticks in UNITS.items():
        for zone in (None, "UTC", "America/New_York"):
            late = [s * ticks + ticks - 1 for s in seconds]
            forms[f"timestamp {unit} {zone}"] = (pa.array(late, pa.timestamp(unit, zone)), seconds)
    days = [s // 86_400 for s in seconds]
    forms["date32"] = (pa.array(days, pa.date32()), [day * 86_400 for day in days])
    forms["date64"] = (pa.array([day * 86_400_000 for day in days], pa.date64()), [day * 86_400 for day in days])
    forms["float"] = (pa.array([float(s) for s in seconds]), seconds)
    forms["uint32"] = (pa.array(seconds, pa.uint32()), seconds)
    forms["decimal"] = (pa.array([Decimal(s) for s in seconds], pa.decimal128(20, 0)), seconds)
    for name, kind in {"duration": pa.duration("s"), "time64": pa.time64("us"), "text": pa.string()}.items():
        values: Any = [str(s) for s in seconds] if name == "text" else [s % 80_000 for s in seconds]
        forms[name] = (pa.array(values, kind), None)
    return forms


REQUEST, EVENTS = spellings([NOW]), spellings([NOW - age for age in AGES])


def ages_of(batch: RequestBatch) -> list[int]:
    return batch.sequences["history_age"].values().tolist()


@pytest.mark.parametrize("of_request", REQUEST)
@pytest.mark.parametrize("of_events", EVENTS)
def test_times_in_any_two_units_give_the_right_ages_or_are_refused(of_request: str, of_events: str) -> None:
    (time, time_in_seconds), (event_times, event_seconds) = REQUEST[of_request], EVENTS[of_events]
    history = pa.ListArray.from_arrays(pa.array([0, len(AGES)], pa.int32()), event_times)
    request = {**make_requests([(0, 1)])[0], "history_item": [1] * len(AGES), "history_action": [1] * len(AGES)}
    table = pa.Table.from_pylist([request], SCHEMA.arrow_schema())
    for name, values in {"time": time, "history_time": history}.items():
        table = table.set_column(table.column_names.index(name), name, values)
    if time_in_seconds is None or event_seconds is None:
        with pytest.raises(InputError, match=r"requests: request 0: (time|history_time) (is|has an entry that is) "):
            RequestBatch.from_arrow(table, SCHEMA)
        return
    ages = [time_in_seconds[0] - seconds for seconds in event_seconds]
    if min(ages) < 0:
        with pytest.raises(InputError, match="request 0: history_time has an event at .*, after the request's time"):
            RequestBatch.from_arrow(table, SCHEMA)
    else:
        assert ages_of(RequestBatch.from_arrow(table, SCHEMA)) == [age.bit_length() for age in ages]


def utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


ZONE = timezone(timedelta(hours=-7))
PYTHON_TIMES: list[tuple[Any, Any]] = [
    (NOW, [NOW - 5, NOW - 1]),
    (utc(NOW), [utc(NOW - 5), utc(NOW - 0.5)]),
    (utc(NOW).replace(tzinfo=None), [utc(NOW - 5).astimezone(ZONE), utc(NOW - 1)]),
    (utc(NOW + 0.75).astimezone(ZONE), [NOW - 5, NOW - 1]),
    (np.datetime64(NOW, "s"), np.array([NOW * 1000 - 5000, NOW * 1000 - 1], "M8[ms]")),
    (np.datetime64(NOW * 10**9 + 5, "ns"), [np.datetime64(NOW - 5, "s"), np.datetime64(NOW * 10**6 - 1, "us")]),
    (np.int32(NOW), np.array([NOW - 5.0, NOW - 1.0])),
    (float(NOW), (NOW - 5, np.int64(NOW - 1))),
]


@pytest.mark.parametrize(("time", "history"), PYTHON_TIMES)
def test_times_of_python_and_numpy_are_seconds(time: Any, history: Any) -> None:
    request = make_requests([(2, 1)])[0] | {"time": time, "history_time": history}
    assert ages_of(RequestBatch.from_requests([request], SCHEMA)) == [3, 1]


def test_dates_of_python_and_numpy_are_midnights() -> None:
    request = make_requests([(2, 1)])[0] | {"time": DAY + 3}
    for days in ([date.fromtimestamp(DAY), date.fromtimestamp(DAY)], np.array([DAY, DAY], "M8[s]").astype("M8[D]")):
        assert ages_of(RequestBatch.from_requests([request | {"history_time": days}], SCHEMA)) == [2, 2]


REFUSED_TIMES: list[tuple[Any, str]] = [
    ([NOW, NOW * 1000], "history_time has an entry that is 1600000000000, .* milliseconds, divide it by 1,000"),
    ([NOW, NOW * 10**6], "history_time has an entry that is .* microseconds, divide it by 1,000,000"),
    ([NOW, NOW * 10**9], "history_time has an entry that is .* nanoseconds, divide it by 1,000,000,000"),
    ([0, LATEST_TIME + 1], "history_time has an entry that is 7258118401, after the year 2200"),
    ([utc(NOW), NOW], "history_time has entries of several types, datetime, int"),
    ([date(2020, 1, 1), utc(NOW)], "history_time has entries of several types, date, datetime"),
    ([date(2020, 1, 1), NOW], "history_time has entries of several types, date, int"),
    ([timedelta(1), NOW], "history_time has entries of several types, int, timedelta"),
    (np.array([utc(NOW), NOW], dtype=object), "history_time has entries of several types, datetime, int"),
    ([timedelta(1), timedelta(2)], "history_time has an entry that is duration"),
    ([np.datetime64("NaT", "s"), np.datetime64(NOW, "s")], "history_time has a null"),
    ([NOW - 0.5, NOW], "history_time has an entry that is 1599999999.5, which int64 does not hold"),
    ([True, False], "history_time has an entry that is bool"),
    (["2020-01-01", "2020-01-02"], "history_time has an entry that is string, not a time"),
    ([datetime(9999, 12, 31), datetime(2020, 1, 1)], "history_time has an entry that is .* after the year 2200"),
]


@pytest.mark.parametrize(("history", "message"), REFUSED_TIMES)
def test_what_cannot_be_a_time_is_refused(history: Any, message: str) -> None:
    requests = [r | {"time": NOW} for r in make_requests([(2, 1), (2, 1)])]
    requests[1]["history_time"] = history
    with pytest.raises(
        InputError, match=f"requests: request 1: {message}.*: write lists of timestamps or whole seconds"
    ):
        RequestBatch.from_requests(requests, SCHEMA)


# ----- ids and numbers, everywhere alike ----------------------------------------------------------------------------

NOT_IDS: dict[str, list[Any]] = {
    "bool": [True, False],
    "string": ["1", "2"],
    "binary": [b"1", b"2"],
    "duration[us]": [timedelta(1), timedelta(2)],
    "timestamp[us]": [datetime(2020, 1, 1), datetime(2020, 1, 2)],
    "date32[day]": [date(2020, 1, 1), date(2020, 1, 2)],
    "1.5, which int64": [1.5, 2.0],
    "2.5, which int64": [Decimal("2.5"), Decimal("3.5")],
}


@pytest.mark.parametrize("name", ["request_id", "user", "user_id", "interests", "history_item", "genres"])
@pytest.mark.parametrize("what", NOT_IDS)
def test_what_is_no_id_is_refused_everywhere_alike(name: str, what: str, tmp_path: Path) -> None:
    values = NOT_IDS[what]
    given_ = {"history_item": values, "interests": values, "genres": [values, values]}.get(name, values[0])
    requests = make_requests([(2, 2)]) * 2
    requests[1] = requests[1] | {name: given_}
    message = f"request 1: {name} (is|has an entry that is) {re.escape(what)}"
    with pytest.raises(InputError, match=f"requests: {message}"):
        RequestBatch.from_requests(requests, SCHEMA)
    table = pa.Table.from_pylist(make_requests([(2, 2)]) * 2, SCHEMA.arrow_schema())
    wrong = table.set_column(table.column_names.index(name), name, pa.array([given_, given_]))
    message = message.replace("request 1", "request 0")
    with pytest.raises(InputError, match=f"requests: {message}"):
        RequestBatch.from_arrow(wrong, SCHEMA)
    with pytest.raises(InputError, match=f"train: {message}"):
        write_requests(tmp_path / "films", SCHEMA, {"train": [wrong]})
    write_requests(tmp_path / "films", SCHEMA, {"train": [table]})
    pq.write_table(wrong, tmp_path / "films" / "train" / "part-00000.parquet")
    with pytest.raises(InputError, match=rf"part-00000\.parquet: {message}"):
        list(RequestDataset(tmp_path / "films", "train", batch_size=2))


def test_booleans_and_decimals_are_numbers_and_whole_decimals_are_ids() -> None:
    request = make_requests([(2, 2)])[0]
    other = request | {
        "liked": [True, False],
        "price": [Decimal("0.5"), Decimal("2")],
        "user_id": Decimal("7"),
        "history_item": [Decimal(3), Decimal(4)],
    }
    same = request | {"liked": [1.0, 0.0], "price": [0.5, 2.0], "user_id": 7, "history_item": [3, 4]}
    batch, expected = (RequestBatch.from_requests([r], SCHEMA) for r in (other, same))
    assert batch.labels is not None and expected.labels is not None
    assert batch.labels.tolist() == expected.labels.tolist()
    assert batch.candidate_dense.tolist() == expected.candidate_dense.tolist()
    assert batch.request_sparse.values().tolist() == expected.request_sparse.values().tolist()
    assert batch.sequences.values().tolist() == expected.sequences.values().tolist()


@pytest.mark.parametrize("name", ["request_id", "user", "time", "hour", "history_time", "genres"])
def test_a_null_of_any_column_is_named(name: str, tmp_path: Path) -> None:
    rows = make_table(3).to_pylist()
    rows[2][name] = None if not isinstance(rows[2][name], list) else [*rows[2][name], None]
    table = pa.table({n: [row[n] for row in rows] for n in SCHEMA.arrow_schema().names})
    message = f"request 2: {name} (is|has a) null"
    with pytest.raises(InputError, match=f"requests: {message}"):
        RequestBatch.from_arrow(table, SCHEMA)
    with pytest.raises(InputError, match=f"requests: {message}"):
        RequestBatch.from_requests(rows, SCHEMA)
    with pytest.raises(InputError, match=f"train: {message}"):
        write_requests(tmp_path / "films", SCHEMA, {"train": [table.slice(0, 2), table.slice(2)]})


OTHERS: dict[str, pa.Array] = {
    "map<": pa.array([[(1, 2)]], pa.map_(pa.int64(), pa.int64())),
    "struct<": pa.array([{"a": 1}]),
    "extension<": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int64(), [1]), pa.array([[1]], pa.list_(pa.int64(), 1))
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_types_that_are_no_lists_are_refused_by_name(what: str) -> None:
    table = pa.Table.from_pylist(make_requests([(1, 1)]), SCHEMA.arrow_schema())
    for name in ("interests", "user_id"):
        other = table.set_column(table.column_names.index(name), name, OTHERS[what])
        with pytest.raises(InputError, match=f"requests: request 0: {name} is {what}.*, not a (list|number)"):
            RequestBatch.from_arrow(other, SCHEMA)


def test_a_column_that_has_its_type_already_is_not_copied() -> None:
    table = make_table(5).slice(1).combine_chunks()
    before = pa.total_allocated_bytes()
    typed = typed_table(table, SCHEMA)
    assert pa.total_allocated_bytes() == before
    assert typed.equals(table)


def test_a_column_read_as_two_types_is_refused() -> None:
    item = Feature("candidate_item", "candidate", "item", table_size=5)
    with pytest.raises(InputError, match="feature 'when' reads column 'time' as float, but it is int64 already"):
        RequestSchema("any", (item, Feature("when", "request", "dense", column="time")))


def test_prepared_folders_of_other_layouts_are_read_and_sampled_as_they_are(tmp_path: Path) -> None:
    table = make_table(40)
    write_requests(tmp_path / "films", SCHEMA, {"train": [table]})
    items = table["history_item"].combine_chunks()
    values, lengths = items.flatten(), items.value_lengths()
    # The lists lie in reverse order.
    ends = pa.array(np.cumsum(lengths.to_numpy()[::-1])[::-1], pa.int32())
    turned = pa.ListArray.from_pandas(items.take(pa.array(range(len(items))[::-1]))).flatten()
    starts = pa.array(ends.to_numpy() - lengths.to_numpy(), pa.int32())
    view = pa.ListViewArray.from_arrays(starts, lengths, turned)
    assert view.to_pylist() == items.to_pylist() and len(values) == len(turned)
    stored = table.set_column(table.column_names.index("history_item"), "history_item", view)
    # A second file has plain lists.
    folder = tmp_path / "films" / "train"
    pq.write_table(stored.slice(0, 25), folder / "part-00000.parquet", row_group_size=10)
    pq.write_table(table.slice(25), folder / "part-00001.parquet")
    (folder / "._part-00000.parquet").write_bytes(b"macOS")
    (batch,) = RequestDataset(tmp_path / "films", "train", batch_size=40, num_lanes=1)
    expected = RequestBatch.from_arrow(table, SCHEMA)
    assert batch.sequences.values().tolist() == expected.sequences.values().tolist()
    assert first_requests(tmp_path / "films", "train", 30).equals(table.slice(0, 30))
    assert drawn_requests(tmp_path / "films", "train", 40, seed=0).equals(table)
    drawn = drawn_requests(tmp_path / "films", "train", 7, seed=0)["request_id"].to_pylist()
    assert drawn == sorted(drawn) and len(set(drawn)) == 7
    options = {"num_requests": 3, "num_candidates": 2, "history_length": 0, "seed": 0}
    sample = sample_requests(tmp_path / "films", "train", **options)
    by_id = {row["request_id"]: row["history_item"] for row in table.to_pylist()}
    assert all(row["history_item"] == by_id[row["request_id"]] for row in sample.to_pylist())
