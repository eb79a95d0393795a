import csv
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from torchrec_amort import InputError
from torchrec_amort.data import kuairand
from torchrec_amort.data.kuairand import USER_FEATURES
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.schema import RequestSchema

Row = tuple[int, int, int, int, int, int, int]

SPLITS = ("train", "validation", "test")
LOG_COLUMNS = ("user_id", "video_id", "time_ms", "is_click", "long_view", "is_like", "tab")
LOGS = ("log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv")

HOUR = 3_600_000
APRIL_25 = 1_650_816_000_000  # midnight in Beijing
# Ten exposures but for the repetition, in no order; train has 8 of them, up to hour 4.
FIRST_LOG: list[Row] = [
    (5, 20, APRIL_25, 1, 0, 0, 1),
    (7, 20, APRIL_25 + 1 * HOUR, 1, 1, 0, 0),
    (5, 22, APRIL_25, 0, 0, 1, 2),
    (5, 22, APRIL_25 + 23 * HOUR, 0, 1, 0, 14),
    (7, 22, APRIL_25 + 3 * HOUR, 0, 0, 0, 4),
    (7, 20, APRIL_25 + 3 * HOUR, 0, 0, 0, 4),
]
SECOND_LOG: list[Row] = [
    (5, 20, APRIL_25, 0, 1, 1, 3),
    (8, 23, APRIL_25 + 5 * HOUR, 1, 0, 0, 1),
    (5, 20, APRIL_25 + 4 * HOUR, 1, 0, 0, 1),
    (5, 21, APRIL_25 + 4 * HOUR, 1, 0, 0, 1),
    (5, 21, APRIL_25 + 2 * HOUR, 0, 0, 0, 1),
]
VIDEOS = [
    ("video_id", "author_id", "video_type", "upload_type", "video_duration", "music_type", "tag"),
    ("20", "900", "NORMAL", "Web", "10500.0", "9.0", "39,6"),
    ("21", "100", "AD", "LongImport", "", "", ""),
    ("22", "900", "NORMAL", "LongImport", "5000000.0", "11.0", "6"),
]


def write_csv(path: Path, rows: list[tuple[Any, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_source(folder: Path, *logs: list[Row]) -> Path:
    """A folder as published, with users 5 and 7 and videos 20 to 22."""
    folder.mkdir(exist_ok=True)
    for name, log in zip(LOGS, logs, strict=False):
        write_csv(folder / name, [LOG_COLUMNS, *log])
    degrees = {5: "high_active", 7: "full_active"}
    others = {5: [str(place) for place in range(1, 19)], 7: [""] * 18}
    users = [(user, degree, *others[user]) for user, degree in degrees.items()]
    write_csv(folder / "user_features_pure.csv", [("user_id", *USER_FEATURES), *users])
    write_csv(folder / "video_features_basic_pure.csv", VIDEOS)
    return folder


def write_sequences(folder: Path, *sequences: tuple[int, int, list[int], list[int], list[int]]) -> None:
    names = ("user_id", "last_time_ms", "watch_seq", "like_seq", "long_watch_seq")
    columns = dict(zip(names, map(list, zip(*sequences, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / "user_sequences_upto_20220424.parquet")


def requests_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [row for part in sorted((folder / split).iterdir()) for row in pq.read_table(part).to_pylist()]
        for split in SPLITS
    }


def prepared(source: Path, histories: kuairand.Histories = "one") -> list[dict[str, Any]]:
    """All requests in order of time."""
    kuairand.prepare(source, source / "out", overwrite=True, histories=histories, history_until="request")
    return [row for requests in requests_of(source / "out").values() for row in requests]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_source(tmp_path / "source", FIRST_LOG, SECOND_LOG)
    write_sequences(folder, (5, APRIL_25 - 1, [20, 21], [21, 22], [20]), (6, APRIL_25 + HOUR, [22], [], []))
    return folder


def test_exposures_of_one_millisecond_become_a_request(source: Path) -> None:
    requests = prepared(source)
    assert [(row["user"], row["time"] - APRIL_25 // 1000, len(row["candidate_item"])) for row in requests] == [
        (5, 0, 2), (7, 3600, 1), (5, 7200, 1), (7, 10_800, 2), (5, 14_400, 2), (8, 18_000, 1), (5, 82_800, 1),
    ]  # fmt: skip
    assert [len(rows) for rows in requests_of(source / "out").values()] == [5, 1, 1]
    assert [row["request_id"] for row in requests] == list(range(7))
    features = {"user_active_degree": 2, **dict.fromkeys(USER_FEATURES[1:], 1)}
    assert requests[0] == features | {
        "request_id": 0,
        "user": 5,
        "time": APRIL_25 // 1000,
        "user_id": 1,
        "hour": 0,
        "tab": 1,
        # Videos 20, 21 and 22 are in train. The repetition in the second log does not count.
        "candidate_item": [1, 3],
        "author_id": [2, 2],
        "video_type": [2, 2],
        "upload_type": [2, 1],
        "music_type": [2, 1],
        # 10 seconds have 4 bits, 5,000 have 13 and fall into the last bucket.
        "duration": [5, 13],
        "tag": [[1, 2], [2]],
        "history_item": [1, 2],
        "history_click": [0, 0],
        "history_long_view": [1, 0],
        "history_like": [0, 1],
        "click": [1.0, 0.0],
        "long_view": [0.0, 0.0],
        "like": [0.0, 1.0],
    }


def test_a_history_goes_on_from_the_sequence_with_what_came_of_each_exposure(source: Path) -> None:
    last = prepared(source)[-1]
    assert last["history_item"] == [1, 2, 1, 3, 2, 1, 2]
    assert last["history_click"] == [0, 0, 2, 1, 1, 2, 2]
    assert last["history_long_view"] == [1, 0, 0, 0, 0, 0, 0]
    assert last["history_like"] == [0, 1, 0, 1, 0, 0, 0]
    assert (last["hour"], last["tab"], last["long_view"]) == (23, 14, [1.0])
    kuairand.prepare(source, source / "short", history_length=3, history_until="request")
    assert requests_of(source / "short")["test"][-1]["history_item"] == [2, 1, 2]


def test_separate_histories_are_of_what_was_clicked_what_was_viewed_long_and_all_that_was_shown(source: Path) -> None:
    requests = prepared(source, "separate")
    last = requests[-1]
    assert {name: last[f"{name}_item"] for name in ("clicked", "long_viewed", "shown")} == {
        "clicked": [1, 1, 2],
        "long_viewed": [1],
        "shown": [1, 2, 1, 3, 2, 1, 2],
    }
    hours = {name: [(time - APRIL_25 // 1000) / 3600 for time in last[f"{name}_time"]] for name in ("clicked", "shown")}
    assert hours["clicked"] == [0, 4, 4]
    # Events of the sequence have the time of its end, a second before.
    assert hours["shown"] == [-1 / 3600, -1 / 3600, 0, 0, 2, 4, 4]
    assert last["long_viewed_time"] == [APRIL_25 // 1000 - 1]
    assert (requests[0]["candidate_video"], requests[0]["click"]) == ([1, 3], [1.0, 0.0])
    kuairand.prepare(source, source / "short", history_length=2, histories="separate", history_until="request")
    short = requests_of(source / "short")["test"][-1]
    assert [short[f"{name}_item"] for name in ("clicked", "long_viewed", "shown")] == [[1, 2], [1], [1, 2]]


def test_events_of_all_histories_and_a_feature_of_candidates_share_a_table_of_videos(source: Path) -> None:
    prepared(source, "separate")
    schema = RequestSchema.load(source / "out")
    assert list(schema.histories) == ["clicked", "long_viewed", "shown"]
    of_videos = {
        f.name: (f.table, f.table_size, f.source) for f in schema.features if f.kind == "id" and f.table_size == 4
    }
    assert of_videos == {
        "video_id": ("video_id", 4, "candidate_video"),
        **{name: ("video", 4, name) for name in ("candidate_video", "clicked_item", "long_viewed_item", "shown_item")},
    }
    (batch,) = RequestDataset(source / "out", "train", batch_size=5, num_lanes=1, seed=None)
    assert batch.sequences["candidate_video"].values().tolist() == batch.candidate_sparse["video_id"].values().tolist()
    assert batch.sequences["clicked_item"].lengths().tolist() == [0, 0, 1, 1, 1]
    # The last request is 4 hours after the click: 14,400 has 14 bits. An event's gap is to the one before.
    assert batch.sequences["clicked_age"].values().tolist()[-1] == 14
    assert batch.sequences["shown_gap"].values().tolist()[-5:] == [0, 0, 1, 0, 13]


def test_what_is_not_known_has_id_0(source: Path) -> None:
    requests = prepared(source)
    new = requests[5]
    assert {new[name] for name in ("user_id", *USER_FEATURES)} == {0}
    assert [new[name] for name in ("candidate_item", "author_id", "video_type", "duration")] == [[0]] * 4
    assert new["tag"] == [[]]
    assert new["history_item"] == []
    with_missing = requests[1]
    assert (with_missing["user_id"], with_missing["user_active_degree"], with_missing["onehot_feat4"]) == (2, 1, 0)
    video_21 = requests[2]
    assert [video_21[name] for name in ("author_id", "music_type", "duration", "tag")] == [[1], [0], [0], [[]]]


def test_tables_have_a_row_for_each_value_and_one_for_the_missing(source: Path) -> None:
    prepared(source)
    sizes = RequestSchema.load(source / "out").table_sizes
    expected = {"user_id": 3, "hour": 24, "tab": 15, "user_active_degree": 3, "onehot_feat11": 2, "video_id": 4}
    expected |= {"author_id": 3, "video_type": 3, "upload_type": 3, "music_type": 3, "duration": 14, "tag": 3}
    expected |= {"candidate_item": 4, "history_item": 4, "history_click": 3, "history_long_view": 2, "history_like": 2}
    assert expected.items() <= sizes.items()
    assert sizes.keys() == expected.keys() | set(USER_FEATURES)
    assert RequestSchema.load(source / "out").labels == ("click", "long_view", "like")


def test_an_exposure_that_ends_the_users_sequence_is_not_told_twice(source: Path) -> None:
    write_sequences(source, (7, APRIL_25 + 1 * HOUR, [22, 20], [], []))
    requests = [row for row in prepared(source) if row["user"] == 7]
    assert [row["candidate_item"] for row in requests] == [[3, 1]]
    assert [row["history_item"] for row in requests] == [[3, 1]]
    assert [row["history_click"] for row in requests] == [[0, 0]]


def test_only_the_standard_log_is_read(source: Path) -> None:
    expected = prepared(source)
    for name in ("log_random_4_22_to_5_08_pure.csv", "video_features_statistic_pure.csv", "item_features.parquet"):
        (source / name).write_text("not to be read")
    assert prepared(source) == expected


def test_logs_may_be_parquet_with_more_columns_and_lie_in_the_folder_data(source: Path, tmp_path: Path) -> None:
    expected = prepared(source)
    for path in source.glob("log_standard_*.csv"):
        table = pa.csv.read_csv(path).append_column(
            "watch_ratio", pa.array(np.zeros(len(path.read_text().split()) - 1))
        )
        pq.write_table(table.cast(table.schema.set(6, pa.field("tab", pa.int8()))), path.with_suffix(".parquet"))
        path.unlink()
    assert prepared(source) == expected
    (tmp_path / "KuaiRand-Pure").mkdir()
    source.rename(tmp_path / "KuaiRand-Pure" / "data")
    assert prepared(tmp_path / "KuaiRand-Pure") == expected


def test_quoted_names_of_columns_are_read(source: Path) -> None:
    expected = prepared(source)
    for path in source.glob("*.csv"):
        header, *rows = path.read_text().splitlines()
        path.write_text("\n".join([",".join(f'"{name}"' for name in header.split(",")), *rows]))
    assert prepared(source) == expected


def random_log(seed: int, rows: int = 600) -> list[Row]:
    """Exposures of 3 users: some in one millisecond, some repeated, and histories of more than 100."""
    random = np.random.default_rng(seed)
    columns = [random.integers(5, 8, rows), random.integers(20, 40, rows), random.integers(0, 1000, rows)]
    labels = random.integers(0, 2, (rows, 3))
    return [
        (int(user), int(video), APRIL_25 + int(time), int(click), int(long_view), int(like), 1)
        for user, video, time, (click, long_view, like) in zip(*columns, labels, strict=True)
    ]


@pytest.mark.parametrize(("place", "histories"), [(0, "one"), (300, "one"), (599, "one"), (300, "separate")])
def test_labels_at_and_after_a_request_change_none_of_its_inputs(
    tmp_path: Path, place: int, histories: kuairand.Histories
) -> None:
    log = random_log(seed=place)
    time = sorted(row[2] for row in log)[place]
    flipped: list[Row] = [
        (*row[:3], 1 - row[3], 1 - row[4], 1 - row[5], row[6]) if row[2] >= time else row for row in log
    ]
    before = prepared(write_source(tmp_path / "before", log), histories)
    after = prepared(write_source(tmp_path / "after", flipped), histories)
    until = len({(user, moment) for user, _, moment, *_ in log if moment <= time})
    assert all(
        after[until - 1][label] == [1 - value for value in before[until - 1][label]] for label in kuairand.LABELS
    )
    for row in before + after:
        for label in kuairand.LABELS:
            row.pop(label)
    assert before[:until] == after[:until]
    assert place == 599 or before[until:] != after[until:]


# What an event is: its video, what came of it, and its second.
Event = tuple[int, ...]
# Which events each history has.
KEPT: dict[kuairand.Histories, dict[str, Callable[[Event], bool]]] = {
    "one": {"history": lambda event: True},
    "separate": {
        "clicked": lambda event: event[1] == 2,
        "long_viewed": lambda event: event[2] == 1,
        "shown": lambda event: True,
    },
}
# The columns of a history, and their places in an event.
PLACES: dict[kuairand.Histories, dict[str, int]] = {
    "one": {"item": 0, "click": 1, "long_view": 2, "like": 3},
    "separate": {"item": 0, "time": 4},
}


def recount(log: list[Row], sequences: list[dict[str, Any]], histories: kuairand.Histories) -> list[dict[str, Any]]:
    """The requests in order of time, by another way than `kuairand` goes."""
    past: defaultdict[int, list[Event]] = defaultdict(list)
    seen = set()
    for told in sequences:
        long_viewed, liked, end = set(told["long_watch_seq"]), set(told["like_seq"]), told["last_time_ms"]
        past[told["user_id"]] = [
            (video, 0, video in long_viewed, video in liked, end // 1000) for video in told["watch_seq"]
        ]
        seen.add((told["user_id"], told["watch_seq"][-1], end))
    shown = defaultdict(list)
    for user, video, time, click, long_view, like, tab in log:
        if (user, video, time) not in seen:
            seen.add((user, video, time))
            shown[time, user].append((video, click, long_view, like, tab))
    requests = []
    for time, user in sorted(shown):
        videos, clicks, long_views, likes, tabs = zip(*shown[time, user], strict=True)
        labels = {"click": clicks, "long_view": long_views, "like": likes}
        of_user = {
            name: [event for event in past[user] if is_kept(event)][-100:] for name, is_kept in KEPT[histories].items()
        }
        requests.append({"user": user, "time": time, "tab": tabs[0], "videos": videos, "histories": of_user, **labels})
        past[user] += [(video, 1 + click, *rest, time // 1000) for video, click, *rest, _ in shown[time, user]]
    return requests


def assert_same(folder: Path, expected: list[dict[str, Any]], histories: kuairand.Histories) -> None:
    """Refuse a prepared folder that does not hold the requests counted."""
    ends = np.cumsum([len(request["videos"]) for request in expected])
    bounds = [0, *(int((ends <= share * ends[-1]).sum()) for share in (0.8, 0.9, 1))]
    train = expected[: bounds[1]]
    users = {user: place for place, user in enumerate(sorted({request["user"] for request in train}), start=1)}
    of_train = {video for request in train for video in request["videos"]}
    of_train |= {event[0] for request in train for events in request["histories"].values() for event in events}
    items = {video: place for place, video in enumerate(sorted(of_train), start=1)}
    item = "candidate_item" if histories == "one" else "candidate_video"
    names = ["user", "user_id", "time", "hour", "tab", item, *kuairand.LABELS]
    names += [f"{history}_{what}" for history in KEPT[histories] for what in PLACES[histories]]
    for split, start, stop in zip(SPLITS, bounds, bounds[1:], strict=False):
        table = pq.read_table(folder / split)
        assert table.num_rows == stop - start
        columns = [table[name].to_pylist() for name in names]
        for values, request in zip(zip(*columns, strict=True), expected[start:stop], strict=True):
            user, seconds = request["user"], request["time"] // 1000
            assert values == (
                *(user, users.get(user, 0), seconds, (seconds // 3600 + 8) % 24, request["tab"]),
                [items.get(video, 0) for video in request["videos"]],
                *(list(request[label]) for label in kuairand.LABELS),
                *(
                    [event[place] if place else items.get(event[0], 0) for event in events]
                    for events in request["histories"].values()
                    for place in PLACES[histories].values()
                ),
            )


@pytest.mark.parametrize("histories", ["one", "separate"])
@pytest.mark.parametrize("seed", range(3))
def test_requests_are_what_a_plain_recount_tells(tmp_path: Path, seed: int, histories: kuairand.Histories) -> None:
    log = random_log(seed)
    sequences = [(user, APRIL_25 - 1, [20 + user, 50, 21, 50], [50], [21, 99]) for user in (5, 7, 9)]
    source = write_source(tmp_path / "source", log[:200], log[200:])
    write_sequences(source, *sequences)
    kuairand.prepare(source, tmp_path / "out", histories=histories, history_until="request")
    told = pq.read_table(next(source.glob("*.parquet"))).to_pylist()
    requests = recount(log, told, histories)
    lengths = [max(len(request["histories"][name]) for request in requests) for name in KEPT[histories]]
    assert lengths == [100] * len(lengths)
    assert max(len(request["videos"]) for request in requests) > 1
    assert_same(tmp_path / "out", requests, histories)


@pytest.mark.parametrize("histories", ["one", "separate"])
def test_histories_may_be_as_of_the_start_of_the_split(tmp_path: Path, histories: kuairand.Histories) -> None:
    log = random_log(0)
    source = write_source(tmp_path / "source", log)
    write_sequences(source, (5, APRIL_25 - 1, [20, 50, 21], [50], [21]))
    kuairand.prepare(source, tmp_path / "out", histories=histories)
    told = pq.read_table(next(source.glob("*.parquet"))).to_pylist()
    requests = recount(log, told, histories)
    sizes = [pq.read_table(tmp_path / "out" / split).num_rows for split in SPLITS]
    for begin, end in pairwise(np.cumsum(sizes).tolist()):
        start = requests[begin]["time"]
        for request in requests[begin:end]:
            others = [row for row in log if row[2] < start]
            itself = [row for row in log if (row[0], row[2]) == (request["user"], request["time"])]
            request["histories"] = recount([*others, *itself], told, histories)[-1]["histories"]
    assert_same(tmp_path / "out", requests, histories)
    assert requests != recount(log, told, histories)


@pytest.fixture(scope="module")
def drawn(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The public subset, of one user in 30 only."""
    source, folder = shared_data / "kuairand-pure", tmp_path_factory.mktemp("kuairand")
    if not source.is_dir():
        pytest.skip(f"no {source}")
    for path in source.glob("*_features_*.csv"):
        (folder / path.name).symlink_to(path)
    rows = 0
    for path in (*source.glob("log_standard_*"), *source.glob("user_sequences_*")):
        table = pq.read_table(path)
        rows += table.num_rows if path.name.startswith("log") else 0
        is_drawn = table["user_id"].to_numpy() % 30 == 3
        pq.write_table(table.filter(pa.array(is_drawn)), folder / path.name)
    assert rows == 228_329
    return folder


@pytest.mark.parametrize("histories", ["one", "separate"])
def test_users_of_the_public_subset_have_what_a_plain_recount_tells(
    drawn: Path, tmp_path: Path, histories: kuairand.Histories
) -> None:
    kuairand.prepare(drawn, tmp_path / "out", histories=histories, history_until="request")
    logs = pa.concat_tables(
        pq.read_table(path, columns=list(LOG_COLUMNS)) for path in sorted(drawn.glob("log_standard_*"))
    )
    rows: list[Row] = list(zip(*(logs[name].to_pylist() for name in LOG_COLUMNS), strict=True))
    sequences = pq.read_table(next(drawn.glob("user_sequences_*"))).to_pylist()
    assert_same(tmp_path / "out", recount(rows, sequences, histories), histories)


def test_prepared_requests_are_read_as_batches(source: Path) -> None:
    prepared(source)
    (batch,) = RequestDataset(source / "out", "train", batch_size=5, num_lanes=1, seed=None)
    assert batch.num_candidates.tolist() == [2, 1, 1, 2, 2]
    assert batch.labels is not None and batch.labels[:3].tolist() == [[1, 0, 0], [0, 0, 1], [1, 1, 0]]
    assert batch.candidate_sparse["tag"].lengths().tolist() == [2, 1, 2, 0, 1, 2, 2, 0]
    assert batch.sequences["history_click"].lengths().tolist() == [2, 0, 4, 1, 5]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("is_click", "2", r"log_standard_4_22.*\.csv: line 4: is_click is 2, not a number from 0 to 1"),
        ("is_like", "", r"log_standard_4_22.*\.csv: line 4: is_like is empty, not a number from 0 to 1"),
        ("long_view", "-1", r"log_standard_4_22.*\.csv: line 4: long_view is -1, not a number from 0 to 1"),
        ("tab", "15", r"log_standard_4_22.*\.csv: line 4: tab is 15, not a number from 0 to 14"),
        ("time_ms", "soon", r"log_standard_4_22.*\.csv: not as KuaiRand-Pure is published \(.*Row #4.*'soon'"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(source: Path, column: str, value: str, message: str) -> None:
    rows: list[list[Any]] = [list(row) for row in SECOND_LOG]
    rows[2][LOG_COLUMNS.index(column)] = value
    write_csv(source / LOGS[1], [LOG_COLUMNS, *map(tuple, rows)])
    with pytest.raises(InputError, match=message):
        prepared(source)


def test_a_bad_row_of_a_parquet_file_is_refused_by_its_number(source: Path) -> None:
    write_sequences(source, (5, APRIL_25 - 1, [20, 21], [], []), (7, APRIL_25 - 1, [20, -1], [], []))
    with pytest.raises(InputError, match=r"user_sequences_.*\.parquet: row 1: watch_seq is -1, not a number from 0"):
        prepared(source)


@pytest.mark.parametrize("name", ["user_features_pure.csv", "video_features_basic_pure.csv", LOGS[0]])
def test_a_missing_file_or_column_is_named(source: Path, name: str) -> None:
    with (source / name).open() as file:
        rows = [tuple(row) for row in csv.reader(file)]
    write_csv(source / name, [row[:-1] for row in rows])
    with pytest.raises(InputError, match=rf"{name}: column '{rows[0][-1]}' is missing"):
        prepared(source)
    for path in source.glob(name.replace("4_08_to_4_21", "*")):
        path.unlink()
    with pytest.raises(InputError, match=rf"{name}: no such file|no log_standard_\*\.csv or log_standard_\*\.parquet"):
        prepared(source)


def test_sources_that_do_not_fit_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"kuairand\.com"):
        kuairand.prepare(None, tmp_path / "out")
    with pytest.raises(InputError, match=r"histories is 'two', not one of 'one', 'separate'"):
        kuairand.prepare(source, tmp_path / "out", histories="two")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"nowhere: no log_standard_"):
        kuairand.prepare(tmp_path / "nowhere", tmp_path / "out")
    write_sequences(source, (5, APRIL_25, [21, 20], [], []))
    with pytest.raises(
        InputError, match=rf"last_time_ms of user 5 is {APRIL_25}, but .* exposure at {APRIL_25}, which"
    ):
        prepared(source)
    (source / "user_sequences_2.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"has 2 files user_sequences_\*\.parquet, not 1 or none"):
        prepared(source)
