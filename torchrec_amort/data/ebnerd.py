"""EB-NeRD, the news of Ekstra Bladet, as requests: format `ebnerd`, version 1.

A request is one row of `behaviors.parquet`: the articles in view, and which of them were clicked. Its history is what
the user had read before: the user's row of `history.parquet`, then what the user clicked in earlier requests of the
split. All features are of what was known before the request's second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_amort.columns import MisfitError, typed
from torchrec_amort.data.ebnerd_features import (
    HALF_LIVES_HOURS,
    VECTOR_SIZE,
    DecayedCounts,
    Embedding,
    Readers,
    embed_readers,
)
from torchrec_amort.data.parquet import refuse_missing_columns
from torchrec_amort.data.splits import REQUESTS_PER_TABLE, lists_of, number, ranges, split_tables
from torchrec_amort.data.writer import write_requests
from torchrec_amort.schema import AGE_BUCKETS, Content, Feature, InputError, RequestSchema, one_line

BEHAVIORS_FILE, HISTORY_FILE, ARTICLES_FILE = "behaviors.parquet", "history.parquet", "articles.parquet"
LENGTH_FILE, PREMIUM_FILE = "article_length.parquet", "premium_articles.parquet"
BEHAVIORS: dict[str, tuple[pa.DataType, Content]] = {
    "impression_time": (pa.int64(), "time"),
    "user_id": (pa.int64(), "id"),
    "device_type": (pa.int64(), "id"),
    "article_ids_inview": (pa.list_(pa.int64()), "id"),
    "article_ids_clicked": (pa.list_(pa.int64()), "id"),
}
HISTORY: dict[str, tuple[pa.DataType, Content]] = {
    "user_id": (pa.int64(), "id"),
    "article_id_fixed": (pa.list_(pa.int64()), "id"),
    "impression_time_fixed": (pa.list_(pa.int64()), "time"),
    "read_time_fixed": (pa.list_(pa.float32()), "number"),
    "scroll_percentage_fixed": (pa.list_(pa.float32()), "number"),
}
# The columns of lists whose entries may be missing.
MAY_LACK = ("read_time_fixed", "scroll_percentage_fixed")

HISTORY_LENGTH = 100
HistoryOf = Literal["own", "another user"]
# 24 May 2023, 7:00 UTC: the last day of the published train split is for validation.
VALIDATION_START = 1_684_911_600

DEVICES = (1, 2, 3)
# Bucket 0 is a missing value.
READ_TIME_BOUNDS = (5, 15, 30, 60, 120, 240)
SCROLL_BOUNDS = (20, 50, 80, 99.5)
CLIP = 6.0

OF_REQUEST = (
    "hour_sin", "hour_cos", *(f"device_{device}" for device in DEVICES),
    "num_candidates", "history_length", "clicks_of_week",
)  # fmt: skip
COMPARED = (
    *(f"{what}_{hours}h" for what in ("clicks", "inviews", "click_rate") for hours in HALF_LIVES_HOURS),
    "article_age", "readers", "id_gap", "article_length",
)  # fmt: skip
OF_CANDIDATE = (
    *COMPARED, "is_new", "id_rank", "length_missing", "premium", *(f"{name}_less_mean" for name in COMPARED)
)  # fmt: skip
# Dense features of events, and the candidate's features of which they have the scale.
OF_EVENT = {"clicked_premium": "premium", "clicked_length": "article_length", "clicked_readers": "readers"}

_SEED_OF_OTHER_USERS = 0


@dataclass(frozen=True)
class Articles:
    """All articles of the folder, in order of their ids.

    Args:
        ids: int64 [A].
        length: float64 [A], characters of the body; NaN where it is not known.
        premium: float64 [A], whether it is for subscribers; NaN where it is not known.
    """

    ids: np.ndarray
    length: np.ndarray
    premium: np.ndarray


@dataclass(frozen=True)
class Events:
    """What users read, in order of user and time; in the files' order where a user has several in a second.

    Args:
        user: int64 [E], from 0.
        article: int64 [E], place among the articles.
        time: int64 [E], seconds since 1970.
        read_time: int64 [E], bucket; 0 if it is missing.
        scroll: int64 [E], bucket; 0 if it is missing.
    """

    user: np.ndarray
    article: np.ndarray
    time: np.ndarray
    read_time: np.ndarray
    scroll: np.ndarray


@dataclass(frozen=True)
class Split:
    """A published split: its requests in order of time, and all that its users read.

    Args:
        user_ids: int64 [U], those with a history first.
        num_readers: how many have a history.
        user: int64 [R], place among `user_ids`.
        time: int64 [R], seconds since 1970.
        device: int64 [R].
        bounds: int64 [R + 1], where the candidates of each request start.
        candidate: int64 [C], place among the articles.
        clicked: bool [C].
        events: of the histories, all before the first request, and the clicks of all requests.
    """

    user_ids: np.ndarray
    num_readers: int
    user: np.ndarray
    time: np.ndarray
    device: np.ndarray
    bounds: np.ndarray
    candidate: np.ndarray
    clicked: np.ndarray
    events: Events

    @property
    def start(self) -> int:
        """The second of the first request, from which on clicks and inviews are counted."""
        return int(self.time[0])


def prepare(
    source: str | Path | None,
    out: str | Path,
    *,
    history_length: int = HISTORY_LENGTH,
    overwrite: bool = False,
    history_of: HistoryOf = "own",
) -> dict[str, dict[str, int]]:
    """Write EB-NeRD as request-level Parquet.

    Args:
        source: the folder `ebnerd_demo`, `ebnerd_small` or `ebnerd_large`, with its `train` and `validation`.
        out: the data folder to make.
        history_length: events that are kept of each history, the latest ones.
        overwrite: replace a folder that is there.
        history_of: `another user` gives each user the events of one other user of the split before the same second,
            all else equal: what a model gains by it is not of the user's own history.

    Returns:
        dict: requests, candidates and users of each split.

    Raises:
        InputError: there is no source, it is not EB-NeRD, there is no such `history_of`, or `out` is there already.

    Example::

        prepare("ebnerd_demo", "data/ebnerd")
    """
    if source is None:
        raise InputError("ebnerd: no source: get EB-NeRD from https://recsys.eb.dk and give its folder with --source")
    if history_of not in get_args(HistoryOf):
        raise InputError(f"history_of is {history_of!r}, not one of {', '.join(map(repr, get_args(HistoryOf)))}")
    schema, tables = split_requests(*read_folder(Path(source)), history_length, history_of)
    return write_requests(out, schema, tables, overwrite=overwrite)


def make_schema(num_articles: int) -> RequestSchema:
    """What the requests are made of; id 0 stands for an article that few users of train had read.

    Args:
        num_articles: how many articles have a row of the table.

    Returns:
        RequestSchema: with a table of one row more.

    Example::

        make_schema(num_articles=2525)
    """
    article: dict[str, Any] = {"table": "article", "table_size": num_articles + 1}
    vector: dict[str, Any] = {"table": "reader_vector", "size": VECTOR_SIZE}
    clicks: dict[str, Any] = {"history": "clicks"}
    return RequestSchema(
        dataset="ebnerd",
        features=(
            *(Feature(name, "request", "dense") for name in OF_REQUEST),
            *(Feature(name, "candidate", "dense") for name in OF_CANDIDATE),
            Feature("candidate_article", "candidate", "id", **article),
            Feature("candidate_vector", "candidate", "vector", **vector),
            Feature("clicked_article", "event", "id", **article, **clicks),
            Feature("clicked_vector", "event", "vector", **vector, **clicks),
            *(Feature(name, "event", "dense", **clicks) for name in OF_EVENT),
            Feature("clicked_in_week", "event", "id", table_size=2, **clicks),
            Feature("clicked_read_time", "event", "id", table_size=len(READ_TIME_BOUNDS) + 2, **clicks),
            Feature("clicked_scroll", "event", "id", table_size=len(SCROLL_BOUNDS) + 2, **clicks),
            Feature("clicked_time", "event", "age", table_size=AGE_BUCKETS, **clicks),
            Feature("clicked", "candidate", "label"),
        ),
    )


# ----- reading ------------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> tuple[Articles, Split, Split]:
    """Read the published splits `train` and `validation`, and what is known of their articles.

    Args:
        folder: holds the two, and lengths and premium of articles or `articles.parquet`, if they are known.

    Returns:
        tuple: the articles, the split `train` and the split `validation`.

    Raises:
        InputError: a file is missing or not as published.

    Example::

        articles, train, validation = read_folder(Path("ebnerd_demo"))
    """
    behaviors, histories = (
        [_read(folder / split / name, types) for split in ("train", "validation")]
        for name, types in ((BEHAVIORS_FILE, BEHAVIORS), (HISTORY_FILE, HISTORY))
    )
    in_files = [table["article_id_fixed"].flatten() for table in histories] + [
        table[name].flatten() for table in behaviors for name in ("article_ids_inview", "article_ids_clicked")
    ]
    ids = np.unique(np.concatenate([np.unique(articles.to_numpy()) for articles in in_files]))
    train, validation = (
        _split(folder / split, ids, *tables)
        for split, *tables in zip(("train", "validation"), behaviors, histories, strict=True)
    )
    return read_articles(folder, ids), train, validation


def read_articles(folder: Path, ids: np.ndarray) -> Articles:
    """Read the lengths of articles, and which are premium.

    Args:
        folder: holds `article_length.parquet` and `premium_articles.parquet`, or else the published `articles.parquet`;
            what neither has is not known.
        ids: int64 [A], whose, in order.

    Returns:
        Articles: those.

    Raises:
        InputError: a file is not as published.

    Example::

        read_articles(Path("ebnerd_demo"), np.array([9778661])).premium
    """
    length, premium = (
        _of_articles(folder / own, column, ids)
        if (folder / own).is_file()
        else _of_articles(folder / ARTICLES_FILE, published, ids)
        for own, column, published in (
            (LENGTH_FILE, "article_length", "body"),
            (PREMIUM_FILE, "premium", "premium"),
        )
    )
    return Articles(ids, length, premium)


def _of_articles(path: Path, column: str, ids: np.ndarray) -> np.ndarray:
    """A number of each article, the length of a text; NaN where there is none."""
    if not path.is_file():
        return np.full(len(ids), np.nan)
    table = _read_parquet(path, ("article_id", column))
    values = table[column].combine_chunks()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = pc.utf8_length(values)
    numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return np.append(np.nan, numbers)[number(ids, table["article_id"].combine_chunks().cast(pa.int64()))]


def _read(path: Path, types: Mapping[str, tuple[pa.DataType, Content]]) -> dict[str, pa.Array]:
    """Columns of a Parquet file in some types."""
    table = _read_parquet(path, types)
    if not len(table):
        raise InputError(f"{path}: has 0 rows, not 1 or more: download it again")
    columns = {}
    for name, (kind, content) in types.items():
        column = table[name].combine_chunks()
        if name in MAY_LACK:
            entries = column.flatten().cast(pa.float32()).fill_null(np.nan)
            column = lists_of(column.value_lengths().fill_null(0).to_numpy(), entries)
        try:
            columns[name] = typed(pa.chunked_array([column]), kind, content, rounded=True, finite=False)
        except MisfitError as misfit:
            raise InputError(f"{path}: row {misfit.place}: {name} {misfit}: download it again") from misfit
    return columns


def _read_parquet(path: Path, columns: Mapping[str, Any] | tuple[str, ...]) -> pa.Table:
    if not path.is_file():
        raise InputError(f"{path}: no such file: give a folder of EB-NeRD with its train and validation, complete")
    try:
        refuse_missing_columns(path, columns, pq.read_schema(path).names)
        return pq.read_table(path, columns=list(columns))
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not as EB-NeRD is published ({one_line(error)}): download it again") from error


def _split(folder: Path, articles: np.ndarray, behaviors: dict[str, pa.Array], history: dict[str, pa.Array]) -> Split:
    _refuse(folder, behaviors, history)
    order = np.argsort(behaviors["impression_time"].to_numpy(), kind="stable")
    behaviors = {name: column.take(pa.array(order)) for name, column in behaviors.items()}
    readers = history["user_id"].to_numpy()
    visitors = behaviors["user_id"].to_numpy()
    user_ids = np.concatenate([readers, np.setdiff1d(visitors, readers)])
    user = number(visitors, user_ids) - 1
    time = behaviors["impression_time"].to_numpy()
    request, candidate = _entries(behaviors["article_ids_inview"], articles)
    request_clicked, clicked = _entries(behaviors["article_ids_clicked"], articles)
    # Some rows name an article that was clicked more than once.
    key = request_clicked * len(articles) + clicked
    once = np.sort(np.unique(key, return_index=True)[1])
    return Split(
        user_ids=user_ids,
        num_readers=len(readers),
        user=user,
        time=time,
        device=behaviors["device_type"].to_numpy(),
        bounds=np.searchsorted(request, np.arange(len(time) + 1)),
        candidate=candidate,
        clicked=np.isin(request * len(articles) + candidate, key),
        events=_events(history, articles, user[request_clicked[once]], clicked[once], time[request_clicked[once]]),
    )


def _refuse(folder: Path, behaviors: dict[str, pa.Array], history: dict[str, pa.Array]) -> None:
    """Refuse requests without candidates, and histories that are not whole or not of the time before the split."""
    empty = behaviors["article_ids_inview"].value_lengths().to_numpy() == 0
    if empty.any():
        raise InputError(
            f"{folder / BEHAVIORS_FILE}: row {np.argmax(empty)}: article_ids_inview has 0 articles, not 1 or more: "
            "leave the row out"
        )
    path = folder / HISTORY_FILE
    users, first = np.unique(history["user_id"].to_numpy(), return_index=True)
    if len(users) < len(history["user_id"]):
        row = np.setdiff1d(np.arange(len(history["user_id"])), first)[0]
        raise InputError(
            f"{path}: row {row}: user_id {history['user_id'][row]} has 2 rows, not 1: leave one of them out"
        )
    lengths = {name: history[name].value_lengths().to_numpy() for name in HISTORY if name != "user_id"}
    expected = lengths["article_id_fixed"]
    for name, have in lengths.items():
        if (rows := np.flatnonzero(have != expected)).size:
            raise InputError(
                f"{path}: row {rows[0]}: {name} has {have[rows[0]]} entries, article_id_fixed "
                f"{expected[rows[0]]}: download it again"
            )
    times, start = history["impression_time_fixed"].flatten().to_numpy(), behaviors["impression_time"].to_numpy().min()
    if (late := np.flatnonzero(times >= start)).size:
        row = np.searchsorted(np.cumsum(expected), late[0], side="right")
        raise InputError(
            f"{path}: row {row}: impression_time_fixed has {times[late[0]]}, which is not before {start}, the first "
            f"impression_time of {BEHAVIORS_FILE}: leave the event out"
        )


def _entries(column: pa.ListArray, articles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row and the article of each entry of a column of lists of articles."""
    rows = np.repeat(np.arange(len(column)), column.value_lengths().to_numpy())
    return rows, np.searchsorted(articles, column.flatten().to_numpy())


def _events(
    history: dict[str, pa.Array], articles: np.ndarray, user: np.ndarray, clicked: np.ndarray, time: np.ndarray
) -> Events:
    """The events of the histories, whose users are the rows, and the clicks."""
    reader, article = _entries(history["article_id_fixed"], articles)
    # How long a click's article was read is known only later.
    of_click = np.zeros_like(clicked)
    user = np.concatenate([reader, user])
    time = np.concatenate([history["impression_time_fixed"].flatten().to_numpy(), time])
    order = np.lexsort((time, user))
    return Events(
        user=user[order],
        article=np.concatenate([article, clicked])[order],
        time=time[order],
        read_time=np.concatenate([_buckets(history["read_time_fixed"], READ_TIME_BOUNDS), of_click])[order],
        scroll=np.concatenate([_buckets(history["scroll_percentage_fixed"], SCROLL_BOUNDS), of_click])[order],
    )


def _buckets(column: pa.ListArray, bounds: tuple[float, ...]) -> np.ndarray:
    values = column.flatten().to_numpy()
    return np.where(np.isnan(values), 0, 1 + np.searchsorted(bounds, values, side="right"))


# ----- features -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of a feature over the train split."""

    mean: float
    deviation: float

    def of(self, values: np.ndarray) -> np.ndarray:
        """The values standardized and clipped, float32; a missing one is 0, the mean."""
        scaled = np.clip((values - self.mean) / self.deviation, -CLIP, CLIP)
        return np.where(np.isnan(values), 0, scaled).astype(np.float32)


class KnownBefore:
    """Features of requests, candidates and events of one split, of what was known before each request.

    Args:
        split: its requests and events.
        articles: what is known of all articles.
        embedding: of the split's users with a history.
        history_of: whose events are a request's history.

    Example::

        known = KnownBefore(train, articles, embedding)
        known.of_candidates(0, 4096)["clicks_6h"]
    """

    def __init__(self, split: Split, articles: Articles, embedding: Embedding, history_of: HistoryOf = "own") -> None:
        self.split, self._articles = split, articles
        events, num_articles, start = split.events, len(articles.ids), split.start
        without_history = np.zeros((len(split.user_ids) - split.num_readers, VECTOR_SIZE))
        self._readers = Readers(
            events.user,
            events.article,
            events.time,
            num_articles,
            start,
            np.concatenate([embedding.user_vectors, without_history]),
        )
        time_shown = np.repeat(split.time, np.diff(split.bounds))
        self._clicks = DecayedCounts(events.article, events.time, num_articles, start)
        self._inviews = DecayedCounts(split.candidate, time_shown, num_articles, start)
        self._first_seen = np.full(num_articles, np.iinfo(np.int64).max)
        np.minimum.at(self._first_seen, events.article, events.time)
        np.minimum.at(self._first_seen, split.candidate, time_shown)
        # Articles are in order of their ids.
        newest = np.maximum.reduceat(split.candidate, split.bounds[:-1])
        num_earlier = np.searchsorted(split.time, split.time)
        newest_earlier = np.append(-1, np.maximum.accumulate(newest))[num_earlier]
        self._newest_id = articles.ids[np.maximum(newest, newest_earlier)]
        self._bounds_of_user = np.searchsorted(events.user, np.arange(len(split.user_ids) + 1))
        self._start_of_week = np.append(0, np.cumsum(events.time < start))
        self._own = self._history(split.user)
        of_others = other_users(len(split.user_ids)) if history_of == "another user" else None
        self._shown = self._own if of_others is None else self._history(of_others[split.user])

    def _history(self, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the events of a user for each request start, and where those before the request stop."""
        events, time = self.split.events, self.split.time
        origin = events.time.min(initial=0)
        span = max(events.time.max(initial=0), time[-1]) - origin + 1
        stop = np.searchsorted(events.user * span + events.time - origin, user * span + np.maximum(time - origin, 0))
        return self._bounds_of_user[user], stop

    def of_requests(self, begin: int, end: int) -> dict[str, np.ndarray]:
        """The dense features of requests, float64, as they are before they are standardized."""
        split, (first, stop) = self.split, self._own
        angle = 2 * np.pi * (split.time[begin:end] % 86_400) / 86_400
        num_candidates = np.diff(split.bounds[begin : end + 1])
        num_before_week = self._start_of_week[stop[begin:end]] - self._start_of_week[first[begin:end]]
        history_length = stop[begin:end] - first[begin:end]
        devices = [(split.device[begin:end] == device).astype(float) for device in DEVICES]
        values = (
            np.sin(angle), np.cos(angle), *devices, np.log(num_candidates),
            np.log1p(history_length), np.log1p(history_length - num_before_week),
        )  # fmt: skip
        return dict(zip(OF_REQUEST, values, strict=True))

    def of_candidates(self, begin: int, end: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The dense features of candidates, float64, and their vectors, float32 [C, 32]."""
        split = self.split
        bounds = split.bounds[begin : end + 1] - split.bounds[begin]
        num_candidates = np.diff(bounds)
        article = split.candidate[split.bounds[begin] : split.bounds[end]]
        time = np.repeat(split.time[begin:end], num_candidates)
        clicks, inviews = self._clicks.at(article, time), self._inviews.at(article, time)
        num_readers, vectors = self._readers.at(article, time)
        is_new = self._first_seen[article] >= time
        compared = (
            *np.log1p(clicks), *np.log1p(inviews), *np.log((clicks + 0.5) / (inviews + 5)),
            np.log1p(np.where(is_new, 0, time - self._first_seen[article])),
            np.log1p(num_readers),
            np.log1p(np.repeat(self._newest_id[begin:end], num_candidates) - self._articles.ids[article]),
            np.log1p(self._articles.length[article]),
        )  # fmt: skip
        values = (
            *compared,
            is_new.astype(float),
            _rank(article, bounds, len(self._articles.ids)),
            np.isnan(self._articles.length[article]).astype(float),
            self._articles.premium[article],
            *(_less_mean(column, bounds) for column in compared),
        )
        return dict(zip(OF_CANDIDATE, values, strict=True)), vectors

    def of_events(self, places: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The dense features of events, float64, and their vectors, float32 [N, 32].

        Readers are those before the event itself, or for one of before the split, those before the split.
        """
        events = self.split.events
        article = events.article[places]
        num_readers, vectors = self._readers.at(article, np.maximum(events.time[places], self.split.start))
        values = (self._articles.premium[article], np.log1p(self._articles.length[article]), np.log1p(num_readers))
        return dict(zip(OF_EVENT, values, strict=True)), vectors

    def histories(self, begin: int, end: int, history_length: int) -> tuple[np.ndarray, np.ndarray]:
        """The length of each request's history, and the places of its events, the latest ones, oldest first."""
        first, stop = (places[begin:end] for places in self._shown)
        first = np.maximum(first, stop - history_length)
        return stop - first, ranges(first, stop)[1]


def other_users(num_users: int) -> np.ndarray:
    """For each user another one, so that no two have the same: int64 [U].

    Raises:
        InputError: there is no other user.
    """
    if num_users < 2:
        raise InputError(f"history_of is 'another user', but a split has {num_users} user: it needs 2 or more")
    cycle = np.random.default_rng(_SEED_OF_OTHER_USERS).permutation(num_users)
    other = np.empty_like(cycle)
    other[cycle] = np.roll(cycle, -1)
    return other


def _rank(article: np.ndarray, bounds: np.ndarray, num_articles: int) -> np.ndarray:
    """The share of the other candidates of the request that have a smaller id."""
    num_candidates = np.diff(bounds)
    key = np.repeat(np.arange(len(num_candidates)), num_candidates) * num_articles + article
    num_smaller = np.searchsorted(np.sort(key), key) - np.repeat(bounds[:-1], num_candidates)
    return num_smaller / np.repeat(np.maximum(num_candidates - 1, 1), num_candidates)


def _less_mean(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Values of candidates less the mean over their request; those that are missing do not count."""
    is_known = ~np.isnan(values)
    sums, counts = (
        np.add.reduceat(column, bounds[:-1]) for column in (np.where(is_known, values, 0), is_known.astype(float))
    )
    return values - np.repeat(sums / np.maximum(counts, 1), np.diff(bounds))


# ----- writing ------------------------------------------------------------------------------------------------------


def split_requests(
    articles: Articles,
    train: Split,
    validation: Split,
    history_length: int = HISTORY_LENGTH,
    history_of: HistoryOf = "own",
) -> tuple[RequestSchema, dict[str, Iterator[pa.Table]]]:
    """Make features of the requests; the last day of train is for validation, and the published validation for test.

    Args:
        articles: what is known of them.
        train: the published split.
        validation: the published split.
        history_length: events that are kept of each history, the latest ones.
        history_of: whose events they are.

    Returns:
        tuple: the schema, whose table has a row for each article that 5 users or more of train had read, and for each
        split tables with its columns.

    Raises:
        InputError: train has no request before its last day.

    Example::

        schema, tables = split_requests(*read_folder(Path("ebnerd_demo")))
    """
    num_train = len(train.time)
    num_fit = int(np.searchsorted(train.time, VALIDATION_START))
    if not num_fit:
        raise InputError(
            f"ebnerd: the first request of train is at {train.time[0]}, not before {VALIDATION_START}, the last day of "
            "the published split: give EB-NeRD as published"
        )
    of_train = _embedding(train)
    of_validation = _embedding(validation, like=of_train)
    known = [
        KnownBefore(split, articles, embedding, history_of)
        for split, embedding in ((train, of_train), (validation, of_validation))
    ]
    scales = _scales(known[0], num_fit)
    row_of_article = np.zeros(len(articles.ids), dtype=np.int64)
    row_of_article[of_train.article] = np.arange(1, len(of_train.article) + 1)

    def columns(start: int, stop: int) -> dict[str, Any]:
        before = num_train if start >= num_train else 0
        return _columns(known[before > 0], start - before, stop - before, history_length, scales, row_of_article)

    bounds = {
        "train": (0, num_fit),
        "validation": (num_fit, num_train),
        "test": (num_train, num_train + len(validation.time)),
    }
    schema = make_schema(len(of_train.article))
    return schema, split_tables(bounds, schema, columns)


def _embedding(split: Split, like: Embedding | None = None) -> Embedding:
    of_history = split.events.time < split.start
    user, article = split.events.user[of_history], split.events.article[of_history]
    return embed_readers(user, article, split.num_readers, like)


def _scales(known: KnownBefore, num_requests: int) -> dict[str, Scale]:
    """Of all dense features, over the first requests."""
    moments = dict.fromkeys((*OF_REQUEST, *OF_CANDIDATE), np.zeros(3))
    for begin in range(0, num_requests, REQUESTS_PER_TABLE):
        end = min(begin + REQUESTS_PER_TABLE, num_requests)
        for name, values in {**known.of_requests(begin, end), **known.of_candidates(begin, end)[0]}.items():
            present = values[~np.isnan(values)]
            moments[name] = moments[name] + [len(present), present.sum(), np.square(present).sum()]
    return {name: _scale(*sums) for name, sums in moments.items()}


def _scale(count: float, total: float, squares: float) -> Scale:
    mean = total / max(count, 1)
    variance = squares / max(count, 1) - mean**2
    # Where rounding is all that differs, the feature is constant.
    is_constant = variance <= 1e-9 * (1 + mean**2)
    return Scale(mean, 1.0 if is_constant else float(np.sqrt(variance)))


def _columns(
    known: KnownBefore,
    begin: int,
    end: int,
    history_length: int,
    scales: Mapping[str, Scale],
    row_of_article: np.ndarray,
) -> dict[str, Any]:
    split, events = known.split, known.split.events
    of_candidates, candidate_vectors = known.of_candidates(begin, end)
    num_events, places = known.histories(begin, end, history_length)
    of_events, event_vectors = known.of_events(places)
    shown = slice(split.bounds[begin], split.bounds[end])
    candidates = {name: scales[name].of(values) for name, values in of_candidates.items()} | {
        "candidate_article": row_of_article[split.candidate[shown]],
        "candidate_vector": _vectors(candidate_vectors),
        "clicked": split.clicked[shown].astype(np.float32),
    }
    clicks = {name: scales[OF_EVENT[name]].of(values) for name, values in of_events.items()} | {
        "clicked_article": row_of_article[events.article[places]],
        "clicked_vector": _vectors(event_vectors),
        "clicked_in_week": (events.time[places] >= split.start).astype(np.int64),
        "clicked_read_time": events.read_time[places],
        "clicked_scroll": events.scroll[places],
        "clicked_time": events.time[places],
    }
    num_candidates = np.diff(split.bounds[begin : end + 1])
    return {
        "user": split.user_ids[split.user[begin:end]],
        "time": split.time[begin:end],
        **{name: scales[name].of(values) for name, values in known.of_requests(begin, end).items()},
        **{name: lists_of(num_candidates, values) for name, values in candidates.items()},
        **{name: lists_of(num_events, values) for name, values in clicks.items()},
    }


def _vectors(vectors: np.ndarray) -> pa.ListArray:
    return lists_of(np.full(len(vectors), VECTOR_SIZE), vectors.ravel())
