"""Requests out of raw logs are those of plain loops over the logs' rows, on every engine."""

from __future__ import annotations

import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("duckdb")

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
from torchrec_amort.errors import InputError
from torchrec_amort.hashing import hash_text

NOW = 1_700_000_000
ZONE = "Asia/Kolkata"
LENGTH, DELAY, WITHIN, HOURS, MIN_COUNT = 3, 2, 4, 5 / 3600, 2

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
                "at": pa.array([datetime.fromtimestamp(NOW + s[1], UTC) for s in shown], pa.timestamp("us", "UTC")),
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
        },
        labels={"bought": ActionConfig(source="buys", keys={"items": "item"}, within=WITHIN)},
        vocabularies={"item": MIN_COUNT},
        features={
            "who": FeatureConfig(side="request", kind="id", table_size=9, vocabulary="hash", text=True),
            "item": FeatureConfig(side="candidate", kind="id", of="items", table="item", vocabulary="file"),
            "price": FeatureConfig(side="candidate", kind="dense", of="coalesce(price, -1)"),
            "clicks_so_far": FeatureConfig(side="candidate", kind="dense"),
            "buys_lately": FeatureConfig(side="candidate", kind="dense"),
            "act": FeatureConfig(side="event", kind="id", history="acts", table="item", vocabulary="file"),
            "what": FeatureConfig(side="event", kind="id", history="acts", table_size=3),
        },
        train_until=datetime.fromtimestamp(NOW + 10, UTC).isoformat(),
        validation_until=datetime.fromtimestamp(NOW + 15, UTC).isoformat(),
        engine=engine,
        master="local[2]",
        memory="1g",
        threads=1,
    )


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
                    float(any(w == who and i == item and at <= s * 1000 + 7 <= at + WITHIN * 1000 for w, s, i in buys)),
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
        columns = ("item", "price", "clicks_so_far", "buys_lately", "bought")
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


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(clicks, buys, shown, prices)
def test_requests_are_those_of_plain_loops(clicks: Any, buys: Any, shown: Any, prices: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_logs(folder, clicks, buys, shown, prices)
        build(config_of(folder))
        assert found_rows(folder / "out") == expected_rows(clicks, buys, shown, prices)
