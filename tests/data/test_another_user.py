from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from tests.conftest import SCHEMA, make_table
from tests.schemas import NOW, THREE, Shapes, make_requests
from torchrec_amort import Feature, InputError, RequestSchema
from torchrec_amort.apps import prepare
from torchrec_amort.data import another_user
from torchrec_amort.data.writer import write_requests

OF_EVENTS = {feature.source for feature in THREE.of("event")}


def rows_of(users: Sequence[int], seed: int) -> pa.Table:
    """Requests of three histories, in order of time."""
    shapes: Shapes = [([row % 4, (row + 1) % 3, 2], 1 + row % 3) for row in range(len(users))]
    requests = make_requests(THREE, shapes, seed)
    for row, (request, user) in enumerate(zip(requests, users, strict=True)):
        request |= {"user": user, "time": NOW + row // 2}
    return pa.Table.from_pylist(requests, THREE.arrow_schema())


def expected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for place, row in enumerate(rows):
        others = [other for other in rows[:place] if other["user"] != row["user"]]
        made.append({name: (others[-1][name] if others else []) if name in OF_EVENTS else row[name] for name in row})
    return made


@settings(max_examples=25, deadline=None)
@given(users=st.lists(st.integers(1, 3), min_size=1, max_size=40), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_request_has_the_histories_of_the_latest_one_of_another_user_and_all_else_its_own(
    tmp_path_factory: pytest.TempPathFactory, users: list[int], size: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("data")
    splits = {"train": rows_of(users, seed), "test": rows_of(users[::-1], seed + 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchrec_amort.data.writer.ROWS_PER_GROUP", size)
        patch.setattr("torchrec_amort.data.writer.ROWS_PER_FILE", 2 * size)
        write_requests(folder / "own", THREE, {split: [table] for split, table in splits.items()})
    counts = another_user.prepare(folder / "own", folder / "other")
    assert {split: of_split["requests"] for split, of_split in counts.items()} == dict.fromkeys(splits, len(users))
    assert RequestSchema.load(folder / "other") == THREE
    for split, table in splits.items():
        assert pq.read_table(folder / "other" / split).to_pylist() == expected(table.to_pylist())


def test_the_command_writes_it(tmp_path: Path) -> None:
    write_requests(tmp_path / "own", SCHEMA, {"train": [make_table(40)]})
    another_user.prepare(tmp_path / "own", tmp_path / "expected")
    prepare.main(["another-user", "--source", str(tmp_path / "own"), "--out", str(tmp_path / "other")])
    assert pq.read_table(tmp_path / "other" / "train").equals(pq.read_table(tmp_path / "expected" / "train"))


def test_what_cannot_be_exchanged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another-user: no source: give a prepared data folder"):
        another_user.prepare(None, tmp_path / "other")
    table = rows_of([1, 2, 3], 0)
    write_requests(tmp_path / "disorder", THREE, {"train": [table.take([0, 2, 1])]})
    with pytest.raises(
        InputError, match=rf"train/part-00000.parquet: request 2 is of time {NOW}, after one of {NOW + 1}"
    ):
        another_user.prepare(tmp_path / "disorder", tmp_path / "other")
    bare = RequestSchema(
        "bare", (Feature("film", "candidate", "id", table_size=9), Feature("liked", "candidate", "label"))
    )
    request = {"request_id": 0, "user": 1, "time": NOW, "film": [3], "liked": [1.0]}
    write_requests(tmp_path / "bare", bare, {"train": [pa.Table.from_pylist([request], bare.arrow_schema())]})
    with pytest.raises(InputError, match="bare: its requests have no history"):
        another_user.prepare(tmp_path / "bare", tmp_path / "other")
    assert not (tmp_path / "other").exists()
