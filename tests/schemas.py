"""Random schemas of every kind of feature, requests for them, and what a batch of those holds, told in plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np

from torchrec_amort import Feature, RequestSchema, TableConfig, hash_ids
from torchrec_amort.hashing import hash_text

NOW = 1_000_000_000
SIZES = {"film": 30, "tag": 9, "word": 17}
Shapes = Sequence[tuple[Sequence[int], int]]

_FILM: dict[str, Any] = {"table_size": SIZES["film"], "table": "film"}
_TAGS: dict[str, Any] = {"table_size": SIZES["tag"], "table": "tag"}
# Three histories, one of vectors, lists and times; tables of three widths, shared by sides, and weights.
THREE = RequestSchema(
    "films",
    (
        Feature("user_id", "request", "id", 20),
        Feature("likes", "request", "ids", **_TAGS),
        Feature("worth", "request", "weight"),
        Feature("film_id", "candidate", "id", SIZES["film"], column="film"),
        Feature("film", "candidate", "id", **_FILM),
        Feature("tags", "candidate", "ids", **_TAGS),
        Feature("content", "candidate", "vector", size=4),
        Feature("price", "candidate", "dense"),
        Feature("clicks_film", "event", "id", history="clicks", **_FILM),
        Feature("clicks_tags", "event", "ids", history="clicks", **_TAGS),
        Feature("clicks_content", "event", "vector", size=4, table="content", history="clicks"),
        Feature("clicks_gap", "event", "gap", history="clicks"),
        Feature("buys_film", "event", "id", history="buys", **_FILM),
        Feature("buys_price", "event", "dense", history="buys"),
        Feature("views_film", "event", "id", history="views", **_FILM),
        Feature("views_age", "event", "age", 64, history="views"),
        Feature("liked", "candidate", "label"),
    ),
    tables={"film": TableConfig(width=4), "tag": TableConfig(width=12), "user_id": TableConfig(width=16)},
)


def _features(draw: st.DrawFn, side: Any, prefix: str, history: str) -> list[Feature]:
    """Some features of one side; ids of films and tags, and vectors, share what those of other sides have."""
    kinds = draw(
        st.sets(st.sampled_from(["tags", "word", "words", "number", "seen", "content", "own", "age", "old", "gap"]))
    )
    shared = draw(st.booleans())
    options: dict[str, Any] = {"history": history} if side == "event" else {}
    every = {
        "tags": lambda name: Feature(name, side, "ids", SIZES["tag"], table="tag" if shared else "", **options),
        "word": lambda name: Feature(
            name, side, "id", SIZES["word"], vocabulary="hash", text=True, table="word" if shared else "", **options
        ),
        "words": lambda name: Feature(name, side, "ids", 5, vocabulary="unknown", nullable=True, **options),
        "number": lambda name: Feature(name, side, "dense", **options),
        "seen": lambda name: Feature(name, side, "count", **options),
        "content": lambda name: Feature(name, side, "vector", size=4, table="content" if shared else "", **options),
        "own": lambda name: Feature(name, side, "vector", size=2, **options),
        "age": lambda name: Feature(name, side, "age", 64, **options),
        "old": lambda name: Feature(name, side, "age", **options),
        "gap": lambda name: Feature(name, side, "gap", draw(st.sampled_from([64, None])), **options),
    }
    return [every[kind](f"{prefix}_{kind}") for kind in sorted(kinds) if kind != "gap" or side == "event"]


@st.composite
def schemas(draw: st.DrawFn, *, trains: bool = False) -> RequestSchema:
    """Schemas whose candidates and events have a film; with labels, and ids of the candidate's own, if they train."""
    histories = draw(st.sampled_from([[], ["clicks"], ["clicks", "buys"], ["clicks", "buys", "views"]]))
    if trains:
        histories = histories or ["clicks"]
    film: dict[str, Any] = {"table_size": SIZES["film"], "table": "film"}
    features = [Feature("film", "candidate", "id", **film), *_features(draw, "candidate", "of", "")]
    if draw(st.booleans()) or trains:
        features += [Feature("user_id", "request", "id", 20), *_features(draw, "request", "my", "")]
        features.append(Feature("film_id", "candidate", "id", SIZES["film"], column="film"))
    for name in histories:
        features.append(Feature(f"{name}_film", "event", "id", history=name, **film))
        features += _features(draw, "event", name, name)
    if draw(st.booleans()):
        features += [Feature("worth", "request", "weight"), Feature("share", "candidate", "weight")]
    features += [Feature(name, "candidate", "label") for name in ("liked", "bought")]
    return RequestSchema("films", tuple(features))


def make_requests(schema: RequestSchema, shapes: Shapes, seed: int) -> list[dict[str, Any]]:
    """Random requests, as mappings."""
    random = np.random.default_rng(seed)

    def entry(feature: Feature) -> Any:
        if feature.kind in ("dense", "count", "weight"):
            return float(np.float32(random.random()))
        if feature.kind == "label":
            return float(random.integers(2))
        if feature.kind == "vector":
            return random.standard_normal(feature.size).astype(np.float32).tolist()
        if feature.kind == "age":
            return NOW - int(2 ** (random.random() * 25))
        size = (feature.table_size or 0) + (3 if feature.vocabulary == "unknown" else 0)

        def one() -> Any:
            if feature.nullable and random.random() < 0.2:
                return None
            number = int(random.integers(size))
            return f"wörd {number}" if feature.text else number

        if feature.kind == "id":
            return one()
        return None if feature.nullable and random.random() < 0.2 else [one() for _ in range(random.integers(4))]

    def entries(feature: Feature, count: int) -> Any:
        if feature.kind == "gap":
            return sorted(NOW - int(second) for second in random.integers(1, 10**6, size=count))
        return [entry(feature) for _ in range(count)]

    requests = []
    for row, (num_events, num_candidates) in enumerate(shapes):
        request: dict[str, Any] = {"request_id": row, "user": int(random.integers(50)), "time": NOW}
        of_history = dict(zip(schema.histories, num_events, strict=False))
        for feature in schema.features:
            if feature.source in request:
                continue
            if feature.side == "request":
                request[feature.source] = entry(feature)
            else:
                count = of_history[feature.history] if feature.side == "event" else num_candidates
                request[feature.source] = entries(feature, count)
        requests.append(request)
    return requests


@st.composite
def shapes(draw: st.DrawFn) -> Shapes:
    """Requests of up to three histories."""
    events = st.lists(st.integers(0, 5), min_size=3, max_size=3)
    return draw(st.lists(st.tuples(events, st.integers(1, 4)), min_size=1, max_size=4))


def rows_of(feature: Feature, value: Any) -> list[int]:
    """Rows of the feature's table that one request, event or candidate reads."""
    ids = value if feature.kind == "ids" else [value]
    rows = []
    for one in ids or []:
        if one is None:
            rows.append(0)
        elif feature.vocabulary == "hash":
            number = int(hash_text([one])[0]) if feature.text else one
            rows.append(int(hash_ids(np.array([number]), feature.table_size or 0)[0]))
        elif feature.vocabulary == "unknown":
            rows.append(one if one < (feature.table_size or 0) else 0)
        else:
            rows.append(one)
    return rows


def seconds_of(feature: Feature, request: dict[str, Any]) -> list[int]:
    """Of each entry of a feature that is a time."""
    times = request[feature.source] if feature.side != "request" else [request[feature.source]]
    if feature.kind == "age":
        return [request["time"] - time for time in times]
    return [time - times[place - 1] if place else 0 for place, time in enumerate(times)]


def entries_of(feature: Feature, request: dict[str, Any]) -> list[Any]:
    """What each request, event or candidate has of a feature: rows of its table, or numbers."""
    if feature.kind in ("age", "gap"):
        seconds = seconds_of(feature, request)
        return [[s.bit_length()] if feature.is_looked_up else [math.log2(1 + s)] for s in seconds]
    values = request[feature.source] if feature.side != "request" else [request[feature.source]]
    if feature.kind == "count":
        return [[math.log2(1 + value)] for value in values]
    if feature.is_looked_up:
        return [rows_of(feature, value) for value in values]
    return [value if feature.kind == "vector" else [value] for value in values]
