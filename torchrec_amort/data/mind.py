"""MIND, the news of MSN, as requests: format `mind`, version 1.

A request is one line of `behaviors.tsv`: the news shown at once, and which of them were clicked. Its history
is what the user had clicked before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from torchrec_amort.data.splits import lists, number, split_bounds, split_tables
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError
from torchrec_amort.schema import Feature, RequestSchema

FILE = "behaviors.tsv"
COLUMNS = ("impression_id", "user_id", "time", "history", "impressions")
TIME_FORMAT = "%m/%d/%Y %I:%M:%S %p"
IMPRESSION = r"^\S+-[01]$"
HISTORY_LENGTH = 500
HOURS = 24


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
    source: str | Path | None, out: str | Path, *, overwrite: bool = False, history_length: int = HISTORY_LENGTH
) -> dict[str, dict[str, int]]:
    """Write MIND as request-level Parquet.

    Args:
        source: Microsoft's `behaviors.tsv`, or the folder that holds it, such as `MINDsmall_train`.
        out: the data folder to make.
        overwrite: replace a folder that is there.
        history_length: events that are kept of each history, the latest ones.

    Returns:
        dict: requests, candidates and users of each split.

    Raises:
        InputError: there is no source, it is not MIND's, or `out` is there already.

    Example::

        prepare("MINDsmall_train", "data/mind")
    """
    if source is None:
        raise InputError(
            "mind: no source: its licence, for research only, forbids to pass it on, so it is not fetched: "
            "get it from https://msnews.github.io and give its behaviors.tsv with --source"
        )
    schema, tables = split_requests(read_behaviors(Path(source), history_length))
    return write_requests(out, schema, tables, overwrite=overwrite)


def make_schema(num_users: int, num_items: int) -> RequestSchema:
    """What the requests are made of; id 0 stands for a user or news that is not in train.

    Args:
        num_users: how many users train has.
        num_items: how many news train has.

    Returns:
        RequestSchema: tables of one row more.

    Example::

        make_schema(num_users=50_000, num_items=40_000)
    """
    return RequestSchema(
        dataset="mind",
        features=(
            Feature("user_id", "request", "id", table_size=num_users + 1),
            Feature("hour", "request", "id", table_size=HOURS),
            Feature("news_id", "candidate", "id", table_size=num_items + 1, column="candidate_item"),
            Feature("candidate_item", "candidate", "item", table_size=num_items + 1),
            Feature("history_item", "event", "item", table_size=num_items + 1),
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
    path = source / FILE if source.is_dir() else source
    if not path.is_file():
        raise InputError(f"{path}: no such file: give MIND's {FILE} or the folder that holds it")
    columns = _read_columns(path)
    _refuse(path, "user_id", columns["user_id"], columns["user_id"].is_valid(), "a name")
    times = pc.strptime(columns["time"], format=TIME_FORMAT, unit="s", error_is_null=True)
    _refuse(path, "time", columns["time"], times.is_valid(), "M/D/YYYY h:mm:ss AM or PM")
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


def _read_columns(path: Path) -> dict[str, pa.Array]:
    """The columns of the file as text; an empty field is null."""
    text = dict.fromkeys(COLUMNS, pa.string())
    try:
        table = pyarrow.csv.read_csv(
            path,
            # One thread, for only then does an error tell the line.
            pyarrow.csv.ReadOptions(column_names=list(COLUMNS), use_threads=False, block_size=2**26),
            pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            pyarrow.csv.ConvertOptions(column_types=text, null_values=[""], strings_can_be_null=True),
        )
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not as MIND is published ({error}): download it again") from error
    return {name: table[name].combine_chunks() for name in COLUMNS}


def _read_impressions(path: Path, impressions: pa.Array) -> pa.ListArray:
    """The entries `item-label` of each line."""
    expected = "items with their labels, as in N1-0 N2-1 (MIND's test set has no labels)"
    _refuse(path, "impressions", impressions, impressions.is_valid(), expected)
    shown = pc.split_pattern(impressions, " ")
    entries = shown.flatten()
    well_formed = pc.match_substring_regex(entries, IMPRESSION)
    _refuse(path, "impressions", entries, well_formed, expected, lines=pc.list_parent_indices(shown))
    return shown


def _refuse(
    path: Path, field: str, values: pa.Array, good: pa.Array, expected: str, lines: pa.Array | None = None
) -> None:
    """Refuse the first value that is not good; `lines` tells the line of each, from 0."""
    place = pc.index(good, False).as_py()
    if place >= 0:
        line = place if lines is None else lines[place].as_py()
        raise InputError(
            f"{path}: line {line + 1}: {field} is {values[place].as_py() or ''!r}, not {expected}: "
            "mend the line or leave it out"
        )


def _latest(histories: pa.ListArray, history_length: int) -> pa.ListArray:
    """The latest entries of each list; none where it is null."""
    lengths = pc.list_value_length(histories).fill_null(0).to_numpy()
    stops = np.cumsum(lengths, dtype=np.int64)
    return lists(histories.flatten(), stops - np.minimum(lengths, history_length), stops)


def split_requests(behaviors: Behaviors) -> tuple[RequestSchema, dict[str, Iterator[pa.Table]]]:
    """Split the requests into train, validation and test, in order of time.

    Args:
        behaviors: all of them.

    Returns:
        tuple: the schema, whose tables have a row for each user and news of train, and for each split
        tables with its columns.

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
    columns = {
        "user": users,
        "time": behaviors.time,
        "user_id": np.where(users <= num_users, users, 0),
        "hour": behaviors.time // 3600 % HOURS,
        "candidate_item": _like(behaviors.candidates, number(behaviors.candidates.flatten(), items)),
        "history_item": _like(behaviors.history, number(behaviors.history.flatten(), items)),
        "click": _like(behaviors.candidates, behaviors.clicks),
    }
    schema = make_schema(num_users, len(items))
    return schema, split_tables(
        bounds, schema, lambda start, stop: {name: column[start:stop] for name, column in columns.items()}
    )


def _like(entries: pa.ListArray, values: np.ndarray) -> pa.ListArray:
    """Lists as long as the given ones, of other values."""
    return pa.ListArray.from_arrays(entries.offsets, pa.array(values))
