"""Requests whose candidates are not known yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from torchrec_amort.errors import InputError
from torchrec_amort.schema import KINDS_NOT_READ, Feature, RequestSchema


def with_a_candidate(
    requests: pa.Table | Iterable[Mapping[str, Any]], schema: RequestSchema
) -> pa.Table | list[Mapping[str, Any]]:
    """The requests, each with one candidate that stands for those to come: of ids 0 and numbers 0.

    Args:
        requests: without any column of candidates.
        schema: of the requests.

    Raises:
        InputError: a column of candidates is there.

    Example::

        with_a_candidate([{"user_id": 7, "history_item": [3, 4]}], schema)
    """
    features = [feature for feature in schema.of("candidate") if feature.kind not in KINDS_NOT_READ]
    blank = {feature.source: [_blank(feature)] for feature in features}
    rows = requests if isinstance(requests, pa.Table) else list(requests)
    names = rows.column_names if isinstance(rows, pa.Table) else {name for row in rows for name in row}
    if there := [name for name in blank if name in names]:
        raise InputError(f"requests: {there[0]!r} is of candidates, which come later: leave it out, or score them")
    if not isinstance(rows, pa.Table):
        return [{**row, **blank} for row in rows]
    for name, value in blank.items():
        kind = schema.arrow_schema().field(name).type
        rows = rows.append_column(name, pa.array([value] * len(rows), kind))
    return rows


def _blank(feature: Feature) -> Any:
    if feature.kind == "ids":
        return []
    if feature.kind == "vector":
        return [0.0] * (feature.size or 0)
    return "" if feature.text else 0
