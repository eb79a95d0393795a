"""EB-NeRD, the news of Ekstra Bladet, as requests: format `ebnerd`, version 1.

A request is one row of `behaviors.parquet`: the articles in view, and which of them were clicked. Its history is what
the user had read before: the user's row of `history.parquet`, then what the user clicked in earlier requests of the
split. All features are of what was known before the request's second. A second history may tell which articles were in
the user's view before, clicked or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_amort.data.ebnerd_counters import VECTOR_SIZE, Embedding, embed_readers
from torchrec_amort.data.ebnerd_features import (
    ATTRIBUTES,
    DEVICES,
    OF_CANDIDATE,
    OF_REQUEST,
    POPULARITY,
    KnownBefore,
)
from torchrec_amort.data.ebnerd_files import READ_TIME_BOUNDS, SCROLL_BOUNDS, Articles, Split, read_folder
from torchrec_amort.data.splits import REQUESTS_PER_TABLE, lists_of, split_tables, vectors_of
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError
from torchrec_amort.schema import AGE_BUCKETS, Feature, RequestSchema, TableConfig
from torchrec_amort.stores import local_path

HISTORY_LENGTH = 100
# 24 May 2023, 7:00 UTC: the last day of the published train split is for validation.
VALIDATION_START = 1_684_911_600
# Of standardized features, on both sides.
CLIP = 6.0
# Name of the table with a row for each article, known to train or not.
KEYS = "article_key"


def prepare(
    source: str | Path | None,
    out: str | Path,
    *,
    history_length: int = HISTORY_LENGTH,
    overwrite: bool = False,
    views: bool = False,
) -> dict[str, dict[str, int]]:
    """Write EB-NeRD as request-level Parquet.

    Args:
        source: the folder `ebnerd_demo`, `ebnerd_small` or `ebnerd_large`, with its `train` and `validation`.
        out: the data folder to make.
        history_length: events that are kept of each history, the latest ones.
        overwrite: replace a folder that is there.
        views: whether requests have a second history, of all articles that were in the user's view, clicked or not.

    Returns:
        dict: requests, candidates and users of each split.

    Raises:
        InputError: there is no source, it is not EB-NeRD, or `out` is there already.

    Example::

        prepare("ebnerd_demo", "data/ebnerd")
    """
    if source is None:
        raise InputError("ebnerd: no source: get EB-NeRD from https://recsys.eb.dk and give its folder with --source")
    schema, tables = split_requests(*read_folder(local_path(source)), history_length, views)
    return write_requests(out, schema, tables, overwrite=overwrite)


def make_schema(num_articles: int, num_keys: int, views: bool = False) -> RequestSchema:
    """What the requests are made of; id 0 stands for an article that few users of train had read.

    Args:
        num_articles: how many articles have a row of the table.
        num_keys: how many there are in all. Each has a row that is never trained in a second table, which tells
            whether two are the same.
        views: whether they have the second history.

    Returns:
        RequestSchema: with a table of one row more than `num_articles`.

    Example::

        make_schema(num_articles=2525, num_keys=11_777)
    """
    article: dict[str, Any] = {"table": "article", "table_size": num_articles + 1, "vocabulary": "unknown"}
    vector: dict[str, Any] = {"table": "reader_vector", "size": VECTOR_SIZE}
    attributes: dict[str, Any] = {"table": "attributes", "size": len(ATTRIBUTES)}
    key: dict[str, Any] = {"table": KEYS, "table_size": num_keys}
    clicks: dict[str, Any] = {"history": "clicks"}
    of_views = (
        Feature("viewed_key", "event", "id", **key, history="views"),
        Feature("viewed_time", "event", "age", table_size=AGE_BUCKETS, history="views"),
    )
    return RequestSchema(
        dataset="ebnerd",
        features=(
            *(Feature(name, "request", "dense") for name in OF_REQUEST),
            Feature("device", "request", "id", table_size=max(DEVICES) + 1, vocabulary="unknown"),
            *(Feature(name, "candidate", "dense") for name in OF_CANDIDATE),
            Feature("candidate_article", "candidate", "id", **article),
            Feature("candidate_vector", "candidate", "vector", **vector),
            Feature("candidate_attributes", "candidate", "vector", **attributes),
            Feature("candidate_key", "candidate", "id", **key),
            Feature("clicked_article", "event", "id", **article, **clicks),
            Feature("clicked_vector", "event", "vector", **vector, **clicks),
            Feature("clicked_attributes", "event", "vector", **attributes, **clicks),
            Feature("clicked_key", "event", "id", **key, **clicks),
            Feature("clicked_in_week", "event", "id", table_size=2, **clicks),
            Feature("clicked_read_time", "event", "id", table_size=len(READ_TIME_BOUNDS) + 2, **clicks),
            Feature("clicked_scroll", "event", "id", table_size=len(SCROLL_BOUNDS) + 2, **clicks),
            Feature("clicked_time", "event", "age", table_size=AGE_BUCKETS, **clicks),
            *(of_views if views else ()),
            Feature("clicked", "candidate", "label"),
        ),
        tables={KEYS: TableConfig(trains=False)},
    )


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of a feature over the train split."""

    mean: float
    deviation: float

    def of(self, values: np.ndarray) -> np.ndarray:
        """The values standardized and clipped, float32; a missing one is 0, the mean."""
        scaled = np.clip((values - self.mean) / self.deviation, -CLIP, CLIP)
        return np.where(np.isnan(values), 0, scaled).astype(np.float32)


def split_requests(
    articles: Articles,
    train: Split,
    validation: Split,
    history_length: int = HISTORY_LENGTH,
    views: bool = False,
) -> tuple[RequestSchema, dict[str, Iterator[pa.Table]]]:
    """Make features of the requests; the last day of train is for validation, and the published validation for test.

    Args:
        articles: what is known of them.
        train: the published split.
        validation: the published split.
        history_length: events that are kept of each history, the latest ones.
        views: whether they have the second history.

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
        KnownBefore(split, articles, embedding) for split, embedding in ((train, of_train), (validation, of_validation))
    ]
    scales = _scales(known[0], num_fit)
    row_of_article = np.zeros(len(articles.ids), dtype=np.int64)
    row_of_article[of_train.article] = np.arange(1, len(of_train.article) + 1)

    schema = make_schema(len(of_train.article), len(articles.ids), views)

    def columns(start: int, stop: int) -> dict[str, Any]:
        before = num_train if start >= num_train else 0
        rows = (known[before > 0], start - before, stop - before, history_length)
        made = _columns(*rows, scales, row_of_article)
        return made | _views(*rows) if views else made

    bounds = {
        "train": (0, num_fit),
        "validation": (num_fit, num_train),
        "test": (num_train, num_train + len(validation.time)),
    }
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
    scaled = {name: scales[name].of(values) for name, values in of_candidates.items()}
    candidates = scaled | {
        # As it is, for around a mean float32 would make one of many small counts.
        POPULARITY: of_candidates[POPULARITY].astype(np.float32),
        "candidate_article": row_of_article[split.candidate[shown]],
        "candidate_vector": vectors_of(candidate_vectors),
        "candidate_attributes": vectors_of(np.stack([scaled[name] for name in ATTRIBUTES], 1)),
        "candidate_key": split.candidate[shown],
        "clicked": split.clicked[shown].astype(np.float32),
    }
    clicks = {
        "clicked_article": row_of_article[events.article[places]],
        "clicked_vector": vectors_of(event_vectors),
        "clicked_attributes": vectors_of(np.stack([scales[name].of(values) for name, values in of_events.items()], 1)),
        "clicked_key": events.article[places],
        "clicked_in_week": (events.time[places] >= split.start).astype(np.int64),
        "clicked_read_time": events.read_time[places],
        "clicked_scroll": events.scroll[places],
        "clicked_time": events.time[places],
    }
    num_candidates = np.diff(split.bounds[begin : end + 1])
    return {
        "user": split.user_ids[split.user[begin:end]],
        "time": split.time[begin:end],
        "device": split.device[begin:end],
        **{name: scales[name].of(values) for name, values in known.of_requests(begin, end).items()},
        **{name: lists_of(num_candidates, values) for name, values in candidates.items()},
        **{name: lists_of(num_events, values) for name, values in clicks.items()},
    }


def _views(known: KnownBefore, begin: int, end: int, history_length: int) -> dict[str, Any]:
    num_views, article, time = known.views(begin, end, history_length)
    return {"viewed_key": lists_of(num_views, article), "viewed_time": lists_of(num_views, time)}
