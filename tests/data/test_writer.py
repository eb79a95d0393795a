import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SCHEMA, make_table
from torchrec_amort import InputError, RequestSchema
from torchrec_amort.data.counts import sizes
from torchrec_amort.data.writer import write_requests


def test_writes_rows_schema_and_counts(tmp_path: Path) -> None:
    table = make_table(70)
    counts = write_requests(
        tmp_path / "films", SCHEMA, {"train": [table.slice(0, 30), table.slice(30)], "test": [table]}
    )
    assert pq.read_table(tmp_path / "films" / "train").equals(table)
    assert RequestSchema.load(tmp_path / "films") == SCHEMA
    candidates = sum(len(items) for items in table["candidate_item"].to_pylist())
    users = len(set(table["user"].to_pylist()))
    assert counts["train"] == counts["test"] == {"requests": 70, "candidates": candidates, "users": users}
    assert sizes(json.loads((tmp_path / "films" / "counts.json").read_text())) == counts


def failing() -> Iterator[pa.Table]:
    yield make_table(10)
    raise RuntimeError("the log ends here")


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ends here"):
        write_requests(tmp_path / "films", SCHEMA, {"train": failing()})
    assert list(tmp_path.iterdir()) == []
    bad = make_table(10).set_column(3, "user_id", pa.array([99] * 10))
    with pytest.raises(InputError, match="train: request 0: .*'user_id'.* has id 99"):
        write_requests(tmp_path / "films", SCHEMA, {"train": [bad]})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_replaced_unless_allowed_and_kept_if_the_new_one_fails(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    write_requests(folder, SCHEMA, {"train": [make_table(10)]})
    with pytest.raises(InputError, match="is there already"):
        write_requests(folder, SCHEMA, {"train": [make_table(20)]})
    with pytest.raises(RuntimeError):
        write_requests(folder, SCHEMA, {"train": failing()}, overwrite=True)
    assert pq.read_table(folder / "train").num_rows == 10
    write_requests(folder, SCHEMA, {"train": [make_table(20)]}, overwrite=True)
    assert pq.read_table(folder / "train").num_rows == 20


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="cannot be written"):
        write_requests(tmp_path / "file" / "films", SCHEMA, {"train": [make_table(10)]})
