"""MIND, the news of MSN, as requests: format `mind`, version 1.

A request is one line of `behaviors.tsv`: the news shown at once, and which of them were clicked. Its history
is what the user had clicked before. With `news.tsv`, candidates and events have categories and a vector of their text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_amort.data.mind_news import News, read_news
from torchrec_amort.data.mind_tsv import read_tsv, refuse_lines
from torchrec_amort.data.splits import lists, lists_of, number, split_bounds, split_tables, vectors_of
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError
from torchrec_amort.schema import Feature, RequestSchema, Side
from torchrec_amort.stores import local_path

FILE, NEWS_FILE = "behaviors.tsv", "news.tsv"
COLUMNS = ("impression_id", "user_id", "time", "history", "impressions")
TIME_FORMAT = "%m/%d/%Y %I:%M:%S %p"
IMPRESSION = r"^\S+-[01]$"
HISTORY_LENGTH = 500
HOURS = 24
PREFIXES: dict[Side, str] = {"candidate": "candidate", "event": "history"}


@dataclass(frozen=True)
class Behaviors:
    """The lines of `behaviors.tsv`, in order of time; those of one second in the file's order.

    Args:
        user: the user's name, for each of N lines.
        time: int64 [N], seconds since 1970.
        history: the names of the news the user had clicked, oldest first, the latest 500.
        candidates: the names of the news shown.
        clicks: float32, for each candidate of all lines, 1 if it was clicked, else 0.
    """

    user: pa.Array
    time: np.ndarray
    history: pa.ListArray
    candidates: pa.ListArray
    clicks: np.ndarray


def prepare(
    source: str | Path | None,
    out: str | Path,
    *,
    overwrite: bool = False,
    history_length: int = HISTORY_LENGTH,
    news: str | Path | None = None,
    vectors: str | Path | None = None,
) -> dict[str, dict[str, int]]:
    """Write MIND as request-level Parquet.

    Args:
        source: Microsoft's `behaviors.tsv`, or the folder that holds it, such as `MINDsmall_train`.
        out: the data folder to make.
        overwrite: replace a folder that is there.
        history_length: events that are kept of each history, the latest ones.
        news: Microsoft's `news.tsv`; that beside `behaviors.tsv`, if there is one, unless given.
        vectors: Parquet of columns `id`, the names of news, and `vector`; hashed bags of the words of titles and
            abstracts unless given (see `bags_of_words`).

    Returns:
        dict: requests, candidates and users of each split.

    Raises:
        InputError: there is no source, a file is not as it should be, vectors are given without `news.tsv`, or `out`
            is there already.

    Example::

        prepare("MINDsmall_train", "data/mind")
    """
    if source is None:
        raise InputError(
            "mind: no source: its licence, for research only, forbids to pass it on, so it is not fetched: "
            "get it from https://msnews.github.io and give its behaviors.tsv with --source"
        )
    path = _behaviors_file(local_path(source))
    beside = path.parent / NEWS_FILE
    news_file = local_path(news) if news is not None else beside if beside.is_file() else None
    if news_file is None and vectors is not None:
        raise InputError(f"vectors is {vectors}, but there is no {beside}: put it there, or give it as news")
    behaviors = read_behaviors(path, history_length)
    told = None if news_file is None else read_news(news_file, None if vectors is None else local_path(vectors))
    schema, tables = split_requests(behaviors, told)
    return write_requests(out, schema, tables, overwrite=overwrite)


def make_schema(
    num_users: int, num_items: int, num_categories: Mapping[str, int] | None = None, vector_size: int = 0
) -> RequestSchema:
    """What the requests are made of; id 0 stands for a user, news or category that is not in train.

    Args:
        num_users: how many users train has.
        num_items: how many news train has.
        num_categories: how many categories and subcategories train has, by those names; None without `news.tsv`.
        vector_size: of the vectors of the news' text.

    Returns:
        RequestSchema: tables of one row more.

    Example::

        make_schema(num_users=50_000, num_items=40_000)
    """
    of_news: dict[Side, list[Feature]] = {side: [] for side in PREFIXES}
    if num_categories is not None:
        for side, prefix in PREFIXES.items():
            of_news[side] += [
                Feature(f"{prefix}_{name}", side, "id", count + 1, table=name, vocabulary="unknown")
                for name, count in num_categories.items()
            ]
            of_news[side].append(Feature(f"{prefix}_text", side, "vector", size=vector_size, table="text"))
    return RequestSchema(
        dataset="mind",
        features=(
            Feature("user_id", "request", "id", table_size=num_users + 1),
            Feature("hour", "request", "id", table_size=HOURS),
            Feature("news_id", "candidate", "id", table_size=num_items + 1, column="candidate_item"),
            Feature("candidate_item", "candidate", "item", table_size=num_items + 1),
            *of_news["candidate"],
            Feature("history_item", "event", "item", table_size=num_items + 1),
            *of_news["event"],
            Feature("click", "candidate", "label"),
        ),
    )


def read_behaviors(source: Path, history_length: int = HISTORY_LENGTH) -> Behaviors:
    """Read `behaviors.tsv`.

    Args:
        source: the file, or the folder that holds it.
        history_length: events that are kept of each history, the latest ones.

    Returns:
        Behaviors: its lines in order of time.

    Raises:
        InputError: there is no such file, or a line is not as published.

    Example::

        read_behaviors(Path("MINDsmall_train"))
    """
    path = _behaviors_file(source)
    if not path.is_file():
        raise InputError(f"{path}: no such file: give MIND's {FILE} or the folder that holds it")
    columns = read_tsv(path, COLUMNS)
    refuse_lines(path, "user_id", columns["user_id"], columns["user_id"].is_valid(), "a name")
    times = pc.strptime(columns["time"], format=TIME_FORMAT, unit="s", error_is_null=True)
    refuse_lines(path, "time", columns["time"], times.is_valid(), "M/D/YYYY h:mm:ss AM or PM")
    order = np.argsort(times.cast(pa.int64()).to_numpy(), kind="stable")
    shown = _read_impressions(path, columns["impressions"]).take(order)
    entries = shown.flatten()
    return Behaviors(
        user=columns["user_id"].take(order),
        time=times.cast(pa.int64()).to_numpy()[order],
        history=_latest(pc.split_pattern(columns["history"].take(order), " "), history_length),
        candidates=pa.ListArray.from_arrays(shown.offsets, pc.utf8_slice_codeunits(entries, 0, -len("-1"))),
        clicks=pc.ends_with(entries, "-1").cast(pa.float32()).to_numpy(),
    )


def _behaviors_file(source: Path) -> Path:
    return source / FILE if source.is_dir() else source


def _read_impressions(path: Path, impressions: pa.Array) -> pa.ListArray:
    """The entries `item-label` of each line."""
    expected = "items with their labels, as in N1-0 N2-1 (MIND's test set has no labels)"
    refuse_lines(path, "impressions", impressions, impressions.is_valid(), expected)
    shown = pc.split_pattern(impressions, " ")
    entries = shown.flatten()
    well_formed = pc.match_substring_regex(entries, IMPRESSION)
    refuse_lines(path, "impressions", entries, well_formed, expected, lines=pc.list_parent_indices(shown))
    return shown


def _latest(histories: pa.ListArray, history_length: int) -> pa.ListArray:
    """The latest entries of each list; none where it is null."""
    lengths = pc.list_value_length(histories).fill_null(0).to_numpy()
    stops = np.cumsum(lengths, dtype=np.int64)
    return lists(histories.flatten(), stops - np.minimum(lengths, history_length), stops)


def split_requests(
    behaviors: Behaviors, news: News | None = None
) -> tuple[RequestSchema, dict[str, Iterator[pa.Table]]]:
    """Split the requests into train, validation and test, in order of time.

    Args:
        behaviors: all of them.
        news: what is known of the news, if anything.

    Returns:
        tuple: the schema, whose tables have a row for each user, news and category of train, and for each split
        tables with its columns.

    Raises:
        InputError: nothing is known of any of the news.

    Example::

        schema, tables = split_requests(read_behaviors(Path("MINDsmall_train")))
    """
    bounds = split_bounds(pc.list_value_length(behaviors.candidates).to_numpy())
    train_end = bounds["train"][1]
    # In the order in which they first appear, so that the users of train have the lowest numbers.
    users = number(behaviors.user, behaviors.user.unique())
    num_users = int(users[:train_end].max(initial=0))
    of_train = [part.slice(0, train_end).flatten() for part in (behaviors.history, behaviors.candidates)]
    items = pa.concat_arrays(of_train).unique()
    columns: dict[str, Any] = {
        "user": users,
        "time": behaviors.time,
        "user_id": np.where(users <= num_users, users, 0),
        "hour": behaviors.time // 3600 % HOURS,
        "candidate_item": _like(behaviors.candidates, number(behaviors.candidates.flatten(), items)),
        "history_item": _like(behaviors.history, number(behaviors.history.flatten(), items)),
        "click": _like(behaviors.candidates, behaviors.clicks),
    }
    if news is None:
        schema = make_schema(num_users, len(items))
        return schema, split_tables(bounds, schema, lambda start, stop: _cut(columns, start, stop))
    rows_of_train = news.rows(items)
    if not rows_of_train.any():
        raise InputError(
            f"mind: none of the {len(items)} news of train is in {NEWS_FILE}: give the one that belongs to {FILE}"
        )
    known = {
        name: values.take(pa.array(rows_of_train)).drop_null().unique() for name, values in news.categories.items()
    }
    ids = {name: number(news.categories[name], values) for name, values in known.items()}
    rows = {}
    for side, entries in (("candidate", behaviors.candidates), ("history", behaviors.history)):
        row_of_entry = news.rows(entries.flatten())
        rows[f"{side}_text"] = _like(entries, row_of_entry)
        columns |= {f"{side}_{name}": _like(entries, values[row_of_entry]) for name, values in ids.items()}

    def with_text(start: int, stop: int) -> dict[str, Any]:
        text = {
            name: lists_of(part.value_lengths(), vectors_of(news.vectors[part.flatten()]))
            for name, part in _cut(rows, start, stop).items()
        }
        return _cut(columns, start, stop) | text

    num_categories = {name: len(values) for name, values in known.items()}
    schema = make_schema(num_users, len(items), num_categories, news.vectors.shape[1])
    return schema, split_tables(bounds, schema, with_text)


def _cut(columns: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {name: column[start:stop] for name, column in columns.items()}


def _like(entries: pa.ListArray, values: np.ndarray) -> pa.ListArray:
    """Lists as long as the given ones, of other values."""
    return pa.ListArray.from_arrays(entries.offsets, pa.array(values))
