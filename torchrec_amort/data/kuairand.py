"""KuaiRand-Pure, short videos of Kuaishou, as requests: format `kuairand`, version 1.

A request is what one user was shown in one millisecond; its history is what the user was shown before, with
what came of it. Or it has three histories: what the user clicked, what the user viewed long, and all that was shown.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from torchrec_amort.data.parquet import refuse_missing_columns
from torchrec_amort.data.splits import lists, number, split_bounds, split_tables
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError
from torchrec_amort.schema import AGE_BUCKETS, Feature, RequestSchema
from torchrec_amort.stores import local_path

LOGS = "log_standard_*"
SEQUENCES = "user_sequences_*.parquet"
USERS_FILE = "user_features_pure.csv"
VIDEOS_FILE = "video_features_basic_pure.csv"

LABELS = {"click": "is_click", "long_view": "long_view", "like": "is_like"}
LOG = {"user": "user_id", "video": "video_id", "time": "time_ms", "tab": "tab", **LABELS}
SEQUENCE_TYPES = dict.fromkeys(("user_id", "last_time_ms"), pa.int64()) | dict.fromkeys(
    ("watch_seq", "like_seq", "long_watch_seq"), pa.list_(pa.int64())
)
TABS = 15
# Below what the whole numbers of each column are; none is below 0.
LIMITS = (
    dict.fromkeys(("user_id", "video_id", "watch_seq", "like_seq", "long_watch_seq"), 2**31)
    | dict.fromkeys(("time_ms", "last_time_ms"), 2**62)
    | dict.fromkeys(LABELS.values(), 2)
    | {"tab": TABS}
)
USER_FEATURES = (
    "user_active_degree", "is_live_streamer", "is_video_author", "follow_user_num_range", "fans_user_num_range",
    "friend_user_num_range", "register_days_range", *(f"onehot_feat{place}" for place in range(12)),
)  # fmt: skip
VIDEO_FEATURES = ("author_id", "video_type", "upload_type", "music_type")

HISTORY_LENGTH = 100
HOURS, BEIJING_SECONDS = 24, 8 * 3600
# Bucket 0 is no duration, bucket 1 + b one whose seconds have b bits; the last has all of 2,048 s and more.
DURATION_BUCKETS = 14
# An exposure of the file of sequences: before any of the log, when is not known.
BEFORE_LOG = -1

UNKNOWN_CLICK, NOT_CLICKED, CLICKED = 0, 1, 2

Columns = Mapping[str, np.ndarray]
Histories = Literal["one", "separate"]
HistoryUntil = Literal["request", "split"]
# Which events may be of each history.
EVENTS_OF: dict[Histories, dict[str, Callable[[Columns], np.ndarray]]] = {
    "one": {"history": lambda events: np.ones(len(events["video"]), dtype=bool)},
    "separate": {
        "clicked": lambda events: events["click"] == CLICKED,
        "long_viewed": lambda events: events["long_view"] == 1,
        "shown": lambda events: np.ones(len(events["video"]), dtype=bool),
    },
}


@dataclass(frozen=True)
class Features:
    """Features of users or videos, as ids; id 0 stands for a missing value.

    Args:
        key: int64 [N], whose features they are.
        ids: for each feature N + 1 ids, or lists of them; those at 0 are for who is not among the keys.
        table_sizes: for each feature, how many ids it has.
    """

    key: pa.Array
    ids: dict[str, pa.Array]
    table_sizes: dict[str, int]

    def of(self, keys: np.ndarray) -> dict[str, pa.Array]:
        """The ids of the given users or videos."""
        rows = pa.array(number(keys, self.key))
        return {name: ids.take(rows) for name, ids in self.ids.items()}


@dataclass(frozen=True)
class Requests:
    """Requests in order of time: places in the events, which are in order of user and time.

    Args:
        first: int64 [N], where the events of each one's user start.
        start: int64 [N], where those before the request stop and its candidates start.
        stop: int64 [N], where its candidates stop.
    """

    first: np.ndarray
    start: np.ndarray
    stop: np.ndarray


@dataclass(frozen=True)
class History:
    """One history of every request.

    Args:
        places: int64 [E], the events that may be of it.
        start: int64 [N], where each request's history starts among the places.
        stop: int64 [N], where it stops.
    """

    places: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def prepare(
    source: str | Path | None,
    out: str | Path,
    *,
    overwrite: bool = False,
    history_length: int = HISTORY_LENGTH,
    histories: Histories = "one",
    history_until: HistoryUntil = "split",
) -> dict[str, dict[str, int]]:
    """Write KuaiRand-Pure as request-level Parquet.

    Args:
        source: the folder `KuaiRand-Pure`, or its `data`.
        out: the data folder to make.
        overwrite: replace a folder that is there.
        history_length: events that are kept of each history, the latest ones.
        histories: `one` of all that the user was shown, with what came of it; or `separate` ones of what was `clicked`,
            what was `long_viewed` and all that was `shown`, with the times.
        history_until: where the histories of validation and test end: all at the start of the `split`, or each before
            its `request`. With the first, what a user did in the split is in no history, so that two requests of a
            user differ by what is shown, and not by what came of the first: GAUC needs that; see `docs/results.md`.

    Returns:
        dict: requests, candidates and users of each split.

    Raises:
        InputError: there is no source, it is not KuaiRand-Pure, there are no such `histories` or `history_until`, or
            `out` is there already.

    Example::

        prepare("KuaiRand-Pure", "data/kuairand")
    """
    if source is None:
        raise InputError("kuairand: no source: get KuaiRand-Pure from https://kuairand.com and give it with --source")
    for name, value, words in (("histories", histories, Histories), ("history_until", history_until, HistoryUntil)):
        if value not in get_args(words):
            raise InputError(f"{name} is {value!r}, not one of {', '.join(map(repr, get_args(words)))}")
    folder = local_path(source)
    folder = folder / "data" if (folder / "data").is_dir() else folder
    parts = read_events(folder), read_users(folder), read_videos(folder)
    schema, tables = split_requests(*parts, history_length, histories, history_until)
    return write_requests(out, schema, tables, overwrite=overwrite)


def make_schema(
    num_users: int, num_videos: int, users: Features, videos: Features, histories: Histories = "one"
) -> RequestSchema:
    """What the requests are made of; id 0 stands for a user or video that is not in train.

    Args:
        num_users: how many users train has.
        num_videos: how many videos train has.
        users: features of the users.
        videos: features of the videos.
        histories: which ones; see `prepare`.

    Returns:
        RequestSchema: tables of one row more.

    Example::

        make_schema(20_000, 7_000, read_users(folder), read_videos(folder))
    """
    candidate, events = _features_of_videos(num_videos + 1, histories)
    return RequestSchema(
        dataset="kuairand",
        features=(
            Feature("user_id", "request", "id", table_size=num_users + 1),
            Feature("hour", "request", "id", table_size=HOURS),
            Feature("tab", "request", "id", table_size=TABS),
            *(Feature(name, "request", "id", table_size=size) for name, size in users.table_sizes.items()),
            Feature("video_id", "candidate", "id", table_size=num_videos + 1, column=candidate.name),
            *(
                Feature(name, "candidate", "ids" if name == "tag" else "id", table_size=size)
                for name, size in videos.table_sizes.items()
            ),
            candidate,
            *events,
            *(Feature(label, "candidate", "label") for label in LABELS),
        ),
    )


def _features_of_videos(table_size: int, histories: Histories) -> tuple[Feature, list[Feature]]:
    """The candidate's feature whose table the events share, and the events' features."""
    if histories == "one":
        return Feature("candidate_item", "candidate", "item", table_size=table_size), [
            Feature("history_item", "event", "item", table_size=table_size),
            Feature("history_click", "event", "id", table_size=3),
            Feature("history_long_view", "event", "id", table_size=2),
            Feature("history_like", "event", "id", table_size=2),
        ]
    events = []
    for name in EVENTS_OF[histories]:
        times: dict[str, Any] = {"table_size": AGE_BUCKETS, "column": f"{name}_time", "history": name}
        events += [
            Feature(f"{name}_item", "event", "id", table_size=table_size, table="video", history=name),
            Feature(f"{name}_age", "event", "age", **times),
            Feature(f"{name}_gap", "event", "gap", **times),
        ]
    return Feature("candidate_video", "candidate", "id", table_size=table_size, table="video"), events


def read_users(folder: Path) -> Features:
    """Read the categories of users.

    Args:
        folder: holds `user_features_pure.csv`.

    Returns:
        Features: their ids, in the order of their values' text.

    Raises:
        InputError: the file or a column is missing, or not as published.

    Example::

        read_users(Path("KuaiRand-Pure/data")).table_sizes["user_active_degree"]
    """
    table = _read(folder / USERS_FILE, {"user_id": pa.int64()} | dict.fromkeys(USER_FEATURES, pa.string()))
    categories = {name: _categories(table[name]) for name in USER_FEATURES}
    sizes = {name: int(ids.max(initial=0)) + 1 for name, ids in categories.items()}
    return Features(table["user_id"], {name: _with_none(ids) for name, ids in categories.items()}, sizes)


def read_videos(folder: Path) -> Features:
    """Read the categories of videos, their tags, and the buckets of their durations.

    Args:
        folder: holds `video_features_basic_pure.csv`.

    Returns:
        Features: their ids; `tag` has a list of them for each video.

    Raises:
        InputError: the file or a column is missing, or not as published.

    Example::

        read_videos(Path("KuaiRand-Pure/data")).table_sizes["author_id"]
    """
    names = dict.fromkeys((*VIDEO_FEATURES, "tag"), pa.string())
    table = _read(folder / VIDEOS_FILE, {"video_id": pa.int64(), "video_duration": pa.float64()} | names)
    categories = {name: _categories(table[name]) for name in VIDEO_FEATURES}
    sizes = {name: int(ids.max(initial=0)) + 1 for name, ids in categories.items()}
    categories["duration"] = _duration_buckets(table["video_duration"])
    tags = pc.split_pattern(table["tag"], ",")
    tag_ids = _categories(tags.flatten())
    ends = np.cumsum([0, 0, *pc.list_value_length(tags).fill_null(0).to_pylist()])
    return Features(
        key=table["video_id"],
        ids={name: _with_none(ids) for name, ids in categories.items()}
        | {"tag": pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(tag_ids))},
        table_sizes=sizes | {"duration": DURATION_BUCKETS, "tag": int(tag_ids.max(initial=0)) + 1},
    )


def _categories(values: pa.Array) -> np.ndarray:
    """The place of each value among the distinct ones in order, from 1, and 0 where it is missing."""
    distinct = values.drop_null().unique()
    return number(values, distinct.take(pc.sort_indices(distinct)))


def _duration_buckets(milliseconds: pa.Array) -> np.ndarray:
    seconds = milliseconds.to_numpy(zero_copy_only=False) // 1000
    buckets = np.minimum(1 + np.frexp(seconds)[1], DURATION_BUCKETS - 1)
    return np.where(np.isnan(seconds), 0, buckets)


def _with_none(ids: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], ids]))


def read_events(folder: Path) -> Columns:
    """Read the exposures of the standard log, and those before it if there is a file of sequences.

    Args:
        folder: holds the files of the log.

    Returns:
        Columns: `user`, `video`, `time` (milliseconds; -1 before the log), `latest` (the latest that the time can be:
        before the log the end of the user's sequence), `tab`, `click` (0 not known, 1 no, 2 yes), `long_view` and
        `like` of each, in order of user and time; those of one millisecond in the files' order. A repetition of a
        user, video and time is left out.

    Raises:
        InputError: there is no log, a column is missing, a value is not as published, or the
            sequences do not end before the log.

    Example::

        read_events(Path("KuaiRand-Pure/data"))["click"]
    """
    log = _read_log(folder)
    sequences = sorted(folder.glob(SEQUENCES))
    if len(sequences) > 1:
        raise InputError(f"{folder}: has {len(sequences)} files {SEQUENCES}, not 1 or none: leave the one that fits")
    parts = _join(sequences[0], log) if sequences else [log]
    events = {name: np.concatenate([part[name] for part in parts]) for name in log}
    order = np.lexsort((events["time"], events["user"]))
    return {name: values[order] for name, values in events.items()}


def _read_log(folder: Path) -> Columns:
    """The standard log in the files' order, without repetitions."""
    paths = sorted(folder.glob(f"{LOGS}.csv")) or sorted(folder.glob(f"{LOGS}.parquet"))
    if not paths:
        raise InputError(f"{folder}: no {LOGS}.csv or {LOGS}.parquet: give the folder KuaiRand-Pure or its data")
    parts = [_read(path, dict.fromkeys(LOG.values(), pa.int64())) for path in paths]
    log = {name: np.concatenate([part[column].to_numpy() for part in parts]) for name, column in LOG.items()}
    log["latest"] = log["time"]
    log["click"] += NOT_CLICKED
    order = np.lexsort((log["video"], log["time"], log["user"]))
    is_new = _is_new(*(log[name][order] for name in ("user", "video", "time")))
    kept = np.sort(order[is_new])
    return {name: values[kept] for name, values in log.items()}


def _is_new(*columns: np.ndarray) -> np.ndarray:
    """Whether each row differs from the one before."""
    changed = [column[1:] != column[:-1] for column in columns]
    return np.concatenate([np.ones(min(len(columns[0]), 1), dtype=bool), np.logical_or.reduce(changed)])


def _join(path: Path, log: Columns) -> list[Columns]:
    """The exposures of the sequences, and the log without the one that ends a user's sequence."""
    table = _read(path, SEQUENCE_TYPES)
    watched = _pairs(table, "watch_seq")
    last = np.concatenate([[BEFORE_LOG], table["last_time_ms"].to_numpy()])[number(log["user"], table["user_id"])]
    is_repeated = (log["time"] == last) & np.isin(_pair(log["user"], log["video"]), watched)
    if len(early := np.flatnonzero((log["time"] <= last) & ~is_repeated)):
        row = early[0]
        raise InputError(
            f"{path}: last_time_ms of user {log['user'][row]} is {last[row]}, but the log has an exposure at "
            f"{log['time'][row]}, which is not after it: take the file away, or the part of the log it covers"
        )
    before = {
        "user": watched >> 32,
        "video": watched & (2**32 - 1),
        "time": np.full(len(watched), BEFORE_LOG),
        "latest": np.repeat(table["last_time_ms"].to_numpy(), _lengths(table["watch_seq"])),
        "tab": np.zeros_like(watched),
        "click": np.full(len(watched), UNKNOWN_CLICK),
        "long_view": np.isin(watched, _pairs(table, "long_watch_seq")).astype(np.int64),
        "like": np.isin(watched, _pairs(table, "like_seq")).astype(np.int64),
    }
    return [before, {name: values[~is_repeated] for name, values in log.items()}]


def _pairs(table: Mapping[str, pa.Array], name: str) -> np.ndarray:
    """Each entry of a column of lists of videos, together with its user."""
    return _pair(np.repeat(table["user_id"].to_numpy(), _lengths(table[name])), table[name].flatten().to_numpy())


def _lengths(column: pa.ListArray) -> np.ndarray:
    return pc.list_value_length(column).fill_null(0).to_numpy()


def _pair(users: np.ndarray, videos: np.ndarray) -> np.ndarray:
    return users << 32 | videos


def _read(path: Path, types: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
    """Columns of a CSV or Parquet file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: give the folder KuaiRand-Pure or its data, complete")
    try:
        table = (_read_csv if path.suffix == ".csv" else _read_parquet)(path, types)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not as KuaiRand-Pure is published ({error}): download it again") from error
    columns = {name: table[name].combine_chunks() for name in types}
    for name in [name for name in types if name in LIMITS]:
        _refuse_outside(path, name, columns[name])
    return columns


def _read_csv(path: Path, types: Mapping[str, pa.DataType]) -> pa.Table:
    with path.open(encoding="utf-8", newline="") as file:
        refuse_missing_columns(path, types, next(csv.reader(file), []))
    return pyarrow.csv.read_csv(
        path,
        # One thread, for only then does an error tell the line.
        pyarrow.csv.ReadOptions(use_threads=False),
        pyarrow.csv.ParseOptions(ignore_empty_lines=False),
        pyarrow.csv.ConvertOptions(column_types=types, include_columns=list(types), strings_can_be_null=True),
    )


def _read_parquet(path: Path, types: Mapping[str, pa.DataType]) -> pa.Table:
    refuse_missing_columns(path, types, pq.read_schema(path).names)
    return pq.read_table(path, columns=list(types)).select(list(types)).cast(pa.schema(types))


def _refuse_outside(path: Path, name: str, values: pa.Array) -> None:
    """Refuse whole numbers that are missing or not within their limit."""
    is_list = pa.types.is_list(values.type)
    entries = values.flatten() if is_list else values
    good = pc.and_(pc.greater_equal(entries, 0), pc.less(entries, LIMITS[name])).fill_null(False)
    if (place := pc.index(good, False).as_py()) >= 0:
        row = pc.list_parent_indices(values)[place].as_py() if is_list else place
        # As people look it up: the header of a CSV file is its line 1.
        where = f"line {row + 2}" if path.suffix == ".csv" else f"row {row}"
        value = entries[place].as_py()
        raise InputError(
            f"{path}: {where}: {name} is {'empty' if value is None else value}, not a number from 0 to "
            f"{LIMITS[name] - 1}: mend the row or leave it out"
        )


def cut_requests(events: Columns) -> Requests:
    """Cut the exposures of the log into requests: those of one user in one millisecond.

    Args:
        events: in order of user and time.

    Returns:
        Requests: in order of time; those of one millisecond in order of users.

    Example::

        requests = cut_requests(read_events(folder))
        num_candidates = requests.stop - requests.start
    """
    user, time = events["user"], events["time"]
    start = np.flatnonzero(_is_new(user, time))
    stop = np.append(start[1:], len(user))
    in_log = time[start] != BEFORE_LOG
    start, stop = start[in_log], stop[in_log]
    order = np.lexsort((user[start], time[start]))
    start, stop = start[order], stop[order]
    return Requests(np.searchsorted(user, user[start]), start, stop)


def cut_history(requests: Requests, is_of_it: np.ndarray, history_length: int = HISTORY_LENGTH) -> History:
    """Cut one history of each request: the latest of some events of its user before it.

    Args:
        requests: those.
        is_of_it: bool, for each event whether it may be of the history.
        history_length: events that are kept of each history, the latest ones.

    Returns:
        History: the oldest event first.

    Example::

        events = read_events(folder)
        clicked = cut_history(cut_requests(events), events["click"] == CLICKED)
    """
    places = np.flatnonzero(is_of_it)
    first, stop = (np.searchsorted(places, bounds) for bounds in (requests.first, requests.start))
    return History(places, np.maximum(first, stop - history_length), stop)


def split_requests(
    events: Columns,
    users: Features,
    videos: Features,
    history_length: int = HISTORY_LENGTH,
    histories: Histories = "one",
    history_until: HistoryUntil = "split",
) -> tuple[RequestSchema, dict[str, Iterator[pa.Table]]]:
    """Split the requests into train, validation and test, in order of time.

    Args:
        events: the exposures, in order of user and time.
        users: features of the users.
        videos: features of the videos.
        history_length: events that are kept of each history, the latest ones.
        histories: which ones; see `prepare`.
        history_until: where they end; see `prepare`.

    Returns:
        tuple: the schema, whose tables have a row for each user and video of train, and for each split
        tables with its columns.

    Example::

        schema, tables = split_requests(read_events(folder), read_users(folder), read_videos(folder))
    """
    requests = cut_requests(events)
    bounds = split_bounds(requests.stop - requests.start)
    seen = requests if history_until == "request" else _as_of_splits(events, requests, bounds)
    cut = {name: cut_history(seen, is_of_it(events), history_length) for name, is_of_it in EVENTS_OF[histories].items()}
    train = slice(*bounds["train"])
    user, time = events["user"][requests.start], events["time"][requests.start] // 1000
    known_users = np.unique(user[train])
    is_of_train = _is_within(requests.start[train], requests.stop[train], len(events["video"]))
    for history in cut.values():
        is_of_train[history.places] |= _is_within(history.start[train], history.stop[train], len(history.places))
    known_videos = np.unique(events["video"][is_of_train])
    item = number(events["video"], known_videos)
    schema = make_schema(len(known_users), len(known_videos), users, videos, histories)
    of_request = {
        "user": user,
        "time": time,
        "user_id": number(user, known_users),
        "hour": (time + BEIJING_SECONDS) // 3600 % HOURS,
        "tab": events["tab"][requests.start],
        **users.of(user),
    }
    of_candidate = {
        schema.candidate_column: item,
        **videos.of(events["video"]),
        "click": (events["click"] == CLICKED).astype(np.float32),
        "long_view": events["long_view"].astype(np.float32),
        "like": events["like"].astype(np.float32),
    }
    labels = {label: events[label] for label in LABELS}
    of_event = {"item": item, **(labels if histories == "one" else {"time": events["latest"] // 1000})}
    of_events = {
        f"{name}_{what}": (values[history.places], history)
        for name, history in cut.items()
        for what, values in of_event.items()
    }

    def columns(begin: int, end: int) -> dict[str, Any]:
        start, stop = requests.start[begin:end], requests.stop[begin:end]
        return {
            **{name: values[begin:end] for name, values in of_request.items()},
            **{name: lists(values, start, stop) for name, values in of_candidate.items()},
            **{
                name: lists(values, history.start[begin:end], history.stop[begin:end])
                for name, (values, history) in of_events.items()
            },
        }

    return schema, split_tables(bounds, schema, columns)


def _as_of_splits(events: Columns, requests: Requests, bounds: Mapping[str, tuple[int, int]]) -> Requests:
    """The requests, those of validation and test as if each had come when its split started."""
    user, time, start = events["user"], events["time"], requests.start.copy()
    span = int(time.max()) + 1
    order = user.astype(np.int64) * span + np.maximum(time, 0)
    for split in ("validation", "test"):
        of_split = slice(*bounds[split])
        if len(start[of_split]):
            at_start = user[start[of_split]].astype(np.int64) * span + time[start[of_split]].min()
            start[of_split] = np.searchsorted(order, at_start)
    return replace(requests, start=start)


def _is_within(starts: np.ndarray, stops: np.ndarray, size: int) -> np.ndarray:
    """Whether each place from 0 to `size - 1` is in one of the ranges."""
    opened = np.bincount(starts, minlength=size + 1) - np.bincount(stops, minlength=size + 1)
    return np.cumsum(opened)[:size] > 0
