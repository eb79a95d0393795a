"""EB-NeRD against plain loops over its raw rows, on a small folder in the published format and on the public demo."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.ebnerd_loops import (
    DENSE,
    STARTS,
    Raw,
    Row,
    articles_by_loops,
    as_of,
    bucket,
    candidates_by_loops,
    event_by_loops,
    history_by_loops,
    make_raw,
    request_by_loops,
    rows_of,
    users_by_numpy,
    vector_by_loops,
    views_by_loops,
    write_folder,
)
from torchrec_amort import InputError
from torchrec_amort.apps import prepare
from torchrec_amort.data import ebnerd
from torchrec_amort.data.counts import read_counts
from torchrec_amort.data.ebnerd_counters import embed_readers
from torchrec_amort.data.ebnerd_features import ATTRIBUTES, OF_CANDIDATE, OF_REQUEST
from torchrec_amort.data.ebnerd_files import read_folder
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.schema import RequestSchema

# ----- a small folder -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Raw], Path]:
    raws = make_raw(request.param)
    return raws, write_folder(tmp_path_factory.mktemp("small"), raws)


Small = tuple[dict[str, Raw], Path]


@pytest.fixture(scope="module")
def small_rows(small: Small) -> dict[str, list[Row]]:
    return rows_of(small[1])


def requests_of(raws: dict[str, Raw]) -> dict[str, list[tuple[Raw, Row]]]:
    """The raw requests of each split that is written, in order of time."""
    train = [(raws["train"], row) for row in raws["train"].in_order]
    is_fit = [row["impression_time"] < ebnerd.VALIDATION_START for _, row in train]
    return {
        "train": [pair for pair, fit in zip(train, is_fit, strict=True) if fit],
        "validation": [pair for pair, fit in zip(train, is_fit, strict=True) if not fit],
        "test": [(raws["validation"], row) for row in raws["validation"].in_order],
    }


def paired(rows: dict[str, list[Row]], raws: dict[str, Raw]) -> Iterator[tuple[Row, Raw, Row]]:
    """Each row that is written, with its split and its request as they are published."""
    for split, requests in requests_of(raws).items():
        for row, (raw, request) in zip(rows[split], requests, strict=True):
            yield row, raw, request


def kept_history(raw: Raw, request: Row) -> list[Row]:
    return history_by_loops(raw, request["user_id"], request["impression_time"])[-15:]


def test_the_small_folder_has_what_is_difficult(small: Small) -> None:
    raws = small[0]
    for raw in raws.values():
        times = [row["impression_time"] for row in raw.behaviors]
        assert len(set(times)) < len(times)
        assert any(len(set(row["article_ids_clicked"])) > 1 for row in raw.behaviors)
        assert any(len(row["article_ids_clicked"]) > len(set(row["article_ids_clicked"])) for row in raw.behaviors)
        assert {row["user_id"] for row in raw.behaviors} - {row["user_id"] for row in raw.history}
        assert any(not row["article_id_fixed"] for row in raw.history)
        assert any(article not in raw.lengths for row in raw.behaviors for article in row["article_ids_inview"])
    assert all(requests_of(raws).values())


def test_dense_features_are_those_of_plain_loops_and_all_but_popularity_standardized_by_train(
    small: Small, small_rows: dict[str, list[Row]]
) -> None:
    by_loops = {
        split: [(request_by_loops(raw, row), candidates_by_loops(raw, row)) for raw, row in requests]
        for split, requests in requests_of(small[0]).items()
    }

    def scale(values: list[float]) -> Callable[[float], float]:
        mean, deviation = np.nanmean(values), np.nanstd(values)
        return lambda value: 0 if math.isnan(value) else float(np.clip((value - mean) / (deviation or 1), -6, 6))

    train = by_loops["train"]
    of_request = {name: scale([request[name] for request, _ in train]) for name in OF_REQUEST}
    of_candidate = {name: scale([c[name] for _, candidates in train for c in candidates]) for name in OF_CANDIDATE}
    of_candidate["popularity"] = float
    for split, rows in small_rows.items():
        for row, (request, candidates) in zip(rows, by_loops[split], strict=True):
            for name in OF_REQUEST:
                assert row[name] == pytest.approx(of_request[name](request[name]), abs=1e-4), name
            for name in OF_CANDIDATE:
                expected = [of_candidate[name](candidate[name]) for candidate in candidates]
                assert row[name] == pytest.approx(expected, abs=1e-4), name


def test_candidates_labels_and_events_are_those_of_plain_loops(small: Small, small_rows: dict[str, list[Row]]) -> None:
    known, _ = users_by_numpy(small[0])
    row_of = {article: place for place, article in enumerate(known, start=1)}
    key_of = {article: place for place, article in enumerate(articles_by_loops(small[0]))}
    for request_id, (row, raw, request) in enumerate(paired(small_rows, small[0])):
        shown, clicked = request["article_ids_inview"], request["article_ids_clicked"]
        events = kept_history(raw, request)
        views = views_by_loops(raw, request["user_id"], request["impression_time"])[-15:]
        assert {name: row[name] for name in row if name not in DENSE} == {
            "request_id": request_id,
            "user": request["user_id"],
            "time": request["impression_time"],
            "device": request["device_type"],
            "candidate_article": [row_of.get(article, 0) for article in shown],
            "candidate_vector": row["candidate_vector"],
            "candidate_key": [key_of[article] for article in shown],
            "clicked": [float(article in clicked) for article in shown],
            "clicked_article": [row_of.get(event["article"], 0) for event in events],
            "clicked_vector": row["clicked_vector"],
            "clicked_key": [key_of[event["article"]] for event in events],
            "clicked_in_week": [event["in_week"] for event in events],
            "clicked_read_time": [bucket(event["read_time"], (5, 15, 30, 60, 120, 240)) for event in events],
            "clicked_scroll": [bucket(event["scroll"], (20, 50, 80, 99.5)) for event in events],
            "clicked_time": [event["time"] for event in events],
            "viewed_key": [key_of[article] for _, article in views],
            "viewed_time": [time for time, _ in views],
        }


def test_vectors_are_those_of_readers_before_up_to_one_rotation(small: Small, small_rows: dict[str, list[Row]]) -> None:
    _, of_users = users_by_numpy(small[0])
    of_raw = {id(raw): of_users[split] for split, raw in small[0].items()}
    written, expected = [], []
    for row, raw, request in paired(small_rows, small[0]):
        written += row["candidate_vector"] + row["clicked_vector"]
        asked = [(article, request["impression_time"]) for article in request["article_ids_inview"]]
        asked += [(event["article"], as_of(event, raw)) for event in kept_history(raw, request)]
        expected += [vector_by_loops(raw, article, time, of_raw[id(raw)]) for article, time in asked]
    left, _, right = np.linalg.svd(np.array(expected).T @ np.array(written))
    np.testing.assert_allclose(np.array(expected) @ left @ right, np.array(written), atol=1e-4)


def test_attributes_of_events_have_the_scale_of_the_candidates(small: Small, small_rows: dict[str, list[Row]]) -> None:
    of_candidates: dict[tuple[str, float], float] = {}
    for row, raw, request in paired(small_rows, small[0]):
        for place, values in enumerate(candidates_by_loops(raw, request)):
            of_candidates |= {(name, round(values[name], 9)): row[name][place] for name in ATTRIBUTES}
        assert row["candidate_attributes"] == [list(of) for of in zip(*(row[n] for n in ATTRIBUTES), strict=True)]
    compared = dict.fromkeys(ATTRIBUTES, 0)
    for row, raw, request in paired(small_rows, small[0]):
        for attributes, event in zip(row["clicked_attributes"], kept_history(raw, request), strict=True):
            values = event_by_loops(raw, event)
            for name, have in zip(ATTRIBUTES, attributes, strict=True):
                if math.isnan(values[name]):
                    assert have == 0
                elif (known := of_candidates.get((name, round(values[name], 9)))) is not None:
                    assert have == pytest.approx(known, abs=1e-5)
                    compared[name] += 1
    assert min(compared.values()) > 100


# ----- what is promised ---------------------------------------------------------------------------------------------


def changed_from(raw: Raw, place: int) -> Raw:
    """The split with another user, other articles and other clicks in all requests from the second of one on but it."""
    kept, rng = raw.in_order[place], np.random.default_rng(0)
    articles = sorted(raw.inviews)

    def change(row: Row) -> Row:
        if row is kept or row["impression_time"] < kept["impression_time"]:
            return row
        shown = rng.choice(articles, 9, replace=False).tolist()
        user = int(rng.choice([kept["user_id"], 7, 10, 13]))
        return row | {"user_id": user, "article_ids_inview": shown, "article_ids_clicked": shown[:2]}

    return Raw([change(row) for row in raw.behaviors], raw.history, raw.lengths, raw.premium)


def assert_other_scale(written: np.ndarray, values: np.ndarray, name: str) -> None:
    """Values are the written ones but for their scale; a missing value is 0 in any, and the ends are clipped."""
    inside = (np.abs(written) < 6) & (np.abs(values) < 6) & (written != 0)
    of_line = np.stack([values, np.ones_like(values)], axis=1)[inside]
    np.testing.assert_allclose(
        of_line @ np.linalg.lstsq(of_line, written[inside], rcond=None)[0], written[inside], atol=2e-4, err_msg=name
    )


def upto(rows: list[Row], row: Row) -> list[Row]:
    """The requests before a row's second, and the row itself."""
    return [other for other in rows if other["time"] < row["time"]] + [row]


def test_no_later_or_simultaneous_row_of_the_test_week_changes_a_request(
    small: Small, small_rows: dict[str, list[Row]], tmp_path: Path
) -> None:
    raws, _ = small
    for place in (0, 40, 80):
        changed = raws | {"validation": changed_from(raws["validation"], place)}
        rows = rows_of(write_folder(tmp_path / str(place), changed))
        assert rows["train"] == small_rows["train"]
        assert rows["validation"] == small_rows["validation"]
        assert rows["test"] != small_rows["test"]
        assert upto(rows["test"], rows["test"][place]) == upto(small_rows["test"], small_rows["test"][place])


def test_no_later_or_simultaneous_row_of_the_last_day_of_train_changes_a_request(
    small: Small, small_rows: dict[str, list[Row]], tmp_path: Path
) -> None:
    raws, _ = small
    place = 2
    changed = raws | {"train": changed_from(raws["train"], len(small_rows["train"]) + place)}
    rows = rows_of(write_folder(tmp_path / "changed", changed))
    assert rows["train"] == small_rows["train"]
    assert rows["validation"] != small_rows["validation"]
    assert rows["test"] == small_rows["test"]
    now = upto(rows["validation"], rows["validation"][place])
    assert now == upto(small_rows["validation"], small_rows["validation"][place])


def test_of_later_rows_of_train_only_the_scale_of_dense_features_is_made(
    small: Small, small_rows: dict[str, list[Row]], tmp_path: Path
) -> None:
    """Mean and deviation are train's; the embedding is made of histories, which end before the first request."""
    raws, _ = small
    changed = raws | {"train": changed_from(raws["train"], 30)}
    rows = rows_of(write_folder(tmp_path / "changed", changed))

    def undone(split: str, splits: dict[str, list[Row]]) -> list[Row]:
        kept = upto(splits["train"], splits["train"][30]) if split == "train" else splits[split]
        return [{name: values for name, values in row.items() if name not in DENSE} for row in kept]

    for split in ("train", "test"):
        assert undone(split, rows) == undone(split, small_rows)
    for name in OF_CANDIDATE:
        new, old = (np.concatenate([row[name] for row in splits["test"]]) for splits in (rows, small_rows))
        assert_other_scale(new, old, name)


# How names of events' features begin.
OF_HISTORIES = ("clicked_", "viewed_")


def test_a_history_keeps_its_latest_events(small: Small, small_rows: dict[str, list[Row]]) -> None:
    rows = rows_of(small[1], history_length=3)
    for split, whole in small_rows.items():
        for row, longer in zip(rows[split], whole, strict=True):
            assert row == {n: v[-3:] if n.startswith(OF_HISTORIES) else v for n, v in longer.items()}


def test_published_articles_tell_lengths_and_premium(
    small: Small, small_rows: dict[str, list[Row]], tmp_path: Path
) -> None:
    raws, _ = small
    folder = write_folder(tmp_path / "folder", raws, article_files=False)
    lengths, premium = raws["train"].lengths, raws["train"].premium
    published = {
        "article_id": list(lengths),
        "body": ["å" * length for length in lengths.values()],
        "premium": [premium[article] == 1 for article in lengths],
    }
    pq.write_table(pa.table(published), folder / "articles.parquet")
    assert rows_of(folder) == small_rows


def test_what_is_known_of_no_article_is_zero_and_the_rest_the_same(
    small: Small, small_rows: dict[str, list[Row]], tmp_path: Path
) -> None:
    rows = rows_of(write_folder(tmp_path / "folder", small[0], article_files=False))
    names = {"article_length", "article_length_less_mean", "length_missing", "premium"}
    for split, known in small_rows.items():
        for row, other in zip(rows[split], known, strict=True):
            expected = {n: [0.0] * len(v) if n in names else v for n, v in other.items()}
            for side in ("candidate_attributes", "clicked_attributes"):
                expected[side] = [[0.0, 0.0, readers] for _, _, readers in other[side]]
            assert row == expected


def test_prepared_requests_are_read_as_batches(small: Small, small_rows: dict[str, list[Row]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ebnerd.prepare(small[1], out, history_length=15)
    for split, rows in small_rows.items():
        assert sizes[split] == {
            "requests": len(rows),
            "candidates": sum(len(row["clicked"]) for row in rows),
            "users": len({row["user"] for row in rows}),
        }
        ids = [article for row in rows for article in row["candidate_article"]]
        assert read_counts(out)[split]["unknown_ids"]["candidate_article"] == pytest.approx(ids.count(0) / len(ids))
        (batch,) = RequestDataset(out, split, batch_size=len(rows), num_lanes=1, seed=None)
        assert batch.num_candidates.tolist() == [len(row["clicked"]) for row in rows]
        assert batch.candidate_dense.shape == (len(ids), len(OF_CANDIDATE))
        assert batch.sequences["candidate_article"].values().tolist() == ids
        assert batch.sequences["clicked_time"].lengths().tolist() == [len(row["clicked_time"]) for row in rows]
        vectors = [vector for row in rows for vector in row["clicked_vector"]]
        assert batch.dense_sequences["clicked_vector"].values().tolist() == vectors


def test_a_folder_has_views_if_asked_and_a_frozen_row_for_each_article(small: Small, tmp_path: Path) -> None:
    for views, histories in ((False, ["clicks"]), (True, ["clicks", "views"])):
        ebnerd.prepare(small[1], out := tmp_path / str(views), views=views)
        schema = RequestSchema.load(out)
        assert list(schema.histories) == histories
        keys = [feature for feature in schema.features if feature.table == ebnerd.KEYS]
        names = ["candidate_key", "clicked_key", "viewed_key"]
        assert [feature.name for feature in keys] == names[: 1 + len(histories)]
        assert {feature.table_size for feature in keys} == {len(articles_by_loops(small[0]))}
        assert not schema.tables[ebnerd.KEYS].trains


def test_embeddings_agree_with_a_whole_svd_and_turn_onto_another() -> None:
    rng = np.random.default_rng(0)
    num_users, num_articles = 400, 300
    taste, topic = rng.normal(size=(num_users, 6)), rng.normal(size=(num_articles, 6))
    read = rng.random((num_users, num_articles)) < 1 / (1 + np.exp(3.5 - taste @ topic.T))
    user, article = np.nonzero(read)
    embedding = embed_readers(np.repeat(user, 2), np.repeat(article, 2), num_users)
    assert (embedding.article == np.flatnonzero(read.sum(0) >= 5)).all()

    weighted = read[:, embedding.article] * np.log(num_users / read[:, embedding.article].sum(0))
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-30)
    vectors = weighted @ np.linalg.svd(weighted)[2][1:33].T
    vectors -= vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = embedding.user_vectors @ embedding.user_vectors.T
    np.testing.assert_allclose(cosines, vectors @ vectors.T, atol=1e-4)

    turn = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    other = replace(embedding, basis=embedding.basis @ turn)
    turned = embed_readers(user, article, num_users, like=other)
    np.testing.assert_allclose(turned.user_vectors, embedding.user_vectors @ turn, atol=1e-6)


# ----- what is refused ----------------------------------------------------------------------------------------------


def with_column(path: Path, name: str, values: list[Any]) -> None:
    table = pq.read_table(path)
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, pa.array(values, table[name].type)), path)


def behaviors_with(name: str, row: int, value: Any) -> Callable[[Path], None]:
    return partial(_file_with, "behaviors.parquet", name, row, value)


def history_with(name: str, row: int, value: Any) -> Callable[[Path], None]:
    return partial(_file_with, "history.parquet", name, row, value)


def _file_with(file: str, name: str, row: int, value: Any, folder: Path) -> None:
    values = pq.read_table(folder / "train" / file)[name].to_pylist()
    values[row] = value(values[row]) if callable(value) else value
    with_column(folder / "train" / file, name, values)


def without(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def cut(folder: Path) -> None:
    path = folder / "train" / "behaviors.parquet"
    path.write_bytes(path.read_bytes()[:-9])


def drop_column(folder: Path) -> None:
    path = folder / "train" / "history.parquet"
    pq.write_table(pq.read_table(path).drop_columns("read_time_fixed"), path)


def drop_rows(folder: Path) -> None:
    path = folder / "train" / "behaviors.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)


def move(folder: Path) -> None:
    path = folder / "train" / "behaviors.parquet"
    times = [time + timedelta(days=7) for time in pq.read_table(path)["impression_time"].to_pylist()]
    with_column(path, "impression_time", times)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("train/history.parquet"), r"train/history\.parquet: no such file: give a folder of EB-NeRD"),
        (without("validation/behaviors.parquet"), r"validation/behaviors\.parquet: no such file"),
        (cut, r"train/behaviors\.parquet: not as EB-NeRD is published \(.*\): download it again"),
        (drop_column, r"train/history\.parquet: column 'read_time_fixed' is missing"),
        (drop_rows, r"train/behaviors\.parquet: has 0 rows, not 1 or more"),
        (behaviors_with("user_id", 3, None), r"train/behaviors\.parquet: row 3: user_id is null"),
        (behaviors_with("article_ids_inview", 4, []), r"behaviors\.parquet: row 4: article_ids_inview has 0 articles"),
        (history_with("user_id", 5, 7), r"history\.parquet: row 5: user_id 7 has 2 rows, not 1"),
        (
            history_with("scroll_percentage_fixed", 6, [1] * 50),
            r"history\.parquet: row 6: scroll_percentage_fixed has 50 entries, article_id_fixed \d+: download",
        ),
        (
            history_with("impression_time_fixed", 8, lambda times: [*times[:-1], datetime(2023, 6, 1)]),
            r"history\.parquet: row 8: impression_time_fixed has 1685577600, which is not before 1684\d+, the first",
        ),
        (move, r"ebnerd: the first request of train is at 16849\d+, not before 1684911600"),
    ],
)
def test_a_folder_that_is_not_as_published_is_refused_by_file_and_row(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = write_folder(tmp_path / "folder", make_raw(0))
    spoil(folder)
    with pytest.raises(InputError, match=message):
        ebnerd.prepare(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_views(small: Small, tmp_path: Path) -> None:
    ebnerd.prepare(small[1], tmp_path / "expected", views=True)
    options = ["--source", str(small[1]), "--out", str(tmp_path / "out")]
    prepare.main(["ebnerd", *options, "--views", "true"])
    for split in ("train", "validation", "test"):
        assert pq.read_table(tmp_path / "out" / split).equals(pq.read_table(tmp_path / "expected" / split))


def test_what_cannot_be_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recsys\.eb\.dk"):
        ebnerd.prepare(None, tmp_path / "out")


# ----- the public demo ----------------------------------------------------------------------------------------------


@dataclass
class Public:
    """The public demo and what it becomes, with short histories."""

    raws: dict[str, Raw]
    schema: RequestSchema
    tables: dict[str, pa.Table]


@pytest.fixture(scope="module")
def public(shared_data: Path) -> Public:
    folder = shared_data / "ebnerd-demo"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    schema, tables = ebnerd.split_requests(*read_folder(folder), history_length=5)
    return Public(
        read_raw(folder), schema, {split: pa.concat_tables(parts).combine_chunks() for split, parts in tables.items()}
    )


def read_raw(folder: Path) -> dict[str, Raw]:
    attributes = [
        dict(
            zip(
                *pq.read_table(folder / f"{name}.parquet", columns=["article_id", column]).to_pydict().values(),
                strict=True,
            )
        )
        for name, column in (("article_length", "article_length"), ("premium_articles", "premium"))
    ]
    raws = {}
    for split in STARTS:
        behaviors = pq.read_table(folder / split / "behaviors.parquet").to_pylist()
        history = pq.read_table(folder / split / "history.parquet").to_pylist()
        for row in behaviors:
            row["impression_time"] = seconds(row["impression_time"])
        for row in history:
            row["impression_time_fixed"] = [seconds(time) for time in row["impression_time_fixed"]]
        raws[split] = Raw(behaviors, history, *attributes)
    return raws


def seconds(moment: datetime) -> int:
    return int(moment.replace(tzinfo=timezone.utc).timestamp())


def flat(public: Public, split: str, name: str) -> np.ndarray:
    """A feature of all candidates or events of a published split."""
    parts = ("train", "validation") if split == "train" else ("test",)
    arrays = [public.tables[part][name].combine_chunks() for part in parts]
    return np.concatenate([(array.flatten() if pa.types.is_list(array.type) else array).to_numpy() for array in arrays])


def test_the_public_demo_has_its_known_counts(public: Public) -> None:
    clicks = {split: table["clicked"].combine_chunks() for split, table in public.tables.items()}
    counts = {split: (len(c), len(c.flatten()), c.flatten().to_numpy().sum()) for split, c in clicks.items()}
    assert counts == {
        "train": (21_318, 240_288, 21_408),
        "validation": (3_406, 37_851, 3_421),
        "test": (25_356, 304_915, 25_444),
    }
    of_splits = {}
    for split in STARTS:
        of_request = np.add.reduceat(flat(public, split, "clicked"), bounds_of(public, split)[:-1])
        num_candidates = np.diff(bounds_of(public, split))
        assert (of_request >= 1).all() and (of_request < num_candidates).all()
        users = len(np.unique(flat(public, split, "user")))
        of_splits[split] = (users, (of_request > 1).sum(), num_candidates.min(), num_candidates.max())
    assert of_splits == {"train": (1_590, 73, 5, 100), "validation": (1_562, 70, 5, 93)}


def bounds_of(public: Public, split: str) -> np.ndarray:
    """Where the candidates of each request start."""
    return np.cumsum([0, *(len(row["article_ids_inview"]) for row in public.raws[split].in_order)])


@pytest.mark.parametrize(("split", "expected"), [("train", (272, 318, 17.0)), ("validation", (241, 294, 17.2))])
def test_histories_of_the_public_demo_are_as_long_as_known(
    public: Public, split: str, expected: tuple[float, float, float]
) -> None:
    raw = public.raws[split]
    times = {user: [event["time"] for event in events] for user, events in raw.reads.items()}
    lengths = np.array([bisect_left(times[row["user_id"]], row["impression_time"]) for row in raw.in_order])
    before = np.array([bisect_left(times[row["user_id"]], raw.start) for row in raw.in_order])
    have = np.median(lengths), lengths.mean(), (lengths - before).mean()
    assert have == pytest.approx(expected, rel=2e-3)
    assert_other_scale(flat(public, split, "history_length"), np.log1p(lengths), "history_length")
    assert_other_scale(flat(public, split, "clicks_of_week"), np.log1p(lengths - before), "clicks_of_week")


@pytest.mark.parametrize(("split", "candidates", "events"), [("train", 0.123, 0.90), ("validation", 0.052, 0.58)])
def test_the_table_of_the_public_demo_knows_the_articles_of_train(
    public: Public, split: str, candidates: float, events: float
) -> None:
    readers = Counter(a for row in public.raws["train"].history for a in set(row["article_id_fixed"]))
    known = {article for article, count in readers.items() if count >= 5}
    assert public.schema.table_sizes["candidate_article"] == len(known) + 1 == 2_526
    shown = [a for row in public.raws[split].in_order for a in row["article_ids_inview"]]
    ids = flat(public, split, "candidate_article")
    assert (ids > 0).tolist() == [article in known for article in shown]
    assert (ids > 0).mean() == pytest.approx(candidates, abs=5e-4)
    read = [event["article"] in known for events in public.raws[split].reads.values() for event in events]
    assert np.mean(read) == pytest.approx(events, abs=5e-3)


@pytest.mark.parametrize("split", STARTS)
def test_of_the_public_demos_candidates_7_2_percent_have_no_vector(public: Public, split: str) -> None:
    assert (~vectors_of(public, split).any(axis=1)).mean() == pytest.approx(0.072, abs=5e-4)


def vectors_of(public: Public, split: str) -> np.ndarray:
    parts = ("train", "validation") if split == "train" else ("test",)
    arrays = [public.tables[part]["candidate_vector"].combine_chunks().flatten().flatten() for part in parts]
    return np.concatenate([array.to_numpy() for array in arrays]).reshape(-1, 32)


def test_popularity_alone_ranks_the_public_demo_as_known(public: Public) -> None:
    bounds, popularity = bounds_of(public, "validation"), flat(public, "validation", "popularity")
    clicked = flat(public, "validation", "clicked") == 1
    aucs = []
    for start, stop in pairwise(bounds):
        score, label = popularity[start:stop], clicked[start:stop]
        above = score[label][:, None] - score[~label]
        aucs.append(((above > 0) + 0.5 * (above == 0)).mean())
    assert np.mean(aucs) == pytest.approx(0.7182, abs=5e-5)


def test_random_requests_of_the_public_demo_are_those_of_plain_loops(public: Public) -> None:
    expected: dict[str, list[float]] = defaultdict(list)
    have: dict[str, list[float]] = defaultdict(list)
    for split, raw in public.raws.items():
        bounds, values = bounds_of(public, split), {name: flat(public, split, name) for name in OF_CANDIDATE}
        lengths = np.linalg.norm(vectors_of(public, split), axis=1)
        for place in np.random.default_rng(0).choice(len(raw.in_order), 15, replace=False):
            shown = slice(bounds[place], bounds[place + 1])
            by_loops = candidates_by_loops(raw, raw.in_order[place])
            for name in OF_CANDIDATE:
                have[name] += values[name][shown].tolist()
                expected[name] += [candidate[name] for candidate in by_loops]
            readers = np.expm1([candidate["readers"] for candidate in by_loops])
            np.testing.assert_allclose(lengths[shown], readers / (readers + 3), atol=1e-5)
    assert len(have["readers"]) > 250
    for name in OF_CANDIDATE:
        assert_other_scale(np.array(have[name]), np.array(expected[name]), name)
