"""The published files of EB-NeRD, as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_amort.columns import MisfitError, typed
from torchrec_amort.data.parquet import refuse_missing_columns
from torchrec_amort.data.splits import lists_of, number
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.schema import Content

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


# Bucket 0 is a missing value.
READ_TIME_BOUNDS = (5, 15, 30, 60, 120, 240)
SCROLL_BOUNDS = (20, 50, 80, 99.5)


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


def _read_parquet(path: Path, columns: Iterable[str]) -> pa.Table:
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
