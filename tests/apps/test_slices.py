"""Slices of a split are told apart as a loop over its requests does, and add up to the whole."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from tests.conftest import HASHED, NUM_ITEMS, SCHEMA, make_table
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError
from torchrec_amort.jobs.slices import slicings
from torchrec_amort.schema import Feature, RequestSchema, TableConfig
from torchrec_amort.training.evaluation import EvaluateResult, Evaluation
from torchrec_amort.training.processes import process_group

HISTORY_LENGTH = 4


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with process_group():
        yield


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / split).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def evaluated(folder: Path, names: list[str], schema: RequestSchema = SCHEMA) -> EvaluateResult:
    ways = slicings(names, schema, str(folder), HISTORY_LENGTH, batch_size=32)
    evaluation, random = Evaluation(schema.labels, slicings=ways), np.random.default_rng(0)
    dataset = RequestDataset(folder, "test", batch_size=32, history_length=HISTORY_LENGTH, schema=schema)
    for batch in DataLoader(dataset, batch_size=None):
        evaluation.add(random.normal(size=(batch.stride(), len(schema.labels))).astype(np.float32), batch)
    return evaluation.result()


def sizes(result: EvaluateResult, name: str) -> dict[str, tuple[int, int]]:
    return {one["slice"]: (one["requests"], one["candidates"]) for one in result.slices[name]}


def counted(rows: list[dict[str, Any]], name_of: Callable[[dict[str, Any]], str]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for row in rows:
        requests, candidates = found[name_of(row)]
        found[name_of(row)] = requests + 1, candidates + len(row["candidate_item"])
    return dict(found)


def test_requests_are_told_apart_by_the_events_that_are_read(data_folder: Path) -> None:
    found = sizes(evaluated(data_folder, ["history_length"]), "history_length")
    names = {0: "0", 1: "1", 2: "2 to 3", 3: "2 to 3", 4: "4 to 7"}
    rows = rows_of(data_folder, "test")
    assert found == counted(rows, lambda row: names[min(HISTORY_LENGTH, len(row["history_item"]))])
    assert len(found) > 2


def test_a_candidate_is_unknown_that_training_has_not_read(tmp_path: Path) -> None:
    train = [row for row in make_table(8, seed=3).to_pylist() if len(row["candidate_item"]) < 6]
    write_requests(
        tmp_path / "films",
        SCHEMA,
        {"train": [pa.Table.from_pylist(train, SCHEMA.arrow_schema())], "test": [make_table(60, seed=4)]},
    )
    known = {item for row in rows_of(tmp_path / "films", "train") for item in row["candidate_item"]}
    known |= {item for row in rows_of(tmp_path / "films", "train") for item in row["history_item"][-HISTORY_LENGTH:]}
    assert 0 < len(known) < NUM_ITEMS

    def share(row: dict[str, Any]) -> str:
        unknown = sum(item not in known for item in row["candidate_item"]) / len(row["candidate_item"])
        if unknown in (0, 1):
            return "all" if unknown else "none"
        # In whole numbers, so that a tenth is not above 10%.
        tenth = -(-10 * sum(item not in known for item in row["candidate_item"]) // len(row["candidate_item"]))
        return f"above {10 * tenth - 10}% to {10 * tenth}%" if tenth < 10 else "above 90%, not all"

    found = sizes(evaluated(tmp_path / "films", ["unknown_candidates"]), "unknown_candidates")
    assert found == counted(rows_of(tmp_path / "films", "test"), share)
    assert {"none"} < found.keys()


def test_ids_are_told_apart_the_most_frequent_first_and_the_rest_together(data_folder: Path) -> None:
    found = sizes(evaluated(data_folder, ["user_id"]), "user_id")
    rows = rows_of(data_folder, "test")
    by_id = counted(rows, lambda row: str(row["user_id"]))
    frequent = sorted(by_id, key=lambda name: (-by_id[name][0], int(name)))[:10]
    assert list(found) == [*frequent, f"the other {len(by_id) - 10}"]
    assert {name: found[name] for name in frequent} == {name: by_id[name] for name in frequent}
    rest = [by_id[name] for name in by_id.keys() - set(frequent)]
    assert found[f"the other {len(by_id) - 10}"] == tuple(map(sum, zip(*rest, strict=True)))
    hashed = sizes(evaluated(data_folder, ["user_id"], HASHED), "user_id")
    assert any(name.startswith("row ") for name in hashed)


def test_numbers_are_told_apart_in_parts_of_about_as_many_requests(data_folder: Path) -> None:
    found = sizes(evaluated(data_folder, ["hour"]), "hour")
    assert len(found) == 5
    assert all(9 <= requests <= 27 for requests, _ in found.values())
    hours = [row["hour"] for row in rows_of(data_folder, "test")]
    edges = [tuple(map(float, name.split(" to "))) for name in found]
    assert edges == sorted(edges)
    for (low, high), (requests, _) in zip(edges, found.values(), strict=True):
        # The last edge is where the first 16 bits of its numbers start.
        assert sum(low <= hour < high * (1 + 2**-7) for hour in hours) == requests


def test_every_slicing_adds_up_to_the_whole(data_folder: Path) -> None:
    names = ["history_length", "unknown_candidates", "user_id", "hour"]
    result = evaluated(data_folder, names)
    assert list(result.slices) == names
    for slices in result.slices.values():
        totals: Counter[str] = Counter()
        for one in slices:
            totals.update({size: one[size] for size in ("requests", "candidates")})
            for metric in ("log_loss", "positive_rate"):
                totals[metric] += one["tasks"]["liked"][metric] * one["candidates"]
        assert (totals["requests"], totals["candidates"]) == (result.requests, result.candidates)
        for metric in ("log_loss", "positive_rate"):
            assert totals[metric] / result.candidates == pytest.approx(result.tasks["liked"][metric], rel=1e-12)


def test_what_requests_cannot_be_told_apart_by_is_refused(data_folder: Path) -> None:
    large = SCHEMA.with_tables({"user_id": TableConfig(rows=2**16 + 1)})
    lists = RequestSchema("lists", (Feature("genres", "candidate", "ids", table_size=5), SCHEMA.features[-1]))
    managed = SCHEMA.with_tables({"item": TableConfig(vocabulary="managed")})
    for name, schema, message in (
        ("genre", SCHEMA, r"'genre' is no feature of requests .*\['history_length', 'unknown_candidates', 'user_id', "),
        ("interests", SCHEMA, "'interests' is no feature of requests that the model reads as one id or number"),
        ("user_id", large, "user_id has 65537 ids, and 65536 can be told apart"),
        ("unknown_candidates", managed, "and that of candidate_item is managed: leave it out"),
        ("unknown_candidates", lists, "unknown_candidates needs an item or id of a table, and candidates have none"),
    ):
        with pytest.raises(InputError, match=message):
            slicings([name], schema, str(data_folder), None, batch_size=32)
