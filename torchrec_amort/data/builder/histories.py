"""The steps from logs to histories: which events a request knew, as a range of those of its user.

Requests and events are merged by user and instant, and a window of running sums tells each request how many events came
before. What has the request's instant comes after it, so it never counts. A request has the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torchrec_amort.data.builder.config import BuildConfig, EventsConfig, FeatureConfig
from torchrec_amort.data.builder.steps import (
    MICROSECONDS,
    Step,
    expression,
    key_of,
    quoted,
    table_of,
    up_to_now,
    whether,
)


def keys_of(config: BuildConfig, name: str) -> list[str]:
    """The columns that a request and the events of its history have in common."""
    return ["__user", *map(key_of, config.histories[name].keys)]


def event_features(config: BuildConfig, name: str) -> dict[str, FeatureConfig]:
    """The features of a history's events."""
    return {
        feature_name: feature
        for feature_name, feature in config.features.items()
        if feature.side == "event" and feature.history == name
    }


def history_steps(config: BuildConfig, name: str, is_appended: bool, first: int) -> Iterator[Step]:
    """The events of a history, and the range of each request.

    Args:
        config: what is built.
        name: of the history.
        is_appended: whether there are events of these users already, which are not written again but for what requests
            have of them.
        first: the place of the first event that is written.
    """
    keys = keys_of(config, name)
    partition, length = ", ".join(keys), config.histories[name].length
    parts = [_part(config, name, part, place, is_appended) for place, part in enumerate(config.histories[name].events)]
    yield Step(f"events_{name}", " UNION ALL ".join(parts), True)
    merged = (
        f"SELECT {partition}, __time AS __at, 0 AS __is_event, request_id FROM requests UNION ALL "
        f"SELECT {partition}, __available, 1, NULL FROM {quoted(f'events_{name}')}"
    )
    yield Step(
        f"known_{name}",
        f"SELECT {partition}, request_id, __seen FROM ({seen(merged, partition)}) AS m "
        "WHERE __is_event = 0 AND __seen > 0",
        True,
    )
    # Events that no request has are not written: those before and after all that its user's requests have.
    needed = (
        f"SELECT {partition}, min(__seen - least(__seen, {length})) AS __low, max(__seen) AS __high "
        f"FROM {quoted(f'known_{name}')} GROUP BY {partition}"
    )
    written = "__high - __low"
    yield Step(
        f"places_{name}",
        f"SELECT {partition}, __low, __high, "
        f"CAST(sum({written}) OVER (ORDER BY {partition}) - ({written}) + {first} AS BIGINT) - __low AS __shift "
        f"FROM ({needed}) AS n",
        True,
    )
    same = " AND ".join(f"k.{key} = p.{key}" for key in keys)
    yield Step(
        f"ends_{name}",
        f"SELECT k.request_id, k.__seen, k.__seen + p.__shift AS __stop FROM {quoted(f'known_{name}')} AS k "
        f"JOIN {quoted(f'places_{name}')} AS p ON {same}",
    )


def seen(merged: str, partition: str) -> str:
    """Of each row of a merged log, how many events came before."""
    return f"SELECT *, CAST(sum(__is_event) OVER {up_to_now(partition)} AS BIGINT) AS __seen FROM ({merged}) AS a"


def _part(config: BuildConfig, name: str, part: EventsConfig, place: int, is_appended: bool) -> str:
    history = config.histories[name]
    columns = ["__user", *(f"{quoted(on)} AS {key_of(on)}" for on in history.keys), "__time", "__available"]
    columns += [f"{place} AS __part", *(f"{quoted(order)} AS __order{i}" for i, order in enumerate(history.order))]
    for feature_name, feature in event_features(config, name).items():
        own_time = f"__time // {MICROSECONDS}" if feature.kind in ("age", "gap") else quoted(feature_name)
        given = part.columns.get(feature_name) or feature.of
        columns.append(f"{expression(given) if given else own_time} AS {quoted(feature_name)}")
    wanted = whether(part.where, "__user IN (SELECT __user FROM requests)" if is_appended else None)
    return f"SELECT {', '.join(columns)} FROM {table_of(part.source)}{wanted}"


def events(config: BuildConfig, name: str) -> str:
    """The events of a history that are written, user by user, in the order in which they became available."""
    keys, features = keys_of(config, name), [quoted(feature) for feature in event_features(config, name)]
    order = ["__available", "__time", "__part"]
    order += [f"__order{place}" for place in range(len(config.histories[name].order))]
    place = f"row_number() OVER (PARTITION BY {', '.join(keys)} ORDER BY {', '.join([*order, *features])})"
    placed = f"SELECT {', '.join([*keys, *features])}, {place} AS __place FROM {quoted(f'events_{name}')}"
    same = " AND ".join(f"e.{key} = p.{key}" for key in keys)
    return (
        f"SELECT {', '.join(f'e.{feature}' for feature in features)} FROM ({placed}) AS e "
        f"JOIN {quoted(f'places_{name}')} AS p ON {same} WHERE e.__place > p.__low AND e.__place <= p.__high "
        "ORDER BY e.__place + p.__shift"
    )


def num_written(name: str) -> str:
    """How many events of a history are written."""
    return f"SELECT coalesce(sum(__high - __low), 0) FROM {quoted(f'places_{name}')}"


def lengths(name: str) -> str:
    """How many events each request could know of a history."""
    return (
        f"SELECT coalesce(h.__seen, 0) AS __seen FROM requests AS r LEFT JOIN {quoted(f'known_{name}')} AS h "
        "ON r.request_id = h.request_id"
    )


def same_instant(config: BuildConfig, name: str) -> str:
    """How many requests have events of a history that became available at their very instant."""
    keys = keys_of(config, name)
    of_events = f"SELECT DISTINCT {', '.join(keys)}, __available FROM {quoted(f'events_{name}')}"
    same = " AND ".join(f"r.{key} = e.{key}" for key in keys)
    return f"SELECT count(*) FROM requests AS r JOIN ({of_events}) AS e ON {same} AND r.__time = e.__available"


def late(name: str) -> str:
    """How many events of a history became available after they had happened."""
    return f"SELECT count(*) FROM {quoted(f'events_{name}')} WHERE __available > __time"
