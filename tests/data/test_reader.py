import shutil
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from torch.utils.data import DataLoader

from tests.conftest import HASHED, SCHEMA, make_table, spread_ids
from torchrec_amort import InputError, RequestBatch, TableConfig, hash_ids
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.data.writer import write_requests
from torchrec_amort.times import Span


def fingerprints(batch: RequestBatch) -> list[tuple[float, ...]]:
    """Something that tells the requests of a batch apart."""
    prices = batch.candidate_dense[:, 0].split(batch.num_candidates.tolist())
    return [(float(hour), *price.tolist()) for hour, price in zip(batch.request_dense[:, 0], prices, strict=True)]


def steps(
    folder: Path, *, ranks: int = 1, workers: int = 0, epoch: int = 0, first: int = 0, **options: Any
) -> list[list[tuple[float, ...]]]:
    """For each step, the requests of the global batch."""
    of_ranks = []
    for rank in range(ranks):
        arguments = {"batch_size": 16, "seed": 0, "shuffle_rows": 200} | options
        dataset = RequestDataset(folder, "train", rank=rank, world_size=ranks, **arguments)
        dataset.set_position(epoch=epoch, step=first)
        batches = list(DataLoader(dataset, batch_size=None, num_workers=workers))
        assert len(batches) == len(dataset) - first
        of_ranks.append([fingerprints(batch) for batch in batches])
    return [[request for batch in batches for request in batch] for batches in zip(*of_ranks, strict=True)]


def as_sets(batches: list[list[tuple[float, ...]]]) -> list[set[tuple[float, ...]]]:
    return [set(batch) for batch in batches]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The same requests in many files of many row groups."""
    monkeypatch.setattr("torchrec_amort.data.writer.ROWS_PER_GROUP", 32)
    monkeypatch.setattr("torchrec_amort.data.writer.ROWS_PER_FILE", 150)
    folder = tmp_path / "films"
    write_requests(folder, SCHEMA, {"train": [make_table(250, 0), make_table(350, 1)]})
    assert len(list((folder / "train").iterdir())) == 4
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_request_is_read_once_and_every_rank_has_the_same_steps(small_groups: Path, ranks: int) -> None:
    batches = steps(small_groups, ranks=ranks)
    everything = fingerprints(
        RequestBatch.from_arrow(pa.concat_tables([make_table(250, 0), make_table(350, 1)]), SCHEMA)
    )
    assert Counter(request for batch in batches for request in batch) == Counter(everything)
    assert len(batches) == 38
    assert {len(batch) for batch in batches} <= {15, 16, 17}


def test_global_batches_do_not_depend_on_ranks_or_workers(small_groups: Path) -> None:
    alone = as_sets(steps(small_groups))
    assert as_sets(steps(small_groups, ranks=2)) == alone
    assert as_sets(steps(small_groups, ranks=3)) == alone
    assert as_sets(steps(small_groups, workers=2)) == alone
    assert as_sets(steps(small_groups, ranks=2, workers=3)) == alone


def test_the_order_follows_from_seed_and_epoch(small_groups: Path) -> None:
    assert steps(small_groups) == steps(small_groups)
    assert steps(small_groups) != steps(small_groups, seed=1)
    assert steps(small_groups) != steps(small_groups, epoch=1)
    unshuffled = steps(small_groups, seed=None)
    assert unshuffled == steps(small_groups, seed=None, epoch=1)
    neighbours = [set(batch) for batch in unshuffled]
    assert len(set.intersection(neighbours[0], set(steps(small_groups)[0]))) < len(neighbours[0]) / 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_where_it_was_left(small_groups: Path, workers: int) -> None:
    assert steps(small_groups, first=11, epoch=2, workers=workers) == steps(small_groups, epoch=2)[11:]


def test_a_rank_reads_its_share_of_the_row_groups_only(small_groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = pq.ParquetFile.read_row_group

    def read_row_group(file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        read.append(group)
        return original(file, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    list(RequestDataset(small_groups, "train", batch_size=16, num_lanes=4, seed=0))
    everything = len(read)
    read.clear()
    list(RequestDataset(small_groups, "train", batch_size=16, num_lanes=4, rank=1, world_size=4, seed=0))
    assert len(read) <= everything / 4 + 1


@pytest.mark.parametrize("balance_work", [False, True])
def test_no_more_is_held_than_windows_and_row_groups(
    small_groups: Path, monkeypatch: pytest.MonkeyPatch, balance_work: bool
) -> None:
    held = []
    original = RequestDataset._shuffled

    def shuffled(self: RequestDataset, table: pa.Table, *arguments: Any) -> pa.Table:
        held.append(table.num_rows)
        return original(self, table, *arguments)

    monkeypatch.setattr(RequestDataset, "_shuffled", shuffled)
    options: dict[str, Any] = {"num_lanes": 2, "seed": 0, "shuffle_rows": 80, "balance_work": balance_work}
    list(RequestDataset(small_groups, "train", batch_size=16, **options))
    assert max(held) <= 80 // 2 + 32
    assert sum(held) == 600


def test_tiny_data_and_batches_of_one(tmp_path: Path) -> None:
    write_requests(tmp_path / "tiny", SCHEMA, {"train": [make_table(3)]})
    for ranks in (1, 2, 3):
        assert sum(len(batch) for batch in steps(tmp_path / "tiny", ranks=ranks)) == 3
    assert [len(batch) for batch in steps(tmp_path / "tiny", batch_size=1)] == [1, 1, 1]
    with pytest.raises(InputError, match="3 requests in batches of 16 .* cannot be shared by 4 ranks.* at most 3"):
        steps(tmp_path / "tiny", ranks=4)


def test_some_ids_are_made_unknown_and_which_depends_on_the_epoch(small_groups: Path) -> None:
    def users(**options: Any) -> torch.Tensor:
        arguments = {"batch_size": 16, "seed": 0} | options
        dataset = RequestDataset(small_groups, "train", **arguments)
        dataset.set_position(epoch=int(arguments.pop("epoch", 0)))
        return torch.cat([batch.request_sparse["user_id"].values() for batch in dataset])

    known = users()
    dropped = users(unknown_rate={"user_id": 0.5})
    assert bool(((dropped == known) | (dropped == 0)).all())
    assert 0.4 < float((dropped == 0).float().mean()) - float((known == 0).float().mean()) < 0.55
    assert bool((users(unknown_rate={"user_id": 1.0}) == 0).all())
    batches = steps(small_groups, unknown_rate={"user_id": 0.5})
    assert as_sets(batches) == as_sets(steps(small_groups))
    with pytest.raises(InputError, match="hour=0.5 is not a share"):
        users(unknown_rate={"hour": 0.5})
    with pytest.raises(InputError, match="user_id=1.5"):
        users(unknown_rate={"user_id": 1.5})
    with pytest.raises(InputError, match="give a seed"):
        users(unknown_rate={"user_id": 0.5}, seed=None)


@pytest.mark.parametrize("options", [{"seed": 0}, {"seed": 0, "unknown_rate": {"user_id": 0.5}}, {"seed": None}])
def test_a_run_with_tables_of_its_own_reads_the_same_requests_each_id_hashed_once(
    small_groups: Path, options: dict[str, Any]
) -> None:
    def batches(**more: Any) -> list[RequestBatch]:
        return list(RequestDataset(small_groups, "train", batch_size=16, **options, **more))

    for raw, batch in zip(batches(), batches(schema=HASHED), strict=True):
        assert fingerprints(batch) == fingerprints(raw)
        for name in ("request_sparse", "candidate_sparse", "sequences"):
            ids, rows = getattr(raw, name), getattr(batch, name)
            assert torch.equal(rows.lengths(), ids.lengths())
            for key in set(ids.keys()) - {"history_age"}:
                expected = hash_ids(ids[key].values().numpy(), HASHED.table_sizes[key])
                assert rows[key].values().tolist() == expected.tolist()


def test_ids_of_any_size_are_written_as_they_are_and_read_as_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(spread_ids(make_table(40).to_pylist()), HASHED.arrow_schema())
    write_requests(tmp_path / "large", HASHED, {"train": [table]})
    assert pq.read_table(tmp_path / "large" / "train").equals(table)
    (batch,) = RequestDataset(tmp_path / "large", "train", batch_size=40)
    expected = RequestBatch.from_arrow(table, HASHED)
    assert fingerprints(batch) == fingerprints(expected)
    assert torch.equal(batch.sequences.values(), expected.sequences.values())


def test_data_that_a_runs_tables_do_not_fit_is_refused(small_groups: Path) -> None:
    larger = SCHEMA.with_tables({"user_id": TableConfig(rows=30, vocabulary="refuse")})
    write_requests(small_groups / "larger", larger, {"train": [make_table(20)]})
    RequestDataset(small_groups, "train", batch_size=16, schema=larger)
    with pytest.raises(InputError, match="larger: user_id has 30 rows .* has 20 and refuses other ids"):
        RequestDataset(small_groups / "larger", "train", batch_size=16, schema=SCHEMA)


def test_the_latest_events_are_kept(small_groups: Path) -> None:
    batches = RequestDataset(small_groups, "train", batch_size=16, history_length=3)
    assert max(int(batch.sequences["history_item"].lengths().max()) for batch in batches) == 3


@pytest.fixture
def copied(data_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_folder, tmp_path / "copy"))


def test_a_cut_file_is_refused_with_its_name(copied: Path) -> None:
    file = copied / "train" / "part-00000.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"part-00000\.parquet: not a complete Parquet file.*prepare the data again"):
        RequestDataset(copied, "train", batch_size=16)


def test_a_file_damaged_within_is_refused_with_file_and_row(copied: Path) -> None:
    file = copied / "train" / "part-00000.parquet"
    content = bytearray(file.read_bytes())
    content[2000:6000] = bytes(4000)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"part-00000\.parquet: request"):
        list(RequestDataset(copied, "train", batch_size=16))


def test_a_missing_column_is_refused_with_file_and_column(copied: Path) -> None:
    file = copied / "train" / "part-00000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["history_action"]), file)
    with pytest.raises(InputError, match=r"part-00000\.parquet: column 'history_action' is missing"):
        RequestDataset(copied, "train", batch_size=16)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("history_action", [1], "history_action lists 1 entries but history_item lists"),
        ("candidate_item", [40, 1], r"has id 40, not 0 to 39"),
        ("user_id", 20, r"has id 20, not 0 to 19"),
    ],
)
def test_a_bad_row_is_refused_with_file_row_and_field(copied: Path, column: str, value: object, message: str) -> None:
    file = copied / "train" / "part-00000.parquet"
    rows = pq.read_table(file).to_pylist()
    row = next(
        i for i, r in enumerate(rows) if i > 530 and len(r["history_item"]) > 1 and len(r["candidate_item"]) == 2
    )
    rows[row][column] = value
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA.arrow_schema()), file, row_group_size=512)
    with pytest.raises(InputError, match=rf"part-00000\.parquet: request {row}.*{message}"):
        list(RequestDataset(copied, "train", batch_size=16, seed=0))


def test_a_folder_that_is_not_prepared_is_refused(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"schema\.json: no such file: prepare the data first"):
        RequestDataset(tmp_path, "train", batch_size=16)
    with pytest.raises(InputError, match="holdout: no Parquet files"):
        RequestDataset(data_folder, "holdout", batch_size=16)


def test_a_schema_of_a_newer_version_is_refused(copied: Path) -> None:
    file = copied / "schema.json"
    file.write_text(file.read_text().replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(InputError, match="format_version is 3, this torchrec-amort reads up to 2: upgrade"):
        RequestDataset(copied, "train", batch_size=16)


# Later than all events.
NOON = 300 * 3600


@pytest.fixture(scope="module")
def hours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests of three splits, one each hour, and two from the second split on."""
    folder = tmp_path_factory.mktemp("hours") / "data"
    splits, hour = {}, 0
    for seed, (split, count, of_hour) in enumerate((("train", 40, 1), ("validation", 8, 2), ("test", 12, 2))):
        table = make_table(count, seed, 100 * seed)
        times = pa.array([NOON + 3600 * (hour + row // of_hour) for row in range(count)])
        splits[split] = [table.set_column(table.column_names.index("time"), "time", times)]
        hour += count // of_hour
    write_requests(folder, SCHEMA, splits)
    return folder


@given(since=st.none() | st.integers(0, 60), until=st.none() | st.integers(0, 60))
def test_a_span_has_the_requests_of_its_times_of_all_splits(hours: Path, since: int | None, until: int | None) -> None:
    def at(hour: int | None) -> str | None:
        return None if hour is None else datetime.fromtimestamp(NOON + 3600 * hour, timezone.utc).isoformat()

    every = pa.concat_tables(pq.read_table(hours / split) for split in ("train", "validation", "test"))
    times = (every["time"].to_numpy() - NOON) / 3600
    expected = (times >= (0 if since is None else since)) & (times < (99 if until is None else until))
    if since is not None and until is not None and since >= until:
        with pytest.raises(InputError, match="which is not later: give a later time"):
            Span(at(since), at(until))
        return
    span = Span(at(since), at(until))
    if not expected.any():
        with pytest.raises(InputError, match="no request of split 'all' is from"):
            RequestDataset(hours, "all", batch_size=5, span=span)
        return
    for seed in (None, 0):
        dataset = RequestDataset(hours, "all", batch_size=5, span=span, seed=seed)
        users = np.concatenate([np.asarray(batch.users) for batch in dataset])
        assert dataset.num_requests == len(users) == expected.sum()
        assert sorted(users) == sorted(every["user"].to_numpy()[expected])
