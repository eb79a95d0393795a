from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from torchrec_amort import InputError
from torchrec_amort.data import mind
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.schema import RequestSchema

SPLITS = ("train", "validation", "test")

# Ten candidates in order of time: train is those up to 8, that is lines 3, 1 and 4; then 2, then 5.
LINES = [
    "10\tU7\t11/15/2019 8:00:01 AM\tN1 N2\tN3-0 N4-1 N5-0",
    "11\tU9\t11/15/2019 1:00:00 PM\tN1\tN9-1",
    "12\tU3\t11/15/2019 12:30:00 AM\tN2 N1\tN4-1 N3-0",
    "13\tU7\t11/15/2019 8:00:01 AM\t\tN6-1 N1-0 N4-0",
    "14\tU3\t11/15/2019 11:59:59 PM\tN2 N9 N1\tN6-0",
]
NOVEMBER_15 = 1_573_776_000


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def requests_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        split: pq.read_table(folder / split).to_pylist() if any((folder / split).iterdir()) else [] for split in SPLITS
    }


def prepared(tmp_path: Path, lines: list[str]) -> dict[str, list[dict[str, Any]]]:
    mind.prepare(write(tmp_path / "behaviors.tsv", lines), tmp_path / "out", overwrite=True)
    return requests_of(tmp_path / "out")


def test_lines_become_requests_in_order_of_time(tmp_path: Path) -> None:
    splits = prepared(tmp_path, LINES)
    day = NOVEMBER_15
    # U3 is user 1, U7 2, U9 3; news in order of train's histories, then candidates: N2 N1 | N4 N3 N5 N6.
    assert splits["train"] == [
        {"request_id": 0, "user": 1, "time": day + 1800, "user_id": 1, "hour": 0}
        | {"candidate_item": [3, 4], "history_item": [1, 2], "click": [1.0, 0.0]},
        {"request_id": 1, "user": 2, "time": day + 28_801, "user_id": 2, "hour": 8}
        | {"candidate_item": [4, 3, 5], "history_item": [2, 1], "click": [0.0, 1.0, 0.0]},
        {"request_id": 2, "user": 2, "time": day + 28_801, "user_id": 2, "hour": 8}
        | {"candidate_item": [6, 2, 3], "history_item": [], "click": [1.0, 0.0, 0.0]},
    ]
    # Neither U9 nor N9 is in train.
    assert splits["validation"] == [
        {"request_id": 3, "user": 3, "time": day + 46_800, "user_id": 0, "hour": 13}
        | {"candidate_item": [0], "history_item": [2], "click": [1.0]},
    ]
    assert splits["test"] == [
        {"request_id": 4, "user": 1, "time": day + 86_399, "user_id": 1, "hour": 23}
        | {"candidate_item": [6], "history_item": [1, 0, 2], "click": [0.0]},
    ]


def test_lines_of_one_second_keep_the_files_order(tmp_path: Path) -> None:
    lines = [f"{n}\tU{n}\t11/15/2019 {1 + n % 2}:00:00 AM\tN1\tN{n}-0" for n in range(100)]
    train = prepared(tmp_path, lines)["train"]
    # News N1 is 1, then the even ones come, from 0.
    assert [row["candidate_item"] for row in train[:50]] == [[2 + n] for n in range(50)]


def test_tables_have_a_row_for_each_user_and_news_of_train_and_one_for_the_unknown(tmp_path: Path) -> None:
    prepared(tmp_path, LINES)
    sizes = {"user_id": 3, "hour": 24, "news_id": 7, "candidate_item": 7, "history_item": 7}
    assert RequestSchema.load(tmp_path / "out").table_sizes == sizes


def test_a_history_keeps_its_latest_500(tmp_path: Path) -> None:
    history = " ".join(f"N{number}" for number in range(501))
    splits = prepared(tmp_path, [f"1\tU1\t1/1/2019 12:01:02 AM\t{history}\tN9000-1"] * 10)
    # N0 is not in any kept history, so N1 is the first news.
    assert splits["train"][0]["history_item"] == list(range(1, 501))
    assert splits["train"][0]["candidate_item"] == [501]
    mind.prepare(tmp_path / "behaviors.tsv", tmp_path / "all", history_length=501)
    assert RequestSchema.load(tmp_path / "all").table_sizes["history_item"] == 1 + 501 + 1


def test_a_folder_with_the_file_is_a_source_too(tmp_path: Path) -> None:
    write(tmp_path / "behaviors.tsv", LINES)
    assert mind.prepare(tmp_path, tmp_path / "out") == {
        "train": {"requests": 3, "candidates": 8, "users": 2},
        "validation": {"requests": 1, "candidates": 1, "users": 1},
        "test": {"requests": 1, "candidates": 1, "users": 1},
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("11\tU1\t11/15/2019 8:00:01 AM\tN1", r"not as MIND is published \(.*Row #2: Expected 5 columns, got 4"),
        ("", r"line 2: user_id is '', not a name"),
        ("11\t\t11/15/2019 8:00:01 AM\tN1\tN3-0", r"line 2: user_id is '', not a name"),
        ("11\tU1\t11/15/2019 13:00:01 AM\tN1\tN3-0", r"line 2: time is '11/15/2019 13:00:01 AM', not M/D/YYYY"),
        ("11\tU1\t2019-11-15 08:00:01\tN1\tN3-0", r"line 2: time is '2019-11-15 08:00:01', not M/D/YYYY"),
        ("11\tU1\t\tN1\tN3-0", r"line 2: time is '', not M/D/YYYY"),
        ("11\tU1\t11/15/2019 8:00:01 AM\tN1\t", r"line 2: impressions is '', not items with their labels"),
        (
            "11\tU1\t11/15/2019 8:00:01 AM\tN1\tN3-0 N4-2",
            r"line 2: impressions is 'N4-2', not items with their labels",
        ),
        ("11\tU1\t11/15/2019 8:00:01 AM\tN1\tN3 N4", r"line 2: impressions is 'N3', .*test set has no labels"),
        ("11\tU1\t11/15/2019 8:00:01 AM\tN1\tN3-0  N4-1", r"line 2: impressions is '', not items"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "behaviors.tsv", [LINES[0], line, LINES[1]])
    with pytest.raises(InputError, match=rf"behaviors\.tsv: .*{message}"):
        mind.read_behaviors(path)


def test_sources_that_are_not_mind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"msnews\.github\.io"):
        mind.prepare(None, tmp_path / "out")
    with pytest.raises(InputError, match=r"nowhere: no such file: give MIND's behaviors\.tsv"):
        mind.read_behaviors(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"behaviors\.tsv: no such file"):
        mind.read_behaviors(tmp_path)
    with pytest.raises(InputError, match=r"behaviors\.tsv: not as MIND is published \(Empty CSV file\)"):
        mind.read_behaviors(write(tmp_path / "behaviors.tsv", []))


def test_prepared_requests_are_read_as_batches(tmp_path: Path) -> None:
    prepared(tmp_path, LINES)
    (batch,) = RequestDataset(tmp_path / "out", "train", batch_size=3, num_lanes=1, seed=None)
    assert batch.num_candidates.tolist() == [2, 3, 3]
    assert batch.candidate_sparse["news_id"].values().tolist() == [3, 4, 4, 3, 5, 6, 2, 3]
    assert batch.sequences["history_item"].lengths().tolist() == [2, 2, 0]
    assert batch.labels is not None and batch.labels.flatten().tolist() == [1, 0, 0, 1, 0, 1, 0, 0]


@pytest.fixture(scope="module")
def public(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The public subset of MIND, and what it becomes."""
    source = shared_data / "mind-small-train-5000" / "behaviors.tsv"
    if not source.is_file():
        pytest.skip(f"no {source}")
    out = tmp_path_factory.mktemp("mind") / "out"
    mind.prepare(source, out)
    return source, out


def test_the_public_subset_is_what_a_plain_recount_tells(public: tuple[Path, Path]) -> None:
    source, out = public
    lines = sorted(
        (line.split("\t") for line in source.read_text().splitlines()),
        key=lambda line: datetime.strptime(line[2], "%m/%d/%Y %I:%M:%S %p"),
    )
    rows = [row for requests in requests_of(out).values() for row in requests]
    user_of: dict[str, int] = {}
    news_of: dict[str, int] = {}
    for row, (_, user, time, history, impressions) in zip(rows, lines, strict=True):
        shown = [entry.split("-") for entry in impressions.split()]
        moment = datetime.strptime(time, "%m/%d/%Y %I:%M:%S %p").replace(tzinfo=timezone.utc)
        assert (row["time"], row["hour"]) == (moment.timestamp(), moment.hour)
        assert row["click"] == [float(label) for _, label in shown]
        assert user_of.setdefault(user, row["user"]) == row["user"]
        ids = row["history_item"] + row["candidate_item"]
        for name, item in zip([*history.split(), *(name for name, _ in shown)], ids, strict=True):
            assert news_of.setdefault(name, item) == item
    assert len(set(user_of.values())) == len(user_of)
    known = Counter(item for item in news_of.values() if item)
    assert known == dict.fromkeys(range(1, len(known) + 1), 1)


def test_the_public_subset_has_its_known_counts(public: tuple[Path, Path]) -> None:
    rows = [row for requests in requests_of(public[1]).values() for row in requests]
    assert len(rows) == 5_000
    assert sum(len(row["candidate_item"]) for row in rows) == 189_359
    assert sum(sum(row["click"]) for row in rows) == 7_542
    assert sum(not row["history_item"] for row in rows) == 107


def test_only_the_public_subsets_train_makes_its_vocabulary(public: tuple[Path, Path]) -> None:
    splits = requests_of(public[1])
    shares = [sum(len(row["candidate_item"]) for row in splits[split]) / 189_359 for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.002)
    sizes = RequestSchema.load(public[1]).table_sizes
    in_train = {item for row in splits["train"] for item in row["history_item"] + row["candidate_item"]}
    assert in_train == set(range(1, sizes["candidate_item"]))
    users_of_train = {row["user"] for row in splits["train"]}
    assert {row["user_id"] for row in splits["train"]} == users_of_train == set(range(1, sizes["user_id"]))
    for row in splits["validation"] + splits["test"]:
        assert row["user_id"] == (row["user"] if row["user"] in users_of_train else 0)
