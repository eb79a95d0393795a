"""EB-NeRD's raw rows, made at random in the published format, and what is prepared of them in plain loops."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_amort.data import ebnerd
from torchrec_amort.data.ebnerd_features import COMPARED, OF_CANDIDATE, OF_REQUEST
from torchrec_amort.data.ebnerd_files import read_folder

Row = dict[str, Any]

DENSE = (*OF_REQUEST, *OF_CANDIDATE, "candidate_attributes", "clicked_attributes")

DAY = 86_400
STARTS = {"train": ebnerd.VALIDATION_START - 6 * DAY, "validation": ebnerd.VALIDATION_START + DAY}
HISTORY_COLUMNS = ("article_id_fixed", "impression_time_fixed", "read_time_fixed", "scroll_percentage_fixed")
READ_TIMES = (None, 0, 4, 5, 29, 30, 240, 1800)
SCROLLS = (None, 0, 19, 20, 50, 99, 99.5, 100)


# ----- raw rows -----------------------------------------------------------------------------------------------------


@dataclass
class Raw:
    """A published split as rows, and the same by article and by user. Times are seconds."""

    behaviors: list[Row]
    history: list[Row]
    lengths: dict[int, int]
    premium: dict[int, float]
    reads: dict[int, list[Row]] = field(default_factory=lambda: defaultdict(list))
    readings: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    inviews: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.in_order = sorted(self.behaviors, key=lambda row: row["impression_time"])
        for row in self.history:
            for article, time, read_time, scroll in zip(*(row[name] for name in HISTORY_COLUMNS), strict=True):
                self._read(row["user_id"], article, time, read_time, scroll, in_week=0)
        for row in self.in_order:
            for article in dict.fromkeys(row["article_ids_clicked"]):
                self._read(row["user_id"], article, row["impression_time"], None, None, in_week=1)
            for article in row["article_ids_inview"]:
                self.inviews[article].append(row["impression_time"])
        for events in self.reads.values():
            events.sort(key=lambda event: event["time"])

    def _read(
        self, user: int, article: int, time: int, read_time: float | None, scroll: float | None, in_week: int
    ) -> None:
        event = {"article": article, "time": time, "read_time": read_time, "scroll": scroll, "in_week": in_week}
        self.reads[user].append(event)
        self.readings[article].append((time, user))

    @property
    def start(self) -> int:
        return int(self.in_order[0]["impression_time"])


def make_raw(seed: int) -> dict[str, Raw]:
    """Two splits of few seconds, so that many requests share one, and histories in no order."""
    rng = np.random.default_rng(seed)
    articles = (1000 + rng.permutation(400)[:55]).tolist()
    lengths = {article: int(rng.integers(0, 5000)) for article in articles[5:]}
    premium = {article: float(rng.integers(2)) for article in articles[5:]}
    # No history has the last five, and nobody knows how long the first five are.
    popularity = 1 / np.arange(1, 56)
    raws = {}
    for split, start in STARTS.items():
        history = []
        for user in range(45):
            num_events = int(rng.integers(1, 40)) if user else 0
            times = rng.integers(start - 21 * DAY, start, num_events).tolist()
            if num_events > 2:
                times[1] = times[0]
            history.append(
                {
                    "user_id": 7 + 3 * user,
                    "article_id_fixed": rng.choice(articles[:50], num_events).tolist(),
                    "impression_time_fixed": times,
                    "read_time_fixed": [READ_TIMES[place] for place in rng.integers(0, len(READ_TIMES), num_events)],
                    "scroll_percentage_fixed": [SCROLLS[place] for place in rng.integers(0, len(SCROLLS), num_events)],
                }
            )
        seconds = start + np.concatenate([rng.integers(0, 6 * DAY, 20), rng.integers(6 * DAY, 7 * DAY, 10)])
        behaviors = []
        for place in range(90):
            shown = rng.choice(articles, int(rng.integers(1, 12)), replace=False, p=popularity / popularity.sum())
            clicked = rng.choice(shown, int(rng.integers(1, 3))).tolist()
            behaviors.append(
                {
                    "impression_id": place,
                    "impression_time": int(rng.choice(seconds)) if place else start,
                    # Some have no history.
                    "user_id": 7 + 3 * int(rng.integers(0, 20) if place % 2 else rng.integers(40, 48)),
                    "device_type": int(rng.integers(0, 4)),
                    "article_ids_inview": shown.tolist(),
                    "article_ids_clicked": clicked,
                }
            )
        raws[split] = Raw(behaviors, history, lengths, premium)
    return raws


def write_folder(folder: Path, raws: dict[str, Raw], *, article_files: bool = True) -> Path:
    moment = pa.timestamp("us")
    for split, raw in raws.items():
        (folder / split).mkdir(parents=True)
        behaviors = pa.Table.from_pylist(raw.behaviors)
        times = pa.array([row["impression_time"] * 10**6 + 999_999 for row in raw.behaviors]).cast(moment)
        behaviors = behaviors.set_column(behaviors.column_names.index("impression_time"), "impression_time", times)
        pq.write_table(behaviors, folder / split / "behaviors.parquet")
        types = (pa.int32(), moment, pa.float32(), pa.float32())
        columns = {
            name: pa.array(
                [[v * 10**6 for v in row[name]] if kind == moment else row[name] for row in raw.history],
                pa.list_(pa.int64() if kind == moment else kind),
            ).cast(pa.large_list(kind))
            for name, kind in zip(HISTORY_COLUMNS, types, strict=True)
        }
        users = pa.array([row["user_id"] for row in raw.history], pa.uint32())
        pq.write_table(pa.table({"user_id": users, **columns}), folder / split / "history.parquet")
    if article_files:
        for name, column, values in (
            ("article_length", "article_length", raws["train"].lengths),
            ("premium_articles", "premium", raws["train"].premium),
        ):
            table = pa.table({"article_id": list(values), column: list(values.values())})
            pq.write_table(table, folder / f"{name}.parquet")
    return folder


def rows_of(folder: Path, history_length: int = 15) -> dict[str, list[Row]]:
    """What is prepared of a folder, the second history among it."""
    _, tables = ebnerd.split_requests(*read_folder(folder), history_length, views=True)
    return {split: pa.concat_tables(parts).to_pylist() for split, parts in tables.items()}


# ----- plain loops --------------------------------------------------------------------------------------------------


def centered(values: list[float]) -> list[float]:
    known = [value for value in values if not math.isnan(value)]
    return [value - sum(known) / max(len(known), 1) for value in values]


def candidates_by_loops(raw: Raw, request: Row) -> list[Row]:
    """The dense features of a request's candidates before they are standardized."""
    now, shown = request["impression_time"], request["article_ids_inview"]
    newest = max(
        max(row["article_ids_inview"]) for row in raw.in_order if row["impression_time"] < now or row is request
    )
    candidates: list[Row] = []
    for article in shown:
        values: Row = {}
        read = [time for time, _ in raw.readings[article] if time < now]
        seen = [time for time in raw.inviews[article] if time < now]
        for hours in (1, 6, 24):
            clicks, inviews = (sum(0.5 ** ((now - time) / 3600 / hours) for time in times) for times in (read, seen))
            values["popularity" if hours == 6 else f"clicks_{hours}h"] = math.log1p(clicks)
            values[f"inviews_{hours}h"] = math.log1p(inviews)
            values[f"click_rate_{hours}h"] = math.log((clicks + 0.5) / (inviews + 5))
        first = min(read + seen, default=now)
        values["article_age"] = math.log1p(now - first)
        values["is_new"] = float(not read + seen)
        values["readers"] = math.log1p(len({user for time, user in raw.readings[article] if time < now}))
        values["id_rank"] = sum(other < article for other in shown) / max(len(shown) - 1, 1)
        values["id_gap"] = math.log1p(newest - article)
        values["article_length"] = math.log1p(raw.lengths[article]) if article in raw.lengths else math.nan
        values["length_missing"] = float(article not in raw.lengths)
        values["premium"] = raw.premium.get(article, math.nan)
        candidates.append(values)
    for name in COMPARED:
        means = centered([values[name] for values in candidates])
        for values, less_mean in zip(candidates, means, strict=True):
            values[f"{name}_less_mean"] = less_mean
    return candidates


def history_by_loops(raw: Raw, user: int, now: int) -> list[Row]:
    return [event for event in raw.reads[user] if event["time"] < now]


def views_by_loops(raw: Raw, user: int, now: int) -> list[tuple[int, int]]:
    """The second and the article of each candidate of a user's earlier requests, in this order."""
    views: list[tuple[int, int]] = []
    for row in raw.behaviors:
        if row["user_id"] == user and row["impression_time"] < now:
            views += [(row["impression_time"], article) for article in row["article_ids_inview"]]
    return sorted(views)


def articles_by_loops(raws: dict[str, Raw]) -> list[int]:
    """All articles that a folder names, in order."""
    articles: set[int] = set()
    for raw in raws.values():
        for row in raw.history:
            articles |= set(row["article_id_fixed"])
        for row in raw.behaviors:
            articles |= {*row["article_ids_inview"], *row["article_ids_clicked"]}
    return sorted(articles)


def request_by_loops(raw: Raw, request: Row) -> Row:
    now = request["impression_time"]
    history = history_by_loops(raw, request["user_id"], now)
    angle = 2 * math.pi * (now % DAY) / DAY
    return {
        "hour_sin": math.sin(angle),
        "hour_cos": math.cos(angle),
        **{f"device_{device}": float(request["device_type"] == device) for device in (1, 2, 3)},
        "num_candidates": math.log(len(request["article_ids_inview"])),
        "history_length": math.log1p(len(history)),
        "clicks_of_week": math.log1p(sum(event["in_week"] for event in history)),
    }


def event_by_loops(raw: Raw, event: Row) -> Row:
    article = event["article"]
    return {
        "premium": raw.premium.get(article, math.nan),
        "article_length": math.log1p(raw.lengths[article]) if article in raw.lengths else math.nan,
        "readers": math.log1p(len({u for time, u in raw.readings[article] if time < as_of(event, raw)})),
    }


def bucket(value: float | None, bounds: Iterable[float]) -> int:
    return 0 if value is None else 1 + sum(value >= bound for bound in bounds)


def vector_by_loops(raw: Raw, article: int, now: int, of_user: dict[int, np.ndarray]) -> np.ndarray:
    readers = {user for time, user in raw.readings[article] if time < now}
    total = sum((of_user.get(user, np.zeros(32)) for user in readers), np.zeros(32))
    length = np.linalg.norm(total)
    return total / length * len(readers) / (len(readers) + 3) if length > 1e-6 else np.zeros(32)


def as_of(event: Row, raw: Raw) -> int:
    """The second whose readers a history's event shows."""
    return event["time"] if event["in_week"] else raw.start


def users_by_numpy(raws: dict[str, Raw]) -> tuple[list[int], dict[str, dict[int, np.ndarray]]]:
    """The articles of the table, and the vectors of users of both splits."""
    known: dict[str, list[int]] = {}
    bases: dict[str, np.ndarray] = {}
    vectors: dict[str, dict[int, np.ndarray]] = {}
    for split, raw in raws.items():
        read = {row["user_id"]: set(row["article_id_fixed"]) for row in raw.history}
        counts = Counter(article for articles in read.values() for article in articles)
        known[split] = sorted(article for article, count in counts.items() if count >= 5)
        X = np.array(
            [
                [math.log(len(read) / counts[a]) if a in articles else 0 for a in known[split]]
                for articles in read.values()
            ]
        )
        X /= np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-30)
        basis = np.linalg.svd(X)[2][1:33].T
        if split == "validation":
            both = sorted(set(known["train"]) & set(known["validation"]))
            ours, theirs = (
                basis[[known[split].index(a) for a in both]],
                bases["train"][[known["train"].index(a) for a in both]],
            )
            left, _, right = np.linalg.svd(ours.T @ theirs)
            basis = basis @ left @ right
        bases[split] = basis
        users = X @ basis
        users -= users.mean(axis=0)
        users /= np.linalg.norm(users, axis=1, keepdims=True)
        vectors[split] = dict(zip(read, users, strict=True))
    return known["train"], vectors
