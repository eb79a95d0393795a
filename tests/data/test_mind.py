import re
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_amort import InputError
from torchrec_amort.data import mind
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.hashing import hash_text
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


def news_line(name: str, category: str, subcategory: str, title: str, abstract: str = "") -> str:
    return "\t".join([name, category, subcategory, title, abstract, f"https://news/{name}", "[]", "[]"])


# Neither N5, which is in train, nor N9 is there; N7 is in no request; N6's category is missing.
NEWS = [
    news_line("N1", "sports", "nfl", 'The "Bears" won, at 1st', "Don't ask: the Bears, ÉTÉ 2019"),
    news_line("N2", "news", "local", "Rain"),
    news_line("N3", "sports", "nba", "!?", "..."),
    news_line("N4", "news", "world", "Sun", "Rain then sun and sun"),
    news_line("N6", "", "nfl", "Züge und Bären"),
    news_line("N7", "autos", "cars", "Cars"),
]


def bag_of(text: str) -> list[float]:
    """The hashed bag of words, by a plain loop."""
    sums = [0.0] * 64
    for word in re.findall(r"[^\W_]+", text.lower()):
        bits = int(hash_text([word])[0]) % 2**64
        sums[bits % 64] += -1.0 if bits >= 2**63 else 1.0
    length = sum(number**2 for number in sums) ** 0.5
    return [number / (length or 1.0) for number in sums]


def folder_of(tmp_path: Path, lines: list[str], news: list[str]) -> Path:
    write(tmp_path / "behaviors.tsv", lines)
    write(tmp_path / "news.tsv", news)
    return tmp_path


def test_news_give_candidates_and_events_categories_and_bags_of_their_words(tmp_path: Path) -> None:
    mind.prepare(folder_of(tmp_path, LINES, NEWS), tmp_path / "out")
    told = {line.split("\t")[0]: line.split("\t") for line in NEWS}
    # Of train's news in order of their first appearance, N2 N1 N4 N3 N5 N6.
    category = {"news": 1, "sports": 2}
    subcategory = {"local": 1, "nfl": 2, "world": 3, "nba": 4}
    lines = [LINES[place].split("\t") for place in (2, 0, 3, 1, 4)]
    rows = [row for requests in requests_of(tmp_path / "out").values() for row in requests]
    for row, line in zip(rows, lines, strict=True):
        shown = [entry.split("-")[0] for entry in line[4].split()]
        for side, names in (("candidate", shown), ("history", line[3].split())):
            of_news = [told.get(name, [""] * 8) for name in names]
            assert row[f"{side}_category"] == [category.get(news[1], 0) for news in of_news]
            assert row[f"{side}_subcategory"] == [subcategory.get(news[2], 0) for news in of_news]
            expected = np.array([bag_of(f"{news[3]} {news[4]}") for news in of_news]).reshape(-1, 64)
            np.testing.assert_allclose(np.array(row[f"{side}_text"]).reshape(-1, 64), expected, atol=1e-6)
    schema = RequestSchema.load(tmp_path / "out")
    sizes = {
        f.name: (f.table, f.table_size or f.size)
        for f in schema.features
        if f.table in ("category", "subcategory", "text")
    }
    for side in ("candidate", "history"):
        assert sizes[f"{side}_category"] == ("category", 3)
        assert sizes[f"{side}_subcategory"] == ("subcategory", 5)
        assert sizes[f"{side}_text"] == ("text", 64)
    (batch,) = RequestDataset(tmp_path / "out", "train", batch_size=3, num_lanes=1, seed=None)
    assert batch.sequences["candidate_category"].values().tolist() == [1, 2, 2, 1, 0, 0, 2, 1]
    assert batch.dense_sequences["history_text"].values().shape == (4, 64)


def test_without_news_the_rest_is_the_same(tmp_path: Path) -> None:
    without = prepared(tmp_path, LINES)
    mind.prepare(tmp_path / "behaviors.tsv", tmp_path / "with", news=write(tmp_path / "other.tsv", NEWS))
    for split, requests in requests_of(tmp_path / "with").items():
        for row, expected in zip(requests, without[split], strict=True):
            assert {name: row[name] for name in expected} == expected
            assert len(row) == len(expected) + 6


def test_vectors_of_news_may_be_given(tmp_path: Path) -> None:
    vectors = {"N4": [1.0, 2.0], "N8": [3.0, 4.0], "N1": [5.0, 6.0]}
    pq.write_table(pa.table({"id": list(vectors), "vector": list(vectors.values())}), tmp_path / "v.parquet")
    mind.prepare(folder_of(tmp_path, LINES, NEWS), tmp_path / "out", vectors=tmp_path / "v.parquet")
    first = requests_of(tmp_path / "out")["train"][0]
    assert first["candidate_text"] == [[1.0, 2.0], [0.0, 0.0]]
    assert first["history_text"] == [[0.0, 0.0], [5.0, 6.0]]
    assert first["candidate_category"] == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("N8\tnews\tlocal\tSun", r"news\.tsv: not as MIND is published \(.*Row #2: Expected 8 columns, got 4"),
        (news_line("", "news", "local", "Sun"), r"news\.tsv: line 2: id is '', not the name of a news"),
        (news_line("N1", "news", "local", "Sun"), r"news\.tsv: line 2: id is 'N1', not a name that no line before has"),
    ],
)
def test_a_bad_line_of_the_news_is_refused_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mind.prepare(folder_of(tmp_path, LINES, [NEWS[0], line, NEWS[1]]), tmp_path / "out")


def test_news_of_other_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of the 6 news of train is in news\.tsv: give the one that belongs to"):
        mind.prepare(folder_of(tmp_path, LINES, [NEWS[-1]]), tmp_path / "out")
    with pytest.raises(InputError, match=r"nowhere\.tsv: no such file: give MIND's news\.tsv"):
        mind.prepare(tmp_path, tmp_path / "out", news=tmp_path / "nowhere.tsv")
    (tmp_path / "news.tsv").unlink()
    with pytest.raises(InputError, match=r"vectors is v\.parquet, but there is no .*news\.tsv"):
        mind.prepare(tmp_path, tmp_path / "out", vectors="v.parquet")


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["N1", "N2"], [[1.0], [1.0, 2.0]], r"row 1: vector has 2 numbers, but that of row 0 has 1"),
        (["N1", "N1"], [[1.0], [2.0]], r"row 1: id is 'N1', which a row before has"),
        (["N1", None], [[1.0], [2.0]], r"row 1: id is null"),
        (["N1", "N2"], [[1.0], [float("nan")]], r"row 1: vector .*nan, not a finite number"),
        (["X1", "X2"], [[1.0], [2.0]], r"none of its 2 ids is one of the 6 of news\.tsv"),
        ([1, 2], [[1.0], [2.0]], r"row 0: id is int64, not text"),
        (["N1"], [[]], r"has no numbers in row 0"),
    ],
)
def test_bad_vectors_are_refused_by_file_and_row(
    tmp_path: Path, ids: list[Any], vectors: list[list[float]], message: str
) -> None:
    vector = pa.array(vectors, pa.list_(pa.float64()))
    pq.write_table(pa.table({"id": ids, "vector": vector}), tmp_path / "v.parquet")
    with pytest.raises(InputError, match=rf"v\.parquet: {message}"):
        mind.prepare(folder_of(tmp_path, LINES, NEWS), tmp_path / "out", vectors=tmp_path / "v.parquet")


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
