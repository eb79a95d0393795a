"""Requests out of raw logs are those of plain loops over the logs' rows, on every engine."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("duckdb")

from torchrec_amort.batch import RequestBatch
from torchrec_amort.data.builder.config import (
    ActionConfig,
    BuildConfig,
    CountConfig,
    EventsConfig,
    FeatureConfig,
    HistoryConfig,
    JoinConfig,
    RequestsConfig,
    SourceConfig,
)
from torchrec_amort.data.builder.run import build
from torchrec_amort.data.counts import unknown_ids
from torchrec_amort.data.impressions import to_impressions
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.errors import InputError
from torchrec_amort.hashing import hash_text
from torchrec_amort.schema import RequestSchema

NOW = 1_700_000_000
ZONE = "Asia/Kolkata"
LENGTH, DELAY, WITHIN, HOURS, HALF_LIFE, MIN_COUNT = 3, 2, 4, 5 / 3600, 0.25 / 3600, 2

seconds = st.integers(0, 19)
users = st.sampled_from(["ann", "bob", "cyd"])
items = st.integers(1, 6)
clicks = st.lists(st.tuples(users, seconds, items, st.integers(0, 6)), max_size=25)
buys = st.lists(st.tuples(users, seconds, items), max_size=15)
shown = st.lists(
    st.tuples(users, seconds, st.lists(items, min_size=1, max_size=4, unique=True)),
    min_size=1,
    max_size=12,
)
prices = st.dictionaries(st.tuples(items, st.integers(-5, 19)), st.integers(0, 9), max_size=12)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Events are mapped from a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def local(second: int) -> datetime:
    """The wall clock of a zone, which tells none."""
    return datetime.fromtimestamp(NOW + second, ZoneInfo(ZONE)).replace(tzinfo=None)


def write_logs(folder: Path, clicks: list[Any], buys: list[Any], shown: list[Any], prices: dict[Any, int]) -> None:
    pq.write_table(
        pa.table(
            {
                "who": pa.array([c[0] for c in clicks], pa.string()),
                "at": pa.array([local(c[1]) for c in clicks], pa.timestamp("us")),
                "item": pa.array([c[2] for c in clicks], pa.int32()),
                "arrived": pa.array([local(c[1] + c[3]) for c in clicks], pa.timestamp("us")),
            }
        ),
        folder / "clicks.parquet",
    )
    # In two files, the rows of the second one first.
    for name, rows in {"1": buys[::2], "2": buys[1::2]}.items():
        pq.write_table(
            pa.table(
                {
                    "who": pa.array([b[0] for b in rows], pa.string()),
                    "ms": pa.array([(NOW + b[1]) * 1000 + 7 for b in rows], pa.int64()),
                    "item": pa.array([b[2] for b in rows], pa.int64()),
                }
            ),
            folder / f"buys-{name}.parquet",
        )
    pq.write_table(
        pa.table(
            {
                "id": [f"r{place}" for place in range(len(shown))],
                "who": [s[0] for s in shown],
                "at": pa.array(
                    [datetime.fromtimestamp(NOW + s[1], timezone.utc) for s in shown], pa.timestamp("us", "UTC")
                ),
                "items": pa.array([s[2] for s in shown], pa.list_(pa.int64())),
            }
        ),
        folder / "shown.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "item": pa.array([key[0] for key in prices], pa.int64()),
                "since": pa.array([NOW + key[1] for key in prices], pa.int64()),
                "price": pa.array(list(prices.values()), pa.int64()),
            }
        ),
        folder / "prices.parquet",
    )


def config_of(folder: Path, engine: Any = "duckdb") -> BuildConfig:
    return BuildConfig(
        out=str(folder / "out"),
        sources={
            "clicks": SourceConfig(
                files=str(folder / "clicks.parquet"), user="who", time="at", zone=ZONE, available="arrived", delay=DELAY
            ),
            "buys": SourceConfig(files=str(folder / "buys-*.parquet"), user="who", time="ms", unit="ms"),
            "shown": SourceConfig(
                files=str(folder / "shown.parquet"),
                explode=["items"],
                user="who",
                time="at",
                join=[JoinConfig(source="prices", keys={"items": "item"}, columns={"price": "price"})],
            ),
            "prices": SourceConfig(files=str(folder / "prices.parquet"), time="since", unit="s"),
        },
        requests=RequestsConfig(source="shown", id=["id"], order=["items"]),
        histories={
            "acts": HistoryConfig(
                events=[
                    EventsConfig(source="clicks", columns={"act": "item", "what": "1"}),
                    EventsConfig(source="buys", where="item <> 6", columns={"act": "item", "what": "2"}),
                ],
                length=LENGTH,
            )
        },
        counts={
            "clicks_so_far": CountConfig(source="clicks", by={"items": "item"}),
            "buys_lately": CountConfig(source="buys", by={"items": "item"}, hours=HOURS),
            "trend": CountConfig(source="clicks", by={"items": "item"}, half_life=HALF_LIFE),
        },
        labels={
            "bought": ActionConfig(source="buys", keys={"items": "item"}, within=WITHIN),
            "caused": ActionConfig(source="buys", keys={"items": "item"}, within=WITHIN, attribution="latest"),
        },
        vocabularies={"item": MIN_COUNT},
        features={
            "who": FeatureConfig(side="request", kind="id", table_size=9, vocabulary="hash", text=True),
            "item": FeatureConfig(side="candidate", kind="id", of="items", table="item", vocabulary="file"),
            "price": FeatureConfig(side="candidate", kind="dense", of="coalesce(price, -1)"),
            "clicks_so_far": FeatureConfig(side="candidate", kind="dense"),
            "buys_lately": FeatureConfig(side="candidate", kind="dense"),
            "trend": FeatureConfig(side="candidate", kind="dense"),
            "act": FeatureConfig(side="event", kind="id", history="acts", table="item", vocabulary="file"),
            "what": FeatureConfig(side="event", kind="id", history="acts", table_size=3),
        },
        train_until=datetime.fromtimestamp(NOW + 10, timezone.utc).isoformat(),
        validation_until=datetime.fromtimestamp(NOW + 15, timezone.utc).isoformat(),
        engine=engine,
        master="local[2]",
        memory="1g",
        threads=1,
    )


def decayed(instants: list[int], now: int) -> float:
    """The decayed count of rows of some instants, all in milliseconds, as the page defines it."""
    tick = round(HALF_LIFE * 3600 * 1000_000 / 64) / 1000
    block = int((NOW * 1000 + now) / tick) // 1024
    weights = [0, 0]
    for instant in instants:
        ticks = int((NOW * 1000 + instant) / tick)
        if ticks // 1024 in (block, block - 1):
            weights[block - ticks // 1024] += round(4096 * 2 ** (ticks % 1024 / 64))
    own = round(4096 * 2 ** (int((NOW * 1000 + now) / tick) % 1024 / 64))
    return float(np.float32(weights[0] / own + weights[1] / (own * 65536)))


def expected_rows(clicks: list[Any], buys: list[Any], shown: list[Any], prices: dict[Any, int]) -> dict[str, list[Any]]:
    """The requests of each split, and the vocabulary, in plain loops; times in milliseconds after NOW."""
    events = []  # available, time, part, item, user
    for who, second, item, late in clicks:
        events.append(((second + late + DELAY) * 1000, second * 1000, 0, item, who))
    for who, second, item in buys:
        if item != 6:
            events.append((second * 1000 + 7, second * 1000 + 7, 1, item, who))
    events.sort()
    splits: dict[str, list[Any]] = {"train": [], "validation": [], "test": []}
    words: Counter[int] = Counter(item for available, _, _, item, _ in events if available < 10_000)
    arrived = [(item, (second + late + DELAY) * 1000) for _, second, item, late in clicks]
    order = sorted(range(len(shown)), key=lambda place: (shown[place][1], f"r{place}"))
    for number, place in enumerate(order):
        who, second, candidates = shown[place]
        at = second * 1000
        known = [(item, part + 1) for available, _, part, item, owner in events if owner == who and available < at]
        rows = []
        for item in sorted(candidates):
            since = [start for (one, start) in prices if one == item and start < second]
            rows.append(
                (
                    item,
                    prices[item, max(since)] if since else -1,
                    sum(i == item and (s + late + DELAY) * 1000 < at for _, s, i, late in clicks),
                    sum(i == item and at - 5000 <= s * 1000 + 7 < at for _, s, i in buys),
                    decayed([t for i, t in arrived if i == item and t < at], at),
                    float(any(w == who and i == item and at <= s * 1000 + 7 <= at + WITHIN * 1000 for w, s, i in buys)),
                    # No other impression of it comes before the action.
                    float(
                        any(
                            w == who
                            and i == item
                            and at <= s * 1000 + 7 <= at + WITHIN * 1000
                            and not any(
                                v == who and item in shown_items and second < other <= s
                                for v, other, shown_items in shown
                            )
                            for w, s, i in buys
                        )
                    ),
                )
            )
        split = "train" if second < 10 else "validation" if second < 15 else "test"
        if split == "train":
            words.update(candidates)
        splits[split].append((number, NOW + second, who, rows, known[-LENGTH:]))
    often = sorted((-count, word) for word, count in words.items() if count >= MIN_COUNT)
    return {**splits, "vocabulary": [word for _, word in often]}


def found_rows(out: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for split in ("train", "validation", "test"):
        files = sorted((out / split).glob("*.parquet"))
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        columns = ("item", "price", "clicks_so_far", "buys_lately", "trend", "bought", "caused")
        assert all(row["user"] == hash_text([row["who"]])[0] for row in rows)
        found[split] = [
            (
                row["request_id"],
                row["time"],
                row["who"],
                list(zip(*(row[name] for name in columns), strict=True)),
                list(zip(row["act"], row["what"], strict=True)),
            )
            for row in rows
        ]
    found["vocabulary"] = pq.read_table(out / "vocabulary-item.parquet")["value"].to_pylist()
    return found


@settings(
    max_examples=15, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(clicks, buys, shown, prices)
def test_requests_are_those_of_plain_loops(clicks: Any, buys: Any, shown: Any, prices: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_logs(folder, clicks, buys, shown, prices)
        build(config_of(folder))
        assert found_rows(folder / "out") == expected_rows(clicks, buys, shown, prices)


def small_config(folder: Path, **changes: Any) -> BuildConfig:
    write_logs(folder, [("ann", 1, 2, 0)], [("ann", 2, 3)], [("ann", 5, [2, 3])], {})
    config = config_of(folder)
    return replace(config, **changes)


def with_source(config: BuildConfig, name: str, **changes: Any) -> BuildConfig:
    return replace(config, sources={**config.sources, name: replace(config.sources[name], **changes)})


@settings(max_examples=8, deadline=None, phases=[Phase.generate])
@given(st.tuples(clicks, buys, shown, prices), st.tuples(clicks, buys, shown, prices), st.integers(2, 18))
def test_what_comes_after_a_request_changes_nothing_of_it(logs: Any, others: Any, second: int) -> None:
    """Rows of requests up to a second, from logs of which all is another that was not known before it."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for place, later in enumerate((logs, others)):
            folder = Path(name, str(place))
            folder.mkdir()
            known, unknown = (
                [_of_time(one, second, side) for one in zip(range(4), of_side, strict=True)]
                for side, of_side in ((True, logs), (False, later))
            )
            write_logs(
                folder,
                *(
                    one + other if isinstance(one, list) else one | other
                    for one, other in zip(known, unknown, strict=True)
                ),
            )
            # Labels tell what came after, and nothing else may.
            build(replace(config_of(folder), labels={}))
            files = sorted((folder / "out").glob("t*/*.parquet")) + sorted((folder / "out").glob("v*/*.parquet"))
            read = [row for file in files for row in pq.read_table(file).to_pylist()]
            rows.append([row for row in read if row["time"] <= NOW + second])
    assert rows[0] == rows[1]


def _of_time(log: tuple[int, Any], second: int, is_known: bool) -> Any:
    """The rows of a log that were known before a second, or requests up to it; or all others."""
    place, rows = log
    known_at = (
        lambda click: click[1] + click[3] + DELAY,
        lambda buy: buy[1] + 0.007,
        lambda request: request[1] - 0.5,
        lambda price: price[1],
    )[place]
    kept = [row for row in rows if (known_at(row) < second) == is_known]
    return {row: rows[row] for row in kept} if isinstance(rows, dict) else kept


def test_the_report_tells_what_may_be_wrong(tmp_path: Path) -> None:
    write_logs(
        tmp_path,
        [("ann", 1, 2, 0), ("ann", 3, 2, 0), ("bob", 0, 1, 3)],
        [("ann", 5, 3)],
        [("ann", 5, [2, 3]), ("bob", 7, [1])],
        {},
    )
    build(with_source(config_of(tmp_path), "buys", columns={"whole": "ms - 7"}, time="whole"))
    report = json.loads((tmp_path / "out" / "builds" / "0001" / "build.json").read_text())
    acts = report["histories"]["acts"]
    # Clicks are available 2 s after they arrived: ann's of 3 s, and what she bought, at her request's very instant.
    assert acts["requests_with_events_of_their_instant"] == 1
    assert acts["events_available_later"] == 3
    assert acts["known"] == {"mean": 1.0, "median": 1.0, "max": 1}
    assert acts["requests_by_bits_of_known"] == [0, 2]
    assert report["labels"]["bought"]["requests_without_all_their_time"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: replace(c, requests=RequestsConfig(source="seen")),
            "requests.source is 'seen', but the sources are",
        ),
        (lambda c: with_source(c, "buys", user=None), "labels.bought.source is 'buys', which has no user"),
        (lambda c: with_source(c, "clicks", time=None), "which has no time: give sources.clicks.time"),
        (lambda c: with_source(c, "shown", files="nowhere/*.parquet"), "sources.shown.files: nowhere"),
        (lambda c: with_source(c, "shown", where="no_column > 1"), "source_shown: .*no_column"),
        (lambda c: with_source(c, "shown", user="NULL"), "sources.shown: user is null in 2 rows"),
        (lambda c: replace(c, requests=RequestsConfig(source="shown", id=["who", "items"])), None),
        (lambda c: replace(c, validation_until="2020-01-01"), "validation_until is '2020-01-01', before train_until"),
        (lambda c: replace(c, train_until="soon"), "train_until is 'soon', not a time such as"),
        (
            lambda c: replace(c, features={**c.features, "who": replace(c.features["who"], table_size=None)}),
            "feature 'who' of kind 'id' needs a table_size",
        ),
        (lambda c: replace(c, memory="much"), "memory is 'much'"),
        (lambda c: replace(c, memory="1KB"), "Out of Memory Error: [^\n]*: raise memory, or lower threads$"),
        (
            lambda c: replace(c, counts={"clicks_so_far": CountConfig(source="clicks", by={})}),
            "counts.clicks_so_far.by names 0 columns",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_told(tmp_path: Path, change: Any, message: str | None) -> None:
    config = change(small_config(tmp_path))
    if message is None:
        build(config)
        return
    with pytest.raises(InputError, match=message):
        build(config)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_rows_of_one_request_agree_on_what_is_the_requests(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    features = {
        **config.features,
        "item_of_request": FeatureConfig(side="request", kind="id", of="items", table_size=9),
    }
    with pytest.raises(InputError, match="rows of request r0 do not agree on item_of_request, which is 2 and 3"):
        build(replace(config, features=features))


def test_a_joined_table_has_one_row_for_each_key(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    pq.write_table(pa.table({"item": [2, 2], "since": [0, 0], "price": [1, 2]}), tmp_path / "prices.parquet")
    with pytest.raises(InputError, match="sources.shown.join: 2 rows of prices have item 2: keep one"):
        build(config)


@settings(max_examples=6, deadline=None, phases=[Phase.generate])
@given(clicks, buys, shown, prices)
def test_pointers_are_read_as_lists_are(clicks: Any, buys: Any, shown: Any, prices: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_logs(folder, clicks, buys, shown, prices)
        config = config_of(folder)
        build(config)
        build(replace(config, out=str(folder / "pointers"), pointers=True))
        counts = [json.loads((folder / out / "counts.json").read_text()) for out in ("out", "pointers")]
        assert counts[0] == counts[1]
        impressions = []
        for out in ("out", "pointers"):
            to_impressions(folder / out, folder / f"impressions of {out}")
            files = sorted((folder / f"impressions of {out}").rglob("*.parquet"))
            impressions.append([pq.read_table(file) for file in files])
        assert impressions[0] == impressions[1]
        for split, count in counts[0].items():
            if not count["requests"]:
                continue
            for length in (LENGTH, 1):
                batches = [
                    next(iter(RequestDataset(folder / out, split, batch_size=99, seed=0, history_length=length)))
                    for out in ("out", "pointers")
                ]
                assert_same_batch(*batches)
            schema = RequestSchema.load(folder / "pointers").without(["what"])
            assert unknown_ids(folder / "pointers", split, schema) == unknown_ids(folder / "out", split, schema)


def assert_same_batch(one: RequestBatch, other: RequestBatch) -> None:
    assert torch.equal(one.sequences.values(), other.sequences.values())
    assert torch.equal(one.sequences.lengths(), other.sequences.lengths())
    assert torch.equal(one.candidate_dense, other.candidate_dense)
    assert one.labels is not None
    assert other.labels is not None
    assert torch.equal(one.labels, other.labels)


def test_building_leaves_nothing_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for pointers in (False, True):
        build(replace(small_config(tmp_path), pointers=pointers, overwrite=True))
        assert not (tmp_path / "cache").exists()
    RequestDataset(tmp_path / "out", "train", batch_size=1)
    next(iter(RequestDataset(tmp_path / "out", "train", batch_size=1)))
    assert len(list((tmp_path / "cache" / "torchrec-amort").iterdir())) == 1


def test_events_that_are_stored_once_are_refused_if_they_are_damaged(tmp_path: Path) -> None:
    config = small_config(tmp_path, pointers=True)
    build(config)
    assert {file.name for file in tmp_path.iterdir() if file.name.startswith(".")} == set()
    (file,) = (tmp_path / "out" / "events").iterdir()
    columns = pq.read_schema(tmp_path / "out" / "train" / "part-00000.parquet").names
    assert {"acts start", "acts stop"} <= set(columns)
    assert not {"act", "what"} & set(columns)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputError, match="events cannot be read"):
        RequestDataset(tmp_path / "out", "train", batch_size=2)
